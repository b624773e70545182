"""Settings of `digit evaluate` and `digit statistics`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from digit.errors import DigitError
from digit.evaluation.networks import AnyNetwork, as_network, load_encoder_judge, load_judge_network
from digit.evaluation.protocols import PROTOCOLS, ProtocolName
from digit.evaluation.published import PUBLISHED, load_published
from digit.metrics.judge import JudgeNetwork
from digit.runtime.files import as_path, cache_folder

NO_CACHE = "none"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How samples are compared with a reference."""

    measures: Literal["all", "published"] = "all"
    """all, or published: FID, Inception Score, sFID, KID, precision and recall alone, as tables of papers have them."""
    protocol: ProtocolName = "released"
    """released (torch-fidelity's network and resize, against 50,000 validation PNGs of 256 px), adm (statistics .npz of
    the training set, precision and recall against its images) or clean (clean-fid's resize)"""
    inception: str | None = None
    """Weights of FID's InceptionV3 (pt_inception-2015-12-05-6726825d.pth); without them EfficientNet-Lite2 is used,
    and the metrics are no FID."""
    network: str | None = None
    """Another network: dinov2 (of FD-DINOv2, as dgm-eval runs it), clip (of CMMD), or an encoder, named as for
    --tokenizer.encoder.name, such as dinov2_vitb14 or hf:NAME; the feature is its class token or pooled output. Metrics
    have its name."""
    weights: str | None = None
    """Weights file of that network."""
    num: int | None = None
    """Use the first NUM samples; all by default."""
    num_reference: int | None = None
    """Use NUM_REFERENCE reference images: the first, or spread evenly if sorted by class; all by default."""
    image_size: int | None = None
    """Resize the short side of both sets to IMAGE_SIZE pixels (PIL bicubic) and crop the centre. By default sets of one
    square size stay unchanged and others are resized to the samples' size."""
    pixel_max: int | None = None
    """Value of white in images of more than 8 bits per channel, such as 4095 for 12 bits; by default as the file
    states, or as the largest values of some images show."""
    num_splits: int = 10
    """Number of splits of the Inception Score: 10, as of published scores. `digit sweep` and `digit reproduce` take
    fewer where a split would hold less than 500 samples."""
    num_neighbours: int = 3
    """Neighbours k of precision and recall."""
    density_neighbours: int = 5
    """Neighbours k of density and coverage."""
    kernel_subsets: int = 100
    """Random subsets of the kernel distance (KID)."""
    kernel_subset_size: int = 1000
    """Images in each subset; at most as many as there are."""
    num_directions: int = 1000
    """Random directions of MIND."""
    seed: int = 0
    """Seed of splits, subsets, halves and directions."""
    batch_size: int = 64
    """Images that go through the network at a time."""
    cache: str | None = None
    """Folder that caches features by content: 11 to 20 MB per 1,000 images. Default: features in DIGIT_CACHE or in the
    user's cache folder for digit; none to cache nothing."""

    def __post_init__(self) -> None:
        if self.protocol not in get_args(ProtocolName):
            raise DigitError(f"protocol is {self.protocol!r}: choose one of {', '.join(get_args(ProtocolName))}")
        if self.measures not in ("all", "published"):
            raise DigitError(f"measures is {self.measures!r}: choose all or published")
        if self.network is not None and self.inception is not None:
            raise DigitError("--network and --inception are both given: choose one network")
        if self.weights is not None and self.network is None:
            raise DigitError("--weights is given without --network: name the encoder whose weights they are")
        counts = (
            "num_splits",
            "num_neighbours",
            "density_neighbours",
            "kernel_subsets",
            "num_directions",
            "batch_size",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise DigitError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.kernel_subset_size < 2:
            raise DigitError(f"kernel_subset_size is {self.kernel_subset_size}: give at least 2")
        if self.image_size is not None and not 8 <= self.image_size <= 4096:
            raise DigitError(f"image_size is {self.image_size}: give 8 to 4096 pixels")

    @property
    def cache_folder(self) -> Path | None:
        """Folder that caches features; None for no cache."""
        if self.cache == NO_CACHE:
            return None
        return as_path(self.cache) if self.cache else cache_folder() / "features"

    def load_network(self, device: str | torch.device | None = None) -> JudgeNetwork:
        """Load the network of the protocol. Raises DigitError for missing or wrong weights."""
        if self.network in PUBLISHED:
            return load_published(self.network, self.weights, device)
        if self.network is not None:
            return load_encoder_judge(self.network, self.weights, device)
        return load_judge_network(self.inception, resize=PROTOCOLS[self.protocol].resize, device=device)

    def choose_network(self, network: AnyNetwork | None, device: str | torch.device | None = None) -> JudgeNetwork:
        """`network`, which may be a name with these settings' weights; None for the one that they name."""
        if isinstance(network, str):
            return replace(self, network=network, inception=None).load_network(device)
        return self.load_network(device) if network is None else as_network(network)
