"""Prune a module that is in memory, without a model directory, a recipe file or a bundle."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from prox24_deploy.config.options import PruneOptions
from prox24_deploy.config.recipe import Recipe, TensorSpec
from prox24_deploy.core.errors import CalibrationError, RecipeError, SparsityLostError, UsageError
from prox24_deploy.core.records import LayerRecord
from prox24_deploy.core.types import Progress, silent
from prox24_deploy.model.batch import Batch
from prox24_deploy.model.blocks import find_blocks
from prox24_deploy.model.checkpoint import BlockStore
from prox24_deploy.model.layers import is_layer
from prox24_deploy.model.notes import FUSED_EXPERTS, expert_weights
from prox24_deploy.pruning.prune import PrunedState, prune_model
from prox24_deploy.pruning.selection import left_dense
from prox24_deploy.sparsity.pattern import first_violation

MASK = "attention_mask"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedModule:
    """What was done to a module.

    Attributes:
        layers: a record of each layer of its blocks, of each tensor of theirs with several experts,
            which stays dense, and of the prunable layers outside.
        axes: name of each pruned parameter to the axis of its groups.
    """

    layers: tuple[LayerRecord, ...]
    axes: Mapping[str, int]


def prune_module(
    module: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    blocks: str,
    layers: Sequence[str] = ("*",),
    held_out: Iterable[Mapping[str, Tensor]] = (),
    options: PruneOptions | None = None,
    progress: Progress = silent,
) -> PrunedModule:
    """Make the layers in the blocks of a module 2:4-sparse, in place.

    As for a model directory, blocks are solved in order, on what those before them hand on.

    Args:
        module: float32, on any one device; it runs each of `blocks` once and in order in a forward
            pass. An error part of the way leaves it half pruned.
        batches: keyword inputs of `module.forward` to prune on. An `attention_mask` (batch,
            sequence) is 0 on padding; without one nothing is padding.
        blocks: dotted path of the ModuleList of the repeated blocks, as "model.layers".
        layers: globs over the paths of linear layers and convolutions inside a block.
        held_out: batches on which the error of each layer is measured beside that on `batches`.
        options: method, preset and target. A budget needs the loss of a task and is refused.
        progress: called with (label, done, total).

    Raises:
        UsageError: a parameter is not float32, or the options name a budget.
        CalibrationError: there is no batch.
        RecipeError: there are no such blocks or layers, or none can be pruned.
        ModelDirError: activations or weights of a layer are NaN or infinite.
    """
    options = options or PruneOptions()
    _require_fit(module, options)
    calibration, withheld = _batches(batches), tuple(map(_batch, held_out))
    recipe = _recipe(module, blocks, layers)
    with _evaluating(module):
        state = prune_model(
            module,
            recipe,
            calibration,
            withheld or calibration[:1],
            options,
            stored_dtype=lambda _: torch.float32,
            store=_Forgetful(Path()),
            progress=progress,
            dense=left_dense(recipe, module, options),
        )
    _require_pruned(module, state)
    layers_done = state.layers if withheld else _without_held_out(state.layers)
    return PrunedModule(layers=(*layers_done, *_fused_experts(module, recipe)), axes=state.axes)


def _fused_experts(module: nn.Module, recipe: Recipe) -> Iterator[LayerRecord]:
    """A record of each tensor with several experts, whose shape is that of all their rows."""
    for index, block in enumerate(find_blocks(module, recipe)):
        for name in expert_weights(block):
            weight = block.get_parameter(name)
            shape = (weight.numel() // weight.shape[-1], weight.shape[-1])
            yield LayerRecord.skipped(f"{recipe.blocks}.{index}.{name}", shape, FUSED_EXPERTS)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _require_blocks(module: nn.Module, recipe: Recipe) -> None:
    bare = [i for i, block in enumerate(find_blocks(module, recipe)) if is_layer(block)]
    if bare:
        raise RecipeError(
            f"Block {recipe.blocks}.{bare[0]} is a layer itself, expected a module that holds "
            "layers; wrap each in nn.Sequential."
        )


def _require_fit(module: nn.Module, options: PruneOptions) -> None:
    other = next((n for n, p in module.named_parameters() if p.dtype != torch.float32), None)
    if other is not None:
        raise UsageError(
            f"Parameter {other} is {module.get_parameter(other).dtype}, expected torch.float32; "
            "call module.float() before and convert it back afterwards."
        )
    if options.method == "none":
        raise UsageError("Method none prunes nothing; name another, or leave the module as it is.")
    if options.has_budget:
        raise UsageError(
            "max_loss and max_layers need the loss of a task, which a module alone has not; leave "
            "them out or prune a model directory."
        )


def _batches(batches: Iterable[Mapping[str, Tensor]]) -> tuple[Batch, ...]:
    calibration = tuple(map(_batch, batches))
    if not calibration:
        raise CalibrationError("There is no calibration batch; pass at least one.")
    return calibration


def _without_held_out(layers: tuple[LayerRecord, ...]) -> tuple[LayerRecord, ...]:
    return tuple(replace(layer, held_out_error=None) for layer in layers)


def _batch(inputs: Mapping[str, Tensor]) -> Batch:
    first = next(iter(inputs.values()), None)
    if first is None:
        raise CalibrationError("A batch has no input; pass the keyword inputs of module.forward.")
    if MASK in inputs:
        real = _real(inputs[MASK])
    elif first.ndim == 2 and not first.is_floating_point():
        real = torch.ones(first.shape, dtype=torch.bool)
    else:
        real = torch.ones(first.shape[0], dtype=torch.bool)
    return Batch(dict(inputs), real)


def _real(mask: Tensor) -> Tensor:
    real = mask.bool().cpu()
    if mask.ndim != 2 or not bool(real.any()):
        raise CalibrationError(
            f"An attention_mask of shape {tuple(mask.shape)} cannot be used, expected (batch, "
            "sequence) with 1 where a token is and 0 on padding, and a token at least."
        )
    return real


def _recipe(module: nn.Module, blocks: str, layers: Sequence[str]) -> Recipe:
    """What the driver must know; nothing is exported, so that the tensors stand for none."""
    tensor = TensorSpec(name="hidden", dtype="float", axes=["batch", "hidden"])
    recipe = Recipe(
        family=type(module).__name__,
        model_types=[type(module).__name__],
        task="feature-extraction",
        blocks=blocks,
        targets=list(layers),
        inputs=[tensor],
        outputs=[tensor.model_copy(update={"name": "output"})],
    )
    _require_blocks(module, recipe)
    return recipe


class _Forgetful(BlockStore):
    """Keeps no solved block, for there is no later run to go on."""

    def save(self, *_: object) -> None:
        """Keep nothing."""

    def load(self, _: int) -> None:
        """Nothing."""


def _require_pruned(module: nn.Module, state: PrunedState) -> None:
    if not state.axes:
        first = state.layers[0]
        raise RecipeError(
            f"No layer of {type(module).__name__} can be pruned: {first.name} and the others are "
            f"skipped, because {first.reason}."
        )
    for name, axis in state.axes.items():
        place = first_violation(module.get_parameter(name).detach(), axis)
        if place is not None:
            raise SparsityLostError(
                f"Parameter {name} has more than two non-zeros in the group at {place} along axis "
                f"{axis}; this is a fault of this tool."
            )
