"""Everything that a stage depends on, as one JSON value: what its key is a hash of.

A value counts with all its fields, so that a field added later counts by itself. What cannot change
a result, such as where a file lies, is left out only where its field says so and why.
"""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import Field, fields, is_dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from pydantic import JsonValue

_UNKEYED = "unkeyed"


@runtime_checkable
class Fingerprinted(Protocol):
    """A value that says itself what of it counts, such as the hashes of its files."""

    def fingerprint(self) -> "JsonValue":
        """What of it counts, as a JSON value."""
        ...


def unkeyed(reason: str) -> dict[str, str]:
    """Metadata of a dataclass field that cannot change a result, with the reason."""
    return {_UNKEYED: reason}


def is_unkeyed(field: "Field[object]") -> bool:
    """Whether a dataclass field is left out of fingerprints."""
    return _UNKEYED in field.metadata


def fingerprint(value: object) -> "JsonValue":
    """The JSON value that stands for `value` in the key of a stage.

    Raises:
        TypeError: the value is of a kind that says nothing of its content, such as a path.
    """
    if isinstance(value, float) and not math.isfinite(value):
        # JSON has no such number.
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Fingerprinted):
        return value.fingerprint()
    if is_dataclass(value) and not isinstance(value, type):
        # Two kinds of backend may have the same fields.
        return {"kind": type(value).__name__, **fields_of(value)}
    if isinstance(value, Mapping):
        return {_name(key): fingerprint(part) for key, part in value.items()}
    if isinstance(value, Set):
        return sorted((fingerprint(part) for part in value), key=repr)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [fingerprint(part) for part in value]
    raise TypeError(
        f"{type(value).__name__} {value!r} has no fingerprint: give it a method of that name, or "
        "mark its field as unkeyed with the reason"
    )


def fields_of(value: object) -> "dict[str, JsonValue]":
    """The fingerprint of a dataclass, field by field.

    Raises:
        TypeError: a field has none.
    """
    if not is_dataclass(value):
        raise TypeError(f"{type(value).__name__} has no fields")
    return {f.name: fingerprint(getattr(value, f.name)) for f in fields(value) if not is_unkeyed(f)}


def _name(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"key {key!r} of a mapping has no fingerprint, expected a string")
    return key
