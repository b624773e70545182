"""What runs on a GPU, run on fake CUDA tensors: python checks.py FOLDER [NAME ...] prints one JSON line a check.

A check fails where tensors of two devices meet, where the host would wait for a value on the device, and where an
output is on the wrong device. FOLDER gets the fake device's library; `cuda` in its place runs the checks on a real GPU,
and `cpu` tries them without one.
"""

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import fake_device

REAL = sys.argv[1] in ("cuda", "cpu")
if not REAL:
    fake_device.install(fake_device.build(Path(sys.argv[1])))

import torch  # noqa: E402  (after the fake device)
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.fx.experimental.symbolic_shapes import ShapeEnv  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import foreign_vq  # noqa: E402
from toy_pipeline import toy_pipeline  # noqa: E402

from digit.benchmark.encode import random_encoder  # noqa: E402
from digit.benchmark.sizes import base, micro  # noqa: E402
from digit.models import sequence, tokens  # noqa: E402
from digit.models.pixels import PixelConfig, PixelRenderer  # noqa: E402
from digit.models.sequence import SequenceModel  # noqa: E402
from digit.models.vit import ViT  # noqa: E402
from digit.models.vqgan import VQGAN  # noqa: E402
from digit.pipeline.pipeline import DigitPipeline  # noqa: E402
from digit.runs.pretrain import PretrainConfig  # noqa: E402
from digit.runtime import progress  # noqa: E402
from digit.sampling import requests  # noqa: E402
from digit.sampling.masked import MaskedSampler  # noqa: E402
from digit.sampling.next_token import NextTokenSampler, RecordedSteps  # noqa: E402
from digit.tokenizers import vq  # noqa: E402
from digit.tokenizers.kmeans.nearest import FastNearest  # noqa: E402
from digit.tokenizers.vq import VQTokenizer  # noqa: E402
from digit.training.adversarial import AdversarialConfig  # noqa: E402
from digit.training.config import TrainConfig  # noqa: E402
from digit.training.pixels import PixelTrainer  # noqa: E402
from digit.training.sequence import SequenceUpdate  # noqa: E402
from digit.training.ssl.train import METHODS, SSLConfig, SSLUpdate, build_method  # noqa: E402
from digit.training.vqgan import GANConfig, VQGANTrainer  # noqa: E402

CUDA = torch.device(sys.argv[1] if REAL else "cuda")
for module in (requests, tokens, sequence, vq):  # they check what the caller gave, once a call: the only wait meant
    for name in ("check_range", "require_range"):
        if hasattr(module, name):
            setattr(module, name, lambda *_: None)
make_tensor = torch.tensor


def tensor(data: object, device: object = None, **how: object) -> Tensor:
    """torch.tensor, which would look for a real device."""
    made = make_tensor(data, **how)
    made.constant = None  # else an operation with numbers alone would be done at once, on a real device
    return made.to(device or "cpu")


def copied(self: FakeTensor, memo: dict[int, Tensor]) -> Tensor:
    """A deep copy; torch's own needs storage."""
    copy = self.detach().clone()
    copy = nn.Parameter(copy, self.requires_grad) if isinstance(self, nn.Parameter) else copy
    return memo.setdefault(id(self), copy)


