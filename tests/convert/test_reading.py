"""Checkpoints that hold more than tensors: values of any class neither run nor hinder, and dtypes are read or named."""

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import pathlib
import re
import sys
import types
import uuid
from typing import Any

import numpy as np
import pytest
import torch
from toy_vit import scale_read, vit_state

from digit.convert.reading import Unread, read_torch
from digit.errors import DigitError


class Settings(dict):
    """As Lightning's AttributeDict, EasyDict and others."""


class Steps(list):
    """A list with another name."""


class Phase(enum.Enum):
    TRAIN = 1


@dataclasses.dataclass
class Arguments:
    lr: float = 0.1


Pair = collections.namedtuple("Pair", "first second")


def foreign(module: str, name: str) -> Any:
    """An object of a package that is not installed where the file is read."""
    made = type(name, (), {"__module__": module})
    for package in (module.partition(".")[0], module):
        sys.modules[package] = types.ModuleType(package)
    setattr(sys.modules[module], name, made)
    value: Any = made()
    value._content, value.path = {"lr": 0.1}, pathlib.Path("x")
    return value


KINDS: dict[str, Any] = {
    **{f"np.{kind}": np.dtype(kind).type(1) for kind in "?bBhHiIlLqQefdgFDG"},
    "np.datetime64": np.datetime64("2026-01-01"),
    "np.timedelta64": np.timedelta64(1, "s"),
    "np.str_": np.str_("a"),
    "np.bytes_": np.bytes_(b"a"),
    "array": np.zeros((2, 3)),
    "array without dimensions": np.array(3),
    "array of objects": np.array([1, "a"], object),
    "array of records": np.zeros(2, [("a", "f4")]),
    "masked array": np.ma.array([1]),
    "np.dtype": np.dtype("f4"),
    "state of np.random": np.random.get_state(),
    "np.random.Generator": np.random.default_rng(0),
    "Namespace": argparse.Namespace(path=pathlib.Path("x"), best=np.float32(1)),
    "SimpleNamespace": types.SimpleNamespace(a=1),
    "Path": pathlib.Path("x"),
    "WindowsPath": pathlib.PureWindowsPath("x"),
    "OrderedDict": collections.OrderedDict(a=1),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "deque": collections.deque([1, 2]),
    "Counter": collections.Counter("aab"),
    "datetime": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    "date": datetime.date(2026, 1, 1),
    "timedelta": datetime.timedelta(1),
    "Decimal": decimal.Decimal(1),
    "UUID": uuid.UUID(int=1),
    "frozenset": frozenset([1]),
    "range": range(3),
    "slice": slice(3),
    "type": float,
    "subclass of dict": Settings(a=Settings(b=[1])),
    "subclass of list": Steps([1, 2]),
    "enum": Phase.TRAIN,
    "dataclass": Arguments(),
    "namedtuple": Pair(1, 2),
    "optimizer": torch.optim.AdamW([torch.zeros(1)]),
    "scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.AdamW([torch.zeros(1)]), 1),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_values_of_other_classes_beside_the_weights(tmp_path, kind, zipped):
    content = {"teacher": vit_state(), "beside": KINDS[kind], "epoch": 3}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert scale_read(tmp_path / "w.pth") == 1


@pytest.mark.parametrize(
    ("module", "name"),
    [("omegaconf.dictconfig", "DictConfig"), ("yacs.config", "CfgNode"), ("my_project.meters", "Average")],
)
def test_packages_that_are_not_installed(tmp_path, module, name):
    torch.save({"model": vit_state(), "cfg": foreign(module, name)}, tmp_path / "w.pth")
    for package in {module, module.partition(".")[0]}:
        del sys.modules[package]
    assert scale_read(tmp_path / "w.pth") == 1
    value = read_torch(tmp_path / "w.pth")["cfg"]
    assert isinstance(value, Unread) and type(value).__name__ == name and not vars(value)


def test_what_is_read_stays_what_it_is(tmp_path):
    plain = {"epoch": 3, "lr": 0.5, "done": True, "name": "a", "steps": [1, (2, None)], "args": argparse.Namespace(a=1)}
    torch.save(plain, tmp_path / "w.pth")
    assert read_torch(tmp_path / "w.pth") == plain


class Called:
    def __init__(self, function: Any, *arguments: Any):
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.reduced


def hostile(mark: pathlib.Path) -> dict[str, Called]:
    import os
    import runpy
    import shutil
    import subprocess

    return {
        "os.mkdir": Called(os.mkdir, str(mark)),
        "os.system": Called(os.system, f"touch {mark}"),
        "eval": Called(eval, f"open({str(mark)!r}, 'w')"),
        "exec": Called(exec, f"open({str(mark)!r}, 'w')"),
        "subprocess": Called(subprocess.check_call, ["touch", str(mark)]),
        "shutil": Called(shutil.copy, __file__, str(mark)),
        "runpy": Called(runpy.run_path, __file__),
        "a method": Called(pathlib.Path.touch, mark),
    }


@pytest.mark.parametrize("kind", hostile(pathlib.Path()))
def test_functions_are_refused_and_never_run(tmp_path, kind):
    torch.save({"teacher": vit_state(), "x": hostile(tmp_path / "ran")[kind]}, tmp_path / "w.pth")
    with pytest.raises(DigitError, match="DiGIT runs no code from a file: if you trust it, load it by torch.load"):
        scale_read(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


class Trap:
    """Leaves a file behind when it is built."""

    def __init__(self, path: pathlib.Path | None = None):
        if path:
            path.touch()

    def __setstate__(self, state: dict[str, Any]) -> None:
        state["mark"].touch()


def test_a_class_of_the_file_is_never_built(tmp_path):
    trap = Trap()
    trap.__dict__["mark"] = tmp_path / "ran"
    torch.save({"teacher": vit_state(), "a": trap, "b": Called(Trap, tmp_path / "ran")}, tmp_path / "w.pth")
    assert scale_read(tmp_path / "w.pth") == 1 and not (tmp_path / "ran").exists()


def test_a_file_of_endless_classes_is_refused(tmp_path):
    values = [foreign(f"package{number}", "Value") for number in range(210)]
    torch.save({"teacher": vit_state(), "x": values}, tmp_path / "w.pth")
    with pytest.raises(DigitError, match="runs no code from a file"):
        scale_read(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda: torch.nn.Linear(2, 2), r"pickled objects \(Linear\): .*torch.save\(model.state_dict\(\)"),
        (lambda: {"model": torch.nn.Linear(2, 2), "epoch": 1}, r"pickled objects \(Linear\)"),
        (lambda: {"model": {n: t.numpy() for n, t in vit_state().items()}}, r"\(NumPy array\): save them as tensors"),
        (lambda: vit_state() | {"norm.bias": np.zeros(24)}, r"norm.bias should be tensors but are not \(NumPy array\)"),
        (lambda: vit_state() | {"lr": 0.1}, r"lr should be tensors but are not \(float\): save the tensors alone"),
        (lambda: vit_state() | {"best": np.float64(1)}, r"best should be tensors but are not \(NumPy number\)"),
        (lambda: vit_state() | {5: torch.zeros(1)}, "5 should be names of tensors"),
        (lambda: [torch.zeros(1)], "expected a dict of tensors, got list"),
        (lambda: torch.zeros(3), "expected a dict of tensors, got Tensor"),
        (lambda: {"model": {}}, "expected a dict of tensors|should be tensors"),
    ],
)
def test_what_is_no_dict_of_tensors_is_named(tmp_path, content, said):
    torch.save(content(), tmp_path / "w.pth")
    with pytest.raises(DigitError, match=said):
        scale_read(tmp_path / "w.pth")


