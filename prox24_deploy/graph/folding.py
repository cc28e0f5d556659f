"""Follow a value back to the stored tensors whose elements it shows.

Nodes that only renumber elements are followed exactly (`graph.movement`), those that keep zeros
zero are followed too (`graph.arithmetic`), and so is control flow (`graph.control_flow`). What else
is computed from constants alone is computed (`graph.evaluation`). Of the rest it is known which
constants reach it, and why they are not followed.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from prox24_deploy.errors import UsageError
from prox24_deploy.graph import attributes
from prox24_deploy.graph.arithmetic import ARITHMETIC, covers, dequantize, quantize
from prox24_deploy.graph.constants import ONNX_DOMAINS, constant_of, is_matrix, sizes_of
from prox24_deploy.graph.control_flow import ControlFlow, Link
from prox24_deploy.graph.evaluation import Budget, Evaluator, NotComputedError, Outline
from prox24_deploy.graph.groups import Array
from prox24_deploy.graph.movement import MOVEMENTS
from prox24_deploy.graph.operators import ACTIVATIONS, DATA_INPUTS, ELEMENTWISE, UNRELATED
from prox24_deploy.graph.quantisers import (
    MICROSOFT,
    is_dequantiser,
    is_quantiser,
    is_quantising,
)
from prox24_deploy.graph.sources import (
    MOST_PARTS,
    Blocked,
    Folded,
    Nature,
    Part,
    Runtime,
    Source,
    Stored,
    dropped,
    either,
    has_matrix,
    inserted,
    place,
    stored_of,
    tear,
    widest,
)
from prox24_deploy.graph.step import Step

FOLD = (
    "fold the constants of the graph first, for example with ONNX Runtime's basic optimisations, "
    "and check that file"
)
EXPORT = (
    "export the graph so that the product reads the constant itself, or ignore the weight if it is "
    "meant to be dense"
)
# Followed parts, over all values of a file: a joined tensor may pass many nodes.
_MOST_WORK = 1 << 18
# Initializers that are inputs too can be replaced since this version of the format.
_FIRST_REPLACEABLE = 4


class Folder:
    """Folds the values of one model; `path` is its file, None if it is in memory."""

    def __init__(self, model: ir.Model, path: Path | None, budget: Budget | None = None) -> None:
        opsets = model.opset_imports
        opset = opsets.get("", opsets.get("ai.onnx", 1))
        self.evaluator = Evaluator(opset, path, budget or Budget.of(stored_elements(model)))
        self._control = ControlFlow(nodes_of(model), opset)
        self._inputs = frozenset(model.graph.inputs)
        self._replaceable = (model.ir_version or 0) >= _FIRST_REPLACEABLE
        self._known: dict[ir.Value, Source] = {}
        self._left = _MOST_WORK

    def fold(self, value: ir.Value | None) -> Source:
        """What is known of a value.

        Raises:
            UsageError: nodes form a ring, an attribute has a wrong type, or data that is needed to
                follow a constant cannot be read.
        """
        if value is None:
            return Runtime()
        pending, started = [value], dict[ir.Value, None]()
        while pending:
            last = pending[-1]
            if last in self._known:
                pending.pop()
                continue
            if last not in started:
                started[last] = None
                pending += self._needed(last, started)
                if pending[-1] is not last:
                    continue
            self._known[last] = self._bounded(self._source(last))
            del started[last]
        return self._known[value]

    def is_constant(self, value: ir.Value | None) -> bool:
        """Whether a value is given and nothing at run time changes it."""
        source = self.fold(value)
        return not isinstance(source, Runtime) and source.nature == "constant"

    def read(self, value: ir.Value) -> Array | None:
        """Array of a constant value, None if it is not computed."""
        try:
            return self.evaluator.array(value)
        except NotComputedError:
            return None

    def _needed(self, value: ir.Value, started: dict[ir.Value, None]) -> list[ir.Value]:
        """Values that must be known before this one."""
        needed = []
        for each in self._feeding(value):
            if each in started:
                self._require_loop(each, list(started))
            elif each not in self._known:
                needed.append(each)
        return needed

    def _feeding(self, value: ir.Value) -> list[ir.Value]:
        if constant_of(value) is not None:
            return []
        links = self._control.links(value)
        if links is not None:
            return [link.value for link in links]
        node = value.producer()
        return [] if node is None else [each for each in node.inputs if each is not None]

    def _require_loop(self, value: ir.Value, started: list[ir.Value]) -> None:
        """A ring is sound where it goes through what a loop passes from step to step."""
        ring = started[started.index(value) :]
        if not any(self._control.links(each) is not None for each in ring):
            raise UsageError(
                f"The nodes of the model form a ring through {value.name!r}; expected every value "
                "to be computed from earlier ones; export the file again."
            )

    def _at(self, value: ir.Value | None) -> Source:
        """Source of a value that was needed; of one that depends on itself, all that reaches it."""
        if value is None:
            return Runtime()
        known = self._known.get(value)
        return self._reaching(value) if known is None else known

    def _source(self, value: ir.Value) -> Source:
        tensor = constant_of(value)
        if tensor is not None:
            return self._whole(value, tensor)
        links = self._control.links(value)
        if links is not None:
            return self._linked(links)
        node = value.producer()
        if node is None:
            return Runtime()
        sources = tuple(self._at(each) for each in node.inputs)
        return self._made(Step(node, list(node.outputs).index(value), sources, self.read), value)

    def _whole(self, value: ir.Value, tensor: ir.TensorProtocol) -> Source:
        if tensor.dtype == ir.DataType.STRING:
            return Runtime()
        part = Part.whole(Stored(value, tensor))
        replaceable = value in self._inputs and self._replaceable
        nature: Nature = "selected" if replaceable else "constant"
        part = replace(part, replaceable=replaceable)
        return Folded((part,), part.view.shape, tensor.dtype, nature=nature)

    def _made(self, step: Step, value: ir.Value) -> Source:
        """Source of the result of a node."""
        data = DATA_INPUTS.get(step.op, range(len(step.sources)))
        if is_quantising(step.node):
            data = (0,)
        passing = [step.source(i) for i in data if not isinstance(step.source(i), Runtime)]
        if not passing:
            return self._unreached(step)
        followed = self._followed(step, passing)
        if followed is not None:
            return followed
        # A quantised constant stays one whatever its scale is, and so on: only data counts.
        given = [i for i in range(len(step.sources)) if step.has(i)]
        if all(step.is_constant(i) for i in given) and not attributes.subgraphs(step.node):
            return self._computed(step, value, passing) or self._unfollowed(step, passing, value)
        return self._mixed(step, passing)

    def _followed(self, step: Step, passing: list[Source]) -> Source | None:
        """Result of a node that is followed without computing anything."""
        source = next((found for found in passing if isinstance(found, Folded)), None)
        if step.op == "SequenceAt":
            return self._chosen_of_sequence(step)
        if source is None:
            return None
        if is_quantiser(step.node):
            return quantize(step, source) if step.output == 0 else None
        if is_dequantiser(step.node):
            return dequantize(step, source)
        if step.node.domain not in ONNX_DOMAINS:
            return None
        rule = MOVEMENTS.get(step.op) or ARITHMETIC.get(step.op)
        if rule is not None and (step.op in _ANY_INPUT or source is step.source(0)):
            return rule(step, source)
        return None

    def _computed(self, step: Step, value: ir.Value, passing: list[Source]) -> Folded | None:
        """A constant that is computed when it is read, under the name of its largest source."""
        given = [i for i in range(len(step.sources)) if step.has(i)]
        outlines = {i: self._outline(step.source(i)) for i in given}
        known = {i: outline for i, outline in outlines.items() if outline is not None}
        if len(known) < len(outlines):
            return None
        outline = self.evaluator.outline(step.node, step.output, known)
        if outline is None:
            return None
        tensor = self.evaluator.tensor(value, outline)
        parts = [part for each in passing if isinstance(each, Folded) for part in each.parts]
        largest = max(parts, key=lambda part: part.stored.tensor.size, default=None)
        if largest is None or not _is_matrix(largest.stored):
            return Folded((Part.whole(Stored(value, tensor)),), outline[1], outline[0])
        still = step.op in ELEMENTWISE and largest.view.shape == outline[1] and largest.is_in_place
        stored = Stored(largest.stored.value, tensor, moved=not still)
        return Folded((Part.whole(stored),), outline[1], outline[0])

    def _outline(self, source: Source) -> Outline | None:
        return (source.dtype, source.shape) if isinstance(source, Folded) else None

    def _unreached(self, step: Step) -> Runtime:
        """Result of a node that no constant passes."""
        foreign = step.node.domain not in ONNX_DOMAINS
        sources = [source for source in step.sources if isinstance(source, Runtime)]
        hot = foreign or step.op in ACTIVATIONS or any(source.hot for source in sources)
        first = step.source()
        kept = step.op in ("Cast", "Identity") and isinstance(first, Runtime) and first.one_hot
        return Runtime(hot, not foreign and (kept or _is_one_hot(step)))

    def _unfollowed(self, step: Step, passing: list[Source], value: ir.Value) -> Source:
        """A constant that a node computes in a way that is neither followed nor computed."""
        reason = f"{step.op} computes the weight from it in a way that the check does not follow"
        return _blocked(passing, reason, FOLD, shape=_static_shape(value))

    def _mixed(self, step: Step, passing: list[Source]) -> Source:
        """Result of a node to which constants and values known at run time alone come together."""
        op, unreached = step.op, self._unreached(step)
        natures = [found.nature for found in passing if not isinstance(found, Runtime)]
        if is_quantising(step.node):
            reason = f"{op} has a zero point or scale that is not one known constant"
            return _blocked(passing, reason, EXPORT, widest(("selected", *natures)))
        if step.node.domain not in ONNX_DOMAINS:
            moves = (step.node.domain, op) in _FOREIGN_MOVES
            nature = widest(("looked up", *natures))
            return (
                _blocked(passing, f"{op} reads rows of it", EXPORT, nature) if moves else unreached
            )
        if op in ACTIVATIONS | UNRELATED:
            return self._looked_up_by_one_hot(step) or unreached
        if op in _CHOOSING:
            reason = f"{op} moves or chooses its elements by values known at run time alone"
            return _blocked(passing, reason, EXPORT, widest(("selected", *natures)))
        if not any(has_matrix(found) for found in passing) or _is_activation(step, passing):
            return unreached
        reason = f"{op} combines it with values known at run time alone"
        return _blocked(passing, reason, EXPORT, widest(("mixed", *natures)))

    def _looked_up_by_one_hot(self, step: Step) -> Source | None:
        """A product with a matrix of ones and zeros, one in each row, chooses rows."""
        first, second = step.source(0), step.source(1)
        if step.op != "MatMul" or not isinstance(first, Runtime) or not first.one_hot:
            return None
        if not isinstance(second, Folded) or len(second.shape) != 2:
            return None
        rank = step.rank(0)
        chosen = dropped(tear(replace(second, nature=widest(("selected", second.nature))), [0]), 0)
        for _ in range(1 if rank is None else rank - 1):
            chosen = inserted(chosen, 0, torn=True)
        return chosen

    def _linked(self, links: tuple[Link, ...]) -> Source:
        """One of all that a value of control flow may be."""
        found = [self._through(link) for link in links]
        passing = [source for source in found if not isinstance(source, Runtime)]
        if not passing:
            return Runtime(any(isinstance(each, Runtime) and each.hot for each in found))
        folded = [source for source in passing if isinstance(source, Folded)]
        chosen = either(folded) if len(folded) == len(passing) else None
        if chosen is not None:
            return chosen
        reason = "constants of different shapes are chosen from at run time"
        nature = widest(("selected", *(source.nature for source in passing)))
        return _blocked(passing, reason, EXPORT, nature)

    def _through(self, link: Link) -> Source:
        source = self._at(link.value)
        if isinstance(source, Runtime) or link.kind == "same":
            return source
        nature = widest(("selected", source.nature))
        if isinstance(source, Blocked):
            return replace(source, nature=nature, shape=None)
        axis = place(link.axis, len(source.shape) + (link.kind == "stack"))
        if link.kind == "closed" or axis is None:
            reason = "a graph inside of the graph gets it in a way that the check does not follow"
            return Blocked(stored_of(source), reason, EXPORT, nature)
        source = replace(source, nature=nature)
        if link.kind == "slice":
            return dropped(tear(source, [axis]), axis)
        return inserted(source, axis, torn=True)

    def _chosen_of_sequence(self, step: Step) -> Source | None:
        """One of the tensors that a sequence was put together from."""
        value = step.node.inputs[0]
        node = value.producer() if value is not None else None
        if node is None or node.op_type != "SequenceConstruct" or node.domain not in ONNX_DOMAINS:
            return None
        return self._linked(tuple(Link(each) for each in node.inputs if each is not None))

    def _reaching(self, value: ir.Value) -> Source:
        """All constants that reach a value which a loop computes anew from itself."""
        found: list[Source] = []
        seen = {value}
        pending = [value]
        while pending:
            last = pending.pop()
            tensor = constant_of(last)
            if tensor is not None:
                if is_matrix(sizes_of(tensor)):
                    found.append(self._whole(last, tensor))
                continue
            node = last.producer()
            if node is not None and node.op_type in ACTIVATIONS:
                continue
            fresh = [each for each in self._feeding(last) if each not in seen]
            seen.update(fresh)
            pending += fresh
        if not found:
            return Runtime()
        reason = "a loop computes it anew at every step"
        return Blocked(stored_of(*found), reason, EXPORT, "mixed")

    def _bounded(self, source: Source) -> Source:
        """Give up on what takes more steps than a sound file needs."""
        if isinstance(source, Folded):
            self._left -= len(source.parts)
            if self._left < 0 or len(source.parts) > MOST_PARTS:
                reason = f"it is taken apart and joined in more than {MOST_PARTS} pieces"
                return Blocked(stored_of(source), reason, FOLD, source.nature)
        return source


# Of these any input may be the constant, of the others the first.
_ANY_INPUT = ("Concat", "Mul", "Where")
# Operators of others that pass on elements of a table.
_FOREIGN_MOVES = {
    (MICROSOFT, op) for op in ("GatherBlockQuantized", "GatherND", "ExpandDims", "Pad")
}
_CHOOSING = DATA_INPUTS.keys() - {"CastLike", "Clip", "CumSum", "CumProd", "Where"}


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
    return Blocked(stored_of(*passing), reason, remedy, nature, shape)


def _is_one_hot(step: Step) -> bool:
    """Whether a node makes rows with a single element that is not zero."""
    values = step.array(2) if step.op == "OneHot" and step.integer("axis", -1) == -1 else None
    return values is not None and values.size == 2 and not values[0]


def _is_activation(step: Step, passing: Iterable[Source]) -> bool:
    """Whether constants are mixed with an activation of full size, as a table of positions is."""
    shapes = [sizes_of(stored.tensor) for stored in stored_of(*passing)]
    return any(
        isinstance(source, Runtime) and source.hot and covers(value, shape)
        for value, source in zip(step.node.inputs, step.sources, strict=True)
        for shape in shapes
    )


def _is_matrix(stored: Stored) -> bool:
    return is_matrix(sizes_of(stored.tensor))


def _static_shape(value: ir.Value) -> tuple[int, ...] | None:
    return value.shape.numpy() if value.shape is not None and value.shape.is_static() else None


def nodes_of(model: ir.Model) -> Iterator[ir.Node]:
    """Every node of a model, those of subgraphs and of functions that were not inlined too."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def stored_elements(model: ir.Model) -> int:
    """Number of elements that a file stores, whatever it may claim to compute from them."""
    values = {value for graph in model.graphs() for value in graph.initializers.values()}
    for node in nodes_of(model):
        values.update(node.outputs if node.op_type == "Constant" else ())
    tensors = (constant_of(value) for value in values)
    return sum(math.prod(sizes_of(tensor)) for tensor in tensors if tensor is not None)
