"""What a recipe is: all that decides a run but the data and the output folder. `recipes.py` has the named ones."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

from digit.data.preprocess import PathName, PreprocessConfig
from digit.errors import DigitError
from digit.models.pixels import PixelConfig
from digit.models.sequence import SequenceConfig
from digit.models.transformer import MAX_DEPTH
from digit.models.vqgan import VQGANConfig
from digit.runs.roles import RENDERERS, RendererKind, Role, get_role
from digit.runtime.settings import SEED, check_settings, within
from digit.sampling.config import MASKED_TOP_P, SamplingConfig, StageSampling
from digit.sampling.kinds import get_kind
from digit.tokenizers.base import QuantizerConfig
from digit.tokenizers.encoders import EncoderConfig
from digit.tokenizers.kmeans.config import KMeansConfig, ProductKMeansConfig, ResidualKMeansConfig
from digit.training.adversarial import AdversarialConfig
from digit.training.config import TrainConfig
from digit.training.vqgan import GANConfig

EPOCHS_200 = 125_000  # updates of 2048 images: 200 epochs of ImageNet-1k (paper, A.3)
# Peak learning rate 3e-4 (paper, A.3) in both stages; the released code trains stage 2 at 5e-4 instead.
RELEASED_TRAINING = TrainConfig(num_steps=EPOCHS_200, batch_size=2048, precision="bf16")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Size of a transformer; vocabularies and lengths follow from the tokenizers."""

    depth: int = within(f"[1, {MAX_DEPTH}]", 16)
    """Number of transformer blocks."""
    embed_dim: int = within("[1, inf)", 1024)
    """Width; the feed-forward part is four times as wide."""
    num_heads: int = within("[1, inf)", 16)
    """Attention heads."""
    dropout: float = within("[0, 1)", 0.1)
    """On embeddings and residual branches (RELEASED_CODE: 0.1)."""
    norm: Literal["paper", "post", "pre"] = "paper"
    """Where the LayerNorms stand: paper (A.3: in the prior post-norm, in all others pre-norm), post or pre."""
    qk_norm: bool = False
    """Normalise queries and keys of each head. The paper does not."""
    rotary: Literal["none", "1d", "2d"] = "none"
    """Rotary positions in attention: 1d, by the place in the sequence; 2d, by row and column in the picture, where the
    discriminative tokens before a renderer's own have the places that they cover. The paper has none."""
    learned_positions: bool = True
    """Learned position tables, as in the paper; false leaves rotary positions alone."""
    tied_embeddings: bool = False
    """Take the embeddings of the codes as output projection too. The paper has tables of their own."""
    random_order: float = within("[0, 1]", 0.0)
    """Fraction of training images whose tokens a next-token model predicts in a random order. It falls to 0 during the
    training, so that the model ends in raster order and samples as any other. The paper uses none."""
    random_order_anneal: tuple[float, float] = within("[0, 1]", (0.5, 0.75))
    """Fractions of the training between which random_order falls to 0, in a straight line."""
    label_dropout: float = within("[0, 1]", 0.0)
    """Fraction of training images whose label is hidden: above 0 allows guidance by label. The paper uses none."""
    labels: bool = False
    """In a class-conditional run, show the renderer the label too, for what the discriminative tokens do not tell of a
    class. The paper shows it the tokens alone."""
    prefix_dropout: float = within("[0, 1]", 0.0)
    """Fraction of training images whose prefix is hidden: above 0 allows guidance by prefix. A renderer that sees
    labels then loses the label too. The paper uses none."""
    prefix_noise: float = within("[0, 1]", 0.0)
    """Fraction of a renderer's discriminative tokens that training swaps for one of the 8 nearest codes; it falls to 0
    over the training. Above 0 makes it robust to the prior's mistakes. The paper uses none."""
    conditioning: Literal["prefix", "aligned"] = "prefix"
    """How a renderer sees the discriminative tokens: prefix, before its own, as in the paper; aligned, through a small
    encoder whose output is added at each token's place, about half of the paper's compute."""
    encoder_depth: int = within(f"[1, {MAX_DEPTH}]", 1)
    """Blocks of the encoder of aligned tokens."""
    added_blocks: int = within(f"[1, {MAX_DEPTH}]", 2)
    """Blocks that aligned tokens are added to, evenly spaced from the first; all where the model has fewer."""

    def __post_init__(self) -> None:
        check_settings(self)
        if len(self.random_order_anneal) != 2 or self.random_order_anneal[0] > self.random_order_anneal[1]:
            raise DigitError(
                f"random_order_anneal is {self.random_order_anneal}: give two fractions of the training, the smaller "
                "one first"
            )


