"""Stage: quantise a model, pruned or not, block by block, each fed by the quantised ones before.

Ranges, scales and numbers are decided here, once; every backend and every evaluation takes them
from the file that this writes.
"""

import hashlib
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.atomic import make_folder
from prox24_deploy.core.errors import CalibrationError, RecipeError, SparsityLostError
from prox24_deploy.core.quantized import LayerQuantization, QuantizeResult
from prox24_deploy.core.types import Progress, QuantizedFormat
from prox24_deploy.model.batch import Batch, Samples, withhold
from prox24_deploy.model.blocks import find_blocks, shared_inputs, target_layers
from prox24_deploy.model.directory import ModelDir, load_model
from prox24_deploy.model.layers import Layer, layer_at, reduction_axis
from prox24_deploy.model.mapped import Memory
from prox24_deploy.model.offload import is_offloaded
from prox24_deploy.pruning.activations import (
    BlockPair,
    BlockStep,
    Resources,
    block_steps,
    not_run_once,
)
from prox24_deploy.pruning.selection import sharing
from prox24_deploy.quantization.aware import Through, train_through, zeros_of
from prox24_deploy.quantization.formats import FORMATS, NumberFormat, exact_scale
from prox24_deploy.quantization.layer_group import Moved, left_record, quantize_group
from prox24_deploy.quantization.outputs import OutputChoice, choose_outputs, with_output
from prox24_deploy.quantization.tensors import (
    QuantizedLayer,
    QuantizedModel,
    apply_outputs,
    apply_rounding,
    apply_weights,
    dequantized,
    read_quantized,
    write_quantized,
)
from prox24_deploy.sparsity.pattern import first_violation

log = logging.getLogger(__name__)

# Ranges of fewer say nothing.
LEAST_SAMPLES = 8


def require_samples(samples: Samples) -> None:
    """Refuse too few calibration samples to find ranges on some and choose them by others.

    Raises:
        CalibrationError: says how many there are.
    """
    source = samples.source
    if source.samples < LEAST_SAMPLES:
        raise CalibrationError(
            f"Quantisation needs at least {LEAST_SAMPLES} calibration samples for the ranges of "
            f"activations, got {source.samples}; pass more with --calibration or "
            "--calibration-tokens."
        )


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    recipe: Recipe,
    calibration: Sequence[Batch],
    form: QuantizedFormat,
    *,
    sparse: Collection[str],
    progress: Progress,
) -> tuple[QuantizedModel, tuple[LayerQuantization, ...], int]:
    """Quantise all target layers of `model` in place; its layers then round what they read.

    Args:
        model: float32, evaluation mode; its blocks may be in the checkpoint.
        recipe: says where blocks and targets are.
        calibration: batches, some of which are withheld, see `withhold`.
        form: of weights and activations.
        sparse: paths of the layers that are 2:4.
        progress: called with (label, done, total) after each block.

    Returns:
        What was quantised, a record of every target, and the number of withheld samples.

    Raises:
        ModelDirError: activations are NaN or infinite.
        RecipeError: no target can be quantised.
    """
    sets = withhold(calibration)
    tied = sharing(recipe, model)
    count = sum(len(find_blocks(model, part)) for part in recipe.parts)
    layers: dict[str, QuantizedLayer] = {}
    folded: dict[str, Tensor] = {}
    records: list[LayerQuantization] = []
    resources = Resources(streamed=is_offloaded(model))
    for number, step in enumerate(block_steps(model, recipe, sets, resources)):
        progress("quantize", number, count)
        records += _quantize_block(step, FORMATS[form], tied, layers, folded)
    progress("quantize", count, count)
    if not layers:
        raise RecipeError(
            f"No target of recipe {recipe.family} can be quantised to {form}: {records[0].name} "
            f"and the others are left, because {records[0].reason}."
        )
    axes = {n: reduction_axis(layer_at(model, n)) for n in sorted(layers.keys() & set(sparse))}
    made = QuantizedModel(format=form, layers=layers, folded=folded, axes=axes)
    return made, tuple(records), sum(len(batch.real) for batch in sets[1])


def _quantize_block(
    step: BlockStep,
    form: NumberFormat,
    tied: Mapping[str, str],
    found: dict[str, QuantizedLayer],
    folded: dict[str, Tensor],
) -> list[LayerQuantization]:
    """Quantise every target of one block; what was made goes into `found` and `folded`."""
    twin, first = step.twin, step.sets[0]
    layers, obstacles = _quantizable(step, tied)
    records = [left_record(f"{twin.prefix}.{n}", *why) for n, why in obstacles.items()]
    groups = shared_inputs(twin.pruned, layers, first.pruned_calls[0][twin.index], first.pruned[0])
    for group in groups:
        made = quantize_group(twin, group, step.sets, form)
        records += made.records
        if made.moved:
            _note_moved(twin, made.moved, found, folded)
        for name, stored in made.layers.items():
            layer = layer_at(twin.pruned, name)
            layer.weight.copy_(dequantized(layer, stored, form.name))
            found[f"{twin.prefix}.{name}"] = stored
        own = {name: found[f"{twin.prefix}.{name}"] for name in made.layers}
        apply_rounding(twin.pruned, QuantizedModel(format=form.name, layers=own))
        # Factors in a weight that stays in 16 bits are there to be read by every backend.
        for name in set(group) - made.layers.keys() if made.moved else ():
            folded[f"{twin.prefix}.{name}.weight"] = layer_at(twin.pruned, name).weight.clone()
    choices = _round_outputs(step, form, found)
    records = [_with_output(record, choices) for record in records]
    done = {name for group in groups for name in group}
    left = {name: layer for name, layer in layers.items() if name not in done}
    reasons = not_run_once(twin, left, first)
    records += [left_record(f"{twin.prefix}.{n}", left[n], why) for n, why in reasons.items()]
    return records


