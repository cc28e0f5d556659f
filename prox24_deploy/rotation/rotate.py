"""Stage: write a dense model that computes what another does, in a basis that suits 2:4 better."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.atomic import (
    appearing,
    copy_file,
    make_folder,
    make_readable,
    write_atomic,
    writing,
)
from prox24_deploy.core.errors import RecipeError, UsageError
from prox24_deploy.core.host import gib
from prox24_deploy.core.rotation import ROTATION_FILE, RotateResult
from prox24_deploy.core.types import Progress
from prox24_deploy.data.text import thin
from prox24_deploy.model.batch import Batch, Samples
from prox24_deploy.model.blocks import real_rows, run_model
from prox24_deploy.model.checkpoint import stored_names
from prox24_deploy.model.config_file import CONFIG_FILE, read_config
from prox24_deploy.model.directory import (
    CARD_FILE,
    ModelDir,
    companion_files,
    load_model,
    open_model_dir,
    quiet_transformers,
    structure_of,
)
from prox24_deploy.model.dtypes import settled_dtype
from prox24_deploy.model.offload import device_of, float_bytes, free_on, logits_bytes
from prox24_deploy.pruning.solvers.products import float32_products, tensor_cores
from prox24_deploy.rotation.learning import learned, score_of, sides_of
from prox24_deploy.rotation.stream import find_stream, fold_norms, rotate_stream

# Text that tells how large inputs and outputs of each layer are.
_TOKENS = 16384
# Largest difference of predictions, over the largest: rounding in float32 is far below, and a model
# in which something else reads the stream far above.
_ROUNDING = 1e-3
# Square matrices of the stream's width, and copies of the rows of a layer that are looked at, which
# a step of the search holds at most.
_SQUARES, _COPIES = 10, 3


@torch.no_grad()
def rotate_directory(
    directory: ModelDir,
    recipe: Recipe,
    samples: Samples,
    out: Path,
    *,
    device: torch.device,
    memory_limit: int | None,
    turns: int,
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
        turns: steps of the search, one or more.
        progress: called with ("rotate", done, total).

    Raises:
        ModelDirError: the directory was written meanwhile.
        RecipeError: it declares no stream, or not all of it.
        UsageError: there is too little memory, or 2:4 drops no less.
    """
    began = time.perf_counter()
    batches = thin(samples, _TOKENS)
    _require_memory(directory, recipe, batches, device, memory_limit)
    with appearing(out) as made:
        # The model is gone before it is read back, for two may not fit.
        first, turned = _written(directory, recipe, batches, made, device, turns, progress)
        stored = _predicted(load_model(open_model_dir(made), recipe, device), batches[0], recipe)
        result = RotateResult(
            **asdict(turned),
            source_sha256=directory.sha256,
            rounded=_departure(first, stored),
            agreement=float((first.argmax(-1) == stored.argmax(-1)).float().mean()),
            device=device.type,
            seconds=time.perf_counter() - began,
        )
        directory.require_untouched()
        write_atomic(made / ROTATION_FILE, f"{json.dumps(asdict(result), indent=2)}\n".encode())
    return result


def _require_memory(
    directory: ModelDir,
    recipe: Recipe,
    batches: Sequence[Batch],
    device: torch.device,
    limit: int | None,
) -> None:
    structure = structure_of(directory, recipe)
    stream = find_stream(structure, recipe)
    width = stream.width
    layers = [*stream.writers, *(layer for each in stream.readings for layer in each.layers)]
    widest = max(layer.weight.numel() for layer in layers)
    squares = len(stream.readings) + _SQUARES
    needed = (
        float_bytes(structure)
        + 4 * (stream.tables[0].weight.numel() + squares * width**2 + _COPIES * widest)
        + 2 * logits_bytes(structure, batches)
    )
    if needed > (free := free_on(device, limit)):
        raise UsageError(
            f"Rotating {directory.path} takes the whole model in memory, about {gib(needed)} on "
            f"{device.type}, and {gib(free)} are free or allowed by --memory-limit; take a larger "
            "device, or build the model as it is."
        )


