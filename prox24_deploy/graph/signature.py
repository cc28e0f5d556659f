"""The inputs and outputs of an exported graph: those of the recipe, and the cache of each layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from torch import nn

from prox24_deploy.errors import ExportError
from prox24_deploy.graph.weights import load_model
from prox24_deploy.recipe import Recipe, TensorSpec

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

    They are read off a run over one token, since the families name them differently in their
    configurations or leave them out.

    Raises:
        ExportError: the recipe asks for a cache and the model gives none.
    """
    inputs, outputs = list(recipe.inputs), list(recipe.outputs)
    if recipe.cache:
        shapes = _cached_shapes(recipe, model)
        inputs += _cache_specs(_PAST, shapes, "past")
        outputs += _cache_specs(_PRESENT, shapes, "past + sequence")
    return Signature(tuple(inputs), tuple(outputs))


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
        for value in load_model(path).graph.inputs
    )


def axes_of(value: ir.Value) -> list[str | int]:
    """Axes of a graph value as a recipe writes them; none where its shape is unknown."""
    if value.shape is None:
        return []
    return [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]


def _cached_shapes(recipe: Recipe, model: nn.Module) -> list[tuple[torch.Size, ...]]:
    one = torch.zeros((1, 1), dtype=torch.int64, device=next(model.parameters()).device)
    try:
        with torch.inference_mode():
            result = model(input_ids=one, use_cache=True)
    except TypeError:  # it takes no such argument
        result = None
    layers = getattr(getattr(result, _PAST, None), "layers", None)
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
