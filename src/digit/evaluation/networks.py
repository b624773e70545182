"""Judge networks: the InceptionV3 of FID if its weights are given, else EfficientNet-Lite2.

Metrics are called fid, kid, ... with Inception alone; with Lite2 fd_efficientnet_lite2, kd_efficientnet_lite2, ...
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from digit.convert.efficientnet import find_weights, read_classifier
from digit.convert.inception import RELEASED_SHA256, load_inception
from digit.data.pictures import Images, as_images
from digit.errors import DigitError
from digit.metrics.judge import JUDGE_INPUT_SIZE, Judged, JudgeNetwork, judge_input
from digit.models.inception import INPUT_SIZE, InceptionV3, Resize, first_channels
from digit.runtime.files import as_path, sha256_file, sha256_tensors
from digit.runtime.hardware import choose_device, full_precision
from digit.tokenizers.encoders import CPU_CHUNK, EncoderConfig, FrozenEncoder, load_encoder

LITE2 = "efficientnet_lite2"
INCEPTION_METRICS = {
    "fd": "fid",
    "fd_infinity": "fid_infinity",
    "fd_ratio": "fid_ratio",
    "is": "inception_score",
    "kd": "kid",
    "sfd": "sfid",
    "mind": "mind",
    "precision": "precision",
    "recall": "recall",
}  # others, which were published on other networks, are called NAME_inception
AnyNetwork = JudgeNetwork | Callable[[Tensor], Tensor] | str


def load_judge_network(
    inception: str | Path | None = None, *, resize: Resize = "tensorflow", device: str | torch.device | None = None
) -> JudgeNetwork:
    """Load the InceptionV3 of FID from a released weights file, or EfficientNet-Lite2 if no file is given.

    resize is for Inception: tensorflow as in torch-fidelity and ADM's evaluator, or clean as in clean-fid. device None
    uses cuda if available. Raises DigitError for a missing or wrong file, with how to get the weights.
    """
    device = choose_device(device)
    if inception is None:
        return Lite2Judge(device)
    return InceptionJudge(load_inception(inception, resize).to(device), as_path(inception))


Outputs = tuple[Float[Tensor, "B D"], Float[Tensor, "B E"], Float[Tensor, "B C"]]  # pooled, spatial, logits


class Judge(ABC):
    """Runs `_outputs` on batches whose size suits the device."""

    name: str
    device: torch.device

    def judge(self, images: Images) -> Judged:
        """uint8 (B, 3, H, W) RGB, or what else `as_images` takes -> features and logits on the CPU.

        A CPU takes 16 images at a time, for speed.
        """
        batch = as_images(images)
        pieces = batch.split(CPU_CHUNK if self.device.type == "cpu" else max(len(batch), 1))
        with torch.no_grad(), full_precision(self.device):
            outputs = [self._outputs(piece) for piece in pieces]
        return Judged(*(torch.cat(part).float().cpu() for part in zip(*outputs, strict=True)))

    @abstractmethod
    def _outputs(self, images: UInt8[Tensor, "B 3 H W"]) -> Outputs:
        """Pooled features (B, D), spatial features (B, E) and logits (B, C)."""


class InceptionJudge(Judge):
    """InceptionV3. Its logits have no bias, as in the Inception Score of torch-fidelity and ADM's evaluator."""

    name = "inception"

    def __init__(self, net: InceptionV3, path: Path):
        self.net, self.device = net, net.fc.weight.device
        self._file = {"weights": path.name, "weights_sha256": sha256_file(path)}

    def _outputs(self, images: UInt8[Tensor, "B 3 H W"]) -> Outputs:
        features = self.net(images)
        return features.pooled, features.spatial, features.logits_unbiased

    def metric(self, name: str) -> str:
        """Full name of a metric: fd -> fid and so on, see INCEPTION_METRICS."""
        return INCEPTION_METRICS.get(name, f"{name}_{self.name}")

    def describe(self) -> dict[str, Any]:
        """Description for a results file; weights_released: whether the file has the released hash."""
        released = self._file["weights_sha256"].startswith(RELEASED_SHA256)
        resize = {"resize": self.net.resize, "input_size": INPUT_SIZE}
        return {"network": self.name} | self._file | {"weights_released": released} | resize


