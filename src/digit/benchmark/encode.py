"""The frozen encoder: images per second from memory, beside the matrix multiplications of its blocks alone."""

from collections.abc import Callable
from typing import Any

import torch

from digit.benchmark import floors
from digit.benchmark.clock import alternate
from digit.benchmark.measurement import Measurement
from digit.benchmark.sizes import Size
from digit.models.vit import ViT
from digit.tokenizers.encoders import CPU_CHUNK, IMAGENET_MEAN, IMAGENET_STD, PRECISIONS, FrozenEncoder


def random_encoder(size: Size, device: torch.device) -> FrozenEncoder:
    """Builds the encoder with random weights."""
    numbers: dict[str, Any] = dict(input_size=size.vit_side, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    net = ViT(size.vit)
    return FrozenEncoder(net, name="random", layer=size.vit.kept_blocks - 1, about={}, **numbers).to(device)


def random_images(size: Size, device: torch.device) -> torch.Tensor:
    """(B, 3, S, S) uint8."""
    return torch.randint(256, (size.encode_batch, 3, size.vit_side, size.vit_side), dtype=torch.uint8, device=device)


def time_encoding(size: Size, device: torch.device, repeats: int) -> list[Measurement]:
    """Times the features of a batch of images in every precision, alternating with the floors."""
    run = cases(size, device)
    for precision in size.precisions:
        shape = (size.vit, size.vit_side, size.encode_batch, chunk_size(size, device))
        run[f"{precision} floor"] = floors.encoding(*shape, device, PRECISIONS[precision])
    times, peaks = alternate(run, repeats, device)
    labels: dict[str, Any] = dict(part="encode", case=f"ViT {size.vit_side} px", unit="images", count=size.encode_batch)
    return [
        Measurement(**labels, precision=p, time=times[p], floor=times[f"{p} floor"], peak=peaks[p])
        for p in size.precisions
    ]


def chunk_size(size: Size, device: torch.device) -> int:
    """Images per forward pass of the encoder."""
    return min(CPU_CHUNK, size.encode_batch) if device.type == "cpu" else size.encode_batch


def cases(size: Size, device: torch.device) -> dict[str, Callable[[], Any]]:
    """The encoder in every precision."""
    encoder, images = random_encoder(size, device), random_images(size, device)
    return {p: lambda dtype=PRECISIONS[p]: encoder.features(images, dtype) for p in size.precisions}


profiled = cases
