"""Put the body of every local function where it is called, within bounds."""

import graphlib
from collections import Counter
from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

# Functions that call each other double the graph at every level, so that a file of some kB can ask
# for any number of nodes. The largest exports seen have some 10^4.
MOST_NODES = 200_000
# The pass looks for a free name from 1 on wherever it puts one a second time, so that n nodes or
# values of one name take n squared / 2 looks, of which it takes some millions a second. They may be
# of one function that is called often, or of many that use the same names.
MOST_LOOKS = 20_000_000

_Key = tuple[str, str, str]


def inline_functions(model: ir.Model) -> bool:
    """Inline every call in place; False where that passes a bound, and nothing is changed."""
    if not model.functions:
        return True
    times = _times(model)
    if times is None or not _is_bounded(model, times):
        return False
    # The pass fills these, too.
    for key in model.functions.keys() - +times:
        del model.functions[key]
    InlinePass()(model)
    return True


def _times(model: ir.Model) -> Counter[_Key] | None:
    """How often each function ends up in the graph; None if some call each other in a ring."""
    calls = {key: _calls(function, model) for key, function in model.functions.items()}
    order = _callees_first(calls)
    if order is None:
        return None
    times = _calls(model.graph, model)
    for key in reversed(order):
        for callee, count in calls[key].items():
            times[callee] += times[key] * count
    return times


def _is_bounded(model: ir.Model, times: Mapping[_Key, int]) -> bool:
    """Count the nodes that inlining makes, and the names that it looks for."""
    made = sum(times[key] * len(list(f.all_nodes())) for key, f in model.functions.items())
    return made <= MOST_NODES and _looks(model, times) <= MOST_LOOKS


def _looks(model: ir.Model, times: Mapping[_Key, int]) -> int:
    """How often a name is looked up, where each function is put so many times in the graph."""
    names = _names(model.graph)
    for key, function in model.functions.items():
        for name, count in _names(function).items():
            names[name] += count * times.get(key, 0)
    return sum(count * count for count in names.values()) // 2


def _names(body: ir.Graph | ir.Function) -> Counter[tuple[str, str]]:
    """How often each name of a node and of a value stands in a body."""
    found: Counter[tuple[str, str]] = Counter()
    for node in body.all_nodes():
        values = [value.name for value in node.outputs]
        found.update(("value", name) for name in values if name)
        found["node", node.name or ""] += 1
    return found


def _calls(body: ir.Graph | ir.Function, model: ir.Model) -> Counter[_Key]:
    keys = (node.op_identifier() for node in body.all_nodes())
    return Counter(key for key in keys if key in model.functions)


def _callees_first(calls: Mapping[_Key, Counter[_Key]]) -> list[_Key] | None:
    """Functions in an order in which each follows those that it calls; None if some form a ring."""
    try:
        return list(graphlib.TopologicalSorter(calls).static_order())
    except graphlib.CycleError:
        return None
