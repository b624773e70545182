"""Drawing: prior, renderer, MaskGIT, VQGAN decoding, each beside its products alone, and images from end to end."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from digit.benchmark import floors
from digit.benchmark.clock import Timing, alternate
from digit.benchmark.measurement import Measurement
from digit.benchmark.sizes import PRECISIONS, Size
from digit.models.vqgan import VQGAN
from digit.sampling.config import StageSampling
from digit.sampling.kinds import make_sampler
from digit.sampling.next_token import NextTokenSampler
from digit.sampling.requests import make_request
from digit.sampling.sampler import Sampler
from digit.tokenizers.vq import VQTokenizer

MASKED_STEPS = 8  # released
PIECES = ("prefill", "steps", "drawing")
END_TO_END = {"images": "renderer", "images masked": "renderer_masked"}


def pieces(draws: NextTokenSampler, prefix: Tensor | None) -> dict[str, Callable[[], Any]]:
    """The work of next-token decoding in three pieces: the first pass, the token steps, the draws."""
    cfg, batch, device = draws.model.cfg, draws.micro_batch_size, draws.model.device
    rows = make_request(draws.model, range(batch), prefix, None, None)
    token = torch.zeros(batch, dtype=torch.int64, device=device)
    logits = torch.randn(batch, cfg.vocab_size, device=device)
    u = torch.rand(batch, dtype=torch.float64, device=device)

    @torch.no_grad()
    def prefill() -> None:
        draws.first_logits(rows, draws.new_cache())

    @torch.no_grad()
    def steps() -> None:
        cache = draws.new_cache()  # it grows along the way, as in a real pass
        cache.position = cfg.prefix_len + 1
        for i in range(cfg.target_len - 1):
            draws.next_logits(token, i, cache)

    @torch.no_grad()
    def drawing() -> None:
        for _ in range(cfg.target_len):
            draws.pick(logits, u)

    return dict(zip(PIECES, (prefill, steps, drawing), strict=True))


class Sampling:
    """The models of one precision, and every case of theirs by name."""

    def __init__(self, size: Size, precision: str, device: torch.device) -> None:
        self.size, self.precision = size, precision
        dtype, how, seeds = PRECISIONS[precision], size.recipe.sampling, range(size.batch)
        settings = {
            "prior": how.prior,
            "renderer": how.renderer,
            "renderer_masked": StageSampling(num_steps=MASKED_STEPS),
        }
        with device:
            vq = VQTokenizer(VQGAN(size.recipe.vqgan), precision=precision)
            prefix = torch.randint(size.recipe.quantizer_cfg.vocab_size, (size.batch, size.discriminative_len))
            vq_tokens = torch.randint(vq.vocab_size, (size.batch, size.recipe.vqgan.num_tokens))
        draws = {
            name: make_sampler(size.model(name, device), s, precision=precision, micro_batch_size=size.batch)
            for name, s in settings.items()
        }
        self.cases: dict[str, Callable[[], Any]] = {}
        for name, drawn in draws.items():
            cfg, given = drawn.model.cfg, prefix if drawn.model.cfg.prefix_len else None
            self.cases[name] = partial(drawn, seeds, prefix=given)
            if isinstance(drawn, NextTokenSampler):
                self.cases[f"{name} floor"] = floors.decoding(cfg, size.batch, device, dtype)
                if device.type == "cpu":  # a GPU replays steps and draws as one
                    self.cases |= {f"{name} {piece}": run for piece, run in pieces(drawn, given).items()}
            else:
                self.cases[f"{name} floor"] = floors.refining(cfg, size.batch, MASKED_STEPS, device, dtype)
        self.cases["vqgan"] = partial(vq.decode, vq_tokens)
        self.cases["vqgan floor"] = convolutions(vq, vq_tokens, dtype)
        for name, renderer in END_TO_END.items():
            self.cases[name] = partial(sample_images, draws["prior"], draws[renderer], vq, seeds)

    def measurements(self, times: Mapping[str, Timing], peaks: Mapping[str, int | None]) -> Iterator[Measurement]:
        """A row for each case, from the times of all."""
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
        named = dict(part="sample", case=case.replace("_", " "), precision=self.precision, unit=unit, count=count)
        return Measurement(**named, time=time, floor=floor, peak=peak)


def sample_images(prior: Sampler, renderer: Sampler, vq: VQTokenizer, seeds: range) -> Tensor:
    """Seeds to pixels in the computer's memory: (B, 3, S, S) uint8."""
    return vq.decode(renderer(seeds, prefix=prior(seeds))).cpu()


def shares(name: str, times: Mapping[str, Timing]) -> dict[str, float]:
    """The whole over the sum of its pieces, and each piece's share of the sum; nothing where they were not timed."""
    if f"{name} {PIECES[0]}" not in times:
        return {}
    first, *others = (times[f"{name} {piece}"] for piece in PIECES)
    total = reduce(Timing.plus, others, first)
    own = {f"{piece}_share": times[f"{name} {piece}"].over(total) for piece in PIECES}
    return {"whole_over_parts": times[name].over(total)} | own


def convolutions(vq: VQTokenizer, tokens: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """The decoder's convolutions alone."""
    with floors.recorded_convolutions(vq.vqgan.decoder, dtype) as found:
        vq.decode(tokens)

    @torch.no_grad()
    def run() -> None:
        for convolution in found:
            convolution()

    return run


def time_sampling(size: Size, device: torch.device, repeats: int) -> list[Measurement]:
    """Every case in every precision. Precisions are timed one after the other, so that one set of models is held."""
    rows: list[Measurement] = []
    for precision in size.precisions:
        sampling = Sampling(size, precision, device)
        rows += sampling.measurements(*alternate(sampling.cases, repeats, device))
    return rows


def profiled(size: Size, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Cases to look into."""
    sampling = Sampling(size, size.precisions[-1], device)
    return {name: run for name, run in sampling.cases.items() if name in END_TO_END}
