"""A renderer straight to pixels of another kind, with a stub for a network: what a new kind takes, from training
to the folder of a pipeline. It is a model, a row in KINDS and a row in ROLES; no other file changes.
"""

from dataclasses import dataclass

import pytest
import torch
from tiny import tiny_recipe
from torch import nn

from digit.data.shapes import ShapesSource
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.pipeline.pipeline import DigitPipeline
from digit.runs.fit import Run
from digit.runs.roles import ROLES, Role
from digit.sampling.kinds import FILTERS, KINDS, ModelKind
from digit.sampling.sampler import Sampler


@dataclass(frozen=True, kw_only=True)
class PatchConfig(SequenceConfig):
    """One colour a discriminative token, on an image of `image_size` pixels."""

    image_size: int
    vocab_size: int = 1
    target_len: int = 1

    @property
    def kind(self) -> str:
        return "patches"


class PatchRenderer(SequenceModel):
    """Each discriminative token becomes a patch of one colour: a stub, but it learns."""

    def __init__(self, cfg: PatchConfig) -> None:
        nn.Module.__init__(self)
        self.cfg = cfg
        self.start_embed = nn.Embedding(1, 1)  # `SequenceModel.device` asks it
        self.colours = nn.Embedding(cfg.prefix_vocab_size, 3)

    def forward(self, prefix):
        side = round(self.cfg.prefix_len**0.5)
        patches = self.colours(prefix).sigmoid().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (B, 3, side, side)
        return nn.functional.interpolate(patches, size=self.cfg.image_size)

    def noise(self, batch, generator):
        return {}

    def loss(self, target, prefix=None, labels=None, label_smoothing=0.0):
        loss = (self(prefix) - target / 255).square().mean() + 0 * self.start_embed.weight.sum()
        return loss, {"nll": loss.detach()}


class PatchSampler(Sampler):
    """One pass, nothing to sample."""

    output = "images"
    num_decisions = 1
    uniform_shape = (1,)

    def __call__(self, seeds, *, prefix=None, labels=None, given=None, on_token=None):
        with torch.no_grad():
            return (self.model(prefix) * 255).round().to(torch.uint8)

    def sample_micro_batch(self, rows, u, report):
        raise NotImplementedError


@pytest.fixture
def pixel_role(monkeypatch):
    kind = ModelKind(config=PatchConfig, model=PatchRenderer, sampler=PatchSampler, settings=FILTERS)
    monkeypatch.setitem(KINDS, "patches", kind)
    role = Role(name="renderer_patches", target="pixels", prefix="discriminative", kind="patches", labels=False)
    monkeypatch.setitem(ROLES, role.name, role)


def test_a_renderer_straight_to_pixels(pixel_role, tmp_path):
    run = Run(tiny_recipe(crops_per_image=2), ShapesSource(20), tmp_path)
    batch = run.batches("renderer_patches", run.training_config("renderer_patches"))(0)
    assert batch["target"].shape == (8, 3, 32, 32) and batch["target"].dtype == torch.uint8
    pipe = run.make_pipeline("prior", "renderer_patches")
    images = pipe.generate(3, seed=1)
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.uint8
    assert pipe.complete(images, keep=0.5).shape == images.shape
    pipe.save_pretrained(tmp_path / "pipeline")
    again = DigitPipeline.from_pretrained(tmp_path / "pipeline")
    assert torch.equal(again.generate(3, seed=1), images)


def test_pixel_targets_are_the_crops_behind_the_tokens(pixel_role, tmp_path):
    run = Run(tiny_recipe(crops_per_image=2), ShapesSource(20), tmp_path)
    batches = run.batches("renderer_patches", run.training_config("renderer_patches"))
    batch = batches(3)
    assert torch.equal(run.tokenizer().encode(batch["target"]), batch["prefix"])