def test_a_model_in_the_old_format(tmp_path):
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(DigitError, match="holds a pickled model: .*state_dict"):
        scale_read(tmp_path / "w.pth")


def test_another_pickle_protocol_and_its_advice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(vit_state(), "w.pth", pickle_protocol=4)
    with pytest.raises(DigitError, match="pickled with another protocol") as raised:
        scale_read("w.pth")
    call = re.search(r"torch\.save\(.+'weights.pth'\)", str(raised.value))
    assert call
    exec(call[0].replace("FILE", "'w.pth'"))  # the advice, as it is written
    assert scale_read("weights.pth") == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_weights_become_float32(tmp_path, dtype):
    torch.save({name: tensor.to(dtype) for name, tensor in vit_state().items()}, tmp_path / "w.pth")
    assert scale_read(tmp_path / "w.pth") == 1


def quantized(tensor: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (quantized, "norm.bias are quantized: give the fp32"),
        (lambda t: t.to(torch.int8), r"norm.bias \(torch.int8\): give the unquantized weights"),
        (lambda t: t.to(torch.float8_e4m3fn), r"norm.bias \(torch.float8_e4m3fn\): give"),
        (lambda t: t.to(torch.complex64), r"norm.bias \(torch.complex64\): give"),
        (lambda t: t.double() * 1e300, "norm.bias hold numbers beyond float32: give weights in fp32"),
        (lambda t: t / 0, "NaN or Inf in norm.bias"),
        (lambda t: t.to_sparse(), "does not hold the elements of norm.bias: save the tensors whole"),
        (lambda t: t.to("meta"), "does not hold the elements of norm.bias: save the tensors whole"),
    ],
)
def test_other_numbers_are_named(tmp_path, change, said):
    state = vit_state()
    torch.save(state | {"norm.bias": change(state["norm.bias"])}, tmp_path / "w.pth")
    with pytest.raises(DigitError, match=said):
        scale_read(tmp_path / "w.pth")
