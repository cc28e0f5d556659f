"""Turn the graph that torch's exporter leaves into one fit to publish.

Kept: values, structure, and the module path of every node. Removed: stack traces, file paths and
everything else that would differ between two exports of one model.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import onnx_ir as ir
from torch import nn

from prox24_deploy.config.recipe import TensorSpec, dynamic_names
from prox24_deploy.core.errors import ExportError
from prox24_deploy.graph.check.modules import MODULE_KEY, scoped_module
from prox24_deploy.graph.check.weights import ConstantWeight, find_weights
from prox24_deploy.graph.export.module import RecipeModule
from prox24_deploy.graph.export.signature import Signature, axes_of
from prox24_deploy.sparsity.declaration import SPARSE_KEY


def annotate(model: ir.Model, source: nn.Module, sparse: Sequence[str] | None) -> None:
    """Clean the metadata of `model` in place, name its modules and weights, declare `sparse`.

    Args:
        model: as torch's exporter made it from a `RecipeModule` around `source`.
        source: the module that was exported; its module paths are the names that are given.
        sparse: module paths whose weights must be 2:4, written as model metadata; an empty list
            says that none must, None says nothing.
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
    weights = find_weights(model)
    _name_fused(weights, frozenset(n for n, part in modules.items() if isinstance(part, nn.Conv2d)))
    _name_folded(weights, linear)
    model.metadata_props.clear()
    if sparse is not None:
        model.metadata_props[SPARSE_KEY] = json.dumps(sorted(set(sparse)))


def settle_signature(graph: ir.Graph, signature: Signature) -> None:
    """Check names and axes of inputs and outputs, and write sums of axes as the recipe does.

    An axis of an output whose name is no input's is documentation and is not compared.

    Raises:
        ExportError: names the tensor, what the recipe says and what the graph has.
    """
    shared = set(dynamic_names(signature.inputs))
    pairs = [*zip(signature.inputs, graph.inputs, strict=True)]
    pairs += zip(signature.outputs, graph.outputs, strict=True)
    for spec, value in pairs:
        axes = axes_of(value)
        if value.name != spec.name or not _agrees(spec, axes, shared):
            raise ExportError(
                f"The exported graph has {value.name!r} with axes {axes} where the recipe says "
                f"{spec.name!r} with axes {spec.axes}; correct the recipe."
            )
        if any(_is_sum(axis) for axis in spec.axes):
            pairs_of_axes = zip(spec.axes, axes, strict=True)
            value.shape = ir.Shape([s if _is_sum(s) else found for s, found in pairs_of_axes])


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


def _name_fused(weights: Sequence[ConstantWeight], convolutions: frozenset[str]) -> None:
    """Give back to a convolution the node that the exporter fused with the norm behind it."""
    for weight in weights:
        module, _, parameter = (weight.value.name or "").rpartition(".")
        if parameter == "weight" and module in convolutions:
            for node in weight.nodes:
                node.metadata_props[MODULE_KEY] = module


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


def _agrees(spec: TensorSpec, axes: Sequence[str | int], shared: set[str]) -> bool:
    if len(axes) != len(spec.axes):
        return False
    return all(
        _terms(said) == _terms(found)
        for said, found in zip(spec.axes, axes, strict=True)
        if isinstance(said, int) or set(_terms(said)) <= shared
    )


def _terms(axis: str | int) -> list[str]:
    """The names that a sum adds up, in no particular order."""
    return sorted(str(axis).split(" + "))


def _is_sum(axis: str | int) -> bool:
    return len(_terms(axis)) > 1
