"""What the values are that If, Loop and Scan pass in and out of their graphs.

A branch gives its outputs to If; a loop gives its body what it was given at first and what the body
returned before, and Scan also gives it slices of tensors, one after the other.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from prox24_deploy.graph.check import attributes
from prox24_deploy.graph.check.constants import ONNX_DOMAINS, input_of

# The first version of Scan has batches and another order of inputs.
_FIRST_SCAN = 9


@dataclass(frozen=True, slots=True)
class Link:
    """A value that another one may be: the same, a slice along `axis`, or a stack of such.

    "closed" is a value of which no more is known than that it comes from this one.
    """

    value: ir.Value
    kind: Literal["same", "slice", "stack", "closed"] = "same"
    axis: int = 0


class ControlFlow:
    """The inputs of all graphs that nodes of one model hold."""

    def __init__(self, nodes: Iterator[ir.Node], opset: int) -> None:
        self._opset = opset
        self._entries: dict[ir.Value, tuple[ir.Node, int]] = {}
        for node in nodes:
            for graph in attributes.subgraphs(node):
                for index, value in enumerate(graph.inputs):
                    self._entries[value] = (node, index)

    def links(self, value: ir.Value) -> tuple[Link, ...] | None:
        """All that a value may be; None if no control flow makes it.

        Values that are passed on unchanged, from step to step too, are followed to where they are
        made.

        Raises:
            UsageError: a node of control flow lacks its graph.
        """
        first = self._step(value)
        if first is None:
            return None
        found: dict[Link, None] = {}
        seen = {value}
        pending = list(reversed(first))
        while pending:
            link = pending.pop()
            further = self._passed_on(link)
            if further is None:
                found[link] = None
                continue
            for each in reversed(further):
                if each.kind != "same" or each.value not in seen:
                    seen.add(each.value)
                    pending.append(each)
        return tuple(found)

    def _passed_on(self, link: Link) -> list[Link] | None:
        """What the value of a link may be in turn, None if it is made rather than passed on."""
        if link.kind != "same":
            return None
        node = link.value.producer()
        if node is not None and node.op_type == "Identity" and node.domain in ONNX_DOMAINS:
            source = input_of(node, 0)
            return None if source is None else [Link(source)]
        return self._step(link.value)

    def _step(self, value: ir.Value) -> list[Link] | None:
        node, index = self._entries.get(value, (None, 0))
        if node is not None:
            return list(_present(self._entry(node, index)))
        node = value.producer()
        if node is None or node.domain not in ONNX_DOMAINS:
            return None
        index = list(node.outputs).index(value)
        match node.op_type:
            case "If":
                names = ("then_branch", "else_branch")
                branches = [attributes.subgraph(node, name) for name in names]
                return list(_present(_same(_at(each.outputs, index)) for each in branches))
            case "Loop":
                return list(_present(self._loop_output(node, index)))
            case "Scan":
                return list(_present(self._scan_output(node, index)))
            case _:
                closed = [
                    _linked(output, "closed")
                    for graph in attributes.subgraphs(node)
                    for output in graph.outputs
                ]
                inputs = [_linked(each, "closed") for each in node.inputs]
                return list(_present([*inputs, *closed])) if closed else None

    def _entry(self, node: ir.Node, index: int) -> Iterator[Link | None]:
        if node.domain in ONNX_DOMAINS and node.op_type == "Loop":
            # Before the carried values come the number of the step and the condition.
            if index >= 2:
                yield _same(input_of(node, index))
                yield _same(_at(attributes.subgraph(node, "body").outputs, index - 1))
        elif node.domain in ONNX_DOMAINS and node.op_type == "Scan" and self._knows_scan:
            states = len(node.inputs) - attributes.integer(node, "num_scan_inputs", 0)
            if index < states:
                yield _same(input_of(node, index))
                yield _same(_at(attributes.subgraph(node, "body").outputs, index))
            else:
                axes = attributes.integers(node, "scan_input_axes") or ()
                axis = axes[index - states] if index - states < len(axes) else 0
                yield _linked(input_of(node, index), "slice", axis)
        else:
            yield from (_linked(value, "closed") for value in node.inputs)

    def _loop_output(self, node: ir.Node, index: int) -> Iterator[Link | None]:
        body = attributes.subgraph(node, "body")
        if index < len(node.inputs) - 2:
            yield _same(input_of(node, index + 2))
            yield _same(_at(body.outputs, index + 1))
        else:
            yield _linked(_at(body.outputs, index + 1), "stack")

    def _scan_output(self, node: ir.Node, index: int) -> Iterator[Link | None]:
        body = attributes.subgraph(node, "body")
        states = len(node.inputs) - attributes.integer(node, "num_scan_inputs", 0)
        if not self._knows_scan:
            yield from (_linked(value, "closed") for value in node.inputs)
        elif index < states:
            yield _same(input_of(node, index))
            yield _same(_at(body.outputs, index))
        else:
            axes = attributes.integers(node, "scan_output_axes") or ()
            axis = axes[index - states] if index - states < len(axes) else 0
            yield _linked(_at(body.outputs, index), "stack", axis)

    @property
    def _knows_scan(self) -> bool:
        return self._opset >= _FIRST_SCAN


def _at(values: Sequence[ir.Value], index: int) -> ir.Value | None:
    return values[index] if index < len(values) else None


def _same(value: ir.Value | None) -> Link | None:
    return None if value is None else Link(value)


def _linked(
    value: ir.Value | None, kind: Literal["slice", "stack", "closed"], axis: int = 0
) -> Link | None:
    return None if value is None else Link(value, kind, axis)


def _present(links: Iterable[Link | None]) -> Iterator[Link]:
    return (link for link in links if link is not None)
