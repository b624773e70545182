"""Who a process is under torchrun and Slurm, and what one process makes of it all."""

import pytest

from digit.cli import first_message, given_device, main, same_command
from digit.errors import DigitError
from digit.runtime import distributed

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8",
    "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[07-09,12],login1",
}  # fmt: skip


def test_alone_everything_is_what_it_is():
    assert distributed.environment({}) == {}
    assert (distributed.world_size(), distributed.rank(), distributed.is_main()) == (1, 0, True)
    assert distributed.gather("x") == ["x"] and distributed.mean([1.0]) == [1.0] and distributed.any_rank(True) is True
    assert distributed.on_main(lambda: 7) == 7
    assert list(distributed.share(5)) == list(range(5))
    assert distributed.first_to_speak() and distributed.lost_peer(RuntimeError("Connection closed by peer")) is None


def test_torchrun_says_who_a_process_is():
    assert distributed.environment(TORCHRUN) == TORCHRUN
    assert distributed.environment({name: value for name, value in TORCHRUN.items() if name != "MASTER_PORT"}) == {}


def test_slurm_says_it_in_other_words():
    found = distributed.environment(SLURM)
    assert {name: found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")} == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07",
    }  # fmt: skip
    assert int(found["MASTER_PORT"]) in distributed.SLURM_PORTS
    assert distributed.environment(SLURM | {"MASTER_ADDR": "a", "MASTER_PORT": "1"})["MASTER_ADDR"] == "a"
    other = distributed.environment(SLURM | {"SLURM_STEP_ID": "1"})
    assert other["MASTER_PORT"] != found["MASTER_PORT"]  # two steps of one job do not meet


def test_a_batch_script_is_no_job_step():
    script = {name: value for name, value in SLURM.items() if not name.startswith("SLURM_STEP")}
    assert distributed.environment(script | {"SLURM_PROCID": "0"}) == {}
    assert distributed.environment(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu1", "gpu1"), ("gpu[07-09,12],x", "gpu07"), ("a,b", "a"), ("n[3],m", "n3"), ("rack-2-n[1,4]", "rack-2-n1")],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert distributed.first_host(nodes) == first


@pytest.mark.parametrize(("total", "multiple", "size"), [(10, 1, 3), (10, 4, 3), (3, 4, 2), (0, 2, 2), (64, 8, 8)])
def test_shares_are_a_partition_cut_at_multiples(monkeypatch, total, multiple, size):
    monkeypatch.setattr(distributed, "world_size", lambda: size)
    found = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        share = distributed.share(total, multiple)
        assert share.start % multiple == 0 or share.start == total
        found += share
    assert found == list(range(total))


def test_what_to_type_again(monkeypatch):
    argv = ["train", "prior", "my photos/", "--out", "run"]
    assert same_command(argv) == "digit train prior 'my photos/' --out run"
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert same_command(["sample"]) == "srun --ntasks=8 digit sample"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert same_command(["sample"]) == "torchrun --standalone --nproc-per-node=8 -m digit -- sample"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert same_command(["sample"]) == "torchrun --nnodes=2 --nproc-per-node=4 -m digit -- sample"


def test_a_command_for_one_process_is_refused_by_one_message(monkeypatch, capsys):
    for name, value in (TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    assert main(["inspect", "photos/"]) == 2
    assert (
        "digit inspect runs as one process, but 8 were started: the commands that can share work are "
        in capsys.readouterr().err
    )
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["inspect", "photos/"]) == 2 and not first_message()
    assert capsys.readouterr().err == ""


def test_the_device_is_known_before_the_parser():
    assert given_device(["a", "--device", "cpu"]) == given_device(["--device=cpu"]) == "cpu"
    assert given_device(["--out", "x"]) is None


def test_processes_share_a_machine(monkeypatch):
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "4")
    assert distributed.local_size() == 1  # a batch script
    for name, value in (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3(x2),2", "SLURM_NODEID": "1"}).items():
        monkeypatch.setenv(name, value)
    assert distributed.local_size() == 3
    monkeypatch.setenv("SLURM_NODEID", "2")
    assert distributed.local_size() == 2


def test_each_process_finds_its_gpu(monkeypatch):
    for name, value in (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}).items():
        monkeypatch.setenv(name, value)
    assert distributed.own_gpu(4) == 1
    assert distributed.own_gpu(1) == 0  # --gpus-per-task shows each task its own alone
    with pytest.raises(DigitError, match="4 processes on this machine share 2 GPUs: start one per GPU"):
        distributed.own_gpu(2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(DigitError, match="4 processes on this machine share 1 GPUs"):
        distributed.own_gpu(1)


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:3", True),
        ("NCCL error: remote process exited or there was a network error", True),
        ("a genuine bug: value cannot be restored", False),
        ("Tensors stored on different devices", False),
        ("CUDA error: peer mapping resources exhausted", False),
        ("[enforce fail at allreduce.cc] op.preamble.length <= op.nbytes, gloo", False),
    ],
)
def test_a_lost_peer_is_told_from_a_bug(monkeypatch, text, lost):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert (distributed.lost_peer(RuntimeError(text)) is not None) == lost
    assert distributed.lost_peer(ValueError(text)) is None


def test_an_unknown_device_is_one_line():
    with pytest.raises(DigitError, match="no device named 'gpu': choose cpu or cuda"):
        distributed.start("gpu")


def test_an_error_on_rank_0_is_everybodys():
    def fail():
        raise DigitError("no room")

    with pytest.raises(DigitError, match="no room"):
        distributed.on_main(fail)
