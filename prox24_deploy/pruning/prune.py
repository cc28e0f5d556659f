"""Prune a model block by block, with inputs from the blocks that are already pruned."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn

from prox24_deploy.config.options import PruneOptions
from prox24_deploy.config.recipe import SENTENCE_MODULES, Recipe
from prox24_deploy.core.records import ChannelOrder, LayerRecord
from prox24_deploy.core.types import Progress
from prox24_deploy.model.batch import Batch
from prox24_deploy.model.blocks import find_blocks
from prox24_deploy.model.checkpoint import BlockStore, SaveBlock, saving
from prox24_deploy.model.layers import is_layer, layer_at, reduction_axis
from prox24_deploy.pruning.activations import IN_MEMORY, BlockStep, Resources, block_steps
from prox24_deploy.pruning.block import BlockSolver, apply_weights, skip
from prox24_deploy.pruning.ranks import Ranks, during, require_batch_each, watched
from prox24_deploy.pruning.reconstruct import require_batches
from prox24_deploy.pruning.selection import require_matches
from prox24_deploy.pruning.sensitivity import require_two


@dataclass(frozen=True, slots=True)
class PrunedState:
    """What pruning a model gave.

    Attributes:
        weights: new values by parameter name, in layout and dtype of the checkpoint; read from the
            files of solved blocks when they are asked for.
        axes: the axis of the groups in each of them.
        layers: what was done to each layer.
        moved: new values of all other tensors that took part in an order of channels, alike.
        orders: a record of each layer that reads channels whose order is free.
    """

    weights: Mapping[str, Tensor]
    axes: dict[str, int]
    layers: tuple[LayerRecord, ...]
    moved: Mapping[str, Tensor] = field(default_factory=dict)
    orders: tuple[ChannelOrder, ...] = ()


@torch.no_grad()
def prune_model(
    model: nn.Module,
    recipe: Recipe,
    calibration: tuple[Batch, ...],
    held_out: tuple[Batch, ...],
    options: PruneOptions,
    *,
    stored_dtype: Callable[[str], torch.dtype],
    store: BlockStore,
    progress: Progress,
    dense: Mapping[str, str] = MappingProxyType({}),
    resources: Resources = IN_MEMORY,
) -> PrunedState:
    """Prune all target layers of `model` in place.

    Those that share an input are solved together, in the order of a forward pass, on what layers
    before them, already pruned and rounded to the checkpoint's dtype, feed them.

    Args:
        model: float32, evaluation mode; its blocks end up pruned.
        recipe: says where the blocks and targets are.
        calibration: batches to prune on.
        held_out: batches to measure errors on, never to choose by.
        options: method, preset and target.
        stored_dtype: parameter name to the dtype in which the checkpoint stores it.
        store: solved blocks of an interrupted run of the same inputs and options.
        progress: called with (label, done, total) after each block.
        dense: full path of each target to leave dense, with the reason.
        resources: where things are kept, and the processes that share the run.

    Raises:
        ModelDirError: activations or weights of a layer are NaN or infinite.
        RecipeError: blocks or targets do not exist in this model.
        CalibrationError: there are fewer calibration batches than processes.
        RankError: another process of the run is gone.
    """
    _require_usable(model, recipe, calibration, options, resources.ranks)
    count, steps = _steps(model, recipe, (calibration, held_out), resources)
    solver = BlockSolver(options, stored_dtype, dense, resources.ranks)
    weights = store.weights()
    records: list[LayerRecord] = []
    with saving(store) as save:
        for number, step in enumerate(steps):
            progress("prune", number, count)
            solved, made = _block_done(number, step, solver, store, save)
            weights.add(number, step.twin.prefix, solved)
            records += made
    progress("prune", count, count)
    records += layers_outside(model, recipe, {record.name for record in records})
    return PrunedState(weights, _axes(model, weights), tuple(records))


def _steps(
    model: nn.Module, recipe: Recipe, texts: Sequence[tuple[Batch, ...]], resources: Resources
) -> tuple[int, Iterator[BlockStep]]:
    """How many blocks there are, and the step of each, made when it is asked for."""
    parts = [(part.blocks, len(find_blocks(model, part))) for part in recipe.parts]
    names = [f"{blocks}.{index}" for blocks, count in parts for index in range(count)]
    steps = block_steps(model, recipe, texts, resources)
    return len(names), watched(steps, names, resources.ranks)


def _block_done(
    number: int, step: BlockStep, solver: BlockSolver, store: BlockStore, save: SaveBlock
) -> tuple[dict[str, Tensor], tuple[LayerRecord, ...]]:
    """Prune a block in place; its weights and records, kept by an earlier run or made and kept."""
    with during(step.twin.prefix, solver.ranks):
        done = solver.ranks.told(store.load(number))
        if done is None:
            done = solver.solve(step)
            if solver.ranks.writes:
                save(number, *done)
    apply_weights(step.twin.pruned, done[0])
    return done


def _axes(model: nn.Module, weights: Iterable[str]) -> dict[str, int]:
    """The axis of the groups in each weight."""
    layers = {name: layer_at(model, name.removesuffix(".weight")) for name in weights}
    return {name: reduction_axis(layer) for name, layer in layers.items()}


def _require_usable(
    model: nn.Module,
    recipe: Recipe,
    calibration: Sequence[Batch],
    options: PruneOptions,
    ranks: Ranks,
) -> None:
    require_batch_each(ranks.count, len(calibration))
    require_enough(options, len(calibration))
    require_matches(recipe, model)


def require_enough(options: PruneOptions, batches: int) -> None:
    """Refuse fewer batches of calibration text than the options take.

    Raises:
        CalibrationError: there is only one.
    """
    if options.reconstructs:
        require_batches(batches)
    if options.has_budget:
        require_two(batches)


def layers_outside(model: nn.Module, recipe: Recipe, known: set[str]) -> list[LayerRecord]:
    """Every layer of a kind that could be pruned but was not a target, with the reason."""
    embeddings = {
        id(m.weight): name for name, m in model.named_modules() if isinstance(m, nn.Embedding)
    }
    skipped = []
    for name, layer in model.named_modules():
        if not is_layer(layer) or name in known:
            continue
        tied = embeddings.get(id(layer.weight))
        if name.startswith(f"{SENTENCE_MODULES}."):
            reason = "part of the sentence embedding, which runs once a text and stays dense"
        elif tied:
            reason = f"shares its weight with {tied}"
        else:
            reason = f"not a target of recipe {recipe.family}"
        skipped.append(skip(name, layer, reason))
    return skipped
