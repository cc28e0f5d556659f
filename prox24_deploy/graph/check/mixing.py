"""Nodes at which constants meet values that are known at run time alone, or are not followed.

Here it is decided whether what comes out still is a weight. A table of positions added to
an activation is none any more; a constant that is scaled, masked or chosen at run time is one, of
which at least every stored tensor is named.
"""

from collections.abc import Sequence

import onnx_ir as ir

from prox24_deploy.graph.check.constants import ONNX_DOMAINS, sizes_of
from prox24_deploy.graph.check.control_flow import Link
from prox24_deploy.graph.check.operators import ACTIVATIONS, DATA_INPUTS, UNRELATED
from prox24_deploy.graph.check.quantisers import MICROSOFT, is_quantising
from prox24_deploy.graph.check.sources import (
    Blocked,
    Folded,
    Nature,
    Runtime,
    Source,
    dropped,
    either,
    has_matrix,
    inserted,
    place,
    selected,
    stored_of,
    tear,
    widest,
)
from prox24_deploy.graph.check.step import Step

FOLD = (
    "fold the constants of the graph first, for example with ONNX Runtime's basic optimisations, "
    "and check that file"
)
EXPORT = (
    "export the graph so that the product reads the constant itself, or ignore the weight if it is "
    "meant to be dense"
)
# Operators of others that pass on rows of a table.
_FOREIGN_MOVES = {
    (MICROSOFT, op) for op in ("GatherBlockQuantized", "GatherND", "ExpandDims", "Pad")
}
_CHOOSING = DATA_INPUTS.keys() - {"CastLike", "Clip", "CumSum", "CumProd", "Where"}


def data_inputs(node: ir.Node) -> Sequence[int]:
    """Places of the inputs from which the result has elements."""
    if is_quantising(node) or (node.domain, node.op_type) in _FOREIGN_MOVES:
        return (0,)
    every = range(len(node.inputs))
    return DATA_INPUTS.get(node.op_type, every) if node.domain in ONNX_DOMAINS else every


def unreached(step: Step) -> Runtime:
    """Result of a node that no constant passes."""
    foreign = step.node.domain not in ONNX_DOMAINS
    sources = [source for source in step.sources if isinstance(source, Runtime)]
    hot = foreign or step.op in ACTIVATIONS or any(source.hot for source in sources)
    first = step.source()
    kept = step.op in ("Cast", "Identity") and isinstance(first, Runtime) and first.one_hot
    return Runtime(hot, not foreign and (kept or _is_one_hot(step)))


def unfollowed(step: Step, passing: Sequence[Source], shape: tuple[int, ...] | None) -> Blocked:
    """A constant that a node computes in a way that is neither followed nor computed."""
    reason = f"{step.op} computes the weight from it in a way that the check does not follow"
    return _blocked(passing, reason, FOLD, shape=shape)


def mixed(step: Step, passing: Sequence[Source]) -> Source:
    """Result of a node to which constants and values known at run time alone come together."""
    op = step.op
    if is_quantising(step.node):
        reason = f"{op} has a zero point or scale that is not one known constant"
        return _blocked(passing, reason, EXPORT, "selected")
    if step.node.domain not in ONNX_DOMAINS:
        moves = (step.node.domain, op) in _FOREIGN_MOVES
        reason = f"{op} reads rows of it"
        return _blocked(passing, reason, EXPORT, "looked up") if moves else unreached(step)
    if op in ACTIVATIONS | UNRELATED:
        return _chosen_by_one_hot(step) or unreached(step)
    has_weight = any(has_matrix(found) for found in passing)
    # A vector that is repeated is no matrix; one that takes another shape may be.
    if op in _CHOOSING and (has_weight or op != "Expand"):
        reason = f"{op} moves or chooses its elements by values known at run time alone"
        return _blocked(passing, reason, EXPORT, "looked up" if _is_table(step) else "selected")
    if not has_weight or _is_activation(step, passing):
        return unreached(step)
    reason = f"{op} combines it with values known at run time alone"
    return _blocked(passing, reason, EXPORT, "mixed")


