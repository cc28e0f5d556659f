"""The tensors of a quantised model: what every backend computes with, as one file of the bundle.

Names are those that compressed-tensors and vLLM read: `LAYER.weight` in the 8-bit dtype and the
layout of the layer, `LAYER.weight_scale` with one float32 for each output channel, `LAYER.
input_scale` with one, and `LAYER.output_scale` with one where the output is rounded too. A
parameter that took up what was moved out of the inputs of a layer is there under its own name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from prox24_deploy.core.types import QuantizedFormat
from prox24_deploy.model.checkpoint import write_tensors
from prox24_deploy.model.layers import from_matrix, layer_at, reduction_axis, to_matrix
from prox24_deploy.quantization.formats import FORMATS, NumberFormat
from prox24_deploy.sparsity.declaration import SPARSE_KEY

# Metadata of the file: the format, so that the tensors need no other file to be read.
FORMAT_KEY = "prox24.format"
_SCALE, _INPUT, _OUTPUT = "weight_scale", "input_scale", "output_scale"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedLayer:
    """One layer: Y = (weight_scale · input_scale) · Q(X) · weightᵀ, by output channel.

    Attributes:
        weight: numbers, in the layout of the layer.
        weight_scale: (out,) float32.
        input_scale: of all its inputs.
        output_scale: of all its outputs, bias included, which are rounded then; None where they
            are not for their own sake.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: float
    output_scale: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedModel:
    """What of a model was quantised.

    Attributes:
        format: of all layers.
        layers: by module path.
        folded: new values of other parameters, by name, in the dtype of the checkpoint.
        axes: by layer that is 2:4 the axis of the groups in its weight.
    """

    format: QuantizedFormat
    layers: Mapping[str, QuantizedLayer]
    folded: Mapping[str, Tensor] = field(default_factory=dict)
    axes: Mapping[str, int] = field(default_factory=dict)


def write_quantized(model: QuantizedModel, path: Path) -> None:
    """Write the tensors; the header lists those that are 2:4, with their axes."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in model.folded.items()}
    for name, layer in model.layers.items():
        tensors[f"{name}.weight"] = layer.weight.contiguous().cpu()
        tensors[f"{name}.{_SCALE}"] = layer.weight_scale.contiguous().cpu()
        tensors[f"{name}.{_INPUT}"] = torch.tensor(layer.input_scale)
        if layer.output_scale is not None:
            tensors[f"{name}.{_OUTPUT}"] = torch.tensor(layer.output_scale)
    sparse = {f"{name}.weight": axis for name, axis in sorted(model.axes.items())}
    metadata = {"format": "pt", FORMAT_KEY: model.format, SPARSE_KEY: json.dumps(sparse)}
    write_tensors(path, tensors, metadata)


def read_quantized(path: Path) -> QuantizedModel:
    """Read what `write_quantized` wrote."""
    with safe_open(path, framework="pt") as handle:
        metadata = handle.metadata()
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    names = [n.removesuffix(f".{_SCALE}") for n in sorted(tensors) if n.endswith(f".{_SCALE}")]
    layers = {
        name: QuantizedLayer(
            weight=tensors.pop(f"{name}.weight"),
            weight_scale=tensors.pop(f"{name}.{_SCALE}"),
            input_scale=float(tensors.pop(f"{name}.{_INPUT}")),
            output_scale=_optional(tensors.pop(f"{name}.{_OUTPUT}", None)),
        )
        for name in names
    }
    axes = json.loads(metadata[SPARSE_KEY])
    return QuantizedModel(
        format=next(name for name in FORMATS if name == metadata[FORMAT_KEY]),
        layers=layers,
        folded=tensors,
        axes={name.removesuffix(".weight"): axis for name, axis in axes.items()},
    )


def _optional(scale: Tensor | None) -> float | None:
    return None if scale is None else float(scale)


@torch.no_grad()
def apply_weights(model: nn.Module, quantized: QuantizedModel) -> None:
    """Give a model the values that its quantised weights stand for, in place, in its own dtype."""
    parameters = dict(model.named_parameters())
    for name, tensor in quantized.folded.items():
        parameters[name].copy_(tensor)
    for name, stored in quantized.layers.items():
        layer = layer_at(model, name)
        layer.weight.copy_(dequantized(layer, stored, quantized.format))


def apply_rounding(model: nn.Module, quantized: QuantizedModel) -> None:
    """Let layers round what they read, and what they give where that was decided, in place."""
    apply_inputs(model, quantized)
    apply_outputs(model, quantized)


def apply_inputs(model: nn.Module, quantized: QuantizedModel) -> None:
    """Let layers round what they read, in place."""
    for name, stored in quantized.layers.items():
        layer_at(model, name).register_forward_pre_hook(
            RoundedInput(quantized.format, stored.input_scale)
        )


def apply_outputs(model: nn.Module, quantized: QuantizedModel) -> None:
    """Let layers round what they give, where that was decided, in place."""
    for name, stored in quantized.layers.items():
        if stored.output_scale is not None:
            # Whatever computes that layer now.
            model.get_submodule(name).register_forward_hook(
                RoundedOutput(quantized.format, stored.output_scale)
            )


def rounded_outputs(model: nn.Module) -> dict[str, float]:
    """By path of each layer that rounds what it gives, the scale of that."""
    return {
        name: hook.scale
        for name, module in model.named_modules()
        for hook in module._forward_hooks.values()
        if isinstance(hook, RoundedOutput)
    }


def dequantized(layer: nn.Module, stored: QuantizedLayer, format: QuantizedFormat) -> Tensor:
    """The weight that numbers stand for, float32, in the layout of the layer."""
    matrix = to_matrix(layer, stored.weight)  # type: ignore[arg-type]
    values = FORMATS[format].values(matrix, stored.weight_scale.to(matrix.device)[:, None])
    return from_matrix(layer, values)  # type: ignore[arg-type]


def summed_axis(layer: nn.Module) -> int:
    """The axis of the weight in the layout of a layer along which products are summed."""
    return reduction_axis(layer)  # type: ignore[arg-type]


class RoundedInput:
    """A hook that rounds the input of a layer to numbers of a format, and back."""

    def __init__(self, format: QuantizedFormat, scale: float) -> None:
        self.format, self.scale = FORMATS[format], scale

    def __call__(self, _: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The same arguments, the first as the layer sees it."""
        return (rounded(given[0], self.format, self.scale), *given[1:])


class RoundedOutput:
    """A hook that rounds the output of a layer, bias included, to numbers of a format, and back."""

    def __init__(self, format: QuantizedFormat, scale: float) -> None:
        self.format, self.scale = FORMATS[format], scale

    def __call__(self, _: nn.Module, __: object, made: Tensor) -> Tensor:
        """The output as what reads it sees it."""
        return rounded(made, self.format, self.scale)


def rounded(values: Tensor, form: NumberFormat, scale: float) -> Tensor:
    """The nearest numbers times the scale, in the dtype of `values`.

    Gradients go through as if there was no rounding, but for values that are clipped.
    """
    found = form.values(form.numbers(values.detach(), scale), scale).to(values.dtype)
    if not (torch.is_grad_enabled() and values.requires_grad):
        return found
    limit = scale * form.largest
    clipped = values.clamp(-limit, limit)
    return clipped + (found - clipped).detach()
