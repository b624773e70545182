"""One model on several ranks: replicated (DistributedDataParallel) or sharded (fully_shard).

Gradients are the mean over the ranks in both cases. A batch is global: every rank takes its own slice of batch `step`,
of the whole batch or, where the batches can be had in parts, without reading the rest.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from digit.runtime import distributed


class LossModule(nn.Module):
    """Calls `model.loss` as its forward, inside `context`, because DistributedDataParallel wraps a forward."""

    def __init__(self, model: nn.Module, context: AbstractContextManager | None = None):
        super().__init__()
        self.model: Any = model  # its `loss` is no part of nn.Module
        self.context = context or nullcontext()

    def forward(self, batch: dict[str, Tensor | None], **options: Any) -> tuple[Tensor, dict[str, Any]]:
        with self.context:
            return self.model.loss(**batch, **options)


def shard(model: nn.Module) -> nn.Module:
    """Shard every parameter over the ranks, in place; each transformer block is whole only while it runs.

    All ranks must have the same weights, for example from one seed.
    """
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    transformer = getattr(model, "transformer", None)
    for block in getattr(transformer, "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")
    return model


def reshard(model: nn.Module) -> None:
    """Reshard after a forward without backward."""
    if isinstance(model, FSDPModule):
        model.reshard()


def objective(model: nn.Module, context: AbstractContextManager) -> nn.Module:
    """`model.loss` as a module whose backward averages the gradients over all ranks.

    Replicas start from rank 0's weights. DistributedDataParallel searches for parameters that a batch does not use (a
    label table without labels), unless the model has `uses_every_parameter` set.
    """
    loss = LossModule(model, context)
    if distributed.world_size() == 1 or isinstance(model, FSDPModule):
        return loss
    unused = not getattr(model, "uses_every_parameter", False)
    return DistributedDataParallel(loss, find_unused_parameters=unused, gradient_as_bucket_view=True)


def without_gradient_sync(objective: nn.Module) -> AbstractContextManager:
    """Context in which gradients only accumulate on this rank: for all but the last micro-batch of a step."""
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
    """The whole of a tensor that may be sharded; all ranks must call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: Tensor) -> Tensor:
    """This rank's shard of a tensor that may be sharded, in the same memory."""
    return value.to_local() if isinstance(value, DTensor) else value


@torch.no_grad()
def copy_whole(sharded: nn.Module, model: nn.Module) -> None:
    """Copy the parameters and buffers of a sharded copy into the whole `model`."""
    own = model.state_dict()
    for name, value in sharded.state_dict().items():
        own[name].copy_(whole(value))


def split_batch(batch: dict[str, Tensor | None], num: int) -> list[dict[str, Tensor | None]]:
    """Split a batch along its first axis into `num` equal micro-batches; entries that are None stay None."""
    chunks = {name: [None] * num if value is None else value.chunk(num) for name, value in batch.items()}
    return [{name: values[i] for name, values in chunks.items()} for i in range(num)]


def gather_rows(rows: Tensor) -> Tensor:
    """The rows (n, C) of every rank as one tensor (n * world_size, C), in the order of the ranks."""
    if distributed.world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(distributed.world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def sum_over_ranks(tensors: list[Tensor], mean: bool = False) -> None:
    """Sum (or average) tensors over all ranks, in place, in one exchange."""
    if distributed.world_size() == 1 or not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat = flat / distributed.world_size() if mean else flat
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
