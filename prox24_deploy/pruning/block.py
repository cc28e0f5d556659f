"""Prune one block, on what the dense and the pruned model feed it, and measure its layers."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from prox24_deploy.config.options import PruneOptions
from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.core.records import LayerRecord
from prox24_deploy.model.blocks import shared_inputs
from prox24_deploy.model.layers import Layer, layer_at, matrix_shape, to_matrix
from prox24_deploy.pruning.activations import BlockPair, BlockStep, collect_wave, not_run_once
from prox24_deploy.pruning.doubts import doubt_about
from prox24_deploy.pruning.layer_group import solve_group
from prox24_deploy.pruning.ranks import Ranks
from prox24_deploy.pruning.reconstruct import SCHEDULES, reconstruct_block
from prox24_deploy.pruning.second_moments import LayerErrors, SecondMoments
from prox24_deploy.pruning.selection import by_options, prunable
from prox24_deploy.pruning.waves import Group, waves

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BlockSolver:
    """How the targets of a block are solved.

    Attributes:
        options: of the run; a recipe may change them for some layers.
        stored_dtype: parameter name to the dtype in which the checkpoint stores it.
        dense: full path of each target to leave dense, with the reason.
        ranks: the processes that share the run.
    """

    options: PruneOptions
    stored_dtype: Callable[[str], torch.dtype]
    dense: Mapping[str, str]
    ranks: Ranks

    def solve(self, step: BlockStep) -> tuple[dict[str, Tensor], tuple[LayerRecord, ...]]:
        """Solve every target of one block; returns stored weights and records by layer path."""
        twin, sets, recipe, options = step.twin, step.sets, step.recipe, self.options
        layers, obstacles = prunable(twin, recipe, self.dense)
        records = [
            skip(f"{twin.prefix}.{name}", layer_at(twin.pruned, name), reason)
            for name, reason in obstacles.items()
        ]
        solved: dict[str, Tensor] = {}
        first = sets[0]
        groups = shared_inputs(
            twin.pruned, layers, first.pruned_calls[0][twin.index], first.pruned[0]
        )
        together = waves(twin.pruned, groups)
        for wave in together:
            # Nothing but the errors of a reconstruction needs the dense block once more.
            goes_on = wave is together[-1] and not options.reconstructs
            done, made = self._solve_wave(step, wave, dense_goes_on=goes_on)
            solved.update(done)
            records += made
        if options.reconstructs:
            records = self._reconstruct(step, together, solved, records)
        left = {name: layer for name, layer in layers.items() if name not in solved}
        reasons = not_run_once(twin, left, first)
        records += [skip(f"{twin.prefix}.{n}", left[n], why) for n, why in reasons.items()]
        return solved, tuple(records)

    def _solve_wave(
        self, step: BlockStep, wave: Sequence[Group], *, dense_goes_on: bool
    ) -> tuple[dict[str, Tensor], list[LayerRecord]]:
        """Solve the groups of a wave; what their inputs tell is freed before the next is looked at.

        Of a layer of 70B that is gigabytes.
        """
        twin, solved, records = step.twin, {}, []
        for group, inputs in self._inputs(step, wave, dense_goes_on=dense_goes_on):
            parts = by_options(twin.prefix, group, step.recipe, self.options)
            for part, own in parts:
                last = part is parts[-1][0]
                done, made = self._solve_group(twin, part, inputs, own, last=last)
                apply_weights(twin.pruned, done)
                solved.update(done)
                records += made
        return solved, records

    def _inputs(
        self, step: BlockStep, wave: Sequence[Group], *, dense_goes_on: bool = False
    ) -> Iterator[tuple[Group, list[LayerErrors]]]:
        """Each group of a wave with what its input tells in each set of batches."""
        goes_on = dense_goes_on and step.twin.following is not None
        found: list[list[LayerErrors]] = []
        # Layers are solved on the first set, which comes last, for it keeps more.
        for activations in reversed(step.sets):
            moments = collect_wave(step.twin, wave, activations, dense_goes_on=goes_on)
            solved_on = activations is step.sets[0]
            found.append(
                [
                    self._errors_of(step.twin, group, each, cross=solved_on)
                    for group, each in zip(wave, moments, strict=True)
                ]
            )
        for group, *inputs in zip(wave, *reversed(found), strict=True):
            yield group, inputs

    def _errors_of(
        self, twin: BlockPair, group: Group, moments: SecondMoments, *, cross: bool
    ) -> LayerErrors:
        """What errors of a group need of its input; what else they do not is given up."""
        moments.sum_over(self.ranks)
        layers = {name: layer_at(twin.dense, name) for name in group}
        before = {name: to_matrix(layer, layer.weight) for name, layer in layers.items()}
        found = moments.errors(before, self.ranks)
        moments.give_up(cross=not cross)
        return found

    def _solve_group(
        self,
        twin: BlockPair,
        group: list[str],
        inputs: Sequence[LayerErrors],
        options: PruneOptions,
        *,
        last: bool,
    ) -> tuple[dict[str, Tensor], list[LayerRecord]]:
        """Solve layers that share one input, the last or not, and measure their errors."""
        began = time.perf_counter()
        calibration = inputs[0].moments
        solved = solve_group(
            twin, group, calibration, options, self.stored_dtype, self.ranks, last=last
        )
        seconds = (time.perf_counter() - began) / len(group)
        records = []
        for name, found in solved.items():
            path, layer = f"{twin.prefix}.{name}", layer_at(twin.pruned, name)
            before = to_matrix(layer, layer.weight)
            errors = _errors(inputs, name, to_matrix(layer, found.weight).float(), path)
            records.append(
                LayerRecord(
                    name=path,
                    shape=matrix_shape(layer),
                    status="pruned",
                    reason="",
                    method=found.method,
                    relative_error=errors[0],
                    held_out_error=errors[1],
                    iterations=found.iterations,
                    seconds=seconds,
                    rows=calibration.tokens,
                    pull=calibration.pull,
                    note=doubt_about(
                        before, found.weight.dtype, calibration, chosen=found.method != "unchanged"
                    ),
                )
            )
            log.info("%s: error %.4f, %.1f s", path, records[-1].relative_error or 0.0, seconds)
        return {name: found.weight for name, found in solved.items()}, records

    def _reconstruct(
        self,
        step: BlockStep,
        together: list[list[Group]],
        solved: dict[str, Tensor],
        records: list[LayerRecord],
    ) -> list[LayerRecord]:
        """Tune the block, round its weights into `solved` and measure its layers once more."""
        twin = step.twin
        known = {record.name.removeprefix(f"{twin.prefix}."): record for record in records}
        names = [name for name in solved if known[name].method != "unchanged"]
        if names:
            reconstruct_block(twin, names, step.sets[0], SCHEDULES[self.options.preset], self.ranks)
        for name in names:
            solved[name] = layer_at(twin.pruned, name).weight.to(solved[name].dtype)
        apply_weights(twin.pruned, solved)
        for group, inputs in (found for wave in together for found in self._inputs(step, wave)):
            for name in group:
                layer = layer_at(twin.pruned, name)
                errors = _errors(inputs, name, to_matrix(layer, layer.weight), known[name].name)
                known[name] = replace(
                    known[name], relative_error=errors[0], held_out_error=errors[1]
                )
        return list(known.values())


def _errors(
    inputs: Sequence[LayerErrors], name: str, after: Tensor, path: str
) -> list[float | None]:
    """Error of one layer (rows, d) in each set of batches; None where a set is empty."""
    errors = [each.of(name, after) if each.moments.tokens else None for each in inputs]
    if not all(error is None or math.isfinite(error) for error in errors):
        raise ModelDirError(
            f"Layer {path}: its output is NaN or infinite on some text; its activations overflow "
            "or the checkpoint is damaged."
        )
    return errors


def apply_weights(block: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write weights, by layer of the block, over those that it has."""
    for name, weight in weights.items():
        layer_at(block, name).weight.copy_(weight)


def skip(name: str, layer: Layer, reason: str) -> LayerRecord:
    """The record of a layer that stays dense."""
    return LayerRecord.skipped(name, matrix_shape(layer), reason)
