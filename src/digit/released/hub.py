"""The authors' checkpoints on the Hugging Face Hub: downloaded into its cache, verified, converted once.

Names, sizes and SHA-256 of the files are from the repository's own pages (huggingface.co/DAMO-NLP-SG/DiGIT, commits
0e4f60e, 0f79f06, 0e1109c). A prior also contains encoder and codebook, a renderer those and the VQGAN.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from digit.errors import DigitError, MismatchError
from digit.pipeline.manifest import MANIFEST, RELEASED
from digit.released.convert import ReleasedFiles, convert_release
from digit.released.download import fetch_from_hub
from digit.runtime.files import cache_folder, sha256_file

REPOSITORY = RELEASED


@dataclass(frozen=True)
class HubFile:
    """One file of the repository."""

    folder: str
    size: int
    sha256: str | None = None
    """None if unknown; the size is then estimated from the number of parameters."""

    @property
    def path(self) -> str:
        """Path in the repository."""
        return f"outputs/{self.folder}/checkpoints/checkpoint_last.pt"

    def __str__(self) -> str:
        return f"{self.path} ({'' if self.sha256 else 'about '}{self.size / 1e9:.2f} GB)"


BASE_RENDERER = HubFile(
    "base_8k_stage2_400epoch", 1446434572, "e1b8a469037211deb89f62d69512673af852c83256cb157cff8b2a1f58192f73"
)
LARGE_RENDERER = HubFile("large_16k_stage2", 4_350_000_000)
VARIANTS: dict[str, dict[str, HubFile]] = {
    "base": {
        "prior": HubFile(
            "base_8k_stage1_400epoch", 1249237258, "bb5f0dc5c8a2b4bb921bb87cbf0209d31eb0b77d8e8e9c5474c9c40ea1717676"
        ),
        "renderer": BASE_RENDERER,
    },
    "base_200epoch": {
        "prior": HubFile(
            "base_8k_stage1", 1249237258, "3ddff6a599ccf0aac6f43c0e087cd13de278a9a61ee1e4554904b49c4788548b"
        ),
        "renderer": BASE_RENDERER,
    },
    "base_cls": {
        "prior": HubFile(
            "base_8k_stage1_cls", 1253333258, "6e17c6ee076933ecde2fa57e83046ec114f83b98ab812abcd3e6d73dcabffd8a"
        ),
        "renderer": BASE_RENDERER,
    },
    "base_cls_400epoch": {
        "prior": HubFile(
            "base_8k_stage1_cls_400epoch",
            1253333322,
            "7cbb1be22c5ccbb3216e2d84022cc8176caf845593351b824d06013d7b9c4700",
        ),
        "renderer": BASE_RENDERER,
    },
    "large": {"prior": HubFile("large_16k_stage1", 4_206_000_000), "renderer": LARGE_RENDERER},
    "large_cls": {"prior": HubFile("large_16k_stage1_cls", 4_212_000_000), "renderer": LARGE_RENDERER},
}


def released_pipeline(repository: str = REPOSITORY, variant: str = "base") -> Path:
    """Returns the folder of a released pipeline, which is downloaded, verified and converted on first use.

    Raises DigitError for an unknown repository or variant, and if a file cannot be downloaded: the message then lists
    the files, their sizes, and the command that uses local copies.
    """
    if repository != REPOSITORY:
        raise DigitError(f"no released checkpoints known at {repository}: give {REPOSITORY}, or a folder")
    if variant not in VARIANTS:
        raise DigitError(f"no variant {variant} of {REPOSITORY}: choose one of {', '.join(VARIANTS)}")
    out = cache_folder() / REPOSITORY / variant
    if (out / MANIFEST).exists():
        return out
    paths: dict[str, Any] = {name: str(fetch(file, variant)) for name, file in VARIANTS[variant].items()}
    convert_release(ReleasedFiles(**paths, renderer_kind="ar"), out)
    return out


def fetch(file: HubFile, variant: str) -> Path:
    """Returns a file's path in huggingface_hub's cache, after downloading (unless offline) and verifying it."""
    path = fetch_from_hub(REPOSITORY, file.path, lambda why: unreachable(variant, why))
    if file.sha256 and (hashed := sha256_file(path)) != file.sha256:
        raise MismatchError(
            f"{path} has SHA-256 {hashed[:12]}, the released file {file.sha256[:12]}: delete it and fetch it again"
        )
    return path


def unreachable(variant: str, why: str) -> str:
    """The error message for files that cannot be downloaded: what is needed and what to do."""
    files = VARIANTS[variant]
    options = " ".join(f"--{name} {name.upper()}.pt" for name in files)
    return (
        f"cannot fetch {variant} of {REPOSITORY} ({why}). Needed: {'; '.join(map(str, files.values()))}. With local "
        f"copies: digit convert {options} --out FOLDER, then --from FOLDER"
    )
