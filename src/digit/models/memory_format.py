"""The order in which convolutions' weights lie in memory."""

from typing import Any, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def channels_last(network: Module) -> Module:
    """The network with its convolutions' weights in channels-last order, in place."""
    convert: Any = network.to  # torch's stubs know no memory_format here
    return convert(memory_format=torch.channels_last)
