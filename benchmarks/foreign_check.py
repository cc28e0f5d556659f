"""Compare `check` with an independent oracle on ONNX files that other exporters made.

    python benchmarks/foreign_files.py legacy OUT/legacy     # and optimum, genai: see there
    python benchmarks/foreign_check.py OUT

The oracle shares no code with the checker: it computes every constant with ONNX's own reference
evaluator, takes the matrix that each node multiplies, and looks at all groups of four along the
axis that the operator's definition sums over. Prints a table and one JSON line, and fails where a
weight is missing, or where one is called 2:4 and is not, or its non-zeros are counted wrongly.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from rich.console import Console
from rich.table import Table

from prox24_deploy.core.records import TensorCheck
from prox24_deploy.graph.check.check import check_onnx

Array = npt.NDArray[Any]
_PACKED = ("MatMulNBits",)


@dataclass(frozen=True)
class Truth:
    """What one node multiplies, by name and axis: its non-zeros, None if packed, and if 2:4."""

    node: str
    operand: tuple[str, int]
    nonzeros: int | None
    is_24: bool


def constants_of(graph: onnx.GraphProto, folder: Path) -> dict[str, Array]:
    """Every constant of a graph by name, those that nodes compute from constants included."""
    known = {t.name: numpy_helper.to_array(t, str(folder)) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" or (node.input and all(i in known for i in node.input if i)):
            known.update(computed(node, known))
    return known


def computed(node: onnx.NodeProto, known: dict[str, Array]) -> dict[str, Array]:
    """Outputs of one node over constants; none where the reference evaluator has not the node."""
    inputs = [name for name in node.input if name]
    infos = [helper.make_value_info(name, onnx.TypeProto()) for name in inputs]
    outputs = [helper.make_value_info(name, onnx.TypeProto()) for name in node.output if name]
    graph = helper.make_graph([node], "one", infos, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    try:
        with np.errstate(all="ignore"):
            values = ReferenceEvaluator(model).run(None, {name: known[name] for name in inputs})
    except Exception:  # the evaluator raises types of many kinds
        return {}
    names = [output.name for output in outputs]
    return {n: np.asarray(v) for n, v in zip(names, values, strict=True)}


def multiplied(node: onnx.NodeProto, known: dict[str, Array]) -> Iterator[tuple[str, int]]:
    """Names of a node's constant operands and the axes that its definition sums over."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type in ("MatMul", "Gemm", "FusedMatMul"):
        for index, side in enumerate("AB"):
            array = known.get(node.input[index])
            if array is None or not array.ndim:
                continue
            inner = array.ndim - 1 if index == 0 or array.ndim == 1 else array.ndim - 2
            outer = array.ndim - 2 if index == 0 or array.ndim == 1 else array.ndim - 1
            yield node.input[index], outer if attributes.get(f"trans{side}") else inner
    elif node.op_type == "Conv" and node.input[1] in known:
        yield node.input[1], 1


def truths(path: Path) -> list[Truth]:
    """What each node of a file multiplies; a product over one element sums nothing."""
    graph = onnx.load(path).graph
    known = constants_of(graph, path.parent)
    found = []
    for node in graph.node:
        if node.op_type in _PACKED:
            found.append(Truth(node.name, (node.input[1], -1), None, is_24=False))
        for name, axis in multiplied(node, known):
            array = known[name]
            if array.shape[axis] == 1 and node.op_type != "Conv":
                continue
            flags = np.moveaxis(array.astype(np.float64) != 0, axis, -1)
            whole = array.shape[axis] % 4 == 0
            is_24 = whole and bool((flags.reshape(-1, 4).sum(-1) <= 2).all())
            found.append(Truth(node.name, (name, axis), int(flags.sum()), is_24=is_24))
    return found


def disagreements(path: Path, expected: list[Truth], checks: tuple[TensorCheck, ...]) -> list[str]:
    """Sentences about every difference; nodes that share a weight share the row of the first."""
    rows: dict[str, list[TensorCheck]] = {}
    for check in checks:
        rows.setdefault(check.node, []).append(check)
    named = {truth.operand for truth in expected if truth.node in rows}
    problems = [
        f"{path}: {name} has no constant weight"
        for name in rows.keys() - {t.node for t in expected}
    ]
    for truth in expected:
        mine = rows.get(truth.node, [])
        nonzeros = round(sum(c.density * np.prod(c.shape) for c in mine))
        if not mine and truth.operand not in named:
            problems.append(f"{path}: {truth.node} has no row")
        elif mine and all(c.is_24 for c in mine) != truth.is_24:
            problems.append(f"{path}: {truth.node} is_24 should be {truth.is_24}")
        elif mine and truth.nonzeros is not None and nonzeros != truth.nonzeros:
            problems.append(f"{path}: {truth.node} has {truth.nonzeros} non-zeros, not {nonzeros}")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    table = Table("file", "weights", "rows", "2:4", "eligible", "agrees", box=None)
    failures: list[str] = []
    weights = 0
    for path in sorted(folder.rglob("*.onnx")):
        checks = check_onnx(path)
        expected = truths(path)
        problems = disagreements(path, expected, checks)
        failures += problems
        weights += len(expected)
        counts = (len(checks), sum(c.is_24 for c in checks), sum(c.eligible for c in checks))
        agrees = "no" if problems else "yes"
        table.add_row(str(path.relative_to(folder)), str(len(expected)), *map(str, counts), agrees)
    Console().print(table)
    print(json.dumps({"benchmark": "foreign_check", "weights": weights, "failures": failures}))
    assert weights, f"{folder} holds no ONNX file; make some with foreign_files.py"
    assert not failures, failures[0]


if __name__ == "__main__":
    main()
