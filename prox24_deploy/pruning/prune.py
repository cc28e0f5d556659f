"""Stage: prune every target layer, block by block, with inputs from the already pruned model."""

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

import torch
from torch import Tensor, nn

from prox24_deploy.config.options import PruneOptions
from prox24_deploy.config.recipe import SENTENCE_MODULES, Recipe
from prox24_deploy.core.atomic import make_folder
from prox24_deploy.core.errors import ModelDirError, RecipeError, UsageError
from prox24_deploy.core.records import ChannelOrder, LayerRecord, PruneResult, Sensitivity
from prox24_deploy.core.types import Progress, silent
from prox24_deploy.data.text import thin
from prox24_deploy.model.batch import Batch, Samples
from prox24_deploy.model.blocks import find_blocks, require_runs, shared_inputs
from prox24_deploy.model.checkpoint import (
    AsStored,
    BlockStore,
    SaveBlock,
    renamed_tensors,
    saving,
    stored_dtype,
    stored_names,
    write_pruned,
)
from prox24_deploy.model.directory import ModelDir, load_with_rest, structure_of
from prox24_deploy.model.layers import (
    Layer,
    is_layer,
    layer_at,
    matrix_shape,
    reduction_axis,
    to_matrix,
)
from prox24_deploy.model.mapped import MappedFiles, map_weights
from prox24_deploy.model.notes import left_out
from prox24_deploy.pruning.activations import (
    IN_MEMORY,
    BlockPair,
    BlockStep,
    Resources,
    block_steps,
    collect_wave,
    not_run_once,
)
from prox24_deploy.pruning.doubts import doubt_about
from prox24_deploy.pruning.hidden_states import keeper
from prox24_deploy.pruning.layer_group import solve_group
from prox24_deploy.pruning.masks import fix_masks, open_masks, read_masks
from prox24_deploy.pruning.memory import Placement, needs_of, place, require_disk, room_on
from prox24_deploy.pruning.permutation import OrderStore, Permuted, permute_channels
from prox24_deploy.pruning.ranks import ALONE, Ranks, during, require_batch_each, watched
from prox24_deploy.pruning.reconstruct import SCHEDULES, reconstruct_block, require_batches
from prox24_deploy.pruning.second_moments import LayerErrors, SecondMoments
from prox24_deploy.pruning.selection import (
    by_options,
    left_dense,
    prunable,
    require_matches,
    target_paths,
)
from prox24_deploy.pruning.sensitivity import (
    SensitivityStore,
    measure_sensitivity,
    over_budget,
    require_two,
)
from prox24_deploy.pruning.solvers.problem import damping_for
from prox24_deploy.pruning.solvers.products import tensor_cores
from prox24_deploy.pruning.waves import Group, waves

log = logging.getLogger(__name__)

# Held-out text for the error of each layer; the accuracy figures use all of it.
_HELD_OUT_TOKENS = 8192
# Text that tells how large the inputs of each layer are, by which their channels are ordered.
_ORDER_TOKENS = 16384


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
    solver = _BlockSolver(options, stored_dtype, dense, resources.ranks)
    weights = store.weights()
    records: list[LayerRecord] = []
    with saving(store) as save:
        for number, step in enumerate(steps):
            progress("prune", number, count)
            solved, made = _block_done(number, step, solver, store, save)
            weights.add(number, step.twin.prefix, solved)
            records += made
    progress("prune", count, count)
    records += _layers_outside(model, recipe, {record.name for record in records})
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
    number: int, step: BlockStep, solver: "_BlockSolver", store: BlockStore, save: SaveBlock
) -> tuple[dict[str, Tensor], tuple[LayerRecord, ...]]:
    """Prune a block in place; its weights and records, kept by an earlier run or made and kept."""
    with during(step.twin.prefix, solver.ranks):
        done = solver.ranks.told(store.load(number))
        if done is None:
            done = solver.solve(step)
            if solver.ranks.writes:
                save(number, *done)
    _apply(step.twin.pruned, done[0])
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


