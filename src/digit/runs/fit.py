"""From images to a pipeline, stage by stage, in one run folder; a stage that is done is read, not made again.

OUT/config.json   the whole configuration; a rerun with another one is refused
OUT/codebook/     stage codebook      frozen encoder + K-means
OUT/vqgan/        stage vqgan         trained, or the carried asset
OUT/tokens/       stage tokens        discriminative and VQ tokens of the same crops
OUT/MODEL/        stages prior, renderer (and the baselines): log.jsonl, checkpoints, model.safetensors
OUT/pipeline/     what DigitPipeline.from_pretrained reads

Several ranks (torchrun) make a stage together, in a folder that all of them see. Whether a stage is there is for rank 0
to say, and what all of them made is for rank 0 to write: a shared file system may show a file late.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from digit.runtime import distributed
from digit.data.images import ImageSource, open_source
from digit.data.loader import CachedCrops
from digit.data.token_writer import write_tokens
from digit.data.tokens import TokenBatches, TokenStore
from digit.errors import DigitError, MismatchError
from digit.runtime.files import differences, plain, read_json, remove_leftovers, write_json
from digit.runtime.lock import lock_folder
from digit.pipeline.manifest import load_sequence_model, save_sequence_model
from digit.models.perceptual import EncoderDistance
from digit.models.sequence import SequenceModel, training_flops
from digit.models.vqgan import VQGAN
from digit.pipeline.pipeline import DigitPipeline
from digit.runtime.hardware import choose_device
from digit.runs.recipes import MODEL_NAMES, Recipe
from digit.tokenizers.discriminative import Codebook, DiscriminativeTokenizer, fit_codebook
from digit.tokenizers.encoders import EncoderConfig, FrozenEncoder, load_encoder
from digit.tokenizers.vq import VQTokenizer, load_asset_vqgan
from digit.training.config import TrainConfig
from digit.training.vqgan import train_vqgan
from digit.training.sequence import train_sequence_model
from digit.training.log import last_metrics

MIN_IMAGES = 2
MAX_VALIDATION_ROWS = 256
ASSET_RESOLUTION = 64  # px
RESULTS = {"codebook": "codebook.json", "vqgan": "vqgan.json", "tokens": "manifest.json"}  # written last in each stage
# settings that change no result, or only what is drawn afterwards
FREE_SETTING = re.compile(
    r"data\.name|recipe\.(name|max_bad_fraction|sampling\..*"
    r"|.*\.(log_every|save_every|keep_checkpoints|keep_best|tensorboard|accumulate|checkpoint_activations|compile"
    r"|parallel|max_skipped|deterministic))"
)


class Run:
    """One run folder: every part is made on first use and found again afterwards.

    Args:
        recipe: the full configuration.
        data: what `open_source` takes, or a source.
        out: the run folder.
        split: split of a Hub-layout data set; by default train where there is one.
        reuse: folders of another run's parts, by stage name ("codebook", "vqgan", "tokens").
        device: cpu or cuda.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: str | ImageSource,
        out: str | Path,
        *,
        split: str | None = None,
        reuse: dict[str, str | Path] | None = None,
        device: str | None = None,
    ):
        self.recipe, self.out = seeded(recipe), Path(out)
        self.reuse = {stage: Path(folder) for stage, folder in (reuse or {}).items()}
        for stage, folder in self.reuse.items():
            if not (folder / RESULTS[stage]).is_file():
                raise DigitError(f"{folder} holds no {RESULTS[stage]}: give the {stage} folder of a run, RUN/{stage}")
        self.device = choose_device(device)
        self.source = open_source(data, split=split) if isinstance(data, str) else data
        if len(self.source) < MIN_IMAGES:
            raise DigitError(f"{self.source.name} holds {len(self.source)} image: training needs at least {MIN_IMAGES}")
        self._check_sizes()
        distributed.on_main(self._claim_folder)

    def _check_sizes(self) -> None:
        """Refuse now what would only show after hours."""
        recipe = self.recipe
        if "vqgan" not in self.reuse:
            size = recipe.vqgan.resolution if recipe.vqgan_start == "scratch" else ASSET_RESOLUTION
            if recipe.preprocess.crop_size != size:
                raise DigitError(
                    f"crops are {recipe.preprocess.crop_size} px, the VQGAN takes {size}: "
                    f"set preprocess.image_size to {size}, or choose another VQGAN"
                )
        if recipe.vqgan_start == "scratch" and not recipe.vqgan_training.num_steps and "vqgan" not in self.reuse:
            raise DigitError(
                "vqgan_start is scratch and vqgan_training.num_steps 0: an untrained VQGAN renders nothing"
            )
        processes = distributed.world_size()
        sizes = {name: getattr(recipe, f"{name}_training") for name in ("prior", "renderer")}
        pieces = {name: (cfg.batch_size, processes * cfg.accumulate) for name, cfg in sizes.items()}
        if recipe.vqgan_training.num_steps and "vqgan" not in self.reuse:
            pieces["vqgan"] = recipe.vqgan_training.batch_size, processes
        for name, (batch_size, number) in pieces.items():
            if batch_size % number:
                raise DigitError(
                    f"{name}_training.batch_size {batch_size} cannot be cut into {number} equal pieces "
                    f"({processes} processes x accumulate): give a multiple"
                )
        for name in MODEL_NAMES:  # heads, dropouts, vocabularies
            recipe.sequence_config(
                name,
                discriminative_vocab_size=recipe.kmeans.num_clusters,
                discriminative_len=1,
                vq_vocab_size=1,
                vq_len=1,
                num_classes=self.num_classes,
            )

    @property
    def num_classes(self) -> int:
        """Classes the models are conditioned on; 0 is none."""
        return len(self.source.classes) if self.recipe.class_conditional else 0

    def _claim_folder(self) -> None:
        """Lock the folder; write config.json, or compare with what is there as far as results exist that it made."""
        wanted = {
            "recipe": asdict(self.recipe),
            "data": {"name": self.source.name, "fingerprint": self.source.fingerprint},
        }
        lock_folder(self.out)
        places = [self.out / name for name in (*RESULTS, *MODEL_NAMES)]
        remove_leftovers(self.out, *places, *(place / "checkpoints" for place in places))
        path = self.out / "config.json"
        made = [*(f"{stage}/{result}" for stage, result in RESULTS.items()), *(f"{m}/model.json" for m in MODEL_NAMES)]
        if path.exists() and any((self.out / result).exists() for result in made):
            before = read_json(path)
            before["recipe"] = merged(plain(asdict(Recipe())), before["recipe"])  # younger settings
            for name, here, asked in differences(before, plain(wanted)):
                if FREE_SETTING.fullmatch(name):
                    continue
                raise MismatchError(
                    f"{self.out} was made with {name} = {here}, now asked for {asked}: "
                    "choose another --out, or the old setting"
                )
        if not path.exists() or read_json(path) != plain(wanted):
            write_json(path, wanted)

    # ---------------------------------------------------------------- stages

    @cached_property
    def encoder(self) -> FrozenEncoder:
        """The frozen encoder of the recipe."""
        return load_encoder(self.recipe.encoder).to(self.device)

    @cached_property
    def codebook(self) -> Codebook:
        """Stage codebook."""
        folder = self.reuse.get("codebook", self.out / "codebook")
        if not distributed.on_main((folder / "codebook.json").exists):
            codebook = fit_codebook(
                self.source,
                replace(self.recipe.preprocess, path=self.recipe.codebook_path),
                self.encoder,
                self.recipe.kmeans,
                subset=self.recipe.codebook_subset,
                seed=self.recipe.seed,
                max_bad_fraction=self.recipe.max_bad_fraction,
                across_ranks=True,
                folder=folder,
            )
            distributed.on_main(lambda: codebook.save(folder))
        return Codebook.load(folder).to(self.device)

    @cached_property
    def tokenizer(self) -> DiscriminativeTokenizer:
        """Encoder and codebook together."""
        return DiscriminativeTokenizer(self.encoder, self.codebook)

    @cached_property
    def vq(self) -> VQTokenizer:
        """Stage vqgan."""
        folder = self.reuse.get("vqgan", self.out / "vqgan")
        if not distributed.on_main((folder / "vqgan.json").exists):
            self._train_vqgan(folder)
        vq = VQTokenizer.load(folder)
        vq.vqgan.to(self.device)
        return vq

    def _train_vqgan(self, folder: Path) -> None:
        recipe = self.recipe
        torch.manual_seed(recipe.seed)
        start = recipe.vqgan_start
        vqgan = VQGAN(recipe.vqgan) if start == "scratch" else load_asset_vqgan(start).vqgan
        if recipe.vqgan_training.num_steps:
            crops = CachedCrops(
                self.source, recipe.preprocess, seed=recipe.seed, max_bad_fraction=recipe.max_bad_fraction
            )
            size = recipe.vqgan_training.batch_size
            train_vqgan(
                vqgan.to(self.device),
                lambda step: crops.batch(step, size)[0],
                recipe.vqgan_training,
                folder,
                perceptual=self._encoder_distance() if recipe.vqgan_training.perceptual == "encoder" else None,
            )
        distributed.on_main(lambda: VQTokenizer(vqgan).save(folder))

    def _encoder_distance(self) -> EncoderDistance:
        """The perceptual distance in EfficientNet-Lite0's features; the judge is another network, Lite2."""
        lite0 = load_encoder(EncoderConfig(name="efficientnet_lite0", layer="pooled", input_size=128))
        return EncoderDistance(lite0.net).to(self.device)

    @cached_property
    def tokens(self) -> TokenStore:
        """Stage tokens; checked against codebook and VQGAN."""
        if "tokens" in self.reuse:
            store = TokenStore.open(self.reuse["tokens"])
        else:
            store = write_tokens(
                self.out / "tokens",
                self.source,
                self.recipe.preprocess,
                self.tokenizer,
                self.vq,
                crops_per_image=self.recipe.crops_per_image,
                seed=self.recipe.seed,
                max_bad_fraction=self.recipe.max_bad_fraction,
            )
        store.check(codebook_hash=self.tokenizer.fingerprint, vqgan_hash=self.vq.fingerprint)
        made_of = store.manifest["source"]["fingerprint"]
        if made_of != self.source.fingerprint:
            raise MismatchError(
                f"tokens in {store.folder} are of images {made_of[:12]}, {self.source.name} is "
                f"{self.source.fingerprint[:12]}: give that data, or other tokens"
            )
        return store

    def model(self, name: str) -> SequenceModel:
        """Stage prior, renderer, renderer_masked, vq_ar or vq_masked: trained, or read where it is done."""
        folder = self.out / name
        tokens = {"tokenizer": self.tokenizer.fingerprint, "vqgan": self.vq.fingerprint}
        if not distributed.on_main((folder / "model.json").exists):
            torch.manual_seed(self.recipe.seed)
            model = SequenceModel(self.sequence_config(name)).to(self.device)
            if self.recipe.informed_start:
                self._inform(name, model)
            cfg = self.training_config(name)
            about = asdict(model.cfg) | {"tokens": tokens}
            validate = self.validation(name) if self.recipe.validation_fraction else None
            train_sequence_model(
                model, self.batches(name, cfg), cfg, folder,
                about=about, validate=validate, flops_per_image=training_flops(model.cfg), description=name,
            )  # fmt: skip
            distributed.on_main(lambda: self._save_model(model, folder, tokens))
        for part, here, asked in differences(read_json(folder / "tokens.json"), tokens):
            raise MismatchError(
                f"{folder} learnt tokens of {part} {here[:12]}, now {asked[:12]}: give that one, or delete {folder}"
            )
        return load_sequence_model(folder, "model").to(self.device)

    @staticmethod
    def _save_model(model: SequenceModel, folder: Path, tokens: dict[str, str]) -> None:
        write_json(folder / "metrics.json", last_metrics(folder))
        write_json(folder / "tokens.json", tokens)
        save_sequence_model(model, folder, "model")

    def _inform(self, name: str, model: SequenceModel) -> None:
        """Start a model's tables from what its tokens stand for."""
        codes = {"discriminative": self.codebook.centroids, "vq": self.vq.vqgan.quantize.embedding.weight.detach()}
        grids = {"discriminative": tuple(self.tokenizer.grid), "vq": tuple(self.vq.grid)}
        target = "discriminative" if name == "prior" else "vq"
        model.start_from_codes(codes[target], codes["discriminative"])
        model.start_from_places(grids[target], grids["discriminative"])

    def sequence_config(self, name: str) -> Any:
        """SequenceConfig of a model, from the tokens at hand."""
        tokens = self.tokens
        return self.recipe.sequence_config(
            name,
            discriminative_vocab_size=self.tokenizer.vocab_size,
            discriminative_len=tokens.discriminative.shape[1],
            vq_vocab_size=self.vq.vocab_size,
            vq_len=tokens.vq.shape[1],
            num_classes=self.num_classes,
        )

    def training_config(self, name: str) -> TrainConfig:
        """TrainConfig of a model. A VQ-only baseline trains as long as prior and renderer together (equal FLOPs)."""
        recipe = self.recipe
        if name == "prior":
            return recipe.prior_training
        if name.startswith("renderer"):
            return recipe.renderer_training
        cost = {n: training_flops(self.sequence_config(n)) for n in ("prior", "renderer", name)}
        total = sum(
            cost[n] * t.num_steps * t.batch_size
            for n, t in (("prior", recipe.prior_training), ("renderer", recipe.renderer_training))
        )
        num_steps = round(total / (cost[name] * recipe.renderer_training.batch_size))
        return replace(recipe.renderer_training, num_steps=num_steps)

    def batches(self, name: str, cfg: TrainConfig) -> "ModelBatches":
        """step -> {"target", "prefix", "labels"} for one of MODEL_NAMES, from tokens in RAM."""
        labelled = bool(self.sequence_config(name).num_classes)
        wanted = {"discriminative": not name.startswith("vq"), "vq": name != "prior", "labels": labelled}
        rows, names = np.flatnonzero(~self.held_out_rows()), [n for n, is_wanted in wanted.items() if is_wanted]
        read = self.tokens.batches(cfg.batch_size, seed=self.recipe.seed, rows=rows, names=names)
        return ModelBatches(read, partial(self._arguments, name, labelled=labelled))

    def _arguments(self, name: str, rows: dict[str, torch.Tensor], labelled: bool) -> dict[str, Any]:
        """Rows of the token store as keywords of `SequenceModel.loss`, not yet on the device."""
        target = rows["discriminative"] if name == "prior" else rows["vq"]
        prefix = rows["discriminative"] if name.startswith("renderer") else None
        return {"target": target, "prefix": prefix, "labels": rows["labels"] if labelled else None}

    def held_out_rows(self) -> np.ndarray:
        """bool (R,): rows kept out of training: every 1 / validation_fraction-th image, with all its crops."""
        images = np.arange(len(self.tokens)) // self.recipe.crops_per_image
        if not self.recipe.validation_fraction:
            return np.zeros(len(images), dtype=bool)
        return images % max(2, round(1 / self.recipe.validation_fraction)) == 0

    def validation(self, name: str) -> Callable[[SequenceModel], dict[str, float]]:
        """model -> {"val_nll"}: nats per token on the held-out images, the same rows and masks every time."""
        rows = np.flatnonzero(self.held_out_rows())
        chosen = rows[np.linspace(0, len(rows) - 1, min(MAX_VALIDATION_ROWS, len(rows))).astype(int)]
        batch = self._arguments(name, self.tokens.batch(chosen), bool(self.sequence_config(name).num_classes))
        batch = {name: None if value is None else value.to(self.device) for name, value in batch.items()}

        def validate(model: SequenceModel) -> dict[str, float]:
            noise = model.noise(batch, torch.Generator(self.device).manual_seed(0))
            return {"val_nll": float(model.loss(**batch, **noise)[1]["nll"])}

        return validate

    # ---------------------------------------------------------------- the whole

    def pipeline(self, prior: str | None = "prior", renderer: str | None = None) -> DigitPipeline:
        """A pipeline of this run's models; prior None is a VQ-only baseline."""
        if renderer is None:
            renderer = "renderer" if self.recipe.renderer_kind == "ar" else "renderer_masked"
        return DigitPipeline(
            tokenizer=self.tokenizer if prior else None,
            vq=self.vq,
            prior=self.model(prior) if prior else None,
            renderer=self.model(renderer),
            preprocess=self.recipe.preprocess,
            classes=self.source.classes if self.recipe.class_conditional else (),
            sampling=self.recipe.sampling,
            info={"recipe": self.recipe.name, "data": self.source.name},
        )

    def stages(self) -> Sequence[tuple[str, Callable[[], Any]]]:
        """Stage names and what makes each, in order."""
        renderer = "renderer" if self.recipe.renderer_kind == "ar" else "renderer_masked"
        return [
            ("codebook", lambda: self.codebook),
            ("vqgan", lambda: self.vq),
            ("tokens", lambda: self.tokens),
            ("prior", lambda: self.model("prior")),
            (renderer, lambda: self.model(renderer)),
        ]


