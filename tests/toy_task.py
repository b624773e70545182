"""A tiny sequence task for the training tests; as a script, one run of it: toy_task.py OUT '{"num_steps": 8}'."""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

VOCAB, LENGTH, CLASSES = 11, 6, 3


class ToyModel(nn.Module):
    """Next token from the last one and a label, with dropout, and masked inputs drawn from the generator."""

    def __init__(self, dropout: float = 0.1, mask_rate: float = 0.2, width: int = 8):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed, self.label = nn.Embedding(VOCAB + 1, width), nn.Embedding(CLASSES, width)
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCAB)
        self.dropout, self.mask_rate = nn.Dropout(dropout), mask_rate

    def loss(
        self,
        target: Tensor,
        prefix: Tensor | None = None,
        labels: Tensor | None = None,
        label_smoothing: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        seen = nn.functional.pad(target[:, :-1], (1, 0), value=VOCAB)  # (B, M)
        hidden = torch.rand(seen.shape, generator=generator, device=seen.device) < self.mask_rate
        x = self.embed(seen.masked_fill(hidden, VOCAB))  # (B, M, D)
        x = x if labels is None else x + self.label(labels)[:, None]
        logits = self.head(self.dropout(self.norm(x)))  # (B, M, V)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), label_smoothing=label_smoothing)
        return loss, {"accuracy": (logits.argmax(-1) == target).float().mean()}


def toy_batches(batch_size: int = 8, labelled: bool = True):
    """batches(step): counting sequences t, t + k, t + 2k, ... modulo VOCAB, with k - 1 the label."""

    def batches(step: int) -> dict[str, Tensor | None]:
        generator = torch.Generator().manual_seed(step)
        start = torch.randint(VOCAB, (batch_size, 1), generator=generator)
        labels = torch.randint(CLASSES, (batch_size,), generator=generator)
        target = (start + (labels[:, None] + 1) * torch.arange(LENGTH)) % VOCAB  # (B, M)
        return {"target": target, "prefix": None, "labels": labels if labelled else None}

    return batches


def toy_config(**changes):
    from digit.training.loop import TrainConfig

    run = {"num_steps": 8, "batch_size": 8, "log_every": 2, "save_every": 4, "tensorboard": False}
    return TrainConfig(**{**run, "learning_rate": 1e-2, "warmup_steps": 4, **changes})


def run_toy(out: Path, *, labelled: bool = True, step_seconds: float = 0.0, **changes) -> ToyModel:
    """Train the toy into `out` and return it."""
    import time

    from digit.training.likelihood import train_likelihood

    cfg, model = toy_config(**changes), ToyModel()
    batches = toy_batches(cfg.batch_size, labelled)
    train_likelihood(model, lambda step: (time.sleep(step_seconds), batches(step))[1], cfg, out)
    return model


if __name__ == "__main__":
    from digit.errors import DigitError
    from digit.training import distributed

    torch.set_num_threads(1)
    distributed.start("cpu")
    try:
        trained = run_toy(Path(sys.argv[1]), **json.loads(sys.argv[2]))
        if distributed.is_main():
            torch.save(trained.state_dict(), Path(sys.argv[1]) / "weights.pt")
        distributed.stop(together=True)
    except DigitError as error:
        sys.exit(f"DigitError: {error}")
    finally:
        distributed.stop()