@dataclass(frozen=True, kw_only=True)
class PixelSpec:
    """Size of a renderer straight to pixels. Its decoder has the shape of the recipe's VQGAN."""

    depth: int = within(f"[1, {MAX_DEPTH}]", 2)
    """Blocks of the bidirectional Transformer over the discriminative tokens, so that they agree with each other."""
    embed_dim: int = within("[1, inf)", 192)
    """Width of the Transformer."""
    num_heads: int = within("[1, inf)", 3)
    """Attention heads."""
    start: Literal["vqgan", "scratch"] = "vqgan"
    """Start the decoder from the weights of the run's VQGAN, or from scratch; then the run has no VQGAN."""
    noise_channels: int = within("[0, inf)", 0)
    """Numbers of Gaussian noise at each token; above 0 the same tokens give another picture with another seed."""
    labels: bool = False
    """In a class-conditional run, show the renderer the label too, for what the tokens do not tell of a class."""
    prefix_noise: float = within("[0, 1]", 0.0)
    """Fraction of the discriminative tokens that training swaps for one of the 8 nearest codes; it falls to 0 over the
    training."""

    def __post_init__(self) -> None:
        check_settings(self)


class TokenSpace(NamedTuple):
    """Of one kind of tokens: number of codes, of tokens an image, of rows of their grid, of tokens of each cell."""

    vocab_size: int
    length: int
    rows: int = 1
    levels: int = 1


