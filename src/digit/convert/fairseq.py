"""Released fairseq checkpoints of prior, renderers and the VQ-only baseline -> SequenceModel.

Symbols of the released dictionaries: bos 0, pad 1, eos 2, unk 3, <n> 4, code k at 5 + k. Our models have none of them:
eos as an input is the start symbol, unk as an input hides a token in a masked model, and output rows 0 to 4 are dropped
(decoding forbids them), so that our logits are the released ones at the code rows. Rows of the input table:

    prior      [5 special | K codes | classes]
    renderer   [5 special | V VQ codes | 5 special | K discriminative codes]
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digit.convert.reading import check_state, check_tensors, listed, read_torch, require_state, unfit
from digit.errors import DigitError
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.runtime.files import Stacked, save_tensors, write_json

EOS, UNK, NUM_SPECIAL = 2, 3, 5
FIRST_POSITION = 2  # padding_idx + 1: rows 0 and 1 of a position table are never read
MASKED_WORDS = ("nar", "mask", "masked", "maskgit")
CARRIED = ("vqgan.", "pretrained_encoder.")  # other parts in the same file
CENTROIDS = ("centroids", "centroid_norm")
BLOCK = {  # released name within a layer -> ours
    "self_attn.out_proj": "attention.out",
    "self_attn_layer_norm": "norm1",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "final_layer_norm": "norm2",
}


Pieces = dict[str, Stacked]  # our names -> rows of released tensors, still in the file


@dataclass(frozen=True, kw_only=True)
class FairseqParts:
    """What a released checkpoint holds. Nothing of it is in memory before it is asked for."""

    source: str
    """Path, for errors."""
    cfg: SequenceConfig
    """Of the prior, renderer or baseline."""
    pieces: Pieces
    """Its tensors."""
    vqgan: dict[str, Tensor]
    """State dict of the VQGAN it carries (names without `vqgan.`); empty where it carries none."""
    encoder: dict[str, Tensor]
    """State dict of the frozen encoder it carries (names without `pretrained_encoder.`); empty where there is none."""
    centroids: Tensor | None
    """(K, D) codebook it carries."""
    kind_is_said: bool
    """Whether the file says which of autoregressive and masked it is; where it does not, autoregressive was taken."""

    @property
    def model(self) -> SequenceModel:
        """The sequence model in eval mode, float32."""
        with torch.device("meta"):
            model = SequenceModel(self.cfg)
        model.load_state_dict({name: piece.tensor() for name, piece in self.pieces.items()}, assign=True)
        return model.eval()

    def save_model(self, folder: Path, name: str) -> None:
        """Write NAME.safetensors and NAME.json, as `load_sequence_model` reads them, one tensor in memory at a time."""
        save_tensors(folder / f"{name}.safetensors", self.pieces)
        write_json(folder / f"{name}.json", self.cfg.to_dict())


@dataclass(frozen=True, kw_only=True)
class LoadedFairseq:
    """A released stage-1, stage-2 or VQ-only checkpoint, its tensors still in the file."""

    source: str
    """Path, for errors."""
    decoder: dict[str, Tensor]
    """Names without `decoder.`."""
    vqgan: dict[str, Tensor]
    """State dict of the VQGAN it carries (names without `vqgan.`); empty where it carries none."""
    encoder: dict[str, Tensor]
    """State dict of the frozen encoder it carries (names without `pretrained_encoder.`); empty where there is none."""
    centroids: Tensor | None
    """(K, D) codebook it carries, float32."""
    heads: Any
    """decoder_attention_heads of its settings, or None."""
    kind: tuple[bool, bool]
    """(whether the file names its kind, whether it is masked)."""

    def interpret(
        self,
        *,
        masked: bool | None = None,
        target_len: int = 256,
        prefix_len: int = 256,
        num_heads: int | None = None,
    ) -> FairseqParts:
        """The model in it.

        Args:
            masked: whether it is the masked renderer, whose tensors look like the autoregressive one's. None goes by
                the names of model, task and criterion in the file, and takes autoregressive where they do not say.
            target_len: target tokens an image; rows of the position table past them were never trained and are dropped.
            prefix_len: prefix tokens an image, for renderers.
            num_heads: attention heads, where the file's settings do not say.

        Raises DigitError that lists tensors that are missing, unexpected or of another shape.
        """
        heads = self.heads if num_heads is None else num_heads
        if not isinstance(heads, int) or heads < 1:
            raise DigitError(f"{self.source} does not say how many attention heads it has (found {heads!r})")
        said, guess = (True, masked) if masked is not None else self.kind
        with unfit(self.source):
            cfg, pieces = convert_decoder(self.decoder, heads, guess, target_len, prefix_len, self.source)
        return FairseqParts(
            source=self.source,
            cfg=cfg,
            pieces=pieces,
            vqgan=self.vqgan,
            encoder=self.encoder,
            centroids=self.centroids,
            kind_is_said=said or not cfg.prefix_len,
        )


def load_fairseq(path: str | Path) -> LoadedFairseq:
    """Open a released checkpoint; only tensors, containers, numbers and argparse namespaces are unpickled.

    Raises DigitError where it is no such checkpoint, or holds tensors of no known part or with NaN.
    """
    loaded = read_torch(path)
    if not isinstance(loaded, Mapping) or not isinstance(loaded.get("model"), Mapping):
        raise DigitError(f"{path} is no fairseq checkpoint (no 'model' in it): give the released stage1 or stage2 .pt")
    state = require_state(loaded["model"], str(path))
    others = [n for n in state if not n.startswith(("decoder.", *CARRIED)) and n not in CENTROIDS]
    if others:
        raise DigitError(f"{path} holds tensors of no known part: {listed(sorted(others))}")
    check_tensors(state, str(path))
    with unfit(str(path)):
        centroids = state.get("centroids")
        if centroids is not None:
            dim, codes = centroids.shape
            norm = state.get("centroid_norm")
            if norm is not None and tuple(norm.shape) != (1, codes):
                raise DigitError(f"{path}: centroid_norm is {tuple(norm.shape)} beside centroids ({dim}, {codes})")
        return LoadedFairseq(
            source=str(path),
            decoder=carried(state, "decoder."),
            vqgan=carried(state, "vqgan."),
            encoder=carried(state, "pretrained_encoder."),
            centroids=None if centroids is None else centroids.float().T.contiguous(),
            heads=model_settings(loaded).get("decoder_attention_heads"),
            kind=kind_in(loaded),
        )


def read_fairseq(path: str | Path, **options: Any) -> FairseqParts:
    """`load_fairseq(path).interpret(**options)`."""
    return load_fairseq(path).interpret(**options)


def carried(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def model_settings(loaded: Mapping[str, Any]) -> dict[str, Any]:
    """The model's settings, out of `cfg` (fairseq from 0.10) or `args` (before)."""
    cfg = loaded.get("cfg")
    found = cfg.get("model") if isinstance(cfg, Mapping) else loaded.get("args")
    return dict(found) if isinstance(found, Mapping) else dict(getattr(found, "__dict__", {}))


