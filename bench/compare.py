"""Compares DiGIT's speed with other libraries in one run: faiss, scikit-learn, transformers, Pillow, and with the
released decoding in plain torch.

    make env-bench && .venv/bin/python bench/compare.py            # all, about ten minutes on two cores
    .venv/bin/python bench/compare.py --only gpt2,dinov2 --json compare.json

Both sides do the same work: the same points, initialisation and iterations; the same depth, width, vocabulary, length
and batch; the same blocks and dtypes; the same files. Libraries that are not installed are named and skipped. Both run
in this process, with the same threads and allocator settings.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from digit.benchmark import encode, kmeans
from digit.benchmark.clock import Timing, alternate
from digit.benchmark.data import read_files
from digit.benchmark.sizes import Points, Size, get_size
from digit.benchmark.table import number, versions
from digit.data.decode import decode_image
from digit.data.preprocess import PreprocessConfig, crop_image
from digit.errors import DigitError
from digit.runtime.files import write_json
from digit.runtime.hardware import choose_device, describe_machine, keep_freed_memory, multiplies_bf16
from digit.runtime.progress import quiet
from digit.sampling.config import StageSampling
from digit.sampling.kinds import make_sampler
from digit.tokenizers.encoders import PRECISIONS
from digit.tokenizers.kmeans.kmeans import KMeans
from digit.tokenizers.kmeans.nearest import nearest
from digit.tokenizers.kmeans.points import open_points
from plain_decoding import PlainPrior

TOP_K = 200  # the paper's prior
NO_TARGET = 0.0
INERTIA_SLACK = 1.001  # within 0.1% of faiss
MINIBATCH_PASSES, MINIBATCH_SIZE = 2, 4096  # scikit-learn: passes over the points, points per batch


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row: our speed over the peer's, and the least that it should be."""

    case: str
    peer: str
    unit: str
    count: float
    ours: Timing
    theirs: Timing
    target: float = NO_TARGET
    note: str = ""
    holds: bool = True  # whether the target's other condition holds

    @property
    def ratio(self) -> float:
        """Our speed / the peer's."""
        return self.theirs.over(self.ours)

    @property
    def verdict(self) -> str:
        """yes or NO; empty without a target."""
        return "" if not self.target else ("yes" if self.ratio >= self.target and self.holds else "NO")

    def cells(self) -> tuple[str, ...]:
        """Returns the row of the table."""
        rates = (f"{number(self.count / t.median)} {self.unit}/s" for t in (self.ours, self.theirs))
        target = f">= {self.target:g}" if self.target else ""
        return (self.case, *rates, self.peer, f"{self.ratio:.2f}x", target, self.verdict, self.note)

    def to_dict(self) -> dict[str, Any]:
        """Returns the row of the JSON results."""
        more = {"ratio": self.ratio, "verdict": self.verdict, "ours": self.ours.seconds, "theirs": self.theirs.seconds}
        return {k: v for k, v in asdict(self).items() if k not in ("ours", "theirs", "holds")} | more


Rows = Iterator[Comparison]


def compare_faiss(size: Size, device: torch.device, repeats: int) -> Rows:
    """The same number of Lloyd iterations from the same initial centroids on both sides."""
    for points in size.points:
        yield faiss_row(points, device, min(repeats, kmeans.MAX_REPEATS))


def faiss_row(points: Points, device: torch.device, repeats: int) -> Comparison:
    import faiss

    x, fits = kmeans.random_points(points, device), {}
    start = open_points(x, kmeans.kmeans_config(points)).take_start()[: points.clusters].cpu().numpy()
    points_numpy = x.cpu().numpy()

    def theirs() -> None:
        fit = faiss.Kmeans(
            points.dim,
            points.clusters,
            niter=points.iterations,
            max_points_per_centroid=points.num,
            min_points_per_centroid=1,
        )
        fit.train(points_numpy, init_centroids=start)
        fits["theirs"] = torch.from_numpy(fit.centroids).to(device)

    times = run(partial(fit_ours, points, x, fits), theirs, repeats, device, warm_up=False)
    inertia = {name: total_distance(x, centroids) for name, centroids in fits.items()}
    share = inertia["ours"] / inertia["theirs"]
    return Comparison(
        case=f"K-means {points.name}",
        peer=f"faiss {faiss.__version__}",
        unit="points",
        count=points.num * points.iterations,
        **times,
        target=2.0,
        note=f"inertia {share - 1:+.3%} of faiss's",
        holds=share <= INERTIA_SLACK,
    )


def fit_ours(points: Points, x: Tensor, fits: dict[str, Tensor]) -> None:
    fits["ours"] = KMeans(kmeans.kmeans_config(points)).fit(x).centroids_


