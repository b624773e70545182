"""Floors: the matrix multiplications ("products") of a computation alone, in its shapes, dtypes and order.

Each product uses the fastest kernel that torch has for it on this machine, even if the computation uses another. Norms,
activations, softmax, biases, copies and random numbers are left out. Attention of several queries is two batched
products on a CPU and torch's fused kernel on a GPU, where writing the scores would cost more than the softmax.
Shapes: B rows, H heads, d = D / H, n queries, t keys.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from digit.models.products import linear as onednn_linear
from digit.models.products import prepacked
from digit.models.sequence import SequenceConfig
from digit.models.transformer import TransformerConfig
from digit.models.vit import ViTConfig

Run = Callable[[], object]


class Operands:
    """Random matrices on a device: one input per shape, a new matrix for every weight."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.options = {"device": device, "dtype": dtype}
        self.inputs: dict[tuple[int, ...], Tensor] = {}
        self.best: dict[tuple[int, ...], int] = {}  # shapes and strides -> kernel

    def weight(self, rows: int, columns: int) -> Tensor:
        """A new (rows, columns) matrix."""
        return torch.randn(rows, columns, **self.options) * columns**-0.5

    def block(self, cfg: TransformerConfig | ViTConfig, hidden: int) -> list[Tensor]:
        """New weights of a transformer block: qkv, out, fc1, fc2."""
        width = cfg.embed_dim
        shapes = ((3 * width, width), (width, width), (hidden, width), (width, hidden))
        return [self.weight(*shape) for shape in shapes]

    def input(self, *shape: int) -> Tensor:
        """The input of this shape."""
        if shape not in self.inputs:
            self.inputs[shape] = torch.randn(shape, **self.options)
        return self.inputs[shape]

    def product(self, rows: int, weight: Tensor) -> Run:
        """x W^T for `rows` rows, with the weight packed if that is faster."""
        return self.fastest(self.input(rows, weight.shape[1]), weight, may_pack=True)

    def fastest(self, x: Tensor, weight: Tensor, may_pack: bool = False) -> Run:
        """x W^T with torch's fastest kernel for these shapes and layouts on this machine."""
        kernels = [partial(F.linear, x, weight)]
        if x.device.type == "cpu":
            kernels.append(partial(onednn_linear, x, weight))
            if may_pack:
                kernels.append(partial(onednn_linear, x, prepacked(weight, len(x))))
        key = (*x.shape, *x.stride(), *weight.shape, *weight.stride())
        if key not in self.best:
            self.best[key] = min(range(len(kernels)), key=lambda i: trial(kernels[i])) if len(kernels) > 1 else 0
        return kernels[self.best[key]]

    def products(self, rows: int, kept: int, weights: Sequence[Tensor]) -> list[Run]:
        """The products of a block: the first on all rows, the others on the rows kept after the attention."""
        return [self.product(rows, weights[0]), *(self.product(kept, weight) for weight in weights[1:])]


def trial(run: Run) -> float:
    """Seconds of the best of three runs."""
    taken = []
    for _ in range(4):  # the first warms up
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def attention_products(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> None:
    """q k^T and p v for (B * H, n, d) over (B * H, t, d).

    On a GPU without cuDNN's kernel, which would build a plan for each length of a cache.
    """
    if q.is_cuda:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
            F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=causal)
    else:
        torch.bmm(torch.bmm(q, k.transpose(1, 2)), v)


def by_rows(q: Tensor, keys: Tensor) -> Tensor:
    """q k^T of one query per head."""
    return torch.bmm(q, keys.transpose(1, 2))


def by_columns(q: Tensor, keys: Tensor) -> Tensor:
    """The same as (k q^T)^T, which is much faster for some dtypes on a CPU."""
    return torch.bmm(keys, q.transpose(1, 2)).transpose(1, 2)