def kind_in(loaded: Mapping[str, Any]) -> tuple[bool, bool]:
    """(whether the file names its kind, whether it is masked), by the names of model, task and criterion."""
    cfg = loaded.get("cfg") if isinstance(loaded.get("cfg"), Mapping) else {}
    parts = [model_settings(loaded), *(cfg.get(part) for part in ("task", "criterion"))]
    names = [str(part.get(key)).lower() for part in parts if isinstance(part, Mapping) for key in ("_name", "arch")]
    masked = any(word in MASKED_WORDS for name in names for word in re.split(r"[^a-z]+", name))
    return masked or any(re.search(r"(^|_)ar(_|$)", name) for name in names), masked


def read_sizes(
    decoder: Mapping[str, Tensor], heads: int, masked: bool, target_len: int, prefix_len: int
) -> SequenceConfig:
    """The configuration that the tensors' shapes imply."""
    rows, width = decoder["embed_tokens.weight"].shape
    symbols = decoder["output_projection.weight"].shape[0]
    depth = len({name.split(".")[1] for name in decoder if name.startswith("layers.")})
    renderer = "embed_positions_1.weight" in decoder
    if (least := symbols + NUM_SPECIAL * renderer) > rows:
        raise ValueError(f"a table of {rows} rows for {least} symbols")
    return SequenceConfig(
        depth=depth,
        embed_dim=width,
        num_heads=heads,
        mlp_ratio=decoder["layers.0.fc1.weight"].shape[0] / width,
        norm="pre" if "layer_norm.weight" in decoder else "post",
        vocab_size=symbols - NUM_SPECIAL,
        target_len=target_len,
        prefix_vocab_size=rows - symbols - NUM_SPECIAL if renderer else 0,
        prefix_len=prefix_len if renderer else 0,
        num_classes=0 if renderer else rows - symbols,
        masked=masked,
    )


