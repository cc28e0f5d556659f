"""Stage: write a dense model that computes what another does, in a basis that suits 2:4 better."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from prox24_deploy.config.recipe import RECIPE_FILE, Recipe
from prox24_deploy.core.atomic import appearing, copy_file, write_atomic
from prox24_deploy.core.errors import ModelDirError, RecipeError, UsageError
from prox24_deploy.core.host import gib_free, gib_needed
from prox24_deploy.core.rotation import ROTATION_FILE, RotateResult
from prox24_deploy.core.types import Progress
from prox24_deploy.data.text import thin
from prox24_deploy.model.batch import Batch, Samples
from prox24_deploy.model.blocks import real_rows, require_runs, run_model
from prox24_deploy.model.checkpoint import AsStored, checkpoint_name, stored_names, write_pruned
from prox24_deploy.model.config_file import CONFIG_FILE, read_config
from prox24_deploy.model.directory import (
    ModelDir,
    load_model,
    load_with_rest,
    open_model_dir,
    structure_of,
)
from prox24_deploy.model.offload import device_of, float_bytes, free_on, logits_bytes
from prox24_deploy.pruning.solvers.products import float32_products, tensor_cores
from prox24_deploy.rotation.learning import learned, score_of, sides_of
from prox24_deploy.rotation.stream import ResidualStream, find_stream, fold_norms, rotate_stream

log = logging.getLogger(__name__)

# Text that tells how large inputs and outputs of each layer are.
TOKENS = 16384
# Largest difference of predictions, over the largest: rounding in float32 is far below, and a model
# in which something else reads the stream far above; so is a model that is stored in 16 bits.
_ROUNDING, _STORED = 1e-3, 0.25
# Square matrices of the stream's width that the search and its end hold at most, copies of the rows
# of a layer that a step looks at, and predictions of a batch.
_SQUARES, _COPIES, _PREDICTIONS = 20, 3, 4


@torch.no_grad()
def rotate_directory(
    directory: ModelDir,
    recipe: Recipe,
    samples: Samples,
    out: Path,
    *,
    device: torch.device,
    memory_limit: int | None,
    steps: int,
    progress: Progress,
) -> RotateResult:
    """Write a model directory that computes what another does, with its residual stream rotated.

    Args:
        directory: the dense model.
        recipe: of its family, which declares the stream.
        samples: text to search on.
        out: a folder that is not there yet.
        device: where the model is and the rotation is searched.
        memory_limit: bytes that may be taken there; None for all that are free.
        steps: of the search, one or more.
        progress: called with ("rotate", done, total).

    Raises:
        ModelDirError: the model does not run, or the directory was written meanwhile.
        RecipeError: it declares no stream, or not all of it.
        UsageError: there is too little memory, 2:4 drops no less, or the precision of the
            checkpoint does not hold the weights.
    """
    began = time.perf_counter()
    batches = thin(samples, TOKENS)
    _require_memory(directory, recipe, batches, device, memory_limit)
    with appearing(out) as made:
        # The model is gone before it is read back, for two may not fit.
        first, turned = _written(directory, recipe, batches, made, device, steps, progress)
        stored = _predicted(load_model(open_model_dir(made), recipe, device), batches[0], recipe)
        rounded = _departure(first, stored)
        _require_stored(rounded, directory)
        result = RotateResult(
            **asdict(turned),
            source_sha256=directory.sha256,
            rounded=rounded,
            agreement=float((first.argmax(-1) == stored.argmax(-1)).float().mean()),
            device=device.type,
            seconds=time.perf_counter() - began,
        )
        directory.require_untouched()
        write_atomic(made / ROTATION_FILE, f"{json.dumps(asdict(result), indent=2)}\n".encode())
    return result


def _require_stored(rounded: float, directory: ModelDir) -> None:
    if not rounded <= _STORED:
        raise ModelDirError(
            f"{directory.path}, rotated and read back from disk, predicts {rounded:.1g} of the "
            "largest value otherwise; its config.json is not understood, so build it as it is."
        )


def _require_memory(
    directory: ModelDir,
    recipe: Recipe,
    batches: Sequence[Batch],
    device: torch.device,
    limit: int | None,
) -> None:
    structure = structure_of(directory, recipe)
    stream = find_stream(structure, recipe)
    layers = [*stream.writers, *(layer for each in stream.readings for layer in each.layers)]
    widest = max(layer.weight.numel() for layer in layers)
    squares = len(stream.readings) + _SQUARES
    # Those of a GPU are brought to the host one by one.
    predictions = _PREDICTIONS if device.type == "cpu" else 2
    needed = (
        float_bytes(structure)
        + 4 * (stream.tables[0].weight.numel() + squares * stream.width**2 + _COPIES * widest)
        + predictions * logits_bytes(structure, batches[:1])
    )
    if needed > (free := free_on(device, limit)):
        raise UsageError(
            f"Rotating {directory.path} takes the whole model in memory, about "
            f"{gib_needed(needed)} on {device.type}, and {gib_free(free)} are free or allowed by "
            "--memory-limit; take a larger device, or build the model as it is."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turned:
    """What was done to a model; a part of `RotateResult`."""

    channels: int
    gained: int
    tokens: int
    steps: int
    dropped_before: float
    dropped_after: float
    difference: float


def _written(
    directory: ModelDir,
    recipe: Recipe,
    batches: Sequence[Batch],
    out: Path,
    device: torch.device,
    steps: int,
    progress: Progress,
) -> tuple[Tensor, _Turned]:
    """Write the rotated model as `out`; what the dense one predicts, and what was done."""
    model, unused = load_with_rest(directory, recipe, device)
    if unused:
        log.warning(
            "%s has tensors that its model has no place for, which stay as they are: %s",
            directory.path, ", ".join(unused),
        )  # fmt: skip
    require_runs(model, batches[0], recipe.task, directory.path)
    first = _predicted(model, batches[0], recipe)
    if not bool(first.isfinite().all()):
        raise ModelDirError(
            f"{directory.path} predicts NaN or infinity; restore a sound checkpoint."
        )
    stream = find_stream(model, recipe)
    gained = fold_norms(stream)
    _require_free(model, stream, batches[0], recipe, first)
    before, after = _turned(model, stream, recipe, batches, steps, progress)
    difference = _departure(first, _predicted(model, batches[0], recipe))
    _require_alike(difference, recipe)
    _write(directory, stream, model, out, untied=gained > 0)
    return first, _Turned(
        channels=stream.width,
        gained=gained,
        tokens=sum(int(batch.real.sum()) for batch in batches),
        steps=steps,
        dropped_before=before,
        dropped_after=after,
        difference=difference,
    )


def _require_free(
    model: nn.Module, stream: ResidualStream, batch: Batch, recipe: Recipe, first: Tensor
) -> None:
    """Refuse a stream that is not free, by a rotation far from the identity, before the search."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(stream.width, stream.width, dtype=torch.float64, generator=draw)
    turn: Tensor = torch.linalg.qr(noise)[0].to(device_of(model))
    rotate_stream(stream, turn)
    difference = _departure(first, _predicted(model, batch, recipe))
    rotate_stream(stream, turn.T)
    _require_alike(difference, recipe)


