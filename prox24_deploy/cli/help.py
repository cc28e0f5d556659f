"""The help of a command: options under the headings of their groups, values as users write them."""

import inspect
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from typer.core import TyperCommand

__all__ = ["GroupedCommand", "without_none"]

# What stands for a value; a choice stands for itself, and a flag has none.
_VALUES = {Path: "PATH", int: "N", float: "X", str: "TEXT"}


class GroupedCommand(TyperCommand):
    """A command whose help is plain text, the same on a terminal of any width and in a pipe."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        declared = inspect.signature(self.callback).parameters if self.callback else {}
        for parameter in self.params:
            if parameter.metavar is None and parameter.name in declared:
                parameter.metavar = _value_of(get_args(declared[parameter.name].annotation)[0])

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """What stands behind the name of the command."""
        arguments = [p for p in self.get_params(ctx) if p.param_type_name == "argument"]
        return ["[OPTIONS]", *(str(argument.metavar) for argument in arguments)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, the options of no group, then those of each group."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            if parameter.param_type_name == "argument":
                groups["Arguments"].append((str(parameter.metavar), record[1]))
            else:
                title = getattr(parameter, "rich_help_panel", None) or "Options"
                groups.setdefault(title, []).append(record)
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def without_none(kind: Any) -> Any:
    """A type without the None that it may be instead."""
    if get_origin(kind) not in {Union, UnionType}:
        return kind
    (only,) = (part for part in get_args(kind) if part is not type(None))
    return only


def _value_of(kind: Any) -> str | None:
    """What stands for a value of a type in help."""
    kind = without_none(kind)
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    return _VALUES.get(kind)