def prune_directory(
    directory: ModelDir,
    recipe: Recipe,
    calibration: Samples,
    held_out: Samples,
    options: PruneOptions,
    *,
    device: torch.device,
    memory_limit: int | None = None,
    ranks: Ranks = ALONE,
    solved: Path,
    out: Path,
    begin: Callable[[], None] | None = None,
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
        memory_limit: bytes that may be taken there; None for all that are free.
        ranks: the processes that share the run; the others call `help_to_prune`.
        solved: folder of solved blocks, kept across interruptions.
        out: receives weights, configuration and tokenizer.
        begin: called when nothing was refused, before anything but `solved` is written.
        progress: see `prune_model`.

    Raises:
        ModelDirError: the directory was written meanwhile, or what `prune_model` raises.
        CalibrationError: there are fewer calibration batches than processes.
        UsageError: there is too little memory.
    """
    began = time.perf_counter()
    job = _Job(directory, recipe, calibration, held_out, options, device, solved, ranks)
    with _opened(job, memory_limit) as opened:
        if begin is not None:
            begin()
        state, sensitivity = _pruned(job, opened, progress)
        digest = write_pruned(
            opened.directory, state.weights, out, axes=state.axes, dense=state.moved
        )
    return _result(job, opened, state, sensitivity, digest, time.perf_counter() - began)


def _result(
    job: "_Job",
    opened: "_Opened",
    state: PrunedState,
    sensitivity: Sensitivity | None,
    digest: str,
    seconds: float,
) -> PruneResult:
    options = job.options
    return PruneResult(
        method="mask" if options.mask else options.method,
        preset=options.preset,
        target=options.target,
        device=job.device.type,
        layers=state.layers,
        calibration=job.calibration.source,
        held_out=job.held_out.source,
        damping=_damping(state.layers),
        state_sha256=digest,
        seconds=seconds,
        reconstructed=options.reconstructs,
        sensitivity=sensitivity,
        notes=opened.notes,
        memory=opened.memory,
        orders=state.orders,
    )


def help_to_prune(
    directory: ModelDir,
    recipe: Recipe,
    calibration: Samples,
    held_out: Samples,
    options: PruneOptions,
    *,
    device: torch.device,
    memory_limit: int | None,
    ranks: Ranks,
) -> None:
    """Take the part of one more process in `prune_directory`, which process 0 calls; write nothing.

    Raises:
        Prox24Error: what `prune_directory` raises.
    """
    with TemporaryDirectory() as folder:
        job = _Job(directory, recipe, calibration, held_out, options, device, Path(folder), ranks)
        with _opened(job, memory_limit) as opened:
            _pruned(job, opened, silent)


@dataclass(frozen=True, slots=True)
class _Job:
    """What is to be pruned, and by whom."""

    directory: ModelDir
    recipe: Recipe
    calibration: Samples
    held_out: Samples
    options: PruneOptions
    device: torch.device
    solved: Path
    ranks: Ranks

    @property
    def measured(self) -> tuple[Batch, ...]:
        """Batches to measure errors on."""
        return thin(self.held_out, _HELD_OUT_TOKENS)

    def placement(self, structure: nn.Module, memory_limit: int | None) -> Placement:
        """Where weights and hidden states are kept, by what there is room for."""
        shares = map(self.ranks.share, (self.calibration.batches, self.measured))
        needs = needs_of(structure, self.recipe, [b for each in shares for b in each], self.options)
        room = room_on(self.device, memory_limit, self.ranks.here)
        found, refusal = None, ""
        try:
            found = place(needs, room, whole="" if self.maps else self.needs_whole)
            if found.states == "disk":
                require_disk(needs.states, self.scratch)
        except UsageError as error:
            refusal = str(error)
        # None takes room before all have looked at what is free, or where one has too little.
        for number, said in enumerate(self.ranks.of_all(refusal)):
            if said:
                where = f"Process {number} of this run: " if self.ranks.count > 1 else ""
                raise UsageError(f"{where}{said}")
        assert found is not None, "none was refused"
        return found

    @property
    def scratch(self) -> Path:
        """For what is worth nothing after a kill, beside what is."""
        return self.solved / "scratch"

    @property
    def maps(self) -> bool:
        """Whether a model that must be there as a whole may lie in mapped files."""
        return self.device.type == "cpu" and bool(self.needs_whole)

    @property
    def permutes(self) -> bool:
        """Whether channels are put into a better order first."""
        options = self.options
        return options.permute != "none" and options.mask is None and options.method != "none"

    @property
    def needs_whole(self) -> str:
        """The option that needs the whole model in memory; "" where none does."""
        options = self.options
        named = {
            "--max-loss or --layers": options.has_budget,
            "--mask": options.mask is not None,
            "--permute auto": self.permutes,
        }
        return next((name for name, asked in named.items() if asked), "")


@dataclass(frozen=True, slots=True)
class _Opened:
    """A model as it is pruned, and its directory with the names that the model gives tensors.

    What is made of its weights goes where `keep` says; None for memory.
    """

    model: nn.Module
    directory: ModelDir
    notes: tuple[str, ...]
    memory: str
    resources: Resources
    keep: Callable[[Tensor], Tensor] | None


@contextmanager
def _opened(job: _Job, memory_limit: int | None) -> Iterator[_Opened]:
    """Open the model as the memory allows."""
    require_batch_each(job.ranks.count, len(job.calibration.batches))
    directory, structure = job.directory, structure_of(job.directory, job.recipe)
    placement = job.placement(structure, memory_limit)
    memory = placement.sentence(job.device)
    log.info("pruning takes %s", memory)
    with _emptied(job.scratch) as scratch:
        model, unused = load_with_rest(
            directory,
            job.recipe,
            job.device,
            offload=scratch if placement.streamed else None,
            structure=structure,
        )
        if mapped := placement.streamed and job.maps:
            map_weights(model, scratch)
        for batch in job.calibration.batches[:1]:
            require_runs(model, batch, job.recipe.task, directory.path)
        named = replace(directory, renamed=renamed_tensors(directory, model, job.recipe))
        if (masks := open_masks(job.options)) is not None:
            fix_masks(model, read_masks(masks, model, named, job.recipe, job.options))
        yield _Opened(
            model,
            named,
            left_out(directory, model, job.recipe, unused),
            memory,
            Resources(
                keep=keeper(placement.states, scratch),
                streamed=placement.streamed and not mapped,
                look_ahead=job.options.reconstructs,
                ranks=job.ranks,
            ),
            MappedFiles(scratch).keep if mapped else None,
        )


@contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    """A folder that is empty at first, and removed in the end."""
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _pruned(
    job: _Job, opened: _Opened, progress: Progress
) -> tuple[PrunedState, Sensitivity | None]:
    """Prune the model of a directory in place, but for what is to stay dense or breaks a budget."""
    model, recipe, options = opened.model, job.recipe, job.options
    if options.method == "none":
        return PrunedState({}, {}, _all_dense(model, recipe)), None
    dense = left_dense(recipe, model, options)
    sensitivity: Sensitivity | None = None
    permuted = _permuted(job, opened, dense, progress)
    if options.has_budget:
        sensitivity = _sensitivity(job, opened, dense, progress)
        dense = {**dense, **over_budget(sensitivity)}
        permuted = permuted.without(model, dense)
    with tensor_cores(job.device):
        state = prune_model(
            model,
            recipe,
            job.calibration.batches,
            job.measured,
            options,
            stored_dtype=lambda name: stored_dtype(opened.directory, name),
            store=BlockStore(job.solved, opened.directory.require_untouched),
            progress=progress,
            dense=dense,
            resources=opened.resources,
        )
    _require_pruned(state, recipe, opened.directory.path)
    tensors = permuted.tensors(model)
    moved = {name: tensors[name] for name in tensors if name not in state.weights}
    return replace(
        state, moved=AsStored(moved, opened.directory), orders=permuted.orders
    ), sensitivity


def _permuted(job: _Job, opened: _Opened, dense: Mapping[str, str], progress: Progress) -> Permuted:
    """Put free channels of the model into a better order in place, where that is asked for."""
    if not job.permutes:
        return Permuted()
    return permute_channels(
        opened.model,
        job.recipe,
        thin(job.calibration, _ORDER_TOKENS),
        dense,
        has_tensor=lambda name: len(stored_names(opened.directory, name)) == 1,
        store=OrderStore(job.solved, opened.directory.require_untouched),
        progress=progress,
        ranks=job.ranks,
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
    job: _Job, opened: _Opened, dense: Mapping[str, str], progress: Progress
) -> Sensitivity:
    """Measure what each layer costs, once for all runs into one output, by process 0 alone."""
    store = SensitivityStore(job.solved)
    found = store.load() if job.ranks.writes else None
    if found is None and job.ranks.writes:
        found = measure_sensitivity(
            opened.model,
            job.recipe,
            job.calibration.batches,
            job.options,
            dense=dense,
            stored_dtype=lambda name: stored_dtype(opened.directory, name),
            progress=progress,
            keep=opened.keep,
        )
        opened.directory.require_untouched()
        store.save(found)
    told = job.ranks.told(found)
    assert told is not None, "process 0 has measured it"
    return told


def require_enough(options: PruneOptions, batches: int) -> None:
    """Refuse fewer batches of calibration text than the options take.

    Raises:
        CalibrationError: there is only one.
    """
    if options.reconstructs:
        require_batches(batches)
    if options.has_budget:
        require_two(batches)


@dataclass(frozen=True, slots=True)
class _BlockSolver:
    """How the targets of a block are solved."""

    options: PruneOptions
    stored_dtype: Callable[[str], torch.dtype]
    dense: Mapping[str, str]
    ranks: Ranks

    def solve(self, step: BlockStep) -> tuple[dict[str, Tensor], tuple[LayerRecord, ...]]:
        """Solve every target of one block; returns stored weights and records by layer path."""
        twin, sets, recipe, options = step.twin, step.sets, step.recipe, self.options
        layers, obstacles = prunable(twin, recipe, self.dense)
        records = [
            _skipped(f"{twin.prefix}.{name}", layer_at(twin.pruned, name), reason)
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
        records += [_skipped(f"{twin.prefix}.{n}", left[n], why) for n, why in reasons.items()]
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
                _apply(twin.pruned, done)
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
        _apply(twin.pruned, solved)
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
    return LayerRecord.skipped(name, matrix_shape(layer), reason)
