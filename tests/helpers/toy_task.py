"""Tiny training tasks for the tests; as a script, runs of them: toy_task.py OUT JSON [OUT JSON ...]."""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

VOCAB, LENGTH, CLASSES = 11, 6, 3


class ToyModel(nn.Module):
    """Predicts the next token from the last one and a label, with dropout and random masks on the input."""

    def __init__(self, dropout: float = 0.1, mask_rate: float = 0.2, width: int = 8):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed, self.label = nn.Embedding(VOCAB + 1, width), nn.Embedding(CLASSES, width)
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCAB)
        self.dropout, self.mask_rate = nn.Dropout(dropout), mask_rate

    def noise(self, batch: dict[str, Tensor | None], generator: torch.Generator) -> dict[str, Tensor]:
        shape = batch["target"].shape
        return {"hidden": torch.rand(shape, generator=generator, device=generator.device) < self.mask_rate}

    def loss(
        self,
        target: Tensor,
        prefix: Tensor | None = None,
        labels: Tensor | None = None,
        label_smoothing: float = 0.0,
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        seen = nn.functional.pad(target[:, :-1], (1, 0), value=VOCAB)  # (B, M)
        hidden = torch.zeros_like(seen, dtype=torch.bool) if hidden is None else hidden
        x = self.embed(seen.masked_fill(hidden, VOCAB))  # (B, M, D)
        x = x if labels is None else x + self.label(labels)[:, None]
        logits = self.head(self.dropout(self.norm(x)))  # (B, M, V)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), label_smoothing=label_smoothing)
        return loss, {"accuracy": (logits.argmax(-1) == target).float().mean()}


def toy_batches(batch_size: int = 8, labelled: bool = True):
    """batches(step): counting sequences t, t + k, t + 2k, ... modulo VOCAB, with k - 1 the label."""

    def batches(step: int) -> dict[str, Tensor | None]:
        generator = torch.Generator().manual_seed(step)
        start = torch.randint(VOCAB, (batch_size, 1), generator=generator)
        labels = torch.randint(CLASSES, (batch_size,), generator=generator)
        target = (start + (labels[:, None] + 1) * torch.arange(LENGTH)) % VOCAB  # (B, M)
        return {"target": target, "prefix": None, "labels": labels if labelled else None}

    return batches


def toy_config(**changes):
    from digit.training.config import TrainConfig

    run = {"num_steps": 8, "batch_size": 8, "log_every": 2, "save_every": 4, "tensorboard": False}
    return TrainConfig(**{**run, "learning_rate": 1e-2, "warmup_steps": 4, **changes})


def run_toy(out: Path, *, labelled: bool = True, step_seconds: float = 0.0, **changes) -> ToyModel:
    """Train the toy into `out` and return it."""
    import time

    from digit.training.sequence import train_sequence_model

    cfg, model = toy_config(**changes), ToyModel()
    batches = toy_batches(cfg.batch_size, labelled)
    train_sequence_model(model, lambda step: (time.sleep(step_seconds), batches(step))[1], cfg, out)
    return model


def run_sequence(
    out: Path, *, masked: bool = False, step_seconds: float = 0.0, stop_at: int | None = None, **changes
) -> nn.Module:
    """Train a small SequenceModel without dropout into `out` and return it; sends SIGTERM in step `stop_at`."""
    import os
    import signal
    import time

    from digit.models.sequence import SequenceConfig, SequenceModel
    from digit.training.sequence import train_sequence_model

    shape = {"depth": 2, "embed_dim": 16, "num_heads": 2, "norm": "pre", "dropout": 0.0}
    torch.manual_seed(7)
    tokens = {"vocab_size": VOCAB, "target_len": LENGTH, "num_classes": CLASSES, "label_dropout": 0.2}
    model = SequenceModel(SequenceConfig(masked=masked, **tokens, **shape))
    cfg = toy_config(**changes)
    batches = toy_batches(cfg.batch_size)

    def validate(model: nn.Module) -> dict[str, float]:
        batch = toy_batches(16)(10_000)
        noise = model.noise(batch, torch.Generator().manual_seed(0))
        return {"val_nll": float(model.loss(**batch, **noise)[1]["nll"])}

    def disturbed(step: int) -> dict[str, Tensor | None]:
        time.sleep(step_seconds)
        if step + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches(step)

    codes = torch.randn(1, VOCAB, 4, generator=torch.Generator().manual_seed(0))  # for code losses
    return train_sequence_model(model, disturbed, cfg, out, validate=validate, codes=codes)[0]


def run_vqgan(out: Path, **changes) -> nn.Module:
    """Train a tiny VQGAN into `out` and return it."""
    from dataclasses import replace

    from toy_vqgan import QUICK, batches, model

    from digit.training.vqgan import train_vqgan

    vqgan = model()
    train_vqgan(vqgan, batches, replace(QUICK, **changes), out)
    return vqgan


TASKS = {"toy": run_toy, "sequence": run_sequence, "gan": run_vqgan}


def run_task(out: Path, changes: dict) -> nn.Module:
    """The task that `changes` name, the toy by default, with the other changes."""
    changes = dict(changes)
    return TASKS[changes.pop("task", "toy")](out, **changes)


if __name__ == "__main__":
    from digit.errors import DigitError, Stopped
    from digit.runtime import distributed

    torch.set_num_threads(1)
    distributed.start("cpu")
    try:
        for out, changes in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
            try:
                trained = run_task(Path(out), json.loads(changes))
            except Stopped as stopped:
                sys.stderr.write(f"{stopped}\n")
                continue
            if distributed.is_main():
                torch.save(trained.state_dict(), Path(out) / "weights.pt")
        distributed.stop(together=True)
    except DigitError as error:
        sys.exit(f"DigitError: {error}")
    finally:
        distributed.stop()
