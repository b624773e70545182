"""PCA on toy features, also on two ranks; in a module of its own, which a spawned process can import."""

import numpy as np
import torch
from toy_kmeans import pieces

from digit.tokenizers.kmeans.codebook import fit_kmeans
from digit.tokenizers.kmeans.config import KMeansConfig
from digit.tokenizers.pca import fit_pca


def correlated(num: int, dim: int, seed: int = 0) -> torch.Tensor:
    """(N, D) Gaussian points with variances from 1 to 100 along random directions."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    return torch.from_numpy(rng.standard_normal((num, dim)) * np.geomspace(1, 10, dim) @ turn).float()


def across_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    init = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    x = correlated(300, 5)
    own = (x[:130], x[130:])[rank]
    pca, explained = fit_pca(pieces(own, 50), 3, whiten=True, across_ranks=True)
    book = fit_kmeans(KMeansConfig(num_clusters=6, pca=3, whiten=True), own, across_ranks=True)
    torch.save(pca.tensors() | {"explained": explained, "centroids": book.centroids}, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()
