"""Write the pruned model directory and keep solved blocks across interruptions."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prox24_deploy.config.recipe import RECIPE_FILE, SENTENCE_MODULES, Recipe
from prox24_deploy.core.atomic import copy_file, make_folder, write_atomic, writing
from prox24_deploy.core.errors import ModelDirError, RecipeError, SparsityLostError
from prox24_deploy.core.records import LayerRecord
from prox24_deploy.core.snapshot import sha256_of
from prox24_deploy.core.tensor_names import names_like
from prox24_deploy.model.directory import CARD_FILE, ModelDir, companion_files
from prox24_deploy.model.layers import is_layer
from prox24_deploy.model.offload import read
from prox24_deploy.model.shards import INDEX_FILE, is_single
from prox24_deploy.sparsity.declaration import SPARSE_KEY
from prox24_deploy.sparsity.pattern import first_violation

_RECORDS = TypeAdapter(tuple[LayerRecord, ...])
# Takes the number of a block, its weights by layer path, and its records.
SaveBlock = Callable[[int, Mapping[str, Tensor], tuple[LayerRecord, ...]], None]


def _unguarded() -> None:
    """Nothing can be wrong with what is saved."""


@dataclass(frozen=True, slots=True)
class BlockStore:
    """Solved blocks in a folder, so that a killed run does not solve them again.

    `guard` is called before a block is saved and raises if what it was made from has changed.
    """

    folder: Path
    guard: Callable[[], None] = _unguarded

    def load(self, index: int) -> tuple[dict[str, Tensor], tuple[LayerRecord, ...]] | None:
        """Weights by layer path and records of one block, or None if it is not there."""
        path = self._path(index)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as handle:
                weights = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
                records = _RECORDS.validate_json(handle.metadata()["records"])
        except (SafetensorError, KeyError, TypeError, ValueError):
            # Not written by this version, or damaged: solving it again loses only time.
            return None
        return weights, records

    def save(
        self, index: int, weights: Mapping[str, Tensor], records: tuple[LayerRecord, ...]
    ) -> None:
        """Write one block atomically."""
        self.guard()
        make_folder(self.folder)
        metadata = {"records": _RECORDS.dump_json(records).decode()}
        write_tensors(self._path(index), dict(weights), metadata)

    def weights(self) -> "SolvedWeights":
        """Room for the weights of blocks as they are solved."""
        return SolvedWeights(self._path)

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:04d}.safetensors"


@contextmanager
def saving(store: BlockStore) -> Iterator[SaveBlock]:
    """Save each block while the next is solved; gives what takes a block, as `BlockStore.save`.

    What goes wrong with a block is raised when the next is given, or at the end. Without an end, a
    block that was given is saved all the same.
    """
    with ThreadPoolExecutor(1) as writer:
        begun: list[Future[None]] = []

        def save(
            index: int, weights: Mapping[str, Tensor], records: tuple[LayerRecord, ...]
        ) -> None:
            _finish(begun)
            begun.append(writer.submit(store.save, index, weights, records))

        yield save
        _finish(begun)


def _finish(begun: "list[Future[None]]") -> None:
    while begun:
        begun.pop().result()


class SolvedWeights(Mapping[str, Tensor]):
    """New weights by parameter name, each read from the file of its block when it is asked for."""

    def __init__(self, path_of: Callable[[int], Path]) -> None:
        self._path_of = path_of
        self._places: dict[str, tuple[Path, str]] = {}

    def add(self, index: int, prefix: str, weights: Mapping[str, Tensor]) -> None:
        """Enter the saved weights of one block, given by layer path in it."""
        for name in weights:
            self._places[f"{prefix}.{name}.weight"] = (self._path_of(index), name)

    def __getitem__(self, name: str) -> Tensor:
        """One weight."""
        path, stored = self._places[name]
        with safe_open(path, framework="pt") as handle:
            weight: Tensor = handle.get_tensor(stored)
        return weight

    def __contains__(self, name: object) -> bool:
        """Whether there is such a weight; nothing is read."""
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        """Names in the order of the blocks."""
        return iter(self._places)

    def __len__(self) -> int:
        """How many weights there are."""
        return len(self._places)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write one safetensors file under a temporary name and rename it.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path), disk_errors(path):
        try:
            temporary.touch()
            # The writer makes files that nobody else may read.
            mode = temporary.stat().st_mode
            save_file(tensors, temporary, metadata=metadata)
            temporary.chmod(mode)
            with temporary.open("r+b") as handle:
                _sort_metadata(handle)
                os.fsync(handle.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise as an OSError of a file what the writer of safetensors reports as a kind of its own."""
    try:
        yield
    except SafetensorError as error:
        # The number is in the text alone.
        raise OSError(_io_error_number(error), str(error), str(path)) from error


def _sort_metadata(file: BinaryIO) -> None:
    """Rewrite the header with sorted metadata: the writer leaves it in the order of a random hash.

    Same entries, so same length and untouched offsets; the padding of spaces stays.
    """
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) > length:
        raise RuntimeError(f"safetensors header grew from {length} to {len(text)} bytes")
    file.seek(8)
    file.write(text.ljust(length))


