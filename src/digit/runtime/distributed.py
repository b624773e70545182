"""Several processes as one job, under torchrun or Slurm's srun. With one process all of it is a no-op.

    torchrun --nproc-per-node=8 -m digit train ...     # one process per GPU; NCCL between GPUs, gloo between CPUs
    torchrun --nproc-per-node=8 -m digit -- sample --num 64 ...   # torchrun takes --num for an option of its own
    srun --ntasks-per-node=8 digit train ...

A command calls `start` before its work and `stop` after it. Work is shared out by rank; only rank 0 writes what all
of them made, and speaks. What the ranks tell each other here goes through the CPU and may be waited for long: rank 0
may be at work alone.
"""

import os
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from digit.errors import DigitError, Stopped

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells each process
PATIENCE = timedelta(hours=12)  # for messages of this module; gradients have torch's own limits
SLURM_PORTS = range(15_000, 32_000)  # below those that Linux gives out
PEER_LOST = re.compile(  # as gloo and NCCL say it
    r"gloo.*(closed by peer|reset by peer|refused|broken pipe|timed ?out)|nccl.*(remote|timed ?out|abort)", re.I | re.S
)
_state: dict[str, Any] = {"control": None, "alone": False}


# -------------------------------------------------------------------- who am I


def environment(given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of this process; empty where it was started alone.

    torchrun sets them; in a job step of several tasks (srun) they follow from Slurm's own variables. The batch script
    itself is no such step.
    """
    if all(name in given for name in LAUNCHED):
        return {name: given[name] for name in (*LAUNCHED, "LOCAL_RANK", "LOCAL_WORLD_SIZE") if name in given}
    if int(given.get("SLURM_STEP_NUM_TASKS", "1")) < 2 or "SLURM_PROCID" not in given:
        return {}
    job, step = int(given.get("SLURM_JOB_ID", "0")), int(given.get("SLURM_STEP_ID", "0"))
    return {
        "RANK": given["SLURM_PROCID"],
        "WORLD_SIZE": given["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": given.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(tasks_here(given)),
        "MASTER_ADDR": given.get("MASTER_ADDR") or first_host(given.get("SLURM_STEP_NODELIST", "localhost")),
        "MASTER_PORT": given.get("MASTER_PORT") or str(SLURM_PORTS[(31 * job + step) % len(SLURM_PORTS)]),
    }


def tasks_here(given: Mapping[str, str]) -> int:
    """Tasks of the job step on this node, from '8(x3),4' and the node's number."""
    counts: list[int] = []
    for part in given.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(found[1])] * int(found[2] or 1)
    node = int(given.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else 1


def first_host(nodes: str) -> str:
    """'gpu[07-09,12],login1' -> 'gpu07'."""
    name, brackets, rest = nodes.partition(",")[0].partition("[")
    return name + re.split("[-,\\]]", rest)[0] if brackets else name


def launched_size() -> int:
    """The number of processes that were started together; known before `start`, without torch."""
    return int(environment().get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """This process's number among them; known before `start`, without torch."""
    return int(environment().get("RANK", "0"))


def local_size() -> int:
    """The number of processes that share this machine, as far as the launcher tells."""
    return int(environment().get("LOCAL_WORLD_SIZE", "1"))


def start(device: "str | torch.device | None" = None) -> "torch.device":
    """Join the others where several processes were started, and return this one's device (cuda if there is one).

    Raises DigitError where they cannot be reached.
    """
    import torch
    import torch.distributed as dist

    try:
        kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise DigitError(f"no device named {device!r}: choose cpu or cuda") from error
    if not (variables := environment()):
        return kind
    if kind.type == "cuda":
        kind = torch.device("cuda", own_gpu(torch.cuda.device_count()))
        torch.cuda.set_device(kind)
    os.environ.update(variables)
    if not dist.is_initialized():
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if kind.type == "cuda" else "gloo")
        except (RuntimeError, ValueError) as error:
            where = f"{variables['MASTER_ADDR']}:{variables['MASTER_PORT']}"
            raise DigitError(f"the other processes cannot be reached through {where} ({first_line(error)})") from error
        _state["control"] = dist.new_group(backend="gloo", timeout=PATIENCE)
    if kind.type == "cuda":
        gpus = gather(str(torch.cuda.get_device_properties(kind).uuid))
        if len(set(gpus)) < len(gpus):
            raise DigitError("several processes share one GPU: start one a GPU, or add --device cpu")
    return kind


def own_gpu(visible: int) -> int:
    """Number of this process's GPU among the visible ones; Slurm may show each task its own alone (--gpus-per-task).

    Raises DigitError where the processes of this machine are more than its GPUs.
    """
    if visible == 1 and "SLURM_PROCID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0
    if local_size() > visible:
        raise DigitError(
            f"{local_size()} processes on this machine share {visible} GPUs: start one a GPU, or add --device cpu"
        )
    return int(environment().get("LOCAL_RANK", "0"))


def stop(together: bool = False) -> None:
    """Leave the others, if there are any.

    together: wait for them first, as at the end of a run: one that leaves early can abort while others still send. Not
    after an error, which the others may never reach.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        if together:
            barrier()
        dist.destroy_process_group()
        _state["control"] = None


def world_size() -> int:
    """The number of processes; 1 for work that rank 0 does alone."""
    import torch.distributed as dist

    if _state["alone"]:
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 .. world_size - 1."""
    import torch.distributed as dist

    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process is the one that logs and saves."""
    return rank() == 0


def share(total: int, multiple: int = 1) -> range:
    """This rank's part of 0 .. total - 1: contiguous, in the order of the ranks, cut at multiples of `multiple`."""
    blocks, ranks, here = -(-total // multiple), world_size(), rank()
    first, last = (min(total, blocks * r // ranks * multiple) for r in (here, here + 1))
    return range(first, last)


# -------------------------------------------------------------------- what they tell each other


def control() -> Any:
    """The process group of these messages, gloo; None with one process."""
    return _state["control"] if world_size() > 1 else None


def barrier() -> None:
    """Wait for all ranks."""
    import torch.distributed as dist

    if world_size() > 1:
        dist.barrier(control())


def gather(item: T) -> list[T]:
    """The item of every rank, in their order; every rank gets the list."""
    import torch.distributed as dist

    items = [item] * world_size()
    if world_size() > 1:
        dist.all_gather_object(items, item, group=control())
    return items


def mean(values: list[float]) -> list[float]:
    """The mean over the ranks, element by element; every rank gets it."""
    import torch
    import torch.distributed as dist

    if world_size() == 1 or not values:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=control())
    return (total / world_size()).tolist()


def any_rank(flag: bool) -> bool:
    """Whether the flag is raised on any rank; every rank gets the same answer."""
    return mean([float(flag)])[0] > 0


def on_main(work: Callable[[], T]) -> T:
    """Do `work` on rank 0 while the others wait; every rank gets its (small) result, or raises its DigitError.

    Meanwhile rank 0 is alone: what it calls finds one process.
    """
    import torch.distributed as dist

    if world_size() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if is_main():
        _state["alone"] = True
        try:
            outcome[0] = work()
        except (DigitError, Stopped) as error:
            outcome[1] = error
        finally:
            _state["alone"] = False
    dist.broadcast_object_list(outcome, group=control())
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


# -------------------------------------------------------------------- when one of them fails


def first_to_speak() -> bool:
    """Whether this is the first rank that has something to say about a failure; True where that cannot be told."""
    import torch.distributed as dist

    if world_size() == 1:
        return True
    try:
        return dist.distributed_c10d._get_default_store().add("digit/failures", 1) == 1
    except RuntimeError:
        return True


def lost_peer(error: BaseException) -> str | None:
    """What to say where an exchange failed because another rank is gone; None for any other error."""
    import torch.distributed as dist

    told_apart = (dist.DistNetworkError, dist.DistStoreError)
    lost = isinstance(error, told_apart) or (isinstance(error, RuntimeError) and PEER_LOST.search(str(error)))
    if world_size() == 1 or not lost:
        return None
    return f"rank {rank()} lost contact with another of the {world_size()} processes ({first_line(error)})"


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
