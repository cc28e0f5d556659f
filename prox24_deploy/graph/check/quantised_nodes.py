"""Find the products of 8-bit numbers in a graph: which numbers, with which scales, and their input.

Such a node reads its first operand behind a pair of QuantizeLinear and DequantizeLinear, and its
second behind a DequantizeLinear of stored numbers, as `graph.export.quantize` writes them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from prox24_deploy.graph.check import attributes
from prox24_deploy.graph.check.constants import constant_of, input_of, read_tensor
from prox24_deploy.graph.check.modules import module_of
from prox24_deploy.graph.check.quantisers import is_dequantiser, is_quantiser
from prox24_deploy.sparsity.groups import Array

_PRODUCTS = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedNode:
    """A product of 8-bit numbers.

    Attributes:
        node: that multiplies.
        weight: the DequantizeLinear behind its stored numbers.
        quantiser: the QuantizeLinear of its input.
        dequantiser: the DequantizeLinear behind that.
    """

    node: ir.Node
    weight: ir.Node
    quantiser: ir.Node
    dequantiser: ir.Node

    @property
    def module(self) -> str:
        """Module path of the node."""
        return module_of(self.node)

    @property
    def summed(self) -> int:
        """The axis of a stored matrix, or of a kernel, that the node sums over."""
        if self.node.op_type == "MatMul":
            return 0
        transposed = attributes.integer(self.node, "transB", 0)
        return 0 if self.node.op_type == "Gemm" and not transposed else 1

    @property
    def input(self) -> ir.Value:
        """What the node reads, rounded."""
        return self.dequantiser.outputs[0]


def quantised_nodes(model: ir.Model) -> Iterator[QuantisedNode]:
    """Every product of 8-bit numbers of a graph, in its order."""
    for node in model.graph:
        if node.op_type not in _PRODUCTS:
            continue
        weight, dequantiser = _producer(node, 1), _producer(node, 0)
        quantiser = _producer(dequantiser, 0) if dequantiser else None
        if weight is None or dequantiser is None or quantiser is None:
            continue
        if is_dequantiser(weight) and is_dequantiser(dequantiser) and is_quantiser(quantiser):
            yield QuantisedNode(
                node=node, weight=weight, quantiser=quantiser, dequantiser=dequantiser
            )


def stored_input(node: ir.Node, place: int, path: Path) -> Array | None:
    """The constant that a node reads at some place, None where there is none."""
    value = input_of(node, place)
    tensor = constant_of(value)
    if tensor is None or value is None:
        return None
    return np.array(read_tensor(tensor, value.name or "", path))


def _producer(node: ir.Node, place: int) -> ir.Node | None:
    value = input_of(node, place)
    return value.producer() if value is not None else None
