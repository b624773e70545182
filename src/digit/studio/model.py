"""What the studio does with the model: every method is a job, which runs in the thread of `Worker`.

Shapes: B pictures, N discriminative tokens, M VQ tokens, S pixels.
"""

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from digit.data.images import ImageSource
from digit.errors import DigitError
from digit.evaluation.paper import TABLE1
from digit.metrics.stability import StabilityConfig, add_noise
from digit.pipeline.cells import cell_grid, code_vectors, fill_cells, token_grid
from digit.pipeline.labels import ClassPositions
from digit.pipeline.pipeline import DigitPipeline
from digit.pipeline.steps import OnStep
from digit.pipeline.variations import draws_equally, usual_share, varied
from digit.runtime.files import sha256_tensors
from digit.runtime.plots import code_colours
from digit.runtime.version import __version__
from digit.studio import commands
from digit.studio.atlas import Atlas
from digit.studio.jobs import Job, Steps
from digit.studio.pictures import data_url, png, png_of, read_data_url, sheet
from digit.studio.requests import Complete, Draw, Encode, Judge, Noise, Render, Sampling, Variations

BATCH_SIZE = 16  # one size for every request, so that a seed gives the same picture whatever the count
STEP_SECONDS = 0.08  # between two token maps that are sent
GROWING_SHARE = 0.08  # of the time that decoding unfinished pictures may take
STAGES = ("prior", "renderer")
STAGE_SETTINGS = (
    "temperature", "top_k", "top_p", "cfg_scale", "cfg_schedule", "num_steps", "order", "choice_temperature",
)  # fmt: skip
NEAR_CODES = 12  # offered in place of a token
MOST_LOOKS = 16  # pictures decoded to see what VQ codes look like
QUICK_IMAGES, QUICK_STEP = 48, 4  # pictures of the curve that the page measures itself, and of one step of it
QUICK_SNRS = (30.0, 25.0, 20.0, 15.0, 10.0, 5.0, 1.0)