def checkpoint_name(directory: ModelDir, parameter: str) -> str:
    """Map a parameter of the built model to its tensor in the checkpoint.

    A model opened for one task may carry a prefix less than the checkpoint it came from
    (`encoder.…` against `bert.encoder.…`); other names must be known to `directory.renamed`.

    Raises:
        RecipeError: no tensor, or more than one, can be meant.
    """
    found = stored_names(directory, parameter)
    if len(found) != 1:
        raise RecipeError(
            f"Weight {parameter} of the built model matches {len(found)} tensors of "
            f"{directory.path}, expected one; its weights cannot be written back."
        )
    return found[0]


def renamed_tensors(directory: ModelDir, model: nn.Module, recipe: Recipe) -> dict[str, str]:
    """Find the weights of layers that the checkpoint stores under other names.

    Some model classes keep the names of older checkpoints on disk and rename them when they load.
    The recipe says what layers of experts are called there; others are found by their values.

    Args:
        directory: the checkpoint.
        model: as opened from it in float32, not yet changed; on the meta device nothing is found
            by values.
        recipe: of its family.

    Returns:
        Parameter to tensor, for those whose names tell nothing and whose values tell one tensor.
    """
    missing = {
        f"{name}.weight": layer
        for name, layer in model.named_modules()
        if is_layer(layer)
        # Modules behind the model have files of their own.
        and not name.startswith(f"{SENTENCE_MODULES}.")
        and not stored_names(directory, f"{name}.weight")
    }
    told = {name: _as_stored(directory, name, recipe) for name in missing}
    known = {name: tensors[0] for name, tensors in told.items() if len(tensors) == 1}
    missing = {
        name: layer
        for name, layer in missing.items()
        if name not in known and not layer.weight.is_meta
    }
    return known | _by_values(directory, missing)


def _as_stored(directory: ModelDir, parameter: str, recipe: Recipe) -> list[str]:
    """The tensors that a parameter of an expert can be, by what the recipe says."""
    if recipe.experts is None:
        return []
    return names_like(recipe.experts.as_stored(parameter), directory.tensors)


def _by_values(directory: ModelDir, missing: Mapping[str, nn.Module]) -> dict[str, str]:
    """The tensors that have the values of the weights of some layers, by parameter."""
    if not missing:
        return {}
    stored: dict[str, list[str]] = {}
    for name, tensor in directory.tensors.items():
        with safe_open(tensor.shard, framework="pt") as handle:
            stored.setdefault(_digest(handle.get_tensor(name)), []).append(name)
    found = {
        parameter: stored.get(_digest(read(layer, "weight")), [])
        for parameter, layer in missing.items()
    }
    return {parameter: names[0] for parameter, names in found.items() if len(names) == 1}


def _digest(tensor: Tensor) -> str:
    values = tensor.detach().float().cpu().contiguous()
    content = hashlib.sha256(repr(tuple(values.shape)).encode())
    content.update(values.numpy().tobytes())
    return content.hexdigest()


def stored_names(directory: ModelDir, parameter: str) -> list[str]:
    """Every tensor of the checkpoint that a parameter of the built model can be meant by."""
    if parameter in directory.renamed:
        return [directory.renamed[parameter]]
    return names_like(parameter, directory.tensors)


def stored_dtype(directory: ModelDir, parameter: str) -> torch.dtype:
    """The dtype in which the checkpoint stores a parameter of the built model."""
    return directory.tensors[checkpoint_name(directory, parameter)].dtype


def declared_sparse(directory: ModelDir) -> frozenset[str]:
    """The tensors that the weight files of a directory declare to be 2:4.

    Raises:
        ModelDirError: a declaration is no table of names.
    """
    names: set[str] = set()
    for shard in directory.shards:
        with safe_open(shard, framework="pt") as handle:
            text = (handle.metadata() or {}).get(SPARSE_KEY, "{}")
        try:
            names |= dict(json.loads(text)).keys()
        except (TypeError, ValueError) as error:
            raise ModelDirError(
                f"{shard} declares its 2:4 tensors by {text[:60]!r}, expected a table of names; "
                "prune the model again."
            ) from error
    return frozenset(names)


