"""Released checkpoints: prior, renderer, baseline, VQ tokenizers, encoders, centroids and ONNX, small and damaged."""

import argparse
import contextlib
import io
import pickle
import random
import re
import struct
import sys
import tempfile
import zipfile
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from digit.convert.fairseq import BLOCK, NUM_SPECIAL
from digit.convert.onnx_weights import read_onnx
from digit.errors import DigitError
from digit.models.sequence import SequenceConfig
from digit.models.vit import ViT, ViTConfig
from digit.models.vqgan import VQGAN, VQGANConfig
from digit.released.convert import ReleasedFiles, convert_release

from ..mutate import EDGES, NAMES, STRANGE, damage
from .safetensors import randomise

POSITIONS, WIDTH, CODES = 300, 8, 7
VQ_FORMATS = ("llamagen", "diffusers", "open_magvit2", "taming_gumbel", "maskgit", "ibq")
MARKER = "executed"  # a file of this name appears where code from a pickle ran


class Trap:
    """Writes a file when it is unpickled with code allowed."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.system, (self.command,)


class ReleasedLoader:
    """`digit convert` of one to five files, the small ones whole or damaged."""

    name = "released"

    def prepare(self) -> None:
        """The whole files."""
        seeds()

    def build(self, folder: Path, rng: random.Random) -> None:
        parts = rng.sample(sorted(seeds()), rng.choice((1, 1, 2, 3)))
        for place, part in enumerate(parts):
            content = seeds()[part]
            data = changed(part, content, rng) if place == 0 or rng.random() < 0.2 else packed(content)
            name = "encoder.safetensors" if part == "encoder" and rng.random() < 0.1 else file_name(part)
            (folder / name).write_bytes(data)

    def load(self, folder: Path) -> None:
        given = {path.stem: str(path) for path in folder.iterdir() if path.suffix in (".pt", ".npy", ".safetensors")}
        try:
            if given:
                sizes = {"image_size": 16, "encoder_size": 8, "encoder_heads": 2, "encoder_family": None}
                if "encoder" in given:
                    sizes["encoder_family"] = "dinov2"
                with contextlib.chdir(folder):  # where a trap would leave its mark
                    convert_release(ReleasedFiles(**given, **sizes), folder / "out")
        except DigitError:
            left = [p for p in folder.iterdir() if p.name == "out" or p.name.startswith(".out")]
            assert not left, f"a refusal left {left[0].name}"
            raise
        finally:
            assert not (folder / MARKER).exists(), "code of a pickle ran"
        if (folder / "model.onnx").exists():
            read_onnx(folder / "model.onnx")


def file_name(part: str) -> str:
    """The name of a part's file, whose stem is the option that takes it."""
    names = {"baseline": "renderer.pt", "codebook": "codebook.npy", "onnx": "model.onnx"}
    return names.get(part, "vqgan.pt" if part in VQ_FORMATS else f"{part}.pt")


def packed(content: Any, **options: Any) -> bytes:
    """As torch.save (or np.save) writes it; bytes as they are."""
    if isinstance(content, bytes):
        return content
    out = io.BytesIO()
    if isinstance(content, np.ndarray):
        np.save(out, content, allow_pickle=True)
    else:
        torch.save(content, out, **options)
    if options.get("_use_new_zipfile_serialization", True):
        return out.getvalue()
    # the format of torch before 1.6 names a storage by its address: another in every run
    return re.sub(rb"X[\x0a-\x12]\0\0\0\d{10,18}", b"X\x03\0\0\x00123", out.getvalue())


def in_one_storage(content: dict[str, Any]) -> dict[str, Any]:
    """A copy of a checkpoint whose tensors are views of one storage: the order of several follows their addresses."""
    content = pickle.loads(pickle.dumps(content))
    holders = [content, *(value for value in content.values() if isinstance(value, dict))]
    places = [(holder, name) for holder in holders for name, value in holder.items() if isinstance(value, Tensor)]
    whole, start = torch.cat([holder[name].reshape(-1) for holder, name in places]), 0
    for holder, name in places:
        shape = holder[name].shape
        holder[name] = whole[start : start + shape.numel()].view(shape)
        start += shape.numel()
    return content


