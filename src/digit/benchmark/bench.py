"""`digit bench` and `python -m digit.benchmark`: time one or all parts at one size, print tables, write JSON."""

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


def optional(text: str) -> Any:
    """A field with default None; `text` is its option's help."""
    return field(default=None, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to time, and how often. Each field is an argument of the command."""

    part: str = field(default="all", metadata={"help": f"{', '.join(PARTS)} or all"})
    size: str | None = optional("micro (for a trial), small, base or large (default: small on a CPU, base on a GPU)")
    device: str | None = optional("cpu or cuda (default: cuda if available)")
    precision: str | None = optional("fp32 or bf16 (default: both; at base and large bf16)")
    repeats: int | None = optional("timed rounds after the warm-up (default: the size's own)")
    json: str | None = optional("file for machine, versions, arguments and every measurement")
    images: str | None = optional("folder of JPEG files for the part data (default: generated ones)")
    profile: str | None = optional("file for torch's profile of one round of each part, instead of timings")


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the fields of BenchConfig to a parser of argparse or jsonargparse."""
    for option in fields(BenchConfig):
        kwargs: dict[str, Any] = {"default": option.default, "help": option.metadata["help"]}
        if option.name == "part":
            parser.add_argument("part", nargs="?", **kwargs)
        else:
            parser.add_argument(f"--{option.name}", type=int if option.name == "repeats" else str, **kwargs)


def run_bench(cfg: BenchConfig, say: Callable[[str], None]) -> None:
    """Times the parts and says each one's table. Raises DigitError for an unknown part, size or device."""
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
        measurements += (timed := time_part(part, size, device, arguments["repeats"], cfg.images))
        say("\n" + table(timed))
    say("\n" + LEGEND)
    if cfg.json:
        write_json(cfg.json, to_json(measurements, arguments))


def time_part(part: str, size: Size, device: torch.device, repeats: int, images: str | None) -> list[Measurement]:
    """Returns the measurements of one part."""
    from digit.benchmark import data, encode, kmeans, sample, train

    if part == "data":
        return data.time_data(size, repeats, images)
    functions = {
        "sample": sample.time_sampling,
        "train": train.time_training,
        "encode": encode.time_encoding,
        "kmeans": kmeans.time_kmeans,
    }
    return functions[part](size, device, repeats)
