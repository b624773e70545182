"""Every number of every config has an interval, and whatever lies outside it is refused by name."""

import dataclasses
import math
import typing

import pytest

from digit.data.preprocess import PreprocessConfig
from digit.errors import DigitError
from digit.models.vqgan import VQGANConfig
from digit.planning.stages import Order
from digit.runs.pretrain import PretrainConfig
from digit.runs.recipes import ModelSpec, PixelSpec, Recipe
from digit.runtime.settings import INTERVAL, changed, check_number, contains, flat, in_words, refuse_unused
from digit.sampling.config import SamplingConfig, StageSampling
from digit.tokenizers.encoders import EncoderConfig
from digit.tokenizers.kmeans.config import KMeansConfig
from digit.training.adversarial import AdversarialConfig
from digit.training.config import TrainConfig
from digit.training.ssl.dino import DINOConfig
from digit.training.ssl.ibot import IBOTConfig
from digit.training.ssl.mae import MAEConfig
from digit.training.ssl.moco import MoCoConfig
from digit.training.ssl.train import SSLConfig
from digit.training.ssl.views import ViewConfig
from digit.training.vqgan import GANConfig

CONFIGS = (
    TrainConfig, AdversarialConfig, GANConfig, SSLConfig, KMeansConfig, StageSampling, SamplingConfig, ModelSpec,
    PixelSpec, Recipe, EncoderConfig,
    VQGANConfig, PreprocessConfig, PretrainConfig, DINOConfig, IBOTConfig, MAEConfig, MoCoConfig, ViewConfig, Order,
)  # fmt: skip
CHECKED_BY_HAND = {"EncoderConfig.layer", "VQGANConfig.channel_mult"}  # may be negative; may be of any length
NUMBERS = [
    (cls, field)
    for cls in CONFIGS
    for field in dataclasses.fields(cls)
    if not {int, float}.isdisjoint((hint := typing.get_type_hints(cls)[field.name], *typing.get_args(hint)))
    and f"{cls.__name__}.{field.name}" not in CHECKED_BY_HAND
]
IDS = [f"{cls.__name__}.{field.name}" for cls, field in NUMBERS]
pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.parametrize(("cls", "field"), NUMBERS, ids=IDS)
def test_every_number_refuses_nonsense(cls, field):
    """NaN, infinity, a number below the interval and one above it, text and true; each error names the field."""
    interval = field.metadata[INTERVAL]  # every number has one
    low, high = map(float, interval[1:-1].split(","))
    for value in (math.nan, math.inf, -math.inf, low - 1, *([high + 1] if math.isfinite(high) else []), "many", True):
        whole = isinstance(value, float) and value.is_integer() and isinstance(field.default, int)
        number = int(value) if whole else value
        pair = isinstance(field.default, tuple)
        with pytest.raises(DigitError, match=rf"^{field.name}( of [\w ]+)? is .*: it must be "):
            cls(**{field.name: (number, number) if pair else number})


@pytest.mark.parametrize(("cls", "field"), NUMBERS, ids=IDS)
def test_every_default_lies_in_its_interval(cls, field):
    values = field.default if isinstance(field.default, tuple) else (field.default,)
    assert all(value is None or contains(field.metadata[INTERVAL], value) for value in values)


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "words"),
    [
        ("[0, inf)", (0, 5, 1e300), (-1e-9, math.inf, math.nan), "at least 0"),
        ("(0, inf)", (1e-12, 7), (0, -3, math.nan), "above 0"),
        ("[0, 1)", (0, 0.999), (1, -0.1), "at least 0 and below 1"),
        ("(0, 1]", (1, 0.5), (0, 1.1), "above 0 and at most 1"),
        ("[1, 1_000]", (1, 1000), (0, 1001), "1 to 1,000"),
    ],
)
def test_intervals_and_their_words(interval, inside, outside, words):
    assert all(contains(interval, number) for number in inside)
    assert not any(contains(interval, number) for number in outside)
    assert in_words(interval) == words


@pytest.mark.parametrize("value", [2.5, True, "3", None, 10**30, math.nan])
def test_a_count_is_a_whole_number_of_64_bits(value):
    with pytest.raises(DigitError, match=r"--gpus is .*: it must be"):
        check_number("--gpus", value, "[1, inf)", whole=True)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: GANConfig(num_steps=100, codebook_start=100, adversarial_start=0),
            "codebook_start is 100: it must be",
        ),
        (lambda: GANConfig(adversarial_start=6000), "adversarial_start is 6000: it must be below num_steps 6000"),
        (lambda: TrainConfig(label_smoothing=1.0), "label_smoothing is 1.0"),
        (lambda: TrainConfig(betas=(0.9, 1.0)), r"betas is \(0.9, 1.0\)"),
        (lambda: TrainConfig(max_norm=-1.0), "max_norm is -1.0: it must be at least 0"),
        (lambda: TrainConfig(weight_decay=math.nan), "weight_decay is nan"),
        (lambda: TrainConfig(learning_rate=math.inf), "learning_rate is inf: it must be above 0, a finite number"),
        (lambda: TrainConfig(batch_size=6, accumulate=4), "batch_size is 6: it must be a multiple of accumulate 4"),
        (lambda: StageSampling(top_p=0.0), "top_p is 0.0"),
        (lambda: DINOConfig(local_scale=(0.5, 0.2)), "local_scale of DINO"),
        (lambda: Recipe(renderer_kind="diffusion"), "renderer_kind is 'diffusion': it must be ar or masked"),
        (lambda: KMeansConfig(init="k-means"), "init is 'k-means': it must be random or k-means"),
    ],
)
def test_values_that_cannot_work(make, text):
    with pytest.raises(DigitError, match=text):
        make()


def test_no_discriminator_is_a_choice_and_nothing_to_train_is_one():
    assert GANConfig(adversarial_weight=0.0, adversarial_start=9000).num_steps == 6000
    assert GANConfig(num_steps=0).codebook_start == 200


def test_settings_by_their_dotted_names():
    recipe = Recipe(kmeans=KMeansConfig(num_clusters=7))
    assert flat(recipe)["kmeans.num_clusters"] == 7 and flat(recipe)["vqgan.channel_mult"] == (1, 1, 2, 2, 4)
    assert flat(dataclasses.asdict(recipe)) == flat(recipe)
    assert changed(recipe, Recipe()) == ["kmeans.num_clusters"]
    refuse_unused(recipe, ["kmeans.seed"], [(False, r"kmeans\..*", "never")])
    with pytest.raises(DigitError, match="kmeans.num_clusters is 7, which this run would not use: leave it out"):
        refuse_unused(recipe, ["seed", "kmeans.num_clusters"], [(True, r"kmeans\..*", "leave it out")])
