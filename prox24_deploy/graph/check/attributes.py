"""Attributes of a node, refused by name where their type is not that of the operator."""

from collections.abc import Sequence

import onnx_ir as ir

from prox24_deploy.core.errors import UsageError


def integer(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute.

    Raises:
        UsageError: the attribute has another type.
    """
    attribute = _attribute(node, name, ir.AttributeType.INT)
    return default if attribute is None else int(attribute.as_int())


def integers(node: ir.Node, name: str) -> tuple[int, ...] | None:
    """An attribute of several integers, None where it is left out.

    Raises:
        UsageError: the attribute has another type.
    """
    attribute = _attribute(node, name, ir.AttributeType.INTS)
    return None if attribute is None else tuple(map(int, _listed(attribute)))


def text(node: ir.Node, name: str) -> str:
    """A string attribute, "" where it is left out.

    Raises:
        UsageError: the attribute has another type.
    """
    attribute = _attribute(node, name, ir.AttributeType.STRING)
    return "" if attribute is None else str(attribute.as_string())


def element_type(node: ir.Node, name: str) -> ir.DataType | None:
    """An attribute that names a type of elements, None where it is left out or 0.

    Raises:
        UsageError: the attribute is no integer, or no type of ONNX.
    """
    number = integer(node, name, 0)
    try:
        return ir.DataType(number) if number else None
    except ValueError as error:
        raise UsageError(
            f"Attribute {name!r} of {described(node)} is {number}, which is no type of ONNX; "
            "export the file again."
        ) from error


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """Every graph that a node holds, in the order of its attributes."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found.extend(attribute.as_graphs())
    return found


def subgraph(node: ir.Node, name: str) -> ir.Graph:
    """The graph that an operator of control flow runs.

    Raises:
        UsageError: the attribute is missing or has another type.
    """
    attribute = _attribute(node, name, ir.AttributeType.GRAPH)
    if attribute is None:
        raise UsageError(
            f"{described(node)} has no attribute {name!r}, which the operator needs; export the "
            "file again."
        )
    return attribute.as_graph()


def described(node: ir.Node) -> str:
    """A node in words."""
    return f"node {node.name!r} ({node.op_type})"


def _attribute(node: ir.Node, name: str, wanted: ir.AttributeType) -> ir.Attr | None:
    attribute = node.attributes.get(name)
    if attribute is None:
        return None
    if attribute.is_ref():
        raise UsageError(
            f"Attribute {name!r} of {described(node)} is that of a function, of which it is no "
            "part; export the file again."
        )
    if attribute.type != wanted:
        raise UsageError(
            f"Attribute {name!r} of {described(node)} has type {attribute.type.name}; expected "
            f"{wanted.name}; export the file again."
        )
    return attribute


def _listed(attribute: ir.Attr) -> Sequence[int]:
    return attribute.as_ints()
