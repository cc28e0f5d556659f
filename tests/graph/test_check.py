import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from graph_models import DTYPES, Array, array_24, node, spoil, write_matmul, write_onnx
from onnx import TensorProto, helper, numpy_helper

from prox24_deploy.core.errors import SparsityLostError, SparsityUnprovenError
from prox24_deploy.core.records import TensorCheck
from prox24_deploy.graph.check.check import check_onnx, check_path, require_24


def only(checks: tuple[TensorCheck, ...]) -> TensorCheck:
    assert len(checks) == 1
    return checks[0]


def one_node(
    path: Path, op: str, weight: Array, *, first: bool = False, **attributes: Any
) -> TensorCheck:
    inputs = ["w", "x"] if first else ["x", "w"]
    return only(check_onnx(write_onnx(path, [node(op, inputs, "y", **attributes)], {"w": weight})))


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(
    ("op", "first", "attributes", "shape", "axis"),
    [
        ("MatMul", False, {}, (16, 12), 0),
        ("MatMul", False, {}, (3, 16, 12), 1),
        ("MatMul", False, {}, (16,), 0),
        ("MatMul", True, {}, (12, 16), 1),
        ("MatMul", True, {}, (3, 12, 16), 2),
        ("Gemm", False, {}, (16, 12), 0),
        ("Gemm", False, {"transB": 1}, (12, 16), 1),
        ("Gemm", True, {}, (12, 16), 1),
        ("Gemm", True, {"transA": 1}, (16, 12), 0),
        ("Conv", False, {}, (12, 16, 3, 3), 1),
        ("Conv", False, {}, (12, 16, 5), 1),
    ],
)
def test_weight_is_checked_along_the_axis_its_consumer_sums_over(
    tmp_path: Path,
    op: str,
    *,
    first: bool,
    attributes: dict[str, int],
    shape: tuple[int, ...],
    axis: int,
    dtype: str,
) -> None:
    check = one_node(
        tmp_path / "m.onnx", op, array_24(shape, axis, dtype), first=first, **attributes
    )
    assert (check.axis, check.is_24, check.reason) == (axis, True, "")
    assert (check.dtype, check.shape, check.op_type) == (dtype, shape, op)
    assert check.density == pytest.approx(0.5)


@pytest.mark.parametrize("wrong", [0, 2, 3])
def test_conv_pruned_along_another_axis_is_not_24(tmp_path: Path, wrong: int) -> None:
    check = one_node(tmp_path / "m.onnx", "Conv", array_24((8, 8, 4, 4), wrong))
    assert (check.is_24, check.axis) == (False, 1)


def test_axis_is_followed_through_transposes_and_casts(tmp_path: Path) -> None:
    nodes = [
        node("Cast", ["w"], "a", to=TensorProto.FLOAT),
        node("Transpose", ["a"], "b", perm=[2, 0, 1]),
        node("Identity", ["b"], "c"),
        node("Transpose", ["c"], "d", perm=[0, 2, 1]),
        node("MatMul", ["x", "d"], "y"),
    ]
    # d = c^(0,2,1) = a^(2,1,0): axis 1 of d is axis 1 of w.
    check = only(check_onnx(write_onnx(tmp_path / "m.onnx", nodes, {"w": array_24((6, 8, 5), 1)})))
    assert (check.axis, check.is_24, check.tensor) == (1, True, "w")


@pytest.mark.parametrize("perm", [(1, 2, 0), (2, 0, 1), (0, 2, 1)])
def test_transposed_axis_agrees_with_numpy(tmp_path: Path, perm: tuple[int, ...]) -> None:
    transposed = array_24((4, 8, 12), 1)
    stored = np.ascontiguousarray(transposed.transpose(np.argsort(perm)))
    assert (stored.transpose(perm) == transposed).all()
    nodes = [node("Transpose", ["w"], "t", perm=perm), node("MatMul", ["x", "t"], "y")]
    check = only(check_onnx(write_onnx(tmp_path / "m.onnx", nodes, {"w": stored})))
    assert (check.is_24, check.axis) == (True, perm[1])


def test_transpose_without_perm_reverses_the_axes(tmp_path: Path) -> None:
    nodes = [node("Transpose", ["w"], "t"), node("MatMul", ["x", "t"], "y")]
    check = only(check_onnx(write_onnx(tmp_path / "m.onnx", nodes, {"w": array_24((12, 16), 1)})))
    assert (check.axis, check.is_24) == (1, True)


def test_transpose_of_another_rank_is_reported_not_guessed(tmp_path: Path) -> None:
    nodes = [node("Transpose", ["w"], "t", perm=[0, 2, 1]), node("MatMul", ["x", "t"], "y")]
    check = only(check_onnx(write_onnx(tmp_path / "m.onnx", nodes, {"w": array_24((8, 8), 1)})))
    assert not check.is_24
    assert (
        check.reason
        == "Transpose computes the weight from it in a way that the check does not follow"
    )


