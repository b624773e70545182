"""Devices, cores and precision of this machine."""

import torch

from digit.runtime.hardware import choose_device, cores_of_this_process, full_precision


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