def one_of(found: Sequence[Source]) -> Source:
    """One of several values, chosen at run time as a whole."""
    passing = [source for source in found if not isinstance(source, Runtime)]
    if not passing:
        return Runtime(any(isinstance(each, Runtime) and each.hot for each in found))
    folded = [source for source in passing if isinstance(source, Folded)]
    chosen = either(folded) if len(folded) == len(passing) else None
    reason = "constants of different shapes are chosen from at run time"
    return chosen or _blocked(passing, reason, EXPORT, "selected")


def through(link: Link, source: Source) -> Source:
    """What a graph inside of the graph gets of a value, or the graph of a value inside of it."""
    if isinstance(source, Runtime) or link.kind == "same":
        return source
    if isinstance(source, Blocked):
        return _blocked([source], "", "", "selected")
    axis = place(link.axis, len(source.shape) + (link.kind == "stack"))
    if link.kind == "closed" or axis is None:
        reason = "a graph inside of the graph gets it in a way that the check does not follow"
        return _blocked([source], reason, EXPORT, "selected")
    if link.kind == "slice":
        return dropped(tear(selected(source), [axis]), axis)
    return inserted(selected(source), axis, torn=True)


def renewed(found: Sequence[Source]) -> Source:
    """A value that a loop computes anew from itself, and all constants that reach it."""
    if not found:
        return Runtime()
    return _blocked(found, "a loop computes it anew at every step", EXPORT, "mixed")


def _blocked(
    passing: Sequence[Source],
    reason: str,
    remedy: str,
    nature: Nature = "constant",
    shape: tuple[int, ...] | None = None,
) -> Blocked:
    """Give up on following some sources; the first reason to do so is the one that is told."""
    earlier = next((source for source in passing if isinstance(source, Blocked)), None)
    if earlier is not None:
        reason, remedy = earlier.reason, earlier.remedy
    natures = [source.nature for source in passing if not isinstance(source, Runtime)]
    return Blocked(
        stored=stored_of(*passing),
        reason=reason,
        remedy=remedy,
        nature=widest((nature, *natures)),
        shape=shape,
    )


def _chosen_by_one_hot(step: Step) -> Source | None:
    """A product with a matrix of ones and zeros, one in each row, chooses rows."""
    first, second = step.source(0), step.source(1)
    if step.op != "MatMul" or not isinstance(first, Runtime) or not first.one_hot:
        return None
    if not isinstance(second, Folded) or len(second.shape) != 2:
        return None
    rank = step.rank(0)
    if rank is None:
        reason = "rows of it are chosen by a tensor of unknown rank"
        return _blocked([second], reason, EXPORT, "selected")
    chosen = dropped(tear(selected(second), [0]), 0)
    for _ in range(rank - 1):
        chosen = inserted(chosen, 0, torn=True)
    return chosen


def _is_table(step: Step) -> bool:
    """Whether rows of a matrix are gathered, as an embedding looks them up."""
    source = step.source()
    matrix = isinstance(source, Folded) and len(source.shape) == 2
    return matrix and step.op == "Gather" and step.integer("axis", 0) == 0


def _is_one_hot(step: Step) -> bool:
    """Whether a node makes rows with a single element that is not zero."""
    values = step.array(2) if step.op == "OneHot" and step.integer("axis", -1) == -1 else None
    return values is not None and values.size == 2 and not values[0]


def _is_activation(step: Step, passing: Sequence[Source]) -> bool:
    """Whether constants are mixed with an activation of full size, as a table of positions is."""
    shapes = [sizes_of(stored.tensor) for stored in stored_of(*passing)]
    return any(
        isinstance(source, Runtime) and source.hot and step.covers(index, shape)
        for index, source in enumerate(step.sources)
        for shape in shapes
    )
