"""Residual and product K-means on toy points, also on two ranks; in a module of its own for spawned processes."""

from typing import Any

import torch
from toy_kmeans import blobs

from digit.tokenizers.kmeans.config import ProductKMeansConfig, ResidualKMeansConfig
from digit.tokenizers.quantizers import quantizer_of

CONFIGS = {"residual_kmeans": ResidualKMeansConfig, "product_kmeans": ProductKMeansConfig}


def level_config(kind: str, **changes: Any) -> ResidualKMeansConfig | ProductKMeansConfig:
    """Six codes on two levels."""
    return CONFIGS[kind](**{"num_clusters": 6, "num_levels": 2} | changes)


def across_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    init = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    shares = (blobs(spread=1.5)[:170], blobs(spread=1.5)[170:])
    found = {}
    for kind in CONFIGS:
        cfg = level_config(kind, pca=3, whiten=True)
        found[kind] = quantizer_of(cfg).fit(cfg, shares[rank], across_ranks=True, folder=f"{folder}/{kind}").centroids
    torch.save(found, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()
