"""`digit bench` and `python -m digit.benchmark`: one or all parts at one size, a table on the way, JSON at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from digit.errors import DigitError

if TYPE_CHECKING:
    from argparse import ArgumentParser

    import torch

    from digit.benchmark.measurement import Measurement
    from digit.benchmark.sizes import Size

PARTS = ("sample", "train", "encode", "kmeans", "data")


def option(text: str) -> Any:
    """A field that is None by default, and what its option's help says."""
    return field(default=None, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is timed, and how often; each field is an argument of the command."""

    part: str = field(default="all", metadata={"help": f"{', '.join(PARTS)} or all"})
    size: str | None = option("small (without it, on a CPU), base (on a GPU), large, or micro for a trial")
    device: str | None = option("cpu or cuda; without it cuda where there is one")
    precision: str | None = option("fp32 or bf16 alone; without it both, at base and large bf16")
    repeats: int | None = option("timed rounds after the warm-up; without it the size's own")
    json: str | None = option("file for machine, versions, arguments and every figure")
    images: str | None = option("folder of JPEG files for the part data; without it some are generated")
    profile: str | None = option("file for torch's profile of one round of each part, taken instead of times")


def add_arguments(parser: ArgumentParser) -> None:
    """The fields of BenchConfig as arguments, for argparse's parser or jsonargparse's."""
    for about in fields(BenchConfig):
        how: dict[str, Any] = {"default": about.default, "help": about.metadata["help"]}
        if about.name == "part":
            parser.add_argument("part", nargs="?", **how)
        else:
            parser.add_argument(f"--{about.name}", type=int if about.name == "repeats" else str, **how)


def run_bench(cfg: BenchConfig, say: Callable[[str], None]) -> None:
    """Time the parts, saying each table once it is there. Raises DigitError for an unknown part, size or device."""
    chosen = PARTS if cfg.part == "all" else (cfg.part,)
    if unknown := set(chosen) - set(PARTS):
        raise DigitError(f"no part of the benchmark named {unknown.pop()}: choose one of {', '.join(PARTS)} or all")
    if cfg.repeats is not None and cfg.repeats < 1:
        raise DigitError(f"repeats is {cfg.repeats}: at least 1")
    from digit.benchmark.profile import write_profile
    from digit.benchmark.sizes import get_size
    from digit.benchmark.table import LEGEND, header, table, to_json
    from digit.runtime.files import check_writable, write_json
    from digit.runtime.hardware import choose_device
    from digit.runtime.progress import quiet

    device = choose_device(cfg.device)
    size = get_size(cfg.size, device, cfg.precision)
    name = cfg.size or ("small" if device.type == "cpu" else "base")
    for path in filter(None, (cfg.json, cfg.profile)):
        check_writable(path)
    arguments = {"parts": list(chosen), "size": name, "device": str(device)}
    arguments |= {"precisions": list(size.precisions), "repeats": cfg.repeats or size.repeats, "images": cfg.images}
    quiet()
    say(header(arguments))
    if cfg.profile:
        write_profile(chosen, size, device, cfg.profile)
        say(f"profile of one round of each: {cfg.profile}")
        return
    measurements = []
    for part in chosen:
        measurements += (found := time_part(part, size, device, arguments["repeats"], cfg.images))
        say("\n" + table(found))
    say("\n" + LEGEND)
    if cfg.json:
        write_json(cfg.json, to_json(measurements, arguments))


def time_part(part: str, size: Size, device: torch.device, repeats: int, images: str | None) -> list[Measurement]:
    """The figures of one part."""
    from digit.benchmark import data, encode, kmeans, sample, train

    if part == "data":
        return data.time_data(size, repeats, images)
    timed = {
        "sample": sample.time_sampling,
        "train": train.time_training,
        "encode": encode.time_encoding,
        "kmeans": kmeans.time_kmeans,
    }
    return timed[part](size, device, repeats)
