"""One of two processes of a test; here because a spawned process cannot import a test module."""

from collections.abc import Callable

import torch
from torch import Tensor


def save_weights(rank: int, folder: str, make: Callable[[], dict[str, Tensor]]) -> None:
    """Join the other process, make weights together, and save this one's as FOLDER/rankN.pt."""
    torch.set_num_threads(1)
    init = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    torch.save(make(), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()
