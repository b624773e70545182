"""Converts released fairseq checkpoints of prior, renderers and the VQ-only baseline to SequenceModel.

Symbols of the released dictionaries: bos 0, pad 1, eos 2, unk 3, <n> 4, code k at 5 + k. SequenceModel has none of
them: eos as an input is its start symbol, unk as an input is its mask token, and output rows 0 to 4 are dropped because
decoding forbids them, so that its logits are the released logits of the codes. Rows of the input table:

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

from digit.convert.reading import check_state, check_tensors, listed, read_weights, split_place, unfit
from digit.convert.weight_sets import choose_set
from digit.errors import DigitError
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.runtime.files import Stacked, save_tensors, write_json

EOS, UNK, NUM_SPECIAL = 2, 3, 5
FIRST_POSITION = 2  # padding_idx + 1: rows 0 and 1 of a position table are unused
MASKED_WORDS = ("nar", "mask", "masked", "maskgit")
CARRIED = ("vqgan.", "pretrained_encoder.")  # prefixes of other parts in the same file
CENTROIDS = ("centroids", "centroid_norm")
BLOCK = {  # released name within a layer -> ours
    "self_attn.out_proj": "attention.out",
    "self_attn_layer_norm": "norm1",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "final_layer_norm": "norm2",
}


Pieces = dict[str, Stacked]  # our names -> rows of released tensors, mapped from the file


@dataclass(frozen=True, kw_only=True)
class FairseqParts:
    """The parts of a released checkpoint, mapped from the file and only read when used."""

    source: str
    """Path, for errors."""
    cfg: SequenceConfig
    """Configuration of the prior, renderer or baseline."""
    pieces: Pieces
    """Tensors of the model."""
    vqgan: dict[str, Tensor]
    """State dict of the VQGAN in the file (names without `vqgan.`); empty if there is none."""
    encoder: dict[str, Tensor]
    """State dict of the frozen encoder in the file (names without `pretrained_encoder.`); empty if there is none."""
    centroids: Tensor | None
    """(K, D) codebook in the file, or None."""
    kind_is_said: bool
    """Whether the file says that it is autoregressive or masked; if not, autoregressive was assumed."""

    @property
    def model(self) -> SequenceModel:
        """The sequence model in eval mode, float32."""
        with torch.device("meta"):
            model = SequenceModel(self.cfg)
        model.load_state_dict({name: piece.tensor() for name, piece in self.pieces.items()}, assign=True)
        return model.eval()

    def save_model(self, folder: Path, name: str) -> None:
        """Writes NAME.safetensors and NAME.json for `load_sequence_model`, with one tensor in memory at a time."""
        save_tensors(folder / f"{name}.safetensors", self.pieces)
        write_json(folder / f"{name}.json", self.cfg.to_dict())


@dataclass(frozen=True, kw_only=True)
class LoadedFairseq:
    """A released stage-1, stage-2 or VQ-only checkpoint, with its tensors mapped from the file."""

    source: str
    """Path, for errors."""
    decoder: dict[str, Tensor]
    """Tensors of the model, names without `decoder.`."""
    vqgan: dict[str, Tensor]
    """State dict of the VQGAN in the file (names without `vqgan.`); empty if there is none."""
    encoder: dict[str, Tensor]
    """State dict of the frozen encoder in the file (names without `pretrained_encoder.`); empty if there is none."""
    centroids: Tensor | None
    """(K, D) float32 codebook in the file, or None."""
    heads: Any
    """decoder_attention_heads of its settings, or None."""
    kind: tuple[bool, bool]
    """(whether the file names its kind, whether that is masked)."""

    def interpret(
        self,
        *,
        masked: bool | None = None,
        target_len: int = 256,
        prefix_len: int = 256,
        num_heads: int | None = None,
    ) -> FairseqParts:
        """Converts the model in the file.

        Args:
            masked: whether it is a masked renderer, whose tensors look like an autoregressive one's. None decides by
                the names of model, task and criterion in the file, and assumes autoregressive if they do not tell.
            target_len: target tokens per image; later rows of the position table are untrained and dropped.
            prefix_len: prefix tokens per image, for renderers.
            num_heads: attention heads, if the file's settings do not tell.

        Raises DigitError that lists tensors that are missing, unexpected or of another shape.
        """
        heads = self.heads if num_heads is None else num_heads
        if not isinstance(heads, int) or heads < 1:
            advice = "save it again with args or cfg['model'] as a plain dict that names decoder_attention_heads"
            raise DigitError(f"{self.source} does not say how many attention heads the model has: {advice}")
        kind_is_said, is_masked = (True, masked) if masked is not None else self.kind
        with unfit(self.source):
            cfg, pieces = convert_decoder(self.decoder, heads, is_masked, target_len, prefix_len, self.source)
        return FairseqParts(
            source=self.source,
            cfg=cfg,
            pieces=pieces,
            vqgan=self.vqgan,
            encoder=self.encoder,
            centroids=self.centroids,
            kind_is_said=kind_is_said or not cfg.prefix_len,
        )


def load_fairseq(path: str | Path) -> LoadedFairseq:
    """Opens a released checkpoint; it only unpickles tensors, containers, numbers and argparse namespaces.

    Raises DigitError if the file is another kind of checkpoint, or holds unknown tensors or NaN.
    """
    loaded = read_weights(path)
    if not isinstance(loaded, Mapping) or not isinstance(loaded.get("model"), Mapping):
        raise DigitError(
            f"{path} is not a fairseq checkpoint (it has no 'model'): give the released stage1 or stage2 .pt"
        )
    state = choose_set(loaded, "decoder.embed_tokens.weight", str(path), preferred="model")
    others = [n for n in state if not n.startswith(("decoder.", *CARRIED)) and n not in CENTROIDS]
    if others:
        raise DigitError(f"{path} holds tensors of unknown parts: {listed(sorted(others))}")
    check_tensors(state, str(path))
    with unfit(str(path)):
        centroids = state.get("centroids")
        if centroids is not None:
            dim, codes = centroids.shape
            norm = state.get("centroid_norm")
            if norm is not None and tuple(norm.shape) != (1, codes):
                raise DigitError(f"{path}: centroid_norm is {tuple(norm.shape)} beside centroids ({dim}, {codes})")
        return LoadedFairseq(
            source=str(split_place(path)[0]),
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
    """The tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def model_settings(loaded: Mapping[str, Any]) -> dict[str, Any]:
    """The model's settings from `cfg` (fairseq 0.10 and later) or `args` (earlier)."""
    cfg = loaded.get("cfg")
    settings = cfg.get("model") if isinstance(cfg, Mapping) else loaded.get("args")
    return dict(settings) if isinstance(settings, Mapping) else dict(getattr(settings, "__dict__", {}))


