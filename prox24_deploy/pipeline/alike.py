"""Processes that share a run must be given the same; else the first difference is named."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from prox24_deploy.bundle.manifest import canonical_json
from prox24_deploy.config.options import TextOptions
from prox24_deploy.core.fingerprint import fields_of

if TYPE_CHECKING:
    from pydantic import JsonValue

    from prox24_deploy.pruning.ranks import Ranks

Where = tuple[str, ...]
# What is longer, such as a hash, tells nobody anything.
_SHORT = 60
# Inputs that come of the options for text, and those whose parts have names of their own.
_TEXTS = ("calibration", "held_out")
_PARTS = {"source": "model file ", "options": "--", "text": "--"}
_FLAGS = {"max_layers": "layers", "planned_dense": "plan"}


def require_alike(inputs: object, text: TextOptions | None, ranks: "Ranks") -> None:
    """Refuse processes that have other inputs of a stage than process 0; all of them do so.

    Args:
        inputs: a dataclass; fields without a part in the key of the stage may differ.
        text: the options that `calibration` and `held_out` of it come of.
        ranks: the processes.

    Raises:
        RankError: names the first process, and the option, file or version that it has another of.
    """
    # Brings torch, as the processes did.
    from prox24_deploy.pruning.ranks import first_unlike, unlike

    for name, value in fields_of(inputs).items():
        digests = ranks.of_all(hashlib.sha256(canonical_json(value)).hexdigest())
        if (other := first_unlike(digests)) is None:
            continue
        said = {"text": _of_text(text) if name in _TEXTS else {}, name: value}
        found: list[Any] = ranks.of_all(said)
        raise unlike(other, _difference(found[0], found[other]))


def _of_text(text: TextOptions | None) -> dict[str, Any]:
    """Options for text; where it lies comes last, for the same text may lie in two places."""
    said: dict[str, Any] = json.loads(json.dumps(asdict(text) if text else {}, default=str))
    return dict(sorted(said.items(), key=lambda each: isinstance(each[1], list)))


def _difference(first: "JsonValue", other: "JsonValue") -> str:
    """What differs between process 0 and another: the first that can be said with both values."""
    left, right = dict(_leaves(first)), dict(_leaves(other))
    paths = [p for p in {**left, **right} if p not in left or p not in right or left[p] != right[p]]
    for path in paths:
        mine, its = _said(left.get(path)), _said(right.get(path))
        if max(len(mine), len(its)) <= _SHORT:
            return f"{_name(path)} {its}, and process 0 has {mine}"
    return f"another {_name(paths[0])} than process 0"


def _leaves(value: "JsonValue", path: Where = ()) -> "Iterator[tuple[Where, JsonValue]]":
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _leaves(part, (*path, name))
    else:
        yield path, value


def _name(path: Where) -> str:
    """A part of the inputs: an option, a file of the model, or what the stage calls it."""
    field, *rest = path
    if not rest or field not in _PARTS:
        return " ".join(path).removeprefix("versions ")
    name = _FLAGS.get(rest[0], rest[0])
    return _PARTS[field] + (name.replace("_", "-") if _PARTS[field] == "--" else name)


def _said(value: "JsonValue") -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)
