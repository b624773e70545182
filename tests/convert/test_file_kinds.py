"""Files whose name or content misleads: read by their content, or named for what they are with advice that works."""

import bz2
import gzip
import io
import lzma
import pickle
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from toy_vit import scale_read, vit_state

from digit.convert.file_kinds import SAFETENSORS, TORCH_OLD, TORCH_ZIP, file_kind
from digit.errors import DigitError


def torch_bytes(content: object, zipped: bool = True) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=zipped)
    return out.getvalue()


READABLE = {
    TORCH_ZIP: torch_bytes(vit_state()),
    TORCH_OLD: torch_bytes(vit_state(), zipped=False),
    SAFETENSORS: save(vit_state()),
}


@pytest.mark.parametrize("kind", READABLE)
@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin", "w.ckpt", "w.pth.tar", "w.safetensors", "w.zip", "w"])
def test_the_content_counts_and_not_the_name(tmp_path, kind, name):
    (tmp_path / name).write_bytes(READABLE[kind])
    assert file_kind(tmp_path / name)[0] == kind and scale_read(tmp_path / name) == 1


def archive(name: str, content: bytes, kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as file:
            file.writestr(name, content)
    else:
        with tarfile.open(fileobj=out, mode="w") as file:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return out.getvalue()


def npz() -> bytes:
    np.savez(out := io.BytesIO(), **{name: tensor.numpy() for name, tensor in vit_state().items()})
    return out.getvalue()


def npy() -> bytes:
    np.save(out := io.BytesIO(), np.zeros(3))
    return out.getvalue()


WHOLE, TENSORS = READABLE[TORCH_ZIP], READABLE[SAFETENSORS]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 88280307\n"


@pytest.mark.parametrize(
    ("content", "what", "advice"),
    [
        (b"", "empty", "download it again"),
        (b"<!DOCTYPE html><html><title>404</title>", "a web page", "download the file itself"),
        (b"\xef\xbb\xbf\n <HTML>", "a web page", "download the file itself"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page", "download the file itself"),
        (b'{"message": "Not Found"}', 'text (\'{"message"', "download the weights file itself"),
        (b"Access denied: sign in first", "text ('Access denied", "download the weights file itself"),
        (LFS, "a Git LFS pointer", "git lfs pull"),
        (WHOLE[: len(WHOLE) // 2], "the beginning of a zip archive", "download it again"),
        (WHOLE[:3000] + bytes(len(WHOLE) - 3000), "the beginning of a zip archive", "download it again"),
        (TENSORS[: len(TENSORS) // 2], "cut short", "download it again"),
        (TENSORS[:20], "cut short", "download it again"),
        (READABLE[TORCH_OLD][:9000], "damaged", "download it again"),
        (bytes(5000), "filled with zero bytes", "download it again"),
        (gzip.compress(WHOLE), "packed with gzip", "gzip -dc"),
        (bz2.compress(WHOLE), "packed with bzip2", "bzip2 -dc"),
        (lzma.compress(WHOLE), "packed with xz", "xz -dc"),
        (archive("weights/w.pth", WHOLE, "zip"), "a zip archive that holds weights/w.pth", "python -m zipfile -e"),
        (archive("w.pth", WHOLE, "tar"), "a tar archive", "tar -xf"),
        (npz(), "a NumPy .npz archive", "give a PyTorch or safetensors file"),
        (npy(), "a NumPy array", "--codebook"),
        (pickle.dumps({"a": 1}), "a plain pickle", "torch.save"),
        (pickle.dumps({"a": 1}, protocol=2), "a plain pickle", "torch.save"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file", "PyTorch or safetensors"),
        (b"GGUF\3\0\0\0" + bytes(50), "a GGUF file", "PyTorch or safetensors"),
        (b"\0\0\5abc" * 20 + bytes.fromhex("57fb808b247547db"), "the index of a TensorFlow checkpoint", "PyTorch"),
        (b'model_checkpoint_path: "model.ckpt-5"\n', "the list of a TensorFlow checkpoint", "PyTorch"),
        (b"\x08\x07\x12\x07pytorch\x1a\x052.7.0", "an ONNX file", "PyTorch or safetensors"),
        (b"\x93\x81\xa7\x00\xff\x10" * 50, "of no known kind, or damaged", "download it again"),
    ],
)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_other_files_are_named_for_what_they_are(tmp_path, name, content, what, advice):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        DigitError, match=f"is not a readable (PyTorch|safetensors) file.*: it is {re.escape(what)}"
    ) as raised:
        scale_read(tmp_path / name)
    text = str(raised.value)
    assert name in text and advice in text and text.isprintable() and "weights_only" not in text


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_the_advice_for_packed_files_works(tmp_path, pack):
    (tmp_path / "w.pth").write_bytes(pack(WHOLE))
    command = re.search(r"\((.+?)\)", file_kind(tmp_path / "w.pth")[1])
    assert command
    if subprocess.run(command[1], shell=True, cwd=tmp_path, capture_output=True).returncode == 127:
        pytest.skip("the program is not installed")
    assert scale_read(tmp_path / "unpacked") == 1


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_the_advice_for_archives_works(tmp_path, kind):
    (tmp_path / "w.pth").write_bytes(archive("inside.pth", WHOLE, kind))
    command = re.search(r"\((.+?)\)", file_kind(tmp_path / "w.pth")[1])
    assert command
    words = command[1].replace("python ", f"{sys.executable} ").replace("FOLDER", ".")
    subprocess.run(words, shell=True, cwd=tmp_path, check=True)
    assert scale_read(tmp_path / "inside.pth") == 1


class Scripted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, tensor in vit_state().items():
            if "." not in name:
                self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_torchscript_archive_and_its_advice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.save(torch.jit.script(Scripted()), "w.pt")
    with pytest.raises(DigitError, match="it is a TorchScript archive") as raised:
        scale_read("w.pt")
    call = re.search(r"torch\.save\(.+\)(?=,)", str(raised.value))
    assert call
    exec(call[0].replace("FILE", "'w.pt'"))  # the advice, as it is written
    assert torch.load("weights.pth", weights_only=True).keys() == {"cls_token", "pos_embed"}


def test_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from torch.distributed.checkpoint.state_dict_saver import save as save_sharded

    Path("plain").mkdir()
    with pytest.raises(DigitError, match="plain is a folder: give the weights file in it"):
        scale_read("plain")
    save_sharded(vit_state(), checkpoint_id="sharded", no_dist=True)
    with pytest.raises(DigitError, match="sharded checkpoint of torch.distributed") as raised:
        scale_read("sharded")
    command = re.search(r"run (python .+?),", str(raised.value))
    assert command
    subprocess.run(command[1].replace("python", sys.executable, 1), shell=True, check=True, capture_output=True)
    assert scale_read("weights.pth") == 1


def test_a_tensorflow_checkpoint_by_its_prefix(tmp_path):
    (tmp_path / "model.ckpt.index").write_bytes(b"x")
    with pytest.raises(DigitError, match="model.ckpt is a TensorFlow checkpoint"):
        scale_read(tmp_path / "model.ckpt")
    with pytest.raises(DigitError, match="no such weights file"):
        scale_read(tmp_path / "other.ckpt")