def write_pruned(
    directory: ModelDir,
    weights: Mapping[str, Tensor],
    out: Path,
    *,
    axes: Mapping[str, int] = MappingProxyType({}),
    dense: Mapping[str, Tensor] = MappingProxyType({}),
    added: Mapping[str, Tensor] = MappingProxyType({}),
) -> str:
    """Copy a model directory with some weights replaced by 2:4 ones, and prove it.

    Every other tensor, the sharding, the configuration and the tokenizer stay as they are. The
    header of each weight file lists its 2:4 tensors and their axes. The card and a recipe are left
    out, for those of the dense model are not true of the pruned one.

    Args:
        directory: the dense model.
        weights: parameter name in the built model to its new value, in the stored dtype.
        out: a folder that does not exist yet.
        axes: parameter name to the axis of its groups, where that is not 1.
        dense: as `weights`, of parameters that are not 2:4.
        added: tensors that the checkpoint does not have, for its last weight file.

    Returns:
        sha256 over all weight files.

    Raises:
        SparsityLostError: a weight read back from disk is not 2:4.
    """
    replaced = {
        checkpoint_name(directory, name): _Replacement(weights, name, axes.get(name, 1))
        for name in weights
    }
    replaced |= {checkpoint_name(directory, name): _Replacement(dense, name) for name in dense}
    with writing(out):
        out.mkdir(parents=True)
    _copy_companions(directory, out, added)
    # Each file is hashed while the next is written.
    with ThreadPoolExecutor(1) as hasher:
        hashes: list[Future[str]] = []
        for shard in directory.shards:
            more = added if shard == directory.shards[-1] else {}
            _rewrite_shard(shard, replaced, out / shard.name, more)
            hashes.append(hasher.submit(sha256_of, out / shard.name))
        return hashlib.sha256(b"".join(bytes.fromhex(each.result()) for each in hashes)).hexdigest()


def _copy_companions(directory: ModelDir, out: Path, added: Mapping[str, Tensor]) -> None:
    late = {directory.path / CARD_FILE, directory.path / RECIPE_FILE}
    for file in (file for file in companion_files(directory.path) if file not in late):
        target = out / file.relative_to(directory.path)
        make_folder(target.parent)
        copy_file(file, target)
    if not is_single(directory.shards):
        _write_index(directory, out, added)


def _write_index(directory: ModelDir, out: Path, added: Mapping[str, Tensor]) -> None:
    """Copy the index of the shards, or make it anew where it is not that of all their tensors."""
    index = json.loads((directory.path / INDEX_FILE).read_bytes())
    held = directory.tensors.values()
    size = sum(tensor.numel * tensor.dtype.itemsize for tensor in held)
    size += sum(tensor.nbytes for tensor in added.values())
    places = {name: tensor.shard.name for name, tensor in directory.tensors.items()}
    places |= dict.fromkeys(added, directory.shards[-1].name)
    if index["weight_map"] == places and index["metadata"].get("total_size", size) == size:
        copy_file(directory.path / INDEX_FILE, out / INDEX_FILE)
        return
    index["metadata"]["total_size"], index["weight_map"] = size, places
    write_atomic(out / INDEX_FILE, f"{json.dumps(index, indent=2)}\n".encode())


@dataclass(frozen=True, slots=True)
class AsStored(Mapping[str, Tensor]):
    """Tensors of a model, each in the dtype of the checkpoint when it is asked for."""

    tensors: Mapping[str, Tensor]
    directory: ModelDir

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name].to(stored_dtype(self.directory, name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@dataclass(frozen=True, slots=True)
class _Replacement:
    """A new value, read when it is needed, and the axis of its groups if it is 2:4."""

    values: Mapping[str, Tensor]
    name: str
    axis: int | None = None

    def value(self) -> Tensor:
        return self.values[self.name]


def _rewrite_shard(
    shard: Path,
    replaced: Mapping[str, _Replacement],
    target: Path,
    added: Mapping[str, Tensor],
) -> None:
    """Write one weight file with the new values that it has of those in `replaced`, and more."""
    with safe_open(shard, framework="pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        metadata = dict(handle.metadata() or {"format": "pt"})
    for name in sorted(tensors.keys() & replaced.keys()):
        old, new = tensors[name], replaced[name].value()
        if old.shape != new.shape or old.dtype != new.dtype:
            raise ModelDirError(
                f"Tensor {name} of {shard} is {old.dtype} {tuple(old.shape)}, the pruned one "
                f"{new.dtype} {tuple(new.shape)}; the checkpoint and its config.json disagree."
            )
        tensors[name] = new.contiguous().cpu()
    known = {name: replaced[name].axis for name in sorted(tensors.keys() & replaced.keys())}
    pruned = {name: axis for name, axis in known.items() if axis is not None}
    if pruned:
        metadata[SPARSE_KEY] = json.dumps(pruned)
    tensors |= {name: tensor.contiguous().cpu() for name, tensor in added.items()}
    write_tensors(target, tensors, metadata)
    with safe_open(target, framework="pt") as handle:
        for name, axis in pruned.items():
            if (bad := first_violation(handle.get_tensor(name), axis)) is not None:
                raise SparsityLostError(
                    f"Weight {name} in {target} is not 2:4 along axis {axis}: the group at {bad} "
                    "has more than two non-zeros; this is a fault of the pruning stage, report it."
                )


def _io_error_number(error: SafetensorError) -> int:
    """The errno in a message such as "I/O error: No space left on device (os error 28)"."""
    _, found, rest = str(error).partition("os error ")
    digits = rest.partition(")")[0]
    return int(digits) if found and digits.isdigit() else 5