def test_conv_with_a_vector_for_weight_is_reported(tmp_path: Path) -> None:
    check = one_node(tmp_path / "m.onnx", "Conv", array_24((8,), 0))
    assert (check.is_24, check.axis) == (False, -1)


def dequantised(path: Path, weight: Array, zero: Array | None) -> TensorCheck:
    inputs = ["w", "scale"] + ([] if zero is None else ["zero"])
    nodes = [node("DequantizeLinear", inputs, "d"), node("MatMul", ["x", "d"], "y")]
    weights: dict[str, Array] = {"w": weight, "scale": np.array(0.5, np.float32)}
    if zero is not None:
        weights["zero"] = zero
    return only(check_onnx(write_onnx(path, nodes, weights)))


def test_quantised_weight_is_checked_against_its_zero_point(tmp_path: Path) -> None:
    pruned = np.where(array_24((8, 4), 0) != 0, 9, 7).astype(np.uint8)
    path = tmp_path / "m.onnx"
    check = dequantised(path, pruned, np.array(7, np.uint8))
    assert (check.is_24, check.density, check.dtype) == (True, 0.5, "uint8")
    assert not dequantised(path, pruned, None).is_24
    assert dequantised(path, pruned, np.full(4, 7, np.uint8)).is_24


def test_each_channel_is_compared_with_its_own_zero_point(tmp_path: Path) -> None:
    zero = np.array([0, 1, 0, 5], np.int8)
    pruned = np.where(array_24((8, 4), 0) != 0, 9, zero).astype(np.int8)
    check = dequantised(tmp_path / "m.onnx", pruned, zero)
    assert (check.is_24, check.density, check.tensor, check.dtype) == (True, 0.5, "w", "int8")
    check = dequantised(tmp_path / "m.onnx", np.zeros((8, 4), np.int8), zero)
    assert (check.is_24, check.unproven, check.first_violation) == (False, False, (0, 1))


def test_zero_point_that_is_known_at_run_time_alone_is_reported(tmp_path: Path) -> None:
    nodes = [
        node("Neg", ["x"], "zero"),
        node("DequantizeLinear", ["w", "scale", "zero"], "d"),
        node("MatMul", ["x", "d"], "y"),
    ]
    weights: dict[str, Array] = {"w": np.zeros((8, 4), np.int8), "scale": np.ones(1, np.float32)}
    check = only(check_onnx(write_onnx(tmp_path / "m.onnx", nodes, weights)))
    assert (
        check.reason == "DequantizeLinear has a zero point or scale that is not one known constant"
    )
    assert check.unproven


def test_float_weight_behind_quantise_and_dequantise_is_checked_as_float(tmp_path: Path) -> None:
    nodes = [
        node("QuantizeLinear", ["w", "scale", "zero"], "q"),
        node("DequantizeLinear", ["q", "scale", "zero"], "d"),
        node("Gemm", ["x", "d"], "y", transB=1),
    ]
    weights: dict[str, Array] = {
        "w": array_24((4, 8), 1),
        "scale": np.array(0.5, np.float32),
        "zero": np.array(3, np.uint8),
    }
    check = only(check_onnx(write_onnx(tmp_path / "m.onnx", nodes, weights)))
    assert (check.is_24, check.dtype, check.axis) == (True, "float32", 1)


def test_shared_weight_is_listed_once_per_axis(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["x", "w"], "a", "first"),
        node("MatMul", ["a", "w"], "b", "second"),
        node("Gemm", ["b", "w"], "y", "third", transB=1),
    ]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"w": array_24((8, 8), 0)})
    found = [(check.module, check.node, check.axis, check.is_24) for check in check_onnx(path)]
    assert found == [("first", "node_a", 0, True), ("third", "node_y", 1, False)]


def test_any_declared_consumer_makes_a_shared_weight_expected(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["x", "w"], "a", "first"),
        node("MatMul", ["a", "w"], "y", "second"),
    ]
    weights = {"w": array_24((8, 8), 0)}
    check = only(check_onnx(write_onnx(tmp_path / "m.onnx", nodes, weights, declared=["second"])))
    assert (check.module, check.expected, check.is_24) == ("first", True, True)


def test_outer_product_has_no_weight_and_depthwise_convolution_has(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["w", "x"], "a"), node("Conv", ["a", "v"], "y")]
    weights = {"w": np.ones((1, 8, 1), np.float32), "v": np.ones((8, 1, 3, 3), np.float32)}
    check = only(check_onnx(write_onnx(tmp_path / "m.onnx", nodes, weights)))
    assert (check.tensor, check.reason) == ("v", "reduction length 1 is not a multiple of 4")


