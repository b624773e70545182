"""Memory of a training step: runs the step on tensors without storage and counts the bytes that would be alive.

For a CPU the step is `SequenceUpdate` itself on fake CPU tensors. For a GPU it is the same model, loss, optimizer and
EMA on meta tensors under `GPURules`, because torch built without CUDA can neither fake CUDA tensors nor autocast them.
Not counted: workspaces of kernels, the CUDA context and fragmentation; `digit.planning.machines` reserves memory for
those.
"""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from digit.models.sequence import SequenceConfig, SequenceModel
from digit.training.compile import TransformerForward
from digit.training.config import TrainConfig
from digit.training.ema import EMA
from digit.training.optim import build_optimizer
from digit.training.parallel import LossModule
from digit.training.sequence import SequenceUpdate, add_code_heads

# Resident over live memory of a CPU process, because glibc keeps freed blocks: 1.09 to 1.30 in 8 runs
CPU_FRAGMENTATION = 1.2
MASKED_SHARE = 2 / math.pi  # mean of cos(u pi / 2), u ~ U(0, 1): share of tokens that a masked model's batch masks


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of storages that operations in this context created and that are still referenced."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class GPURules(TorchFunctionMode):
    """Makes meta tensors keep what CUDA kernels under autocast to half precision would keep.

    Matrix multiplication runs in `dtype` on casts of its inputs, norms in float32 (torch's autocast op reference).
    Attention is the flash kernel, which keeps q, k, v, its output and a float32 logsumexp. Dropout keeps a mask of one
    byte per element.
    """

    MATMULS = frozenset((F.linear, F.conv2d, torch.bmm, torch.baddbmm, torch.matmul, Tensor.__matmul__))
    IN_FLOAT32 = frozenset((F.layer_norm, F.group_norm, F.softmax, Tensor.softmax, Tensor.log_softmax))

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in self.MATMULS:
            return func(*cast(args, self.dtype), **cast(kwargs, self.dtype))
        if func in self.IN_FLOAT32 and self.dtype != torch.float32:
            return func(*cast(args, torch.float32), **cast(kwargs, torch.float32))
        if func is F.scaled_dot_product_attention:
            causal = kwargs.get("is_causal", False)
            q, k, v = cast(args, self.dtype)
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[0]
        if func is F.dropout:
            return torch.native_dropout(args[0], kwargs["p"], True)[0]
        return func(*args, **kwargs)


class MaskedRows(TorchFunctionMode):
    """Replaces rows selected by a boolean mask of unknown values by their expected number of rows."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            rows = args[0].flatten(0, args[1].ndim - 1)
            count = math.ceil(MASKED_SHARE * len(rows))
            return rows.index_select(0, torch.zeros(count, dtype=torch.int64, device=rows.device))
        return func(*args, **(kwargs or {}))


def cast(values: Any, dtype: torch.dtype) -> Any:
    """Casts the floating-point tensors of a tuple or a dictionary to `dtype`."""
    if isinstance(values, dict):
        return {name: cast_tensor(value, dtype) for name, value in values.items()}
    return tuple(cast_tensor(value, dtype) for value in values)


def cast_tensor(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Memory of a training step on one device."""

    peak: int
    """Bytes alive at the step's peak."""
    weights: int
    """Bytes of those that stay between steps: weights, their EMA, the optimizer's moments."""


def training_memory(
    cfg: SequenceConfig, training: TrainConfig, *, num_devices: int = 1, gpu: bool = True, code_dim: int = 1
) -> TrainingMemory:
    """Memory of one of `num_devices` devices, with the accumulation, precision and checkpointing of `training`.

    `code_dim` is the number of numbers of a code vector, for a training with code losses.

    Ignores torch.compile, whose fused kernels need less memory.
    """
    share = replace(training, batch_size=training.batch_size // num_devices, compile=False)
    assert gpu or num_devices == 1, "a CPU trains in one process"
    with torch.random.fork_rng(devices=[]):
        return trace_gpu(cfg, share, num_devices, code_dim) if gpu else trace_cpu(cfg, share, code_dim)


def trace_cpu(cfg: SequenceConfig, training: TrainConfig, code_dim: int) -> TrainingMemory:
    """Runs two steps of SequenceUpdate: the first creates the optimizer's moments, the second starts with them."""
    with FakeTensorMode(), LiveMemory() as memory, MaskedRows():
        model = SequenceModel(cfg).train()
        add_code_heads(model, torch.empty(cfg.levels, cfg.vocab_size, code_dim), training)
        batch = blank_batch(cfg, training.batch_size, "cpu")
        update = SequenceUpdate(model, lambda step: batch, training)
        update.checks_norm = False  # fake numbers are neither finite nor not
        update(0)
        weights = memory.live
        update(1)
        return TrainingMemory(peak=round(CPU_FRAGMENTATION * memory.peak), weights=weights)


def trace_gpu(cfg: SequenceConfig, training: TrainConfig, num_devices: int, code_dim: int) -> TrainingMemory:
    """Runs the same two steps on meta tensors."""
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(training.precision, torch.bfloat16)
    with LiveMemory() as memory, MaskedRows():
        with torch.device("meta"):
            model = SequenceModel(cfg).train()
        add_code_heads(model, torch.empty(cfg.levels, cfg.vocab_size, code_dim), training)
        if training.checkpoint_activations:  # the backward pass recomputes outside the forward pass's modes
            for block in model.transformer.blocks:
                block.forward = under(GPURules(dtype), block.forward)
        optimizer = build_optimizer(model, training)
        for group in optimizer.param_groups:
            group.update(fused=False, foreach=False)  # the fused kernel refuses meta tensors, and needs no extra memory
        average = EMA(model, training.ema_decay) if training.ema_decay else None
        if num_devices > 1:  # DistributedDataParallel keeps the gradients in its buckets
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        micro_batch = blank_batch(cfg, training.batch_size // training.accumulate, "meta")
        objective = LossModule(model, TransformerForward(model, training))
        for step in range(2):
            for _ in range(min(training.accumulate, 2)):  # gradients exist from the second on; later ones add none
                with GPURules(dtype):
                    loss, metrics = objective(
                        micro_batch | model.noise(micro_batch, None), label_smoothing=training.label_smoothing
                    )
                    (loss / training.accumulate).backward()
                del loss, metrics
            optimizer.step()  # clipping, which works in place, refuses meta tensors too
            optimizer.zero_grad(set_to_none=num_devices == 1)
            if average:
                average.update(step)
        return TrainingMemory(peak=memory.peak, weights=memory.live)


def under(rules: TorchFunctionMode, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` wrapped so that every call runs under `rules`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with rules:
            return function(*args, **kwargs)

    return call


def blank_batch(cfg: SequenceConfig, rows: int, device: str) -> dict[str, Tensor | None]:
    """Returns a batch of zeros as keyword arguments of `SequenceModel.loss`."""
    lengths = {"target": cfg.target_len, "prefix": cfg.prefix_len}
    batch = {k: torch.zeros(rows, n, dtype=torch.int64, device=device) if n else None for k, n in lengths.items()}
    return batch | {"labels": torch.zeros(rows, dtype=torch.int64, device=device) if cfg.num_classes else None}
