"""Linear probes of a study's models and encoders: Table 2, Figure 3b, Acc@LP and Acc@OL of Figure 4a.

All ranks call these functions together: they share the rows or images, and rank 0 trains the classifiers. Neither
tokens nor features are held in memory as a whole where they are many. Each probe is a step of its own, and sgd keeps
its state (`evaluation.probe_state`), so that a reproduction that was killed repeats no probe, and little of one.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from digit.data.source import ImageSource
from digit.data.tokens import TokenStore
from digit.errors import DigitError
from digit.evaluation import probe as probing
from digit.evaluation import probed_features as of
from digit.evaluation.feature_files import LABELS, FeatureCache, discard
from digit.metrics.feature_rows import Features
from digit.metrics.probe import check_size
from digit.models.efficientnet import EfficientNet
from digit.models.sequence import SequenceModel
from digit.reproduce.experiment import Needs, Step
from digit.reproduce.study import BATCH_SIZE, Study
from digit.runs.fit import Run
from digit.runs.recipes import Recipe
from digit.runs.roles import get_role
from digit.runtime import distributed
from digit.runtime.files import sha256_tensors
from digit.runtime.progress import Progress
from digit.tokenizers.encoders import FrozenEncoder, load_encoder

MAX_ROWS = 2_000_000  # training rows of a probe: of ImageNet one crop an image, of small data sets every stored crop
ENCODING_BATCH = 64  # images
PRECISION = "bf16"
STATE_BYTES = 16  # of one weight of sgd: it and its momentum in float32, and both again while they are written

# -------------------------------------------------------------------- steps


def model_probe_step(study: Study, name: str, folder: str, model: str, recipe: Recipe, run: Callable[[], Run]) -> Step:
    """Step: linear probe of every layer of a model of a run, in OUT/probes/FOLDER; `recipe` is the run's."""
    size, classes = recipe.size(get_role(model)), len(study.train.classes)
    values, rows = (size.depth + 1) * size.embed_dim, num_rows(study)
    return Step(
        name=name,
        seconds=study.costs.probe(study.scale.probe, sum(rows), values, classes, model, recipe),
        make=lambda: probed(study, run(), model, study.out / "probes" / folder),
        needs=probe_needs(study, folder, rows, values),
        version=2,
    )


def encoder_probe_step(study: Study, name: str, folder: str, dim: int, run: Callable[[], Run]) -> Step:
    """Step: Acc@OL of the encoder of a run, in OUT/probes/FOLDER, of `dim` features in each layer."""
    rows = len(study.train), len(study.test)
    return Step(
        name=name,
        seconds=study.costs.probe_itself(study.scale.probe, sum(rows), 2 * dim, len(study.train.classes)),
        make=lambda: probe_itself(study, run(), study.out / "probes" / folder),
        needs=probe_needs(study, folder, rows, 2 * dim),
    )


def probe_needs(study: Study, folder: str, rows: tuple[int, int], values: int) -> Needs:
    """Room on the disk while a probe of `values` features runs: those of (training, test) rows, and sgd's state."""
    cfg = study.scale.probe
    features = sum(2 * num * values for num in rows if 4 * num * values > cfg.memory_budget_bytes)  # float16
    state = STATE_BYTES * values * len(study.train.classes) * len(cfg.settings) if cfg.solver == "sgd" else 0
    return Needs(passing=features + state, passing_folders=(f"probes/{folder}/features",))


def num_rows(study: Study) -> tuple[int, int]:
    """Rows of the token stores that a model's probe takes: (training, test)."""
    images = len(study.train)
    return images * crops_used(images, study.recipe.crops_per_image), len(study.test)


# -------------------------------------------------------------------- a model's layers