@dataclass(frozen=True)
class ModelBatches:
    """`batches(step)` -> keywords of a model's loss; `batches.rows(step)` -> the rows of the token store in it."""

    read: TokenBatches
    arguments: Callable[[dict[str, torch.Tensor]], dict[str, Any]]

    def __call__(self, step: int) -> dict[str, Any]:
        return self.arguments(self.read(step))

    def rows(self, step: int) -> np.ndarray:
        return self.read.rows(step)


def fit(run: Run) -> DigitPipeline:
    """Run every stage that is not done and write OUT/pipeline; returns the pipeline."""
    for _, make in run.stages():
        make()
    pipe = run.pipeline()
    distributed.on_main(lambda: pipe.save_pretrained(run.out / "pipeline"))
    return pipe


def seeded(recipe: Recipe) -> Recipe:
    """The recipe with its one seed in every part."""
    return replace(
        recipe,
        kmeans=replace(recipe.kmeans, seed=recipe.seed),
        vqgan_training=replace(recipe.vqgan_training, seed=recipe.seed),
        prior_training=replace(recipe.prior_training, seed=recipe.seed),
        renderer_training=replace(recipe.renderer_training, seed=recipe.seed),
    )


def merged(defaults: Any, given: Any) -> Any:
    """`given` with what it lacks, at any depth, out of `defaults`."""
    if not (isinstance(defaults, dict) and isinstance(given, dict)):
        return given
    return defaults | {key: merged(defaults.get(key), value) for key, value in given.items()}


__all__ = ["MODEL_NAMES", "Run", "differences", "fit"]
