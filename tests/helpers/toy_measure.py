"""A stand-in network and image sets, for the tests of `digit evaluate`."""

import numpy as np
import torch
from PIL import Image

from digit.evaluation.samples import evaluate
from digit.metrics.judge import Judged
from digit.pipeline.batch import SampleBatch
from digit.pipeline.sample_folder import SampleFolder, write_samples

SIZE = 16


class FakeNetwork:
    """Mean colours of image quarters as features; counts the images it sees."""

    def __init__(self, weights="1", name="fake"):
        self.weights, self.name, self.seen = weights, name, 0

    def judge(self, images):
        assert images.dtype == torch.uint8 and images.ndim == 4
        self.seen += len(images)
        x = torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1) / 255  # (B, 12)
        return Judged(pooled=x, spatial=x[:, :6] * 2, logits=x[:, :5] * 10)

    def metric(self, name):
        return f"{name}_fake"

    def describe(self):
        return {"network": self.name, "weights": "fake.pth", "weights_sha256": self.weights}


def pictures(num, seed=0, size=SIZE, shift=0):
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.integers(0, 200, (num, 3, 4, 4)) + shift).to(torch.uint8)
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="nearest")


def save_folder(folder, images, suffix=".png", **options):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:05d}{suffix}", **options)
    return folder


def run(samples, reference, cfg, **options):
    options.setdefault("network", FakeNetwork())
    return evaluate(samples, reference, cfg, **options)


def warned(result, text):
    return [line for line in result["warnings"] if text in line]


def sample_folder(folder, images, labels, classes=("cat", "dog")):
    request = {"num": len(images), "seed": 0, "batch_size": len(images), "rounding": "nearest"}
    tokens, known = {"vq": torch.zeros(len(images), 4, dtype=torch.long)}, torch.tensor(labels)
    names = [classes[k] if k >= 0 else None for k in labels]
    write_samples(
        SampleFolder(folder, request, {"vq": 4}, known, names),
        lambda start, end: (batch for batch in [SampleBatch(start, known, {"images": images} | tokens)]),
    )
    return folder
