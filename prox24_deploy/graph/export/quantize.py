"""Rewrite an exported graph so that quantised layers compute in 8 bits: QuantizeLinear and back.

A weight becomes its numbers with a DequantizeLinear behind them, one scale for each output channel;
what a layer reads goes through QuantizeLinear and DequantizeLinear, once for all that read it with
one scale. That is the form in which runtimes look for layers to run in 8 bits, and where one such
layer reads what another gives, its QuantizeLinear is the other's INT8 output. Zero points are 0.
TensorRT's documentation asks for these places ("Q/DQ Layer-Placement Recommendations": all inputs
of weighted operations, outputs only where the next operation reads them in 8 bits), and moves a
QuantizeLinear back itself, over activation functions and whatever only renumbers elements. But it
has sparse INT8 kernels for INT8 outputs only, so a layer that was given a scale for what it gives
has a pair of quantisers behind it too, its bias included, in front of all that reads it. Opset 19
and later have both operators with scales in float16 and bfloat16.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import nn

from prox24_deploy.core.errors import ExportError
from prox24_deploy.graph.check.modules import MODULE_KEY
from prox24_deploy.graph.check.quantised_nodes import layer_output
from prox24_deploy.graph.check.weights import ConstantWeight, find_weights
from prox24_deploy.quantization.formats import FORMATS
from prox24_deploy.quantization.tensors import QuantizedLayer, QuantizedModel, summed_axis
from prox24_deploy.sparsity.groups import Array

# How far a weight into which a norm was folded may be from numbers times scales, relative to the
# largest value of its channel: weight, factor and scale are rounded to float16 or bfloat16.
_ROUNDING = 2.0**-7


def quantise_graph(model: ir.Model, source: nn.Module, quantized: QuantizedModel) -> None:
    """Put numbers and quantisers into a graph, in place.

    Args:
        model: annotated, with the values that the numbers stand for as weights.
        source: the module that was exported, which says how its layers store weights.
        quantized: layers by module path; of an encoder-decoder only those of this graph.

    A constant that is read by others too, since it is tied or has the values of another, stays for
    them as it is.

    Raises:
        ExportError: the weight of a layer is not in the graph, or is not its numbers times one
            scale for each output channel.
    """
    weights = _weights_by_module(model)
    writer = _Writer(model.graph, quantized)
    for name, layer in quantized.layers.items():
        found = weights.get(name, [])
        if len(found) != 1 or not found[0].is_whole or not found[0].value.is_initializer():
            raise ExportError(
                f"Layer {name} was quantised, but the exporter has made {len(found)} constants of "
                "its weight, expected it as one; export without --quantize, or report it."
            )
        writer.quantise(name, layer, source.get_submodule(name), found[0])
    # Once all inputs are rounded, so that layers that share one still do.
    for name, layer in quantized.layers.items():
        if layer.output_scale is not None:
            writer.round_output(name, weights[name][0], layer.output_scale)


def _weights_by_module(model: ir.Model) -> dict[str, list[ConstantWeight]]:
    found: dict[str, list[ConstantWeight]] = {}
    for weight in find_weights(model):
        for module in {node.metadata_props.get(MODULE_KEY, "") for node in weight.nodes}:
            found.setdefault(module, []).append(weight)
    return found


@dataclass(frozen=True, slots=True)
class _Key:
    """What two readers have in common that share one pair of quantisers."""

    value: int
    scale: float


class _Writer:
    """Adds nodes and constants to one graph."""

    def __init__(self, graph: ir.Graph, quantized: QuantizedModel) -> None:
        self._graph = graph
        self._form = FORMATS[quantized.format]
        self._type = ir.DataType.FLOAT8E4M3FN if quantized.format == "fp8" else ir.DataType.INT8
        self._rounded: dict[_Key, ir.Value] = {}
        self._zeros: dict[str, ir.Value] = {}

    def quantise(
        self, name: str, layer: QuantizedLayer, module: nn.Module, weight: ConstantWeight
    ) -> None:
        """Quantise one layer: its weight, and what its nodes read."""
        numbers, scales = self._numbers(name, layer, module, weight)
        self._replace_weight(name, weight, numbers, scales)
        for node in weight.nodes:
            if node.metadata_props.get(MODULE_KEY, "") == name:
                self._round_input(name, node, weight, layer.input_scale)

    def _numbers(
        self, name: str, layer: QuantizedLayer, module: nn.Module, weight: ConstantWeight
    ) -> tuple[Array, Array]:
        """Numbers as the graph stores the weight, and scales by output channel."""
        # Of eight bits, so that every number is a float32 exactly.
        numbers = layer.weight.float().numpy()
        if numbers.ndim == 2 and weight.axis != summed_axis(module):
            numbers = numbers.T
        stored = weight.tensor.numpy().astype(np.float32)
        channels = _channels(weight)
        scales = layer.weight_scale.numpy()
        if numbers.shape != stored.shape or len(scales) != stored.shape[channels]:
            raise ExportError(
                f"Layer {name} was quantised as {numbers.shape}, but the graph has its weight as "
                f"{stored.shape}; quantise and export the same model."
            )
        dtype = weight.tensor.dtype.numpy()
        return _as_multiplied(name, stored, numbers, scales, channels, dtype)

    def _replace_weight(
        self, name: str, weight: ConstantWeight, numbers: Array, scales: Array
    ) -> None:
        """Let the readers of a constant in one layer read its dequantised numbers."""
        value, dtype = weight.value, weight.tensor.dtype
        uses = list(value.uses())
        readers = [use for use in uses if use.node.metadata_props.get(MODULE_KEY, name) == name]
        label = f"{name}.quantized_weight"
        if len(readers) == len(uses):
            label = value.name or label
            del self._graph.initializers[label]
        kept = self._constant(f"{label}.numbers", numbers, self._type)
        scale = self._constant(f"{label}.scale", scales, dtype)
        node = ir.node(
            "DequantizeLinear",
            inputs=[kept, scale, self._zero_of(len(scales))],
            attributes={"axis": _channels(weight)},
            outputs=[ir.Value(name=label, shape=value.shape, type=ir.TensorType(dtype))],
            name=f"{label}.dequantize",
        )
        node.metadata_props[MODULE_KEY] = name
        self._graph.insert_before(self._first(use.node for use in readers), node)
        for use in readers:
            use.node.replace_input_with(use.idx, node.outputs[0])

    def _round_input(self, name: str, node: ir.Node, weight: ConstantWeight, scale: float) -> None:
        """Put quantisers in front of the operand of a product that is not the weight."""
        index = 1 if self._is_weight(node.inputs[0], weight) else 0
        given = node.inputs[index]
        assert given is not None
        key = _Key(id(given), scale)
        if key not in self._rounded:
            self._rounded[key] = self._quantisers(name, "input", given, scale)
        node.replace_input_with(index, self._rounded[key])

    def round_output(self, name: str, weight: ConstantWeight, scale: float) -> None:
        """Put quantisers behind a layer, in front of all that reads it, the graph's outputs too."""
        for node in weight.nodes:
            if node.metadata_props.get(MODULE_KEY, "") != name:
                continue
            made = layer_output(node)
            readers = list(made.uses())
            rounded = self._quantisers(name, "output", made, scale)
            for reader in readers:
                reader.node.replace_input_with(reader.idx, rounded)
            for i, output in enumerate(self._graph.outputs):
                if output is made:
                    made.name, rounded.name = f"{name}.output", made.name
                    self._graph.outputs[i] = rounded

    def _is_weight(self, value: ir.Value | None, weight: ConstantWeight) -> bool:
        """Whether a constant, perhaps transposed on its way, is what a product takes here."""
        while value is not None and (producer := value.producer()) is not None:
            if producer.op_type == "DequantizeLinear":
                return value.name == weight.value.name
            if producer.op_type not in ("Transpose", "Identity"):
                return False
            value = producer.inputs[0]
        return False

    def _quantisers(self, name: str, side: str, given: ir.Value, scale: float) -> ir.Value:
        """QuantizeLinear and DequantizeLinear behind a value, right after it is made."""
        dtype = given.dtype
        if dtype is None:
            raise ExportError(
                f"The graph does not tell the type of the {side} of layer {name}; export without "
                "--quantize, or report it."
            )
        label = f"{name}.{side}"
        factor = self._constant(f"{label}_scale", np.array(scale, np.float32), dtype)
        zero = self._zero_of(None)
        kinds = {"numbers": self._type, "rounded": dtype}
        numbers, values = (
            ir.Value(name=f"{label}.{end}", shape=given.shape, type=ir.TensorType(kind))
            for end, kind in kinds.items()
        )
        made = [
            ir.node("QuantizeLinear", inputs=[given, factor, zero], outputs=[numbers],
                    name=f"{label}.quantize"),
            ir.node("DequantizeLinear", inputs=[numbers, factor, zero], outputs=[values],
                    name=f"{label}.dequantize"),
        ]  # fmt: skip
        for node in made:
            node.metadata_props[MODULE_KEY] = name
        producer = given.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], made)
        else:
            self._graph.insert_after(producer, made)
        return values

    def _zero_of(self, channels: int | None) -> ir.Value:
        """Zero points of as many channels, or the one of a tensor; their type is the format."""
        label = "zero_point" if channels is None else f"zero_points_{channels}"
        if label not in self._zeros:
            shape = () if channels is None else (channels,)
            self._zeros[label] = self._constant(label, np.zeros(shape, np.float32), self._type)
        return self._zeros[label]

    def _constant(self, label: str, array: Array, dtype: ir.DataType) -> ir.Value:
        if label in self._graph.initializers:
            raise ExportError(f"The graph has a constant {label!r} already; rename that module.")
        # Not ascontiguousarray, which would make a vector of the scale of a tensor.
        tensor = ir.Tensor(array.astype(dtype.numpy(), order="C"), name=label)
        value = ir.Value(
            name=label, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor
        )
        self._graph.register_initializer(value)
        return value

    def _first(self, nodes: object) -> ir.Node:
        """The node that comes first in the graph."""
        wanted = set(nodes)  # type: ignore[call-overload]
        return next(node for node in self._graph if node in wanted)


