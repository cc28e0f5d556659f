"""The outputs of an engine, kept on disk as it gives them, and given again once it is closed.

So twins are compared of which no two are open at once, and each runs on a batch only once.
"""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from prox24_deploy.core.atomic import make_folder
from prox24_deploy.engines.engine_model import EngineModel
from prox24_deploy.model.checkpoint import write_tensors


class Recorded(nn.Module):
    """An engine called as the model itself, whose every answer is kept in a file in `folder`.

    Asked the same again, it gives the kept answer, bit for bit.
    """

    def __init__(self, engine: EngineModel, folder: Path) -> None:
        super().__init__()
        make_folder(folder)
        # Its parameter says where inputs go.
        self._engine, self._folder = engine, folder
        self.config = engine.config

    def forward(self, **inputs: Any) -> SimpleNamespace:
        """Outputs by name, those of `EngineModel`.

        Raises:
            EngineError: what that raises.
            OSError: there is no room on the disk.
        """
        file = self._folder / f"{_digest(inputs)}.safetensors"
        if not file.exists():
            found = vars(self._engine(**inputs))
            write_tensors(file, {name: each.contiguous() for name, each in found.items()}, {})
            return SimpleNamespace(**found)
        return SimpleNamespace(**load_file(file))


def _digest(inputs: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(inputs):
        value = inputs[name]
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.contiguous().numpy().tobytes())
        else:
            digest.update(f"{name} {value!r} ".encode())
    return digest.hexdigest()
