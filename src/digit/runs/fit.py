"""From images to a pipeline, stage by stage, in one run folder; a stage that is done is read, not made again.

OUT/config.json   the whole configuration; a rerun with another one is refused
OUT/codebook/     stage codebook      frozen encoder + quantizer
OUT/vqgan/        stage vqgan         trained, or the carried asset
OUT/tokens/       stage tokens        discriminative and VQ tokens of the same crops
OUT/MODEL/        stages prior, renderer (and the baselines): log.jsonl, checkpoints, model.safetensors
OUT/pipeline/     what DigitPipeline.from_pretrained reads

Several ranks (torchrun) make a stage together, in a folder that all of them see. Rank 0 alone checks whether a stage is
done, and writes its result, because a shared file system can show new files late.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from digit.data.epochs import AllBut
from digit.data.fresh import FreshCrops
from digit.data.images import ImageSource, as_source
from digit.data.loader import CachedCrops, read_rows
from digit.data.token_writer import write_tokens
from digit.data.tokens import MAX_VOCAB, TokenStore
from digit.errors import DigitError, MismatchError
from digit.models.efficientnet import EfficientNet
from digit.models.perceptual import EncoderDistance
from digit.models.pixels import PixelRenderer
from digit.models.sequence import SequenceConfig, SequenceModel, training_flops
from digit.models.vqgan import VQGAN, VQGANConfig
from digit.pipeline.manifest import load_sequence_model, save_sequence_model
from digit.pipeline.pipeline import DigitPipeline
from digit.runs.batches import (
    Annealed,
    Arguments,
    Batches,
    FreshBatches,
    ModelBatches,
    NoisyInputs,
    NoisyPrefix,
    RandomOrder,
)
from digit.runs.changes import continue_training, find_vq_tokens
from digit.runs.checks import (
    check_levels,
    check_recipe,
    check_reuse,
    check_robustness,
    chosen_settings,
    vqgan_config,
)
from digit.runs.claim import claim_folder, settings_of
from digit.runs.codebook_quality import QUALITY, measure_quality
from digit.runs.layout import RESULTS, REUSABLE, is_done
from digit.runs.previews import Previews
from digit.runs.recipe import ModelSpec, Recipe, TokenSpace
from digit.runs.roles import Role, get_role, loss_arguments
from digit.runtime import distributed
from digit.runtime.files import as_path, plain, read_json, write_json
from digit.runtime.hardware import choose_device
from digit.runtime.paths import nearest
from digit.runtime.progress import Stages
from digit.runtime.request import defaults_of, require_same_request
from digit.sampling.kinds import get_kind
from digit.tokenizers.base import Quantizer
from digit.tokenizers.discriminative import DiscriminativeTokenizer, fit_codebook
from digit.tokenizers.encoders import EncoderConfig, FrozenEncoder, load_encoder
from digit.tokenizers.quantizers import load_quantizer
from digit.tokenizers.vq import Origin, VQTokenizer, load_asset_vqgan, read_vqgan, with_levels
from digit.training.adversarial import AdversarialConfig
from digit.training.config import LoopConfig, TrainConfig
from digit.training.log import last_metrics
from digit.training.pixels import train_pixels
from digit.training.sequence import image_flops, train_sequence_model
from digit.training.vqgan import train_vqgan

MAX_VALIDATION_ROWS = 256
VALIDATED = ("nll", "l1", "psnr")  # metrics of a loss that are logged of held-out images
NEAR_CODES = 8  # that a noisy prefix, or a noisy input, takes for each code
COMPARED_TOGETHER = 8192  # codes with all others: 512 MB of distances for the 16,384 of a large VQGAN


class Run:
    """One run folder. Its verbs (fit_codebook, train_vqgan, write_tokens, train_model) make a part, or read it where it
    is done; nothing else starts work.

    Args:
        recipe: the full configuration.
        data: what `open_source` takes, or a source.
        out: the run folder.
        split: split of a Hub-layout data set; by default train where there is one.
        reuse: folders of another run's parts, by name ("codebook", "vqgan", "tokens"), and of its models (names of
            ROLES), which must be of the same tokens, shape and classes. "vq_tokens" is the tokens' folder of a run with
            the same crops and VQGAN, whose VQ tokens alone are taken.
        device: cpu or cuda.
        chosen: dotted names of the settings that somebody chose, which are refused where the run would not use them; by
            default those in which the recipe differs from the registered one of its name.
        reuse_unchanged: where `out` holds a run with other settings, keep the stages that these do not touch and move
            the others into OUT/earlier (`runs.changes`). False refuses other settings.
        lengthened: the record of `runs.changes.with_more`, for a run that goes on for more updates.

    Attributes:
        notes: what changed in the folder because of other settings, and that reused tokens are of another seed, to tell
            the person.

    Raises DigitError for settings that cannot work, MismatchError where `out` holds a run with other settings.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: str | Path | ImageSource,
        out: str | Path,
        *,
        split: str | None = None,
        reuse: dict[str, str | Path] | None = None,
        device: str | None = None,
        chosen: Sequence[str] | None = None,
        reuse_unchanged: bool = False,
        lengthened: Mapping[str, Any] | None = None,
    ):
        self.recipe, self.out = recipe.with_seed(), as_path(out)
        if "crops_per_image" not in (chosen or ()):
            self.recipe = self.recipe.without_equal_crops()
        self.reuse = {stage: as_path(folder) for stage, folder in (reuse or {}).items()}
        for stage, folder in self.reuse.items():
            made_by = REUSABLE.get(stage, stage)
            result = RESULTS.get(made_by, "model.json")
            if not (folder / result).is_file():
                what = f"holds no {result}" if folder.exists() else f"does not exist{nearest(folder)}"
                raise DigitError(f"{folder} {what}: give the {made_by} folder of a run, RUN/{made_by}")
        if {"tokens", "vq_tokens"} <= set(self.reuse):
            raise DigitError("the tokens that are reused hold VQ tokens: leave out --reuse_vq_tokens")
        self.device = choose_device(device)
        self.source = as_source(data, split=split)
        self._check(chosen_settings(self.recipe) if chosen is None else chosen)
        self._parts: dict[str, Any] = {}  # what the stages made, as read back from their folders
        self.notes: list[str] = distributed.on_main(
            lambda: [
                *claim_folder(
                    self.out, self.recipe, self.source, reuse_unchanged=reuse_unchanged, lengthened=lengthened
                ),
                *other_seed(self.reuse.get("tokens"), self.recipe),
            ]
        )

    def _check(self, chosen: Sequence[str]) -> None:
        """Refuse now what would only show after hours."""
        check_reuse(self.recipe, self.reuse)
        check_recipe(
            self.recipe,
            chosen=chosen,
            reuse={stage: settings_of(folder) for stage, folder in self.reuse.items() if stage in RESULTS},
            vqgan=self._vqgan_config(),
            num_images=len(self.source),
            num_classes=self.num_classes,
            num_processes=distributed.world_size(),
            gpu=self.device.type != "cpu",
        )
        made = {part for part in ("codebook", "vqgan") if self.is_done(part)}
        needed = {"codebook"} | ({"vqgan"} if self.recipe.has_vqgan else set())
        if "tokens" in self.reuse and (missing := needed - made):
            part = min(missing)
            raise DigitError(
                f"tokens are reused, but the {part} that they were made with is not: add --reuse_{part} "
                f"{self.reuse['tokens'].parent / part}"
            )

    def _vqgan_config(self) -> VQGANConfig:
        """Sizes of the VQGAN that this run trains, starts from or reuses."""
        if "vqgan" not in self.reuse:
            return vqgan_config(self.recipe)
        cfg = read_vqgan(self.reuse["vqgan"] / RESULTS["vqgan"])[0]
        if cfg.vocab_size > MAX_VOCAB:
            raise DigitError(
                f"the VQGAN in {self.reuse['vqgan']} has {cfg.vocab_size} codes, and models are trained on at most "
                f"{MAX_VOCAB}: reuse another one"
            )
        return cfg

    @property
    def num_classes(self) -> int:
        """Classes the models are conditioned on; 0 is none."""
        return len(self.source.classes) if self.recipe.class_conditional else 0

    # ---------------------------------------------------------------- stages

    @cached_property
    def encoder(self) -> FrozenEncoder:
        """The frozen encoder of the recipe."""
        return load_encoder(self.recipe.encoder).to(self.device)

    def _folder(self, stage: str) -> Path:
        """Folder of a stage: another run's where it is reused."""
        return self.reuse.get(stage, self.out / stage)

    def is_done(self, stage: str) -> bool:
        """Whether the stage's result is there; rank 0 looks, since a shared file system may show a file late."""
        return distributed.on_main(lambda: is_done(self._folder(stage), stage))

    def fit_codebook(self) -> Quantizer:
        """Stage codebook: fit the quantizer, or read it where it is done."""
        if "codebook" not in self._parts:
            folder = self._folder("codebook")
            if not self.is_done("codebook"):
                codebook = fit_codebook(
                    self.source,
                    replace(self.recipe.preprocess, path=self.recipe.codebook_path),
                    self.encoder,
                    self.recipe.quantizer_cfg,
                    subset=self.recipe.codebook_subset,
                    seed=self.recipe.seed,
                    max_bad_fraction=self.recipe.max_bad_fraction,
                    across_ranks=True,
                    folder=folder,
                )
                distributed.on_main(lambda: self._save_codebook(codebook.to(self.device), folder))
            codebook = load_quantizer(folder).to(self.device)
            DiscriminativeTokenizer(self.encoder, codebook)  # refuses a reused codebook of another encoder
            self._parts["codebook"] = codebook
        return self._parts["codebook"]

    def _save_codebook(self, codebook: Quantizer, folder: Path) -> None:
        """Measure what the codebook's tokens keep, and write it."""
        tokenizer, recipe = DiscriminativeTokenizer(self.encoder, codebook), self.recipe
        codebook.meta[QUALITY] = measure_quality(
            tokenizer, self.source, recipe.preprocess, seed=recipe.seed, probe=recipe.codebook_probe
        )
        codebook.save(folder)

    def train_vqgan(self) -> VQTokenizer:
        """Stage vqgan: train the VQGAN, or read it where it is done."""
        if "vqgan" not in self._parts:
            folder = self._folder("vqgan")
            if not self.is_done("vqgan"):
                self._train_vqgan(folder)
            self._parts["vqgan"] = VQTokenizer.load(folder).to(self.device)
        return self._parts["vqgan"]

    def _train_vqgan(self, folder: Path) -> None:
        recipe = self.recipe
        torch.manual_seed(recipe.seed)
        start = recipe.vqgan_start
        carried = None if start == "scratch" else load_asset_vqgan(start)
        cfg = vqgan_config(recipe)
        vqgan = VQGAN(cfg) if carried is None else with_levels(carried.vqgan, cfg.num_levels)
        vqgan.cfg = cfg  # an included one takes the size of the crops
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
                preview=self._previews("vqgan", recipe.vqgan_training),
            )
        origin = self._vqgan_origin(carried.origin if carried else Origin())
        distributed.on_main(lambda: VQTokenizer(vqgan, origin=origin).save(folder))

    def _vqgan_origin(self, start: Origin) -> Origin:
        """What is recorded of the VQGAN that this run trains from a start, or takes as it is."""
        if not self.recipe.vqgan_training.num_steps:
            return start
        data = Path(self.source.name).name
        if not start.name:
            return Origin(name="trained by digit fit", data=data)
        return replace(start, name=f"{start.name}, trained further by digit fit", data=f"{start.data}, then {data}")

    def _encoder_distance(self) -> EncoderDistance:
        """The perceptual distance in EfficientNet-Lite0's features; the judge is another network, Lite2."""
        lite0 = load_encoder(EncoderConfig(name="efficientnet_lite0", layer="pooled", input_size=128))
        assert isinstance(lite0.net, EfficientNet)
        return EncoderDistance(lite0.net).to(self.device)

    def write_tokens(self) -> TokenStore:
        """Stage tokens: encode every crop, or open the store where it is done; checked against codebook and VQGAN.

        Without VQ tokens where no model of the pipeline predicts any.
        """
        if "tokens" in self._parts:
            return self._parts["tokens"]
        tokenizer, vq = self.tokenizer(), self.train_vqgan() if self.recipe.has_vq_tokens else None
        if "tokens" in self.reuse:
            store = TokenStore.open(self.reuse["tokens"])
            wanted = plain(
                {"crops_per_image": self.recipe.crops_per_image, "preprocessing": self.recipe.preprocess.described()}
            )
            require_same_request(
                store.folder, {n: store.manifest[n] for n in wanted}, wanted, "give those, or other tokens"
            )
        else:
            store = write_tokens(
                self.out / "tokens",
                self.source,
                self.recipe.preprocess,
                tokenizer,
                vq,
                crops_per_image=self.recipe.crops_per_image,
                seed=self.recipe.seed,
                max_bad_fraction=self.recipe.max_bad_fraction,
                vq_tokens=self.reuse.get("vq_tokens") or distributed.on_main(self._earlier_vq_tokens),
            )
        store.check(codebook_hash=tokenizer.fingerprint, vqgan_hash=vq and vq.fingerprint)
        existing = store.manifest["source"]["fingerprint"]
        if existing != self.source.fingerprint:
            raise MismatchError(
                f"tokens in {store.folder} are of images {existing[:12]}, {self.source.name} is "
                f"{self.source.fingerprint[:12]}: give that data, or other tokens"
            )
        self._parts["tokens"] = store
        return store

    def _earlier_vq_tokens(self) -> Path | None:
        """The tokens that another codebook replaced in this folder, whose VQ tokens are still right."""
        return find_vq_tokens(self.out, self.recipe)

    def tokenizer(self) -> DiscriminativeTokenizer:
        """Encoder and codebook together; fits the codebook where it is not done."""
        return DiscriminativeTokenizer(self.encoder, self.fit_codebook())

    def train_model(self, name: str) -> SequenceModel:
        """Stage of one of ROLES: train the model, or read it where it is done."""
        check_levels(name, self._vqgan_config())
        folder, tokens = self._folder(name), self._read_by(get_role(name))
        if name in self.reuse:
            self._require_same_model(name, folder)
        elif not self.is_done(name):
            check_robustness(self.recipe, name)
            torch.manual_seed(self.recipe.seed)
            cfg = self.sequence_config(name)
            model = get_kind(cfg.kind).model(cfg).to(self.device)
            if self.recipe.informed_start:
                self._inform(name, model)
            metrics = self._train(name, model, folder, asdict(model.cfg) | {"tokens": tokens})
            model.end_random_order()
            distributed.on_main(lambda: self._save_model(model, folder, tokens, metrics))
        made_with, wanted = read_json(folder / "tokens.json"), tokens
        if isinstance(made_with, dict) and not tokens.keys().isdisjoint(made_with):  # older runs name unread parts
            wanted = {part: fingerprint for part, fingerprint in tokens.items() if part in made_with}
            made_with = {part: made_with[part] for part in wanted}
        require_same_request(folder, made_with, wanted, f"give that one, or delete {folder}")
        return load_sequence_model(folder, "model").to(self.device)

    def _read_by(self, role: Role) -> dict[str, str]:
        """Fingerprints of what a model's training reads: {"tokenizer": discriminative tokens, "vqgan": VQ tokens}."""
        read = {"tokenizer": self.tokenizer().fingerprint} if "discriminative" in role.tokens else {}
        from_decoder = role.target == "pixels" and self.recipe.has_vqgan
        return read | ({"vqgan": self.train_vqgan().fingerprint} if "vq" in role.tokens or from_decoder else {})

    def _train(self, name: str, model: SequenceModel, folder: Path, about: dict[str, Any]) -> dict[str, float]:
        """Train a model in place; returns what was measured after the last step, beside the log's last metrics."""
        training = self.training_config(name)
        usual = defaults_of(type(model.cfg))
        distributed.on_main(lambda: continue_training(folder, self.out, training.num_steps, about["tokens"], usual))
        validate = self.validation(name) if self.recipe.validation_fraction else None
        with closing(self.training_batches(name, training)) as batches:
            if isinstance(training, TrainConfig):
                train_sequence_model(
                    model, batches, training, folder,
                    about=about, validate=validate, preview=self._previews(name, training),
                    flops_per_image=self.flops_per_image(name), description=name,
                    codes=self.code_vectors(name) if training.code_weights else None,
                )  # fmt: skip
                return {}
            assert isinstance(model, PixelRenderer)
            if self.recipe.pixels.start == "vqgan":
                model.start_from_vqgan(self.train_vqgan().vqgan)
            perceptual = self._encoder_distance() if training.perceptual == "encoder" else None
            return train_pixels(
                model, batches, training, folder,
                about=about, perceptual=perceptual, validate=validate, preview=self._previews(name, training),
                description=name,
            )  # fmt: skip

    def _previews(self, stage: str, cfg: LoopConfig) -> Previews | None:
        """What makes the pictures of a stage in training; None without, and where no process has the whole model."""
        sharded = isinstance(cfg, TrainConfig) and cfg.parallel == "fsdp" and distributed.world_size() > 1
        return Previews(self, stage, cfg.num_steps) if self.recipe.previews and not sharded else None

    def _require_same_model(self, name: str, folder: Path) -> None:
        """Raise MismatchError where a reused model has another shape than this run's would have."""
        cfg = self.sequence_config(name).trained
        wanted = plain(cfg.to_dict())
        existing, advice = read_json(folder / "model.json"), f"leave it out, and train a {name}"
        require_same_request(folder, existing, wanted, advice, defaults=defaults_of(type(cfg)))

    @staticmethod
    def _save_model(model: SequenceModel, folder: Path, tokens: dict[str, str], metrics: dict[str, float]) -> None:
        write_json(folder / "metrics.json", last_metrics(folder) | metrics)
        write_json(folder / "tokens.json", tokens)
        save_sequence_model(model, folder, "model")

    def _inform(self, name: str, model: SequenceModel) -> None:
        """Start a model's tables from what its tokens stand for."""
        role, tokenizer = get_role(name), self.tokenizer()
        codebook = tokenizer.codebook
        if codebook.num_levels == 1:
            codes = {"discriminative": codebook.embed(torch.arange(codebook.vocab_size))}
        else:
            codes = {"discriminative": start_rows(codebook.level_vectors)}
        grids = {"discriminative": tokenizer.grid}
        if role.target == "vq":
            vq = self.train_vqgan()
            codes["vq"], grids["vq"] = start_rows(vq.level_vectors), vq.grid
        target = "discriminative" if role.target == "pixels" else role.target  # pixels have no codes: it takes none
        model.start_from_codes(codes[target], codes["discriminative"])
        model.start_from_places(grids[target], grids["discriminative"])

    def sequence_config(self, name: str) -> SequenceConfig:
        """SequenceConfig of a model, from the tokens at hand; makes the tokens where they are not done."""
        tokens = self.write_tokens()
        assert tokens.discriminative is not None  # a run's store holds them
        own = self.tokenizer()
        length = tokens.discriminative.shape[1]
        spaces = {"discriminative": TokenSpace(own.vocab_size, length, own.grid[0], own.num_levels)}
        if self.recipe.has_vq_tokens and tokens.vq is not None:
            vq = self.train_vqgan()
            spaces["vq"] = TokenSpace(vq.vocab_size, tokens.vq.shape[1], vq.grid[0], vq.num_levels)
        elif get_role(name).target == "vq":
            raise DigitError(
                f"{name} predicts VQ tokens, and {tokens.folder} holds none, since renderer_kind is or was pixels: "
                "train it in another --out, with another renderer_kind"
            )
        vqgan = self._vqgan_config()
        return self.recipe.sequence_config(name, spaces, num_classes=self.num_classes, vqgan=vqgan)

    def training_config(self, name: str) -> TrainConfig | AdversarialConfig:
        """Training settings of a model. One that replaces others trains for as many FLOPs as they do together."""
        role = get_role(name)
        cfg = self.recipe.training(role)
        if not role.replaces:
            return cfg
        total = sum(self._training_flops(replaced) for replaced in role.replaces)
        return replace(cfg, num_steps=round(total / (self.flops_per_image(name) * cfg.batch_size)))

    def _training_flops(self, name: str) -> float:
        cfg = self.recipe.training(get_role(name))
        return self.flops_per_image(name) * cfg.num_steps * cfg.batch_size

    def flops_per_image(self, name: str) -> float:
        """FLOPs of one training image of a sequence model, with what only its training has."""
        cfg, training = self.sequence_config(name), self.recipe.training(get_role(name))
        if not (isinstance(training, TrainConfig) and training.code_weights):
            return training_flops(cfg)
        return image_flops(cfg, training, self.code_vectors(name).shape[-1])

    def code_vectors(self, name: str) -> torch.Tensor:
        """(L, V, C) float32: what each code of a model's target tokens stands for, as its tokenizer has it."""
        if get_role(name).target == "discriminative":
            return self.fit_codebook().level_vectors.float()
        return self.train_vqgan().level_vectors

    def batches(self, name: str, cfg: LoopConfig) -> Batches:
        """step -> {"target", "prefix", "labels"} for one of ROLES, from stored tokens or from fresh crops."""
        role, labelled = get_role(name), bool(self.sequence_config(name).num_classes)
        arguments = partial(loss_arguments, role, labelled=labelled)
        images = AllBut(self.write_tokens().num_images, self.held_out_every)
        if self.recipe.training_crops == "fresh":
            return self._fresh_batches(role, cfg, images, arguments)
        names = [*role.tokens, *(["labels"] if labelled else [])]
        read = self.write_tokens().batches(cfg.batch_size, seed=self.recipe.seed, images=images, names=names)
        return ModelBatches(read, arguments, self.crops_of if role.target == "pixels" else None)

    def training_batches(self, name: str, cfg: LoopConfig) -> Batches:
        """`batches` with the noise and the orders of the model's settings."""
        role, batches, own = get_role(name), self.batches(name, cfg), self.sequence_config(name)
        size, seed = self.recipe.size(role), self.recipe.seed
        length = cfg.num_steps, cfg.batch_size, seed
        if role.prefix and size.prefix_noise:
            batches = NoisyPrefix(batches, near_codes(self.fit_codebook()), size.prefix_noise, *length)
        if isinstance(cfg, TrainConfig) and cfg.input_noise:
            vectors = self.code_vectors(name)
            near = near_vectors(vectors) if cfg.input_noise_codes == "near" else None
            batches = NoisyInputs(batches, near, vectors.shape[1], cfg.input_noise, *length)
        if own.random_order and isinstance(size, ModelSpec):
            start, end = (round(fraction * cfg.num_steps) for fraction in size.random_order_anneal)
            rate = Annealed(size.random_order, start, end)
            batches = RandomOrder(batches, rate, own.target_places, cfg.batch_size, seed)
        return batches

    def _fresh_batches(self, role: Role, cfg: LoopConfig, images: AllBut, arguments: Arguments) -> Batches:
        crops = FreshCrops(
            self.source, self.recipe.preprocess,
            batch_size=cfg.batch_size, seed=self.recipe.seed, images=self.stored_images[images[np.arange(len(images))]],
            max_bad_fraction=self.recipe.max_bad_fraction,
        )  # fmt: skip
        makers: dict[str, Callable[[], Any]] = {"discriminative": self.tokenizer, "vq": self.train_vqgan}
        tokenizers = {kind: makers[kind]() for kind in role.tokens}
        return FreshBatches(crops, arguments, tokenizers, cfg.batch_size, self.device)

    @cached_property
    def stored_images(self) -> np.ndarray:
        """(num_images,) int64: the image of the source behind each readable image of the token store."""
        unreadable = {key for key, _ in self.write_tokens().manifest["bad"]}
        if not unreadable:
            return np.arange(len(self.source), dtype=np.int64)
        return np.array([i for i in range(len(self.source)) if self.source.key(i) not in unreadable], dtype=np.int64)

    def crops_of(self, rows: np.ndarray) -> torch.Tensor:
        """(B, 3, H, W) uint8: the crops that these rows of the token store were made of."""
        store = self.write_tokens()
        images, crops = np.divmod(rows, store.crops_per_image)
        made = {"crops_per_image": store.crops_per_image, "seed": store.manifest["seed"]}
        rows = self.stored_images[images] * store.crops_per_image + crops
        return read_rows(self.source, self.recipe.preprocess, rows, **made)

    @property
    def held_out_every(self) -> int:
        """Of every so many images the first is kept out of training, with all its crops; 0 keeps none out."""
        fraction = self.recipe.validation_fraction
        return max(2, round(1 / fraction)) if fraction else 0

    def held_out_rows(self) -> np.ndarray:
        """bool (R,): rows kept out of training: every 1 / validation_fraction-th image, with all its crops."""
        store, every = self.write_tokens(), self.held_out_every
        held = np.arange(store.num_images) % every == 0 if every else np.zeros(store.num_images, dtype=bool)
        return np.repeat(held, store.crops_per_image)

    def validation(self, name: str) -> Callable[[nn.Module], dict[str, float]]:
        """model -> {"val_nll"}: nats per token on the held-out images, the same rows and masks every time.

        Of a renderer straight to pixels {"val_l1", "val_psnr"}: mean |x - x_hat|, images in [0, 1], and dB.
        They are the stored crops, whatever crops the model trains on.
        """
        store, crops = self.write_tokens(), self.recipe.crops_per_image
        num_rows = -(-store.num_images // self.held_out_every) * crops  # of images 0, every, 2 every, ...
        places = np.linspace(0, num_rows - 1, min(MAX_VALIDATION_ROWS, num_rows)).astype(np.int64)
        chosen = places // crops * self.held_out_every * crops + places % crops
        labelled = bool(self.sequence_config(name).num_classes)
        found = store.batch(chosen)
        if get_role(name).target == "pixels":
            found["pixels"] = self.crops_of(chosen)
        batch = loss_arguments(get_role(name), found, labelled=labelled)
        batch: dict[str, Any] = {k: None if v is None else v.to(self.device) for k, v in batch.items()}

        def validate(model: nn.Module) -> dict[str, float]:
            assert isinstance(model, SequenceModel)
            noise: dict[str, Any] = model.noise(batch, torch.Generator(self.device).manual_seed(0))
            metrics = model.loss(**batch, **noise)[1]
            return {f"val_{name}": float(metrics[name]) for name in VALIDATED if name in metrics}

        return validate

    # ---------------------------------------------------------------- the whole

    def make_pipeline(self, prior: str | None = "prior", renderer: str | None = None) -> DigitPipeline:
        """A pipeline of this run's models, trained where they are not done; prior None is a VQ-only baseline."""
        renderer = renderer or self.recipe.model_names[1]
        return DigitPipeline(
            tokenizer=self.tokenizer() if prior else None,
            vq=None if get_role(renderer).target == "pixels" else self.train_vqgan(),
            prior=self.train_model(prior) if prior else None,
            renderer=self.train_model(renderer),
            preprocess=self.recipe.preprocess,
            classes=self.source.classes if self.recipe.class_conditional else (),
            sampling=self.recipe.sampling_of(renderer, labelled=bool(self.num_classes)),
            info={
                "recipe": self.recipe.name,
                "data": self.source.name,
                "num_unlabelled": int((self.write_tokens().labels < 0).sum()),
            },
        )

    def stages(self) -> Sequence[tuple[str, Callable[[], Any]]]:
        """Stage names and what makes each, in order."""
        models = [(name, partial(self.train_model, name)) for name in self.recipe.model_names]
        vqgan = [("vqgan", self.train_vqgan)] if self.recipe.has_vqgan else []
        return [("codebook", self.fit_codebook), *vqgan, ("tokens", self.write_tokens), *models]


def other_seed(tokens: Path | None, recipe: Recipe) -> list[str]:
    """A sentence where tokens that are reused are of random crops of another seed than the recipe's; else nothing."""
    if tokens is None or recipe.preprocess.distinct_crops == 1 or not (tokens / RESULTS["tokens"]).is_file():
        return []
    manifest = read_json(tokens / RESULTS["tokens"])
    made = manifest.get("seed") if isinstance(manifest, dict) else None
    if made in (None, recipe.seed):
        return []
    return [
        f"the tokens in {tokens} are of the crops of seed {made}, the run has seed {recipe.seed}: it trains on those "
        "crops, and its seed decides the rest"
    ]


def near_codes(codebook: Quantizer) -> torch.Tensor:
    """(K, n) int64: the NEAR_CODES codes nearest to each, by the distance of their vectors, without itself.

    Of several levels (L, K, n), for each level.
    """
    return near_vectors(codebook.level_vectors)


def start_rows(vectors: torch.Tensor) -> torch.Tensor:
    """Code vectors of each level (L, V, C) as a model's tables start from them, (L V, C).

    Of several levels each is centred, because a cell's embedding is the sum of them.
    """
    centred = vectors if len(vectors) == 1 else vectors - vectors.mean(1, keepdim=True)
    return centred.flatten(0, 1)


def near_vectors(code_vectors: torch.Tensor) -> torch.Tensor:
    """`near_codes` of vectors (L, K, D)."""
    near = []
    for vectors in code_vectors.float().cpu():
        parts = []
        for first in range(0, len(vectors), COMPARED_TOGETHER):
            distances = torch.cdist(vectors[first : first + COMPARED_TOGETHER], vectors)
            distances.diagonal(first).fill_(torch.inf)
            parts.append(distances.topk(min(NEAR_CODES, len(vectors) - 1), largest=False).indices)
        near.append(torch.cat(parts))
    return near[0] if len(near) == 1 else torch.stack(near)


def fit(run: Run, stages: Stages | None = None) -> DigitPipeline:
    """Run every stage that is not done and write OUT/pipeline; returns the pipeline. `stages` is for progress."""
    stages = stages or Stages([name for name, _ in run.stages()])
    for name, make in run.stages():
        with stages.enter(name):
            make()
    pipe = run.make_pipeline()
    distributed.on_main(lambda: pipe.save_pretrained(run.out / "pipeline"))
    return pipe
