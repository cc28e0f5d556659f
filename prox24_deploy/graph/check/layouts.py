"""Along which axis a stored tensor is summed, as the config.json beside the file tells it.

A safetensors file has names and shapes. Whether a matrix is stored (outputs, inputs), as Linear
does, or (inputs, outputs), as the Conv1D of GPT-2 does, only the architecture says. The table
`layouts.json` holds what the architectures of transformers do; `benchmarks/layout_table.py` made
it. For any other architecture, and without config.json, the layout is not known.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from prox24_deploy.core.documents import Document, read_object
from prox24_deploy.core.errors import UsageError

_CONFIG = "config.json"
# Configurations of one model within another: text and vision, encoder and decoder.
_MOST_DEPTH = 4
# Layers of GPT-2's family that are a Conv1D.
_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight", "q_attn.weight")
_EXPERTS_IN = ("experts.gate_up_proj", "experts.gate_proj", "experts.up_proj")
_EXPERTS_OUT = ("experts.down_proj",)
_BESIDE = "put the config.json of the model beside the file, or tell the axis with --axis"
_TELL = "tell the axis with --axis, or ignore the tensor if it is no weight of a product"


@dataclass(frozen=True, slots=True)
class Summed:
    """A tensor that is summed along `axis` and whose axis `outputs` runs over the results."""

    axis: int
    outputs: int


@dataclass(frozen=True, slots=True)
class Unknown:
    """A tensor of which it is not known along which of `axes` it is summed, if it is at all."""

    axes: tuple[int, ...]
    is_weight: bool
    remedy: str


@dataclass(frozen=True, slots=True)
class NotSummed:
    """A tensor that no product sums over, and what it is."""

    what: str


@dataclass(frozen=True, slots=True)
class Layout:
    """What config.json tells of a model; no `types` means that it is not there or not known."""

    types: frozenset[str] = frozenset()
    hidden: frozenset[int] = frozenset()

    def role(
        self, name: str, shape: tuple[int, ...], siblings: Mapping[str, tuple[int, ...]]
    ) -> "Summed | Unknown | NotSummed":
        """How a tensor of rank two or more is used.

        Args:
            name: of the tensor.
            shape: of the tensor.
            siblings: shapes of all tensors of the file, by name.
        """
        is_weight = name.endswith("weight")
        if not self.types:
            return Unknown(tuple(range(len(shape))), is_weight, _BESIDE)
        if name.endswith("bias"):
            return NotSummed("a bias, which is added")
        axis = self._weight_axis(name, len(shape)) if is_weight else None
        if axis is None and len(shape) == 3:
            axis = self._expert_axis(name, shape, siblings)
        if axis is not None:
            # A convolution has its outputs first, a stack of matrices beside the inputs.
            stack = len(shape) == 3 and not is_weight
            return Summed(axis, 3 - axis if stack else 1 - axis)
        experts = name.endswith((*_EXPERTS_IN, *_EXPERTS_OUT))
        return Unknown(tuple(range(len(shape))), is_weight or experts, _TELL)

    def _weight_axis(self, name: str, rank: int) -> int | None:
        table = _table()
        if rank == 2:
            transposed = self.types & table["conv1d"] and name.endswith(_CONV1D)
            return 0 if transposed else 1
        if self.types & table["transposed_convolutions"]:
            return None
        # A stack of matrices has three axes too.
        return 1 if rank > 3 or "conv" in name else None

    def _expert_axis(
        self, name: str, shape: tuple[int, ...], siblings: Mapping[str, tuple[int, ...]]
    ) -> int | None:
        """Axis of the inputs in a stack of experts, known by the width of the hidden states.

        The layout (inputs, outputs) or (outputs, inputs) is that of all projections of a layer, so
        where one is square another tells it.
        """
        root, _, _ = name.rpartition(".")
        own = name.rpartition(".")[2]
        if not name.endswith((*_EXPERTS_IN, *_EXPERTS_OUT)):
            return None
        found = {
            axis
            for end in (*_EXPERTS_IN, *_EXPERTS_OUT)
            for axis in self._inputs(end, siblings.get(f"{root}.{end.rpartition('.')[2]}", ()))
        } | set(self._inputs(f"experts.{own}", shape))
        return found.pop() if len(found) == 1 else None

    def _inputs(self, end: str, shape: tuple[int, ...]) -> Iterator[int]:
        hidden = [axis for axis in (1, 2) if len(shape) == 3 and shape[axis] in self.hidden]
        if len(hidden) == 1:
            yield hidden[0] if end in _EXPERTS_IN else 3 - hidden[0]


def read_layout(folder: Path) -> Layout:
    """What the config.json of a folder tells, if there is one of an architecture that is known.

    Raises:
        UsageError: config.json is there and is not a JSON object.
    """
    path = folder / _CONFIG
    if not path.is_file():
        return Layout()
    document = Document(str(path), UsageError, "copy it again or remove it")
    # Some writers of configurations know numbers that JSON does not.
    config = read_object(path, document, finite=False)
    parts = list(_configs(config, _MOST_DEPTH))
    named = [part["model_type"] for part in parts if "model_type" in part]
    types = frozenset(each for each in named if isinstance(each, str))
    # Code of its own may store anything.
    if not types <= _table()["types"] or any("auto_map" in part for part in parts):
        return Layout()
    sizes = (part.get("hidden_size") for part in parts)
    return Layout(types, frozenset(size for size in sizes if isinstance(size, int)))


def _configs(config: dict[str, Any], depth: int) -> Iterator[dict[str, Any]]:
    """A configuration and those inside of it."""
    yield config
    for value in config.values() if depth else ():
        if isinstance(value, dict):
            yield from _configs(value, depth - 1)


@cache
def _table() -> dict[str, frozenset[str]]:
    text = files("prox24_deploy.graph.check").joinpath("layouts.json").read_text(encoding="utf-8")
    return {key: frozenset(value) for key, value in json.loads(text)["types"].items()}
