"""Fixtures of the tests of sample folders: a toy pipeline, and what it writes when nothing interrupts it."""

import pytest
from toy_pipeline import toy_pipeline
from toy_samples import contents, draw

from digit.pipeline.pipeline import DigitPipeline


@pytest.fixture(scope="module")
def pipe() -> DigitPipeline:
    return toy_pipeline()


@pytest.fixture(scope="module")
def whole(pipe, tmp_path_factory) -> dict[str, bytes]:
    """Every file of a request that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "samples"
    draw(pipe, folder)
    return contents(folder)
