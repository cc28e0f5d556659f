"""Masks that were made elsewhere: read from a file or a model directory, and held to the model."""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prox24_deploy.config.options import PruneOptions
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.documents import reason_of
from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.snapshot import Snapshot, take_snapshot
from prox24_deploy.core.tensor_names import names_like
from prox24_deploy.model.checkpoint import stored_names
from prox24_deploy.model.directory import ModelDir
from prox24_deploy.model.layers import Layer, layer_at, obstacle, reduction_axis
from prox24_deploy.model.shards import find_shards
from prox24_deploy.pruning.selection import left_dense, target_paths
from prox24_deploy.sparsity.pattern import first_violation, mask_24

log = logging.getLogger(__name__)

# What tools that make masks call that of LAYER.weight, besides that name.
_SPELLINGS = ("{0}.weight", "{0}.weight_mask", "{0}.mask", "{0}")
# Weights of two models of one origin have a larger cosine than this, far trained ones too; those of
# strangers, or of channels in another order, have none.
_LEAST_AKIN = 0.1
# A buffer of a layer, on its device, and no part of what is saved of it.
_BUFFER = "fixed_mask"


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskFiles:
    """Files with one tensor for each layer to prune: True, or not zero, is kept."""

    path: Path
    snapshot: Snapshot

    def fingerprint(self) -> list[str]:
        """Hash of each file; where they lie and what they are called is not said."""
        return [state.sha256 for state in self.snapshot.files.values()]

    def require_unchanged(self) -> None:
        """Refuse files that were written since.

        Raises:
            UsageError: names the first of them.
        """
        if (name := self.snapshot.changed()) is not None:
            raise UsageError(
                f"{self.snapshot.root / name} was changed while the model was pruned by its masks, "
                "and nothing made of it is kept; run the same command again."
            )


def open_masks(options: PruneOptions) -> MaskFiles | None:
    """Hash the files with the masks that are asked for; None where there are none.

    Raises:
        UsageError: there is no such file, or a method is asked for that chooses masks itself.
        ModelDirError: a directory holds no weights.
    """
    path = options.mask
    if path is None:
        return None
    if options.method != "prox":
        raise UsageError(
            f"--mask {path} says which weights are kept, so that --method {options.method} has no "
            "effect; leave one of them out."
        )
    if path.is_dir():
        return MaskFiles(path=path, snapshot=take_snapshot(path, find_shards))
    if not path.is_file():
        raise UsageError(
            f"Mask {path} does not exist; pass a safetensors file with a tensor of booleans for "
            "each layer, or a model directory that is 2:4."
        )
    return MaskFiles(path=path, snapshot=take_snapshot(path.parent, lambda _: (path,)))


@torch.no_grad()
def read_masks(
    files: MaskFiles, model: nn.Module, directory: ModelDir, recipe: Recipe, options: PruneOptions
) -> dict[str, Tensor]:
    """The mask of every layer that is to be pruned, in the layout of its weight, by path.

    A group of four in which fewer than two are kept keeps as many more of the largest weights, for
    a 2:4 kernel multiplies two anyway. `model` may be on the meta device, where only what the
    files say is checked.

    Raises:
        UsageError: a layer has no mask, one of another shape, with NaN or that keeps nothing, or a
            group keeps more than two.
    """
    dense = left_dense(recipe, model, options)
    where = _names_of(files)
    found, strangers, used = {}, [], set()
    for path in target_paths(recipe, model):
        layer = layer_at(model, path)
        if path in dense or obstacle(layer):
            continue
        if layer.weight.is_meta and not stored_names(directory, f"{path}.weight"):
            # Known under another name, which the values of the model will tell.
            continue
        name = _name_of(path, directory, where, files.path)
        given = _tensor(files.path, where[name], name, path, layer)
        used.add(name)
        found[path] = _mask(given != 0, layer)
        if not layer.weight.is_meta and not is_akin(given, layer.weight):
            strangers.append(path)
    _warn(files.path, strangers, _idle(where, used, directory) if _is_structure(model) else [])
    return found


def _is_structure(model: nn.Module) -> bool:
    return next(model.parameters()).is_meta


def _warn(path: Path, strangers: Sequence[str], idle: Sequence[str]) -> None:
    """Say what makes one doubt that these are masks of this model."""
    if strangers:
        log.warning(
            "Mask %s has weights for %d layers, first for %s, that have nothing to do with those "
            "of the model: it is of another model, or of one whose channels were put into another "
            "order, as prune does without --permute none.", path, len(strangers), strangers[0],
        )  # fmt: skip
    if idle:
        log.warning(
            "Mask %s has %d tensors that no layer to prune has a use for, first %s.",
            path, len(idle), idle[0],
        )  # fmt: skip


