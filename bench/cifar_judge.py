"""Figures and grids of images, judged against CIFAR-10's test images: shared by the programs that compare recipes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from digit.data.images import open_source
from digit.data.preprocess import PreprocessConfig
from digit.metrics.frechet import FeatureStats
from digit.metrics.judge import LinearClassifier, collect_features, fd, fit_linear_classifier
from digit.metrics.neighbours import precision_recall
from digit.runs.report import load_judge, real_images, spread
from digit.runtime import plots
from digit.runtime.files import save_npy

NUM_TEST, NUM_TRAIN = 10_000, 10_000  # test images behind the distance; training images behind the classifier
SHOWN = 10  # samples of each class


class CifarJudge:
    """EfficientNet-Lite2 and a linear classifier on its features; features are kept in OUT/features."""

    def __init__(self, data: str, preprocess: PreprocessConfig, out: Path) -> None:
        self.out, self.judge = out, load_judge()
        self.source, self.test = open_source(data, split="train"), open_source(data, split="test")
        self.test_images, self.test_labels = real_images(self.test, preprocess, range(NUM_TEST))
        self.truth = self.features("test", lambda: self.test_images)
        path = out / "classifier.safetensors"
        if not path.exists():
            images, labels = real_images(self.source, preprocess, spread(len(self.source), NUM_TRAIN))
            fit_linear_classifier(self.features(f"train{NUM_TRAIN}", lambda: images), labels).save(path)
        self.classifier = LinearClassifier.load(path)

    def features(self, name: str, images: Callable[[], Tensor]) -> Tensor:
        """Judged features (N, D) of a named set of images (N, 3, H, W) uint8."""
        path = self.out / "features" / f"{name}.npy"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_npy(path, collect_features(images().split(64), self.judge.pooled).numpy())
        return torch.from_numpy(np.load(path))

    def figures(self, name: str, images: Callable[[], Tensor], labels: Tensor) -> dict[str, float]:
        """Distance to the test images, recall, and the share that is recognised as its class (of `labels`)."""
        found = self.features(name, images)
        _, recall = precision_recall(self.truth[: 4 * len(found)], found)
        return {
            "fd": round(fd(FeatureStats.of(found), FeatureStats.of(self.truth)), 1),
            "recall": round(float(recall), 3),
            "recognised": round(self.classifier.accuracy(found, labels[: len(found)]), 3),
        }


def save_class_rows(path: Path, images: Tensor, classes: Sequence[str]) -> None:
    """Write the first ten samples of each class, one row a class, of images (N, 3, H, W) whose classes take turns."""
    shown = torch.cat([images[k :: len(classes)][:SHOWN] for k in range(len(classes))])
    plots.save_png(path, plots.grid(shown, SHOWN, row_names=classes))