def convert_decoder(
    decoder: dict[str, Tensor], heads: int, masked: bool, target_len: int, prefix_len: int, source: str
) -> tuple[SequenceConfig, Pieces]:
    """Configuration and tensors from the released decoder's; every one of them is used, or dropped by name."""
    left = dict(decoder)
    left.pop("version", None)  # a constant
    try:
        cfg = read_sizes(left, heads, masked, target_len, prefix_len)
        rows = {"head.weight": [left.pop("output_projection.weight")[NUM_SPECIAL:]]}
        rows |= convert_tables(left, cfg)
        rows |= convert_norm(left, cfg)
        for layer in range(cfg.depth):
            rows |= convert_layer(left, layer)
    except KeyError as error:
        raise DigitError(f"{source} is no released DiGIT decoder: tensor decoder.{error.args[0]} is missing") from error
    if left:
        raise DigitError(f"{source} holds unexpected tensors: {listed(sorted(f'decoder.{n}' for n in left))}")
    pieces = {name: Stacked(tuple(parts)) for name, parts in rows.items()}
    with torch.device("meta"):
        check_state(pieces, SequenceModel(cfg), source)
    return cfg, pieces


def convert_tables(left: dict[str, Tensor], cfg: SequenceConfig) -> dict[str, list[Tensor]]:
    """Token, start, class, prefix and position tables; takes its tensors out of `left`."""
    table, end = left.pop("embed_tokens.weight"), NUM_SPECIAL + cfg.vocab_size
    positions = left.pop("embed_positions.weight")
    rows = {
        "token_embed.weight": [table[NUM_SPECIAL:end]] + ([table[UNK : UNK + 1]] if cfg.masked else []),
        "start_embed.weight": [table[EOS : EOS + 1]] + ([table[end:]] if cfg.num_classes else []),
        "positions": [positions[FIRST_POSITION : FIRST_POSITION + 1 + cfg.target_len]],
    }
    if cfg.prefix_len:
        rows["prefix_embed.weight"] = [table[end + NUM_SPECIAL :]]
        before = left.pop("embed_positions_1.weight")
        rows["prefix_positions"] = [before[FIRST_POSITION : FIRST_POSITION + cfg.prefix_len]]
    return rows


def convert_norm(left: dict[str, Tensor], cfg: SequenceConfig) -> dict[str, list[Tensor]]:
    """The final norm of pre-norm models; takes its tensors out of `left`."""
    if cfg.norm == "post":
        return {}
    return {f"transformer.final_norm.{kind}": [left.pop(f"layer_norm.{kind}")] for kind in ("weight", "bias")}


def convert_layer(left: dict[str, Tensor], layer: int) -> dict[str, list[Tensor]]:
    """One block, q, k and v stacked; takes its tensors out of `left`."""
    rows, theirs, ours = {}, f"layers.{layer}", f"transformer.blocks.{layer}"
    for kind in ("weight", "bias"):
        parts = [left.pop(f"{theirs}.self_attn.{part}_proj.{kind}") for part in "qkv"]
        if len({tuple(part.shape) for part in parts}) > 1:
            raise ValueError(f"q, k and v of layer {layer} differ in shape: {[tuple(part.shape) for part in parts]}")
        rows[f"{ours}.attention.qkv.{kind}"] = parts
        for name, own in BLOCK.items():
            rows[f"{ours}.{own}.{kind}"] = [left.pop(f"{theirs}.{name}.{kind}")]
    return rows
