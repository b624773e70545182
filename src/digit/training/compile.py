"""How training runs a transformer: with activation checkpointing, with torch.compile, or plainly."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from digit.errors import DigitError
from digit.training.config import TrainConfig

log = logging.getLogger(__name__)
COMPILE_FROM_STEPS = 1000  # compiling takes a minute or two, more than a shorter run saves


class TransformerForward:
    """Context in which `model.transformer` runs as the config says; outside it, validation and sampling run plainly.

    Raises DigitError if this model cannot do what the config asks for.
    """

    def __init__(self, model: nn.Module, cfg: TrainConfig):
        self.replacements: list[tuple[nn.Module, Callable[..., Any]]] = []
        transformer = getattr(model, "transformer", None)
        if transformer is None and (cfg.checkpoint_activations or cfg.compile is True):
            name = "checkpoint_activations" if cfg.checkpoint_activations else "compile"
            raise DigitError(f"{name} is for transformers, {type(model).__name__} is not one: leave it out")
        if transformer is None:
            return
        compiled = compiles(cfg, next(model.parameters()).device)
        if compiled:  # torch keeps eight graphs of one function: the ninth model of a process would run eagerly
            torch._dynamo.reset()
        by_block = cfg.checkpoint_activations or cfg.parallel == "fsdp"  # no graph spans what they do
        if by_block:
            for block in transformer.blocks:
                forward = Compiled(block.forward) if compiled else block.forward
                if cfg.checkpoint_activations:
                    forward = partial(checkpoint, forward, use_reentrant=False)
                self.replacements.append((block, forward))
        elif compiled:
            self.replacements.append((transformer, Compiled(transformer.forward)))

    def __enter__(self) -> Self:
        for module, forward in self.replacements:
            module.forward = forward
        return self

    def __exit__(self, *problem: object) -> None:
        for module, _ in self.replacements:
            del module.forward  # uncovers the method of the class


def compiles(cfg: TrainConfig, device: torch.device) -> bool:
    """Whether to compile: as set; auto compiles on a GPU with Triton, in runs long enough to save time by it."""
    if cfg.compile != "auto":
        return cfg.compile
    return device.type == "cuda" and cfg.num_steps >= COMPILE_FROM_STEPS and has_triton()


def has_triton() -> bool:
    """Whether torch can compile for this GPU."""
    from torch.utils._triton import has_triton as works

    return works()


class Compiled:
    """A function compiled at its first call for the shapes of that call; if compiling fails, the function itself.

    One graph covers all blocks. Where the blocks are compiled one by one, all but the last of them share one graph: no
    compiled code depends on a block's number.
    """

    def __init__(self, function: Callable[..., Any]):
        self.run, self.function = torch.compile(function, dynamic=False), function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.run is self.function:
            return self.function(*args, **kwargs)
        from torch._dynamo.exc import TorchDynamoException  # imports torch's compiler: only once it is in use

        try:
            return self.run(*args, **kwargs)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            log.warning(
                "the transformer cannot be compiled (%s): it runs uncompiled; silence this with compile=false", reason
            )
            self.run = self.function
        return self.function(*args, **kwargs)