def _idle(where: Mapping[str, Path], used: Collection[str], directory: ModelDir) -> list[str]:
    """Masks of no layer that is pruned; what a model has besides layers is none."""
    found = []
    for name in sorted(where.keys() - used):
        with safe_open(where[name], framework="pt") as handle:
            is_mask = handle.get_slice(name).get_dtype() == "BOOL"
        if is_mask or not names_like(name, directory.tensors):
            found.append(name)
    return found


def is_akin(given: Tensor, weight: Tensor) -> bool:
    """Whether weights of a 2:4 model may be those of the model; of booleans nothing tells."""
    values = given.float()
    kept = values[values != 0]
    if not len(kept) or bool((kept == kept[0]).all()):
        return True
    own = weight.detach().cpu().float()[values != 0]
    return bool(torch.dot(kept, own) >= _LEAST_AKIN * kept.norm() * own.norm())


def fix_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Let layers carry their masks, wherever they are copied or moved."""
    for path, mask in masks.items():
        layer = layer_at(model, path)
        layer.register_buffer(_BUFFER, mask.to(layer.weight.device), persistent=False)


def fixed_mask(layer: Layer) -> Tensor | None:
    """The mask that a layer carries, in the layout of its weight."""
    mask: Tensor | None = getattr(layer, _BUFFER, None)
    return mask


def _names_of(files: MaskFiles) -> dict[str, Path]:
    """Every tensor and the file that has it."""
    found = {}
    for file in (files.snapshot.root / name for name in files.snapshot.files):
        try:
            with safe_open(file, framework="pt") as handle:
                found.update(dict.fromkeys(handle.keys(), file))
        except SafetensorError as error:
            raise UsageError(
                f"Mask {file} is not a safetensors file ({reason_of(error)}); pass one with a "
                "tensor of booleans for each layer, or a model directory that is 2:4."
            ) from error
    return found


def _name_of(layer: str, directory: ModelDir, names: Iterable[str], path: Path) -> str:
    """Which tensor of the files is the mask of a layer of the model."""
    known, parameter = [*names], f"{layer}.weight"
    stored = [name.removesuffix(".weight") for name in stored_names(directory, parameter)]
    candidates = [form.format(each) for form in _SPELLINGS for each in (layer, *stored)]
    exact = next((name for name in candidates if name in known), None)
    alike = [exact] if exact else []
    for form in _SPELLINGS:
        alike = alike or names_like(form.format(layer), known)
    if len(alike) != 1:
        raise UsageError(
            f"Mask {path} has {len(alike) or 'no'} tensors for {parameter}, expected one; add it, "
            f"or leave the layer dense with --exclude {layer}."
        )
    return alike[0]


def _tensor(path: Path, file: Path, name: str, layer_path: str, layer: Layer) -> Tensor:
    """What a file has for a layer, in the layout of its weight."""
    with safe_open(file, framework="pt") as handle:
        given: Tensor = handle.get_tensor(name)
    # Not every float of eight bits can be compared.
    given = given.float() if given.dtype.itemsize == 1 and given.is_floating_point() else given
    if given.shape != layer.weight.shape:
        raise UsageError(
            f"Mask {name} of {path} has the shape {tuple(given.shape)}, expected "
            f"{tuple(layer.weight.shape)} as the weight of layer {layer_path}; pass the masks of "
            "this model."
        )
    if bool(given.isnan().any()):
        raise UsageError(
            f"Mask {name} of {path} holds NaN, which says neither kept nor not; make it anew."
        )
    if not bool((given != 0).any()):
        raise UsageError(
            f"Mask {name} of {path} keeps no weight, which says nothing; make it anew, or leave "
            f"the layer dense with --exclude {layer_path}."
        )
    axis = reduction_axis(layer)
    if (bad := first_violation(given != 0, axis)) is not None:
        raise UsageError(
            f"Mask {name} of {path} keeps more than two of the four weights from {bad} along axis "
            f"{axis}; make it 2:4, or leave the layer dense with --exclude {layer_path}."
        )
    return given


def _mask(kept: Tensor, layer: Layer) -> Tensor:
    """As many kept in each group as a 2:4 kernel multiplies, the largest besides those given."""
    if layer.weight.is_meta:
        return kept
    size = layer.weight.detach().abs().cpu()
    return mask_24(size.masked_fill(kept, torch.inf), reduction_axis(layer))
