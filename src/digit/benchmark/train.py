"""A training step of the prior: images per second, wait for data, share of the machine's peak, and its floor."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from digit.benchmark import floors
from digit.benchmark.clock import alternate, synchronize
from digit.benchmark.measurement import Measurement
from digit.benchmark.sizes import Size
from digit.data.tokens import TokenStore
from digit.models.sequence import training_flops
from digit.runtime.hardware import multiplies_bf16
from digit.tokenizers.encoders import PRECISIONS
from digit.training.config import TrainConfig
from digit.training.peak import PeakSpeed
from digit.training.sequence import SequenceUpdate

MODEL = "prior"


class Steps:
    """Consecutive training steps from a store in memory; `wait` sums the seconds spent waiting for data."""

    def __init__(self, size: Size, precision: str, device: torch.device) -> None:
        model = size.model(MODEL, device).train()
        batches = token_store(size.store_rows, size.discriminative_len, model.cfg.vocab_size).batches(
            size.train_batch, seed=0
        )
        cfg = train_config(size, precision)
        self.update = SequenceUpdate(model, lambda step: {"target": batches(step)["discriminative"]}, cfg)
        self.device, self.count, self.step, self.wait = device, size.train_steps, 0, 0.0

    def __call__(self) -> None:
        for _ in range(self.count):
            self.wait += self.update(self.step)["data_seconds"]
            self.step += 1
        synchronize(self.device)


def train_config(size: Size, precision: str) -> TrainConfig:
    """The recipe's training settings at this batch size."""
    return replace(size.recipe.prior_training, batch_size=size.train_batch, precision=precision)


def token_store(rows: int, length: int, vocab_size: int) -> TokenStore:
    """A token store in memory with random discriminative tokens."""
    discriminative = np.random.default_rng(0).integers(0, vocab_size, (rows, length), dtype=np.uint16)
    return TokenStore(Path("memory"), {}, discriminative, None, np.full(rows, -1, dtype=np.int32))


def time_training(size: Size, device: torch.device, repeats: int) -> list[Measurement]:
    """Times the step in every precision, alternating with the floors."""
    steps = {precision: Steps(size, precision, device) for precision in size.precisions}
    cfg = size.sequence_config(MODEL)
    cases: dict[str, Callable[[], Any]] = dict(steps)
    for precision in size.precisions:
        cases[f"{precision} floor"] = floors.training(cfg, size.train_batch, device, PRECISIONS[precision])
    times, peaks = alternate(cases, repeats, device)
    speed, rows = PeakSpeed(device=device, flops_per_image=training_flops(cfg)), []
    for precision, run in steps.items():
        images = size.train_batch * run.count
        waited = run.wait * repeats / (repeats + 1)  # `wait` includes the warm-up round
        extra: dict[str, float] = {"data_wait": float(waited) / sum(times[precision].seconds)}
        if precision == "bf16" or not multiplies_bf16(device):
            share = speed.share(images / times[precision].median)
            extra |= {} if share is None else {"mfu": share}
        floor = times[f"{precision} floor"].times(run.count)
        labels: dict[str, Any] = dict(part="train", case="step", precision=precision, unit="images", count=images)
        rows.append(Measurement(**labels, time=times[precision], floor=floor, peak=peaks[precision], extra=extra))
    return rows


def profiled(size: Size, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Cases to profile."""
    return {"step": Steps(size, size.precisions[-1], device)}