def changed(part: str, content: Any, rng: random.Random) -> bytes:
    """One damaged file."""
    action = rng.random()
    if isinstance(content, bytes | np.ndarray) or action < 0.2:
        data = packed(content)
        if isinstance(content, np.ndarray) and action < 0.3:
            odd = (
                content.astype("f2"),
                content.astype("O"),
                content.ravel(),
                content * np.nan,
                content[:0],
                content.astype("i8"),
            )
            return packed(rng.choice(odd))
        return damage(data, rng, where=slice(0, rng.choice((200, 3000, len(data)))))
    if action < 0.25:
        zipped = rng.random() < 0.5
        tree = (content if zipped else in_one_storage(content)) | {"trap": Trap(f"touch {MARKER}")}
        return packed(tree, _use_new_zipfile_serialization=zipped)
    if action < 0.3:
        return damage(packed(in_one_storage(content), _use_new_zipfile_serialization=False), rng)
    tree = content if action < 0.45 else strange_tree(content, rng)
    data = packed(tree)
    return changed_zip(data, rng) if action < 0.6 else data


def strange_tree(content: Any, rng: random.Random) -> Any:
    """A copy of a checkpoint with one to three tensors, names or values of another kind."""
    content = pickle.loads(pickle.dumps(content))
    for _ in range(rng.choice((1, 1, 2, 3))):
        holders = [content, *(v for v in content.values() if isinstance(v, dict) and v)]
        holder = max(holders, key=len) if rng.random() < 0.7 else rng.choice(holders)
        if not holder:
            continue
        name = rng.choice(list(holder))
        action = rng.random()
        if action < 0.1:
            del holder[name]
        elif action < 0.2:
            holder[rng.choice((*NAMES, f"{name}.x", "decoder.layers.999999.fc1.weight", 5, None, (1, 2), True))] = (
                holder[name]
            )
        elif isinstance(holder[name], Tensor) and action < 0.85:
            if not is_hollow(holder[name]):
                holder[name] = strange_tensor(holder[name], rng)
        else:
            holder[name] = rng.choice((*STRANGE, argparse.Namespace(a=1), np.float64(3), OrderedDict(), {1, 2}, b"x"))
    return content


def is_hollow(tensor: Tensor) -> bool:
    """Whether an earlier change made it one that nothing can be computed from, or more than memory holds."""
    return tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.numel() > 10**6


def strange_tensor(tensor: Tensor, rng: random.Random) -> Any:
    """A tensor of another shape, type or layout."""
    one, tensor = torch.zeros(1), tensor if tensor.ndim else tensor[None]
    makers = (
        lambda: tensor.flatten(),
        lambda: tensor[None],
        lambda: tensor[:0],
        lambda: tensor.T.contiguous() if tensor.ndim == 2 else tensor[:1],
        lambda: torch.tensor(1.0),
        lambda: torch.empty(0),
        lambda: tensor.half(),
        lambda: tensor.double(),
        lambda: tensor.bfloat16(),
        lambda: tensor.long(),
        lambda: tensor.bool(),
        lambda: tensor.to(torch.complex64),
        lambda: tensor.to(torch.float8_e4m3fn),
        lambda: tensor * float("nan"),
        lambda: torch.full(tensor.shape, float("inf")),
        lambda: tensor.to_sparse(),
        lambda: tensor.to_sparse_csr() if tensor.ndim == 2 else tensor.to_sparse(),
        lambda: torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point()),
        lambda: tensor.to("meta"),
        lambda: one.expand(tensor.shape),
        lambda: one.expand(10**5, 10**5),
        lambda: one.expand(10**9),
        lambda: one.expand(2**31, 2**31),
        lambda: tensor.repeat(2, *[1] * (tensor.ndim - 1)),
        lambda: one.expand(2**14, *tensor.shape[1:]),
        lambda: one.expand(*tensor.shape[:1], 2**24),
        lambda: torch.zeros(3, 0),
        lambda: torch.zeros([1] * 30),
        lambda: tensor.numpy(),
        lambda: [tensor],
        lambda: torch.Size([1]),
        lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
        lambda: tensor.conj().imag if tensor.is_complex() else tensor,
    )
    return rng.choice(makers)()