def total_distance(x: Tensor, centroids: Tensor) -> float:
    """Sum of ||x - c||^2 to the nearest centroid."""
    return sum(float((p - centroids[nearest(p, centroids)]).double().square().sum()) for p in x.split(65536))


def compare_sklearn(size: Size, device: torch.device, repeats: int) -> Rows:
    """MiniBatchKMeans makes fewer and cheaper updates: points per second, with the inertia reached by both."""
    import sklearn
    from sklearn.cluster import MiniBatchKMeans

    points = replace(size.points[0], iterations=MINIBATCH_PASSES)
    x, fits = kmeans.random_points(points, device), {}
    points_numpy = x.cpu().numpy()
    start = open_points(x, kmeans.kmeans_config(points)).take_start()[: points.clusters].cpu().numpy()
    cfg = dict(n_clusters=points.clusters, init=start, n_init=1, batch_size=min(MINIBATCH_SIZE, points.num))
    cfg |= dict(max_iter=MINIBATCH_PASSES, max_no_improvement=None, tol=0.0, compute_labels=False)

    def theirs() -> None:
        fits["theirs"] = torch.from_numpy(MiniBatchKMeans(**cfg).fit(points_numpy).cluster_centers_).float().to(device)

    times = run(partial(fit_ours, points, x, fits), theirs, min(repeats, 2), device, warm_up=False)
    share = total_distance(x, fits["ours"]) / total_distance(x, fits["theirs"])
    labels = dict(case=f"K-means {points.name}, {MINIBATCH_PASSES} passes", unit="points")
    peer, note = f"MiniBatchKMeans {sklearn.__version__}", f"inertia {share - 1:+.3%} of its"
    yield Comparison(**labels, peer=peer, count=points.num * points.iterations, **times, note=note)


def compare_gpt2(size: Size, device: torch.device, repeats: int) -> Rows:
    """The prior's sampling against GPT-2's `generate` with its cache, both with top-k 200."""
    import transformers

    cfg, targets = size.sequence_config("prior"), {"fp32": 1.5, "bf16": 2.5}
    for precision in size.precisions:
        dtype = PRECISIONS[precision]
        sample = make_sampler(
            size.model("prior", device), StageSampling(top_k=TOP_K), precision=precision, micro_batch_size=size.batch
        )
        times = run(partial(sample, range(size.batch)), gpt2(size, device, dtype), repeats, device)
        yield Comparison(
            case=f"prior {precision}",
            peer=f"transformers {transformers.__version__} GPT-2",
            unit="tokens",
            count=size.batch * cfg.target_len,
            **times,
            target=targets[precision],
        )


def compare_released(size: Size, device: torch.device, repeats: int) -> Rows:
    """The prior's sampling against the released code's incremental decoding, rendered in plain torch."""
    cfg = size.sequence_config("prior")
    for precision in size.precisions:
        sample = make_sampler(
            size.model("prior", device), StageSampling(top_k=TOP_K), precision=precision, micro_batch_size=size.batch
        )
        plain = PlainPrior(cfg).to(device, PRECISIONS[precision]).eval()
        times = run(partial(sample, range(size.batch)), partial(plain.sample, size.batch, TOP_K), repeats, device)
        labels = dict(case=f"prior {precision}", unit="tokens", count=size.batch * cfg.target_len)
        yield Comparison(**labels, peer="plain torch, as released", **times, target=1.5)


