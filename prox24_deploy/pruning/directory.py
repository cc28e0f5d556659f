"""Prune a model directory: open it as the memory allows, permute, solve block by block, write."""

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from prox24_deploy.config.options import PruneOptions
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.atomic import make_folder
from prox24_deploy.core.errors import RecipeError, UsageError
from prox24_deploy.core.records import LayerRecord, PruneResult, Sensitivity
from prox24_deploy.core.types import Progress, silent
from prox24_deploy.data.text import thin
from prox24_deploy.model.batch import Batch, Samples
from prox24_deploy.model.blocks import require_runs
from prox24_deploy.model.checkpoint import (
    AsStored,
    BlockStore,
    renamed_tensors,
    stored_dtype,
    stored_names,
    write_pruned,
)
from prox24_deploy.model.directory import ModelDir, load_with_rest, structure_of
from prox24_deploy.model.layers import layer_at
from prox24_deploy.model.mapped import MappedFiles, map_weights
from prox24_deploy.model.notes import left_out
from prox24_deploy.pruning.activations import Resources
from prox24_deploy.pruning.block import skip
from prox24_deploy.pruning.hidden_states import keeper
from prox24_deploy.pruning.masks import fix_masks, open_masks, read_masks
from prox24_deploy.pruning.memory import Placement, needs_of, place, require_disk, room_on
from prox24_deploy.pruning.permutation import OrderStore, Permuted, permute_channels
from prox24_deploy.pruning.prune import PrunedState, layers_outside, prune_model
from prox24_deploy.pruning.ranks import ALONE, Ranks, require_batch_each
from prox24_deploy.pruning.selection import left_dense, target_paths
from prox24_deploy.pruning.sensitivity import SensitivityStore, measure_sensitivity, over_budget
from prox24_deploy.pruning.solvers.problem import damping_for
from prox24_deploy.pruning.solvers.products import tensor_cores

log = logging.getLogger(__name__)

# Held-out text for the error of each layer; the accuracy figures use all of it.
_HELD_OUT_TOKENS = 8192
# Text that tells how large the inputs of each layer are, by which their channels are ordered.
_ORDER_TOKENS = 16384


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

    What is made of its weights goes where `keep_weight` says; None for memory.
    """

    model: nn.Module
    directory: ModelDir
    notes: tuple[str, ...]
    memory: str
    resources: Resources
    keep_weight: Callable[[Tensor], Tensor] | None


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
            keep_weight=opened.keep_weight,
        )
        opened.directory.require_untouched()
        store.save(found)
    told = job.ranks.told(found)
    assert told is not None, "process 0 has measured it"
    return told


def _all_dense(model: nn.Module, recipe: Recipe) -> tuple[LayerRecord, ...]:
    reason = "nothing is pruned with --method none"
    targets = [skip(name, layer_at(model, name), reason) for name in target_paths(recipe, model)]
    return (*targets, *layers_outside(model, recipe, {record.name for record in targets}))
