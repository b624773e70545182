"""Training of a ViT by one of the methods. Everything in an update is a function of the step."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from digit.models.vit import ViT
from digit.runtime.settings import within
from digit.training.config import LoopConfig
from digit.training.log import Metrics
from digit.training.loop import TrainState, step_seed, train
from digit.training.optim import clip_gradients, cosine, set_lr
from digit.training.precision import AutoPrecision, autocast
from digit.training.ssl.dino import DINO, DINOConfig
from digit.training.ssl.ibot import IBOT, IBOTConfig
from digit.training.ssl.mae import MAE, MAEConfig
from digit.training.ssl.method import Method
from digit.training.ssl.moco import MoCo, MoCoConfig

MethodName = Literal["mae", "moco", "dino", "ibot"]
MethodConfig = MAEConfig | MoCoConfig | DINOConfig | IBOTConfig
Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean and std of R, G, B in 0..1
METHODS: dict[str, tuple[type[Method], str]] = {
    "mae": (MAE, "MAE"),
    "moco": (MoCo, "MoCo v3"),
    "dino": (DINO, "DINO"),
    "ibot": (IBOT, "iBOT"),
}


@dataclass(frozen=True, kw_only=True)
class SSLConfig(LoopConfig):
    """Training of an encoder by any of the methods. The defaults suit two CPU cores."""

    num_steps: int = within("[0, inf)", 1500)
    """Updates in the whole run; the learning rate falls to zero at the last."""
    batch_size: int = within("[1, inf)", 64)
    """Images per update."""
    learning_rate: float = within("(0, inf)", 1e-3)
    """Peak learning rate (AdamW)."""
    warmup_steps: int = within("[0, inf)", 100)
    """Updates of linear warm-up before the cosine."""
    weight_decay: float = within("[0, inf)", 0.05)
    """Decoupled weight decay of the weight matrices; biases, norms and tokens have none."""
    betas: tuple[float, float] = within("[0, 1)", (0.9, 0.95))
    """Decay rates of Adam's moments."""
    max_norm: float = within("[0, inf)", 1.0)
    """Largest joint L2 norm of the gradients; larger ones are scaled down to it. 0 = no clipping."""
    precision: AutoPrecision = "auto"
    """Arithmetic of the forward pass: fp32, bf16, or auto: bf16 where the hardware multiplies it, else fp32. Weights
    stay fp32."""
    save_every: int = within("[1, inf)", 250)
    """Updates between two checkpoints. The last update always saves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.batch_size > 1, "batch_size", "at least 2: the methods compare the images of a batch")

    @property
    def may_grow(self) -> bool:
        return False  # the cosine ends at num_steps


class SSLUpdate:
    """`update(step)` does one step: it fetches batch `step`, makes its views and updates the method's networks."""

    def __init__(
        self,
        method: Method,
        batches: Callable[[int], UInt8[Tensor, "B 3 H H"]],
        cfg: SSLConfig,
        normalisation: Normalisation,
    ):
        self.method, self.batches, self.cfg = method, batches, cfg
        self.device = next(method.parameters()).device
        self.mean, self.std = (torch.tensor(x, device=self.device).view(1, 3, 1, 1) for x in normalisation)
        self.parameters = [p for p in method.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.parameters, cfg)

    def state(self) -> TrainState:
        """The state at step 0, of the objects that a checkpoint must hold."""
        return TrainState(0, {"method": self.method, "optimizer": self.optimizer})

    def __call__(self, step: int) -> Metrics:
        cfg, progress = self.cfg, step / self.cfg.num_steps
        lr = set_lr(self.optimizer, cosine(step, cfg.learning_rate, cfg.num_steps, cfg.warmup_steps))
        generator = torch.Generator().manual_seed(step_seed(cfg.seed, step))
        started = time.perf_counter()
        images = self.batches(step)
        data_seconds = time.perf_counter() - started
        views = self.method.views(images.to(self.device, non_blocking=True), generator)
        views = [(view - self.mean) / self.std for view in views]
        with autocast(cfg.precision, self.device):
            loss, metrics = self.method.loss(views, generator, progress)
        loss.backward()
        norm = clip_gradients(self.parameters, cfg.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.end_step(progress)
        return {"loss": loss, **metrics, "grad_norm": norm, "lr": lr, "data_seconds": data_seconds}


def build_optimizer(parameters: list[nn.Parameter], cfg: SSLConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on the weight matrices only."""
    groups = [
        {"params": [p for p in parameters if p.ndim in (2, 4)], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.ndim not in (2, 4)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=cfg.betas, fused=True)


def build_method(name: MethodName, vit: ViT, cfg: MethodConfig, seed: int) -> Method:
    """A method around `vit`, on its device, both initialised from `seed`."""
    device = vit.cls_token.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build: Any = METHODS[name][0]  # each class takes settings of its own
        return build(vit.cpu(), cfg).to(device)


def train_ssl(
    name: MethodName,
    vit: ViT,
    method_cfg: MethodConfig,
    batches: Callable[[int], UInt8[Tensor, "B 3 H H"]],
    cfg: SSLConfig,
    out: str | Path,
    *,
    normalisation: Normalisation,
    about: dict[str, Any] | None = None,
) -> ViT:
    """Initialise and train `vit`; a second call with the same `out` resumes the run.

    `batches(step)` returns uint8 (B, 3, H, H), a function of the step alone. H must be at least the side of the views,
    that of the ViT's position table in pixels. Views are normalised by (mean, std). Put the ViT on its device first.
    Returns the method's encoder (DINO and iBOT: the teacher) in eval mode.

    Raises the errors of `digit.training.loop.train`.
    """
    method = build_method(name, vit, method_cfg, cfg.seed).train()
    about = (about or {}) | {"method": name, "settings": asdict(method_cfg), "vit": asdict(vit.cfg)}
    update = SSLUpdate(method, batches, cfg, normalisation)
    train(update, update.state(), cfg, out, about=about, description=name)
    return method.result.eval()
