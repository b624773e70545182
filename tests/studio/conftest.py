"""Fixtures of the studio's tests: a toy pipeline with both tokenizers, its training pictures, runs, and a client."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the studio's extra is not installed: pip install -e '.[studio]'")
pytest.importorskip("httpx2", reason="Starlette's test client needs httpx2")

from starlette.testclient import TestClient
from studio_runs import make_run
from studio_toys import SIZE, events, serving, studio_pipeline

from digit.data.shapes import ShapesSource
from digit.pipeline.pipeline import DigitPipeline
from digit.studio.app import Studio, make_app
from digit.studio.folders import Folder
from digit.studio.model import Model


@pytest.fixture(scope="session")
def pipe() -> DigitPipeline:
    return studio_pipeline()


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """A folder with two runs, and much beside them that is none."""
    root = tmp_path_factory.mktemp("runs")
    make_run(root / "first", lr=0.002)
    make_run(root / "second", lr=0.004)
    (root / "no run").mkdir()
    (root / "notes.txt").write_text("secret")
    (root / "link").symlink_to(root / "first")
    return root


@pytest.fixture(scope="session")
def studio(pipe, runs) -> Iterator[Studio]:
    source = ShapesSource(num=60, size=SIZE)
    made = Studio(Model(pipe, "runs/toy", source, data="shapes"), Folder(runs))
    yield made
    made.close()


@pytest.fixture(scope="session")
def client(studio) -> TestClient:
    return TestClient(make_app(studio, max_upload=1), base_url="http://127.0.0.1:8000", raise_server_exceptions=False)


@pytest.fixture(scope="session")
def picture(client) -> str:
    """A picture of the model, as a data URL."""
    return events(client.post("/api/draw", json={"num": 1, "seed": 5})).only("picture")[0]["image"]


@pytest.fixture
def server(studio) -> Iterator[str]:
    """The studio at a port of this machine; the address of its page."""
    yield from serving(studio)
