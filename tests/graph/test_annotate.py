from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from graph_models import Array, Toy, array_24, node, write_onnx
from onnx import helper

from prox24_deploy.graph.check.modules import SCOPES_KEY
from prox24_deploy.graph.export.annotate import annotate
from prox24_deploy.graph.export.module import RecipeModule


def scoped(made: onnx.NodeProto, module: str) -> onnx.NodeProto:
    scopes = f"['', '{RecipeModule.PREFIX}{module}', 'linear']"
    made.metadata_props.add(key=SCOPES_KEY, value=scopes)
    return made


def initializers_after(
    path: Path, nodes: list[onnx.NodeProto], weights: dict[str, Array]
) -> set[str]:
    model = ir.load(write_onnx(path, nodes, weights))
    annotate(model, Toy(), [])
    return set(model.graph.initializers)


def test_folded_weight_is_named_after_the_module_that_reads_all_of_it(tmp_path: Path) -> None:
    nodes = [
        scoped(node("MatMul", ["x", "val_1"], "a"), "first"),
        scoped(node("Gemm", ["a", "val_2"], "y", transB=1), "second"),
    ]
    weights = {"val_1": array_24((8, 16), 0), "val_2": array_24((4, 16), 1)}
    names = initializers_after(tmp_path / "m.onnx", nodes, weights)
    assert names == {"first.weight_t", "second.weight"}


@pytest.mark.parametrize("op", ["Split", "Relu"])
def test_weight_that_is_read_in_part_or_computed_keeps_its_name(tmp_path: Path, op: str) -> None:
    outputs = ["left", "right"] if op == "Split" else ["left"]
    attributes = {"axis": 1} if op == "Split" else {}
    cut = helper.make_node(op, ["val_1"], outputs)
    cut.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
    nodes = [cut, scoped(node("MatMul", ["x", "left"], "y"), "first")]
    weights = {"val_1": array_24((8, 16), 0)}
    assert initializers_after(tmp_path / "m.onnx", nodes, weights) == {"val_1"}


def test_weight_that_something_else_reads_too_keeps_its_name(tmp_path: Path) -> None:
    nodes = [
        scoped(node("MatMul", ["x", "val_1"], "a"), "first"),
        node("Add", ["a", "val_1"], "y"),
    ]
    weights = {"val_1": array_24((8, 16), 0)}
    assert initializers_after(tmp_path / "m.onnx", nodes, weights) == {"val_1"}
