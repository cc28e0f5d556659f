from pathlib import Path

import numpy as np
import pytest
from graph_models import array_24, node, spoil, write_onnx, write_safetensors

from prox24_deploy.graph.check import check_onnx, check_safetensors
from prox24_deploy.graph.eligibility import GemmShape, obstacles

FLOAT = "float32 has no sparse kernels"


@pytest.mark.parametrize(
    ("op", "dtype", "gemm", "found"),
    [
        ("MatMul", "float16", GemmShape(8, 16), []),
        ("Gemm", "bfloat16", GemmShape(8, 16), []),
        ("Conv", "int8", GemmShape(8, 16), []),
        ("", "float8_e4m3fn", GemmShape(8, 16), []),
        ("MatMul", "float32", GemmShape(8, 16), [FLOAT]),
        ("MatMul", "float16", GemmShape(12, 16), ["N = 12 is not a multiple of 8"]),
        ("MatMul", "float16", GemmShape(8, 24), ["K = 24 is not a multiple of 16"]),
        ("Conv", "float16", GemmShape(8, 3), ["input channels = 3 is not a multiple of 16"]),
        ("Conv", "float16", GemmShape(2, 16), ["output channels = 2 is not a multiple of 8"]),
        (
            "Conv",
            "float16",
            GemmShape(8, 16, 2),
            ["TensorRT has no sparse kernels for a convolution of 2 groups"],
        ),
        ("LSTM", "float16", GemmShape(8, 16), ["TensorRT has sparse kernels for MatMul, Gemm and"]),
        ("Einsum", "", None, ["TensorRT has sparse kernels for MatMul, Gemm and Conv, not for Ei"]),
    ],
)
def test_rules_that_are_broken_are_said(
    op: str, dtype: str, gemm: GemmShape | None, found: list[str]
) -> None:
    said = obstacles(op, "", dtype, gemm)
    assert len(said) == len(found)
    assert all(text.startswith(start) for text, start in zip(said, found, strict=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("op", "shape", "axis"), [("MatMul", (32, 24), 0), ("Conv", (24, 32, 3, 3), 1)]
)
def test_weight_that_keeps_every_rule_is_eligible_only_if_it_is_24(
    tmp_path: Path, op: str, shape: tuple[int, ...], axis: int, dtype: str
) -> None:
    weight = array_24(shape, axis, dtype)
    path = write_onnx(tmp_path / "m.onnx", [node(op, ["x", "w"], "y")], {"w": weight})
    (check,) = check_onnx(path)
    assert (check.eligible, check.ineligible_reason) == (True, "")
    weight = spoil(weight, (0,) * len(shape), axis)
    write_onnx(path, [node(op, ["x", "w"], "y")], {"w": weight})
    (check,) = check_onnx(path)
    assert (check.eligible, check.ineligible_reason) == (False, "it is not proven 2:4")


def test_every_broken_rule_is_named(tmp_path: Path) -> None:
    weight = {"w": np.ones((20, 10), np.float32)}
    (check,) = check_onnx(
        write_onnx(tmp_path / "m.onnx", [node("MatMul", ["x", "w"], "y")], weight)
    )
    assert check.ineligible_reason == (
        f"it is not proven 2:4; {FLOAT}; N = 10 is not a multiple of 8; "
        "K = 20 is not a multiple of 16"
    )


def test_packed_projection_counts_with_the_size_of_the_whole(tmp_path: Path) -> None:
    nodes = [node("Concat", ["a", "b"], "w", axis=1), node("MatMul", ["x", "w"], "y")]
    weights = {"a": array_24((16, 12), 0, "float16"), "b": array_24((16, 4), 0, "float16")}
    checks = check_onnx(write_onnx(tmp_path / "m.onnx", nodes, weights))
    assert [check.eligible for check in checks] == [True, True]


def test_stored_weights_are_judged_as_the_layers_they_will_be(tmp_path: Path) -> None:
    tensors = {
        "a.weight": array_24((8, 32), 1, "float16"),
        "b.weight": array_24((12, 32), 1, "float32"),
        "c.weight": array_24((16, 24), 0, "float16"),
        "d.weight": array_24((16,), 0, "float16"),
    }
    axes = {"a.weight": 1, "b.weight": 1, "c.weight": 0, "d.weight": 0}
    checks = check_safetensors(write_safetensors(tmp_path / "m.safetensors", tensors, axes))
    assert [check.eligible for check in checks] == [True, False, True, False]
    assert checks[1].ineligible_reason == f"{FLOAT}; N = 12 is not a multiple of 8"
