"""The arithmetic of a forward pass: fp32, or torch's autocast to bf16 or fp16. Weights stay fp32."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from digit.runtime.hardware import Precision, multiplies_bf16

AutoPrecision = Literal["auto", Precision]
ScaledPrecision = Literal[AutoPrecision, "fp16"]  # for trainers that scale the loss


def autocast(precision: ScaledPrecision, device: torch.device) -> AbstractContextManager:
    """The context of a forward pass: none for fp32, else autocast; auto is bf16 where the hardware multiplies it."""
    if precision == "fp32" or (precision == "auto" and not multiplies_bf16(device)):
        return nullcontext()
    return torch.autocast(device.type, torch.float16 if precision == "fp16" else torch.bfloat16)