def test_broken_constant_and_missing_input_are_no_weights(tmp_path: Path) -> None:
    nodes = [
        node("Constant", [], "c", value_float=1.0, value_int=2),
        node("MatMul", ["x", "c"], "a"),
        node("Cast", [""], "d", to=TensorProto.FLOAT),
        node("MatMul", ["a", "d"], "b"),
        node("MatMul", ["b", "w"], "y"),
    ]
    weights: dict[str, Array] = {"w": array_24((8, 8), 0), "s": np.array(1.0, np.float32)}
    nodes.append(node("MatMul", ["y", "s"], "z"))
    assert only(check_onnx(write_onnx(tmp_path / "m.onnx", nodes, weights))).tensor == "w"


def test_constant_nodes_are_weights_and_activations_are_not(tmp_path: Path) -> None:
    nodes = [
        node("Constant", [], "c", value=numpy_helper.from_array(array_24((8, 4), 0))),
        node("MatMul", ["x", "c"], "a"),
        node("MatMul", ["a", "x"], "b"),
        node("Relu", ["w"], "r"),
        node("MatMul", ["b", "r"], "y"),
    ]
    first, second = check_onnx(write_onnx(tmp_path / "m.onnx", nodes, {"w": array_24((4, 4), 0)}))
    assert (first.tensor, first.is_24) == ("c", True)
    assert (second.tensor, second.is_24, second.axis) == ("w", True, 0)


def test_weight_in_a_subgraph_is_checked(tmp_path: Path) -> None:
    def branch(name: str, weight: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        inner = [numpy_helper.from_array(array_24((8, 8), 1), "inner")] if weight == "inner" else []
        return helper.make_graph([node("MatMul", ["x", weight], name)], name, [], [output], inner)

    chosen = node(
        "If", ["flag"], "y", then_branch=branch("t", "outer"), else_branch=branch("e", "inner")
    )
    weights = {"outer": array_24((8, 8), 0), "flag": np.ones((), dtype=bool)}
    checks = check_onnx(write_onnx(tmp_path / "m.onnx", [chosen], weights))
    assert {check.tensor: check.is_24 for check in checks} == {"outer": True, "inner": False}


def test_weight_passed_to_a_local_function_is_checked(tmp_path: Path) -> None:
    function = helper.make_function(
        "local",
        "Dense",
        ["a", "b"],
        ["c"],
        [helper.make_node("MatMul", ["a", "b"], ["c"])],
        [helper.make_opsetid("", 20)],
    )
    call = helper.make_node("Dense", ["x", "w"], ["y"], domain="local")
    path = write_onnx(tmp_path / "m.onnx", [call], {"w": array_24((8, 8), 1)}, functions=[function])
    assert not only(check_onnx(path)).is_24


def test_module_comes_from_the_name_scopes_of_the_exporter(tmp_path: Path) -> None:
    scopes = {
        "a": "['', 'encoder', 'encoder.layer.0', 'linear']",
        "b": "['', 'encoder', 'encoder.layer.1']",
        "c": "['linear']",
        "d": "not a list [",
        "y": "['', 3]",
    }
    names = list(scopes)
    nodes = []
    for source, name in zip(["x", *names], names, strict=False):
        made = node("MatMul", [source, f"w_{name}"], name)
        made.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes[name])
        nodes.append(made)
    weights = {f"w_{name}": array_24((4, 4), 0) for name in names}
    checks = check_onnx(write_onnx(tmp_path / "m.onnx", nodes, weights))
    assert [c.module for c in checks] == ["encoder.layer.0", "encoder.layer.1", "", "", ""]


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("external", [True, False])
def test_one_filled_group_is_named(tmp_path: Path, dtype: str, *, external: bool) -> None:
    weight = spoil(array_24((16, 12), 0, dtype), (8, 5), 0)
    path = write_matmul(tmp_path / "m.onnx", weight, external=external)
    check = only(check_onnx(path))
    assert (check.is_24, check.first_violation) == (False, (8, 5))
    assert check.reason == "4 non-zeros in group [8:12, 5] (1 of 48 groups is not 2:4)"
    message = (
        r"m\.onnx, tensor 'w' of module 'layer\.dense' is not 2:4 along axis 0: 4 non-zeros in "
        r"group \[8:12, 5\] \(1 of 48 groups is not 2:4\); prune the model first, or ignore"
    )
    with pytest.raises(SparsityLostError, match=message):
        require_24(check_path(path))


