"""What all experiments share: one data set, one scale, one folder; runs, test tokens and judged images by name.

OUT/study.json    scale, data, judge; the folder refuses other settings
OUT/runs/NAME/    `digit fit` runs; those that do not change codebook, VQGAN or tokens use those of `base`
OUT/test_images/  centre crops of the test images, memory-mapped
OUT/judged/NAME/  features of every judged image set, in parts

Several ranks (torchrun) share all of it: they call everything here together, in the same order.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digit.data.mapped_crops import mapped_crops
from digit.data.taken_tokens import crop_settings
from digit.data.token_writer import write_tokens
from digit.data.tokens import TokenStore
from digit.errors import DigitError
from digit.evaluation.cache import pipeline_key, remember_parts, request_key
from digit.evaluation.features import fingerprint
from digit.evaluation.networks import load_judge_network
from digit.evaluation.splits import labelled
from digit.metrics.judge import Judged, collect_judged, fd
from digit.metrics.scores import inception_score, splits_of
from digit.pipeline.labels import ClassPositions
from digit.pipeline.pipeline import DigitPipeline
from digit.reproduce.costs import Costs
from digit.reproduce.rehearsal import Cut
from digit.reproduce.scales import VARIANTS, Scale
from digit.reproduce.splits import open_splits
from digit.runs.claim import FREE_SETTING
from digit.runs.fit import Run, other_seed
from digit.runs.layout import RESULTS
from digit.runs.recipes import Recipe
from digit.runtime import distributed
from digit.runtime.files import as_path, plain, read_json, write_result
from digit.runtime.hardware import choose_device
from digit.runtime.lock import lock_folder
from digit.runtime.request import defaults_of, require_same_request
from digit.tokenizers.encoders import FrozenEncoder, load_encoder
from digit.tokenizers.vq import VQTokenizer, read_vqgan

PARTS = ("codebook", "vqgan", "tokens")
OF_A_RECIPE = re.compile(r"scale\.(recipe|short|longer|large|compared)\.")  # fields of a scale that hold a recipe
HOW_MODELS_SAMPLE = re.compile(r"recipe\.(sampling\.|masked_top_p|class_top_k)")
BATCH_SIZE, JUDGE_BATCH_SIZE = 250, 64  # of sampling where the recipe gives none; of judging


def variant(conditional: bool) -> str:
    """Start of the names of runs and steps: class for class-conditional models, plain for unconditional ones."""
    return "class" if conditional else "plain"


class Study:
    """What experiments share. Everything is made on first use and saved for the next.

    Args:
        data: what `open_source` takes; labelled for probes.
        scale: sizes and counts.
        out: folder of all experiments with this data and scale.
        reuse: folders of a finished run's codebook, vqgan and tokens.
        inception: weights of FID's network; None uses EfficientNet-Lite2, whose distances are not called FID.
        pixel_max: white in images of more than 8 bits, as of `open_source`.
        labels_from: where labels come from, as of `open_source`.
        test_split, every_fifth: other test images than the usual ones, as of `open_splits`.
        cuts: what a rehearsal cut from the scale (`rehearsal.rehearsed`); results say it.

    Attributes:
        notes: that reused tokens are of another seed, to tell the person.
    """

    def __init__(
        self,
        data: str,
        scale: Scale,
        out: str | Path,
        *,
        reuse: dict[str, str | Path] | None = None,
        inception: str | None = None,
        device: str | None = None,
        pixel_max: int | None = None,
        labels_from: str = "auto",
        test_split: str | None = None,
        every_fifth: bool = False,
        cuts: Sequence[Cut] = (),
    ):
        self.cuts = list(cuts)
        self.data, self.scale, self.out, self.device = data, scale, as_path(out), choose_device(device)
        chosen: dict[str, Any] = {"labels_from": labels_from, "test_split": test_split, "every_fifth": every_fifth}
        sources = open_splits(data, scale.num_train, scale.num_test, pixel_max, **chosen)
        self.train, self.test, self.tested_on = sources
        self.reuse, self.inception = dict(reuse or {}), inception
        least = 1 if scale.recipe.training_crops == "fresh" else -(-scale.min_rows // len(self.train))
        self.recipe = replace(scale.recipe, crops_per_image=max(scale.recipe.crops_per_image, least))
        distributed.on_main(self.check)
        tokens = as_path(self.reuse["tokens"]) if "tokens" in self.reuse else None
        self.notes: list[str] = distributed.on_main(lambda: other_seed(tokens, self.recipe))

    def require_labels(self, what: str) -> None:
        """Raise DigitError unless training and test images have classes."""
        for source in (self.train, self.test):
            if not labelled(source):
                raise DigitError(f"{source.name} has no classes: {what} needs them (one folder per class, or labels)")

    def validate(self) -> None:
        """Check, before anything is written, what would fail after hours: encoder, weights, folders to reuse."""
        for part, folder in self.reuse.items():
            if not (as_path(folder) / RESULTS[part]).is_file():
                raise DigitError(f"{folder} holds no {RESULTS[part]}: give the {part} folder of a run, RUN/{part}")
        if "tokens" not in self.reuse or "codebook" not in self.reuse:
            _ = self._encoder
        num_steps = self.recipe.vqgan_training.num_steps
        if self.recipe.vqgan_start == "scratch" and not num_steps and "vqgan" not in self.reuse:
            raise DigitError(f"scale {self.scale.name} trains no VQGAN: give one, --reuse_vqgan FOLDER")

    @cached_property
    def _encoder(self) -> FrozenEncoder:
        """The recipe's encoder, loaded once for all validations."""
        return load_encoder(self.recipe.encoder)

    @property
    def request(self) -> dict[str, Any]:
        """Everything besides the code that decides a result."""
        return plain(
            {
                "scale": asdict(self.scale),
                "train": self.train.fingerprint,
                "test": self.test.fingerprint,
                "judge": fingerprint(self.network),
                "reuse": {part: str(folder) for part, folder in self.reuse.items()},
            }
        )

    def check(self) -> None:
        """Raise MismatchError if the folder holds results of other settings."""
        path = self.out / "study.json"
        if not path.exists() or not any((self.out / "steps").glob("*.json")):  # no results to protect yet
            return
        existing, request = read_json(path), self.request
        require_same_request(
            self.out, existing, request, "choose another --out", changes_no_result, older_defaults(existing)
        )

    def claim(self) -> None:
        """Write study.json; from then on the folder takes these settings alone, but for those that change no result."""

        def write() -> None:
            self.check()
            lock_folder(self.out)
            write_result(self.out / "study.json", self.request)

        distributed.on_main(write)

    def describe(self) -> dict[str, Any]:
        """The scale with every setting, the data and the judge, for results.json."""
        return {
            "scale": self.scale.name,
            "config": asdict(self.scale) | {"recipe": asdict(self.recipe)},
            "data": {"train": self.train.name, "train_images": len(self.train), "test": self.test.name}
            | {"test_images": len(self.test), "tested_on": self.tested_on, "train_fingerprint": self.train.fingerprint},
            "judge": self.network.describe(),
            "seeds": list(self.scale.seeds),
            "ranks": distributed.world_size(),
            "rehearsal": [cut._asdict() for cut in self.cuts] or None,
        }

    # ---------------------------------------------------------------- runs

    @cached_property
    def base(self) -> Run:
        """The run whose codebook, VQGAN and tokens the other runs use; trained up to its tokens."""
        run = Run(self.recipe, self.train, self.out / "runs" / "base", reuse=self.reuse, device=str(self.device))
        run.write_tokens()
        return run

    def run(
        self,
        name: str = "base",
        *,
        shared: Sequence[str] = PARTS,
        reuse: Mapping[str, str | Path] | None = None,
        **changes: Any,
    ) -> Run:
        """A run by name with changed settings of the recipe; its `shared` parts are those of the base run, and `reuse`
        names folders of further parts and of models."""
        if name == "base" and not changes:
            return self.base
        folder: dict[str, str | Path] = {part: self.base.reuse.get(part, self.base.out / part) for part in shared}
        folder |= reuse or {}
        recipe: Recipe = replace(self.recipe, **changes)
        if "vqgan" in shared and "tokens" not in folder and self._base_has_vq_tokens_of(recipe):
            folder["vq_tokens"] = self.base.write_tokens().folder
        return Run(recipe, self.train, self.out / "runs" / name, reuse=folder, device=str(self.device))

    def _base_has_vq_tokens_of(self, recipe: Recipe) -> bool:
        """Whether a recipe with the base run's VQGAN makes the VQ tokens that the base run has."""
        made, crops = self.base.write_tokens().manifest, crop_settings(asdict(recipe.preprocess))
        same_order = (made["seed"], made["crops_per_image"]) == (recipe.seed, recipe.crops_per_image)
        return same_order and crop_settings(made["preprocessing"]) == crops

    def seeded(self, seed: int, *, conditional: bool = False) -> Run:
        """A run of the recipe with another seed, with or without classes, on the base run's tokens."""
        if seed == self.recipe.seed and conditional == self.recipe.class_conditional:
            return self.base
        return self.run(f"{variant(conditional)}_{seed}", seed=seed, class_conditional=conditional)

    @cached_property
    def costs(self) -> Costs:
        """Time estimates for this machine."""
        about = as_path(self.reuse["vqgan"]) / RESULTS["vqgan"] if "vqgan" in self.reuse else None
        return Costs(self.recipe, self.device, read_vqgan(about)[0] if about and about.is_file() else None)

    # ---------------------------------------------------------------- images

    @cached_property
    def test_images(self) -> Tensor:
        """Centre crops of the test images, (N, 3, S, S) uint8; memory-mapped, so that slices cost nothing."""
        return self._test[0]

    @cached_property
    def test_labels(self) -> Tensor:
        """(N,) int64, -1 = none."""
        return self._test[1]

    @cached_property
    def _test(self) -> tuple[Tensor, Tensor]:
        return mapped_crops(self.out / "test_images", self.test, self.recipe.preprocess)

    def some_test_images(self, num: int) -> Tensor:
        """`num` test images, spread evenly; all of them as they are mapped."""
        return self.test_images if num >= len(self.test_images) else self.test_images[self.places(num)]

    def places(self, num: int) -> Tensor:
        """Places of `num` test images, spread evenly, (num,) int64."""
        total = len(self.test_images)
        return torch.arange(min(num, total)) * total // min(num, total)

    def test_tokens(self, run: Run) -> TokenStore:
        """Both kinds of tokens of the test images' centre crops, from the tokenizers of a run."""
        centre = replace(self.recipe.preprocess, random_crop=False, flip=False)
        return write_tokens(run.out / "test_tokens", self.test, centre, run.tokenizer(), run.train_vqgan())

    # ---------------------------------------------------------------- judging

    @cached_property
    def network(self) -> Any:
        """The judge: FID's Inception network if its weights are given, else EfficientNet-Lite2."""
        return load_judge_network(self.inception, device=self.device)

    def judged(self, name: str, images: Callable[[int, int], Tensor], total: int) -> Judged:
        """Features of `total` images, cached under a name; `images(start, stop)` makes uint8 (stop - start, 3, S, S).

        Ranks share the parts, of one sampling batch each; at most one part is in memory at a time.
        """
        starts, size = range(0, total, self.batch_size), self.batch_size
        rows = [min(start + size, total) - start for start in starts]

        def make(part: int) -> dict[str, Tensor]:
            made = images(starts[part], starts[part] + rows[part])
            batches = made.split(JUDGE_BATCH_SIZE)
            return vars(collect_judged(batches, self.network, total=len(made), description=f"judge {name}"))

        paths = [self.out / "judged" / name / f"{start:07d}.safetensors" for start in starts]
        return Judged.cat([Judged(**part) for part in remember_parts(paths, make, rows)])

    def test_judged(self, name: str, change: Callable[[Tensor, int], Tensor], num: int) -> Judged:
        """Features of changed test images: `change(images, first)` of `num` of them, spread evenly, part by part."""
        places = self.places(num)
        return self.judged(name, lambda a, b: change(self.test_images[places[a:b]], a), len(places))

    @cached_property
    def reference(self) -> Judged:
        """The test images, judged."""
        return self.judged("test", lambda start, stop: self.test_images[start:stop], len(self.test_images))

    def scores(self, judged: Judged) -> dict[str, Any]:
        """Fréchet distance to the test images and inception score, each under the network's own name."""
        reference = self.reference
        return distributed.on_main(lambda: self._scores(judged, reference))

    def _scores(self, judged: Judged, reference: Judged) -> dict[str, Any]:
        num_splits = splits_of(len(judged))
        mean, deviation = inception_score(judged.logits, num_splits)
        return {
            self.network.metric("fd"): fd(judged.pooled, reference.pooled),
            self.network.metric("is"): mean,
            self.network.metric("is") + "_std": deviation if num_splits > 1 else None,  # one split has no deviation
            "images": len(judged.pooled),
        }

    @property
    def batch_size(self) -> int:
        """Images that are sampled together."""
        return self.recipe.sampling.batch_size or BATCH_SIZE

    def sampler(self, run: Run, prior: str | None, renderer: str) -> DigitPipeline:
        """A pipeline of a run's models that samples as the recipe says, in batches of one size on every machine."""
        pipe = run.make_pipeline(prior, renderer)
        pipe.sampling = replace(pipe.sampling, batch_size=self.batch_size)
        return pipe

    def reconstruct(self, vq: VQTokenizer, images: Tensor) -> Tensor:
        """VQGAN reconstructions (B, 3, S, S) uint8, decoded in the precision of the samples."""
        return vq.decode(vq.encode(images), "bf16" if self.recipe.sampling.precision == "bf16" else None)

    def samples(self, name: str, run: Run, prior: str | None, renderer: str, seed: int) -> Judged:
        """Sample and judge `num_samples` images; pictures/NAME_SEED.png shows up to 100 of the first batch.

        A conditional model samples the classes of the test images, in their proportions.
        """
        pipe, total = self.sampler(run, prior, renderer), self.scale.num_samples
        labels = self.test_labels[torch.arange(total) * len(self.test_labels) // total] if run.num_classes else None

        def generate(start: int, stop: int) -> Tensor:
            part_labels = None if labels is None else ClassPositions(labels[start:stop].tolist())
            images = pipe.generate(stop - start, part_labels, seed=1_000_000 * seed + start)
            if start == 0:
                shown = min(100, len(images))
                self.save_grid(f"{name}_{seed}", images[torch.arange(shown) * len(images) // shown])
            return images

        key = request_key(pipe=pipeline_key(pipe), sampling=asdict(pipe.sampling), seed=seed, num=total)
        return self.judged(f"{name}_{seed}_{key}", generate, total)

    def save_grid(self, name: str, images: Tensor) -> None:
        """Save images as a grid, ten per row, as OUT/pictures/NAME.png."""
        from digit.runtime import plots

        grid = plots.grid(images, 10, scale=max(1, 64 // images.shape[-1]))
        plots.save_png(self.out / "pictures" / f"{name}.png", grid)


def older_defaults(existing: Any) -> dict[str, Any]:
    """Defaults of the settings of a study.json that one by an older version lacks."""
    scale = existing.get("scale") if isinstance(existing, dict) else None
    made = [name for name, value in scale.items() if isinstance(value, dict)] if isinstance(scale, dict) else []
    recipes = dict.fromkeys([name for name in ("recipe", *VARIANTS) if name in made], defaults_of(Recipe))
    return {"scale": defaults_of(Scale) | recipes}


def changes_no_result(setting: str) -> bool:
    """Whether a setting of study.json may differ in a rerun: those of `digit fit`, but for how the models sample.

    Seeds may be added, and encoders be named later: each has steps and folders of its own.
    """
    if setting.startswith(("scale.seeds", "scale.encoders")):
        return True
    name = OF_A_RECIPE.sub("recipe.", setting)
    return bool(FREE_SETTING.fullmatch(name)) and not HOW_MODELS_SAMPLE.match(name)
