"""The weight files of a checkpoint: which there are, and that every value in them is sound."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prox24_deploy.core.documents import (
    Document,
    is_file_name,
    read_json,
    reason_of,
    require_readable,
)
from prox24_deploy.core.errors import ModelDirError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# Two values in a byte, none of them NaN or infinite.
_ALWAYS_FINITE = (torch.float4_e2m1fn_x2,)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint."""

    shard: Path
    dtype: torch.dtype
    numel: int


def is_single(shards: Sequence[Path]) -> bool:
    """Whether the weights lie in one file, for which an index beside it means nothing."""
    return [shard.name for shard in shards] == [SINGLE_FILE]


def find_shards(path: Path) -> tuple[Path, ...]:
    """The weight files of a model directory, in name order, each there and readable.

    Raises:
        ModelDirError: there are none, or only pickles, or one is missing or cannot be read.
    """
    # Where both are there, transformers loads the single file; what is checked is what is loaded.
    single = path / SINGLE_FILE
    if single.is_file():
        return (_readable(single),)
    index = path / INDEX_FILE
    if index.is_file():
        return tuple(_shards_of_index(index))
    loose = sorted(path.glob("*.safetensors"))
    if loose:
        raise ModelDirError(
            f"Model directory {path} holds {loose[0].name} but neither {SINGLE_FILE} nor "
            f"{INDEX_FILE}; rename it or add the index."
        )
    if any(next(path.glob(pattern), None) for pattern in _PICKLES):
        raise ModelDirError(
            f"Model directory {path} holds only pickled weights, which are never opened here; "
            "convert them with save_pretrained(..., safe_serialization=True)."
        )
    raise ModelDirError(f"Model directory {path} has no {SINGLE_FILE}; add the weights.")


def _shards_of_index(index: Path) -> Iterator[Path]:
    for name in sorted(set(_weight_map(index).values())):
        shard = index.parent / name
        if not shard.is_file():
            raise ModelDirError(
                f"{index} names shard {name}, which is missing; download it into {index.parent}."
            )
        yield _readable(shard)


def _readable(shard: Path) -> Path:
    # The library would call a file missing that it may not open.
    require_readable(shard, Document(f"Weight file {shard}", ModelDirError, "make it readable"))
    return shard


def _weight_map(index: Path) -> dict[str, str]:
    """Name of each tensor to the file that holds it, which lies beside the index."""
    document = Document(str(index), ModelDirError, "restore it")
    found = read_json(index, document)
    names = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(names, dict) or not names:
        raise document.refused("has no readable weight_map")
    for name in names.values():
        if not isinstance(name, str) or not is_file_name(name):
            raise ModelDirError(f"{index} names {name!r}, expected a plain file name beside it.")
    if not isinstance(found.get("metadata"), dict):
        # The library reads it, and would say nothing but its name.
        raise ModelDirError(f'{index} has no metadata; add "metadata": {{}} to it.')
    return names


def tensors_of(shards: Sequence[Path]) -> dict[str, StoredTensor]:
    """The tensors of all shards, each in one of them; see `sound_tensors`.

    Raises:
        ModelDirError: one lies in two, so that it is open which counts.
    """
    found: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, tensor in sound_tensors(shard).items():
            if name in found:
                raise ModelDirError(
                    f"Weight {name} lies in {found[name].shard} and in {shard.name}; remove it "
                    "from the one that the index does not name."
                )
            found[name] = tensor
    return found


def sound_tensors(shard: Path) -> dict[str, StoredTensor]:
    """The tensors of one shard, each read once and checked for NaN and infinity.

    Raises:
        ModelDirError: the file is damaged, or holds such a value.
    """
    found = {}
    try:
        with safe_open(shard, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                tensor = handle.get_tensor(name)
                if bad := _infinite(tensor):
                    raise ModelDirError(
                        f"Weight {name} in {shard} holds {bad} NaN or infinite values of "
                        f"{tensor.numel()}; restore a sound checkpoint."
                    )
                found[name] = StoredTensor(shard, tensor.dtype, tensor.numel())
    except (SafetensorError, RuntimeError) as error:
        # Torch holds no tensor of more than 64 axes.
        raise ModelDirError(
            f"Weight file {shard} is damaged ({reason_of(error)}); download it again."
        ) from error
    return found


def _infinite(tensor: Tensor) -> int:
    """How many values are NaN or infinite."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.dtype in _ALWAYS_FINITE:
        return 0
    # Not every float of eight bits has functions of its own.
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    # The least and the largest are found in a twentieth of the time, and are NaN if a value is.
    if all(math.isfinite(each) for each in torch.aminmax(wide)):
        return 0
    return int((~torch.isfinite(wide)).sum())


def check_index(path: Path, shards: Sequence[Path], tensors: dict[str, StoredTensor]) -> None:
    """Compare the index of a model directory, if it counts, with the tensors of its shards.

    Raises:
        ModelDirError: a tensor is not where the index places it.
    """
    if is_single(shards):
        return
    index = path / INDEX_FILE
    for name, shard in _weight_map(index).items():
        if name not in tensors or tensors[name].shard != path / shard:
            raise ModelDirError(f"{index} places {name} in {shard}, which does not hold it.")
