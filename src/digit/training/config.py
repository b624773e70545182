"""Settings of a training run, and which of them may change when it resumes."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from digit.errors import DigitError
from digit.runtime.files import as_path, read_json, write_json
from digit.runtime.request import require_same_request
from digit.runtime.settings import SEED, check_settings, within
from digit.training.precision import ScaledPrecision

Schedule = Literal["inverse_sqrt", "cosine", "constant"]
ENDING_SCHEDULES: tuple[Schedule, ...] = ("cosine",)  # they end at num_steps, which decides every step before it
Optimizer = Literal["adamw", "muon"]
Parallel = Literal["ddp", "fsdp"]
CONFIG = "config.json"  # beside the checkpoints
# These may differ when a run resumes (and num_steps, unless the schedule ends there).
FREE_FIELDS = {
    "accumulate", "checkpoint_activations", "compile", "deterministic", "keep_best", "keep_checkpoints", "log_every",
    "max_skipped", "parallel", "save_every", "tensorboard",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Settings of the loop itself; the config of each trainer extends it."""

    num_steps: int = within("[0, inf)", 125_000)
    """Optimizer updates in the whole run. A run can be lengthened later; with a cosine schedule, which
    ends at this number, by `digit fit --more` alone, and it is then not what a longer run would have been."""
    batch_size: int = within("[1, inf)", 2048)
    """Images per update, over all processes and accumulated micro-batches together."""
    seed: int = within(SEED, 0)
    """Seed of all random numbers in training: dropout, masks, dropped labels."""
    log_every: int = within("[1, inf)", 50)
    """Updates between two lines of log.jsonl. The loop waits for the device only then and at a save."""
    save_every: int = within("[1, inf)", 1000)
    """Updates between two checkpoints. The last update always saves."""
    keep_checkpoints: int = within("[1, inf)", 2)
    """How many of the newest checkpoints to keep. If the newest is damaged, the run resumes from the one before."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss, if there is validation."""
    tensorboard: bool = True
    """Write TensorBoard events to OUT/tensorboard if tensorboard is installed."""
    deterministic: bool = False
    """Use only deterministic algorithms on a GPU, some of them slower, so that a resumed run equals an uninterrupted
    one bit for bit. On a CPU it always does."""

    def __post_init__(self) -> None:
        check_settings(self)

    def require(self, valid: bool, name: str, wanted: str) -> None:
        """Raise DigitError, naming the field and the values `wanted`, unless its value is valid."""
        if not valid:
            raise DigitError(f"{name} is {getattr(self, name)!r}: it must be {wanted}")

    @property
    def may_grow(self) -> bool:
        """Whether raising num_steps leaves the steps before unchanged."""
        return True


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """Training of a sequence model. The defaults are the paper's for the base model (A.3; 200 epochs)."""

    accumulate: int = within("[1, inf)", 1)
    """Micro-batches that each process splits its share of the batch into, to save memory. Their gradients add up to
    the gradient of the whole share."""
    precision: ScaledPrecision = "fp32"
    """Arithmetic of the forward pass: fp32, bf16, fp16 with loss scaling (GPU only), or auto: bf16 where the hardware
    multiplies it, else fp32. Weights stay fp32."""
    checkpoint_activations: bool = False
    """Keep only the input of each transformer block and recompute the rest in the backward pass: far less memory for
    about a third more time. Losses and gradients stay the same."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the transformer with torch.compile; auto: on a GPU, in runs of at least 1000 updates. Compiled dropout
    uses other random numbers."""
    optimizer: Optimizer = "adamw"
    """adamw (the paper's Adam), or muon: Muon for the matrices inside the blocks and AdamW for the rest, for short
    training."""
    learning_rate: float = within("(0, inf)", 3e-4)
    """Peak learning rate."""
    muon_learning_rate: float = within("(0, inf)", 0.02)
    """Peak learning rate of the matrices with muon; it follows the same schedule."""
    warmup_steps: int = within("[0, inf)", 6250)
    """Updates of linear warm-up from warmup_from to learning_rate."""
    warmup_from: float = within("[0, inf)", 1e-7)
    """Learning rate of the first update."""
    schedule: Schedule = "inverse_sqrt"
    """After the warm-up: inverse_sqrt (the paper's), cosine (to 0 at num_steps) or constant."""
    betas: tuple[float, float] = within("[0, 1)", (0.9, 0.98))
    """Decay rates of Adam's first and second moment."""
    weight_decay: float = within("[0, inf)", 0.01)
    """Decoupled weight decay (AdamW) of every parameter, including biases, norms and embeddings, as in fairseq."""
    label_smoothing: float = within("[0, 1)", 0.1)
    """Share of the target's probability that is spread evenly over the vocabulary."""
    max_norm: float = within("[0, inf)", 1.0)
    """Largest joint L2 norm of the gradients; larger ones are scaled down to it. 0 = no clipping."""
    ema_decay: float = within("[0, 1)", 0.0)
    """Decay of the moving average of the weights, which is then the run's result; 0 = no average."""
    parallel: Parallel = "ddp"
    """With several processes (torchrun): ddp gives each a replica of the model; fsdp shards weights, gradients and
    optimizer state over them (fully_shard), for models that fill a GPU. A run can resume with the other one."""
    max_skipped: int = within("[0, inf)", 0)
    """How many updates of the whole run may be skipped because their loss or gradient is not finite; 0 stops the run
    at the first. With precision fp16, whose loss scaling skips an update now and then, 0 stops it only where the
    gradients overflow at the smallest loss scale."""
    input_noise: float = within("[0, 1]", 0.0)
    """Largest share of an image's tokens that a next-token model reads as other ones, while it still predicts the right
    ones, so that it can go on from its own mistakes (reAR, He et al. 2025: 1). Each image's share is uniform between 0
    and this, which falls linearly to 0 over the first three quarters of the training."""
    input_noise_codes: Literal["near", "uniform"] = "near"
    """What these tokens become: near, one of the 8 codes whose vectors are nearest; or uniform, any code (reAR)."""
    current_code_weight: float = within("[0, inf)", 0.0)
    """Weight of the loss that trains features of a shallow layer to tell the code vector of the token at each position
    (reAR: 1), through a small network that only training has. Next-token models only, as the following ones."""
    current_code_layer: int = within("[0, inf)", 1)
    """Blocks before those features: 1 is after the first one (reAR), 0 the embedded input."""
    next_code_weight: float = within("[0, inf)", 0.0)
    """Weight of the loss that trains features of a deep layer to tell the code vector of the next token (reAR: 1)."""
    next_code_layer: int | None = within("[0, inf)", None)
    """Blocks before those features; None takes three quarters of them (reAR: 18 of 24)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.compile in (True, False, "auto"), "compile", "true, false or auto")
        self.require(self.optimizer != "muon" or self.parallel == "ddp", "parallel", "ddp with optimizer muon")
        divisible = self.batch_size % self.accumulate == 0
        self.require(divisible, "batch_size", f"a multiple of accumulate {self.accumulate}")

    @property
    def may_grow(self) -> bool:
        return self.schedule not in ENDING_SCHEDULES and not self.input_noise  # the noise falls to 0 by then

    @property
    def code_weights(self) -> dict[str, float]:
        """Weights of the code losses that the training has, by the token that they tell of."""
        return {name: weight for name in ("current", "next") if (weight := getattr(self, f"{name}_code_weight"))}

    def code_layers(self, depth: int) -> dict[str, int]:
        """Blocks before the features that each of these losses reads, in a model of so many.

        Raises DigitError for more than the model has.
        """
        found = {name: getattr(self, f"{name}_code_layer") for name in self.code_weights}
        found = {name: round(0.75 * depth) if layer is None else layer for name, layer in found.items()}
        for name, layer in found.items():
            self.require(layer <= depth, f"{name}_code_layer", f"at most {depth}, the blocks of the model")
        return found


def describe_run(cfg: LoopConfig, about: dict[str, Any] | None) -> dict[str, Any]:
    """The content of config.json: every field of the config, and the caller's description of the run."""
    return json.loads(json.dumps({"train": asdict(cfg), "about": about or {}}))  # as JSON reads back: tuples are lists


def save_config(folder: str | Path, cfg: LoopConfig, about: dict[str, Any] | None) -> None:
    """Write config.json beside the checkpoints."""
    write_json(as_path(folder) / CONFIG, describe_run(cfg, about))


def check_config(folder: str | Path, cfg: LoopConfig, about: dict[str, Any] | None) -> None:
    """Raise MismatchError, naming both values, if a setting that may not change differs from the run in `folder`."""
    if not (path := as_path(folder) / CONFIG).exists():
        return
    saved, current = read_json(path), describe_run(cfg, about)
    if not isinstance(saved, dict) or not all(isinstance(saved.get(part), dict) for part in ("train", "about")):
        raise DigitError(f"{path} is not the config of a run: delete {as_path(folder).parent} to begin again")
    saved["train"] = describe_run(type(cfg)(), None)["train"] | saved["train"]  # defaults of newer settings
    free = {f"train.{name}" for name in FREE_FIELDS | ({"num_steps"} if cfg.may_grow else set())}
    existing = {part: saved[part] for part in current}
    advice = "give the old value to continue, or choose another --out"
    require_same_request(as_path(folder).parent, existing, current, advice, ignore=free.__contains__)
