"""Quantise the layers of one block that share an input: its range, then their weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from prox24_deploy.core.quantized import LayerQuantization, Rounding
from prox24_deploy.model.blocks import run_block
from prox24_deploy.model.layers import Layer, from_matrix, layer_at, matrix_shape, to_matrix
from prox24_deploy.pruning.activations import Activations, BlockPair, input_pairs
from prox24_deploy.pruning.solvers.problem import LayerProblem, damping_for, layer_problem
from prox24_deploy.pruning.solvers.refine import masked_conjugate_gradient
from prox24_deploy.quantization.formats import NumberFormat
from prox24_deploy.quantization.inputs import read_inputs
from prox24_deploy.quantization.migration import (
    STRENGTHS,
    Place,
    migration_factors,
    multiply_columns,
    place_before,
)
from prox24_deploy.quantization.ranges import InputRange
from prox24_deploy.quantization.rounding import rounded_with_feedback, weight_scales
from prox24_deploy.quantization.tensors import QuantizedLayer
from prox24_deploy.quantization.trial import Candidate, Trial

# A layer stays in 16 bits where quantisation adds more than this to its relative squared error:
# twice what the three bits of the mantissa of FP8 cost in inputs and weights together. INT8 costs
# more where a few channels are far larger than the others and nothing can take up their scales.
_MOST_ADDED = 0.003


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """Factors of input channels, (d,), that a place before the layers takes up."""

    place: Place
    factors: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedGroup:
    """Layers by path in the block, their records, and what was moved before them."""

    layers: dict[str, QuantizedLayer]
    records: tuple[LayerQuantization, ...]
    moved: Moved | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Layers that share an input: where they are, and the batches in front of their block."""

    twin: BlockPair
    names: Sequence[str]
    calibration: Activations

    @property
    def layers(self) -> list[Layer]:
        return [layer_at(self.twin.pruned, name) for name in self.names]

    @property
    def paths(self) -> list[str]:
        return [f"{self.twin.prefix}.{name}" for name in self.names]


def quantize_group(
    twin: BlockPair, names: Sequence[str], sets: Sequence[Activations], form: NumberFormat
) -> QuantizedGroup:
    """Find range and numbers of some layers; what is moved before them is moved in the block.

    Args:
        twin: the block as it was and as it is.
        names: paths of layers that share an input.
        sets: batches to calibrate on, and batches to choose by.
        form: to round to.

    Raises:
        ModelDirError: inputs are NaN or infinite.
    """
    group = _Group(twin=twin, names=names, calibration=sets[0])
    trial = _trial(group, sets[1], form)
    if trial.seen.largest == 0:
        reason = "its inputs are all zero on calibration samples"
        pairs = zip(group.paths, group.layers, strict=True)
        return QuantizedGroup(
            layers={}, records=tuple(left_record(path, layer, reason) for path, layer in pairs)
        )
    trial, span, moved = _best_move(trial, _place(group, form))
    if moved:
        moved.place.divide(moved.factors)
        multiply_columns(group.layers, moved.factors)
    return _quantized(group, trial, span, moved)


def left_record(path: str, layer: Layer, reason: str) -> LayerQuantization:
    """The record of a layer that stays in 16 bits."""
    return LayerQuantization(name=path, shape=matrix_shape(layer), reason=reason)


def _trial(group: _Group, withheld: Activations, form: NumberFormat) -> Trial:
    twin, first = group.twin, group.names[0]
    dense = [layer_at(twin.dense, name) for name in group.names]
    others = read_inputs(twin, first, withheld)
    return Trial(
        weight=_stacked(group.layers),
        expected=others.before @ _stacked(dense).T,
        seen=read_inputs(twin, first, group.calibration),
        withheld=others,
        rows=tuple(matrix_shape(layer)[0] for layer in dense),
        form=form,
    )


def _stacked(layers: Sequence[Layer]) -> Tensor:
    return torch.cat([to_matrix(layer, layer.weight).float() for layer in layers])


def _place(group: _Group, form: NumberFormat) -> Place | None:
    """What makes the inputs; not asked for FP8, the numbers of which are as dense around zero."""
    layers, twin = group.layers, group.twin
    if form.dtype.is_floating_point or any(isinstance(layer, nn.Conv2d) for layer in layers):
        return None
    call, hidden = group.calibration.pruned_calls[0][twin.index], group.calibration.pruned[0]
    width = matrix_shape(layers[0])[1]
    return place_before(twin.pruned, layers, width, lambda: run_block(twin.pruned, call, hidden))


