"""Turn the graph that torch's exporter leaves into one fit to publish.

Kept: values, structure, and the module path of every node. Removed: stack traces, file paths and
everything else that would differ between two exports of one model.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import onnx_ir as ir
from torch import nn

from prox24_deploy.errors import ExportError
from prox24_deploy.graph.module import RecipeModule, dynamic_names
from prox24_deploy.graph.weights import (
    MODULE_KEY,
    SPARSE_KEY,
    ConstantWeight,
    find_weights,
    scoped_module,
)
from prox24_deploy.recipe import Recipe, TensorSpec


def annotate(model: ir.Model, source: nn.Module, sparse: Sequence[str]) -> None:
    """Clean the metadata of `model` in place, name its modules and weights, declare `sparse`.

    Args:
        model: as torch's exporter made it from a `RecipeModule` around `source`.
        source: the module that was exported; its module paths are the names that are given.
        sparse: module paths whose weights must be 2:4; written as model metadata if there are any.
    """
    modules = dict(source.named_modules())
    linear = frozenset(name for name, part in modules.items() if isinstance(part, nn.Linear))
    for node in model.graph.all_nodes():
        _keep_only_module(node, modules.keys())
    for graph in model.graphs():
        graph.metadata_props.clear()
        graph.doc_string = None
        for value in _values(graph):
            value.metadata_props.clear()
    _strip_prefix(model.graph.initializers.values())
    _name_folded(find_weights(model), linear)
    model.metadata_props.clear()
    if sparse:
        model.metadata_props[SPARSE_KEY] = json.dumps(sorted(set(sparse)))


def require_signature(graph: ir.Graph, recipe: Recipe) -> None:
    """Do nothing if inputs and outputs have the names and axes of the recipe.

    An axis of an output whose name is no input's is documentation and is not compared.

    Raises:
        ExportError: names the tensor, what the recipe says and what the graph has.
    """
    shared = set(dynamic_names(recipe.inputs))
    pairs = [*zip(recipe.inputs, graph.inputs, strict=True)]
    pairs += zip(recipe.outputs, graph.outputs, strict=True)
    for spec, value in pairs:
        axes = _axes(value)
        if value.name != spec.name or not _agrees(spec, axes, shared):
            raise ExportError(
                f"The exported graph has {value.name!r} with axes {axes} where the recipe says "
                f"{spec.name!r} with axes {spec.axes}; correct the recipe."
            )


def _keep_only_module(node: ir.Node, modules: Collection[str]) -> None:
    module = scoped_module(node.metadata_props).removeprefix(RecipeModule.PREFIX)
    node.metadata_props.clear()
    node.doc_string = None
    if module and module in modules:
        node.metadata_props[MODULE_KEY] = module


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _strip_prefix(initializers: Iterable[ir.Value]) -> None:
    for value in list(initializers):
        name = value.name or ""
        if name.startswith(RecipeModule.PREFIX):
            _rename(value, name.removeprefix(RecipeModule.PREFIX))


def _name_folded(weights: Sequence[ConstantWeight], linear: frozenset[str]) -> None:
    """Name the weights that lost theirs when the exporter folded a transposition into them."""
    names = [_telling_name(weight, linear) for weight in weights]
    claims = Counter(names)
    for weight, name in zip(weights, names, strict=True):
        if name and claims[name] == 1:
            _rename(weight.value, name)


def _telling_name(weight: ConstantWeight, linear: frozenset[str]) -> str:
    """Name from the consumer's module, "" where the module does not decide it."""
    modules = {node.metadata_props.get(MODULE_KEY, "") for node in weight.nodes}
    module = modules.pop()
    # A dot means that the exporter kept the parameter's own name.
    named = "." in (weight.value.name or "")
    if modules or named or module not in linear or not weight.value.is_initializer():
        return ""
    if len(weight.tensor.shape) != 2 or weight.axis < 0 or not weight.is_whole:
        return ""
    if len(weight.value.consumers()) != len(weight.nodes):
        return ""
    return f"{module}.weight_t" if weight.axis == 0 else f"{module}.weight"


def _rename(value: ir.Value, name: str) -> None:
    if value.graph is not None and name not in value.graph.initializers:
        value.name = name


def _axes(value: ir.Value) -> list[str | int]:
    if value.shape is None:
        return []
    return [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]


def _agrees(spec: TensorSpec, axes: Sequence[str | int], shared: set[str]) -> bool:
    if len(axes) != len(spec.axes):
        return False
    compared = [axis for axis in zip(spec.axes, axes, strict=True) if _is_fixed(axis[0], shared)]
    return all(said == found for said, found in compared)


def _is_fixed(axis: str | int, shared: set[str]) -> bool:
    return isinstance(axis, int) or axis in shared
