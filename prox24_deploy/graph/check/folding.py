"""Follow a value back to the stored tensors whose elements it shows.

Nodes that only renumber elements are followed exactly (`graph.movement`), those that keep zeros
zero are followed too (`graph.arithmetic`), and so is control flow (`graph.control_flow`). What else
is computed from constants alone is computed (`graph.evaluation`). Of the rest it is known which
constants reach it, and why they are not followed (`graph.mixing`).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from prox24_deploy.core.errors import UsageError
from prox24_deploy.graph.check import attributes
from prox24_deploy.graph.check.arithmetic import ARITHMETIC, dequantize, quantize
from prox24_deploy.graph.check.constants import ONNX_DOMAINS, constant_of, is_matrix, sizes_of
from prox24_deploy.graph.check.control_flow import ControlFlow
from prox24_deploy.graph.check.evaluation import Budget, Evaluator, NotComputedError
from prox24_deploy.graph.check.mixing import (
    FOLD,
    data_inputs,
    mixed,
    one_of,
    renewed,
    through,
    unfollowed,
    unreached,
)
from prox24_deploy.graph.check.movement import MOVEMENTS
from prox24_deploy.graph.check.operators import ACTIVATIONS, ELEMENTWISE
from prox24_deploy.graph.check.quantisers import is_dequantiser, is_quantiser
from prox24_deploy.graph.check.shapes import Shapes
from prox24_deploy.graph.check.sources import (
    MOST_PARTS,
    Blocked,
    Folded,
    Nature,
    Part,
    Runtime,
    Source,
    Stored,
    stored_of,
)
from prox24_deploy.graph.check.step import Step
from prox24_deploy.sparsity.groups import Array

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
        # Those that were not inlined, for their size.
        self.functions = frozenset(model.functions)
        self._inputs = frozenset(model.graph.inputs)
        self._replaceable = (model.ir_version or 0) >= _FIRST_REPLACEABLE
        self._shapes = Shapes(model, trusted=path is None)
        self._known: dict[ir.Value, Source] = {}
        self._renewed: dict[ir.Value, Source] = {}
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
            return one_of([through(link, self._at(link.value)) for link in links])
        node = value.producer()
        if node is None:
            return Runtime()
        index = list(node.outputs).index(value)
        sources = tuple(self._at(each) for each in node.inputs)
        return self._made(
            Step(node=node, output=index, sources=sources, read=self.read, shapes=self._shapes),
            value,
        )

    def _whole(self, value: ir.Value, tensor: ir.TensorProtocol) -> Source:
        if tensor.dtype == ir.DataType.STRING:
            return Runtime()
        part = Part.whole(Stored(value=value, tensor=tensor))
        replaceable = value in self._inputs and self._replaceable
        nature: Nature = "selected" if replaceable else "constant"
        part = replace(part, replaceable=replaceable)
        return Folded(parts=(part,), shape=part.view.shape, dtype=tensor.dtype, nature=nature)

    def _made(self, step: Step, value: ir.Value) -> Source:
        """Source of the result of a node."""
        places = data_inputs(step.node)
        passing = [step.source(i) for i in places if not isinstance(step.source(i), Runtime)]
        if not passing:
            return unreached(step)
        followed = self._followed(step, passing)
        if followed is not None:
            return followed
        given = [i for i in range(len(step.sources)) if step.has(i)]
        if all(step.is_constant(i) for i in given) and not attributes.subgraphs(step.node):
            computed = self._computed(step, value, passing)
            return computed or unfollowed(step, passing, _static_shape(value))
        return mixed(step, passing)

    def _followed(self, step: Step, passing: list[Source]) -> Source | None:
        """Result of a node that is followed without computing anything."""
        if step.op == "SequenceAt":
            return self._chosen_of_sequence(step)
        folded = [found for found in passing if isinstance(found, Folded)]
        if not folded:
            return None
        # Beside another constant, what is chosen at run time is the weight.
        chosen = [found for found in folded if found.nature != "constant"]
        source = (chosen if chosen and step.op in _ANY_INPUT else folded)[0]
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

    def _chosen_of_sequence(self, step: Step) -> Source | None:
        """One of the tensors that a sequence was put together from."""
        value = step.node.inputs[0]
        node = value.producer() if value is not None else None
        if node is None or node.op_type != "SequenceConstruct" or node.domain not in ONNX_DOMAINS:
            return None
        return one_of([self._at(each) for each in node.inputs])

    def _computed(self, step: Step, value: ir.Value, passing: list[Source]) -> Folded | None:
        """A constant that is computed when it is read, under the name of its largest source."""
        outlines = {
            index: (source.dtype, source.shape)
            for index, source in enumerate(step.sources)
            if isinstance(source, Folded)
        }
        if len(outlines) < sum(step.has(index) for index in range(len(step.sources))):
            return None
        outline = self.evaluator.outline(step.node, step.output, outlines)
        if outline is None:
            return None
        tensor = self.evaluator.tensor(value, outline)
        parts = [part for each in passing if isinstance(each, Folded) for part in each.parts]
        largest = max(parts, key=lambda part: part.stored.tensor.size, default=None)
        if largest is None or not is_matrix(sizes_of(largest.stored.tensor)):
            return Folded(
                parts=(Part.whole(Stored(value=value, tensor=tensor)),),
                shape=outline[1],
                dtype=outline[0],
            )
        still = step.op in ELEMENTWISE and largest.view.shape == outline[1] and largest.is_in_place
        stored = Stored(
            value=largest.stored.value, tensor=tensor, moved=not still, made_of=_matrices(parts)
        )
        return Folded(parts=(Part.whole(stored),), shape=outline[1], dtype=outline[0])

    def _reaching(self, value: ir.Value) -> Source:
        """All constants that reach a value which a loop computes anew from itself.

        Raises:
            UsageError: loops carry more values than a sound file does.
        """
        if value in self._renewed:
            return self._renewed[value]
        found: list[Source] = []
        seen = {value}
        pending = [value]
        while pending:
            last = pending.pop()
            tensor, node = constant_of(last), last.producer()
            if tensor is not None and is_matrix(sizes_of(tensor)):
                found.append(self._whole(last, tensor))
            if tensor is None and (node is None or node.op_type not in ACTIVATIONS):
                fresh = [each for each in self._feeding(last) if each not in seen]
                seen.update(fresh)
                pending += fresh
        self._left -= len(seen)
        if self._left < 0:
            raise UsageError(
                "The loops of the model carry more values than the check follows; unroll them, or "
                "export the file again."
            )
        self._renewed[value] = renewed(found)
        return self._renewed[value]

    def _bounded(self, source: Source) -> Source:
        """Give up on what takes more steps than a sound file needs."""
        if isinstance(source, Folded):
            self._left -= len(source.parts)
            if self._left < 0 or len(source.parts) > MOST_PARTS:
                reason = f"it is taken apart and joined in more than {MOST_PARTS} pieces"
                return Blocked(
                    stored=stored_of(source), reason=reason, remedy=FOLD, nature=source.nature
                )
        return source


def _matrices(parts: Sequence[Part]) -> tuple[str, ...]:
    """Names of the stored matrices that some parts are made of, each once."""
    names: dict[str, None] = {}
    for stored in (part.stored for part in parts):
        if is_matrix(sizes_of(stored.tensor)):
            names.update(dict.fromkeys(stored.made_of or (stored.value.name or "",)))
    return tuple(names)


# Of these any input may be the constant, of the others the first.
_ANY_INPUT = ("Add", "Concat", "Max", "Min", "Mul", "Sub", "Where")


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
