"""Sampling: prior, renderer, MaskGIT and VQGAN decoding, each beside its floor, and images from end to end."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from digit.benchmark import floors
from digit.benchmark.clock import Timing, alternate
from digit.benchmark.measurement import Measurement
from digit.benchmark.sizes import Size
from digit.models.vqgan import VQGAN
from digit.runtime.hardware import Precision
from digit.sampling.config import StageSampling
from digit.sampling.kinds import make_sampler
from digit.sampling.next_token import NextTokenSampler
from digit.sampling.requests import make_request
from digit.sampling.sampler import Sampler
from digit.tokenizers.encoders import PRECISIONS
from digit.tokenizers.vq import VQTokenizer

MASKED_STEPS = 8  # as in the released code
PIECES = ("prefill", "steps", "sampling")
END_TO_END = {"images": "renderer", "images masked": "renderer_masked"}


def pieces(next_token: NextTokenSampler, prefix: Tensor | None) -> dict[str, Callable[[], Any]]:
    """The work of next-token sampling in three pieces: the first pass, the token steps, sampling from the logits."""
    model, batch = next_token.model, next_token.micro_batch_size
    cfg, device = model.cfg, model.device
    rows = make_request(model, range(batch), prefix, None, None)
    token = torch.zeros(batch, dtype=torch.int64, device=device)
    logits = torch.randn(batch, cfg.vocab_size, device=device)
    u = torch.rand(batch, dtype=torch.float64, device=device)

    @torch.no_grad()
    def prefill() -> None:
        next_token.first_logits(rows, next_token.new_cache())

    @torch.no_grad()
    def steps() -> None:
        cache = next_token.new_cache()  # grows from step to step, as in real sampling
        cache.position = cfg.start_position + 1
        for i in range(cfg.target_len - 1):
            next_token.next_logits(token, i, cache)

    @torch.no_grad()
    def sampling() -> None:
        for _ in range(cfg.target_len):
            next_token.pick(logits, u)

    return dict(zip(PIECES, (prefill, steps, sampling), strict=True))


class Sampling:
    """The models in one precision, and their cases by name."""

    def __init__(self, size: Size, precision: Precision, device: torch.device) -> None:
        self.size, self.precision = size, precision
        dtype, cfg, seeds = PRECISIONS[precision], size.recipe.sampling, range(size.batch)
        settings = {
            "prior": cfg.prior,
            "renderer": cfg.renderer,
            "renderer_masked": StageSampling(num_steps=MASKED_STEPS),
        }
        with device:
            vq = VQTokenizer(VQGAN(size.recipe.vqgan), precision=precision)
            prefix = torch.randint(size.recipe.quantizer_cfg.vocab_size, (size.batch, size.discriminative_len))
            vq_tokens = torch.randint(vq.vocab_size, (size.batch, size.recipe.vqgan.num_tokens))
        samplers = {
            name: make_sampler(size.model(name, device), stage, precision=precision, micro_batch_size=size.batch)
            for name, stage in settings.items()
        }
        self.cases: dict[str, Callable[[], Any]] = {}
        for name, sample in samplers.items():
            model, condition = sample.model.cfg, prefix if sample.model.cfg.prefix_len else None
            self.cases[name] = partial(sample, seeds, prefix=condition)
            if isinstance(sample, NextTokenSampler):
                self.cases[f"{name} floor"] = floors.decoding(model, size.batch, device, dtype)
                if device.type == "cpu":  # a GPU replays a step and its sampling as one CUDA graph
                    self.cases |= {f"{name} {piece}": run for piece, run in pieces(sample, condition).items()}
            else:
                self.cases[f"{name} floor"] = floors.refining(model, size.batch, MASKED_STEPS, device, dtype)
        self.cases["vqgan"] = partial(vq.decode, vq_tokens)
        self.cases["vqgan floor"] = convolutions(vq, vq_tokens, dtype)
        for name, renderer in END_TO_END.items():
            self.cases[name] = partial(sample_images, samplers["prior"], samplers[renderer], vq, seeds)

    def measurements(self, times: Mapping[str, Timing], peaks: Mapping[str, int | None]) -> Iterator[Measurement]:
        """Yields one measurement per case, from the timings of all."""
        batch, tokens = self.size.batch, self.size.recipe.vqgan.num_tokens
        counts = {"prior": batch * self.size.discriminative_len, "vqgan": batch}
        for name in ("prior", "renderer", "renderer_masked", "vqgan"):
            unit, count = "images" if name == "vqgan" else "tokens", counts.get(name, batch * tokens)
            row = self.measurement(name, unit, count, times[name], times[f"{name} floor"], peaks[name])
            yield replace(row, extra=shares(name, times))
        for name, renderer in END_TO_END.items():
            floor = times["prior floor"].plus(times[f"{renderer} floor"]).plus(times["vqgan floor"])
            yield self.measurement(name, "images", batch, times[name], floor, peaks[name])

    def measurement(
        self, case: str, unit: str, count: int, time: Timing, floor: Timing, peak: int | None
    ) -> Measurement:
        labels: dict[str, Any] = dict(
            part="sample", case=case.replace("_", " "), precision=self.precision, unit=unit, count=count
        )
        return Measurement(**labels, time=time, floor=floor, peak=peak)


def sample_images(prior: Sampler, renderer: Sampler, vq: VQTokenizer, seeds: range) -> Tensor:
    """Samples images from seeds: (B, 3, S, S) uint8 on the CPU."""
    return vq.decode(renderer(seeds, prefix=prior(seeds))).cpu()


def shares(name: str, times: Mapping[str, Timing]) -> dict[str, float]:
    """Time of the whole / sum of its pieces, and each piece's share of the sum; {} if the pieces were not timed."""
    if f"{name} {PIECES[0]}" not in times:
        return {}
    first, *others = (times[f"{name} {piece}"] for piece in PIECES)
    total = reduce(Timing.plus, others, first)
    own = {f"{piece}_share": times[f"{name} {piece}"].over(total) for piece in PIECES}
    return {"whole_over_parts": times[name].over(total)} | own


def convolutions(vq: VQTokenizer, tokens: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """Returns a function that runs the decoder's convolutions alone."""
    with floors.recorded_convolutions(vq.vqgan.decoder, dtype) as recorded:
        vq.decode(tokens)

    @torch.no_grad()
    def run() -> None:
        for convolution in recorded:
            convolution()

    return run


def time_sampling(size: Size, device: torch.device, repeats: int) -> list[Measurement]:
    """Times every case in every precision; one precision after the other, to hold one set of models at a time."""
    rows: list[Measurement] = []
    for precision in size.precisions:
        sampling = Sampling(size, precision, device)
        rows += sampling.measurements(*alternate(sampling.cases, repeats, device))
    return rows


def profiled(size: Size, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Cases to profile."""
    sampling = Sampling(size, size.precisions[-1], device)
    return {name: run for name, run in sampling.cases.items() if name in END_TO_END}
