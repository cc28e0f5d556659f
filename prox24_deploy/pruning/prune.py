"""Stage: prune every target layer, block by block, with inputs from the already pruned model."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from prox24_deploy.config.options import PruneOptions
from prox24_deploy.config.recipe import SENTENCE_MODULES, Recipe
from prox24_deploy.core.errors import CalibrationError, ModelDirError, RecipeError
from prox24_deploy.core.records import ChannelOrder, LayerRecord, PruneResult, Sensitivity
from prox24_deploy.core.types import Preset, Progress
from prox24_deploy.data.text import thin
from prox24_deploy.model.batch import Batch, Samples
from prox24_deploy.model.blocks import find_blocks, require_runs, shared_inputs
from prox24_deploy.model.checkpoint import (
    BlockStore,
    renamed_tensors,
    stored_dtype,
    stored_names,
    write_pruned,
)
from prox24_deploy.model.directory import ModelDir, load_with_rest
from prox24_deploy.model.layers import (
    Layer,
    is_layer,
    layer_at,
    matrix_shape,
    reduction_axis,
    to_matrix,
)
from prox24_deploy.model.notes import left_out
from prox24_deploy.pruning.activations import (
    Activations,
    BlockPair,
    block_steps,
    collect,
    not_run_once,
)
from prox24_deploy.pruning.doubts import doubt_about
from prox24_deploy.pruning.layer_group import solve_group
from prox24_deploy.pruning.masks import fix_masks, open_masks, read_masks
from prox24_deploy.pruning.permutation import OrderStore, Permuted, permute_channels
from prox24_deploy.pruning.reconstruct import SCHEDULES, reconstruct_block, require_batches
from prox24_deploy.pruning.second_moments import SecondMoments
from prox24_deploy.pruning.selection import (
    by_options,
    left_dense,
    prunable,
    require_matches,
    target_paths,
)
from prox24_deploy.pruning.sensitivity import SensitivityStore, measure_sensitivity, over_budget
from prox24_deploy.pruning.solvers.problem import damping_for

log = logging.getLogger(__name__)

# Held-out text for the error of each layer; the accuracy figures use all of it.
_HELD_OUT_TOKENS = 8192
# Text that tells how large the inputs of each layer are, by which their channels are ordered.
_ORDER_TOKENS = 16384


@dataclass(frozen=True, slots=True)
class PrunedState:
    """What pruning a model gave.

    Attributes:
        weights: new values by parameter name, in layout and dtype of the checkpoint.
        axes: the axis of the groups in each of them.
        layers: what was done to each layer.
        moved: new values of all other tensors that took part in an order of channels, alike.
        orders: a record of each layer that reads channels whose order is free.
    """

    weights: dict[str, Tensor]
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
) -> PrunedState:
    """Prune all target layers of `model` in place.

    Layers that share an input are solved together, in the order in which a forward pass reaches
    them; each group sees what the groups before it, already pruned, feed it. Weights are rounded
    to the checkpoint's dtype before anything downstream sees them.

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

    Raises:
        ModelDirError: activations or weights of a layer are NaN or infinite.
        RecipeError: blocks or targets do not exist in this model.
        CalibrationError: there are no calibration batches.
    """
    _require_usable(model, recipe, calibration, options)
    count = sum(len(find_blocks(model, part)) for part in recipe.parts)
    weights: dict[str, Tensor] = {}
    records: list[LayerRecord] = []
    for number, step in enumerate(block_steps(model, recipe, (calibration, held_out))):
        progress("prune", number, count)
        done = store.load(number)
        if done is None:
            done = _prune_block(step.twin, step.recipe, step.sets, options, stored_dtype, dense)
            store.save(number, *done)
        _apply(step.twin.pruned, done[0])
        weights.update({f"{step.twin.prefix}.{name}.weight": w for name, w in done[0].items()})
        records.extend(done[1])
    progress("prune", count, count)
    records.extend(_layers_outside(model, recipe, {record.name for record in records}))
    return PrunedState(weights, _axes(model, weights), tuple(records))


def _axes(model: nn.Module, weights: Iterable[str]) -> dict[str, int]:
    """The axis of the groups in each weight."""
    layers = {name: layer_at(model, name.removesuffix(".weight")) for name in weights}
    return {name: reduction_axis(layer) for name, layer in layers.items()}


def _require_usable(
    model: nn.Module, recipe: Recipe, calibration: Sequence[Batch], options: PruneOptions
) -> None:
    if not calibration:
        raise CalibrationError("There is no calibration batch; pass more text.")
    if options.reconstructs:
        require_batches(len(calibration))
    require_matches(recipe, model)


def prune_directory(
    directory: ModelDir,
    recipe: Recipe,
    calibration: Samples,
    held_out: Samples,
    options: PruneOptions,
    *,
    device: torch.device,
    solved: Path,
    out: Path,
    progress: Progress,
) -> PruneResult:
    """Prune a model directory into `out`, a folder that does not exist yet.

    Args:
        directory: the dense model.
        recipe: of its family.
        calibration: text to prune on.
        held_out: text to measure errors on.
        options: method, preset and target.
        device: where blocks run and layers are solved.
        solved: folder of solved blocks, kept across interruptions.
        out: receives weights, configuration and tokenizer.
        progress: see `prune_model`.

    Raises:
        ModelDirError: the directory was written meanwhile, or what `prune_model` raises.
    """
    began = time.perf_counter()
    model, directory, notes = _opened(directory, recipe, device, calibration.batches[:1])
    _fix_masks(model, directory, recipe, options)
    state, sensitivity = _pruned(
        model, directory, recipe, calibration, held_out, options, solved, progress
    )
    return PruneResult(
        method="mask" if options.mask else options.method,
        preset=options.preset,
        target=options.target,
        device=device.type,
        layers=state.layers,
        calibration=calibration.source,
        held_out=held_out.source,
        damping=_damping(state.layers),
        state_sha256=_written(directory, state, out),
        seconds=time.perf_counter() - began,
        reconstructed=options.reconstructs,
        sensitivity=sensitivity,
        notes=notes,
        orders=state.orders,
    )


def _fix_masks(
    model: nn.Module, directory: ModelDir, recipe: Recipe, options: PruneOptions
) -> None:
    if (masks := open_masks(options)) is not None:
        fix_masks(model, read_masks(masks, model, directory, recipe, options))


def _written(directory: ModelDir, state: PrunedState, out: Path) -> str:
    return write_pruned(directory, state.weights, out, axes=state.axes, dense=state.moved)


def _opened(
    directory: ModelDir, recipe: Recipe, device: torch.device, batches: Sequence[Batch]
) -> tuple[nn.Module, ModelDir, tuple[str, ...]]:
    """The model, its directory with the names that it gives tensors, and what is left out of it."""
    model, unused = load_with_rest(directory, recipe, device)
    for batch in batches:
        require_runs(model, batch, recipe.task, directory.path)
    notes = left_out(directory, model, recipe, unused)
    return model, replace(directory, renamed=renamed_tensors(directory, model)), notes


def _pruned(
    model: nn.Module,
    directory: ModelDir,
    recipe: Recipe,
    calibration: Samples,
    held_out: Samples,
    options: PruneOptions,
    solved: Path,
    progress: Progress,
) -> tuple[PrunedState, Sensitivity | None]:
    """Prune the model of a directory in place, but for what is to stay dense or breaks a budget."""
    if options.method == "none":
        return PrunedState({}, {}, _all_dense(model, recipe)), None
    dense = left_dense(recipe, model, options)
    sensitivity: Sensitivity | None = None
    permuted = _permuted(model, directory, recipe, calibration, options, dense, solved, progress)
    if options.has_budget:
        sensitivity = _sensitivity(
            model, directory, recipe, calibration, options, dense, solved, progress
        )
        dense = {**dense, **over_budget(sensitivity)}
        permuted = permuted.without(model, dense)
    state = prune_model(
        model,
        recipe,
        calibration.batches,
        thin(held_out, _HELD_OUT_TOKENS),
        options,
        stored_dtype=lambda name: stored_dtype(directory, name),
        store=BlockStore(solved, directory.require_untouched),
        progress=progress,
        dense=dense,
    )
    _require_pruned(state, recipe, directory.path)
    moved = {
        name: value.to(stored_dtype(directory, name))
        for name, value in permuted.tensors(model).items()
        if name not in state.weights
    }
    return replace(state, moved=moved, orders=permuted.orders), sensitivity


def _permuted(
    model: nn.Module,
    directory: ModelDir,
    recipe: Recipe,
    calibration: Samples,
    options: PruneOptions,
    dense: Mapping[str, str],
    solved: Path,
    progress: Progress,
) -> Permuted:
    """Put free channels of the model into a better order in place, where that is asked for."""
    if options.permute == "none" or options.mask is not None:
        return Permuted()
    return permute_channels(
        model,
        recipe,
        thin(calibration, _ORDER_TOKENS),
        dense,
        has_tensor=lambda name: len(stored_names(directory, name)) == 1,
        store=OrderStore(solved, directory.require_untouched),
        progress=progress,
    )


def _require_pruned(state: PrunedState, recipe: Recipe, path: Path) -> None:
    if not state.weights:
        first = next(layer for layer in state.layers if layer.name.startswith(recipe.blocks))
        raise RecipeError(
            f"No target of recipe {recipe.family} can be pruned in {path}: {first.name} and the "
            f"others are skipped, because {first.reason}."
        )


def _damping(layers: Sequence[LayerRecord]) -> tuple[float, float]:
    """The least and the most that was used."""
    used = [damping_for(layer.shape[1], layer.rows) for layer in layers if layer.rows]
    return min(used, default=0.0), max(used, default=0.0)


def _sensitivity(
    model: nn.Module,
    directory: ModelDir,
    recipe: Recipe,
    calibration: Samples,
    options: PruneOptions,
    dense: Mapping[str, str],
    solved: Path,
    progress: Progress,
) -> Sensitivity:
    """Measure what each layer costs, once for all runs into one output."""
    store = SensitivityStore(solved)
    if (known := store.load()) is not None:
        return known
    found = measure_sensitivity(
        model,
        recipe,
        calibration.batches,
        options,
        dense=dense,
        stored_dtype=lambda name: stored_dtype(directory, name),
        progress=progress,
    )
    directory.require_untouched()
    store.save(found)
    return found


def _prune_block(
    twin: BlockPair,
    recipe: Recipe,
    sets: list[Activations],
    options: PruneOptions,
    stored_dtype: Callable[[str], torch.dtype],
    dense: Mapping[str, str],
) -> tuple[dict[str, Tensor], tuple[LayerRecord, ...]]:
    """Solve every target of one block; returns stored weights and records by layer path."""
    layers, obstacles = prunable(twin, recipe, dense)
    records = [
        _skipped(f"{twin.prefix}.{name}", layer_at(twin.pruned, name), reason)
        for name, reason in obstacles.items()
    ]
    solved: dict[str, Tensor] = {}
    first = sets[0]
    groups = shared_inputs(twin.pruned, layers, first.pruned_calls[0][twin.index], first.pruned[0])
    for group in groups:
        for part, own in by_options(twin.prefix, group, recipe, options):
            done, made = _prune_group(twin, part, sets, own, stored_dtype)
            _apply(twin.pruned, done)
            solved.update(done)
            records.extend(made)
    if options.reconstructs:
        records = _reconstruct(twin, groups, solved, records, sets, options.preset)
    left = {name: layer for name, layer in layers.items() if name not in solved}
    reasons = not_run_once(twin, left, first)
    records += [_skipped(f"{twin.prefix}.{n}", left[n], reason) for n, reason in reasons.items()]
    return solved, tuple(records)


def _prune_group(
    twin: BlockPair,
    group: list[str],
    sets: list[Activations],
    options: PruneOptions,
    stored_dtype: Callable[[str], torch.dtype],
) -> tuple[dict[str, Tensor], list[LayerRecord]]:
    """Solve layers that share one input and measure their errors."""
    began = time.perf_counter()
    calibration, held_out = (collect(twin, group[0], activations) for activations in sets)
    solved = solve_group(twin, group, calibration, options, stored_dtype)
    seconds = (time.perf_counter() - began) / len(group)
    records = []
    for name, found in solved.items():
        path, layer = f"{twin.prefix}.{name}", layer_at(twin.pruned, name)
        before = to_matrix(layer, layer.weight)
        after = to_matrix(layer, found.weight).float()
        records.append(
            LayerRecord(
                name=path,
                shape=matrix_shape(layer),
                status="pruned",
                reason="",
                method=found.method,
                relative_error=_error(calibration, before, after, path),
                held_out_error=_error(held_out, before, after, path) if held_out.tokens else None,
                iterations=found.iterations,
                seconds=seconds,
                rows=calibration.tokens,
                note=doubt_about(
                    before, found.weight.dtype, calibration, chosen=found.method != "unchanged"
                ),
            )
        )
        log.info("%s: error %.4f, %.1f s", path, records[-1].relative_error, seconds)
    return {name: found.weight for name, found in solved.items()}, records


def _reconstruct(
    twin: BlockPair,
    groups: list[list[str]],
    solved: dict[str, Tensor],
    records: list[LayerRecord],
    sets: list[Activations],
    preset: Preset,
) -> list[LayerRecord]:
    """Tune the block, round its weights into `solved` and measure its layers once more."""
    known = {record.name.removeprefix(f"{twin.prefix}."): record for record in records}
    names = [name for name in solved if known[name].method != "unchanged"]
    if names:
        reconstruct_block(twin, names, sets[0], SCHEDULES[preset])
    for name in names:
        solved[name] = layer_at(twin.pruned, name).weight.to(solved[name].dtype)
    _apply(twin.pruned, solved)
    for group in groups:
        moments = [collect(twin, group[0], activations) for activations in sets]
        for name in group:
            layers = (layer_at(block, name) for block in (twin.dense, twin.pruned))
            before, after = (to_matrix(layer, layer.weight) for layer in layers)
            errors = [
                _error(part, before, after, known[name].name) if part.tokens else None
                for part in moments
            ]
            known[name] = replace(known[name], relative_error=errors[0], held_out_error=errors[1])
    return list(known.values())


def _error(moments: SecondMoments, before: Tensor, after: Tensor, path: str) -> float:
    error = moments.relative_error(before, after)
    if not math.isfinite(error):
        raise ModelDirError(
            f"Layer {path}: its output is NaN or infinite on some text; its activations overflow "
            "or the checkpoint is damaged."
        )
    return error


def _apply(block: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        layer_at(block, name).weight.copy_(weight)


def _all_dense(model: nn.Module, recipe: Recipe) -> tuple[LayerRecord, ...]:
    reason = "nothing is pruned with --method none"
    targets = [
        _skipped(name, layer_at(model, name), reason) for name in target_paths(recipe, model)
    ]
    return (*targets, *_layers_outside(model, recipe, {record.name for record in targets}))


def _layers_outside(model: nn.Module, recipe: Recipe, known: set[str]) -> list[LayerRecord]:
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
        skipped.append(_skipped(name, layer, reason))
    return skipped


def _skipped(name: str, layer: Layer, reason: str) -> LayerRecord:
    return LayerRecord(
        name=name,
        shape=matrix_shape(layer),
        status="skipped",
        reason=reason,
        method="",
        relative_error=None,
        held_out_error=None,
        iterations=0,
        seconds=0.0,
    )
