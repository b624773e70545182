"""Devices, cores and precision of this machine."""

import itertools
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from digit.runtime import hardware
from digit.runtime.hardware import (
    choose_device,
    cores_of_this_process,
    cpu_quota,
    cpu_speed,
    free_memory,
    full_precision,
    in_own_thread,
    physical_memory,
)


def test_a_rank_takes_its_own_gpu_whatever_number_is_named(monkeypatch):
    taken = []
    for name, answer in {"is_available": True, "device_count": 4}.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert choose_device("cuda:2") == torch.device("cuda", 2) and taken == [torch.device("cuda", 2)]
    ranks = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}
    for name, value in (ranks | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    assert choose_device("cuda:0") == choose_device("cuda") == choose_device(None) == torch.device("cuda", 3)


def test_full_precision_switches_tf32_off_and_back():
    torch.backends.cudnn.allow_tf32 = True
    with full_precision(torch.device("cpu")):
        assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cudnn.allow_tf32


def test_the_cores_of_a_machine_are_shared_by_its_ranks(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(96)), raising=False)
    assert cores_of_this_process() == 96
    monkeypatch.setattr("digit.runtime.distributed.local_size", lambda: 8)
    assert cores_of_this_process() == 12


def test_free_memory_is_what_the_system_and_the_container_leave_to_this_process(monkeypatch):
    cpu = torch.device("cpu")
    assert 2**24 < free_memory(cpu) <= physical_memory()
    monkeypatch.setattr("digit.runtime.hardware.physical_memory", lambda: 3 * 2**20)
    assert free_memory(cpu) == 3 * 2**20, "a container leaves less than the system has"
    monkeypatch.setattr("digit.runtime.distributed.local_size", lambda: 3)
    assert free_memory(cpu) == 2**20


def test_free_memory_of_a_gpu_counts_what_torch_keeps(monkeypatch):
    numbers = {"mem_get_info": (5, 9), "memory_reserved": 4, "memory_allocated": 1}
    for name, number in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, number=number: number)
    assert free_memory(torch.device("cuda")) == 8


def test_work_in_its_own_thread_gives_its_result_or_raises_and_leaves_no_thread():
    before, here = threading.active_count(), threading.current_thread()
    assert in_own_thread(lambda: threading.current_thread() is not here)
    with pytest.raises(ZeroDivisionError):
        in_own_thread(lambda: 1 / 0)
    assert threading.active_count() == before


@pytest.mark.parametrize("slower", [1, 4])
def test_other_programs_take_wall_time_but_not_the_speed_of_the_cores(monkeypatch, slower):
    """Each product takes 10 ms of two cores together, and `slower` times as long as alone on the clock."""
    spent, clock = itertools.count(), itertools.count()
    fake = SimpleNamespace(process_time=lambda: 0.01 * next(spent), perf_counter=lambda: 0.005 * slower * next(clock))
    monkeypatch.setattr(hardware, "time", fake)
    monkeypatch.setattr(hardware, "cores_of_this_process", lambda: 2)
    monkeypatch.setattr(hardware, "cpu_quota", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    speed = cpu_speed()
    assert speed.flops == pytest.approx(2 * 1024**3 / 0.005) and speed.free == pytest.approx(1 / slower, rel=0.15)
    monkeypatch.setattr(hardware, "cpu_quota", lambda: 0.5)  # a container's limit is no passing load
    limited = cpu_speed()
    assert limited.flops == pytest.approx(2 * 1024**3 / 0.02) and (speed.cores, limited.cores) == (2, 0.5)


def test_the_speed_of_this_machine_is_measured():
    speed = cpu_speed(0.05)
    assert speed.flops > 1e8 and 0 < speed.free <= 1


@pytest.mark.parametrize(("text", "cores"), [("max 100000\n", None), ("150000 100000\n", 1.5), ("", None)])
def test_a_container_s_quota_of_cores(monkeypatch, text, cores):
    monkeypatch.setattr(Path, "read_text", lambda self, **options: text)
    assert cpu_quota() == cores


def test_where_bf16_is_only_emulated_sampling_takes_fp32(monkeypatch, caplog):
    hardware._say_emulated.cache_clear()
    monkeypatch.setattr(hardware, "multiplies_bf16", lambda device: False)
    assert [hardware.hardware_precision(wanted, torch.device("cpu")) for wanted in ("fp32", "bf16", "bf16")] == [
        "fp32"
    ] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "this cpu has no bf16 arithmetic, and emulating it is several times as slow: sampling in fp32"
    ]
    monkeypatch.setattr(hardware, "multiplies_bf16", lambda device: True)
    assert hardware.hardware_precision("bf16", torch.device("cpu")) == "bf16"
