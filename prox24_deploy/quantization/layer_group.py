"""Quantise the layers of one block that share an input: its range, then their weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.core.quantized import LayerQuantization, Rounding
from prox24_deploy.model.blocks import run_block
from prox24_deploy.model.layers import Layer, from_matrix, layer_at, matrix_shape, to_matrix
from prox24_deploy.pruning.activations import Activations, BlockPair, input_pairs
from prox24_deploy.pruning.second_moments import SecondMoments
from prox24_deploy.pruning.solvers.problem import LayerProblem, damping_for, layer_problem
from prox24_deploy.pruning.solvers.refine import masked_conjugate_gradient
from prox24_deploy.quantization.formats import NumberFormat
from prox24_deploy.quantization.migration import (
    STRENGTHS,
    Place,
    migration_factors,
    multiply_columns,
    place_before,
)
from prox24_deploy.quantization.ranges import InputRange, input_ranges
from prox24_deploy.quantization.rounding import rounded_with_feedback, weight_scales
from prox24_deploy.quantization.tensors import QuantizedLayer

# Rows of each set by which ranges are found and chosen; the moments use all.
_MOST_ROWS = 1024
# A layer stays in 16 bits where quantisation adds more than this to its relative squared error.
_MOST_ADDED = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What some layers read, in the model as it was and in the one that is being quantised.

    Attributes:
        before: rows of a sample, (tokens, d), of the model as it was.
        now: the same tokens in the model as it is.
        channels: (d,), the largest magnitude of each channel over all tokens, now.
        moments: mean squares of each channel over all tokens, now.
    """

    before: Tensor
    now: Tensor
    channels: Tensor
    moments: Tensor

    @property
    def largest(self) -> float:
        """Magnitude over everything."""
        return float(self.channels.amax())


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """Factors of input channels that a place before the layers takes up."""

    place: Place
    factors: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedGroup:
    """Layers by path in the block, their records, and what was moved before them."""

    layers: dict[str, QuantizedLayer]
    records: tuple[LayerQuantization, ...]
    moved: Moved | None


def quantize_group(
    twin: BlockPair, group: Sequence[str], sets: Sequence[Activations], form: NumberFormat
) -> QuantizedGroup:
    """Quantise layers of the block in place, but for rounding their inputs.

    Args:
        twin: the block as it was and as it is.
        group: paths of layers that share an input.
        sets: batches to calibrate on, and batches to choose by.
        form: to round to.

    Raises:
        ModelDirError: inputs are NaN or infinite.
    """
    layers = [layer_at(twin.pruned, name) for name in group]
    seen, withheld = (_inputs(twin, group[0], each) for each in sets)
    _require_finite(seen, f"{twin.prefix}.{group[0]}")
    if seen.largest == 0:
        return _left(twin, group, "its inputs are all zero on calibration samples")
    trial = _Trial(twin, group, layers, withheld, form)
    moved = _best_move(trial, seen, _place(twin, layers, sets[0], form))
    if moved:
        moved.place.divide(moved.factors)
        multiply_columns(layers, moved.factors)
        seen, trial = _divided(seen, moved.factors), trial.divided(moved.factors)
    span = trial.best_range(seen)
    return _rounded(twin, group, sets[0], trial, seen, span, moved)


