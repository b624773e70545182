"""Safetensors, and every folder that DiGIT reads them from: pipeline, encoder, codebook, VQGAN, sequence model."""

import hashlib
import json
import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digit.data.preprocess import PreprocessConfig
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.models.vit import ViT, ViTConfig
from digit.models.vqgan import VQGAN, VQGANConfig
from digit.pipeline.manifest import load_sequence_model
from digit.pipeline.pipeline import DigitPipeline
from digit.runtime.files import load_tensors
from digit.tokenizers.discriminative import DiscriminativeTokenizer
from digit.tokenizers.encoders import FrozenEncoder
from digit.tokenizers.kmeans.codebook import Codebook
from digit.tokenizers.vq import VQTokenizer

from ..mutate import damage, json_bytes, strange_json

SHAPE = {"depth": 1, "embed_dim": 8, "num_heads": 2}
FOLDERS = {"encoder": FrozenEncoder.load, "codebook": Codebook.load, "vqgan": VQTokenizer.load}


class SafetensorsLoader:
    """load_tensors of each file, and each folder by its own reader."""

    name = "safetensors"

    def prepare(self) -> None:
        """The whole files."""
        pipeline()

    def whole(self) -> dict[str, bytes]:
        """The files of an input without damage."""
        return pipeline()

    def build(self, folder: Path, rng: random.Random) -> None:
        files = dict(pipeline())
        for _ in range(rng.choice((1, 1, 1, 2))):
            name = rng.choice(sorted(files))
            files[name] = self._changed(name, files, rng)
        if rng.random() < 0.05:
            del files[rng.choice(sorted(files))]
        for name, data in files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)

    def _changed(self, name: str, files: dict[str, bytes], rng: random.Random) -> bytes:
        data, others = files[name], tuple(files.values())
        if name.endswith(".json"):
            if rng.random() < 0.15:
                return damage(data, rng)
            value = strange_json(json.loads(pipeline()[name]), rng)
            if name == "encoder/encoder.json" and rng.random() < 0.5:
                value = with_fingerprint(value)
            return json_bytes(value, rng)
        head = 8 + int.from_bytes(data[:8], "little")
        action = rng.random()
        if action < 0.3:
            return damage(data, rng, others)
        if action < 0.5:
            return damage(data, rng, others, slice(0, min(head, len(data))))
        try:
            header = json.loads(data[8:head])
        except ValueError:
            return damage(data, rng, others)
        text = json_bytes(strange_json(header, rng), rng)
        return len(text).to_bytes(8, "little") + text + data[head:]

    def load(self, folder: Path) -> None:
        refusals = []
        for path in sorted(folder.rglob("*.safetensors")):
            refusals.append(_refused(lambda path=path: load_tensors(path)))
        for name, read in FOLDERS.items():
            if (folder / name).is_dir():
                refusals.append(_refused(lambda name=name, read=read: read(folder / name)))
        for name in ("prior", "renderer"):
            refusals.append(_refused(lambda name=name: load_sequence_model(folder, name)))
        if not any(refusals):
            refusals.append(_refused(lambda: sample(folder)))
        if found := [refusal for refusal in refusals if refusal is not None]:
            raise found[0]


def sample(folder: Path) -> None:
    """Opens a pipeline and samples from it: what was accepted must work."""
    pipe = DigitPipeline.from_pretrained(folder)
    if {"tokenizer", "vq", "prior", "renderer"} <= {
        n for n in ("tokenizer", "vq", "prior", "renderer") if getattr(pipe, n)
    }:
        sizes = (pipe.image_size, pipe.preprocess.encoder_size, pipe.tokenizer.encoder.input_size)
        if max(sizes) <= 64 and max(pipe.sampling.prior.num_steps, pipe.sampling.renderer.num_steps) < 100:
            pipe.generate(1, seed=0)
            pipe.tokenizer.encode(torch.zeros(1, 3, pipe.image_size, pipe.image_size, dtype=torch.uint8))


def _refused(action: Any) -> Exception | None:
    from digit.errors import DigitError

    try:
        action()
    except DigitError as error:
        return error
    return None


def with_fingerprint(settings: Any) -> Any:
    """Gives encoder settings their own fingerprint, so that they are not refused for a wrong one."""
    if not isinstance(settings, dict) or not isinstance(settings.get("fingerprint"), str):
        return settings
    from digit.runtime.files import sha256_tensors

    kept = {k: v for k, v in settings.items() if k not in ("format", "name", "about", "fingerprint")}
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(pipeline()["encoder/encoder.safetensors"])
        file.flush()
        weights = sha256_tensors(load_tensors(file.name))
    whole = (json.dumps(kept, sort_keys=True) + weights).encode("utf-8", "replace")
    return settings | {"fingerprint": hashlib.sha256(whole).hexdigest()}


@cache
def pipeline() -> dict[str, bytes]:
    """The files of a complete small pipeline."""
    torch.manual_seed(0)
    vit = ViT(ViTConfig(embed_dim=8, depth=2, num_heads=2, patch_size=4, table_side=2, num_registers=1))
    randomise(vit.state_dict())
    numbers = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "input_size": 8}
    encoder = FrozenEncoder(vit, name="toy", layer=1, about={"training": "none"}, **numbers)
    net = VQGANConfig(
        resolution=16, channels=4, channel_mult=(1, 1, 1), num_res_blocks=1, z_channels=4, vocab_size=11, num_groups=2
    )
    first = SequenceConfig(vocab_size=7, target_len=4, num_classes=2, **SHAPE)
    second = SequenceConfig(vocab_size=11, target_len=16, norm="pre", prefix_vocab_size=7, prefix_len=4, **SHAPE)
    pipe = DigitPipeline(
        tokenizer=DiscriminativeTokenizer(encoder, Codebook(torch.randn(7, 8))),
        vq=VQTokenizer(VQGAN(net)),
        prior=SequenceModel(first),
        renderer=SequenceModel(second),
        preprocess=PreprocessConfig(image_size=16, encoder_size=8),
        classes=("a", "b"),
    )
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        root = Path(folder)
        return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def randomise(state: dict[str, Tensor]) -> None:
    """Fills all floating-point tensors with random numbers."""
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.normal_(std=0.1)
