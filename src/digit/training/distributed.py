"""Several processes under torchrun: who am I, and agreement between ranks. With one process all of it is a no-op.

    torchrun --nproc-per-node=8 SCRIPT      # one process per GPU; NCCL with CUDA, else gloo

SCRIPT calls `start` first (bench/finetune_shapes_vqgan.py does). `digit fit` itself runs as one process.

A batch is global: every rank asks for batch `step` and takes its own slice of it. Only rank 0 logs and saves.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn


def start(device: str | torch.device | None = None) -> torch.device:
    """Join the process group where torchrun started us, and return this process's device (cuda if there is one)."""
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not dist.is_torchelastic_launched():
        return kind
    if kind.type == "cuda":
        kind = torch.device("cuda", dist.get_node_local_rank(fallback_rank=0))
        torch.cuda.set_device(kind)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if kind.type == "cuda" else "gloo")
    return kind


def stop(together: bool = False) -> None:
    """Leave the process group, if we are in one.

    together: wait for the other ranks first, as at the end of a run: one that leaves early can abort while others still
    send. Not after an error, which the others may never reach.
    """
    if dist.is_available() and dist.is_initialized():
        if together:
            dist.barrier()
        dist.destroy_process_group()


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 .. world_size - 1."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process is the one that logs and saves."""
    return rank() == 0


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def mean(values: list[float]) -> list[float]:
    """The mean over the ranks, element by element; every rank gets it."""
    if world_size() == 1 or not values:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(total)
    return (total / world_size()).tolist()


def any_rank(flag: bool) -> bool:
    """Whether the flag is raised on any rank; every rank gets the same answer."""
    return mean([float(flag)])[0] > 0


def wrap(model: nn.Module) -> nn.Module:
    """DistributedDataParallel around `model` where there are several ranks, else `model` itself.

    Its gradients are then the mean over the ranks, and rank 0's initial weights go to all. Parameters that a batch does
    not use (a label table without labels) are allowed.
    """
    if world_size() == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=True)


def slices(batch: dict[str, Tensor | None], parts: int) -> list[dict[str, Tensor | None]]:
    """Cut a batch along its first axis into `parts` equal pieces; entries that are None stay None."""
    cut = {name: [None] * parts if value is None else value.chunk(parts) for name, value in batch.items()}
    return [{name: pieces[i] for name, pieces in cut.items()} for i in range(parts)]