def cached_attention(shape: tuple[int, int, int, int], operands: Operands) -> Callable[[int, int], None]:
    """Returns (layer, end) -> products of one query over the first `end` positions of a cache (depth, B * H, T, d).

    On a CPU it takes the fastest order of operands, and float32 where that beats half precision.
    """

    def kernel(depth: int, dtype: torch.dtype, scores: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., None]:
        options: dict[str, Any] = operands.options | {"dtype": dtype}
        keys, values = (torch.randn(depth, *shape[1:], **options) for _ in range(2))
        q = torch.randn(shape[1], 1, shape[3], **options)

        def run(layer: int, end: int) -> None:
            k, v = keys[layer, :, :end], values[layer, :, :end]
            if q.is_cuda:
                attention_products(q, k, v)
            else:
                torch.bmm(scores(q, k), v)

        return run

    kinds = [(operands.options["dtype"], by_rows)]
    if operands.options["device"].type == "cpu":
        kinds = [
            (dtype, scores) for dtype in {operands.options["dtype"], torch.float32} for scores in (by_rows, by_columns)
        ]
        kinds.sort(key=lambda kind: trial(partial(kernel(1, *kind), 0, shape[2])))
    return kernel(shape[0], *kinds[0])


def replayed(run: Run, device: torch.device) -> Run:
    """On a GPU, captures `run` as one CUDA graph; otherwise thousands of small launches would set the floor."""
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@torch.no_grad()
def decoding(cfg: SequenceConfig, batch: int, device: torch.device, dtype: torch.dtype) -> Run:
    """Next-token decoding with a cache: one pass over [prefix | start], then one token at a time."""
    operands = Operands(device, dtype)
    heads, known, length = batch * cfg.num_heads, cfg.prefix_len + 1, cfg.prefix_len + cfg.target_len
    weights = [operands.block(cfg, cfg.mlp_dim) for _ in range(cfg.depth)]
    head = operands.product(batch, operands.weight(cfg.vocab_size, cfg.embed_dim))
    dim = cfg.embed_dim // cfg.num_heads
    cached = cached_attention((cfg.depth, heads, length, dim), operands)
    q = operands.input(heads, known, dim)
    # the last block only needs its last position
    kept = [known] * (cfg.depth - 1) + [1]
    first = [operands.products(batch * known, batch * n, block) for n, block in zip(kept, weights, strict=True)]
    later = [operands.products(batch, batch, block) for block in weights]

    @torch.no_grad()
    def run() -> None:
        whole_pass(first, partial(attention_products, q, q, q, causal=True))
        head()
        for end in range(known + 1, length + 1):
            for layer, (qkv, *others) in enumerate(later):
                qkv()
                cached(layer, end)
                for product in others:
                    product()
            head()

    return replayed(run, device)


