"""The drawing that the tests of sample folders repeat."""

from pathlib import Path

from digit.pipeline.pipeline import DigitPipeline
from digit.pipeline.sample_folder import sample

NUM, SIZE = 13, 4  # three batches and one image


def draw(pipe: DigitPipeline, folder: Path, **changes) -> list[Path]:
    return sample(pipe, folder, **{"num": NUM, "seed": 3, "batch_size": SIZE} | changes)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
