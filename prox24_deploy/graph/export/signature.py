"""The inputs and outputs of an exported graph: those of the recipe, and the cache of each layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from prox24_deploy.config.recipe import STATES, Recipe, TensorSpec
from prox24_deploy.core.errors import ExportError
from prox24_deploy.graph.check.model_file import load_onnx

_PAST = "past_key_values"
_PRESENT = "present"
_PARTS = ("key", "value")


@dataclass(frozen=True, slots=True)
class Signature:
    """Every input and output of a graph, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def signature_of(recipe: Recipe, model: nn.Module) -> Signature:
    """Expand `recipe.cache` by the heads and head sizes that each layer of `model` caches.

    The states of an encoder that a decoder reads get their width. All are read off a run over one
    token, since the families name them differently in their configurations or leave them out.

    Raises:
        ExportError: the recipe asks for a cache and the model gives none.
    """
    inputs, outputs = list(recipe.inputs), list(recipe.outputs)
    if recipe.cache:
        result = _run_once(recipe, model)
        if recipe.is_decoder:
            inputs = [_with_width(spec, result.encoder_last_hidden_state) for spec in inputs]
        shapes = _cached_shapes(recipe, model, result)
        inputs += _cache_specs(_PAST, shapes, "past")
        outputs += _cache_specs(_PRESENT, shapes, "past + sequence")
    return Signature(tuple(inputs), tuple(outputs))


def cached_layers(result: object) -> Sequence[Any]:
    """What a model cached per layer of the text that it writes, each with `keys` and `values`."""
    cache = getattr(result, _PAST, None)
    return getattr(getattr(cache, "self_attention_cache", cache), "layers", None) or ()


def read_inputs(path: Path) -> tuple[TensorSpec, ...]:
    """The inputs of an ONNX file; every float dtype counts as "float".

    Raises:
        UsageError: the file cannot be read.
    """
    return tuple(
        TensorSpec(
            name=value.name or "",
            dtype="int64" if value.dtype == ir.DataType.INT64 else "float",
            axes=axes_of(value),
        )
        for value in load_onnx(path).graph.inputs
    )


def axes_of(value: ir.Value) -> list[str | int]:
    """Axes of a graph value as a recipe writes them; none where its shape is unknown."""
    if value.shape is None:
        return []
    return [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]


def _run_once(recipe: Recipe, model: nn.Module) -> Any:
    """What the model gives over one token, with its cache; None where it knows no cache.

    A decoder of two reads one made-up state, so that it does not matter what its encoder reads.
    """
    # Others may be read when they are needed.
    weight = next(parameter for parameter in model.parameters() if not parameter.is_meta)
    one = torch.zeros((1, 1), dtype=torch.int64, device=weight.device)
    feeds: dict[str, Any] = {"input_ids": one}
    if recipe.is_decoder:
        width = int(model.config.hidden_size)  # type: ignore[union-attr,arg-type]
        states = BaseModelOutput(last_hidden_state=weight.new_zeros(1, 1, width))
        feeds = {"decoder_input_ids": one, "encoder_outputs": states}
    try:
        with torch.inference_mode():
            return model(**feeds, use_cache=True)
    except TypeError:  # it takes no such argument
        return None


def _with_width(spec: TensorSpec, states: torch.Tensor) -> TensorSpec:
    """The states of the encoder, (batch, source, hidden), with their last axis made static."""
    if spec.name != STATES:
        return spec
    return spec.model_copy(update={"axes": [*spec.axes[:-1], states.shape[-1]]})


def _cached_shapes(recipe: Recipe, model: nn.Module, result: Any) -> list[tuple[torch.Size, ...]]:
    layers = cached_layers(result)
    if not layers:
        raise ExportError(
            f"{type(model).__name__} returns no key/value cache, but recipe {recipe.family} says "
            "cache = true; remove it."
        )
    return [(layer.keys.shape, layer.values.shape) for layer in layers]


def _cache_specs(
    prefix: str, shapes: Sequence[tuple[torch.Size, ...]], length: str
) -> list[TensorSpec]:
    return [
        TensorSpec(
            name=f"{prefix}.{layer}.{part}",
            dtype="float",
            axes=["batch", shape[1], length, shape[3]],
        )
        for layer, pair in enumerate(shapes)
        for part, shape in zip(_PARTS, pair, strict=True)
    ]
