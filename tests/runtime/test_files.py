"""safetensors as we write them, against the library that defines the format; and freed memory."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from digit.errors import DigitError
from digit.runtime.files import (
    OUTPUT_MARK,
    Stacked,
    as_path,
    check_writable,
    load_tensors,
    mark_output,
    read_json,
    save_tensors,
    sha256_file,
    write_json,
)
from digit.runtime.hardware import keep_freed_memory


def test_every_type_and_layout_comes_back(tmp_path):
    tensors = {
        "half": torch.randn(3, 5).half(),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "bf16": torch.randn(2, 2).bfloat16(),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "turned": torch.randn(4, 6).T,
        "truth": torch.tensor([True, False, True]),
        "codes": torch.arange(5),
        "naïve name": torch.ones(1),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    save_tensors(tmp_path / "t.safetensors", tensors, metadata={"made by": "a test"})
    read = load_file(tmp_path / "t.safetensors")
    assert read.keys() == tensors.keys() == load_tensors(tmp_path / "t.safetensors").keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        assert file.metadata() == {"made by": "a test"}


def test_stacked_rows_are_written_as_one_float32_tensor(tmp_path):
    parts = (torch.randn(2, 3).half(), torch.randn(4, 3), torch.randn(1, 3).double())
    piece = Stacked(parts)
    assert piece.shape == (7, 3)
    save_tensors(tmp_path / "t.safetensors", {"w": piece, "b": Stacked((torch.ones(2),))})
    read = load_file(tmp_path / "t.safetensors")
    assert torch.equal(read["w"], torch.cat([part.float() for part in parts])) and torch.equal(read["b"], torch.ones(2))


@pytest.mark.parametrize("brought", ["~/a/b", Path("~/a/b")])
def test_a_home_folder_is_one(brought, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert as_path(brought) == Path("/somewhere/a/b")
    assert as_path("a~b/$HOME/c") == Path("a~b/$HOME/c")  # the shell's business


@pytest.mark.parametrize("wrong", ["", None, 3, b"a", ["a"], "~nobody-of-this-name/x"])
def test_what_is_no_path(wrong):
    with pytest.raises(DigitError, match="path"):
        as_path(wrong)


def test_every_reader_and_writer_knows_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    save_tensors("~/a.safetensors", {"x": torch.ones(2)})
    write_json("~/a.json", [1])
    check_writable("~/folder", folder=True)
    assert load_tensors("~/a.safetensors")["x"].tolist() == [1, 1] and read_json("~/a.json") == [1]
    assert sha256_file("~/a.json") == sha256_file(tmp_path / "a.json")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.json", "a.safetensors"]


def test_keeping_freed_memory_does_no_harm():
    assert isinstance(keep_freed_memory(), bool)
    assert torch.randn(100, 100).sum().isfinite()


def test_what_cannot_be_written_is_said_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new" / "result.json")
    check_writable(tmp_path / "folder", folder=True)
    check_writable(tmp_path / "a" / "b" / "c" / "result.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "a command that fails leaves nothing behind"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    below_a_file = ((tmp_path / "file" / "x.json", False), (tmp_path / "file" / "a" / "b", True))
    odd = ((tmp_path, False), (tmp_path / "file", True), (tmp_path / "link", True), (tmp_path / ("x" * 300), True))
    for path, folder in (*below_a_file, *odd):
        with pytest.raises(DigitError, match="cannot write"):
            check_writable(path, folder=folder)


def test_a_stop_while_a_file_is_read_is_no_damage(tmp_path, monkeypatch):
    """A signal may arrive inside torch.load, whose every Exception means a damaged file."""
    from digit.convert.reading import read_torch
    from digit.errors import Stopped

    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")

    def load(*args, **kwargs):
        raise Stopped("stopped", together=False)

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(Stopped):
        read_torch(tmp_path / "w.pth")


def test_a_mark_without_its_text_is_written_again(tmp_path):
    (tmp_path / OUTPUT_MARK).touch()  # as a process leaves it that is killed between the two
    mark_output(tmp_path)
    text = (tmp_path / OUTPUT_MARK).read_text()
    assert text.startswith("DiGIT made this folder")
    (tmp_path / OUTPUT_MARK).write_text("by another version")
    mark_output(tmp_path)
    assert (tmp_path / OUTPUT_MARK).read_text() == "by another version"
    mark_output(tmp_path / "missing")
