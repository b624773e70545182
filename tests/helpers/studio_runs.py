"""Run folders for the studio's tests, as `digit fit` leaves them, without any training."""

import json
from dataclasses import asdict
from pathlib import Path

from PIL import Image
from tiny import tiny_recipe

from digit.data.images import open_source
from digit.runtime.files import plain


def make_run(folder: Path, *, lr: float = 0.002, data: str = "shapes", done: bool = True, steps: int = 40) -> Path:
    """A run on `data` with a log of its prior and, where it is done, pictures and metrics."""
    recipe = plain(asdict(tiny_recipe()))
    recipe["prior_training"]["learning_rate"] = lr
    source = open_source(data)
    config = {"format": 2, "recipe": recipe, "data": {"name": source.name, "fingerprint": source.fingerprint}}
    for part in ("prior/checkpoints", "codebook"):
        (folder / part).mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("codebook.json", "codebook.safetensors"):
        (folder / "codebook" / name).write_text("{}")
    (folder / "prior" / "checkpoints" / "config.json").write_text(json.dumps({"train": {"num_steps": steps}}))
    log = [{"step": i, "nll": 4.0 - i / 20, "loss": 4.0 - i / 20, "seconds": i * 0.5} for i in range(2, 21, 2)]
    (folder / "prior" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    if done:
        for name in ("samples.png", "reconstructions.png"):
            Image.new("RGB", (40, 20), (90, 140, 90)).save(folder / name)
        (folder / "metrics.json").write_text(json.dumps({"psnr_db": 21.5, "recognised": 0.75, "note": "text"}))
        (folder / "pipeline").mkdir()
        (folder / "pipeline" / "pipeline.json").write_text("{}")
    return folder
