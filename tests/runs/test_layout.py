"""Damaged weights in a run folder: the advice of the error mends them, and every other stage stays."""

import shutil
from pathlib import Path

import pytest
from tiny import SHAPES, tiny_recipe

from digit.errors import DigitError
from digit.pipeline.pipeline import DigitPipeline
from digit.runs.fit import Run, fit
from digit.runtime.files import sha256_file

STAGES = ["codebook/codebook", "vqgan/vqgan", "prior/model", "renderer/model"]
PARTS = ["pipeline/codebook/codebook", "pipeline/encoder/encoder", "pipeline/vqgan/vqgan", "pipeline/prior"]
ADVICE = "delete it and run the command again that makes it"


@pytest.mark.parametrize("name", [*STAGES, *PARTS])
def test_a_damaged_file_is_made_again_as_the_error_says(run, tmp_path, name):
    out = shutil.copytree(run.out, tmp_path / "out")
    path = out / f"{name}.safetensors"
    hashed = sha256_file(path)
    path.write_bytes(path.read_bytes()[:200])

    def use() -> None:
        if name in STAGES:
            fit(Run(tiny_recipe(), SHAPES, out))
        else:
            DigitPipeline.from_pretrained(out)

    with pytest.raises(DigitError, match=f"{path.name} .*: {ADVICE}"):
        use()
    path.unlink()
    if name in PARTS:
        with pytest.raises(DigitError, match="no such file: .*; run the command again that makes it"):
            use()
    fit(Run(tiny_recipe(), SHAPES, out))
    assert sha256_file(path) == hashed
    use()


def changed(path: Path) -> None:
    """Flips one bit of the last weight: the file can be read, and is of another model."""
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name",
    [
        "codebook/codebook.json",
        "vqgan/vqgan.json",
        "prior/model.json",
        "prior/tokens.json",
        "pipeline/pipeline.json",
        "pipeline/prior.json",
        "pipeline/encoder/encoder.json",
        "pipeline/vqgan/vqgan.json",
    ],
)
@pytest.mark.parametrize("content", ["[1, 2", "[]", "{}", '{"format": 1}'])
def test_damaged_json_is_made_again_as_the_error_says(run, tmp_path, name, content):
    out = shutil.copytree(run.out, tmp_path / "out")
    before = (out / name).read_bytes()
    (out / name).write_text(content)

    def use() -> None:
        if name.startswith("pipeline"):
            DigitPipeline.from_pretrained(out)
        else:
            fit(Run(tiny_recipe(), SHAPES, out))

    with pytest.raises(DigitError) as raised:
        use()
    text = str(raised.value)
    if "in another --out" not in text:  # an older format is no damage
        assert ADVICE in text or f"delete {(out / name).parent}" in text, text
        (out / name).unlink()
        fit(Run(tiny_recipe(), SHAPES, out))
        assert (out / name).read_bytes() == before
        use()


@pytest.mark.parametrize(
    "name", ["codebook/codebook", "vqgan/vqgan", "pipeline/encoder/encoder", "pipeline/vqgan/vqgan"]
)
def test_files_of_two_models_are_made_again_as_the_error_says(run, tmp_path, name):
    out = shutil.copytree(run.out, tmp_path / "out")
    weights, about = out / f"{name}.safetensors", out / f"{name}.json"
    hashed = sha256_file(weights)
    changed(weights)
    with pytest.raises(DigitError, match=f"{about.name} says fingerprint .*{ADVICE}"):
        fit(Run(tiny_recipe(), SHAPES, out)) if "pipeline" not in name else DigitPipeline.from_pretrained(out)
    about.unlink()
    fit(Run(tiny_recipe(), SHAPES, out))
    assert sha256_file(weights) == hashed
    DigitPipeline.from_pretrained(out)
