"""Ranks: several processes as one job, under torchrun or Slurm's srun. With one process every function is a no-op.

    torchrun --nproc-per-node=8 -m digit -- train ...     # one process per GPU; NCCL between GPUs, gloo between CPUs
    torchrun --nproc-per-node=8 -m digit -- sample --num 64 ...   # `--`: torchrun would take --num as its own option
    srun --ntasks-per-node=8 digit train ...

A command calls `start` before its work and `stop` after it. Each rank does its share; only rank 0 logs and writes the
joint results. Messages use gloo with a 12 h timeout, because the other ranks wait while rank 0 works alone.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from digit.errors import DigitError, Stopped

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets them in each process
MESSAGE_TIMEOUT = timedelta(hours=12)  # of this module's messages; gradients keep torch's own timeouts
SLURM_PORTS = range(15_000, 32_000)  # below the ports that Linux assigns to clients
PEER_LOST = re.compile(  # messages of gloo and NCCL
    r"gloo.*(closed by peer|reset by peer|refused|broken pipe|timed ?out)|nccl.*(remote|timed ?out|abort)", re.I | re.S
)
_state: dict[str, Any] = {"control": None, "alone": False}


# -------------------------------------------------------------------- launchers and ranks


def environment(variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of this process; empty for a single process.

    torchrun sets them; in a Slurm job step of several tasks (srun) they are derived from Slurm's variables. Slurm's
    batch script itself counts as a single process.
    """
    if all(name in variables for name in LAUNCHED):
        return {name: variables[name] for name in (*LAUNCHED, "LOCAL_RANK", "LOCAL_WORLD_SIZE") if name in variables}
    if int(variables.get("SLURM_STEP_NUM_TASKS", "1")) < 2 or "SLURM_PROCID" not in variables:
        return {}
    job, step = int(variables.get("SLURM_JOB_ID", "0")), int(variables.get("SLURM_STEP_ID", "0"))
    return {
        "RANK": variables["SLURM_PROCID"],
        "WORLD_SIZE": variables["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": variables.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(tasks_on_node(variables)),
        "MASTER_ADDR": variables.get("MASTER_ADDR") or first_host(variables.get("SLURM_STEP_NODELIST", "localhost")),
        "MASTER_PORT": variables.get("MASTER_PORT") or str(SLURM_PORTS[(31 * job + step) % len(SLURM_PORTS)]),
    }


def tasks_on_node(variables: Mapping[str, str]) -> int:
    """Number of the job step's tasks on this node, from Slurm's '8(x3),4' and the node's number."""
    counts: list[int] = []
    for part in variables.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(match[1])] * int(match[2] or 1)
    node = int(variables.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else 1


def first_host(nodes: str) -> str:
    """'gpu[07-09,12],login1' -> 'gpu07'."""
    name, brackets, rest = nodes.partition(",")[0].partition("[")
    return name + re.split("[-,\\]]", rest)[0] if brackets else name


def launched_size() -> int:
    """Number of processes that were launched together; works before `start` and without torch."""
    return int(environment().get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """This process's rank among them; works before `start` and without torch."""
    return int(environment().get("RANK", "0"))


def local_size() -> int:
    """Number of the job's processes on this machine, as the launcher reports it; 1 if it does not."""
    return int(environment().get("LOCAL_WORLD_SIZE", "1"))


def start(device: "str | torch.device | None" = None) -> "torch.device":
    """Connect the ranks, if several were launched, and return this rank's device (cuda if there is a GPU, else cpu).

    Raises DigitError where the ranks cannot reach each other or share a GPU.
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
        _state["control"] = dist.new_group(backend="gloo", timeout=MESSAGE_TIMEOUT)
    if kind.type == "cuda":
        gpus = gather(str(torch.cuda.get_device_properties(kind).uuid))
        if len(set(gpus)) < len(gpus):
            raise DigitError("several processes share one GPU: start one per GPU, or add --device cpu")
    return kind


def own_gpu(visible: int) -> int:
    """Index of this rank's GPU among the `visible` ones; with --gpus-per-task, Slurm shows each task only its own.

    Raises DigitError where this machine has fewer GPUs than ranks.
    """
    if visible == 1 and "SLURM_PROCID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0
    if local_size() > visible:
        raise DigitError(
            f"{local_size()} processes on this machine share {visible} GPUs: start one per GPU, or add --device cpu"
        )
    return int(environment().get("LOCAL_RANK", "0"))


def stop(together: bool = False) -> None:
    """Disconnect the ranks, if several were launched.

    together: wait for all ranks first, as at the end of a run, because a rank that leaves while others still send can
        make them abort. After an error do not wait: the other ranks may never get here.
    """
    if connected():
        import torch.distributed as dist

        if together:
            barrier()
        dist.destroy_process_group()
        _state["control"] = None


def connected() -> bool:
    """Whether the ranks are connected. Imports nothing: a signal may have cut the import of torch short."""
    return getattr(sys.modules.get("torch.distributed"), "is_initialized", lambda: False)()


def world_size() -> int:
    """Number of ranks; 1 inside `alone`."""
    if _state["alone"] or not connected():
        return 1
    import torch.distributed as dist

    return dist.get_world_size()


def rank() -> int:
    """This process's rank, 0 .. world_size - 1; 0 inside `alone`."""
    if world_size() == 1:
        return 0
    import torch.distributed as dist

    return dist.get_rank()


def is_main() -> bool:
    """Whether this is rank 0, which logs and saves."""
    return rank() == 0


@contextmanager
def alone(on: bool = True) -> Iterator[None]:
    """Inside, this process sees a job of one: `world_size()` is 1, no message is sent. Without `on` nothing changes."""
    before = _state["alone"]
    _state["alone"] = before or on
    try:
        yield
    finally:
        _state["alone"] = before


def share(total: int, multiple: int = 1) -> range:
    """This rank's part of 0 .. total - 1; contiguous, in rank order, starting at a multiple of `multiple`."""
    blocks, num_ranks, own = -(-total // multiple), world_size(), rank()
    first, last = (min(total, blocks * r // num_ranks * multiple) for r in (own, own + 1))
    return range(first, last)


# -------------------------------------------------------------------- messages between ranks


def control() -> Any:
    """The gloo process group of this module's messages; None with one rank."""
    return _state["control"] if world_size() > 1 else None


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.barrier(control())


def gather(item: T) -> list[T]:
    """The items of all ranks, in rank order, on every rank."""
    items = [item] * world_size()
    if world_size() > 1:
        import torch.distributed as dist

        dist.all_gather_object(items, item, group=control())
    return items


def mean(values: list[float]) -> list[float]:
    """The mean over the ranks, element by element, on every rank."""
    import torch
    import torch.distributed as dist

    if world_size() == 1 or not values:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=control())
    return (total / world_size()).tolist()


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank; every rank gets the same answer."""
    return mean([float(flag)])[0] > 0


def on_every_rank(work: Callable[[], T]) -> list[T]:
    """The results of `work` on all ranks, in rank order. If any fails, all raise the lowest rank's DigitError."""
    if world_size() == 1:
        return [work()]
    outcome: tuple[T | None, DigitError | None]
    try:
        outcome = work(), None
    except DigitError as error:
        outcome = None, error
    outcomes = gather(outcome)
    for _, error in outcomes:
        if error is not None:
            raise error
    return [cast(T, result) for result, _ in outcomes]


def on_main(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 while the others wait; every rank returns its (small) result, or raises its DigitError.

    During the call, rank 0 is `alone`.
    """
    import torch.distributed as dist

    if world_size() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            with alone():
                outcome[0] = work()
        except (DigitError, Stopped) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, group=control())
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


# -------------------------------------------------------------------- failures


def first_to_speak() -> bool:
    """Whether this rank is the first to report a failure; True where the ranks cannot agree on it."""
    if world_size() == 1:
        return True
    import torch.distributed as dist

    try:
        return dist.distributed_c10d._get_default_store().add("digit/failures", 1) == 1
    except RuntimeError:
        return True


def lost_peer(error: BaseException) -> str | None:
    """An error message if a message failed because another rank is gone; None for any other error."""
    if world_size() == 1:
        return None
    import torch.distributed as dist

    connection_errors = (dist.DistNetworkError, dist.DistStoreError)
    lost = isinstance(error, connection_errors) or (isinstance(error, RuntimeError) and PEER_LOST.search(str(error)))
    if not lost:
        return None
    return f"rank {rank()} lost contact with another of the {world_size()} processes ({first_line(error)})"


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
