"""Files that once crashed a loader, froze it or flooded memory: each is now read or refused in one line."""

import shutil
from pathlib import Path

import pytest

from fuzz.loaders import LOADERS
from fuzz.worker import judge

CORPUS = Path(__file__).parents[1] / "corpus"
ENTRIES = sorted(path for path in CORPUS.glob("*/*") if path.is_dir())


@pytest.mark.parametrize("entry", ENTRIES, ids=[f"{path.parent.name}-{path.name}" for path in ENTRIES])
def test_corpus(entry: Path, tmp_path):
    loader, folder = LOADERS[entry.parent.name], tmp_path / "input"
    shutil.copytree(entry, folder)
    complete(loader, folder)
    kind, detail = judge(loader.load, folder)
    assert kind in ("accepted", "refused"), detail


def complete(loader: object, folder: Path) -> None:
    """An entry of a loader of many files holds only what was damaged: the others are whole."""
    for name, data in getattr(loader, "whole", dict)().items():
        path = folder / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)


def test_corpus_stays_small():
    sizes = [sum(file.stat().st_size for file in entry.rglob("*") if file.is_file()) for entry in ENTRIES]
    assert max(sizes) < 20 * 1024 and sum(sizes) < 300_000
