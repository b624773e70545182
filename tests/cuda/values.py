"""What a real GPU computes, beside the CPU and beside itself: python values.py cuda prints one JSON line a check.

`cpu` in place of `cuda` tries the checks without a GPU; names of checks may follow. Networks are small, weights random.
checks.py says whether the same paths run at all; this file whether their numbers are right.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts: deterministic training asks for it
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from toy_pipeline import toy_pipeline

from digit.benchmark.encode import random_encoder
from digit.benchmark.sizes import micro
from digit.models.decoding import step_kernel
from digit.models.efficientnet import EfficientNet, EfficientNetConfig
from digit.models.inception import InceptionV3
from digit.models.sequence import SequenceModel
from digit.models.vqgan import VQGAN
from digit.runtime import progress
from digit.runtime.hardware import full_precision
from digit.sampling.masked import MaskedSampler
from digit.sampling.next_token import NextTokenSampler
from digit.tokenizers.kmeans.config import KMeansConfig
from digit.tokenizers.kmeans.kmeans import KMeans
from digit.tokenizers.kmeans.nearest import nearest
from digit.tokenizers.vq import VQTokenizer
from digit.training.config import TrainConfig
from digit.training.loop import reproducible
from digit.training.sequence import SequenceUpdate
from digit.training.vqgan import GANConfig, VQGANTrainer

DEVICE, CPU = torch.device(sys.argv[1]), torch.device("cpu")
ON_GPU = DEVICE.type == "cuda"
SIZE = micro()
LENGTH = 150 if ON_GPU else 20  # tokens; above two spans of recorded steps on a GPU
SAME_TOKENS = 0.9  # a rounding may turn one token, and with it all later ones of its image
CHECKS: dict[str, Callable[[], object]] = {}


def check(name: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    def register(function: Callable[[], object]) -> Callable[[], object]:
        CHECKS[name] = function
        return function

    return register


def model(name: str, device: torch.device = DEVICE, **changes: Any) -> SequenceModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(depth=3, embed_dim=128, num_heads=2, dropout=0.0)
    return SequenceModel(replace(SIZE.sequence_config(name), **shape | changes)).to(device).eval()


def numbers(*shape: int, most: int = 256) -> Tensor:
    return torch.randint(most, shape, generator=torch.Generator().manual_seed(1))


def prefix_of(network: SequenceModel, num: int) -> Tensor | None:
    cfg = network.cfg
    return numbers(num, cfg.prefix_len, most=cfg.prefix_vocab_size) if cfg.prefix_len else None


def share(a: Tensor, b: Tensor) -> float:
    return (a.cpu() == b.cpu()).double().mean().item()


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.double().cpu(), b.double().cpu()
    return ((a - b).norm() / b.norm()).item()


# -------------------------------------------------------------------- sampling


@check("kernel of one query")
def _() -> dict[str, bool]:
    """Whether Triton's attention passes its trial, by type and width of a head."""
    tried = [(name, width) for name in ("float32", "bfloat16", "float16") for width in (64, 96)]
    works = {f"{name} {width}": step_kernel(DEVICE, getattr(torch, name), width) is not None for name, width in tried}
    assert all(works.values()) or not ON_GPU, works
    return works