def changed_zip(data: bytes, rng: random.Random) -> bytes:
    """The archive made anew with a damaged member, another one, or packed; checksums are right."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return damage(data, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        names = old.namelist()
        chosen = next(n for n in names if n.endswith("data.pkl")) if rng.random() < 0.8 else rng.choice(names)
        packing = rng.choice((zipfile.ZIP_STORED,) * 4 + (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
        with zipfile.ZipFile(out, "w", packing) as new:
            for name in names:
                content = old.read(name)
                if name == chosen:
                    action = rng.random()
                    if action < 0.1:
                        continue
                    content = changed_pickle(content, rng) if name.endswith(".pkl") else damage(content, rng)
                    if action < 0.2 and packing == zipfile.ZIP_DEFLATED:
                        content += bytes(3 * 10**7)
                if rng.random() < 0.02:
                    name = rng.choice(("../up", "/abs", "x" * 300, name + "x"))
                new.writestr(zipfile.ZipInfo(name), content, compress_type=packing)  # of 1980, in every run
    return out.getvalue()


def changed_pickle(data: bytes, rng: random.Random) -> bytes:
    """Small integers of the opcode stream (sizes, strides, offsets) replaced, or bytes damaged."""
    if rng.random() < 0.4:
        return damage(data, rng)
    out = bytearray(data)
    places = [at for at in range(len(out) - 2) if out[at : at + 1] == b"K"]  # BININT1
    for _ in range(rng.choice((1, 2, 3))):
        if places:
            at = rng.choice(places)
            value = rng.choice((*EDGES, 10**6, 10**9, 10**11))
            if rng.random() < 0.5:
                out[at + 1] = value & 255
            else:
                written = b"\x8a\x08" + struct.pack("<q", value)  # LONG1
                out[at : at + 2] = written
                places = [p if p < at else p + len(written) - 2 for p in places if p != at]
    return bytes(out)


@cache
def seeds() -> dict[str, Any]:
    """The whole small files by part: what torch.save takes, a NumPy array, or bytes."""
    torch.manual_seed(0)
    vit = ViT(
        ViTConfig(embed_dim=WIDTH, depth=2, num_heads=2, patch_size=4, table_side=2, num_registers=1)
    ).state_dict()
    randomise(vit)
    encoder = {name: tensor.clone() for name, tensor in vit.items()} | {"mask_token": torch.zeros(1, WIDTH)}
    centroids = torch.randn(WIDTH, CODES)
    shared = {f"pretrained_encoder.{n}": t for n, t in encoder.items()} | {"centroids": centroids}
    shared["centroid_norm"] = centroids.square().sum(0, keepdim=True)
    net = VQGAN(
        VQGANConfig(resolution=16, channels=32, channel_mult=(1, 1), num_res_blocks=1, z_channels=4, vocab_size=11)
    )
    vqgan = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    shape = {"depth": 1, "embed_dim": WIDTH, "num_heads": 2}
    prior = SequenceConfig(vocab_size=CODES, target_len=4, num_classes=2, **shape)
    renderer = SequenceConfig(vocab_size=11, target_len=64, norm="pre", prefix_vocab_size=CODES, prefix_len=4, **shape)
    baseline = SequenceConfig(vocab_size=11, target_len=64, norm="pre", num_classes=2, **shape)
    return {
        "prior": fairseq(decoder(prior) | shared, namespace=True),
        "renderer": fairseq(decoder(renderer) | {f"vqgan.{n}": t for n, t in vqgan.items()}),
        "baseline": fairseq(decoder(baseline)),
        "encoder": {"teacher": {f"backbone.{name}": tensor for name, tensor in encoder.items()}},
        "vqgan": {"state_dict": vqgan},
        "codebook": centroids.T.contiguous().numpy(),
        "onnx": onnx(),
        **foreign_tokenizers(),
    }


def foreign_tokenizers() -> dict[str, Any]:
    """Small VQ tokenizers in the files of other projects."""
    sys.path.append(str(Path(__file__).parents[2] / "helpers"))  # `python -m fuzz` has no more than tests/
    import foreign_vq

    made = foreign_vq.stand_ins
    states = {form: made.foreign_state(form, foreign_vq.small(form)) for form in VQ_FORMATS}
    return {form: made.file_content(form, state) for form, state in states.items()}


def fairseq(state: dict[str, Tensor], namespace: bool = False) -> dict[str, Any]:
    """A checkpoint around a state dict, of the newer or the older kind."""
    settings = {"_name": "digit_ar", "decoder_attention_heads": 2, "best": np.float64(3)}
    if namespace:
        return {"args": argparse.Namespace(**settings), "model": state, "last_optimizer_state": None}
    return {"args": None, "cfg": {"model": settings, "task": {"_name": "x"}}, "model": state}


def decoder(cfg: SequenceConfig) -> dict[str, Tensor]:
    """Random tensors under the released names and in the released shapes."""
    width, hidden, symbols = cfg.embed_dim, cfg.mlp_dim, cfg.vocab_size + NUM_SPECIAL
    rows = symbols + (cfg.prefix_vocab_size + NUM_SPECIAL if cfg.prefix_len else cfg.num_classes)
    positions = max(POSITIONS, cfg.target_len + 5)
    shapes: dict[str, tuple[int, ...]] = {
        "version": (1,),
        "embed_tokens.weight": (rows, width),
        "embed_positions.weight": (positions, width),
        "output_projection.weight": (symbols, width),
    }
    if cfg.prefix_len:
        shapes["embed_positions_1.weight"] = (positions, width)
    if cfg.norm == "pre":
        shapes |= {"layer_norm.weight": (width,), "layer_norm.bias": (width,)}
    own = {"self_attn.out_proj": (width, width), "fc1": (hidden, width), "fc2": (width, hidden)}
    own |= {f"self_attn.{part}_proj": (width, width) for part in "qkv"}
    for layer in range(cfg.depth):
        for name in sorted({*BLOCK, *own}):
            shapes[f"layers.{layer}.{name}.weight"] = own.get(name, (width,))
            shapes[f"layers.{layer}.{name}.bias"] = own.get(name, (width,))[:1]
    return {f"decoder.{name}": torch.randn(shape) for name, shape in shapes.items()}


def onnx() -> bytes:
    """A graph of two initialisers and a node."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    tensors = b"".join(
        field(5, bytes([8, 2, 8, 3, 16, kind]) + field(8, name) + field(9, struct.pack(f"<6{code}", *range(6))))
        for name, kind, code in ((b"a", 1, "f"), (b"b", 7, "q"))
    )
    graph = tensors + field(1, field(1, b"a") + field(3, b"/n/MatMul") + field(4, b"MatMul"))
    return b"\x3a" + bytes([len(graph) & 127 | 128, len(graph) >> 7]) + graph


def self_test() -> None:
    """The whole seeds convert: otherwise every damaged one would be refused for the same dull reason."""
    with tempfile.TemporaryDirectory() as folder:
        for parts in (
            ("prior", "renderer"),
            ("baseline",),
            ("encoder", "codebook", "vqgan"),
            *((f,) for f in VQ_FORMATS),
        ):
            place = Path(folder) / parts[0]
            place.mkdir()
            for part in parts:
                (place / file_name(part)).write_bytes(packed(seeds()[part]))
            ReleasedLoader().load(place)
