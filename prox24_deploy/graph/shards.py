"""Compare the index of a model in several safetensors files with what those files hold."""

import json
from collections.abc import Mapping
from pathlib import Path

from prox24_deploy.errors import UsageError

_INDEX = "*.safetensors.index.json"


def require_index(folder: Path, names: Mapping[Path, frozenset[str]]) -> None:
    """Check every index of a folder, and that no two of its files hold a tensor of one name.

    Args:
        folder: of the model.
        names: of the tensors that each of its safetensors files holds.

    Raises:
        UsageError: an index is damaged, names a file or tensor that is missing, or a tensor is in
            two files.
    """
    holders: dict[str, Path] = {}
    for path, tensors in names.items():
        for name in sorted(tensors):
            other = holders.setdefault(name, path)
            if other is not path:
                raise UsageError(
                    f"Tensor {name!r} is in {other.name} and in {path.name} of {folder}, of which "
                    "loaders take one or the other; remove the file that is not of this model."
                )
    held = {path.name: tensors for path, tensors in names.items()}
    for index in sorted(folder.glob(_INDEX)):
        listed = _weight_map(index)
        missing = min(set(listed.values()) - held.keys(), default=None)
        if missing is not None:
            raise UsageError(
                f"{folder} lacks {missing[:255]}, which {index.name} lists; copy it again."
            )
        for name, shard in listed.items():
            if name not in held[shard]:
                raise UsageError(
                    f"{shard} of {folder} lacks tensor {name!r}, which {index.name} lists; copy it "
                    "again."
                )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(_damaged(index)) from error
    if not isinstance(found, dict) or not all(isinstance(shard, str) for shard in found.values()):
        raise UsageError(_damaged(index))
    return found


def _damaged(index: Path) -> str:
    return f"{index} is damaged; copy it again."
