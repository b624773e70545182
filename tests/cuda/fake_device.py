"""Fake CUDA tensors in a CPU build of torch. Import it before torch, in a process of its own.

import fake_device                 # compiles fake_device.cpp (seconds), loads it, then imports torch
with FakeTensorMode(): ...         # tensors on cuda have shapes, types and devices, but no values
fake_device.leave(0)               # ends the process: torch's own end would look for a real device
"""

import ctypes
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
LIBRARIES = ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so")


def build(folder: Path) -> Path:
    """Compile the device into `folder`, unless it is there; returns the library."""
    library = folder / "fake_device.so"
    if not library.exists():
        torch = torch_folder()
        includes = [torch / "include", torch / "include/torch/csrc/api/include", sysconfig.get_paths()["include"]]
        command = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", *(f"-I{path}" for path in includes)]
        subprocess.run([*command, str(HERE / "fake_device.cpp"), "-o", str(library)], check=True)
    return library


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def install(library: Path) -> None:
    """Make torch believe in two CUDA devices. They register while torch's libraries load, so torch comes after."""
    assert "torch" not in sys.modules, "import fake_device before torch"
    for name in LIBRARIES:
        if (path := torch_folder() / "lib" / name).exists():
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    import torch

    answers = {
        "is_available": True,
        "is_initialized": True,
        "current_device": 0,
        "device_count": 2,
        "is_bf16_supported": True,
        "get_device_name": "NVIDIA H100 80GB HBM3",
        "set_device": None,
        "synchronize": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)


def leave(code: int) -> None:
    """End the process at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
