"""Find the products of 8-bit numbers in a graph: which numbers, with which scales, and their input.

Such a node reads its first operand behind a pair of QuantizeLinear and DequantizeLinear, and its
second behind a DequantizeLinear of stored numbers, as `graph.export.quantize` writes them. What it
gives, a constant bias added, may go through a pair of its own.
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
        rounded: QuantizeLinear and DequantizeLinear of what it gives, None where there are none
            of its own module.
    """

    node: ir.Node
    weight: ir.Node
    quantiser: ir.Node
    dequantiser: ir.Node
    rounded: tuple[ir.Node, ir.Node] | None = None

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
                node=node,
                weight=weight,
                quantiser=quantiser,
                dequantiser=dequantiser,
                rounded=_rounded(node),
            )


def layer_output(node: ir.Node) -> ir.Value:
    """What the layer of a product gives: its output, with the constant that the layer adds."""
    made = node.outputs[0]
    if len(added := made.consumers()) != 1 or added[0].op_type != "Add":
        return made
    others = [given for given in added[0].inputs if given is not made]
    mine = module_of(added[0]) == module_of(node)
    biased = mine and bool(others) and all(constant_of(given) is not None for given in others)
    return added[0].outputs[0] if biased else made


def _rounded(node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """The pair behind a layer that belongs to it, and that all its readers are behind."""
    pair: list[ir.Node] = []
    value = layer_output(node)
    for is_wanted in (is_quantiser, is_dequantiser):
        readers = value.consumers()
        if (
            len(readers) != 1
            or not is_wanted(readers[0])
            or module_of(readers[0]) != module_of(node)
        ):
            return None
        pair.append(readers[0])
        value = readers[0].outputs[0]
    return pair[0], pair[1]


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