class Model:
    """The pipeline of one run, and what the page needs to know of it.

    Args:
        pipe: the pipeline.
        name: how the person who started the studio names it; shown in commands.
        source: its training pictures, or None.
        measured: what `digit stability` wrote for this run, or None.
        data: how commands on the page name the training pictures; None where that is not known, or not to be shown.
    """

    def __init__(
        self,
        pipe: DigitPipeline,
        name: str,
        source: ImageSource | None = None,
        measured: dict[str, Any] | None = None,
        data: str | None = None,
    ) -> None:
        self.pipe, self.name, self.measured, self.data = pipe, name, measured, data
        self.atlas = Atlas(pipe, source)
        self.batch_size = min(BATCH_SIZE, pipe.sampling.batch_size or BATCH_SIZE)
        weights = {s: sha256_tensors(m.state_dict()) for s in STAGES if (m := getattr(pipe, s)) is not None}
        vq = pipe.vq.fingerprint if pipe.vq is not None else ""
        self.fingerprint = "-".join([*(w[:8] for w in weights.values()), vq[:8]])
        self.taken = {stage: self._settings_of(stage) for stage in STAGES}
        self._palettes: dict[str, str] = {}
        self._painting: Steps | None = None  # the work on the palettes, once it has begun
        self._quick: dict[str, Any] | None = None
        self.decode_seconds = 0.0  # of one picture, as measured last; 0 before

    def _settings_of(self, stage: str) -> dict[str, Any]:
        """The recipe's value of each setting that a stage takes; {} for a missing stage."""
        found: dict[str, Any] = {}
        for name in STAGE_SETTINGS if getattr(self.pipe, stage) is not None else ():
            value = getattr(getattr(self.pipe.sampling, stage), name)
            try:
                self.pipe.settings(**{stage: {name: value}})
            except DigitError:
                continue
            found[name] = value
        return found

    def choices(self) -> dict[str, list[str]]:
        """The values of each setting that is a choice among names."""
        kinds = get_type_hints(type(self.pipe.sampling.prior))
        return {name: list(get_args(kinds[name])) for name in STAGE_SETTINGS if get_origin(kinds[name]) is Literal}

    def missing(self) -> dict[str, str]:
        """Why a part of the page has nothing to show, by part; a part that works is not named."""
        pipe, reasons = self.pipe, {}
        try:
            pipe.labels(1, None)
        except DigitError as error:
            reasons["draw"] = reasons["complete"] = reasons["judge"] = f"Nothing can be drawn: {error}."
        if not pipe.tokenizers:
            reasons["tokens"] = reasons["stability"] = reasons["complete"] = "This pipeline holds no tokenizer."
        if pipe.prior is not None and pipe.tokenizer is None:
            reasons["complete"] = "This pipeline holds no discriminative tokenizer, so that no picture can be read."
        if self.atlas.source is None:
            reasons.setdefault(
                "judge", "The training pictures of this run are not here: start the studio with --data PATH."
            )
        return reasons

    @property
    def varies(self) -> bool:
        """Whether equal discriminative tokens give another picture with another seed."""
        return self.pipe.renderer is not None and not draws_equally(self.pipe)

    def about(self) -> dict[str, Any]:
        """Everything that the page shows before anybody asks for anything."""
        pipe = self.pipe
        kinds = {stage: model.cfg.kind for stage in STAGES if (model := getattr(pipe, stage)) is not None}
        millions = {
            stage: round(sum(p.numel() for p in model.parameters()) / 1e6, 1)
            for stage in STAGES
            if (model := getattr(pipe, stage)) is not None
        }
        source, missing = self.atlas.source, self.missing()
        encoder = pipe.tokenizer.encoder.describe().get("name", "encoder") if pipe.tokenizer is not None else None
        return {
            "version": __version__,
            "run": self.name,
            "fingerprint": self.fingerprint,
            "recipe": pipe.info.get("recipe"),
            "device": str(pipe.device),
            "size": pipe.image_size,
            "classes": list(pipe.classes),
            "num_classes": pipe.num_classes,
            "unlabelled": "draw" not in missing and bool(pipe.num_classes) and pipe.knows_unlabelled,
            "tokenizers": {
                name: {"grid": list(token_grid(t)), "codes": t.vocab_size}
                for name, t in sorted(pipe.tokenizers.items())
            },
            "encoder": encoder,
            "cells": None if "complete" in missing else list(cell_grid(pipe)),
            "missing": missing,
            "kinds": kinds,
            "pixels": pipe.renders_pixels,
            "varies": self.varies,
            "kept_by_variations": usual_share(pipe),
            "millions": millions,
            "settings": self.taken,
            "choices": self.choices(),
            "guidance": {stage: stage in self.pipe.guided_stages for stage in STAGES},
            "batch_size": self.batch_size,
            "data": None if source is None else {"name": source.name.rpartition("/")[2], "num": len(source)},
            "stability": self.measured is not None,
            "opening": commands.opening(self.name),
        }

    # ---------------------------------------------------------------- helpers

    def sampling(self, request: Sampling) -> dict[str, Any]:
        """Keywords of `DigitPipeline.stream`. Raises DigitError for settings that this pipeline would ignore."""
        changes: dict[str, Any] = {}
        for stage in STAGES:
            given = getattr(request, stage).model_dump(exclude_none=True)
            for name in given:
                if name not in self.taken[stage]:
                    takes = ", ".join(self.taken[stage]) or "nothing"
                    raise DigitError(f"{stage}.{name} is given, but the {stage} of this run takes {takes}")
            if given:
                changes[stage] = given
        self.pipe.settings(**changes)
        return changes | {"batch_size": self.batch_size}

    def resolved(self, request: Sampling) -> dict[str, dict[str, Any]]:
        """The value of every setting of each stage."""
        return {
            stage: self.taken[stage] | getattr(request, stage).model_dump(exclude_none=True)
            for stage in STAGES
            if self.taken[stage]
        }

    def changes(self, request: Sampling) -> dict[str, dict[str, Any]]:
        """The settings that differ from the recipe's."""
        return commands.changed(self.resolved(request), self.taken)

    def class_name(self, label: int) -> str | None:
        """Name of a class, its number where it has none; None for no class."""
        if label < 0:
            return None
        return self.pipe.classes[label] if label < len(self.pipe.classes) else str(label)

    def picture(self, image: Tensor, about: dict[str, Any]) -> str:
        """A picture as the data URL of a PNG that carries what it was made with."""
        return data_url(png(image, {"digit": __version__, "model": self.fingerprint} | about))

    def watch(self, job: Job, first: Callable[[], int] = lambda: 0, *, growing: bool = True) -> OnStep:
        """A function for `on_step` that sends token maps, and now and then some of the unfinished pictures.

        `first` tells the number of the batch's first picture.
        """
        began = last_sent = time.monotonic() - STEP_SECONDS
        spent, turn = 0.0, 0

        def grown(tokens: Tensor) -> dict[str, Any]:
            """As many pictures as their share of the time allows; they take turns."""
            nonlocal spent, turn
            started = time.monotonic()
            free = GROWING_SHARE * (started - began) - spent
            num = min(len(tokens), int(free / self.decode_seconds)) if self.decode_seconds else 1
            if num < 1:
                return {}
            rows = [(turn + i) % len(tokens) for i in range(num)]
            image = data_url(png_of(sheet(self.unfinished(tokens[rows]))))
            seconds = time.monotonic() - started
            self.decode_seconds = (
                seconds / num if not self.decode_seconds else (self.decode_seconds + seconds / num) / 2
            )
            spent, turn = spent + seconds, turn + num
            return {"sheet": image, "rows": rows}

        def on_step(stage: str, tokens: Tensor) -> None:
            nonlocal last_sent
            if job.cancelled:
                job.emit("step")  # raises
            now = time.monotonic()
            if now - last_sent < STEP_SECONDS and bool((tokens < 0).any()):
                return
            last_sent = now
            more = grown(tokens) if growing and stage == "renderer" else {}
            job.emit("step", stage=stage, first=first(), tokens=tokens.tolist(), **more)

        return on_step

    @torch.no_grad()
    def unfinished(self, tokens: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) of VQ tokens (B, M) of which some are -1: their cells take those of the cell before.

        They are decoded without the padding by which the finished ones do not depend on their number.
        """
        assert self.pipe.vq is not None
        vq = self.pipe.vq
        cells = tokens.unflatten(1, (-1, vq.num_levels))  # (B, N, L)
        known = torch.where((cells >= 0).all(2), torch.arange(cells.shape[1]), -1).cummax(1).values
        before = known.clamp_min(0)[..., None].expand_as(cells)
        codes = cells.gather(1, before).clamp_min(0).flatten(1)
        return vq.to_pixels(vq.vqgan.decode_tokens(codes.to(self.pipe.device))).cpu()

    def labels_of(self, labels: Sequence[int]) -> ClassPositions | None:
        return ClassPositions(list(labels)) if labels else None

    def label_shown(self, label: int) -> ClassPositions | None:
        """A class for the renderer; None where it sees none, and for -1."""
        return ClassPositions([label]) if self.pipe.renderer_sees_labels and label >= 0 else None

    # ---------------------------------------------------------------- jobs

    def draw(self, job: Job, request: Draw) -> None:
        """New pictures, batch by batch: start, step ..., picture ..., and commands at the end."""
        sampling, labels = self.sampling(request), self.labels_of(request.labels)
        chosen = self.pipe.labels(request.num, labels).tolist()
        names = [self.class_name(label) for label in chosen]
        lines = commands.draw(
            self.name, num=request.num, seed=request.seed,
            labels=[self.class_name(label) or "none" for label in request.labels],
            changes=self.changes(request), batch_size=self.batch_size,
        )  # fmt: skip
        job.emit("start", num=request.num, seed=request.seed, labels=chosen, names=names, commands=lines)
        settings, done = self.resolved(request), 0
        on_step = self.watch(job, lambda: done)
        for batch in self.pipe.stream(request.num, labels, request.seed, on_step=on_step, **sampling):
            tokens = {name: rows.tolist() for name, rows in batch.tokens.items()}
            for row, image in enumerate(batch.images):
                index = batch.first + row
                seed = request.seed + index
                about = {"kind": "draw", "seed": seed, "label": chosen[index], "class": names[index]} | settings
                job.emit(
                    "picture", index=index, seed=seed, label=chosen[index], name=names[index],
                    image=self.picture(image, about), tokens={name: rows[row] for name, rows in tokens.items()},
                )  # fmt: skip
            done += len(batch)

    def complete(self, job: Job, request: Complete) -> None:
        """Proposals that keep some cells of a picture."""
        image = read_data_url(request.picture, self.pipe.image_size)
        rows, columns = cell_grid(self.pipe)
        if len(request.keep) != rows or any(len(row) != columns for row in request.keep):
            raise DigitError(f"the cells to keep are no grid of {rows} x {columns}: load the page again")
        label = None if request.label is None else self.labels_of([request.label])
        name = None if request.label is None else self.class_name(request.label)
        lines = commands.complete(
            self.name, keep=request.keep, num=request.num, seed=request.seed, label=name,
            changes=self.changes(request), batch_size=self.batch_size,
        )  # fmt: skip
        job.emit("start", num=request.num, seed=request.seed, commands=lines)
        done = fill_cells(
            self.pipe, image[None], torch.tensor(request.keep), num=request.num, seed=request.seed, label=label,
            on_step=self.watch(job, growing=False), **self.sampling(request),
        )  # fmt: skip
        settings, used = self.resolved(request), self.class_name(done.label)
        for row in range(request.num):
            about = {"kind": "complete", "seed": request.seed + row, "label": done.label, "class": used} | settings
            job.emit(
                "picture", index=row, seed=request.seed + row, label=done.label, name=used,
                image=self.picture(done.blended[row], about), decoded=self.picture(done.images[row], about),
            )  # fmt: skip

    def vary(self, job: Job, request: Variations) -> None:
        """The picture rendered again from its discriminative tokens, with other seeds; from half of them and others
        that the prior samples, where equal tokens give equal pictures."""
        self.pipe.require("tokenizer", "renderer")
        image = read_data_url(request.picture, self.pipe.image_size)
        lines = commands.vary(
            self.name, num=request.num, seed=request.seed, changes=self.changes(request), batch_size=self.batch_size
        )
        job.emit("start", num=request.num, seed=request.seed, commands=lines)
        watch = self.watch(job, growing=self.varies)  # half of the tokens are the prior's, which shows no picture
        how: dict[str, Any] = {"num": request.num, "seed": request.seed, "on_step": watch}
        for batch in varied(self.pipe, image[None], **how, **self.sampling(request)):
            self._emit_pictures(job, batch.images, batch.tokens, request.seed, request, "variation", first=batch.first)

    def render(self, job: Job, request: Render) -> None:
        """A picture of given discriminative tokens."""
        self.pipe.require("tokenizer", "renderer")
        tokens, seed = torch.tensor([request.tokens], dtype=torch.int64), request.seed
        label, sampling = self.label_shown(request.label), self.sampling(request)
        lines = commands.render(
            self.name, seed=seed, label=None if label is None else self.class_name(request.label),
            changes=self.changes(request), batch_size=self.batch_size,
        )  # fmt: skip
        job.emit("start", num=len(tokens), seed=seed, commands=lines)
        if self.pipe.renders_pixels:
            images, kinds = self.pipe.render(tokens, seed, labels=label, **sampling), {"discriminative": tokens}
        else:
            vq = self.pipe.render_tokens(tokens, seed, labels=label, on_step=self.watch(job), **sampling)
            images, kinds = (
                self.pipe.decode(vq, self.pipe.settings(**sampling).precision),
                {"discriminative": tokens, "vq": vq},
            )
        self._emit_pictures(job, images, kinds, seed, request, "tokens")

    def _emit_pictures(
        self,
        job: Job,
        images: Tensor,
        kinds: Mapping[str, Tensor],
        seed: int,
        request: Sampling,
        kind: str,
        first: int = 0,
    ) -> None:
        """Pictures number `first` and on, with the tokens of each kind that they were drawn from."""
        for row, image in enumerate(images):
            index, tokens = first + row, {name: rows[row].tolist() for name, rows in kinds.items()}
            about = {"kind": kind, "seed": seed + index, "tokens": tokens["discriminative"]} | self.resolved(request)
            job.emit("picture", index=index, seed=seed + index, image=self.picture(image, about), tokens=tokens)

    def encode(self, job: Job, request: Encode) -> None:
        """The tokens of a picture by both tokenizers, and what each of them gives back."""
        image = read_data_url(request.picture, self.pipe.image_size)[None]
        found = {name: tokenizer.encode(image).cpu() for name, tokenizer in self.pipe.tokenizers.items()}
        sees = self.pipe.renderer_sees_labels and self.pipe.prior is not None and "discriminative" in found
        label = int(self.pipe.guess_labels(image)[0]) if sees else -1
        job.emit(
            "tokens", tokens={name: t[0].tolist() for name, t in found.items()}, label=label,
            commands=commands.tokens(self.name, list(found)),
        )  # fmt: skip
        if "vq" in found:
            job.emit("rebuilt", tokenizer="vq", image=data_url(png(self.pipe.decode(found["vq"])[0])))
        renderer = self.pipe.renderer if self.pipe.renders_pixels or self.pipe.vq is not None else None
        if "discriminative" in found and renderer is not None and renderer.cfg.prefix_len:
            shown = self.label_shown(label)
            images = self.pipe.render(found["discriminative"], 0, labels=shown, batch_size=self.batch_size)
            job.emit("rebuilt", tokenizer="discriminative", image=data_url(png(images[0])))

    def noise(self, job: Job, request: Noise) -> None:
        """The tokens of a noisy picture, beside those of the clean one."""
        image = read_data_url(request.picture, self.pipe.image_size)[None]
        noisy = add_noise(image, request.snr, cfg=StabilityConfig(seed=request.seed))
        tokens = {}
        for name, tokenizer in self.pipe.tokenizers.items():
            clean, changed = tokenizer.encode(torch.cat([image, noisy])).cpu()
            tokens[name] = {"clean": clean.tolist(), "noisy": changed.tolist()}
        lines = commands.stability(self.name, self.data or "DATA", request.snr, request.seed, list(tokens))
        job.emit("noisy", snr=request.snr, image=data_url(png(noisy[0])), tokens=tokens, commands=lines)

    # ---------------------------------------------------------------- jobs on the training pictures

    def palettes(self, job: Job) -> None:
        """A colour of each code: discriminative ones by their vectors, VQ ones as they look in pictures."""
        for _ in self.prepare(job):
            if job.cancelled:
                job.emit("palettes")  # raises
        job.emit("palettes", **self._palettes)

    @property
    def painted(self) -> bool:
        """Whether the palettes are made."""
        return len(self._palettes) == len(self.pipe.tokenizers)

    def prepare(self, job: Job) -> Steps:
        """Make the palettes before anybody asks for them, where there is time. A slow job."""
        while not self.painted:
            if self._painting is None:
                self._painting = self._paint()
            if next(self._painting, self) is self:  # it ended, or had failed before
                self._painting = None
            yield

    def _paint(self) -> Steps:
        for name, tokenizer in self.pipe.tokenizers.items():
            few = -(-tokenizer.vocab_size // math.prod(tokenizer.grid)) <= MOST_LOOKS
            if name == "vq" and few and self.pipe.vq is not None and self.pipe.vq.num_levels == 1:
                colours = yield from self._looks()
            else:
                vectors = code_vectors(tokenizer)
                with torch.random.fork_rng([]):
                    torch.manual_seed(0)
                    colours = code_colours(vectors.cpu())
            self._palettes[name] = bytes(colours.to(torch.uint8).flatten().tolist()).hex()
            yield

    def _looks(self, rounds: int = 2) -> Generator[None, None, Tensor]:
        """The mean colour (K, 3) of each VQ code, decoded among random other codes."""
        assert self.pipe.vq is not None
        vq, (rows, columns) = self.pipe.vq, self.pipe.vq.grid
        num, cells = vq.vocab_size, rows * columns
        total, generator = torch.zeros(num, 3), torch.Generator().manual_seed(0)
        count = -(-num // cells)
        for _ in range(rounds):
            order = torch.randperm(num, generator=generator)
            codes, means = order.repeat(1 + count * cells // num)[: count * cells].view(count, cells), []
            for part in codes.split(vq.decoded_together):
                pixels = vq.decode(part).cpu().float()  # (C, 3, S, S)
                means.append(
                    torch.nn.functional.adaptive_avg_pool2d(pixels, (rows, columns)).flatten(2).transpose(1, 2)
                )
                yield
            total[codes.flatten()[:num]] += torch.cat(means).flatten(0, 1)[:num]
        return (total / rounds).round()

    def examples(self, job: Job) -> None:
        """One training picture of each class, side by side."""
        found = self.atlas.examples()
        size = min(64, self.pipe.image_size)
        small = [
            torch.nn.functional.interpolate(x[None].float(), size=(size, size), mode="area")[0] for x in found.values()
        ]
        images = (
            torch.stack(small).round().to(torch.uint8) if small else torch.empty(0, 3, size, size, dtype=torch.uint8)
        )
        job.emit("examples", labels=list(found), size=size, sheet=data_url(png_of(sheet(images))) if small else None)

    def training_pictures(self, job: Job, start: int, num: int) -> None:
        """Some training pictures."""
        for index, image, label in self.atlas.page(start, num):
            job.emit("picture", index=index, label=label, name=self.class_name(label), image=data_url(png(image)))

    def patches(self, job: Job, token: int) -> Steps:
        """Patches of training pictures that have a discriminative token. A slow job."""
        self.pipe.require("tokenizer")
        assert self.pipe.tokenizer is not None
        if not 0 <= token < self.pipe.tokenizer.vocab_size:
            raise DigitError(f"token {token} is none of the {self.pipe.tokenizer.vocab_size} codes")
        for done, total in self.atlas.collect():
            job.emit("progress", done=done, total=total, text="reading training pictures")
            yield
        vectors = code_vectors(self.pipe.tokenizer)
        near = (vectors - vectors[token]).square().sum(1).topk(min(NEAR_CODES + 1, len(vectors)), largest=False).indices
        crops, count = self.atlas.patches(token)
        image = data_url(png_of(sheet(crops))) if len(crops) else None
        job.emit(
            "patches", token=token, count=count, shown=len(crops), pictures=len(self.atlas.images), sheet=image,
            near=[code for code in near.tolist() if code != token][:NEAR_CODES],
        )  # fmt: skip

    def judge(self, job: Job, request: Judge) -> Steps:
        """Nearest training pictures, share recognised and distance of some pictures. A slow job."""
        images = torch.stack([read_data_url(text, self.pipe.image_size) for text in request.pictures])
        for done, total in self.atlas.judge_all():
            job.emit("progress", done=done, total=total, text="the judge looks at training pictures")
            yield
        parts = []
        for part in images.split(16):
            parts.append(self.atlas.features_of(part))
            yield
        features = torch.cat(parts)
        distances, places = self.atlas.nearest(features)
        scale = self.atlas.scale()
        yield
        found: list[dict[str, Any]] = [
            {
                "nearest": [
                    {
                        "distance": float(d),
                        "image": data_url(png(self.atlas.images[i])),
                        "name": self.class_name(int(self.atlas.labels[i])),
                    }
                    for d, i in zip(distances[row], places[row], strict=True)
                ]
            }
            for row in range(len(images))
        ]
        result: dict[str, Any] = {"scale": vars(scale), "pictures": len(self.atlas.images)}
        if (fitted := self.atlas.classifier()) is not None and self.pipe.num_classes:
            classifier, accuracy = fitted
            probabilities = classifier.logits(features).softmax(-1)
            predicted = probabilities.argmax(-1).tolist()
            for row, label in enumerate(predicted):
                found[row] |= {"seen": self.class_name(label), "sure": float(probabilities[row, label])}
            labels = request.labels
            if len(labels) == len(images) and all(label >= 0 for label in labels):
                right = [a == b for a, b in zip(predicted, labels, strict=True)]
                for row, same in enumerate(right):
                    found[row]["recognised"] = same
                result["recognised"] = sum(right) / len(right)
            result["accuracy"] = accuracy
        yield
        result["distance"] = self.atlas.distance(features)
        job.emit("judged", results=found, **result)

    def curve(self, job: Job) -> Steps:
        """Token change by SNR: what `digit stability` measured, else measured here on a few pictures. A slow job."""
        if self.measured is not None:
            job.emit("curve", **measured_curve(self.measured))
            return
        if self._quick is None:
            for done, total in self.atlas.collect():
                job.emit("progress", done=done, total=total, text="reading training pictures")
                yield
            images = self.atlas.images[:: max(1, len(self.atlas.images) // QUICK_IMAGES)][:QUICK_IMAGES]
            sums = {name: torch.zeros(len(QUICK_SNRS)) for name in self.pipe.tokenizers}
            for first in range(0, len(images), QUICK_STEP):
                part = images[first : first + QUICK_STEP]
                noisy = [add_noise(part, snr, cfg=StabilityConfig(), first=first) for snr in QUICK_SNRS]
                for name, tokenizer in self.pipe.tokenizers.items():
                    clean, *others = tokenizer.encode(torch.cat([part, *noisy])).cpu().split(len(part))
                    sums[name] += torch.stack([(other != clean).float().mean(1).sum() for other in others])
                job.emit("progress", done=min(first + QUICK_STEP, len(images)), total=len(images), text="adding noise")
                yield
            names = [name for name in self.pipe.tokenizers if name in TABLE1]
            self._quick = {
                "paper": {"snrs": list(TABLE1["snr"]), "curves": {n: list(TABLE1[n]["token_change"]) for n in names}},
                "snrs": list(QUICK_SNRS),
                "curves": {name: (total / len(images)).tolist() for name, total in sums.items()},
                "images": len(images),
                "source": "page",
            }
        job.emit("curve", **self._quick)


def measured_curve(measured: dict[str, Any]) -> dict[str, Any]:
    """The curves of a stability.json: ours and the paper's. Raises DigitError where it holds none."""
    try:
        protocol = measured["protocol"]
        snrs = [float(snr) for snr in protocol["snrs"]]
        curves = {
            str(name): [float(point["value"]) for point in found["token_change"]]
            for name, found in measured["tokenizers"].items()
        }
        found = {"snrs": snrs, "curves": curves, "images": int(protocol["num_images"]), "source": "run"}
        paper = measured.get("paper") or {}
        if protocol.get("unit") == "db" and "snr" in paper:
            lines = {name: list(map(float, paper[name]["token_change"])) for name in curves if name in paper}
            found["paper"] = {"snrs": [float(snr) for snr in paper["snr"]], "curves": lines}
        return found
    except (KeyError, TypeError, ValueError) as error:
        raise DigitError(f"stability.json of this run is damaged ({error!r}): run digit stability again") from error