def probed(study: Study, run: Run, model: str, out: Path) -> dict[str, Any]:
    """Probe one model of a run on the training tokens and the test images' tokens."""
    kind, network = get_role(model).target, run.train_model(model)
    last = of.reads_last(study.scale.probe, released=False)
    crops, used = run.recipe.crops_per_image, crops_used(len(study.train), run.recipe.crops_per_image)
    check_size(study.scale.probe, len(study.train) * used, network.cfg.embed_dim)
    splits, weights = [], sha256_tensors(network.state_dict())
    for split, store in (("training", run.write_tokens()), ("test", study.test_tokens(run))):
        rows = np.arange(len(store))
        if split == "training":
            rows = (np.arange(len(store) // crops)[:, None] * crops + np.arange(used)).ravel()
        cache = FeatureCache(
            out / "features" / split,
            partial(dict, model=weights, tokens=store.manifest, rows=len(rows), last=last, precision=PRECISION),
            study.scale.probe.memory_budget_bytes,
        )
        splits.append(_of_tokens(cache, network, store, rows, kind, last, f"features, {split}"))
    (train, labels), (test, test_labels) = splits
    about = f"{used} at random (with flips) of each training image, one in the centre of a test image"
    if used < crops:
        about += f"; {crops} are stored"

    def finish() -> dict[str, Any]:
        result = probing.probe_features(
            {model: (train, test)}, labels, test_labels, study.scale.probe,
            out=out, notes={model: of.notes_on(network, last)}, about={"crops": about},
            groups=torch.arange(len(labels)) // used, device=study.device, states=out / "features",
        )  # fmt: skip
        discard(out / "features")
        return result["probes"][model] | {"protocol": result["protocol"]}

    return distributed.on_main(finish)


def crops_used(images: int, crops: int) -> int:
    """How many of the stored crops of each image a probe takes: all where the rows are few, at least one."""
    return max(1, min(crops, MAX_ROWS // images))


def _of_tokens(
    cache: FeatureCache, network: SequenceModel, store: TokenStore, rows: np.ndarray, kind: str, last: bool, title: str
) -> tuple[Features, Tensor]:
    """Features (R, L, D) and labels (R,) of some rows (R,) of a token store; rank 0 gets them."""
    share = distributed.share(len(rows), BATCH_SIZE)

    def batches() -> Iterator[dict[str, Tensor]]:
        with Progress(title, len(share)) as bar:
            for start in range(share.start, share.stop, BATCH_SIZE):
                batch = store.batch(rows[start : min(start + BATCH_SIZE, share.stop)])
                if (num := int((batch[LABELS] < 0).sum())) > 0:
                    raise DigitError(f"{num} images have no class: a probe needs one for each image")
                features = of.prior_features(
                    network, batch[kind], batch_size=BATCH_SIZE, precision=PRECISION, last_position=last
                )
                yield {LABELS: batch[LABELS], "features": features}
                bar.update(len(batch[LABELS]))

    found = cache.collect(batches, {"features": of.layers_of(network)}, len(rows))
    labels = found.pop(LABELS, torch.zeros(0, dtype=torch.int64))
    assert isinstance(labels, Tensor)
    return found.pop("features", torch.zeros(0, 1, 1)), labels


# -------------------------------------------------------------------- Acc@OL


def probe_itself(study: Study, run: Run, out: Path) -> dict[str, Any]:
    """Acc@OL, the usual linear probe of an encoder: of its last layer's class token (`FrozenEncoder.pooled`).

    Under "patches" stands the same of the mean over patches at the layer of the run's tokens.
    """
    cfg, whole, tokens, preprocess = study.scale.probe, whole_encoder(run), run.encoder, run.recipe.preprocess

    def features_of(images: Tensor) -> dict[str, Tensor]:
        patches = tokens.features(images).mean(1, keepdim=True)
        return {probing.POOLED: whole.pooled(images)[:, None], "patches": patches}

    blank = torch.zeros(1, 3, preprocess.crop_size, preprocess.crop_size, dtype=torch.uint8)
    sizes = {name: (1, one.shape[2]) for name, one in features_of(blank).items()}
    check_size(cfg, len(study.train), max(dim for _, dim in sizes.values()))
    encoders, splits = [whole.fingerprint, tokens.fingerprint], []
    for split, source in (("training", study.train), ("test", study.test)):
        request = partial(_request, source, encoders=encoders, crops=asdict(preprocess))
        cache = FeatureCache(out / "features" / split, request, cfg.memory_budget_bytes)
        title = f"encoder features, {split}"
        splits.append(of.collect_features(cache, features_of, sizes, source, source, preprocess, ENCODING_BATCH, title))
    (train, labels), (test, test_labels) = splits

    def finish() -> dict[str, Any]:
        result = probing.probe_features(
            {name: (train[name], test[name]) for name in sizes}, labels, test_labels, cfg,
            out=out, notes={probing.POOLED: [pooling_of(whole)], "patches": [PATCHES]}, device=study.device,
            about={"crops": "one in the centre of each image"}, states=out / "features",
        )  # fmt: skip
        discard(out / "features")
        return result["probes"][probing.POOLED] | {"patches": result["probes"]["patches"]}

    return distributed.on_main(finish)


PATCHES = "mean over the patches of the layer that the tokens are made of"


def pooling_of(encoder: FrozenEncoder) -> str:
    """What `pooled` is, for the results."""
    if isinstance(encoder.net, EfficientNet):
        return "mean of the head's channels"
    return "class token behind the last block and its norm, as in the encoders' published linear probes"


def _request(source: ImageSource, **settings: Any) -> dict[str, Any]:
    return settings | {"images": source.fingerprint}


def whole_encoder(run: Run) -> FrozenEncoder:
    """The encoder of a run up to its end, for `FrozenEncoder.pooled`."""
    return load_encoder(replace(run.recipe.encoder, layer="pooled")).to(run.device)
