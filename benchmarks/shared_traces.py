"""What torch's exporter traced in one process serves others that export models of the same form."""

import hashlib
import math
import os
from pathlib import Path

import numpy as np
import onnx_ir as ir

from prox24_deploy.graph.export.trace import Traces

# Above it a graph stays with who traced it: its weights go to the file as zeros.
_MOST_VALUES = 2**22


class SharedTraces(dict[str, ir.Model]):
    """Graphs by the hash of the structure that they were traced for, each a file of a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder: Path | None = folder

    def get(self, key: str, default: ir.Model | None = None) -> ir.Model | None:  # type: ignore[override]
        """The graph of a structure, whichever process traced it."""
        name = _name(key)
        if self._folder and name not in self and (path := self._folder / name).exists():
            super().__setitem__(name, _read(path))
        return super().get(name, default)

    def __setitem__(self, key: str, model: ir.Model) -> None:
        name = _name(key)
        super().__setitem__(name, model)
        if self._folder:
            _write(model, self._folder / name)

    def settle(self) -> None:
        """Read all that is there, and do without the folder from now on."""
        for path in self._folder.glob("*.onnx") if self._folder else ():
            super().__setitem__(path.name, _read(path))
        self._folder = None

    def given(self) -> Traces:
        """What every export of this process may be handed in place of traces of its own."""
        traces = Traces()
        traces._known = self
        return traces


def _name(key: str) -> str:
    return f"{hashlib.sha256(key.encode()).hexdigest()}.onnx"


def _write(model: ir.Model, path: Path) -> None:
    """Store a trace with zeros for the weights, of which it has no values."""
    copy = model.clone()
    blank = []
    for name, value in copy.graph.initializers.items():
        if value.const_value is None:
            assert value.shape is not None
            assert value.dtype is not None
            form = value.shape.numpy()
            if math.prod(form) > _MOST_VALUES:
                return
            value.const_value = ir.tensor(np.zeros(form, value.dtype.numpy()), value.dtype, name)
            blank.append(name)
    copy.metadata_props["blank"] = "\n".join(blank)
    part = path.with_suffix(f".{os.getpid()}")
    ir.save(copy, part)
    part.replace(path)


def _read(path: Path) -> ir.Model:
    model = ir.load(path)
    for name in filter(None, model.metadata_props.pop("blank").split("\n")):
        model.graph.initializers[name].const_value = None
    return model
