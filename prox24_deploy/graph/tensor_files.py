"""Read the header of a safetensors file and map its tensors, without torch."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from prox24_deploy.documents import decode_json
from prox24_deploy.errors import UsageError
from prox24_deploy.graph.groups import Array
from prox24_deploy.graph.weights import SPARSE_KEY

_LENGTH_BYTES = 8
# The limit of the format's reference reader.
_MAX_HEADER = 100_000_000

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
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the header; `begin` and `end` are positions in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A checked safetensors header. `sparse_axes` is the 2:4 declaration, None if there is none."""

    path: Path
    tensors: tuple[TensorEntry, ...]
    sparse_axes: dict[str, int] | None

    def read(self, entry: TensorEntry) -> Array:
        """Map one tensor into memory.

        Raises:
            UsageError: the dtype is unknown or does not fit the bytes.
        """
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise UsageError(
                f"Tensor {entry.name!r} of {self.path} has dtype {entry.dtype}; the check reads "
                f"{', '.join(_DTYPES)}."
            )
        if math.prod(entry.shape) * dtype.itemsize != entry.end - entry.begin:
            raise UsageError(_damaged(self.path, f"tensor {entry.name!r} does not fit its bytes"))
        if entry.begin == entry.end:
            return np.empty(entry.shape, dtype)
        return np.memmap(self.path, dtype, "r", offset=entry.begin, shape=entry.shape)


def open_tensor_file(path: Path) -> TensorFile:
    """Read and check the header of one safetensors file.

    Raises:
        UsageError: the file cannot be read, or its header is damaged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            text = stream.read(length) if length <= min(size, _MAX_HEADER) else b""
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}); pass a safetensors file."
        ) from error
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(_damaged(path, "its header is not JSON")) from error
    if not isinstance(header, dict):
        raise UsageError(_damaged(path, "its header is not a JSON object"))
    metadata = header.pop("__metadata__", {})
    start = _LENGTH_BYTES + length
    entries = tuple(_entry(name, header[name], start, size, path) for name in sorted(header))
    return TensorFile(path, entries, _sparse_axes(metadata, path))


def _entry(name: str, raw: Any, start: int, size: int, path: Path) -> TensorEntry:
    try:
        begin, end = (start + int(offset) for offset in raw["data_offsets"])
        entry = TensorEntry(name, str(raw["dtype"]), tuple(map(int, raw["shape"])), begin, end)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UsageError(_damaged(path, f"the entry of tensor {name!r} is malformed")) from error
    if not start <= begin <= end <= size or min(entry.shape, default=0) < 0:
        raise UsageError(_damaged(path, f"tensor {name!r} lies outside the file's {size} bytes"))
    return entry


def _sparse_axes(metadata: Any, path: Path) -> dict[str, int] | None:
    text = metadata.get(SPARSE_KEY) if isinstance(metadata, dict) else None
    if text is None:
        return None
    try:
        axes = decode_json(text)
    except (TypeError, ValueError):
        axes = None
    if not isinstance(axes, dict) or not all(type(axis) is int for axis in axes.values()):
        raise UsageError(
            f"Metadata {SPARSE_KEY} of {path} must be a JSON object from tensor name to axis, got "
            f"{str(text)[:80]!r}; write the file again."
        )
    return axes


def _damaged(path: Path, problem: str) -> str:
    return f"{path} is not a safetensors file, or is damaged: {problem}; copy it again."