def gpt2(size: Size, device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    """GPT-2 in the prior's shape, sampling as many tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    cfg = size.sequence_config("prior")
    shape = dict(n_layer=cfg.depth, n_embd=cfg.embed_dim, n_head=cfg.num_heads, n_positions=cfg.target_len + 1)
    theirs = GPT2Config(vocab_size=cfg.vocab_size, **shape, bos_token_id=0, eos_token_id=None, pad_token_id=0)
    model = GPT2LMHeadModel(theirs).to(device, dtype).eval()
    start = torch.zeros(size.batch, 1, dtype=torch.int64, device=device)
    num = dict(max_new_tokens=cfg.target_len, min_new_tokens=cfg.target_len)
    options = dict(
        attention_mask=torch.ones_like(start), do_sample=True, top_k=min(TOP_K, cfg.vocab_size), use_cache=True
    )
    return partial(model.generate, start, **num, **options)


def compare_dinov2(size: Size, device: torch.device, repeats: int) -> Rows:
    """The same blocks in the same dtype, on the same images."""
    import transformers
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    vit, ours = size.vit, encode.cases(size, device)
    shape = dict(hidden_size=vit.embed_dim, num_hidden_layers=vit.kept_blocks, num_attention_heads=vit.num_heads)
    shape |= dict(patch_size=vit.patch_size, image_size=vit.patch_size * vit.table_side)
    cfg = Dinov2WithRegistersConfig(**shape, num_register_tokens=vit.num_registers)
    chunk = encode.chunk_size(size, device)
    for precision in size.precisions:
        model = Dinov2WithRegistersModel(cfg).to(device, PRECISIONS[precision]).eval()
        images = torch.randn(size.encode_batch, 3, size.vit_side, size.vit_side, device=device)
        images = images.to(PRECISIONS[precision])

        @torch.no_grad()
        def theirs(model: Any = model, images: Tensor = images) -> None:
            for part in images.split(chunk):
                model(pixel_values=part)

        times = run(ours[precision], theirs, repeats, device)
        labels = dict(case=f"ViT {size.vit_side} px {precision}", unit="images", count=size.encode_batch)
        yield Comparison(**labels, peer=f"transformers {transformers.__version__} Dinov2", **times, target=1.15)


def compare_pillow(size: Size, device: torch.device, repeats: int) -> Rows:
    """JPEG files to crops: ours with its checks and a seeded crop, Pillow with the fewest calls for the same result."""
    files, cfg = read_files(None, size.num_images), PreprocessConfig()

    def ours() -> None:
        for index, data in enumerate(files):
            crop_image(decode_image(data), cfg, seed=0, index=index, crop=0)

    def theirs() -> None:
        for data in files:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            scale = cfg.image_size / min(image.size)
            resized = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
            np.asarray(resized.crop((0, 0, cfg.image_size, cfg.image_size)))

    times = run(ours, theirs, repeats, torch.device("cpu"))
    yield Comparison(case="JPEG to crop", peer="Pillow", unit="images", count=len(files), **times)


def run(
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    repeats: int,
    device: torch.device,
    warm_up: bool = True,
) -> dict[str, Timing]:
    """Times both, alternating."""
    return alternate({"ours": ours, "theirs": theirs}, repeats, device, warm_up=warm_up)[0]


PEERS = {
    "kmeans": ("faiss", compare_faiss),
    "sklearn": ("sklearn", compare_sklearn),
    "gpt2": ("transformers", compare_gpt2),
    "released": ("torch", compare_released),
    "dinov2": ("transformers", compare_dinov2),
    "pillow": ("PIL", compare_pillow),
}
HEAD = ("case", "ours", "peer's", "peer", "ours / peer", "target", "", "")


def main() -> int:
    """Prints each row when it is measured. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PEERS), help=f"some of {','.join(PEERS)}")
    parser.add_argument("--size", default=None, help="small (default on a CPU), base (default on a GPU) or micro")
    parser.add_argument("--precision", default=None, help="fp32 or bf16 (default: the size's own)")
    parser.add_argument("--device", default=None, help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=None, help="timed rounds after the warm-up")
    parser.add_argument("--json", default=None, help="file for all measurements")
    args = parser.parse_args()
    try:
        compare(args)
    except DigitError as error:
        sys.stderr.write(f"compare: {error}\n")
        return 2
    return 0


def compare(args: argparse.Namespace) -> None:
    """Runs every chosen comparison whose peer is installed."""
    chosen = args.only.split(",")
    if unknown := [name for name in chosen if name not in PEERS]:
        raise DigitError(f"no comparison named {unknown[0]}: choose some of {','.join(PEERS)}")
    keep_freed_memory()
    quiet()
    with suppress(ImportError):
        import transformers

        transformers.logging.set_verbosity_error()
    device = choose_device(args.device)
    size = get_size(args.size, device, args.precision)
    if not args.precision and not multiplies_bf16(device):
        sys.stdout.write("this machine emulates bf16: its bf16 speeds mean little\n")
    rows: list[Comparison] = []
    say_row(HEAD)
    for name in chosen:
        package, compare_with = PEERS[name]
        if find_spec(package) is None:
            sys.stdout.write(f"{name}: {package} is not installed (make env-bench); left out\n")
            continue
        for row in compare_with(size, device, args.repeats or size.repeats):
            rows.append(row)
            say_row(row.cells())
    if args.json:
        arguments = {k: v for k, v in vars(args).items() if k != "json"}
        about = {"machine": describe_machine(), "versions": versions(), "arguments": arguments}
        write_json(args.json, about | {"results": [row.to_dict() for row in rows]})


WIDTHS = (32, 20, 20, 28, 11, 8, 4, 0)


def say_row(cells: tuple[str, ...]) -> None:
    padded = [c.rjust(w) if i in (1, 2, 4) else c.ljust(w) for i, (c, w) in enumerate(zip(cells, WIDTHS, strict=True))]
    sys.stdout.write("  ".join(padded).rstrip() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