@torch.no_grad()
def refining(cfg: SequenceConfig, batch: int, num_steps: int, device: torch.device, dtype: torch.dtype) -> Run:
    """Masked decoding: `num_steps` passes over [prefix | start | target], logits of the target."""
    operands = Operands(device, dtype)
    length = cfg.prefix_len + 1 + cfg.target_len
    kept = [length] * (cfg.depth - 1) + [cfg.target_len]  # after the last block only the target is needed
    blocks = [operands.products(batch * length, batch * n, operands.block(cfg, cfg.mlp_dim)) for n in kept]
    head = operands.product(batch * cfg.target_len, operands.weight(cfg.vocab_size, cfg.embed_dim))
    q = operands.input(batch * cfg.num_heads, length, cfg.embed_dim // cfg.num_heads)
    attention = partial(attention_products, q, q, q)

    @torch.no_grad()
    def run() -> None:
        for _ in range(num_steps):
            whole_pass(blocks, attention)
            head()

    return run


def whole_pass(blocks: Sequence[Sequence[Run]], attention: Run) -> None:
    """Runs every block over all positions."""
    for qkv, *others in blocks:
        qkv()
        attention()
        for product in others:
            product()


@torch.no_grad()
def encoding(cfg: ViTConfig, side: int, batch: int, chunk: int, device: torch.device, dtype: torch.dtype) -> Run:
    """The patch embedding and kept blocks of a ViT, `chunk` images at a time; batch is a multiple of chunk."""
    operands = Operands(device, dtype)
    patches = (side // cfg.patch_size) ** 2
    length = 1 + cfg.num_registers + patches
    embed = operands.product(chunk * patches, operands.weight(cfg.embed_dim, 3 * cfg.patch_size**2))
    weights = [operands.block(cfg, cfg.hidden_dim) for _ in range(cfg.kept_blocks)]
    blocks = [operands.products(chunk * length, chunk * length, block) for block in weights]
    q = operands.input(chunk * cfg.num_heads, length, cfg.embed_dim // cfg.num_heads)
    attention = partial(attention_products, q, q, q)

    @torch.no_grad()
    def run() -> None:
        for _ in range(batch // chunk):
            embed()
            whole_pass(blocks, attention)

    return run


@torch.no_grad()
def training(cfg: SequenceConfig, batch: int, device: torch.device, dtype: torch.dtype) -> Run:
    """One training step of a next-token model: every product forward, and backward for its input and its weight."""
    operands = Operands(device, dtype)
    length = cfg.prefix_len + cfg.target_len
    products: list[Run] = []
    for layer in range(cfg.depth):
        kept = cfg.target_len if layer == cfg.depth - 1 else length
        qkv, *others = operands.block(cfg, cfg.mlp_dim)
        products += three_products(operands, batch * length, qkv)
        for weight in others:
            products += three_products(operands, batch * kept, weight)
    products += three_products(operands, batch * cfg.target_len, operands.weight(cfg.vocab_size, cfg.embed_dim))
    heads = (batch, cfg.num_heads, length, cfg.embed_dim // cfg.num_heads)

    def run() -> None:
        with torch.no_grad():
            for product in products:
                product()
        for _ in range(cfg.depth):
            attention_training(operands, heads)

    return run


def three_products(operands: Operands, rows: int, weight: Tensor) -> list[Run]:
    """y = x W^T, dx = dy W and dW = dy^T x, with the operands' real memory layouts."""
    x, gradient = operands.input(rows, weight.shape[1]), operands.input(rows, weight.shape[0])
    return [operands.fastest(x, weight), operands.fastest(gradient, weight.T), operands.fastest(gradient.T, x.T)]


def attention_training(operands: Operands, shape: tuple[int, int, int, int]) -> None:
    """Causal attention forward and backward: six products on a CPU, the fused kernels on a GPU."""
    if operands.options["device"].type == "cuda":
        q = operands.input(*shape).requires_grad_()
        with torch.enable_grad():
            out = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        torch.autograd.grad(out, q, torch.ones_like(out))
        return
    batch, heads, length, dim = shape
    x, p = operands.input(batch * heads, length, dim), operands.input(batch * heads, length, length)
    with torch.no_grad():
        for _ in range(2):  # q k^T and dy v^T
            torch.bmm(x, x.transpose(1, 2))
        torch.bmm(p, x)  # p v
        torch.bmm(p, x)  # ds k
        for _ in range(2):  # p^T dy and ds^T q
            torch.bmm(p.transpose(1, 2), x)


@contextmanager
def recorded_convolutions(net: nn.Module, dtype: torch.dtype) -> Iterator[list[Run]]:
    """Records each convolution of `net` that runs inside, to run alone: same shapes and memory format, in `dtype`."""
    inputs: dict[tuple, Tensor] = {}
    weights: dict[nn.Conv2d, Tensor] = {}
    recorded: list[Run] = []

    def record(conv: nn.Conv2d, arguments: tuple[Tensor], output: Tensor) -> None:
        (x,) = arguments
        key = (x.shape, x.stride())
        if key not in inputs:
            inputs[key] = torch.randn_like(x, dtype=dtype)
        if conv not in weights:
            weights[conv] = conv.weight.detach().to(dtype)
        source, weight = inputs[key], weights[conv]
        recorded.append(lambda: F.conv2d(source, weight, stride=conv.stride, padding=conv.padding))

    handles = [m.register_forward_hook(record) for m in net.modules() if isinstance(m, nn.Conv2d)]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def distances(num: int, dim: int, clusters: int, rows: int, device: torch.device, dtype: torch.dtype) -> Run:
    """x c^T of all points with the centroids, `rows` points at a time."""
    operands = Operands(device, dtype)
    centroids = operands.weight(clusters, dim)
    product, rest = operands.product(rows, centroids), operands.product(num % rows, centroids) if num % rows else None

    @torch.no_grad()
    def run() -> None:
        for _ in range(num // rows):
            product()
        if rest:
            rest()

    return run