@pytest.mark.parametrize("op", ["MatMul", "Conv"])
def test_reduction_length_that_is_no_multiple_of_four_is_not_24(tmp_path: Path, op: str) -> None:
    check = one_node(tmp_path / "m.onnx", op, np.eye(30, dtype=np.float32))
    assert (check.is_24, check.first_violation) == (False, None)
    assert check.reason == "reduction length 30 is not a multiple of 4"
    assert check.density == pytest.approx(1 / 30)


def test_dense_twin_that_declares_nothing_violates(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], "a", "one"), node("MatMul", ["a", "v"], "y", "two")]
    weights = {"w": np.ones((8, 8), np.float32), "v": np.ones((8, 8), np.float32)}
    report = check_path(write_onnx(tmp_path / "m.onnx", nodes, weights))
    assert (report.declared, len(report.violations)) == (False, 2)
    with pytest.raises(SparsityLostError, match=r"tensor 'w' .* \(1 other weight too\)"):
        require_24(report)


def test_ignored_weight_is_reported_and_not_expected(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["x", "w"], "a", "layer.dense"),
        node("MatMul", ["a", "v"], "y", "pruned"),
    ]
    weights = {"w": np.ones((8, 8), np.float32), "v": array_24((8, 8), 0)}
    path = write_onnx(tmp_path / "m.onnx", nodes, weights)
    for glob in ("w", "layer.*"):
        report = check_path(path, ignore=[glob])
        require_24(report)
        assert [(c.expected, c.is_24) for c in report.tensors] == [(False, False), (True, True)]
    assert check_path(path, ignore=["layer"]).violations


def test_a_check_that_proves_nothing_does_not_pass(tmp_path: Path) -> None:
    path = write_matmul(tmp_path / "m.onnx", array_24((8, 8), 0))
    with pytest.raises(SparsityUnprovenError, match=r"m\.onnx proves nothing: all of its weights"):
        require_24(check_path(path, ignore=["*"]))
    path = write_matmul(tmp_path / "m.onnx", array_24((8, 8), 0), declared=[])
    with pytest.raises(SparsityUnprovenError, match="proves nothing: what it declares names no we"):
        require_24(check_path(path))
    path = write_matmul(tmp_path / "m.onnx", np.zeros((8, 0), np.float32))
    with pytest.raises(SparsityUnprovenError, match="proves nothing"):
        require_24(check_path(path))


def test_a_weight_that_is_lost_goes_before_one_that_is_not_proven(tmp_path: Path) -> None:
    nodes = [
        node("MatMulNBits", ["x", "p"], "a", domain="com.microsoft"),
        node("MatMul", ["a", "w"], "y"),
    ]
    packed = np.ones((8, 2, 16), np.uint8)
    path = write_onnx(tmp_path / "m.onnx", nodes, {"p": packed, "w": array_24((8, 8), 0)})
    with pytest.raises(SparsityUnprovenError, match=r"'p' is not proven 2:4: MatMulNBits keeps it"):
        require_24(check_path(path))
    write_onnx(path, nodes, {"p": packed, "w": np.ones((8, 8), np.float32)})
    with pytest.raises(SparsityLostError, match=r"'w' is not 2:4 .*, 1 not proven; prune the mod"):
        require_24(check_path(path))
    assert SparsityUnprovenError.exit_code == 5


def test_declared_weights_are_the_only_ones_expected(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], "a", "one"), node("MatMul", ["a", "v"], "y", "two")]
    weights = {"w": array_24((8, 8), 0), "v": np.ones((8, 8), np.float32)}
    path = write_onnx(tmp_path / "m.onnx", nodes, weights, declared=["one"])
    report = check_path(path)
    assert report.declared
    assert {c.module: c.expected for c in report.tensors} == {"one": True, "two": False}
    require_24(report)
    path = write_onnx(tmp_path / "m.onnx", nodes, weights, declared=["one", "two"])
    with pytest.raises(SparsityLostError, match=r"module 'two'.*write the file again from the pru"):
        # What the file declares cannot be ignored.
        require_24(check_path(path, ignore=["two"]))


def test_declared_module_without_a_weight_violates(tmp_path: Path) -> None:
    path = write_matmul(tmp_path / "m.onnx", array_24((8, 8), 0), declared=["layer.dense", "gone"])
    message = r"the weight of module 'gone' is not proven 2:4: .* no such weight; write the file"
    with pytest.raises(SparsityUnprovenError, match=message):
        require_24(check_path(path))


def test_weights_in_four_bits_are_unpacked(tmp_path: Path) -> None:
    pruned = (array_24((8, 4), 0) != 0).astype(ml_dtypes.int4)
    check = dequantised(tmp_path / "m.onnx", pruned, None)
    assert (check.is_24, check.dtype, check.density) == (True, "int4", 0.5)


def test_importing_the_checker_does_not_load_torch() -> None:
    code = "import sys; import prox24_deploy.graph.check.check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
