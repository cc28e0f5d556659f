"""Put the body of every local function where it is called, within bounds."""

import graphlib
from collections import Counter
from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

# Functions that call each other double the graph at every level, so that a file of some kB can ask
# for any number of nodes. The largest exports seen have some 10^4.
MOST_NODES = 200_000
# The pass looks for a free name from 1 on at every call, so that n calls of one function take time
# in the order of n squared: 3000 calls some seconds.
MOST_CALLS = 3_000

_Key = tuple[str, str, str]


def inline_functions(model: ir.Model) -> bool:
    """Inline every call in place; False where that passes a bound, and nothing is changed."""
    if not model.functions:
        return True
    if not _is_bounded(model):
        return False
    InlinePass()(model)
    return True


def _is_bounded(model: ir.Model) -> bool:
    """Count the nodes and the calls that inlining makes, the innermost functions first."""
    calls = {key: _calls(function, model) for key, function in model.functions.items()}
    order = _callees_first(calls)
    if order is None:
        return False
    nodes = {key: len(list(function.all_nodes())) for key, function in model.functions.items()}
    for key in order:
        nodes[key] += sum(nodes[callee] * count for callee, count in calls[key].items())
    times = _calls(model.graph, model)
    for key in reversed(order):
        for callee, count in calls[key].items():
            times[callee] += times[key] * count
    made = sum(count * nodes[key] for key, count in _calls(model.graph, model).items())
    return made <= MOST_NODES and max(times.values(), default=0) <= MOST_CALLS


def _calls(body: ir.Graph | ir.Function, model: ir.Model) -> Counter[_Key]:
    keys = (node.op_identifier() for node in body.all_nodes())
    return Counter(key for key in keys if key in model.functions)


def _callees_first(calls: Mapping[_Key, Counter[_Key]]) -> list[_Key] | None:
    """Functions in an order in which each follows those that it calls; None if some form a ring."""
    try:
        return list(graphlib.TopologicalSorter(calls).static_order())
    except graphlib.CycleError:
        return None
