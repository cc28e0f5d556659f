"""Trace a module once for all models that differ from it by the values of their weights alone."""

import json
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from pydantic import BaseModel
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig

from prox24_deploy.config.recipe import Recipe, TensorSpec, dynamic_names, shape_of
from prox24_deploy.core.errors import ExportError
from prox24_deploy.core.types import DType
from prox24_deploy.graph.export.branches import AllFinite
from prox24_deploy.graph.export.module import TORCH_DTYPES, RecipeModule

# Tracing sizes of the first dynamic axes; different from each other and from 0 and 1, which the
# exporter would take for constants.
_TRACE_SIZES = (2, 7, 3, 5)
# What torch.nn.Module holds of itself; parameters, buffers and modules are seen by their names.
_OWN = frozenset(vars(nn.Module()))
# Where a model comes from and how it was read, of which nothing is in what it computes.
_ORIGIN = frozenset(
    {"_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "_weight_conversions"}
)
_HOOKS = tuple(sorted(name for name in _OWN if name.endswith("_hooks")))


class Traces:
    """What torch's exporter made of the modules that it was given, without their weights.

    Tracing takes nine tenths of an export and looks at no value of a parameter or a buffer; the
    twins of a build therefore need it only once. A graph is given again only to a module of which
    all else that tracing could look at is the same; any other one is traced itself.
    """

    def __init__(self) -> None:
        self._known: dict[str, ir.Model] = {}

    def __len__(self) -> int:
        """How many graphs were traced and may be given again."""
        return len(self._known)

    def graph_of(self, module: RecipeModule, recipe: Recipe, dtype: DType) -> ir.Model:
        """The optimised graph of a module in eval mode; its initializers share the weights.

        Raises:
            ExportError: the exporter returned nothing.
            Exception: of any type, what the exporter raises.
        """
        key = _structure(module, recipe, dtype)
        blank = self._known.get(key) if key else None
        if blank is None:
            blank = _traced(module, recipe, dtype)
            if key:
                self._known[key] = blank
        program = torch.onnx.ONNXProgram(blank.clone(), None)
        stored = program.model.graph.initializers
        tensors = _tensors(module)
        program.apply_weights({name: tensors[name] for name in tensors if name in stored})
        weights = list(stored.values())
        program.optimize()
        # The rules of the optimiser remember what they matched last.
        kept = {id(value) for value in program.model.graph.initializers.values()}
        for value in weights:
            if id(value) not in kept:
                value.const_value = None
        return program.model


def _traced(module: RecipeModule, recipe: Recipe, dtype: DType) -> ir.Model:
    """The graph as traced, with nothing in it that keeps the weights in memory."""
    signature = module.signature
    names = dynamic_names(signature.inputs)
    sizes = dict(zip(names, _trace_sizes(len(names)), strict=True))
    dims = {name: torch.export.Dim(name) for name in names}
    device = next(module.parameters()).device
    examples = tuple(
        torch.ones(
            shape_of(spec, sizes),
            dtype=torch.int64 if spec.dtype == "int64" else TORCH_DTYPES[dtype],
            device=device,
        )
        for spec in signature.inputs
    )
    # One more tuple, since `forward` takes its inputs as one variadic parameter.
    shapes = (tuple(_dynamic_axes(spec, dims) for spec in signature.inputs),)
    with AllFinite():
        program = torch.onnx.export(
            module,
            examples,
            dynamo=True,
            verbose=False,
            optimize=False,
            opset_version=recipe.opset,
            input_names=[spec.name for spec in signature.inputs],
            output_names=[spec.name for spec in signature.outputs],
            dynamic_shapes=shapes,
        )
    if program is None:
        raise ExportError(
            f"torch.onnx.export returned nothing for family {recipe.family!r}; try another opset."
        )
    _forget_weights(program.model, module)
    return program.model


def _forget_weights(model: ir.Model, module: nn.Module) -> None:
    """Take the weights out of a graph, and the exporter's own nodes, which know them too."""
    for name in _tensors(module):
        if name in model.graph.initializers:
            model.graph.initializers[name].const_value = None
    for graph in model.graphs():
        for value in (*graph.inputs, *graph.initializers.values()):
            value.meta.clear()
    for node in model.graph.all_nodes():
        node.meta.clear()
        for value in node.outputs:
            value.meta.clear()


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer under each of its names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _structure(module: RecipeModule, recipe: Recipe, dtype: DType) -> str:
    """All that tracing may look at but the values of weights, as text; "" if there is more to it.

    That is the recipe, the names, forms and ties of all tensors, and of every module its class and
    its attributes. One that is no plain value makes the module unlike any other.
    """
    tensors = _tensors(module)
    first: dict[int, str] = {}
    ties = {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
    forms = {
        name: [str(tensor.dtype), str(tensor.device), list(tensor.shape), list(tensor.stride())]
        for name, tensor in tensors.items()
    }
    try:
        parts = {name: list(_described(part)) for name, part in module.named_modules()}
        said = [recipe.model_dump_json(), dtype, ties, forms, parts]
        return json.dumps(said, sort_keys=True)
    except TypeError:
        return ""


def _described(module: nn.Module) -> Iterator[object]:
    """What one module does beside holding tensors; raises TypeError where it cannot be said."""
    if any(getattr(module, hooks) for hooks in _HOOKS):
        raise TypeError
    yield [_named(type(module)), _named(type(module).forward), module.training]
    for name, value in sorted(vars(module).items()):
        if name not in _OWN | _ORIGIN:
            yield [name, _plain(value)]


def _plain(value: Any) -> object:
    """A value that tracing may look at, as JSON; raises TypeError for what is not known here."""
    if value is None or isinstance(value, bool | int | float | str):
        return [type(value).__name__, value]
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if isinstance(value, torch.Tensor):
        return ["tensor", str(value.dtype), value.tolist()]
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType | type):
        return _named(value)
    return [type(value).__name__, [_plain(item) for item in _contents(value)]]


def _contents(value: Any) -> Sequence[object]:
    """What a value is made of; raises TypeError for what is not known here."""
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, PreTrainedConfig | GenerationConfig):
        return [pair for pair in vars(value).items() if pair[0] not in _ORIGIN]
    if isinstance(value, BaseModel):
        return [value.model_dump_json()]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if is_dataclass(value):
        return [getattr(value, field.name) for field in fields(value)]
    raise TypeError


def _named(value: Any) -> str:
    """Where a function or a class is; raises TypeError for one that no name leads to."""
    if "<" in value.__qualname__:
        raise TypeError
    return f"{value.__module__}.{value.__qualname__}"


def _dynamic_axes(
    spec: TensorSpec, dims: dict[str, torch.export.Dim]
) -> dict[int, torch.export.Dim | str]:
    """The exporter's dimensions by axis; it finds out itself what a sum is equal to."""
    return {i: dims.get(axis, axis) for i, axis in enumerate(spec.axes) if isinstance(axis, str)}


def _trace_sizes(count: int) -> list[int]:
    extra = max(0, count - len(_TRACE_SIZES))
    return [*_TRACE_SIZES[:count], *range(11, 11 + extra)]
