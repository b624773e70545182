"""Published VQ tokenizers by name: where their files are, and under which licence, trained on what.

Names of files are from the projects' pages (github.com/FoundationVision/LlamaGen, CompVis/taming-transformers,
bytedance/1d-tokenizer, TencentARC/SEED-Voken; huggingface.co/amused). The package holds no weights of theirs.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from digit.convert.vqgan import CONFIG, WEIGHTS
from digit.errors import DigitError
from digit.released.download import fetch_from_hub, fetch_from_url, list_hub
from digit.runtime.files import as_path, cache_folder
from digit.runtime.network import Refusal, offline
from digit.runtime.paths import nearest

HUB = "hf:"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
FOLDERS = ("vqvae", "movq", "")  # of diffusers' VQModel in a repository, in the order in which they are looked for


@dataclass(frozen=True, kw_only=True)
class PublicVQ:
    """One published tokenizer."""

    place: str
    """OWNER/REPOSITORY/PATH on the Hub, PATH being a file or a folder of diffusers; or the URL of a file."""
    licence: str
    data: str
    """What it was trained on, by its authors."""
    size: float | None = None
    """Megabytes of the file; None where nobody knows."""

    @property
    def repository(self) -> str:
        """OWNER/REPOSITORY on the Hub, else empty."""
        return "" if "://" in self.place else "/".join(self.place.split("/")[:2])

    @property
    def path(self) -> str:
        """Path in the repository."""
        return "/".join(self.place.split("/")[2:])

    def __str__(self) -> str:
        size = "" if self.size is None else f" (about {self.size:.0f} MB)"
        return f"{self.place if '://' in self.place else f'huggingface.co/{self.place}'}{size}"


IMAGENET, WEB_IBQ, WEB_LFQ = (
    "ImageNet-1k",
    "about 200 M pictures: CapFusion, LAION-COCO, CC12M, CC3M, LAION-HD, LAION-Aesthetics, JourneyDB",
    "about 100 M pictures: LAION-COCO, CC12M, CC3M, LAION-HD, LAION-Aesthetics, JourneyDB",
)
HEIBOX, SEED = "https://heibox.uni-heidelberg.de/f", "Apache-2.0"
AMUSED = "web pictures; aMUSEd's model saw LAION-2B, its files do not say what the tokenizer saw"

TOKENIZERS: dict[str, PublicVQ] = {
    "llamagen_vq16": PublicVQ(place="FoundationVision/LlamaGen/vq_ds16_c2i.pt", licence="MIT", data=IMAGENET, size=288),
    "llamagen_vq8": PublicVQ(place="FoundationVision/LlamaGen/vq_ds8_c2i.pt", licence="MIT", data=IMAGENET, size=281),
    "llamagen_vq16_t2i": PublicVQ(
        place="peizesun/llamagen_t2i/vq_ds16_t2i.pt",
        licence="MIT",
        data="ImageNet-1k, then LAION-COCO (50 M) and 10 M pictures of the authors'",
        size=288,
    ),
    "taming_f16_1024": PublicVQ(place=f"{HEIBOX}/140747ba53464f49b476/?dl=1", licence="MIT", data=IMAGENET, size=1000),
    "taming_f16_16384": PublicVQ(place=f"{HEIBOX}/867b05fc8c4841768640/?dl=1", licence="MIT", data=IMAGENET, size=1000),
    "taming_gumbel_f8": PublicVQ(place=f"{HEIBOX}/34a747d5765840b5a99d/?dl=1", licence="MIT", data="OpenImages"),
    "maskgit_f16": PublicVQ(
        place="fun-research/TiTok/maskgit-vqgan-imagenet-f16-256.bin",
        licence="Apache-2.0, for research purposes only",
        data=IMAGENET,
        size=218,
    ),
    "amused_256": PublicVQ(place="amused/amused-256/vqvae", licence="OpenRAIL++", data=AMUSED, size=585),
    "amused_512": PublicVQ(place="amused/amused-512/vqvae", licence="OpenRAIL++", data=AMUSED, size=585),
    **{
        f"ibq_{codes}": PublicVQ(
            place=f"TencentARC/IBQ-Tokenizer-{codes}/imagenet256_{codes}.ckpt", licence=SEED, data=IMAGENET
        )
        for codes in (1024, 8192, 16384, 262144)
    },
    **{
        f"ibq_{codes}_web": PublicVQ(
            place=f"TencentARC/IBQ-Tokenizer-{codes}-Pretrain/IBQ_pretrain_{codes}.ckpt", licence=SEED, data=WEB_IBQ
        )
        for codes in (16384, 262144)
    },
    **{
        f"open_magvit2_{size}": PublicVQ(
            place=f"TencentARC/Open-MAGVIT2-Tokenizer-{size}-resolution/imagenet_{size}_L.ckpt",
            licence=SEED,
            data=f"{IMAGENET} at {size} px",
        )
        for size in (256, 128)
    },
    **{
        f"open_magvit2_{codes}_web": PublicVQ(
            place=f"TencentARC/Open-MAGVIT2-Tokenizer-{codes}-Pretrain/pretrain256_{codes}.ckpt",
            licence=SEED,
            data=WEB_LFQ,
        )
        for codes in (16384, 262144)
    },
}


@dataclass(frozen=True)
class FoundVQ:
    """Where the weights of a tokenizer are on this machine."""

    path: str
    """A file, FILE#PLACE, or a folder."""
    public: PublicVQ | None = None
    """What is known of it, if it is one of `TOKENIZERS`."""


