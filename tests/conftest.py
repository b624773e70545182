"""Shared fixtures: quiet progress, one seed, and the optional folder of reference data beside the repository."""

import os
import signal
from pathlib import Path

import jaxtyping
import pytest
import torch

CHECKED = (  # rooms whose annotations, shapes included, are checked at every call
    "digit.convert",
    "digit.data",
    "digit.evaluation",
    "digit.metrics",
    "digit.models",
    "digit.pipeline",
    "digit.sampling",
    "digit.tokenizers",
    "digit.training",
)
jaxtyping.install_import_hook(CHECKED, "typecheck.check")

from digit.runtime import progress  # noqa: E402  (after the hook)
from digit.runtime.lock import set_command  # noqa: E402

torch.set_num_threads(1)  # bit-exact comparisons with the single-threaded processes that some tests start


if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the tests' own processes would ignore it


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    progress.quiet()
    torch.manual_seed(0)
    set_command("")  # of another test, which a lock would contain


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of whole commands first: the last file of one worker then ends soon after that of the other."""
    items.sort(key=lambda item: item.path.parent.name not in ("end_to_end", "cli"))


@pytest.fixture(scope="session")
def few_scenes():
    """Reports judge against 200 training pictures, in place of 2,000."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("digit.runs.judgement.REFERENCE", 200)
        patch.setattr("digit.runs.judgement.NOISY", 8)
        yield


@pytest.fixture
def unchecked():
    """No annotation is checked: for tests of the package's own errors for wrong types and shapes."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference data (golden vectors, real images): `DIGIT_SHARED` or ../shared; skips without it."""
    folder = Path(os.environ.get("DIGIT_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no reference data at {folder} (set DIGIT_SHARED)")
    return folder


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """Golden vectors of the authors' released code."""
    return shared / "golden"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished tiny run on SHAPES."""
    from tiny import SHAPES, tiny_recipe

    from digit.runs.fit import Run, fit

    run = Run(tiny_recipe(), SHAPES, tmp_path_factory.mktemp("run"))
    fit(run)
    return run