NO_TOKENS = TokenSpace(0, 0)
PUBLISHED = ("llamagen_vq16",)  # values of vqgan_start that are no VQGAN of ours
# models whose number of updates may have a field of its own
OWN_STEPS = {"renderer_masked": "masked_steps", "vq_ar_epochs": "vq_only_steps"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a run but the data and the output folder."""

    name: str = "custom"
    """Name of the recipe, for reports."""
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    """The one preprocessing of codebook, tokens, training and evaluation."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Frozen encoder of the discriminative tokens."""
    quantizer: Literal["kmeans", "residual_kmeans", "product_kmeans"] = "kmeans"
    """What turns features into discriminative tokens: kmeans, as the paper does, or one of several codes for each
    feature, which the prior predicts one after another; its settings stand under its name."""
    kmeans: KMeansConfig = field(default_factory=KMeansConfig)
    """K-means codebook of the discriminative tokens."""
    residual_kmeans: ResidualKMeansConfig = field(default_factory=ResidualKMeansConfig)
    """Codebook of several levels, each of which clusters what those before it leave."""
    product_kmeans: ProductKMeansConfig = field(default_factory=ProductKMeansConfig)
    """Codebook of several parts of the features, each clustered alone."""
    codebook_subset: float = within("(0, 1]", 0.1)
    """Fraction of the images the codebook is fitted on (paper, 4.1: 10%)."""
    codebook_path: PathName = "released"
    """Preprocessing path of the codebook's images: released, as everything else, or released_kmeans, as the released
    code prepared its K-means features."""
    codebook_probe: int = within("[0, inf)", 0)
    """Images with labels on which a linear probe of the codebook's vectors is fitted (half of them) and tested, for
    codebook.json; 0 makes none."""
    vqgan: VQGANConfig = field(default_factory=VQGANConfig)
    """Shape of the VQGAN, if it is trained from scratch or published."""
    vqgan_start: Literal["scratch", "vqgan64", "vqgan64_shapes", "llamagen_vq16"] = "scratch"
    """Start from scratch; from a VQGAN that the package carries, 64 px or more (docs/results.md says what each saw); or
    take LlamaGen's published tokenizer (docs/vq_tokenizers.md), which `digit fit` fetches and no run trains."""
    vqgan_training: GANConfig = field(default_factory=GANConfig)
    """Training of the VQGAN; num_steps 0 takes the start as it is."""
    crops_per_image: int = within("[1, inf)", 1)
    """Crops (with flips) of each image in the token store. An epoch of training passes over the images and takes one
    crop of each, in turn."""
    training_crops: Literal["stored", "fresh"] = "stored"
    """Crops that prior and renderer train on: stored, those of the token store; or fresh, new ones of every image in
    every epoch, encoded in the training loop as the released code does; then crops_per_image must be 1. `digit plan`
    tells what either costs."""
    class_conditional: bool = True
    """Condition on labels where the data has them."""
    prior: ModelSpec = field(default_factory=ModelSpec)
    """Stage 1: discriminative tokens from a label."""
    prior_training: TrainConfig = RELEASED_TRAINING
    """Training of stage 1."""
    renderer: ModelSpec = field(default_factory=ModelSpec)
    """Stage 2: VQ tokens from discriminative tokens; also the size of the VQ-only baselines."""
    renderer_kind: RendererKind = "ar"
    """Next-token renderer (ar), MaskGIT (masked), or a decoder straight to pixels, without VQ tokens (pixels)."""
    renderer_training: TrainConfig = RELEASED_TRAINING
    """Training of stage 2."""
    pixels: PixelSpec = field(default_factory=PixelSpec)
    """A renderer straight to pixels, in place of `renderer`."""
    pixels_training: AdversarialConfig = field(default_factory=AdversarialConfig)
    """Training of a renderer straight to pixels, in place of `renderer_training`; its losses are the VQGAN's."""
    masked_steps: int | None = within("[1, inf)", None)
    """Updates of a masked renderer (paper, Table 3: 200 epochs); None takes those of renderer_training."""
    vq_only_steps: int | None = within("[1, inf)", None)
    """Updates of the baseline vq_ar_epochs (paper, Table 3: 200 epochs); None takes those of renderer_training. The
    baselines vq_ar and vq_masked take the FLOPs of prior and renderer together instead."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How the finished pipeline samples."""
    masked_top_p: float = within("(0, 1]", MASKED_TOP_P)
    """Top-p of a masked renderer, in place of sampling.renderer.top_p (the released decoding filters nothing)."""
    class_top_k: int = within("[0, inf)", 0)
    """Top-k of a class-conditional prior, in place of sampling.prior.top_k (released script: 300); 0 takes that."""
    validation_fraction: float = within("[0, 0.5]", 0.0)
    """Images kept out of training the models, for val_nll in log.jsonl: it rises where a model learns by heart."""
    informed_start: bool = False
    """Start token tables from the code vectors and position tables from places in the picture instead of at random (not
    as released; for short training)."""
    previews: float = within("[0, 1]", 0.0)
    """Pictures of fixed seeds in OUT/previews whenever a model in training is saved: the largest share of the time that
    they may take; 0 makes none. They change no other result."""
    max_bad_fraction: float = within("[0, 1]", 0.05)
    """Broken images are skipped and named; past this fraction the run fails."""
    seed: int = within(SEED, 0)
    """Seed of every random choice of the run; it overrules the seeds of the parts."""

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def quantizer_cfg(self) -> QuantizerConfig:
        """Settings of the quantizer that `quantizer` names."""
        return getattr(self, self.quantizer)

    @property
    def model_names(self) -> tuple[str, str]:
        """The two models that the finished pipeline holds, prior and renderer (names of ROLES)."""
        return "prior", RENDERERS[self.renderer_kind]

    @property
    def has_vq_tokens(self) -> bool:
        """Whether a model of the finished pipeline predicts VQ tokens; without one, none are made."""
        return any(get_role(name).target == "vq" for name in self.model_names)

    @property
    def has_vqgan(self) -> bool:
        """Whether the run has a VQGAN: for its tokens, or as the start of a renderer straight to pixels."""
        return self.has_vq_tokens or self.pixels.start == "vqgan"

    @property
    def published_vqgan(self) -> str | None:
        """The name of the published VQ tokenizer that the run takes; None where it has one of its own."""
        return self.vqgan_start if self.vqgan_start in PUBLISHED else None

    def size(self, role: Role) -> ModelSpec | PixelSpec:
        """Size of a model."""
        return getattr(self, role.settings)

    def training(self, role: Role) -> TrainConfig | AdversarialConfig:
        """Training settings of a model. One that replaces others trains longer: see `runs.fit.Run.training_config`."""
        cfg: TrainConfig | AdversarialConfig = getattr(self, f"{role.settings}_training")
        steps = {model: getattr(self, field) for model, field in OWN_STEPS.items()}.get(role.name)
        return cfg if steps is None else replace(cfg, num_steps=steps)

    def sees_labels(self, role: Role) -> bool:
        """Whether a class-conditional run gives a model the label."""
        return role.labels or self.size(role).labels

    def sampling_of(self, renderer: str, *, labelled: bool) -> SamplingConfig:
        """How a pipeline with this renderer (a name of ROLES) samples; `labelled`: its prior is given classes.

        A model without what would guide it, labels or a prefix, is sampled with a cfg_scale of 1.
        """
        sampling, role = self.sampling, get_role(renderer)
        if role.kind == "masked":
            sampling = replace(sampling, renderer=replace(sampling.renderer, top_p=self.masked_top_p))
        if role.kind == "pixels":
            sampling = replace(sampling, renderer=StageSampling())  # it takes no settings
        if labelled and self.class_top_k:
            sampling = replace(sampling, prior=replace(sampling.prior, top_k=self.class_top_k))
        by_label = labelled and self.prior.label_dropout > 0
        if not by_label:
            sampling = replace(sampling, prior=replace(sampling.prior, cfg_scale=1.0))
        if not ((role.prefix and self.renderer.prefix_dropout > 0) or (by_label and self.sees_labels(role))):
            sampling = replace(sampling, renderer=replace(sampling.renderer, cfg_scale=1.0))
        return sampling

    def sequence_config(
        self, name: str, tokens: Mapping[str, TokenSpace], *, num_classes: int, vqgan: VQGANConfig | None = None
    ) -> SequenceConfig:
        """The full configuration of one of ROLES over the tokens at hand, {"discriminative": ..., "vq": ...}.

        `vqgan` has the sizes of a decoder straight to pixels; None takes those of a VQGAN from scratch.
        """
        role = get_role(name)
        size, seen = self.size(role), {}
        if num_classes and self.sees_labels(role):
            seen = {"num_classes": num_classes, "label_dropout": self.prior.label_dropout}
        prefix = NO_TOKENS if role.prefix is None else tokens[role.prefix]
        if isinstance(size, PixelSpec):
            shape = pixel_config(size, vqgan or self.vqgan, prefix, self.preprocess.crop_size)
            return replace(shape, **seen)
        aligned = role.prefix is not None and size.conditioning == "aligned"
        settings: dict[str, Any] = dict(
            prefix_vocab_size=prefix.vocab_size,
            prefix_len=prefix.length,
            prefix_levels=prefix.levels,
            **seen,
            norm=role.norm if size.norm == "paper" else size.norm,
            qk_norm=size.qk_norm,
            rotary=size.rotary,
            learned_positions=size.learned_positions,
            tied_embeddings=size.tied_embeddings,
            random_order=role.kind == "next_token" and size.random_order > 0,
            masked=role.kind == "masked",
            prefix_dropout=size.prefix_dropout if role.prefix else 0.0,
            depth=size.depth,
            embed_dim=size.embed_dim,
            num_heads=size.num_heads,
            dropout=size.dropout,
        )
        if aligned:
            settings |= {
                "conditioning": "aligned",
                "encoder_depth": size.encoder_depth,
                "added_blocks": min(size.added_blocks, size.depth),
            }
        on_grids = aligned or size.rotary == "2d"
        if on_grids and role.prefix is not None:
            settings["prefix_rows"] = prefix.rows
        if role.target == "pixels":
            settings["image_size"] = self.preprocess.crop_size
        else:
            target = tokens[role.target]
            settings |= {"vocab_size": target.vocab_size, "target_len": target.length, "levels": target.levels}
            settings["target_rows"] = target.rows if on_grids else 0
        config = get_kind(role.kind).config
        known = {setting.name for setting in fields(config)}
        return config(**{name: value for name, value in settings.items() if name in known})

    def without_equal_crops(self) -> "Recipe":
        """The recipe with no more crops of an image than differ, where whole pictures are made square (fit)."""
        most = self.preprocess.distinct_crops
        if self.preprocess.fit == "crop" or most is None or self.crops_per_image <= most:
            return self
        return replace(self, crops_per_image=most)

    def with_seed(self) -> "Recipe":
        """The recipe with its one seed in every part."""
        parts = (self.quantizer, "vqgan_training", "prior_training", "renderer_training", "pixels_training")
        return replace(self, **{part: replace(getattr(self, part), seed=self.seed) for part in parts})


def pixel_config(size: PixelSpec, vqgan: VQGANConfig, prefix: TokenSpace, image_size: int) -> PixelConfig:
    """The configuration of a renderer straight to pixels, with a decoder of a VQGAN's shape."""
    shape = ("channels", "channel_mult", "num_res_blocks", "z_channels", "num_groups")
    return PixelConfig(
        image_size=image_size,
        prefix_vocab_size=prefix.vocab_size,
        prefix_len=prefix.length,
        prefix_levels=prefix.levels,
        prefix_rows=prefix.rows,
        norm="pre",
        dropout=0.0,
        depth=size.depth,
        embed_dim=size.embed_dim,
        num_heads=size.num_heads,
        noise_channels=size.noise_channels,
        **{name: getattr(vqgan, name) for name in shape},
    )


def with_settings(cfg: Any, settings: Mapping[str, Any]) -> Any:
    """A recipe, or a part of one, with other values at dotted names: {"prior.depth": 8}."""
    for name, value in settings.items():
        first, _, rest = name.partition(".")
        cfg = replace(cfg, **{first: with_settings(getattr(cfg, first), {rest: value}) if rest else value})
    return cfg
