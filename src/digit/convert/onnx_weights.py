"""Weights out of an ONNX file without onnx or onnxruntime: a reader for the few protobuf fields that hold them.

A protobuf message is a run of (key, value); key = field number << 3 | wire type; wire type 0 is a varint, 1 and 5 are 8
and 4 fixed bytes, 2 is a length and that many bytes. Used fields (onnx.proto3): ModelProto.graph 7; GraphProto.node 1,
.initializer 5; NodeProto.input 1, .output 2, .name 3, .op_type 4; TensorProto.dims 1, .data_type 2, .float_data 4,
.name 8, .raw_data 9, .data_location 14.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from digit.errors import DigitError

DTYPES = {1: "<f4", 6: "<i4", 7: "<i8", 10: "<f2", 11: "<f8"}  # TensorProto.DataType; others are not weights
MAX_VARINT_BYTES = 10


@dataclass(frozen=True)
class Node:
    """One operation of the graph."""

    op: str
    name: str
    inputs: tuple[str, ...]


def read_onnx(path: str | Path) -> tuple[dict[str, Tensor], list[Node]]:
    """Initialisers by name (torch tensors on CPU) and the nodes in order. Raises DigitError on anything unreadable."""
    path = Path(path)
    if not path.is_file():
        raise DigitError(f"no such weights file: {path}")
    try:
        graphs = [value for field, value in messages(memoryview(path.read_bytes())) if field == 7]
        if len(graphs) != 1:
            raise ValueError(f"{len(graphs)} graphs instead of 1")
        initialisers, nodes = {}, []
        for field, value in messages(graphs[0]):
            if field == 1:
                nodes.append(read_node(value))
            elif field == 5:
                name, tensor = read_tensor(value)
                initialisers[name] = tensor
    except (ValueError, TypeError, IndexError, struct.error, OverflowError) as error:
        raise DigitError(f"{path} is no readable ONNX file ({error}): install or download it again") from error
    return initialisers, nodes


def messages(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """(field number, value) of one message; value is an int for varints, else the bytes."""
    position = 0
    while position < len(data):
        key, position = read_varint(data, position)
        kind = key & 7
        if kind == 0:
            value, position = read_varint(data, position)
            yield key >> 3, value
            continue
        if kind == 2:
            length, position = read_varint(data, position)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {position}")
        if position + length > len(data):
            raise ValueError(f"cut short: {position + length - len(data)} bytes missing")
        yield key >> 3, data[position : position + length]
        position += length


def read_varint(data: memoryview, position: int) -> tuple[int, int]:
    """An unsigned varint and the position behind it."""
    value = 0
    for index in range(MAX_VARINT_BYTES):
        byte = data[position + index]  # IndexError: cut short
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise ValueError(f"endless varint at byte {position}")


def read_node(data: memoryview) -> Node:
    """A NodeProto without its attributes."""
    texts: dict[int, list[str]] = {1: [], 3: [], 4: []}
    for field, value in messages(data):
        if field in texts:
            texts[field].append(bytes(value).decode())
    return Node("".join(texts[4]), "".join(texts[3]), tuple(texts[1]))


def read_tensor(data: memoryview) -> tuple[str, Tensor]:
    """Name and value of a TensorProto."""
    dims: list[int] = []
    name, kind, raw, floats = "", 1, None, []
    for field, value in messages(data):
        if field == 1:
            dims += [value] if isinstance(value, int) else unpack_varints(value)
        elif field == 2:
            kind = int(value)
        elif field == 4:
            floats.append(bytes(value))
        elif field == 8:
            name = bytes(value).decode()
        elif field == 9:
            raw = value
        elif field == 14 and value == 1:
            raise ValueError(f"{name or 'a tensor'} lies in another file")
    if kind not in DTYPES:
        return name, torch.empty(0)  # strings and the like: no weights
    content = b"".join(floats) if raw is None and kind == 1 else raw
    array = np.frombuffer(b"" if content is None else content, dtype=DTYPES[kind])
    if array.size != math.prod(dims):
        raise ValueError(f"{name} has {array.size} values instead of {math.prod(dims)}")
    return name, torch.from_numpy(array.reshape(dims).copy())


def unpack_varints(data: memoryview) -> list[int]:
    """A packed repeated integer field."""
    values, position = [], 0
    while position < len(data):
        value, position = read_varint(data, position)
        values.append(value)
    return values