def kind_in(loaded: Mapping[str, Any]) -> tuple[bool, bool]:
    """(whether the file names its kind, whether that is masked), by the names of model, task and criterion."""
    found = loaded.get("cfg")
    cfg: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    parts = [model_settings(loaded), *(cfg.get(part) for part in ("task", "criterion"))]
    names = [str(part.get(key)).lower() for part in parts if isinstance(part, Mapping) for key in ("_name", "arch")]
    masked = any(word in MASKED_WORDS for name in names for word in re.split(r"[^a-z]+", name))
    return masked or any(re.search(r"(^|_)ar(_|$)", name) for name in names), masked


def read_sizes(
    decoder: Mapping[str, Tensor], heads: int, masked: bool, target_len: int, prefix_len: int
) -> SequenceConfig:
    """Infers the configuration from the tensors' shapes."""
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
    """Converts the released decoder to (configuration, tensors). Every released tensor is used, or dropped by name."""
    remaining = dict(decoder)
    remaining.pop("version", None)  # a constant
    try:
        cfg = read_sizes(remaining, heads, masked, target_len, prefix_len)
        rows = {"head.weight": [remaining.pop("output_projection.weight")[NUM_SPECIAL:]]}
        rows |= convert_tables(remaining, cfg)
        rows |= convert_norm(remaining, cfg)
        for layer in range(cfg.depth):
            rows |= convert_layer(remaining, layer)
    except KeyError as error:
        raise DigitError(
            f"{source} is not a released DiGIT decoder: tensor decoder.{error.args[0]} is missing"
        ) from error
    if remaining:
        raise DigitError(f"{source} holds unexpected tensors: {listed(sorted(f'decoder.{n}' for n in remaining))}")
    pieces = {name: Stacked(tuple(parts)) for name, parts in rows.items()}
    with torch.device("meta"):
        check_state(pieces, SequenceModel(cfg), source)
    return cfg, pieces


def convert_tables(remaining: dict[str, Tensor], cfg: SequenceConfig) -> dict[str, list[Tensor]]:
    """Token, start, class, prefix and position tables; removes them from `remaining`."""
    table, end = remaining.pop("embed_tokens.weight"), NUM_SPECIAL + cfg.vocab_size
    positions = remaining.pop("embed_positions.weight")
    rows = {
        "token_embed.weight": [table[NUM_SPECIAL:end]] + ([table[UNK : UNK + 1]] if cfg.masked else []),
        "start_embed.weight": [table[EOS : EOS + 1]] + ([table[end:]] if cfg.num_classes else []),
        "positions": [positions[FIRST_POSITION : FIRST_POSITION + 1 + cfg.target_len]],
    }
    if cfg.prefix_len:
        rows["prefix_embed.weight"] = [table[end + NUM_SPECIAL :]]
        before = remaining.pop("embed_positions_1.weight")
        rows["prefix_positions"] = [before[FIRST_POSITION : FIRST_POSITION + cfg.prefix_len]]
    return rows


def convert_norm(remaining: dict[str, Tensor], cfg: SequenceConfig) -> dict[str, list[Tensor]]:
    """The final norm of pre-norm models; removes them from `remaining`."""
    if cfg.norm == "post":
        return {}
    return {f"transformer.final_norm.{kind}": [remaining.pop(f"layer_norm.{kind}")] for kind in ("weight", "bias")}


def convert_layer(remaining: dict[str, Tensor], layer: int) -> dict[str, list[Tensor]]:
    """One block, q, k and v stacked; removes them from `remaining`."""
    rows, theirs, ours = {}, f"layers.{layer}", f"transformer.blocks.{layer}"
    for kind in ("weight", "bias"):
        parts = [remaining.pop(f"{theirs}.self_attn.{part}_proj.{kind}") for part in "qkv"]
        if len({tuple(part.shape) for part in parts}) > 1:
            raise ValueError(f"q, k and v of layer {layer} differ in shape: {[tuple(part.shape) for part in parts]}")
        rows[f"{ours}.attention.qkv.{kind}"] = parts
        for name, own in BLOCK.items():
            rows[f"{ours}.{own}.{kind}"] = [remaining.pop(f"{theirs}.{name}.{kind}")]
    return rows
