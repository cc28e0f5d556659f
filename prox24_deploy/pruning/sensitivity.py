"""How much the model loses by pruning each layer, and which layers a budget allows to prune.

Each layer is solved alone on seven eighths of the calibration text, on inputs of the dense model;
the rest of the text measures the loss of the model with that one layer pruned. Such losses add up
almost exactly, so layers are taken in the order of their harm per weight, and the loss of the
model with the first n of them pruned is then measured, not summed.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from prox24_deploy.config.options import PruneOptions
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.atomic import write_atomic
from prox24_deploy.core.errors import CalibrationError, UsageError
from prox24_deploy.core.records import CurvePoint, LayerSensitivity, Sensitivity
from prox24_deploy.core.types import Progress
from prox24_deploy.evaluation.estimate import mean_estimate
from prox24_deploy.evaluation.losses import Loss, loss_against
from prox24_deploy.model.batch import Batch, withhold
from prox24_deploy.model.blocks import find_blocks, shared_inputs
from prox24_deploy.model.layers import layer_at
from prox24_deploy.pruning.activations import BlockPair, advance, collect, record_activations
from prox24_deploy.pruning.layer_group import solve_group
from prox24_deploy.pruning.selection import by_options, prunable

log = logging.getLogger(__name__)


# Of the withheld batches no more measure than these: each layer costs one pass over all.
_MOST_BATCHES = 8
_CURVE_POINTS = 12
_RECORD = TypeAdapter(Sensitivity)


@dataclass(frozen=True, slots=True)
class SensitivityStore:
    """The measured sensitivity in a folder, so that a killed run does not measure it again."""

    folder: Path

    def load(self) -> Sensitivity | None:
        """What was saved, or None if nothing readable was."""
        try:
            return _RECORD.validate_json(self._path.read_bytes())
        except (OSError, ValidationError):
            # Not written by this version, or damaged: measuring again loses only time.
            return None

    def save(self, found: Sensitivity) -> None:
        """Write it atomically."""
        write_atomic(self._path, _RECORD.dump_json(found))

    @property
    def _path(self) -> Path:
        return self.folder / "sensitivity.json"


@torch.no_grad()
def measure_sensitivity(
    model: nn.Module,
    recipe: Recipe,
    calibration: Sequence[Batch],
    options: PruneOptions,
    *,
    dense: Mapping[str, str],
    stored_dtype: Callable[[str], torch.dtype],
    progress: Progress,
    keep_weight: Callable[[Tensor], Tensor] | None = None,
) -> Sensitivity:
    """Measure what pruning costs and choose as many layers as the budget of `options` allows.

    Args:
        model: float32, evaluation mode; unchanged when this returns.
        recipe: says where the blocks and targets are.
        calibration: batches to solve on and, every eighth, to measure on.
        options: the method, and `max_loss`, `max_layers` or both.
        dense: targets that stay dense whatever they cost.
        stored_dtype: parameter name to the dtype in which the checkpoint stores it.
        progress: called with ("sensitivity", done, total).
        keep_weight: where to have the pruned weights of all layers; None for memory.

    Raises:
        CalibrationError: there are fewer than two batches.
        UsageError: even the least harmful layer costs more than `max_loss`.
    """
    solving, measuring = _parts(calibration)
    # Sensitivity is about the order of layers, for which the fast schedule is as good as any.
    own = replace(options, preset="fast", target="symmetric")
    solved = _solve_all(model, recipe, solving, own, dense, stored_dtype, progress, keep_weight)
    loss = loss_against(model, recipe.task, measuring)
    layers = _each_alone(model, solved, loss, progress)
    prefixes = _Prefixes(model, layers, solved, loss, progress)
    chosen = _choose(prefixes, options)
    return Sensitivity(
        metric=loss.name,
        samples=sum(len(batch.real) for batch in measuring),
        layers=layers,
        curve=prefixes.points,
        max_loss=options.max_loss,
        max_layers=options.max_layers,
        chosen=chosen,
    )


def require_two(batches: int) -> None:
    """Refuse text too short to solve on one part and measure on another.

    Raises:
        CalibrationError: there is only one batch.
    """
    if batches < 2:
        raise CalibrationError(
            "A budget needs at least two batches of calibration text, one to solve on and one to "
            "measure on, got one; pass more text or raise --calibration-tokens."
        )


def _parts(calibration: Sequence[Batch]) -> tuple[tuple[Batch, ...], Sequence[Batch]]:
    """The batches to solve on, and those to measure on."""
    require_two(len(calibration))
    solving, withheld = withhold(calibration)
    return solving, withheld[:: -(-len(withheld) // _MOST_BATCHES)]


def over_budget(found: Sensitivity) -> dict[str, str]:
    """Map the full path of each layer that the budget leaves dense to the reason."""
    budget = [] if found.max_loss is None else [f"--max-loss {found.max_loss:g}"]
    budget += [] if found.max_layers is None else [f"--layers {found.max_layers}"]
    return {
        layer.name: (
            f"over the budget of {' and '.join(budget)}: pruned alone it costs "
            f"{layer.loss.value:.2g} ± {layer.loss.standard_error:.1g} {found.metric}"
        )
        for layer in found.layers[found.chosen :]
    }


def _solve_all(
    model: nn.Module,
    recipe: Recipe,
    batches: tuple[Batch, ...],
    options: PruneOptions,
    dense: Mapping[str, str],
    stored_dtype: Callable[[str], torch.dtype],
    progress: Progress,
    keep_weight: Callable[[Tensor], Tensor] | None,
) -> dict[str, Tensor]:
    """Every layer pruned alone, by full path, in the dtype of the checkpoint."""
    solved: dict[str, Tensor] = {}
    for part in recipe.parts:
        blocks = find_blocks(model, part)
        activations = record_activations(model, blocks, part, batches)
        for index, block in enumerate(blocks):
            progress("sensitivity", index, len(blocks))
            twin = BlockPair(
                index=index, prefix=f"{part.blocks}.{index}", dense=block, pruned=block
            )
            layers, _ = prunable(twin, part, dense)
            for group in shared_inputs(
                block, layers, activations.calls[0][index], activations.dense[0]
            ):
                moments = collect(twin, group[0], activations)
                for names, own in by_options(twin.prefix, group, part, options):
                    found = solve_group(twin, names, moments, own, stored_dtype)
                    for name, layer in found.items():
                        weight = layer.weight if keep_weight is None else keep_weight(layer.weight)
                        solved[f"{twin.prefix}.{name}"] = weight
            if index + 1 < len(blocks):
                advance(twin, [activations])
    return solved


def _each_alone(
    model: nn.Module, solved: Mapping[str, Tensor], loss: Loss, progress: Progress
) -> tuple[LayerSensitivity, ...]:
    """The loss with each layer pruned alone, the least harm per weight first."""
    found = []
    for i, (name, weight) in enumerate(solved.items()):
        progress("sensitivity", i, len(solved))
        with _replaced(model, {name: weight}):
            found.append(
                LayerSensitivity(
                    name=name, weights=weight.numel(), loss=mean_estimate(loss.of(model))
                )
            )
        log.info("%s: pruned alone costs %.4g", name, found[-1].loss.value)
    return tuple(sorted(found, key=lambda layer: (layer.loss.value / layer.weights, layer.name)))


class _Prefixes:
    """The loss with the first n layers pruned, measured once for each n that is asked for."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[LayerSensitivity],
        solved: Mapping[str, Tensor],
        loss: Loss,
        progress: Progress,
    ) -> None:
        self._model, self._layers, self._solved = model, layers, solved
        self._loss, self._progress = loss, progress
        self._found: dict[int, CurvePoint] = {}

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def points(self) -> tuple[CurvePoint, ...]:
        """All that was measured, in order of n."""
        return tuple(self._found[count] for count in sorted(self._found))

    def loss(self, count: int) -> float:
        """Mean loss with the first `count` layers pruned."""
        if count not in self._found:
            self._progress("sensitivity", len(self._found), _CURVE_POINTS)
            first = self._layers[:count]
            with _replaced(self._model, {layer.name: self._solved[layer.name] for layer in first}):
                estimate = mean_estimate(self._loss.of(self._model))
            weights = sum(layer.weights for layer in first)
            self._found[count] = CurvePoint(layers=count, weights=weights, loss=estimate)
        return self._found[count].loss.value


