"""How large a reproduction is: tiny (minutes), small (an hour or two on two CPU cores), paper (its own sizes, GPUs)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from digit.errors import DigitError
from digit.evaluation.sweep import SweepConfig
from digit.metrics.completion import KEEPS
from digit.metrics.probe import ProbeConfig
from digit.runs.pretrain import PretrainConfig
from digit.runs.recipes import ModelSpec, Recipe, cpu_training, demo, digit_base, digit_large, paper_cifar
from digit.sampling.config import MASKED_TOP_P, SamplingConfig, StageSampling
from digit.tokenizers.encoders import EncoderConfig
from digit.training.config import TrainConfig
from digit.training.ssl.train import SSLConfig

ScaleName = Literal["tiny", "small", "paper"]
VARIANTS = ("short", "longer", "large", "compared")  # fields with other recipes; each is named by its field


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes and counts of every experiment; all other settings are the recipe's."""

    name: ScaleName
    """tiny, small or paper."""
    recipe: Recipe
    """Codebook, VQGAN, tokens and models; experiments change one thing at a time."""
    num_train: int | None
    """Training images, spread evenly over the data; None takes all."""
    min_rows: int = 0
    """Minimum rows of the token store: small data gets several crops per image, unless training makes fresh ones."""
    num_test: int = 10_000
    """Test images: the reference of every distance and the test set of probes."""
    num_samples: int = 50_000
    """Samples per method and seed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; every model of the comparisons is trained once per seed."""
    num_stability: int = 1000
    """Images for Table 1."""
    num_completed: int = 1000
    """Images for Figure 4b."""
    num_swept: int = 1000
    """Samples per setting in Figure 5."""
    clusters: tuple[int, ...] = (1024, 4096, 8192)
    """Codebook sizes of Figure 3b."""
    short: Recipe | None = None
    """"+ discriminative tokens" of Figure 3a; None is `recipe`."""
    longer: Recipe | None = None
    """"+ longer training" of Figure 3a; None is `recipe`."""
    large: Recipe | None = None
    """"+ larger model" of Figure 3a, and the large rows of the tables; None is `recipe`."""
    large_rows: bool = False
    """Whether Tables 2 to 4 have the rows of the large recipe, too."""
    compared: Recipe | None = None
    """Recipe of Figure 4a, whatever the encoder; None is `recipe`."""
    probe: ProbeConfig = field(default_factory=lambda: ProbeConfig(l2=(1e-3, 1e-2)))
    """Settings of every linear probe."""
    prefixes: tuple[float, ...] = KEEPS
    """Kept fractions of Figure 4b."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    """Settings of Figure 5."""
    encoders: tuple[tuple[str, EncoderConfig | PretrainConfig], ...] = ()
    """Figure 4a: names with an encoder, or with the settings to train one."""

    def with_recipes(self, change: Callable[[Recipe], Recipe]) -> "Scale":
        """This scale with a change to its recipe and to every variant of it."""
        recipes = {name: getattr(self, name) for name in ("recipe", *VARIANTS)}
        return replace(self, **{name: change(recipe) for name, recipe in recipes.items() if recipe is not None})

    def with_encoder(self, name: str | None, weights: str | None = None, size: int | None = None) -> "Scale":
        """This scale with another encoder for the tokens, third-to-last layer, with inputs of `size` pixels."""
        if name is None and weights is None and size is None:
            return self

        def change(recipe: Recipe) -> Recipe:
            encoder = replace(recipe.encoder, weights=weights)
            if name is not None:
                encoder = replace(encoder, name=name, layer=None)
            if size is not None:
                encoder = replace(encoder, input_size=size)
            preprocess = replace(recipe.preprocess, encoder_size=encoder.input_size)
            return replace(recipe, encoder=encoder, preprocess=preprocess)

        return self.with_recipes(change)

    def with_encoder_files(self, files: Mapping[str, str]) -> "Scale":
        """This scale with weights files for the encoders of Figure 4a, by name. Raises DigitError for other names."""
        for name in files:
            if name not in dict(self.encoders) or isinstance(dict(self.encoders)[name], PretrainConfig):
                known = [n for n, encoder in self.encoders if isinstance(encoder, EncoderConfig)]
                raise DigitError(f"scale {self.name} takes no weights for {name}: {', '.join(known) or 'none'}")
        chosen = {name: replace(dict(self.encoders)[name], weights=file) for name, file in files.items()}
        return replace(self, encoders=tuple((name, chosen.get(name, encoder)) for name, encoder in self.encoders))


def pretrained(cfg: PretrainConfig) -> tuple[tuple[str, PretrainConfig], ...]:
    """The three encoders of Figure 4a, each trained on the training images."""
    return tuple(
        (name, replace(cfg, method=method)) for name, method in (("MAE", "mae"), ("MoCo", "moco"), ("iBOT", "ibot"))
    )


def lengthened(recipe: Recipe, factor: int = 2) -> Recipe:
    """The recipe with `factor` times the updates of both models."""
    prior, renderer = (replace(cfg, num_steps=factor * cfg.num_steps) for cfg in trainings(recipe))
    return replace(recipe, prior_training=prior, renderer_training=renderer)


def trainings(recipe: Recipe) -> tuple[TrainConfig, TrainConfig]:
    """Training of prior and renderer."""
    return recipe.prior_training, recipe.renderer_training


def tiny() -> Scale:
    """Minutes: shows that everything runs and what the plots look like; its verdicts mean little."""
    base, size = demo(), ModelSpec(depth=2, embed_dim=128, num_heads=2, dropout=0.0)
    recipe = replace(
        base,
        name="tiny",
        class_conditional=False,
        sampling=SamplingConfig(prior=StageSampling(top_p=0.9), renderer=StageSampling(top_p=0.9), precision="bf16"),
        kmeans=replace(base.kmeans, num_clusters=256),
        prior=size,
        prior_training=cpu_training(300),
        renderer=size,
        renderer_training=cpu_training(300, optimizer="muon"),
    )
    larger = replace(size, depth=3, embed_dim=192, num_heads=3)
    training = SSLConfig(num_steps=60, batch_size=64, warmup_steps=10)
    methods = pretrained(PretrainConfig(depth=3, embed_dim=96, patch_size=16, training=training))
    return Scale(
        name="tiny", recipe=recipe, num_train=3000, min_rows=3000, num_test=1000, num_samples=500, num_stability=200,
        num_completed=200, num_swept=200, clusters=(64, 256),
        longer=lengthened(recipe), large=replace(recipe, prior=larger, renderer=larger),
        prefixes=(0.25, 0.5, 0.75),
        sweep=SweepConfig(top_k=(10, 100), top_p=(0.5, 0.95)), encoders=methods,
    )  # fmt: skip


def small() -> Scale:
    """64 px, one to two hours per experiment on two CPU cores: trends, with intervals over three seeds."""
    base = paper_cifar()
    recipe = replace(
        base,
        name="small",
        class_conditional=False,
        vqgan_training=replace(base.vqgan_training, num_steps=900, adversarial_start=600),
        sampling=SamplingConfig(prior=StageSampling(top_p=0.95), renderer=StageSampling(top_p=0.95), precision="bf16"),
        masked_top_p=MASKED_TOP_P,
    )
    methods, larger = pretrained(PretrainConfig()), replace(recipe.prior, depth=6, embed_dim=256, num_heads=4)
    return Scale(
        name="small", recipe=recipe, num_train=20_000, min_rows=20_000, num_samples=2000, num_test=5000,
        clusters=(256, 1024, 4096), longer=lengthened(recipe), large=replace(recipe, prior=larger, renderer=larger),
        encoders=methods,
    )  # fmt: skip


def paper() -> Scale:
    """The paper's sizes (A.3) on ImageNet-1k; needs GPUs, weights of DINOv2 and VQGAN, and FID's Inception network.

    Figure 3a: 9.66 belongs to 200 epochs of both models, 9.13 to 400 of the renderer (the base recipe), 4.59 to the
    large recipe with its own codebook and tokens. Figure 4a: a prior of 39 M for 100 epochs. The paper does not give
    its shape: 13 blocks of 448 are 38.8 M with K = 8192; nor its renderer, which is the base one for 200 epochs here.
    """
    base = digit_base()
    short = replace(base, renderer_training=replace(base.renderer_training, num_steps=base.prior_training.num_steps))
    compared = replace(
        short,
        prior=ModelSpec(depth=13, embed_dim=448, num_heads=7),
        prior_training=replace(base.prior_training, num_steps=base.prior_training.num_steps // 2),
    )
    named = (("MAE", "mae_vitb16"), ("MoCo", "mocov3_vitb16"), ("iBOT", "ibot_vitb16"))
    return Scale(
        name="paper", recipe=base, num_train=None, num_test=50_000, seeds=(0,), num_stability=50_000,
        num_completed=50_000, num_swept=50_000, short=short, large=digit_large(), large_rows=True, compared=compared,
        probe=ProbeConfig(solver="sgd"),
        encoders=tuple((name, EncoderConfig(name=encoder)) for name, encoder in named),
    )  # fmt: skip


SCALES: dict[str, Callable[[], Scale]] = {"tiny": tiny, "small": small, "paper": paper}


def get_scale(name: str) -> Scale:
    """Build a scale by name. Raises DigitError that lists the names."""
    if name not in SCALES:
        raise DigitError(f"no scale named {name}: choose one of {', '.join(SCALES)}")
    return SCALES[name]()