class Lite2Judge(Judge):
    """EfficientNet-Lite2, the judge of `METRIC`: pooled features at 128 px, the last stride-16 map, ImageNet logits."""

    name = LITE2

    def __init__(self, device: torch.device):
        path = find_weights(LITE2)
        cfg = EncoderConfig(name=LITE2, layer="pooled", input_size=JUDGE_INPUT_SIZE, weights=str(path))
        self.encoder: FrozenEncoder = load_encoder(cfg).to(device)
        self.device = device
        self._classifier = tuple(part.to(device) for part in read_classifier(path))
        self._file = {"weights": path.name, "weights_sha256": sha256_file(path)}

    def _outputs(self, images: UInt8[Tensor, "B 3 H W"]) -> Outputs:
        net, x = self.encoder.net, self.encoder.prepare(judge_input(images))
        cells, inner = net.with_inner_map(x, net.cfg.default_layer)  # (B, 16, 1280), (B, 120, 8, 8)
        pooled = cells.mean(1)
        return pooled, first_channels(inner), F.linear(pooled, *self._classifier)

    def metric(self, name: str) -> str:
        """Full name of a metric: fd -> fd_efficientnet_lite2 and so on."""
        return f"{name}_{LITE2}"

    def describe(self) -> dict[str, Any]:
        """Description for a results file."""
        resize = {"resize": "antialiased bicubic, rounded to uint8", "input_size": JUDGE_INPUT_SIZE}
        return {"network": self.name} | self._file | resize


class EncoderJudge(Judge):
    """Any encoder of `digit.tokenizers.encoders`: its class token or pooled output, without logits or an inner map."""

    def __init__(self, encoder: FrozenEncoder):
        self.encoder, self.device = encoder, encoder.device
        self.name = re.sub(r"\W+", "_", encoder.name).strip("_")

    def _outputs(self, images: UInt8[Tensor, "B 3 H W"]) -> Outputs:
        pooled = self.encoder.pooled(images)
        return pooled, pooled.new_zeros(len(pooled), 0), pooled.new_zeros(len(pooled), 0)

    def metric(self, name: str) -> str:
        """Full name of a metric: fd -> fd_dinov2_vitl14 and so on."""
        return f"{name}_{self.name}"

    def describe(self) -> dict[str, Any]:
        """Description for a results file."""
        return {"network": self.name, "resize": "bicubic on the tensor, by the encoder"} | self.encoder.describe()


def load_encoder_judge(
    name: str, weights: str | Path | None = None, device: str | torch.device | None = None
) -> JudgeNetwork:
    """Load an encoder by its name as a network for metrics; efficientnet_lite2 without weights is the usual one.

    Raises DigitError for an unknown name and for missing or wrong weights.
    """
    if name == LITE2 and weights is None:
        return load_judge_network(device=device)
    cfg = EncoderConfig(name=name, layer="pooled", weights=None if weights is None else str(weights))
    return EncoderJudge(load_encoder(cfg).to(choose_device(device)))


class CallableJudge:
    """A function or torch module that turns uint8 images (B, 3, H, W) into features (B, D)."""

    def __init__(self, call: Callable[[Tensor], Tensor]):
        self.call = call
        kind = call if isinstance(call, type) or hasattr(call, "__name__") else type(call)
        self.name = re.sub(r"\W+", "_", getattr(call, "name", None) or kind.__name__).strip("_").lower() or "network"
        self.is_reproducible = isinstance(call, nn.Module)  # what a function computes has no hash

    def judge(self, images: UInt8[Tensor, "B 3 H W"]) -> Judged:
        """Features of a batch, without logits. Raises DigitError for features of another shape, NaN and infinity."""
        if not isinstance(self.call, nn.Module):
            with torch.no_grad():
                features = self.call(images)
        else:
            modes = {module: module.training for module in self.call.modules()}
            where = next((value.device for value in self.call.state_dict().values()), images.device)
            try:
                with torch.no_grad():
                    features = self.call.eval()(images.to(where))
            finally:
                for module, training in modes.items():
                    module.training = training
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise DigitError(
                f"network {self.name} gave {shape} for {len(images)} images, wanted a tensor (B, D): pool its features"
            )
        pooled = features.float().cpu()
        if not torch.isfinite(pooled).all():
            raise DigitError(f"network {self.name} gave NaN or infinity: check its input (uint8, 0..255) and weights")
        return Judged(pooled, pooled.new_zeros(len(pooled), 0), pooled.new_zeros(len(pooled), 0))

    def metric(self, name: str) -> str:
        """Full name of a metric: fd -> fd_NETWORK and so on."""
        return f"{name}_{self.name}"

    def describe(self) -> dict[str, Any]:
        """Description for a results file; a module's with a hash of its weights and buffers."""
        about = {"network": self.name, "resize": "none: the network gets images as they are"}
        if not isinstance(self.call, nn.Module):
            return about
        state = {name: value.detach().cpu() for name, value in self.call.state_dict().items()}
        code = f"{type(self.call).__module__}.{type(self.call).__qualname__}"
        return about | {"code": code, "layers": repr(self.call), "weights_sha256": sha256_tensors(state)}


def as_network(network: JudgeNetwork | Callable[[Tensor], Tensor]) -> JudgeNetwork:
    """A network for metrics from a `JudgeNetwork` or a callable. Raises DigitError for anything else."""
    if isinstance(network, JudgeNetwork):
        return network
    if callable(network):
        return CallableJudge(network)
    raise DigitError(f"network is {type(network).__name__}: wanted a name, a JudgeNetwork, or images -> features")