def moved(self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`Module._apply` that puts new tensors in place of the old: torch would swap contents, which fakes cannot."""
    for child in self.children():
        child._apply(function)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            self._parameters[name] = nn.Parameter(function(parameter.detach()), parameter.requires_grad)
    for name, buffer in self._buffers.items():
        self._buffers[name] = None if buffer is None else function(buffer)
    return self


if not REAL:  # what fake tensors cannot do
    torch.Tensor.pin_memory = torch.Tensor.clone
    torch.tensor = tensor
    Tensor.new_tensor = lambda self, data: tensor(data, self.device, dtype=self.dtype)
    FakeTensor.__deepcopy__ = copied
    nn.Module._apply = moved
    RecordedSteps._run = RecordedSteps._step  # nothing can be recorded
    torch.cuda.Event = torch.cuda.current_stream = MagicMock

SIZE = micro()
CHECKS: dict[str, Callable[[], object]] = {}
NOTES: set[str] = set()  # of the check that runs


class Waits(TorchDispatchMode):
    """Notes what makes the host wait: copies from the device, and results whose shape or value the host must know."""

    KNOWN = ("_local_scalar_dense", "bincount", "masked_select", "nonzero", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [t for t in tree_leaves(args) if isinstance(t, Tensor) and t.device.type == "cuda"]
        by_mask = "aten.index" in str(function) and any(t.dtype in (torch.bool, torch.uint8) for t in given[1:])
        if given and (by_mask or any(name in str(function) for name in self.KNOWN)):
            self.found.append(str(function))
        out = function(*args, **(kwargs or {}))
        if given and {t.device.type for t in tree_leaves(out) if isinstance(t, Tensor)} == {"cpu"}:
            self.found.append(f"{function} to the host")
        return out


def check(name: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    def register(function: Callable[[], object]) -> Callable[[], object]:
        CHECKS[name] = function
        return function

    return register


def on_cuda(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.device.type == CUDA.type, tensor.device


def without_waiting(step: Callable[[], object]) -> object:
    """Run a step; on a real GPU first once for what is made once, then again to note what CUDA calls a wait."""
    if REAL and CUDA.type == "cuda":
        step()
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        NOTES.update(f"waits at {Path(wait.filename).name}:{wait.lineno}" for wait in waits)
    with Waits() as waits:
        result = step()
    assert not waits.found, f"the host waits for {waits.found}"
    return result


def model(name: str, **changes: object) -> SequenceModel:
    with CUDA:
        return SequenceModel(replace(SIZE.sequence_config(name), **changes)).eval()


def rows(network: SequenceModel, num: int) -> dict[str, Tensor | None]:
    cfg = network.cfg
    prefix = torch.randint(cfg.prefix_vocab_size, (num, cfg.prefix_len)) if cfg.prefix_len else None
    return {"target": torch.randint(cfg.vocab_size, (num, cfg.target_len)), "prefix": prefix}


# -------------------------------------------------------------------- training


def train(name: str, **settings: object) -> None:
    network = model(name, dropout=0.1).train()
    batch = {key: None if value is None else value.to(CUDA) for key, value in rows(network, 4).items()}
    cfg = TrainConfig(batch_size=4, compile=False, warmup_steps=1, **settings)
    update = SequenceUpdate(network, lambda step: batch, cfg)
    metrics = without_waiting(lambda: update(1))
    on_cuda(metrics["loss"], metrics["grad_norm"])


for name in ("prior", "renderer", "renderer_masked"):
    for precision in ("fp32", "bf16", "fp16")[: 2 if CUDA.type == "cpu" else 3]:
        check(f"train {name} {precision}")(lambda name=name, precision=precision: train(name, precision=precision))
for label, settings in {
    "accumulate": {"accumulate": 2},
    "checkpointed": {"checkpoint_activations": True},
    "muon": {"optimizer": "muon"},
    "average": {"ema_decay": 0.9},
}.items():
    check(f"train renderer {label}")(lambda settings=settings: train("renderer", precision="bf16", **settings))
check("train renderer_masked accumulate")(lambda: train("renderer_masked", precision="bf16", accumulate=2))


def gan(step: int, **settings: object) -> None:
    with CUDA:
        vqgan = VQGAN(SIZE.recipe.vqgan)
    cfg = GANConfig(
        num_steps=20, batch_size=2, perceptual="none", codebook_start=0, precision="bf16", restart_every=7, **settings
    )
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    trainer = VQGANTrainer(vqgan, lambda step: images, cfg)
    for optimizer in () if REAL else (trainer.optimizer, trainer.discriminator_optimizer):
        optimizer.param_groups[0]["fused"] = True  # the other kinds read a counter on the host, which is fake here too
    metrics = without_waiting(lambda: trainer.update(step))
    on_cuda(metrics["l1"], metrics["grad_norm"])


class PixelCrops:
    """A batch of tokens and crops, the same at every step."""

    def part(self, step: int, start: int, stop: int) -> dict[str, torch.Tensor]:
        images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
        return {"target": images[start:stop], "prefix": torch.randint(8, (2, 4))[start:stop]}


def pixels(step: int) -> None:
    names = ("channels", "channel_mult", "num_res_blocks", "z_channels", "num_groups")
    shape = {name: getattr(SIZE.recipe.vqgan, name) for name in names}
    tokens = {"prefix_vocab_size": 8, "prefix_len": 4, "prefix_rows": 2}
    with CUDA:
        size = {"depth": 1, "embed_dim": 32, "num_heads": 2, "dropout": 0.0, "norm": "pre"}
        renderer = PixelRenderer(PixelConfig(image_size=32, noise_channels=1, **tokens, **size, **shape))
    cfg = AdversarialConfig(num_steps=20, batch_size=2, perceptual="none", precision="bf16", adversarial_start=2)
    trainer = PixelTrainer(renderer, PixelCrops(), cfg)
    for optimizer in () if REAL else (trainer.optimizer, trainer.discriminator_optimizer):
        optimizer.param_groups[0]["fused"] = True
    metrics = without_waiting(lambda: trainer.update(step))
    on_cuda(metrics["l1"], metrics["grad_norm"])


check("train pixels with the discriminator")(lambda: pixels(3))
check("train vqgan before the discriminator")(lambda: gan(1, adversarial_start=5))
check("train vqgan with the discriminator")(lambda: gan(3, adversarial_start=2))


def ssl(name: str) -> None:
    with CUDA:
        vit = ViT(replace(SIZE.vit, num_blocks=None, table_side=4, patch_size=8))
    method = build_method(name, vit, getattr(PretrainConfig(), name), 0).train()
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    update = SSLUpdate(method, lambda step: images, SSLConfig(batch_size=4, precision="bf16"), ((0.5,) * 3, (0.5,) * 3))
    on_cuda(without_waiting(lambda: update(1))["loss"])


for name in METHODS:
    check(f"pretrain {name}")(lambda name=name: ssl(name))


# -------------------------------------------------------------------- sampling


def sample(name: str, dtype: torch.dtype | None, **settings: object) -> None:
    guided = settings.get("cfg_scale", 1.0) != 1.0
    changes = {"num_classes": 4, "label_dropout": 0.1} if guided and name == "prior" else {}
    changes |= {"prefix_dropout": 0.1} if guided and name != "prior" else {}
    network = model(name, **changes)
    kind = MaskedSampler if network.cfg.masked else NextTokenSampler
    sampler = kind(network, micro_batch_size=4, dtype=dtype, **settings)
    prefix = rows(network, 6)["prefix"]
    labels = torch.arange(6) % 4 if changes.get("num_classes") else None
    on_cuda(without_waiting(lambda: sampler(list(range(6)), prefix=prefix, labels=labels)))


for name in ("prior", "renderer", "renderer_masked"):
    for dtype in (None, torch.bfloat16):
        label = "fp32" if dtype is None else "bf16"
        check(f"sample {name} {label}")(lambda name=name, dtype=dtype: sample(name, dtype, top_p=0.8))
        check(f"sample {name} {label} guided")(lambda name=name, dtype=dtype: sample(name, dtype, cfg_scale=2.0))
check("sample prior top-k")(lambda: sample("prior", None, top_k=20))


def pipeline(**changes: object) -> DigitPipeline:
    with CUDA:
        return toy_pipeline(**changes)


def generated(**changes: object) -> None:
    """Images and tokens come back on the host; nothing of the two stages and the decoder leaves the GPU before."""
    made = pipeline(**changes)
    images = made.generate(num=5, seed=1, batch_size=2, renderer={"cfg_scale": 1.0})
    tokens = made.generate_tokens(num=3, labels=[0, 1, 2], batch_size=2)
    assert {x.device.type for x in (images, *tokens.values())} == {"cpu"}
    assert images.shape == (5, 3, 16, 16) and tokens["vq"].shape == (3, 16)


for label, changes in {"": {}, " MaskGIT": {"masked": True}, " VQ-only": {"prior": False}}.items():
    check(f"generate{label}")(lambda changes=changes: generated(**changes))
check("complete")(
    lambda: pipeline(prior=False).complete(  # what hides the seam needs scipy, which a bare machine lacks
        torch.zeros(3, 3, 16, 16, dtype=torch.uint8), labels=[0, 1, 2], pixels="pasted", batch_size=2
    )
)
check("render")(lambda: pipeline().render(torch.zeros(3, 4, dtype=torch.int64), batch_size=2))


# -------------------------------------------------------------------- launches of a decoding step


BUDGET = 12  # kernels a layer and decoding step


class Operators(TorchDispatchMode):
    """Notes each operator on CUDA tensors that computes something: all but views, allocations and questions.

    As a rule an operator launches one kernel. A sort, a top-k or a cumulative sum launches a few, as may a product that
    cuBLAS splits; only a profile on a GPU tells. Attention is one operator here, as with torch's fused kernels.
    """

    NOTHING = ("empty", "_unsafe_view", "detach", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        on_gpu = any(isinstance(t, Tensor) and t.device.type == CUDA.type for t in tree_leaves((args, kwargs, out)))
        name = function.overloadpacket.__name__
        if on_gpu and function.namespace != "prim" and not function.is_view and not name.startswith(self.NOTHING):
            self.names.append(name)
        return out


def operators_of_a_step(name: str, depth: int, kernel: bool, **changes: object) -> list[str]:
    """Names of the operators from one token to the next, as a CUDA graph records them."""
    paper = base().recipe.sampling
    cfg = paper.prior if name == "prior" else paper.renderer
    how = {"temperature": cfg.temperature, "top_k": min(cfg.top_k, 5), "top_p": cfg.top_p}
    sampler = NextTokenSampler(
        model(name, depth=depth, **changes), micro_batch_size=4, dtype=torch.bfloat16, fixed_shapes=True, **how
    )
    decoder = RecordedSteps()
    decoder._allocate(sampler)
    operators = Operators()

    def one_operator(q: Tensor, *others: object, **how: object) -> Tensor:
        operators.names.append("attention")
        return torch.empty_like(q, memory_format=torch.contiguous_format)

    decoder.kernel = one_operator if kernel else None
    plain = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = one_operator  # this device has no fused kernel that torch could choose
    try:
        with torch.no_grad(), operators:
            decoder._step(sampler, decoder.max_len)
    finally:
        F.scaled_dot_product_attention = plain
    return operators.names


def few_launches(name: str, kernel: bool, **changes: object) -> None:
    few, many = (operators_of_a_step(name, depth, kernel, **changes) for depth in (2, 3))
    layer, depth = len(many) - len(few), base().sequence_config(name).depth
    rest = len(few) - 2 * layer
    assert layer <= BUDGET, f"{layer} in a layer: {many}"
    if kernel:
        assert layer * depth + rest <= BUDGET * depth, (
            f"{layer} in each of {depth} layers and {rest} beside them: {few}"
        )
    else:
        assert rest <= 3 * BUDGET, f"{rest} beside the layers: {few}"


for kernel in () if CUDA.type == "cpu" else (True, False):
    label = "with the kernel" if kernel else "without the kernel"
    check(f"launches of prior {label}")(lambda kernel=kernel: few_launches("prior", kernel))
    check(f"launches of prior with classes {label}")(lambda kernel=kernel: few_launches("prior", kernel, num_classes=4))
    check(f"launches of renderer {label}")(lambda kernel=kernel: few_launches("renderer", kernel))


# -------------------------------------------------------------------- tokenizers


@check("encoder fp32 and bf16")
def _() -> None:
    encoder = random_encoder(SIZE, CUDA)
    images = torch.randint(256, (5, 3, 56, 56), dtype=torch.uint8)
    on_cuda(encoder.features(images), encoder.features(images, torch.bfloat16))


@check("vq encode and decode")
def _() -> None:
    with CUDA:
        tokenizer = VQTokenizer(VQGAN(SIZE.recipe.vqgan))
    codes = tokenizer.encode(torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8, device=CUDA))
    on_cuda(codes, tokenizer.decode(codes))


@check("vq tokenizers of other projects")
def _() -> None:
    for form in foreign_vq.FORMATS:
        with CUDA:
            tokenizer = VQTokenizer(foreign_vq.small(form))
        codes = tokenizer.encode(torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8, device=CUDA))
        on_cuda(codes, tokenizer.decode(codes), tokenizer.embed(codes))


@check("nearest centroids of k-means")
def _() -> None:
    features, find = torch.randn(700, 16, device=CUDA), FastNearest(torch.randn(70, 16, device=CUDA))
    on_cuda(without_waiting(lambda: find(features)))


if __name__ == "__main__":
    progress.quiet()
    for name, function in CHECKS.items():
        if len(sys.argv) > 2 and name not in sys.argv[2:]:
            continue
        fault = None
        NOTES.clear()
        try:
            with nullcontext() if REAL else FakeTensorMode(shape_env=ShapeEnv()):
                function()
        except Exception as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "/digit/" in f.filename]
            where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
            fault = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}{where}"
        print(json.dumps({"name": name, "fault": fault, "notes": sorted(NOTES)}), flush=True)
    fake_device.leave(0)