def _channels(weight: ConstantWeight) -> int:
    """The axis of the stored tensor that runs over output channels."""
    return 0 if len(weight.tensor.shape) > 2 else 1 - weight.axis


def _as_multiplied(
    name: str,
    stored: Array,
    numbers: Array,
    scales: Array,
    channels: int,
    dtype: np.dtype[Any],
) -> tuple[Array, Array]:
    """The numbers and scales by which the graph has a weight, scales as `dtype` holds them.

    These are those of the layer, unless the exporter has multiplied output channels by something,
    as it does where it folds a batch norm into a convolution.
    """
    rows = np.moveaxis(stored, channels, 0).reshape(len(scales), -1)
    codes = np.moveaxis(numbers, channels, 0).reshape(len(scales), -1)
    if np.array_equal((codes * scales[:, None]).astype(dtype), rows.astype(dtype)):
        return numbers, scales
    sizes = (codes**2).sum(1)
    fitted = ((rows * codes).sum(1) / np.where(sizes > 0, sizes, 1)).astype(dtype)
    fitted = fitted.astype(np.float32)
    gap = np.abs(codes * fitted[:, None] - rows).max(1)
    if stored.ndim == 2 or not (gap <= _ROUNDING * np.abs(rows).max(1)).all():
        raise ExportError(
            f"Layer {name} was quantised, but the weight that the graph has for it is not its "
            f"numbers times one factor for each output channel that {dtype.name} holds; export "
            "without --quantize, or report it."
        )
    # A scale is positive, so the sign of a factor goes into the numbers, which are symmetric.
    signs = np.sign(fitted).reshape([-1 if i == channels else 1 for i in range(numbers.ndim)])
    # Adding zero makes +0 of -0.
    return numbers * signs + 0.0, np.where(fitted == 0, 1, np.abs(fitted)).astype(np.float32)


def own_layers(quantized: QuantizedModel, names: Sequence[str]) -> QuantizedModel:
    """The part of a quantised model that lies in one graph."""
    layers: Mapping[str, QuantizedLayer] = {n: quantized.layers[n] for n in names}
    return QuantizedModel(format=quantized.format, layers=layers)
