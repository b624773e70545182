"""Damaged weights in a run folder: the advice of the error mends them, and every other stage stays."""

import shutil

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
