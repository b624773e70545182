"""Training pictures that the page shows: examples of classes, patches of each token, nearest neighbours of samples.

Everything here runs in the thread of the model, step by step, so that it never keeps anybody waiting for long.

Shapes: N training pictures, S pixels, T discriminative tokens an image, D features of the judge.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from digit.data.crops import gather_crops
from digit.data.images import ImageSource
from digit.errors import DigitError
from digit.metrics.frechet import count_warnings
from digit.metrics.judge import METRIC, LinearClassifier, fd, fit_linear_classifier, judge_input
from digit.pipeline.pipeline import DigitPipeline

PICTURES, PICTURE_BYTES = 512, 64 * 2**20  # at most, of all together
STEP = 16  # pictures of one step
PATCHES = 24  # shown of a token
CONTEXT = 1.0  # cells of its surroundings on each side of a patch
NEAREST = 3
EXAMPLES = 120  # classes with a picture


@dataclass(frozen=True)
class Scale:
    """How far real pictures are from their nearest other real picture: quantiles of the distance."""

    low: float
    median: float
    high: float


class Atlas:
    """Some training pictures with their tokens, and on demand with the features of the judge.

    Args:
        pipe: gives tokens and the size of the crops.
        source: the training pictures; None where they are not at hand.
    """

    def __init__(self, pipe: DigitPipeline, source: ImageSource | None) -> None:
        self.pipe, self.source = pipe, source
        self.images = torch.empty(0, 3, pipe.image_size, pipe.image_size, dtype=torch.uint8)
        self.labels = torch.empty(0, dtype=torch.int64)
        self.tokens = torch.empty(0, 0, dtype=torch.int64)
        self.features = torch.empty(0, 0)
        self.judge: Any = None
        self._classifier: tuple[LinearClassifier, float] | None = None
        fitting = PICTURE_BYTES // (3 * pipe.image_size**2)
        self.wanted = self._places(min(PICTURES, fitting)) if source is not None else []

    def require(self) -> ImageSource:
        """The source. Raises DigitError without one."""
        if self.source is None:
            raise DigitError("the training pictures of this run are not here: start the studio with --data PATH")
        return self.source

    def _places(self, num: int) -> list[int]:
        """At most `num` pictures of the source, evenly spread."""
        total = len(self.require())
        return np.unique(np.linspace(0, total - 1, min(num, total)).astype(int)).tolist() if total else []

    # ---------------------------------------------------------------- steps

    def collect(self) -> Iterator[tuple[int, int]]:
        """Read and encode the pictures that are missing; yields (done, wanted) after each step."""
        source = self.require()
        while (done := len(self.images)) < len(self.wanted):
            part = self.wanted[done : done + STEP]
            try:
                images, labels = gather_crops(source.subset(part), self.pipe.preprocess)
            except DigitError:  # none of these can be read
                images, labels = self.images[:0], self.labels[:0]
            self.wanted = self.wanted[:done] + part[: len(images)] + self.wanted[done + len(part) :]
            if not len(images):
                continue
            if self.pipe.tokenizer is not None:
                tokens = self.pipe.tokenizer.encode(images).cpu()
                self.tokens = torch.cat([self.tokens, tokens]) if len(self.tokens) else tokens
            self.images, self.labels = torch.cat([self.images, images]), torch.cat([self.labels, labels])
            yield len(self.images), len(self.wanted)
        if not len(self.images):
            raise DigitError("none of the training pictures can be read: start the studio with --data PATH")

    def judge_all(self) -> Iterator[tuple[int, int]]:
        """Compute the judge's features that are missing; yields (done, wanted) after each step.

        Raises DigitError for fewer than two pictures, which have no distances from each other.
        """
        yield from self.collect()
        if len(self.images) < 2:
            raise DigitError("the judge compares training pictures with each other, and there is only one")
        if self.judge is None:
            from digit.runs.report import load_judge

            self.judge = load_judge().to(self.pipe.device)
        while (done := len(self.features)) < len(self.images):
            part = self.features_of(self.images[done : done + STEP])
            self.features = torch.cat([self.features, part]) if done else part
            yield len(self.features), len(self.images)

    def features_of(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, D) float32."""
        with torch.no_grad():
            return self.judge.pooled(judge_input(images)).float().cpu()

    # ---------------------------------------------------------------- what the page asks

    def patches(self, token: int) -> tuple[Tensor, int]:
        """Crops (P, 3, s, s) uint8 of the pictures around places with this token, and the number of all places."""
        assert self.pipe.tokenizer is not None
        (rows, columns), levels = self.pipe.tokenizer.grid, self.pipe.tokenizer.num_levels
        found = (self.tokens == token).nonzero().tolist() if len(self.tokens) else []
        size = self.pipe.image_size
        height, width = size / rows, size / columns
        side = min(size, round(max(height, width) * (1 + 2 * CONTEXT)))
        crops = []
        for image, token_place in spread(found, PATCHES):
            place = token_place // levels
            top = min(max(0, round((place // columns + 0.5) * height - side / 2)), size - side)
            left = min(max(0, round((place % columns + 0.5) * width - side / 2)), size - side)
            crops.append(self.images[image, :, top : top + side, left : left + side])
        return torch.stack(crops) if crops else self.images[:0, :, :side, :side], len(found)

    def scale(self) -> Scale:
        """The scale of distances in the judge's features. Needs `judge_all`."""
        distances = torch.cdist(self.features, self.features)
        distances.fill_diagonal_(float("inf"))
        nearest = distances.amin(1)
        low, median, high = nearest.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
        return Scale(low, median, high)

    def nearest(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(distances, numbers of the pictures), each (B, k), nearest first."""
        found = torch.cdist(features, self.features).topk(min(NEAREST, len(self.features)), largest=False)
        return found.values, found.indices

    def classifier(self) -> tuple[LinearClassifier, float] | None:
        """A linear classifier on the judge's features of the labelled pictures, and its accuracy on a quarter of them
        that it did not see; None where there are too few."""
        labelled = self.labels >= 0
        features, labels = self.features[labelled], self.labels[labelled]
        if len(labels) < 40 or len(labels.unique()) < 2 or int(labels.max()) + 1 > len(labels) // 4:
            return None
        if self._classifier is None:
            held = torch.arange(len(labels)) % 4 == 0
            fitted = fit_linear_classifier(features[~held], labels[~held])
            self._classifier = fitted, fitted.accuracy(features[held], labels[held])
        return self._classifier

    def distance(self, features: Tensor) -> dict[str, Any]:
        """The Fréchet distance of samples to the pictures, beside that of as many pictures to the others."""
        count = min(len(features), len(self.features) // 2)
        if count < 2:
            return {}
        chosen = torch.zeros(len(self.features), dtype=torch.bool)
        chosen[torch.linspace(0, len(self.features) - 1, count).long()] = True
        rest = self.features[~chosen]
        return {
            "name": METRIC,
            "value": fd(features[:count], rest),
            "real": fd(self.features[chosen], rest),
            "images": [count, len(rest)],
            "warnings": list(count_warnings(count, len(rest), dim=rest.shape[1])),
        }

    def examples(self) -> dict[int, Tensor]:
        """One training picture (3, S, S) of each class, at most EXAMPLES."""
        source = self.require()
        labels = source.labels()
        if labels is None or not self.pipe.classes:
            return {}
        known, first = np.unique(labels, return_index=True)
        pairs = [(int(k), int(i)) for k, i in zip(known, first, strict=True) if k >= 0][:EXAMPLES]
        found = {}
        for label, index in pairs:
            try:
                found[label] = gather_crops(source.subset([index]), self.pipe.preprocess)[0][0]
            except DigitError:
                continue
        return found

    def page(self, start: int, num: int) -> list[tuple[int, Tensor, int]]:
        """(number, picture (3, S, S), label) of `num` pictures from place `start` of an even spread over the source."""
        source = self.require()
        order = self._places(4096)
        found = []
        for index in spread(order, len(order))[start : start + num]:
            try:
                images, labels = gather_crops(source.subset([index]), self.pipe.preprocess)
            except DigitError:
                continue
            found.append((int(index), images[0], int(labels[0])))
        return found


def spread(entries: list[Any], num: int) -> list[Any]:
    """At most `num` entries, evenly apart."""
    if len(entries) <= num:
        return entries
    return [entries[int(place)] for place in np.linspace(0, len(entries) - 1, num)]
