"""Sparse tensors of ONNX, against the dense ones that they stand for."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from graph_models import Array, array_24, node, write_onnx
from onnx import helper, numpy_helper

from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.records import TensorCheck
from prox24_deploy.graph.check import sparse_tensors
from prox24_deploy.graph.check.check import check_onnx


def sparse(array: Array, *, places: Array | None = None) -> onnx.SparseTensorProto:
    flat = np.flatnonzero(array) if places is None else places
    values = array.reshape(-1)[np.flatnonzero(array)]
    return helper.make_sparse_tensor(
        numpy_helper.from_array(values, "w"),
        numpy_helper.from_array(flat.astype(np.int64), "places"),
        list(array.shape),
    )


def write(path: Path, tensor: onnx.SparseTensorProto) -> Path:
    path = write_onnx(path, [node("MatMul", ["x", "w"], "y")], {})
    model = onnx.load(path)
    model.graph.sparse_initializer.append(tensor)
    path.write_bytes(model.SerializeToString())
    return path


def only(path: Path) -> TensorCheck:
    (check,) = check_onnx(path)
    return check


@pytest.mark.parametrize("by_axis", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_sparse_initializer_is_proven_like_a_dense_one(
    tmp_path: Path, axis: int, *, by_axis: bool
) -> None:
    array = array_24((8, 12), axis)
    places = np.argwhere(array) if by_axis else None
    found = only(write(tmp_path / "m.onnx", sparse(array, places=places)))
    dense = only(write_onnx(tmp_path / "d.onnx", [node("MatMul", ["x", "w"], "y")], {"w": array}))
    assert replace(found, ineligible_reason="") == replace(dense, ineligible_reason="")
    assert found.is_24 == (axis == 0)


def test_a_sparse_constant_is_proven_where_it_stands(tmp_path: Path) -> None:
    made = node("Constant", [], "w")
    made.attribute.append(helper.make_attribute("sparse_value", sparse(array_24((8, 8), 0))))
    nodes = [made, node("MatMul", ["x", "w"], "y")]
    check = only(write_onnx(tmp_path / "m.onnx", nodes, {}))
    assert (check.tensor, check.is_24, check.density) == ("w", True, 0.5)


def test_a_sparse_constant_of_a_function_is_proven(tmp_path: Path) -> None:
    made = node("Constant", [], "w")
    made.attribute.append(helper.make_attribute("sparse_value", sparse(np.ones((8, 8), np.int8))))
    held = [made, node("Cast", ["w"], "v", to=1), node("MatMul", ["a", "v"], "c")]
    function = helper.make_function("local", "f", ["a"], ["c"], held, [helper.make_opsetid("", 20)])
    call = helper.make_node("f", ["x"], ["y"], domain="local")
    path = write_onnx(tmp_path / "m.onnx", [call], {}, functions=[function])
    assert (only(path).is_24, only(path).unproven) == (False, False)


@pytest.mark.parametrize(
    "places",
    [
        np.array([0, 0]), np.array([0, 64]), np.array([-1, 3]), np.array([1]),
        np.array([[0, 9], [0, 1]]), np.array([[0, 1, 2], [0, 1, 3]]), np.array(3),
    ],
)  # fmt: skip
def test_places_that_fit_no_tensor_are_refused(tmp_path: Path, places: Array) -> None:
    array = np.zeros((8, 8), np.float32)
    array[0, :2] = 1
    path = write(tmp_path / "m.onnx", sparse(array, places=places))
    with pytest.raises(UsageError, match=r"Sparse tensor 'w' of .* does not fit its places; exp"):
        check_onnx(path)


def test_a_shape_without_bounds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = sparse(array_24((8, 8), 0))
    tensor.dims[:] = [2**40, 2**40]
    path = write(tmp_path / "m.onnx", tensor)
    message = r"'w' of .* has the shape \(1099511627776, .*\); the check makes those of a"
    with pytest.raises(UsageError, match=message):
        check_onnx(path)
    monkeypatch.setattr(sparse_tensors, "MOST_BYTES", 255)
    with pytest.raises(UsageError, match=r"those of a file dense up to 255 bytes; store it as a d"):
        check_onnx(write(path, sparse(array_24((8, 8), 0))))


def test_sparse_tensors_of_a_file_share_one_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_tensors, "MOST_BYTES", 256)
    path = write(tmp_path / "m.onnx", sparse(array_24((8, 8), 0)))
    assert only(path).is_24
    model = onnx.load(path)
    model.graph.sparse_initializer.append(sparse(array_24((8, 8), 0)))
    model.graph.sparse_initializer[1].values.name = "v"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UsageError, match=r"Sparse tensor 'v' of .* has the shape \(8, 8\); the c"):
        check_onnx(path)


def test_two_sparse_initializers_of_one_name_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", sparse(array_24((8, 8), 0)))
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((8, 8), np.float32), "w"))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UsageError, match="has the initializer 'w' twice"):
        check_onnx(path)


def test_values_that_are_stored_twice_are_refused(tmp_path: Path) -> None:
    """Of two copies readers may take either."""
    tensor = sparse(array_24((8, 8), 0))
    tensor.values.float_data.extend([1.0] * 64)
    with pytest.raises(UsageError, match="is stored in float_data and raw_data; expected its"):
        check_onnx(write(tmp_path / "m.onnx", tensor))
