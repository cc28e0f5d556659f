"""Write a safetensors file of tensors that lie in other such files, byte by byte, without torch.

No tensor is held in memory: each is mapped from the file it lies in. The layout of the file is that
of https://github.com/huggingface/safetensors (Format), with tensors of wider types first, as its
own writer does, so that each begins at a multiple of the size of its elements.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prox24_deploy.core.atomic import writing
from prox24_deploy.graph.check.tensor_files import TensorEntry, TensorFile

_ALIGNMENT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """One tensor to be written.

    Attributes:
        name: under which it is written.
        file: in which it lies.
        entry: where in that file.
        shape: in which it is written, of as many elements.
    """

    name: str
    file: TensorFile
    entry: TensorEntry
    shape: tuple[int, ...]

    @property
    def data(self) -> memoryview:
        """Its bytes, mapped."""
        return self.file.read(self.entry).reshape(-1).view(np.uint8).data

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return self.file.read(self.entry).itemsize


def write_copies(tensors: Sequence[Copied], metadata: Mapping[str, str], path: Path) -> int:
    """Write one file; the same tensors and metadata give the same bytes.

    Returns:
        Bytes of all tensors, without the header.

    Raises:
        OSError: it cannot be written.
    """
    ordered = sorted(tensors, key=lambda tensor: (-tensor.width, tensor.name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for tensor in ordered:
        begin, end = end, end + tensor.data.nbytes
        header[tensor.name] = {
            "dtype": tensor.entry.dtype,
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // _ALIGNMENT) * _ALIGNMENT)
    with writing(path), path.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for tensor in ordered:
            stream.write(tensor.data)
    return end
