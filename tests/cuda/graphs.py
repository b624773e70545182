"""What torch.compile makes of the models, on the CPU: python graphs.py prints one JSON line a check.

In a process of its own, because the tests check annotations at every call, and the compiler cannot look through that.
"""

import json
import math
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from digit.models.decoding import StepTransformer
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.models.transformer import SteppedCache
from digit.runtime import progress
from digit.sampling.filters import sample_filtered
from digit.training.config import TrainConfig
from digit.training.sequence import SequenceUpdate

DEPTH = 12  # torch gives up where it would compile one function for the ninth time


def model(**changes: Any) -> SequenceModel:
    torch.manual_seed(0)
    size: dict[str, Any] = dict(vocab_size=16, target_len=6, depth=DEPTH, embed_dim=16, num_heads=2, dropout=0.0)
    return SequenceModel(SequenceConfig(**size | changes))


def batch(network: SequenceModel) -> dict[str, Tensor | None]:
    cfg = network.cfg
    prefix = torch.randint(cfg.prefix_vocab_size, (4, cfg.prefix_len)) if cfg.prefix_len else None
    return {"target": torch.randint(cfg.vocab_size, (4, cfg.target_len)), "prefix": prefix}


def whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled into one graph; a part that cannot be compiled raises."""
    return torch.compile(function, fullgraph=True, backend="eager", dynamic=False)


def transformer() -> None:
    for changes in ({"norm": "post"}, {"norm": "pre"}, {"rotary": "2d", "target_rows": 2, "qk_norm": True}):
        network = model(**changes).eval()
        x = torch.randn(2, 7, 16)
        torch.testing.assert_close(
            whole(network.transformer.forward)(x, causal=True), network.transformer(x, causal=True)
        )


def loss() -> None:
    network = model(prefix_vocab_size=9, prefix_len=3)
    rows = batch(network)
    wanted = network.loss(**rows, label_smoothing=0.1)[0]
    torch.testing.assert_close(whole(network.loss)(**rows, label_smoothing=0.1)[0], wanted)


def decoding_step(**changes: Any) -> None:
    network = model(**changes).eval()
    step, length = StepTransformer(network.transformer, 3), 4
    caches = [network.new_cache(3) for _ in range(2)]
    x = torch.randn(3, length, 16)
    for cache in caches:
        cache.reserve(6)
        network.transformer(x, causal=True, cache=cache)
    u = torch.rand(3, dtype=torch.float64)

    def token(cache: SteppedCache) -> Tensor:
        return sample_filtered(network.head(step(x[:, 0], cache)), u, 1.0, 5, 1.0)

    steps = [SteppedCache(cache, torch.tensor([length]), 6) for cache in caches]
    with torch.no_grad():
        assert torch.equal(whole(token)(steps[0]), token(steps[1]))


def one_graph_for_all_blocks(**settings: Any) -> None:
    graphs = []
    compile_with_inductor = torch.compile

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.compile = lambda function, dynamic: compile_with_inductor(function, dynamic=dynamic, backend=counting)
    try:
        network = model(norm="post").train()
        rows = batch(network)
        cfg = TrainConfig(batch_size=4, num_steps=10, compile=True, warmup_steps=1, **settings)
        update = SequenceUpdate(network, lambda step: rows, cfg)
        losses = [float(update(step)["loss"]) for step in range(2)]
    finally:
        torch.compile = compile_with_inductor
    assert len(graphs) <= 2, f"{len(graphs)} graphs"
    assert all(map(math.isfinite, losses))


CHECKS: dict[str, Callable[[], None]] = {
    "transformer": transformer,
    "loss": loss,
    "decoding step": decoding_step,
    "decoding step with rotary positions": lambda: decoding_step(rotary="1d"),
    "training, whole": one_graph_for_all_blocks,
    "training, block by block": lambda: one_graph_for_all_blocks(checkpoint_activations=True),
}

if __name__ == "__main__":
    progress.quiet()
    for name, function in CHECKS.items():
        torch._dynamo.reset()
        fault = None
        try:
            function()
        except Exception as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "/digit/" in f.filename]
            fault = f"{type(error).__name__}: {str(error)[:600]} {frames[-1:]}"
        print(json.dumps({"name": name, "fault": fault}), flush=True)
