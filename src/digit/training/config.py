"""Settings of a training run, and what of them may change while it goes on."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from digit.errors import DigitError, MismatchError
from digit.runtime.files import read_json, write_json

Schedule = Literal["inverse_sqrt", "cosine", "constant"]
Optimizer = Literal["adamw", "muon"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Parallel = Literal["ddp", "fsdp"]
CONFIG = "config.json"  # beside the checkpoints
# These may change between two halves of one run (num_steps too, where the schedule does not end there).
FREE_FIELDS = {
    "accumulate", "checkpoint_activations", "compile", "deterministic", "keep_best", "keep_checkpoints", "log_every",
    "max_skipped", "parallel", "save_every", "tensorboard",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What the loop itself needs; the config of a trainer extends it."""

    num_steps: int = 125_000
    """Optimizer updates in the whole run. A run may be lengthened later, except under a cosine schedule."""
    batch_size: int = 2048
    """Images per update, over all processes and accumulated pieces together."""
    seed: int = 0
    """Seed of everything random in training: dropout, masks, dropped labels."""
    log_every: int = 50
    """Updates between two lines of log.jsonl; only then, and at a save, does the loop wait for the device."""
    save_every: int = 1000
    """Updates between two checkpoints; the last update always saves."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; the second is what a damaged newest one falls back to."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest validation loss too, where there is a validation."""
    tensorboard: bool = True
    """Write TensorBoard events to OUT/tensorboard where tensorboard is installed."""
    deterministic: bool = False
    """On a GPU use deterministic algorithms alone, slower ones among them, so that a resumed run equals one that was
    never interrupted bit for bit; on a CPU it does so anyway."""

    def __post_init__(self) -> None:
        for name, least in {"num_steps": 0, "batch_size": 1, "seed": 0}.items():
            self.require(getattr(self, name) >= least, name, f"at least {least}")
        for name in ("log_every", "save_every", "keep_checkpoints"):
            self.require(getattr(self, name) >= 1, name, "at least 1")

    def require(self, holds: bool, name: str, wanted: str) -> None:
        """Raise DigitError where a field's value is not one of those wanted."""
        if not holds:
            raise DigitError(f"{name} is {getattr(self, name)!r}: it must be {wanted}")

    @property
    def may_grow(self) -> bool:
        """Whether more steps leave the steps before them as they were."""
        return True


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """How a sequence model is trained. The defaults are the paper's for the base model (A.3; 200 epochs)."""

    accumulate: int = 1
    """Pieces that each process cuts its share of the batch into, to save memory; the gradients add up to the same."""
    precision: Precision = "fp32"
    """Arithmetic of the forward pass: fp32, bf16, fp16 with loss scaling (GPU only), or auto: bf16 where the hardware
    multiplies it, else fp32. Weights stay fp32."""
    checkpoint_activations: bool = False
    """Keep only the input of each transformer block and compute the rest again in the backward pass: far less memory
    for about a third more time. Losses and gradients stay the same."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the transformer with torch.compile; auto: on a GPU, in runs of at least 1000 updates. Dropout then draws
    other random numbers."""
    optimizer: Optimizer = "adamw"
    """adamw (the paper's Adam), or muon: AdamW but for the matrices inside the blocks; for short training."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of the matrices under muon; it follows the same schedule."""
    warmup_steps: int = 6250
    """Updates of linear warm-up from warmup_from to learning_rate."""
    warmup_from: float = 1e-7
    """Learning rate of the very first update."""
    schedule: Schedule = "inverse_sqrt"
    """After the warm-up: inverse_sqrt (the paper's), cosine (to 0 at num_steps) or constant."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of Adam's first and second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay (AdamW), on every parameter, biases, norms and embeddings too, as in fairseq."""
    label_smoothing: float = 0.1
    """Share of the target's probability that is spread over the whole vocabulary."""
    max_norm: float = 1.0
    """Gradients are scaled down to this joint L2 norm; 0 = no clipping."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights; 0 = no average. With one, the average is the run's result."""
    parallel: Parallel = "ddp"
    """With several processes (torchrun): ddp, a replica of the model in each, or fsdp, weights, gradients and optimizer
    state cut up among them (fully_shard), for models that fill a GPU. Checkpoints of both go on with either."""
    max_skipped: int = 0
    """Updates that may be left out in the whole run because their loss or gradient is not finite; 0 stops at the
    first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.precision in get_args(Precision), "precision", " or ".join(get_args(Precision)))
        self.require(self.compile in (True, False, "auto"), "compile", "true, false or auto")
        self.require(self.schedule in get_args(Schedule), "schedule", " or ".join(get_args(Schedule)))
        self.require(self.optimizer in get_args(Optimizer), "optimizer", " or ".join(get_args(Optimizer)))
        self.require(self.learning_rate > 0, "learning_rate", "above 0")
        self.require(self.muon_learning_rate > 0, "muon_learning_rate", "above 0")
        self.require(0 <= self.ema_decay < 1, "ema_decay", "0 (off) or below 1, such as 0.9999")
        self.require(self.accumulate >= 1, "accumulate", "at least 1")
        self.require(self.parallel in get_args(Parallel), "parallel", " or ".join(get_args(Parallel)))
        self.require(self.max_skipped >= 0, "max_skipped", "at least 0")
        self.require(self.optimizer != "muon" or self.parallel == "ddp", "parallel", "ddp under optimizer muon")
        multiple = self.batch_size % self.accumulate == 0
        self.require(multiple, "batch_size", f"a multiple of accumulate {self.accumulate}")

    @property
    def may_grow(self) -> bool:
        return self.schedule != "cosine"


def describe_run(cfg: LoopConfig, about: dict[str, Any] | None) -> dict[str, Any]:
    """What config.json holds: every field of the config, and what the caller says the run is about."""
    return json.loads(json.dumps({"train": asdict(cfg), "about": about or {}}))  # as it will be read: tuples are lists


def save_config(folder: str | Path, cfg: LoopConfig, about: dict[str, Any] | None) -> None:
    """Write config.json beside the checkpoints."""
    write_json(Path(folder) / CONFIG, describe_run(cfg, about))


def check_config(folder: str | Path, cfg: LoopConfig, about: dict[str, Any] | None) -> None:
    """Raise MismatchError where the run in `folder` was begun with another config that matters; names both values."""
    if not (path := Path(folder) / CONFIG).exists():
        return
    then, now = read_json(path), describe_run(cfg, about)
    if not isinstance(then, dict) or not all(isinstance(then.get(room), dict) for room in ("train", "about")):
        raise DigitError(f"{path} is no config of a run: delete {Path(folder).parent} to begin again")
    then["train"] = describe_run(type(cfg)(), None)["train"] | then.get("train", {})  # settings younger than the run
    free = FREE_FIELDS | ({"num_steps"} if cfg.may_grow else set())
    for room in ("train", "about"):
        before, after = then.get(room, {}), now[room]
        for name in sorted(set(before) | set(after)):
            if before.get(name) != after.get(name) and not (room == "train" and name in free):
                raise MismatchError(
                    f"{name} was {before.get(name)!r} when the run in {Path(folder).parent} began and is "
                    f"{after.get(name)!r} now: give the old value to go on, or choose another --out"
                )
