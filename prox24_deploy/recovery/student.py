"""What of a pruned model is trained: kept weights of its 2:4 layers, norms, biases, embeddings.

Every zero of a 2:4 layer stays a zero, also where a group has more than two; so the pattern that
was proven before training holds after it, whatever the optimiser does.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from prox24_deploy.config.recipe import SENTENCE_MODULES, Recipe
from prox24_deploy.core.errors import SparsityLostError, UsageError
from prox24_deploy.model.checkpoint import declared_sparse, stored_names
from prox24_deploy.model.directory import ModelDir, structure_of
from prox24_deploy.model.layers import layer_at, obstacle, reduction_axis
from prox24_deploy.model.offload import free_on
from prox24_deploy.pruning.selection import sharing, target_paths
from prox24_deploy.sparsity.pattern import first_violation

# Of the root mean square of a norm's weights, what its scale is at most.
_NORM_SHARE = 1 / 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """One parameter that is free to change.

    Attributes:
        names: under which the model has it; one that is tied has several.
        parameter: float32.
        zeros: bool of its shape, where it stays 0; None for what is not 2:4.
        axis: of its groups of four; None likewise.
        dtype: in which the checkpoint stores it.
        scale: what a relative learning rate is multiplied by, see `_scale` and `_vector_scale`.
    """

    names: tuple[str, ...]
    parameter: Tensor
    zeros: Tensor | None
    axis: int | None
    dtype: torch.dtype
    scale: float

    def clear(self, tensor: Tensor) -> None:
        """Put 0 where the mask has none, in place."""
        if self.zeros is not None:
            tensor.masked_fill_(self.zeros, 0.0)

    @property
    def is_vector(self) -> bool:
        """Whether it is a norm or a bias."""
        return self.zeros is None and self.parameter.ndim == 1

    @property
    def is_embedding(self) -> bool:
        """Whether it has a row for each token, position or type of them."""
        return self.zeros is None and self.parameter.ndim > 1

    @property
    def free(self) -> int:
        """Values that may change."""
        fixed = 0 if self.zeros is None else int(self.zeros.sum())
        return self.parameter.numel() - fixed


@torch.no_grad()
def find_trained(
    model: nn.Module, directory: ModelDir, recipe: Recipe, *, embeddings: bool = False
) -> tuple[Trained, ...]:
    """The parameters to train of a pruned model, the 2:4 layers first.

    Args:
        model: as loaded from `directory`, float32.
        directory: with the names that it gives tensors, see `renamed_tensors`.
        recipe: says which layers are targets.
        embeddings: whether embedding tables and the output layer are trained, too.

    Raises:
        SparsityLostError: a layer that should be 2:4 is not.
        UsageError: the model has no 2:4 layer, or no embedding to train.
    """
    names = _names(model)
    layers = []
    for path in _sparse_layers(model, directory, recipe):
        layer = layer_at(model, path)
        weight = layer.weight
        layers.append(
            Trained(
                names=names[id(weight)],
                parameter=weight,
                zeros=weight == 0,
                axis=reduction_axis(layer),
                dtype=_dtype(directory, names[id(weight)]),
                scale=_scale(weight),
            )
        )
    scale = statistics.median(each.scale for each in layers)
    vectors = [
        Trained(
            names=known,
            parameter=parameter,
            zeros=None,
            axis=None,
            dtype=_dtype(directory, known),
            scale=_vector_scale(parameter, known, scale),
        )
        for parameter in model.parameters()
        if parameter.ndim == 1 and (known := _stored(directory, names[id(parameter)]))
    ]
    return (*layers, *vectors, *(_tables(model, directory, names, layers) if embeddings else ()))


def _scale(weight: Tensor) -> float:
    """Root mean square of what is not 0; of a weight that is all zero, nothing moves."""
    return float(weight[weight != 0].square().mean().sqrt()) if weight.any() else 0.0


def _vector_scale(vector: Tensor, names: Sequence[str], usual: float) -> float:
    """The usual scale of the layers; less for a norm whose weights are so small that it is large.

    A weight of a norm moves a whole column of the matrices behind it at once, so that it must move
    by far less of what it is than a weight of these.
    """
    if all(name.endswith("bias") for name in names) or not vector.any():
        return usual
    return min(usual, _NORM_SHARE * _scale(vector))


def _tables(
    model: nn.Module,
    directory: ModelDir,
    names: Mapping[int, tuple[str, ...]],
    layers: Sequence[Trained],
) -> list[Trained]:
    """Embedding tables and the output layer, one that is tied once."""
    weights: list[Any] = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    output = getattr(model, "get_output_embeddings", lambda: None)()
    weights += [output.weight] if output is not None else []
    done = {id(each.parameter) for each in layers}
    distinct = {id(weight): weight for weight in weights if id(weight) not in done}
    found = [
        Trained(
            names=known,
            parameter=weight,
            zeros=None,
            axis=None,
            dtype=_dtype(directory, known),
            scale=_scale(weight),
        )
        for key, weight in distinct.items()
        if (known := _stored(directory, names[key]))
    ]
    if not found:
        raise UsageError(
            f"{directory.path} has no embedding that --recover-embeddings could train; leave it "
            "out."
        )
    return found


def require_sparse(directory: ModelDir, recipe: Recipe) -> None:
    """Refuse a model that is not 2:4 by its files alone, before it is loaded.

    What the files call otherwise than the model is looked at once that is loaded.

    Raises:
        SparsityLostError, UsageError: as for `find_trained`.
    """
    model = structure_of(directory, recipe)
    targets = _targets(model, recipe)
    paths = _declared(targets, directory)
    if not paths and all(len(stored_names(directory, f"{p}.weight")) == 1 for p in targets):
        raise _no_layer(directory)
    for path in paths:
        names = stored_names(directory, f"{path}.weight")
        layer = layer_at(model, path)
        if len(names) == 1 and directory.tensors[names[0]].numel == layer.weight.numel():
            with safe_open(directory.tensors[names[0]].shard, framework="pt") as handle:
                _require_24(handle.get_tensor(names[0]), reduction_axis(layer), path, directory)


def _sparse_layers(model: nn.Module, directory: ModelDir, recipe: Recipe) -> list[str]:
    """Paths of the 2:4 layers, whose weights are."""
    paths = _declared(_targets(model, recipe), directory)
    if not paths:
        raise _no_layer(directory)
    for path in paths:
        layer = layer_at(model, path)
        _require_24(layer.weight, reduction_axis(layer), path, directory)
    return paths


def _targets(model: nn.Module, recipe: Recipe) -> list[str]:
    """Paths of the layers that can be 2:4."""
    shared = sharing(recipe, model)
    return [
        path
        for path in target_paths(recipe, model)
        if path not in shared and not obstacle(layer_at(model, path))
    ]


def _declared(targets: list[str], directory: ModelDir) -> list[str]:
    """Those of the targets that must be 2:4: that the files declare, else every one."""
    declared = declared_sparse(directory)
    if not declared:
        return targets
    return [path for path in targets if declared & {*stored_names(directory, f"{path}.weight")}]


def _no_layer(directory: ModelDir) -> UsageError:
    return UsageError(
        f"{directory.path} has no 2:4 layer to recover; prune the model first, without --method "
        "none."
    )


def _require_24(weight: Tensor, axis: int, path: str, directory: ModelDir) -> None:
    if (bad := first_violation(weight, axis)) is not None:
        raise SparsityLostError(
            f"Layer {path} of {directory.path} is not 2:4: the group at {bad} of its weight has "
            "more than two non-zeros; pass a model that prune made, or whose targets are all 2:4."
        )


def _names(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """All names of each parameter, by its identity."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return {key: tuple(names) for key, names in found.items()}