def _best_move(trial: Trial, place: Place | None) -> tuple[Trial, InputRange, Moved | None]:
    """With the factors that help most on withheld samples; as it is where none does."""
    span, best = trial.best_range()
    found: tuple[Trial, InputRange, Moved | None] = trial, span, None
    for strength in STRENGTHS if place else ():
        factors = migration_factors(trial.seen.channels, trial.weight, strength)
        other = trial.divided(factors)
        span, error = other.best_range()
        if place and error < best:
            best, found = error, (other, span, Moved(place=place, factors=factors))
    return found


def _quantized(
    group: _Group, trial: Trial, span: InputRange, moved: Moved | None
) -> QuantizedGroup:
    """Round the weights every way, and take for each layer what is best on withheld samples."""
    as_they_are = trial.errors(trial.weight, None)
    tried = [
        (rounding, made, trial.errors(made.values(trial.form), span.scale))
        for rounding, made in _candidates(group, trial, span, moved)
    ]
    layers: dict[str, QuantizedLayer] = {}
    records = []
    for i, (name, layer) in enumerate(zip(group.names, group.layers, strict=True)):
        rounding, made, errors = min(tried, key=lambda each: each[2][i])
        reason = _too_wrong(errors[i], as_they_are[i])
        records.append(
            replace(
                _record(trial, span, moved, group.twin.prefix),
                name=group.paths[i],
                shape=matrix_shape(layer),
                reason=reason,
                rounding=rounding,
                error=errors[i],
                nearest_error=tried[0][2][i],
            )
        )
        if not reason:
            layers[name] = QuantizedLayer(
                weight=from_matrix(layer, trial.split(made.numbers)[i]).clone(),
                weight_scale=trial.split(made.scales)[i].clone(),
                input_scale=span.scale,
            )
    return QuantizedGroup(layers=layers, records=tuple(records), moved=moved)


def _record(trial: Trial, span: InputRange, moved: Moved | None, prefix: str) -> LayerQuantization:
    """What all layers of a group have in common."""
    limit = span.scale * trial.form.largest
    return LayerQuantization(
        name="",
        shape=(0, 0),
        largest=trial.seen.largest,
        limit=limit,
        chosen_by=span.chosen_by,
        clipped=float((trial.seen.now.abs() > limit).float().mean()),
        moved_into=f"{prefix}.{moved.place.path}" if moved else "",
    )


def _too_wrong(error: float, before: float) -> str:
    if error - before <= _MOST_ADDED:
        return ""
    return f"its output would be too wrong: error {error:.3f} instead of {before:.3f}"


def _candidates(
    group: _Group, trial: Trial, span: InputRange, moved: Moved | None
) -> Iterator[tuple[Rounding, Candidate]]:
    """Every rounding of the weights, the nearest first."""
    form, weight = trial.form, trial.weight
    nearest = trial.nearest()
    yield "nearest", nearest
    problem = _problem(group, trial, span, moved)
    kept = weight != 0
    numbers = rounded_with_feedback(problem, weight, kept, nearest.scales, form)
    yield "corrected", replace(nearest, numbers=numbers)
    fitted = problem.to_weight(masked_conjugate_gradient(problem, kept, problem.start))
    fitted = torch.where(problem.dead, weight, fitted)
    scales = weight_scales(fitted, trial.seen.mean_squares, form)
    numbers = rounded_with_feedback(problem, fitted, kept, scales, form)
    yield "refitted", Candidate(numbers=numbers, scales=scales)


def _problem(group: _Group, trial: Trial, span: InputRange, moved: Moved | None) -> LayerProblem:
    """The outputs of the layers as they were, from inputs as they will be read."""
    width = trial.weight.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=trial.weight.device)
    cross, tokens = torch.zeros_like(gram), 0
    for before, now in input_pairs(group.twin, group.names[0], group.calibration):
        read = trial.rounded(now, span.scale)
        # What was moved is in the inputs of now only.
        same = before.float() / moved.factors if moved else before.float()
        gram += read.T @ read
        cross += same.T @ read
        tokens += len(read)
    damping = damping_for(width, tokens)
    return layer_problem(trial.weight, gram, damping, cross, tokens=tokens)
