"""Exported networks give what the pipeline gives, on another number of images, and say what goes in and comes out."""

import json

import pytest
import torch
from toy_pipeline import CLASSES, SHAPE, toy_pipeline
from toy_pixels import model as pixel_renderer

from digit.data.preprocess import PreprocessConfig
from digit.errors import DigitError
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.pipeline import export
from digit.pipeline.export import TOLERANCE, export_pipeline, load
from digit.pipeline.pipeline import DigitPipeline
from digit.sampling.config import StageSampling
from digit.sampling.kinds import make_sampler

pytestmark = pytest.mark.usefixtures("unchecked")  # annotations are not checked while torch traces


def aligned_pipeline():
    """The toy pipeline with an aligned renderer of 4 x 4 tokens."""
    pipe = toy_pipeline()
    cfg = SequenceConfig(
        vocab_size=11, target_len=16, norm="pre", prefix_vocab_size=7, prefix_len=4, conditioning="aligned",
        added_blocks=1, prefix_rows=2, target_rows=4, qk_norm=True, **SHAPE,
    )  # fmt: skip
    pipe.renderer = SequenceModel(cfg).eval()
    return pipe


def rotary_pipeline():
    """The toy pipeline with tied embeddings and rotary positions: the prior's on a line, the renderer's on grids."""
    pipe = toy_pipeline()
    tied = dict(tied_embeddings=True, **SHAPE)
    pipe.prior = SequenceModel(SequenceConfig(vocab_size=7, target_len=4, num_classes=3, rotary="1d", **tied)).eval()
    cfg = SequenceConfig(
        vocab_size=11, target_len=16, norm="pre", prefix_vocab_size=7, prefix_len=4, rotary="2d", prefix_rows=2,
        target_rows=4, learned_positions=False, **tied,
    )  # fmt: skip
    pipe.renderer = SequenceModel(cfg).eval()
    return pipe


def pixel_pipeline():
    """The toy prior in front of a renderer straight to pixels, with noise."""
    return DigitPipeline(
        prior=SequenceModel(SequenceConfig(vocab_size=4, target_len=4, num_classes=3, **SHAPE)),
        renderer=pixel_renderer(noise_channels=2),
        preprocess=PreprocessConfig(image_size=16, encoder_size=16),
        classes=CLASSES,
    )


@pytest.mark.parametrize(
    ("make", "files"),
    [
        (toy_pipeline, {"decoder", "prior_first", "prior_step", "renderer_first", "renderer_step"}),
        (lambda: toy_pipeline(masked=True), {"decoder", "prior_first", "prior_step", "renderer_pass"}),
        (lambda: toy_pipeline(prior=False), {"decoder", "renderer_first", "renderer_step"}),
        (aligned_pipeline, {"decoder", "prior_first", "prior_step", "renderer_first", "renderer_step"}),
        (rotary_pipeline, {"decoder", "prior_first", "prior_step", "renderer_first", "renderer_step"}),
        (pixel_pipeline, {"prior_first", "prior_step", "renderer_render"}),
    ],
    ids=["next-token", "masked", "vq-only", "aligned", "rotary", "pixels"],
)
def test_every_network_is_written_and_equal(make, files, tmp_path):
    found = export_pipeline(make(), tmp_path)
    assert found.keys() == {f"{name}.pt2" for name in files} and max(found.values()) <= TOLERANCE
    record = json.loads((tmp_path / "export.json").read_text())
    assert record["files"].keys() == found.keys() == {path.name for path in tmp_path.glob("*.pt2")}
    for entry in record["files"].values():
        assert (
            entry["inputs"] and entry["outputs"] and all("B" in s for n, s in entry["inputs"].items() if n != "index")
        )


def test_a_loop_over_the_files_gives_the_samplers_tokens(tmp_path):
    """At temperature 0, with torch alone: first, step, step ..., then the decoder."""
    pipe = toy_pipeline()
    export_pipeline(pipe, tmp_path)
    first, step, decoder = (load(tmp_path / f"{name}.pt2") for name in ("renderer_first", "renderer_step", "decoder"))
    prefix = torch.randint(0, 7, (5, 4))
    logits, keys, values = first(labels=torch.full((5,), -1), prefix=prefix)
    tokens = [logits.argmax(1)]
    for index in range(15):
        logits, keys, values = step(token=tokens[-1], index=torch.tensor([index]), keys=keys, values=values)
        tokens.append(logits.argmax(1))
    sampler = make_sampler(pipe.renderer, StageSampling(temperature=0))
    expected = sampler([0] * 5, prefix=prefix)
    assert torch.equal(torch.stack(tokens, 1), expected)
    pixels = (decoder(tokens=expected).clamp(0, 1) * 255).round().to(torch.uint8)
    assert (pixels.int() - pipe.decode(expected).int()).abs().max() <= 1


def test_a_wrong_file_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(DigitError, match="differs from the pipeline by"):
        export_pipeline(toy_pipeline(prior=False), tmp_path)