def _stored(directory: ModelDir, names: Sequence[str]) -> tuple[str, ...]:
    """Of the names of a parameter those that one tensor of the checkpoint can be told by.

    What modules behind the model have is in files of their own, and stays.
    """
    return tuple(
        name
        for name in names
        if not name.startswith(f"{SENTENCE_MODULES}.") and len(stored_names(directory, name)) == 1
    )


def _dtype(directory: ModelDir, names: Sequence[str]) -> torch.dtype:
    (stored, *_) = (stored_names(directory, name)[0] for name in names)
    return directory.tensors[stored].dtype


@torch.no_grad()
def values_of(
    trained: Sequence[Trained], *, stored: bool = False, near: bool = False
) -> list[Tensor]:
    """Copies of all values on the CPU, whose memory a large model leaves.

    They are float32, or `stored` as the checkpoint has them, which for values that were read from
    one, or rounded to it, is the same in less memory. If they are to be `near`, for a short time,
    they stay on the device where it has room for twice as much: to a CPU and back takes far longer.
    """
    device = trained[0].parameter.device if near and _has_room(trained) else torch.device("cpu")
    return [
        each.parameter.detach().to(device, each.dtype if stored else torch.float32, copy=True)
        for each in trained
    ]


def _has_room(trained: Sequence[Trained]) -> bool:
    """Whether all values fit twice into what a device has free, or keeps for later."""
    device = trained[0].parameter.device
    if device.type != "cuda":
        return True
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    need = 2 * sum(each.parameter.numel() * each.parameter.itemsize for each in trained)
    return free_on(device, None) + kept >= need


@torch.no_grad()
def put(trained: Sequence[Trained], values: Sequence[Tensor], *, rounded: bool = False) -> None:
    """Set all values, if asked for as the checkpoint would store them."""
    for each, value in zip(trained, values, strict=True):
        each.parameter.copy_(value.to(each.dtype) if rounded else value)
