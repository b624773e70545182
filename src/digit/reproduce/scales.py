"""How large a reproduction is: tiny (minutes), small (an hour or two on two CPU cores), paper (its own sizes, GPUs)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from digit.errors import DigitError
from digit.evaluation.sweep import SweepConfig
from digit.metrics.completion import KEEPS
from digit.metrics.probe import ProbeConfig
from digit.runs.pretrain import PretrainConfig
from digit.runs.recipes import ModelSpec, Recipe, cifar, cpu_training, demo, digit_base, digit_large
from digit.sampling.config import SamplingConfig, StageSampling
from digit.tokenizers.encoders import EncoderConfig
from digit.training.ssl.train import SSLConfig

ScaleName = Literal["tiny", "small", "paper"]


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
    """Minimum rows of the token store: small data gets several crops per image."""
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
    longer: float = 2.0
    """Factor of "longer training" in Figure 3a."""
    larger: ModelSpec = field(default_factory=ModelSpec)
    """Size of "scale up" in Figure 3a."""
    probe: ProbeConfig = field(default_factory=lambda: ProbeConfig(l2=(1e-3, 1e-2)))
    """Settings of every linear probe."""
    prefixes: tuple[float, ...] = KEEPS
    """Kept fractions of Figure 4b."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    """Settings of Figure 5."""
    encoders: tuple[tuple[str, EncoderConfig | PretrainConfig], ...] = ()
    """Figure 4a: names with an encoder, or with the settings to train one."""

    def with_encoder(self, name: str | None, weights: str | None = None, size: int | None = None) -> "Scale":
        """This scale with another encoder for the tokens, third-to-last layer, with inputs of `size` pixels."""
        if name is None and weights is None and size is None:
            return self
        encoder = replace(self.recipe.encoder, weights=weights)
        if name is not None:
            encoder = replace(encoder, name=name, layer=None)
        if size is not None:
            encoder = replace(encoder, input_size=size)
        preprocess = replace(self.recipe.preprocess, encoder_size=encoder.input_size)
        return replace(self, recipe=replace(self.recipe, encoder=encoder, preprocess=preprocess))

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
    training = SSLConfig(num_steps=60, batch_size=64, warmup_steps=10)
    methods = pretrained(PretrainConfig(depth=3, embed_dim=96, patch_size=16, training=training))
    return Scale(
        name="tiny", recipe=recipe, num_train=3000, min_rows=3000, num_test=1000, num_samples=500, num_stability=200,
        num_completed=200, num_swept=200, clusters=(64, 256), larger=replace(size, depth=3, embed_dim=192, num_heads=3),
        prefixes=(0.25, 0.5, 0.75), sweep=SweepConfig(top_k=(10, 100), top_p=(0.5, 0.95)), encoders=methods,
    )  # fmt: skip


def small() -> Scale:
    """64 px, one to two hours per experiment on two CPU cores: trends, with intervals over three seeds."""
    base = cifar()
    recipe = replace(
        base,
        name="small",
        class_conditional=False,
        vqgan_training=replace(base.vqgan_training, num_steps=900, adversarial_start=600),
        sampling=SamplingConfig(prior=StageSampling(top_p=0.95), renderer=StageSampling(top_p=0.95), precision="bf16"),
    )
    methods = pretrained(PretrainConfig())
    return Scale(
        name="small", recipe=recipe, num_train=20_000, min_rows=20_000, num_samples=2000, num_test=5000,
        clusters=(256, 1024, 4096), larger=replace(recipe.prior, depth=6, embed_dim=256, num_heads=4), encoders=methods,
    )  # fmt: skip


def paper() -> Scale:
    """The paper's sizes (A.3) on ImageNet-1k; needs GPUs, weights of DINOv2 and VQGAN, and FID's Inception network."""
    large = digit_large()
    named = (("MAE", "mae_vitb16"), ("MoCo", "mocov3_vitb16"), ("iBOT", "ibot_vitb16"))
    return Scale(
        name="paper", recipe=digit_base(), num_train=None, num_test=50_000, seeds=(0,), num_stability=50_000,
        num_completed=50_000, num_swept=50_000, larger=large.prior, probe=ProbeConfig(solver="sgd"),
        encoders=tuple((name, EncoderConfig(name=encoder)) for name, encoder in named),
    )  # fmt: skip


SCALES: dict[str, Callable[[], Scale]] = {"tiny": tiny, "small": small, "paper": paper}


def get_scale(name: str) -> Scale:
    """Build a scale by name. Raises DigitError that lists the names."""
    if name not in SCALES:
        raise DigitError(f"no scale named {name}: choose one of {', '.join(SCALES)}")
    return SCALES[name]()
