"""Read the header of a safetensors file and map its tensors, without torch.

The safetensors library checks the header, as every loader does. It keeps the last of two tensors of
one name, which others need not, so such a file is refused here.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from prox24_deploy.core.documents import decode_json
from prox24_deploy.core.errors import UsageError
from prox24_deploy.sparsity.declaration import SPARSE_KEY
from prox24_deploy.sparsity.groups import Array

_LENGTH_BYTES = 8
# Largest headers seen: 12 MB for 10^5 tensors. As Python objects a header takes ten times its size.
_MAX_HEADER = 32_000_000
# NumPy has no more axes.
_MOST_AXES = 64

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of the header; `begin` is a position in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def is_readable(self) -> bool:
        """Whether its elements are whole numbers of bytes of a type that NumPy has."""
        return self.dtype in _DTYPES

    @property
    def is_float(self) -> bool:
        """Whether its elements are floating-point numbers that can be read."""
        return self.is_readable and self.dtype[0] in "FB" and self.dtype != "BOOL"

    @property
    def type_name(self) -> str:
        """Name of its type as NumPy has it, else as the file has it."""
        return _DTYPES[self.dtype].name if self.is_readable else self.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A checked safetensors header. `sparse_axes` is the 2:4 declaration, None if there is none."""

    path: Path
    tensors: tuple[TensorEntry, ...]
    sparse_axes: dict[str, int] | None

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(entry.name for entry in self.tensors)

    def read(self, entry: TensorEntry) -> Array:
        """Map one tensor of a readable type into memory."""
        dtype = _DTYPES[entry.dtype]
        if not entry.size:
            return np.empty(0, dtype)
        return np.memmap(self.path, dtype, "r", offset=entry.begin, shape=entry.shape)


def open_tensor_file(path: Path) -> TensorFile:
    """Read and check the header of one safetensors file.

    Raises:
        UsageError: the file cannot be read, or is one that no loader opens, or that two loaders may
            read differently.
    """
    length = _header_length(path)
    try:
        # Opens no tensor; holes, overlaps, trailing bytes and wrong sizes are refused here.
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as stream:
            stream.seek(_LENGTH_BYTES)
            text = stream.read(length)
        header = decode_json(text.decode())
    except SafetensorError as error:
        raise UsageError(_damaged(path, _reason(error))) from error
    except OSError as error:
        raise UsageError(_unreadable(path, error)) from error
    except ValueError as error:
        raise UsageError(_damaged(path, f"its header: {error}")) from error
    metadata = header.pop("__metadata__", None) or {}
    start = _LENGTH_BYTES + length
    entries = tuple(_entry(name, header[name], start, path) for name in sorted(header))
    return TensorFile(path, entries, _sparse_axes(metadata, path))


def _header_length(path: Path) -> int:
    try:
        # A pipe would keep the reader waiting for ever.
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is not a regular file; pass a safetensors file.")
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        size = path.stat().st_size
    except OSError as error:
        raise UsageError(_unreadable(path, error)) from error
    if _MAX_HEADER < length <= size:
        raise UsageError(
            f"{path} has a header of {length} bytes; the check reads up to {_MAX_HEADER}; store "
            "the model in several files."
        )
    return length


def _entry(name: str, raw: dict[str, Any], start: int, path: Path) -> TensorEntry:
    shape = tuple(raw["shape"])
    if len(shape) > _MOST_AXES:
        problem = f"tensor {name!r} has {len(shape)} axes, and none has more than {_MOST_AXES}"
        raise UsageError(_damaged(path, problem))
    return TensorEntry(
        name=name, dtype=raw["dtype"], shape=shape, begin=start + raw["data_offsets"][0]
    )


def _sparse_axes(metadata: dict[str, str], path: Path) -> dict[str, int] | None:
    text = metadata.get(SPARSE_KEY)
    if text is None:
        return None
    try:
        axes = decode_json(text)
    except ValueError:
        axes = None
    if not isinstance(axes, dict) or not all(type(axis) is int for axis in axes.values()):
        raise UsageError(
            f"Metadata {SPARSE_KEY} of {path} must be a JSON object from tensor name to axis, got "
            f"{text[:80]!r}; write the file again."
        )
    return axes


def _reason(error: SafetensorError) -> str:
    """What the library says, without its preamble and cut where a file made it long."""
    return str(error).removeprefix("Error while deserializing header: ")[:200]


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path} cannot be read ({error.strerror}); pass a safetensors file."


def _damaged(path: Path, problem: str) -> str:
    return f"{path} is not a safetensors file, or is damaged: {problem}; copy it again."