def _require_alike(difference: float, directory: ModelDir, recipe: Recipe) -> None:
    # NaN is no agreement.
    if not difference <= _ROUNDING:
        raise RecipeError(
            f"With its residual stream rotated by recipe {recipe.family}, {directory.path} "
            f"predicts {difference:.1g} of the largest value otherwise, which is more than "
            "rounding: something reads or writes the stream that [stream] does not name."
        )


def _predicted(model: nn.Module, batch: Batch, recipe: Recipe) -> Tensor:
    """Logits of the real tokens of a batch, (tokens, vocabulary), on the CPU."""
    logits: Tensor = run_model(model, batch, recipe.task).logits
    return real_rows(logits, batch.real).float().cpu()


def _departure(first: Tensor, second: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((first - second).abs().max() / first.abs().max())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turned:
    """What was done to a model; a part of `RotateResult`."""

    channels: int
    gained: int
    tokens: int
    turns: int
    dropped_before: float
    dropped_after: float
    difference: float = math.nan


def _written(
    directory: ModelDir,
    recipe: Recipe,
    batches: Sequence[Batch],
    out: Path,
    device: torch.device,
    turns: int,
    progress: Progress,
) -> tuple[Tensor, _Turned]:
    """Write the rotated model into `out`; what the dense one predicts, and what was done."""
    model = load_model(directory, recipe, device)
    first = _predicted(model, batches[0], recipe)
    turned = _turned(model, recipe, batches, turns, progress)
    difference = _departure(first, _predicted(model, batches[0], recipe))
    _require_alike(difference, directory, recipe)
    _write(directory, recipe, model, out, untied=turned.gained > 0)
    return first, replace(turned, difference=difference)


def _turned(
    model: nn.Module, recipe: Recipe, batches: Sequence[Batch], turns: int, progress: Progress
) -> _Turned:
    """Rotate the residual stream of a model in place."""
    stream = find_stream(model, recipe)
    gained, device = fold_norms(stream), device_of(model)
    with tensor_cores(device):
        sides = sides_of(model, stream, batches, recipe.task)
        if not sides:
            raise RecipeError("No layer that reads or writes the residual stream gives anything.")
        turn = learned(sides, stream.width, turns, progress)
    with float32_products():
        before = score_of(sides, torch.eye(stream.width, device=device))
        after = score_of(sides, turn.float())
    if not after < before:
        raise UsageError(
            f"In the best basis that was found 2:4 drops {after:.2%} of what layers compute, and "
            f"{before:.2%} as the model is; build it as it is."
        )
    rotate_stream(stream, turn)
    return _Turned(
        channels=stream.width,
        gained=gained,
        tokens=sum(int(batch.real.sum()) for batch in batches),
        turns=turns,
        dropped_before=before,
        dropped_after=after,
    )


def _write(
    directory: ModelDir, recipe: Recipe, model: nn.Module, out: Path, *, untied: bool
) -> None:
    """Write the model in the precision of the checkpoint, and what lies beside its weights."""
    usual = getattr(torch, settled_dtype(directory, recipe, None))
    for name, parameter in model.named_parameters():
        stored = stored_names(directory, name)
        dtype = directory.tensors[stored[0]].dtype if len(stored) == 1 else usual
        parameter.data = parameter.data.to(dtype)
    saving: Any = model
    quiet_transformers()
    with writing(out):
        saving.save_pretrained(out)
    make_readable(out, ".")
    # In the words of the dense model, which need not be those of the library of today.
    for file in companion_files(directory.path):
        if file.name != CARD_FILE:
            target = out / file.relative_to(directory.path)
            make_folder(target.parent)
            copy_file(file, target)
    if untied:
        own = read_config(directory.path) | {"tie_word_embeddings": False}
        write_atomic(out / CONFIG_FILE, f"{json.dumps(own, indent=2)}\n".encode())
