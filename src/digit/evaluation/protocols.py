"""Three protocols of published metrics: everything besides the network's weights that changes them."""

from dataclasses import dataclass
from typing import Literal

ProtocolName = Literal["released", "adm", "clean"]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How images are prepared for the network, and which samples and reference the published metrics used."""

    name: ProtocolName
    about: str
    resize: Literal["tensorflow", "clean"]
    """The network's own resize to 299 px."""
    num_samples: int | None = None
    """Number of samples of the published metrics; None for any."""
    num_reference: int | None = None
    """Number of reference images of the published metrics; None for any."""
    reference: Literal["images", "statistics", "any"] = "any"
    """Reference of the published metrics."""
    rounding: Literal["truncate", "nearest"] | None = None
    """How the published samples were rounded to uint8; None if not published."""
    sizes: tuple[int, ...] = ()
    """Image sizes in pixels for which metrics were published; () for any."""
    shuffled_splits: bool = True
    """Whether images are shuffled before the Inception Score splits them."""
    fallback_size: int = 256
    """Size in pixels for sets of mixed sizes, if neither the samples nor --image_size give one."""


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