def _require_alike(difference: float, recipe: Recipe) -> None:
    # NaN is no agreement.
    if not difference <= _ROUNDING:
        raise RecipeError(
            f"With its residual stream rotated by recipe {recipe.family} the model predicts "
            f"{difference:.1g} of the largest value otherwise, which is more than rounding: "
            "something reads or writes the stream that [stream] does not name, or one of what it "
            "names does not; correct it, or build the model as it is."
        )


def _predicted(model: nn.Module, batch: Batch, recipe: Recipe) -> Tensor:
    """Logits of the real tokens of a batch, (tokens, vocabulary), on the CPU."""
    logits: Tensor = run_model(model, batch, recipe.task).logits
    return real_rows(logits, batch.real).float().cpu()


def _departure(first: Tensor, second: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((first - second).abs_().max() / torch.maximum(first.max(), -first.min()))


def _turned(
    model: nn.Module,
    stream: ResidualStream,
    recipe: Recipe,
    batches: Sequence[Batch],
    steps: int,
    progress: Progress,
) -> tuple[float, float]:
    """Rotate a stream behind which norms are folded, in place; what 2:4 drops before and after."""
    device = device_of(model)
    with tensor_cores(device):
        sides = sides_of(model, stream, batches, recipe.task)
        if not sides:
            raise UsageError("No layer of the blocks gives anything but zeros; there is no search.")
        turn = learned(sides, stream.width, steps, progress)
    with float32_products():
        before = score_of(sides, torch.eye(stream.width, device=device))
        after = score_of(sides, turn.float())
    if not after < before:
        raise UsageError(
            f"After {steps} steps 2:4 drops {after:.2%} of what layers compute, and {before:.2%} "
            "as the model is; take other --steps, or build it as it is."
        )
    # With its sums over inputs, which are large.
    del sides
    rotate_stream(stream, turn)
    return before, after


def _write(
    directory: ModelDir, stream: ResidualStream, model: nn.Module, out: Path, *, untied: bool
) -> None:
    """Write the model in the precision of the checkpoint, beside all else that the latter has."""
    own = {id(layer.weight) for layer in stream.last.layers} if untied else set()
    table = next(n for n, p in model.named_parameters() if p is stream.tables[0].weight)
    stored, added = {}, {}
    for name, parameter in model.named_parameters():
        missing = id(parameter) in own and not stored_names(directory, name)
        dtype = directory.tensors[checkpoint_name(directory, table if missing else name)].dtype
        if not bool(parameter.to(dtype).isfinite().all()):
            raise UsageError(
                f"{dtype} does not hold the rotated weight {name}; convert {directory.path} to "
                "bfloat16 or float32 first."
            )
        if missing:
            added[name] = parameter.to(dtype)
        else:
            stored[name] = parameter
    write_pruned(directory, {}, out, dense=AsStored(stored, directory), added=added)
    if (recipe := directory.path / RECIPE_FILE).is_file():
        copy_file(recipe, out / RECIPE_FILE)
    if untied:
        config = read_config(directory.path) | {"tie_word_embeddings": False}
        write_atomic(out / CONFIG_FILE, f"{json.dumps(config, indent=2)}\n".encode())