def _round_outputs(
    step: BlockStep, form: NumberFormat, found: dict[str, QuantizedLayer]
) -> dict[str, OutputChoice]:
    """Let layers of a block round what they give, where that helps and is harmless."""
    start = f"{step.twin.prefix}."
    own = {n.removeprefix(start): found[n] for n in found if n.startswith(start)}
    choices = choose_outputs(step.twin, own, step.sets, form)
    rounding = {name: with_output(own[name], choices[name]) for name in own}
    apply_outputs(step.twin.pruned, QuantizedModel(format=form.name, layers=rounding))
    found |= {start + name: layer for name, layer in rounding.items()}
    return {start + name: choice for name, choice in choices.items()}


def _with_output(
    record: LayerQuantization, choices: Mapping[str, OutputChoice]
) -> LayerQuantization:
    if (choice := choices.get(record.name)) is None:
        return record
    return replace(
        record,
        output_limit=choice.limit,
        output_chosen_by=choice.chosen_by,
        output_reason=choice.reason,
    )


def _quantizable(
    step: BlockStep, tied: Mapping[str, str]
) -> tuple[dict[str, Layer], dict[str, tuple[Layer, str]]]:
    """Targets of a block by path in it, and those that are left, with the reason."""
    layers = target_layers(step.twin.pruned, step.recipe)
    reasons = {name: tied.get(f"{step.twin.prefix}.{name}", "") for name in layers}
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            reasons[name] = f"its convolution runs in {layer.groups} groups of channels"
    left = {name: (layers[name], reason) for name, reason in reasons.items() if reason}
    return {name: layer for name, layer in layers.items() if name not in left}, left


def _note_moved(
    twin: BlockPair, moved: Moved, found: dict[str, QuantizedLayer], folded: dict[str, Tensor]
) -> None:
    """Keep what the place before a group has become; its rows may be numbers already."""
    path = f"{twin.prefix}.{moved.place.path}"
    parameters = dict(moved.place.parameters)
    if path in found:
        before = found[path]
        scale = exact_scale(before.weight_scale / moved.factors)
        found[path] = replace(before, weight_scale=scale)
        del parameters["weight"]
    folded |= {f"{path}.{name}": parameter.clone() for name, parameter in parameters.items()}


def quantize_directory(
    directory: ModelDir,
    recipe: Recipe,
    calibration: Samples,
    form: QuantizedFormat,
    *,
    sparse: Collection[str],
    device: torch.device,
    out: Path,
    progress: Progress,
    training: Through | None = None,
    memory: Memory | None = None,
) -> QuantizeResult:
    """Quantise a model directory, and write the tensors to the file `out`.

    Args:
        directory: the model, pruned or dense.
        recipe: of its family.
        calibration: samples to find ranges on.
        form: of weights and activations.
        sparse: paths of the layers that are 2:4.
        device: where blocks run.
        out: file to write.
        progress: see `quantize_model`.
        training: by what the numbers are trained once they are decided; None for not at all.
        memory: where the model is kept if it does not fit; None for a model that does.

    Raises:
        CalibrationError, ModelDirError, RecipeError: too few samples, or as `quantize_model`.
        SparsityLostError: a weight read back from disk is not 2:4.
    """
    began = time.perf_counter()
    require_samples(calibration)
    model = load_quantized(directory, recipe, device, None, memory, changes=training is not None)
    zeros = zeros_of(model, [*sparse]) if training else {}
    made, records, withheld = quantize_model(
        model, recipe, calibration.batches, form, sparse=sparse, progress=progress
    )
    through = None
    if training:
        made, through = train_through(model, made, zeros, training, began=began, progress=progress)
    return QuantizeResult(
        format=form,
        layers=records,
        calibration=calibration.source,
        withheld=withheld,
        state_sha256=_written(made, out),
        seconds=time.perf_counter() - began,
        training=through,
    )


def _written(made: QuantizedModel, out: Path) -> str:
    """Write what was quantised, and prove it; its hash."""
    make_folder(out.parent)
    write_quantized(made, out)
    _require_sparse(out)
    with out.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _require_sparse(path: Path) -> None:
    written = read_quantized(path)
    for name, axis in written.axes.items():
        # Comparing takes a dtype that has a comparison.
        if (bad := first_violation(written.layers[name].weight.float(), axis)) is not None:
            raise SparsityLostError(
                f"Weight {name}.weight in {path} is not 2:4 along axis {axis}: the group at {bad} "
                "has more than two non-zeros; this is a fault of the stage that quantises, report "
                "it."
            )


def load_quantized(
    directory: ModelDir,
    recipe: Recipe,
    device: torch.device,
    tensors: Path | None,
    memory: Memory | None = None,
    *,
    changes: bool = False,
) -> nn.Module:
    """As `load_model`, with the weights and the rounding that a file of tensors has.

    Without a file, it is the model as it is. Where there is too little `memory`, it is kept as that
    says, of a model that `changes` as a whole, too.
    """
    if memory is None:
        model = load_model(directory, recipe, device)
    else:
        model = memory.load(directory, recipe, device, changes=changes or tensors is not None)
    if tensors is not None:
        apply_quantized(model, tensors)
    return model


def apply_quantized(model: nn.Module, tensors: Path) -> None:
    """Give a model the weights and the rounding that a file of tensors has, in place."""
    quantized = read_quantized(tensors)
    apply_weights(model, quantized)
    apply_rounding(model, quantized)
