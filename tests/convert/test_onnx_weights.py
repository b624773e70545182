"""ONNX files written by the onnx package, and damaged ones."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from digit.convert.onnx_weights import Node, read_onnx
from digit.errors import DigitError


def onnx_file(path: Path, *arrays: np.ndarray, packed: bool = False) -> Path:
    """A graph with the initialisers w0, w1, ... and one MatMul."""
    onnx = pytest.importorskip("onnx")
    tensors = []
    for number, array in enumerate(arrays):
        if packed:
            kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            tensors.append(onnx.helper.make_tensor(f"w{number}", kind, array.shape, array.ravel()))
        else:
            tensors.append(onnx.numpy_helper.from_array(array, f"w{number}"))
    node = onnx.helper.make_node("MatMul", ["x", "w0"], ["y"], name="/a/MatMul")
    graph = onnx.helper.make_graph([node], "graph", [], [], initializer=tensors)
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_tensors_and_nodes(tmp_path, packed):
    arrays = [np.arange(6, dtype=dtype).reshape(2, 3) for dtype in ("<f4", "<f2", "<f8", "<i4", "<i8")]
    tensors, nodes = read_onnx(onnx_file(tmp_path / "m.onnx", *arrays, packed=packed))
    assert nodes == [Node("MatMul", "/a/MatMul", ("x", "w0"))]
    for number, array in enumerate(arrays):
        assert torch.equal(tensors[f"w{number}"], torch.from_numpy(array)), array.dtype


def test_a_damaged_file_is_one_line(tmp_path):
    good = onnx_file(tmp_path / "good.onnx", np.ones((2, 3), dtype="<f4")).read_bytes()
    no_values = b"\x3a\x06\x2a\x04\x08\x09\x10\x01"  # graph { initializer { dims: 9 data_type: FLOAT } }
    for index, content in enumerate([b"", b"\xff" * 40, good[:-3], no_values, b"\x0b\x0c", b"<html>"]):
        path = tmp_path / f"{index}.onnx"
        path.write_bytes(content)
        with pytest.raises(DigitError, match="no readable ONNX file"):
            read_onnx(path)
    with pytest.raises(DigitError, match="no such weights file"):
        read_onnx(tmp_path / "missing.onnx")


def test_a_tensor_in_another_file_is_refused(tmp_path):
    onnx = pytest.importorskip("onnx")
    (tmp_path / "secret").write_bytes(bytes(24))
    model = onnx.load(onnx_file(tmp_path / "m.onnx", np.ones((2, 3), dtype="<f4")))
    tensor = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, "secret")
    tensor.ClearField("raw_data")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(DigitError, match="w0 lies in another file"):
        read_onnx(tmp_path / "m.onnx")


def test_without_the_package_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(DigitError, match="pip install onnx"):
        read_onnx(tmp_path / "m.onnx")