def _choose(prefixes: _Prefixes, options: PruneOptions) -> int:
    """Measure the curve and find the most layers that the budget allows, at least one.

    Where the curve crosses the limit is found by bisection, as if it rose everywhere.
    """
    total = len(prefixes)
    most = total if options.max_layers is None else min(options.max_layers, total)
    grid = sorted({-(-total * i // _CURVE_POINTS) for i in range(1, _CURVE_POINTS + 1)} | {most})
    losses = {count: prefixes.loss(count) for count in grid}
    limit = options.max_loss
    if limit is None:
        return most
    beyond = next((count for count in grid if losses[count] > limit), total + 1)
    within = max((count for count in grid if count < beyond), default=0)
    while beyond - within > 1 and beyond <= total:
        middle = (within + beyond) // 2
        within, beyond = (middle, beyond) if prefixes.loss(middle) <= limit else (within, middle)
    if within == 0:
        raise UsageError(
            f"Pruning the least harmful layer alone raises the loss by {prefixes.loss(1):.3g}, "
            f"more than --max-loss {limit:g}; raise the limit."
        )
    return min(within, most)


@contextmanager
def _replaced(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other weights into layers, and the old bits back afterwards."""
    layers = {name: layer_at(model, name) for name in weights}
    old = {name: layer.weight.clone() for name, layer in layers.items()}
    try:
        for name, weight in weights.items():
            layers[name].weight.copy_(weight)
        yield
    finally:
        for name, weight in old.items():
            layers[name].weight.copy_(weight)
