"""What published numbers were made with, beside the network's weights: three protocols by name."""

from dataclasses import dataclass
from typing import Literal

ProtocolName = Literal["released", "adm", "clean"]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How images reach the network, and what the published numbers of a protocol were compared with."""

    name: ProtocolName
    about: str
    resize: Literal["tensorflow", "clean"]
    """The network's own resize to 299 px."""
    num_samples: int | None = None
    """Samples of the published numbers; None for any."""
    num_reference: int | None = None
    """Reference images of the published numbers; None for any."""
    reference: Literal["images", "statistics", "any"] = "any"
    """What the reference of the published numbers is."""
    rounding: Literal["truncate", "nearest"] | None = None
    """How decoded pixels of the published samples became uint8; None where that is not said."""
    sizes: tuple[int, ...] = ()
    """Sides in pixels of the images it was published for; () for any."""
    shuffled_splits: bool = True
    """Whether images are shuffled before the Inception Score splits them."""
    fallback_size: int = 256
    """Side in pixels for sets of many sizes, where neither the samples nor --image_size say another."""


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="released",
            about="torch-fidelity's network and resize; 50,000 samples, truncated to uint8 and saved as PNG; "
            "reference: the 50,000 validation images, short side resized to 256, centre cut out, saved as PNG "
            "(this paper, Tables 3 and 4)",
            resize="tensorflow",
            num_samples=50_000,
            num_reference=50_000,
            reference="images",
            rounding="truncate",
            sizes=(256,),
        ),
        Protocol(
            name="adm",
            about="the TensorFlow network and resize of guided-diffusion's evaluator; 50,000 samples; reference: "
            "statistics .npz of the whole training set, with 10,000 of its images for precision and recall; splits of "
            "the Inception Score in order (Dhariwal & Nichol 2021)",
            resize="tensorflow",
            num_samples=50_000,
            reference="statistics",
            sizes=(64, 128, 256, 512),
            shuffled_splits=False,
        ),
        Protocol(
            name="clean",
            about="clean-fid's resize, antialiased bicubic in floating point; any reference (Parmar et al. 2022)",
            resize="clean",
        ),
    )
}