def sampling(name: str, levels: int = 1, **how: Any) -> dict[str, float]:
    """Tokens of recorded steps beside those of steps launched one by one, of no cache, and of the CPU."""
    classes: dict[str, Any] = dict(num_classes=4, label_dropout=0.1) if name == "prior" else {"prefix_dropout": 0.1}
    classes |= {"levels": levels}
    network = model(name, target_len=LENGTH, **classes)
    seeds, prefix = list(range(11)), prefix_of(network, 11)
    labels = torch.arange(11) % 4 if network.cfg.num_classes else None

    def sampler(sampled: SequenceModel, **ways: Any) -> Callable[..., Tensor]:
        made = NextTokenSampler(sampled, micro_batch_size=8, **how, **ways)
        return lambda given=None: made(seeds, prefix=prefix, labels=labels, given=given)

    recorded = sampler(network)
    first = recorded()
    assert torch.equal(first, recorded()), "a second call of one sampler gives other tokens"
    beside = {
        "launched": sampler(network, fixed_shapes=False)(),
        "uncached": sampler(network, use_cache=False)(),
        "cpu": sampler(model(name, CPU, target_len=LENGTH, **classes))(),
    }
    given = recorded(first[:, : LENGTH // 2].cpu())
    assert torch.equal(given[:, : LENGTH // 2], first[:, : LENGTH // 2])
    equal = {way: share(first, other) for way, other in (beside | {"given": given}).items()}
    assert min(equal.values()) >= SAME_TOKENS, equal
    return equal


for label, (name, how) in {
    "prior, top-k": ("prior", {"top_k": 20}),
    "prior, most likely": ("prior", {"temperature": 0.0}),
    "prior, guided": ("prior", {"cfg_scale": 2.0, "top_k": 20}),
    "prior of five levels": ("prior", {"levels": 5, "cfg_scale": 2.0, "top_k": 20}),
    "renderer, top-p": ("renderer", {"top_p": 0.8}),
    "renderer, guided": ("renderer", {"cfg_scale": 2.0, "top_p": 0.8}),
}.items():
    check(f"tokens of {label}")(lambda name=name, how=how: sampling(name, **how))


@check("tokens in bf16")
def _() -> dict[str, float]:
    network = model("renderer", target_len=LENGTH)
    prefix, seeds = prefix_of(network, 8), range(8)
    how: dict[str, Any] = dict(micro_batch_size=8, dtype=torch.bfloat16, top_p=0.8)
    recorded, launched = (
        NextTokenSampler(network, fixed_shapes=fixed, **how)(seeds, prefix=prefix) for fixed in (ON_GPU, False)
    )
    return {"recorded and launched": share(recorded, launched)}  # other kernels: other roundings, no bound


@check("tokens of MaskGIT")
def _() -> dict[str, float]:
    def tokens(network: SequenceModel, dtype: torch.dtype | None = None) -> Tensor:
        return MaskedSampler(network, micro_batch_size=4, dtype=dtype)(range(6), prefix=prefix_of(network, 6))

    here, there = tokens(model("renderer_masked")), tokens(model("renderer_masked", CPU))
    assert share(here, there) >= SAME_TOKENS, share(here, there)
    return {"cpu": share(here, there), "bf16": share(tokens(model("renderer_masked"), torch.bfloat16), here)}


@check("generate: the same twice, samplers kept, memory given back")
def _() -> dict[str, float]:
    pipeline = toy_pipeline().to(DEVICE)
    before = torch.cuda.memory_allocated() if ON_GPU else 0
    first = pipeline.generate(num=6, seed=1, batch_size=4)
    assert torch.equal(first, pipeline.generate(num=6, seed=1, batch_size=4))
    held = torch.cuda.memory_allocated() - before if ON_GPU else 0
    for _ in range(3):
        pipeline.generate(num=6, seed=1, batch_size=4, precision="bf16")
    if ON_GPU:
        assert torch.cuda.memory_allocated() - before < 1.5 * held + 2**26, "samplers pile up"
    on_cpu = toy_pipeline().generate(num=6, seed=1, batch_size=4)
    difference = (first.float() - on_cpu.float()).abs().mean().item()
    assert difference < 8, difference  # grey levels of 255; a token that turned changes a whole picture
    return {"grey levels from the CPU": difference, "MiB held": held / 2**20}


# -------------------------------------------------------------------- training


def losses(device: torch.device, name: str, steps: int = 6, **settings: Any) -> list[float]:
    network = model(name, device).train()
    batch = {"target": numbers(8, network.cfg.target_len, most=network.cfg.vocab_size), "prefix": prefix_of(network, 8)}
    cfg = TrainConfig(**dict(batch_size=8, compile=False, learning_rate=1e-3, warmup_steps=1) | settings)
    update = SequenceUpdate(network, lambda step: batch, cfg)
    return [float(update(step)["loss"]) for step in range(steps)]


def training(name: str, precision: str) -> dict[str, list[float]]:
    here = losses(DEVICE, name, precision=precision)
    assert here[-1] < here[0], here
    if precision != "fp32" or name == "renderer_masked":  # its masks come from the device's own generator
        return {"losses": here}
    there = losses(CPU, name, precision=precision)
    torch.testing.assert_close(torch.tensor(here), torch.tensor(there), rtol=2e-4, atol=0)
    return {"losses": here, "cpu": there}


for name in ("prior", "renderer", "renderer_masked"):
    for precision in ("fp32", "bf16", "fp16")[: 3 if ON_GPU else 2]:
        check(f"training of {name} in {precision}")(lambda n=name, p=precision: training(n, p))


@check("deterministic training: twice the same bits")
def _() -> None:
    def weights() -> Tensor:
        network = model("prior", dropout=0.1).train()
        batch = {"target": numbers(8, network.cfg.target_len), "prefix": None}
        cfg = TrainConfig(batch_size=8, precision="bf16", compile=False, warmup_steps=1)
        update = SequenceUpdate(network, lambda step: batch, cfg)
        with reproducible(True):
            for step in range(4):
                update(step)
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    assert torch.equal(weights(), weights())


@check("training of the VQGAN, with discriminator, deterministic")
def _() -> list[float]:
    torch.manual_seed(0)
    vqgan, images = VQGAN(SIZE.recipe.vqgan).to(DEVICE), numbers(4, 3, 32, 32).to(torch.uint8)
    cfg = GANConfig(num_steps=20, batch_size=4, perceptual="none", codebook_start=0, adversarial_start=2)
    trainer = VQGANTrainer(vqgan, lambda step: images, cfg)
    with reproducible(True):
        found = [float(trainer.update(step)["l1"]) for step in range(6)]
    assert found[-1] < found[0], found
    return found


# -------------------------------------------------------------------- tokenizers


@check("k-means and the nearest centroid")
def _() -> dict[str, float]:
    x = torch.randn(20000, 64, generator=torch.Generator().manual_seed(0))
    cfg = KMeansConfig(num_clusters=256, num_iterations=5, tolerance=0)
    here, there = KMeans(cfg).fit(x.to(DEVICE)), KMeans(cfg).fit(x)
    ratio = here.inertia_ / there.inertia_
    assert abs(ratio - 1) < 2e-3, ratio
    equal = share(nearest(x.to(DEVICE), there.centroids_), nearest(x, there.centroids_))
    assert equal == 1, equal
    return {"inertia": ratio, "nearest": equal}


@check("features of the encoder")
def _() -> dict[str, float]:
    images = numbers(20, 3, 56, 56).to(torch.uint8)
    torch.manual_seed(0)
    encoder = random_encoder(SIZE, CPU)
    there = encoder.features(images)
    encoder = encoder.to(DEVICE)
    errors = {
        "fp32": relative(encoder.features(images), there),
        "bf16": relative(encoder.features(images, torch.bfloat16), there),
    }
    assert errors["fp32"] < 1e-4 and errors["bf16"] < 3e-2, errors
    return errors


@check("features of an EfficientNet and of Inception")
def _() -> dict[str, float]:
    """Convolutions in float32, where cuDNN would round to TF32 unless it is told not to."""
    torch.manual_seed(0)
    nets = {"efficientnet": EfficientNet(EfficientNetConfig()).eval(), "inception": InceptionV3().eval()}
    images = numbers(4, 3, 224, 224).to(torch.uint8)
    inputs = {"efficientnet": (images.float() - 127) / 128, "inception": images}
    errors = {}
    for name, net in nets.items():
        found = []
        for device in (CPU, DEVICE):
            with torch.no_grad(), full_precision(device):
                features = net.to(device)(inputs[name].to(device))
            found.append(features if isinstance(features, Tensor) else features.pooled)
        errors[name] = relative(found[1], found[0])
    assert max(errors.values()) < 1e-4, errors
    return errors


@check("linear probe by sgd")
def _() -> dict[str, float] | str:
    try:
        from digit.metrics.probe import ProbeConfig, probe_layers
    except ImportError as error:
        return f"not tried: {error}"  # scipy, for intervals
    centres, labels = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)), torch.arange(600) % 5
    noise = torch.randn(600, 2, 16, generator=torch.Generator().manual_seed(1))
    x = centres[labels][:, None] + noise * torch.tensor([0.5, 2.0])[:, None]  # (N, L, D): a clear and a noisy layer
    cfg = ProbeConfig(solver="sgd", num_epochs=10, batch_size=64)
    here, there = (
        probe_layers(x[:400].to(d), labels[:400], x[400:].to(d), labels[400:], cfg, device=d) for d in (DEVICE, CPU)
    )
    equal = min((a.correct == b.correct).double().mean().item() for a, b in zip(here, there, strict=True))
    assert equal >= 0.97, equal
    return {"equal": equal, "top1": here[0].top1.value}


@check("VQ tokens and pixels")
def _() -> dict[str, float]:
    torch.manual_seed(0)
    tokenizer, images = VQTokenizer(VQGAN(SIZE.recipe.vqgan)), numbers(20, 3, 32, 32).to(torch.uint8)
    there = tokenizer.encode(images)
    pixels = tokenizer.decode(there)
    tokenizer = tokenizer.to(DEVICE)
    equal = share(tokenizer.encode(images), there)
    error = relative(tokenizer.decode(there.to(DEVICE)), pixels)
    assert equal >= 0.999 and error < 1e-2, (equal, error)  # pixels are rounded to 8 bits
    return {
        "tokens": equal,
        "pixels": error,
        "pixels bf16": relative(tokenizer.decode(there.to(DEVICE), "bf16"), pixels),
    }


@check("compiled training: the losses of plain training")
def _() -> dict[str, list[float]] | None:
    if not ON_GPU:  # takes a minute on a CPU
        return None
    plain, compiled = (losses(DEVICE, "prior", 3, precision="bf16", compile=c) for c in (False, True))
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(plain), rtol=5e-3, atol=0)
    return {"plain": plain, "compiled": compiled}


if __name__ == "__main__":
    progress.quiet()
    for name, function in CHECKS.items():
        if len(sys.argv) > 2 and name not in sys.argv[2:]:
            continue
        fault, result, began = None, None, time.perf_counter()
        try:
            result = function()
        except Exception as error:
            frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
            fault = f"{type(error).__name__}: {str(error)[:400]} at {' '.join(frames[-4:])}"
        line = {"name": name, "fault": fault, "result": result, "seconds": round(time.perf_counter() - began, 2)}
        print(json.dumps(line), flush=True)
