"""One model on several ranks: replicated (DistributedDataParallel) or cut up among them (fully_shard).

Gradients are the mean over the ranks in both. A batch is global: every rank asks for batch `step` and takes its own
slice of it.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from digit.runtime import distributed


class LossModule(nn.Module):
    """Calls `model.loss` as its forward, so that DistributedDataParallel sees it; `how` is entered meanwhile."""

    def __init__(self, model: nn.Module, how: AbstractContextManager | None = None):
        super().__init__()
        self.model, self.how = model, how or nullcontext()

    def forward(self, batch: dict[str, Tensor | None], **options: Any) -> tuple[Tensor, dict[str, Any]]:
        with self.how:
            return self.model.loss(**batch, **options)


def shard(model: nn.Module) -> nn.Module:
    """Cut every parameter into a piece a rank, in place; each transformer block is put together only while it runs.

    Every rank gives the same weights, as those drawn from one seed are.
    """
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    transformer = getattr(model, "transformer", None)
    for block in getattr(transformer, "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")
    return model


def cut_again(model: nn.Module) -> None:
    """Give back what a forward pass without a backward pass left together."""
    if isinstance(model, FSDPModule):
        model.reshard()


def objective(model: nn.Module, how: AbstractContextManager) -> nn.Module:
    """`model.loss` as a module whose backward brings the gradients of all ranks together.

    Replicas: rank 0's initial weights go to all. Parameters that a batch does not use (a label table without labels)
    are looked for, unless the model says that there are none (`uses_every_parameter`).
    """
    loss = LossModule(model, how)
    if distributed.world_size() == 1 or isinstance(model, FSDPModule):
        return loss
    unused = not getattr(model, "uses_every_parameter", False)
    return DistributedDataParallel(loss, find_unused_parameters=unused, gradient_as_bucket_view=True)


def without_exchange(objective: nn.Module) -> AbstractContextManager:
    """Within it gradients only add up here: all but the last piece of an accumulated batch."""
    if isinstance(objective, DistributedDataParallel):
        return objective.no_sync()
    model = getattr(objective, "model", None)
    return _Unsynced(model) if isinstance(model, FSDPModule) else nullcontext()


class _Unsynced:
    def __init__(self, model: FSDPModule):
        self.model = model

    def __enter__(self) -> None:
        self.model.set_requires_gradient_sync(False)

    def __exit__(self, *problem: object) -> None:
        self.model.set_requires_gradient_sync(True)


def whole(value: Tensor) -> Tensor:
    """A tensor that may be cut up among the ranks, put together (all ranks must call it)."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: Tensor) -> Tensor:
    """This rank's piece of a tensor that may be cut up, in the same memory."""
    return value.to_local() if isinstance(value, DTensor) else value


@torch.no_grad()
def copy_whole(sharded: nn.Module, model: nn.Module) -> None:
    """Put the parameters and buffers of a cut-up copy together in `model`."""
    own = model.state_dict()
    for name, value in sharded.state_dict().items():
        own[name].copy_(whole(value))


def slices(batch: dict[str, Tensor | None], parts: int) -> list[dict[str, Tensor | None]]:
    """Cut a batch along its first axis into `parts` equal pieces; entries that are None stay None."""
    cut = {name: [None] * parts if value is None else value.chunk(parts) for name, value in batch.items()}
    return [{name: pieces[i] for name, pieces in cut.items()} for i in range(parts)]
