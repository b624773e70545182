"""What the page may ask for: every field with its type and range, so that nothing else reaches the model."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

MAX_COUNT = 64  # pictures of one request
MAX_SEED = 2**53 - 1000  # JavaScript's whole numbers
MAX_DATA_URL = 12_000_000  # characters of a PNG of 1024 px
MAX_TOKENS = 4096  # of one picture
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Picture = Annotated[str, Field(max_length=MAX_DATA_URL)]
Position = Annotated[int, Field(ge=-1, le=1_000_000)]
Choice = Annotated[str, Field(max_length=32)]  # among names that the settings of a stage know


class Request(BaseModel):
    """Base of all: unknown fields, texts for numbers, infinities and NaN are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Stage(Request):
    """Changes to the sampling of one stage; None keeps the recipe's value."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: Annotated[int, Field(ge=0, le=10_000_000)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    cfg_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    cfg_schedule: Choice | None = None
    num_steps: Annotated[int, Field(ge=1, le=256)] | None = None
    order: Choice | None = None
    choice_temperature: Annotated[float, Field(ge=0, le=1000)] | None = None


class Sampling(Request):
    """Sampling of both stages."""

    prior: Stage = Stage()
    renderer: Stage = Stage()


class Draw(Sampling):
    """New pictures."""

    num: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 4
    seed: Seed = 0
    labels: Annotated[list[Position], Field(max_length=MAX_COUNT)] = []
    """Positions of classes, taken in turn; empty for every class in turn."""

    @field_validator("labels")
    @classmethod
    def _no_more_than_pictures(cls, labels: list[int], info: object) -> list[int]:
        num = getattr(info, "data", {}).get("num", MAX_COUNT)
        if len(labels) > num:
            raise ValueError(f"{len(labels)} labels for {num} pictures: give as many pictures or more")
        return labels


class Complete(Sampling):
    """Proposals for the cells of a picture that are not kept."""

    picture: Picture
    keep: Annotated[list[Annotated[list[bool], Field(max_length=256)]], Field(max_length=256)]
    num: Annotated[int, Field(ge=1, le=16)] = 4
    seed: Seed = 0
    label: Position | None = None


class Variations(Sampling):
    """The picture rendered again from its discriminative tokens."""

    picture: Picture
    num: Annotated[int, Field(ge=1, le=16)] = 4
    seed: Seed = 0


class Encode(Request):
    """The tokens of a picture."""

    picture: Picture


class Render(Sampling):
    """A picture of given discriminative tokens."""

    tokens: Annotated[list[Annotated[int, Field(ge=0, le=10_000_000)]], Field(max_length=MAX_TOKENS)]
    seed: Seed = 0
    label: Position = -1
    """Class for a renderer that sees labels, -1 for none."""


class Noise(Request):
    """The tokens of a noisy picture."""

    picture: Picture
    snr: Annotated[float, Field(ge=-20, le=60)]
    seed: Seed = 0


class Judge(Request):
    """Pictures to compare with the training pictures, and the classes that they were meant to show."""

    pictures: Annotated[list[Picture], Field(min_length=1, max_length=MAX_COUNT)]
    labels: Annotated[list[Position], Field(max_length=MAX_COUNT)] = []


class Fit(Request):
    """A run to start."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
    recipe: Annotated[str, Field(max_length=64)]
    data: Annotated[str, Field(max_length=64)]
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0


class Named(Request):
    """A run by its name."""

    name: Annotated[str, Field(max_length=128)]
    action: Literal["stop", "continue"]