def _inputs(twin: BlockPair, name: str, activations: Activations) -> Inputs:
    """Go through all batches once; the sample takes as many rows of each."""
    share = -(-_MOST_ROWS // len(activations.batches))
    before, now = [], []
    largest, squares, tokens = torch.zeros(()), torch.zeros(()), 0
    for dense, pruned in input_pairs(twin, name, activations):
        step = max(1, -(-len(pruned) // share))
        before.append(dense[::step].float())
        now.append(pruned[::step].float())
        largest = torch.maximum(largest.to(pruned.device), pruned.abs().amax(0).float())
        squares = squares.to(pruned.device) + pruned.double().square().sum(0)
        tokens += len(pruned)
    return Inputs(
        before=torch.cat(before),
        now=torch.cat(now),
        channels=largest,
        moments=(squares / max(tokens, 1)).float(),
    )


def _divided(inputs: Inputs, factors: Tensor) -> Inputs:
    return replace(
        inputs,
        now=inputs.now / factors,
        channels=inputs.channels / factors,
        moments=inputs.moments / factors.square(),
    )


def _require_finite(inputs: Inputs, path: str) -> None:
    if not bool(torch.isfinite(inputs.channels).all()):
        raise ModelDirError(
            f"Layer {path} reads NaN or infinity on calibration samples, which have no range; its "
            "activations overflow or the checkpoint is damaged."
        )


class _Trial:
    """The outputs of a group on withheld samples, and how far candidates are from them."""

    def __init__(
        self,
        twin: BlockPair,
        group: Sequence[str],
        layers: Sequence[Layer],
        withheld: Inputs,
        form: NumberFormat,
    ) -> None:
        self.form, self.withheld = form, withheld
        self.weight = torch.cat([to_matrix(layer, layer.weight).float() for layer in layers])
        dense = [layer_at(twin.dense, name) for name in group]
        before = torch.cat([to_matrix(layer, layer.weight).float() for layer in dense])
        self._expected = withheld.before @ before.T
        self._rows = [matrix_shape(layer)[0] for layer in layers]

    def divided(self, factors: Tensor) -> "_Trial":
        """The same with factors moved from the inputs into the weight."""
        other = object.__new__(_Trial)
        other.form, other._expected, other._rows = self.form, self._expected, self._rows
        other.weight = self.weight * factors
        other.withheld = _divided(self.withheld, factors)
        return other

    def errors(self, weight: Tensor, scale: float | None) -> list[float]:
        """Relative squared error of each layer; inputs as they are where there is no scale."""
        rows = self.withheld.now
        if scale is not None:
            rows = self.form.values(self.form.numbers(rows, scale), scale)
        wrong = (rows @ weight.T - self._expected).square().double().sum(0).split(self._rows)
        size = self._expected.square().double().sum(0).split(self._rows)
        pairs = zip(wrong, size, strict=True)
        return [float(w.sum()) / float(s.sum()) if float(s.sum()) else 0.0 for w, s in pairs]

    def best_range(self, seen: Inputs) -> InputRange:
        """The range by which the nearest weights do best."""
        nearest = self.nearest(seen)[1]
        found = input_ranges(seen.now, seen.largest, self.form)
        return min(found, key=lambda span: sum(self.errors(nearest, span.scale)))

    def nearest(self, seen: Inputs) -> tuple[Tensor, Tensor]:
        """Scales, and the values of the nearest numbers."""
        scales = weight_scales(self.weight, seen.moments, self.form)
        numbers = self.form.weight_numbers(self.weight, scales)
        return scales, self.form.values(numbers, scales[:, None])

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Rows of each layer."""
        parts: tuple[Tensor, ...] = tensor.split(self._rows)
        return parts


def _place(
    twin: BlockPair, layers: Sequence[Layer], activations: Activations, form: NumberFormat
) -> Place | None:
    """What makes the inputs of some layers; not asked for FP8, whose numbers are relative."""
    if form.dtype.is_floating_point or any(isinstance(layer, nn.Conv2d) for layer in layers):
        return None
    call, hidden = activations.pruned_calls[0][twin.index], activations.pruned[0]
    width = matrix_shape(layers[0])[1]
    return place_before(twin.pruned, layers, width, lambda: run_block(twin.pruned, call, hidden))


def _best_move(trial: _Trial, seen: Inputs, place: Place | None) -> Moved | None:
    """The factors that help most on withheld samples; None where none does."""
    if place is None:
        return None
    best, found = _trial_error(trial, seen), None
    for strength in STRENGTHS:
        factors = migration_factors(seen.channels, trial.weight, strength)
        error = _trial_error(trial.divided(factors), _divided(seen, factors))
        if error < best:
            best, found = error, Moved(place=place, factors=factors)
    return found


def _trial_error(trial: _Trial, seen: Inputs) -> float:
    return sum(trial.errors(trial.nearest(seen)[1], trial.best_range(seen).scale))


def _rounded(
    twin: BlockPair,
    group: Sequence[str],
    activations: Activations,
    trial: _Trial,
    seen: Inputs,
    span: InputRange,
    moved: Moved | None,
) -> QuantizedGroup:
    """Round the weights every way, and take for each layer what is best on withheld samples."""
    form = trial.form
    plain = trial.errors(trial.weight, None)
    tried = [
        (rounding, scales, numbers, trial.errors(form.values(numbers, scales[:, None]), span.scale))
        for rounding, scales, numbers in _candidates(
            twin, group, activations, trial, seen, span, moved
        )
    ]
    nearest = tried[0][3]
    layers: dict[str, QuantizedLayer] = {}
    records = []
    for i, name in enumerate(group):
        rounding, scales, numbers, errors = min(tried, key=lambda each: each[3][i])
        layer = layer_at(twin.pruned, name)
        record = LayerQuantization(
            name=f"{twin.prefix}.{name}",
            shape=matrix_shape(layer),
            largest=seen.largest,
            limit=span.scale * form.largest,
            chosen_by=span.chosen_by,
            clipped=float((seen.now.abs() > span.scale * form.largest).float().mean()),
            moved_into=f"{twin.prefix}.{moved.place.path}" if moved else "",
            rounding=rounding,
            error=errors[i],
            nearest_error=nearest[i],
        )
        if errors[i] - plain[i] > _MOST_ADDED:
            reason = (
                f"quantised, its relative squared error would be {errors[i]:.3f} and not "
                f"{plain[i]:.3f}"
            )
            records.append(replace(record, reason=reason))
            continue
        own = from_matrix(layer, trial.split(numbers)[i])
        layers[name] = QuantizedLayer(
            weight=own, weight_scale=trial.split(scales)[i].clone(), input_scale=span.scale
        )
        records.append(record)
    return QuantizedGroup(layers=layers, records=tuple(records), moved=moved)


def _candidates(
    twin: BlockPair,
    group: Sequence[str],
    activations: Activations,
    trial: _Trial,
    seen: Inputs,
    span: InputRange,
    moved: Moved | None,
) -> Iterator[tuple[Rounding, Tensor, Tensor]]:
    """Rounding, scales by row and numbers of all layers; the nearest first."""
    form, weight = trial.form, trial.weight
    scales, _ = trial.nearest(seen)
    yield "nearest", scales, form.weight_numbers(weight, scales)
    problem = _problem(twin, group, activations, trial, span, moved)
    kept = weight != 0
    yield "corrected", scales, rounded_with_feedback(problem, weight, kept, scales, form)
    fitted = problem.to_weight(masked_conjugate_gradient(problem, kept, problem.start))
    fitted = torch.where(problem.dead, weight, fitted)
    scales = weight_scales(fitted, seen.moments, form)
    yield "refitted", scales, rounded_with_feedback(problem, fitted, kept, scales, form)


def _problem(
    twin: BlockPair,
    group: Sequence[str],
    activations: Activations,
    trial: _Trial,
    span: InputRange,
    moved: Moved | None,
) -> LayerProblem:
    """The outputs of the layers as they were, from inputs as they will be read."""
    form = trial.form
    moments = SecondMoments.empty(trial.weight.shape[1], trial.weight.device)
    # What was moved is in the inputs of now only.
    factors = moved.factors if moved else torch.ones(())
    for before, now in input_pairs(twin, group[0], activations):
        read = form.values(form.numbers(now, span.scale), span.scale)
        moments.add(before.float() / factors.to(before.device), read)
    return layer_problem(
        trial.weight,
        moments.pruned / moments.tokens,
        damping_for(trial.weight.shape[1], moments.tokens),
        moments.cross / moments.tokens,
    )


def _left(twin: BlockPair, group: Sequence[str], reason: str) -> QuantizedGroup:
    records = tuple(
        left_record(f"{twin.prefix}.{name}", layer_at(twin.pruned, name), reason) for name in group
    )
    return QuantizedGroup(layers={}, records=records, moved=None)


def left_record(path: str, layer: Layer, reason: str) -> LayerQuantization:
    """The record of a layer that stays in 16 bits."""
    return LayerQuantization(name=path, shape=matrix_shape(layer), reason=reason)