def find_vq(given: str) -> FoundVQ:
    """The file or folder that --vqgan names: a path, a name of `TOKENIZERS`, or hf:OWNER/REPOSITORY[/PATH].

    Raises DigitError for an unknown name, and where nothing can be fetched: with what to download instead.
    """
    if as_path(given).exists() or not (given in TOKENIZERS or given.startswith(HUB)):
        return FoundVQ(given)
    if given in TOKENIZERS:
        return fetch(given, TOKENIZERS[given])
    place = given.removeprefix(HUB).strip("/")
    repository, path = "/".join(place.split("/")[:2]), "/".join(place.split("/")[2:])
    if not HUB_NAME.fullmatch(repository):
        raise DigitError(f"--vqgan {given}: give {HUB}OWNER/REPOSITORY, or {HUB}OWNER/REPOSITORY/FILE")
    known = {n: t for n, t in TOKENIZERS.items() if t.repository == repository and (not path or t.path == path)}
    if len(known) == 1:
        return fetch(*known.popitem())
    if known:
        raise DigitError(f"{repository} holds several tokenizers: give --vqgan {' or '.join(known)}")
    refusal = cannot_fetch(given, f"huggingface.co/{place}")
    return FoundVQ(str(fetch_hub_path(repository, path or choose_path(repository, refusal), refusal)))


def unknown_name(given: str) -> str:
    """What to add to "no such file": the names that `find_vq` knows."""
    return f"no such file or name: {given}{nearest(given)}; the names are {', '.join(TOKENIZERS)}, or {HUB}OWNER/NAME"


def fetch(name: str, public: PublicVQ) -> FoundVQ:
    """Fetches one of `TOKENIZERS`."""
    refusal = cannot_fetch(name, str(public))
    if not public.repository:
        target = cache_folder() / "vq_tokenizers" / f"{name}.ckpt"
        return FoundVQ(str(fetch_from_url(public.place, target, refusal)), public)
    return FoundVQ(str(fetch_hub_path(public.repository, public.path, refusal)), public)


def cannot_fetch(name: str, place: str) -> Refusal:
    """The message for a file that cannot be downloaded, of the reason."""
    return lambda why: f"cannot fetch {name} ({why}): download {place} elsewhere, and give --vqgan FILE"


def fetch_hub_path(repository: str, path: str, refusal: Refusal) -> Path:
    """A file of a repository, or a folder of diffusers with its config.json and weights."""
    if path.endswith(WEIGHT_FILES):
        return fetch_from_hub(repository, path, refusal)
    inside = f"{path}/" if path else ""
    config = fetch_from_hub(repository, f"{inside}{CONFIG}", refusal)
    fetch_from_hub(repository, f"{inside}{WEIGHTS[0]}", refusal)
    return config.parent


def choose_path(repository: str, refusal: Refusal) -> str:
    """The path of the only tokenizer in a repository: a folder of diffusers, or its only weights file.

    Raises DigitError that lists the files if there are none or several.
    """
    if offline():
        raise DigitError(refusal(f"offline, so that {repository} cannot be listed; give hf:{repository}/FILE"))
    files = list_hub(repository, refusal)
    for folder in FOLDERS:
        inside = f"{folder}/" if folder else ""
        if {f"{inside}{CONFIG}", f"{inside}{WEIGHTS[0]}"} <= set(files):
            return folder
    weights = [name for name in files if name.endswith(WEIGHT_FILES)]
    if len(weights) == 1:
        return weights[0]
    shown = ", ".join(weights[:8]) or "none"
    raise DigitError(f"{repository} holds {len(weights)} weights files ({shown}): give --vqgan {HUB}{repository}/FILE")
