"""Compare the index of a model in several safetensors files with what those files hold."""

from collections.abc import Mapping
from pathlib import Path

from prox24_deploy.core.documents import Document, read_json
from prox24_deploy.core.errors import UsageError

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
    document = Document(str(index), UsageError, "copy it again")
    content = read_json(index, document)
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not all(isinstance(shard, str) for shard in found.values()):
        raise document.refused("is damaged")
    return found
