"""The residual stream of a decoder as its recipe declares it, and its change to another basis.

Behind a norm without a mean and without weights of its own, which the layers that read it take
over, a model computes the same with its residual stream in any orthonormal basis Q: embeddings E Q,
layers that read the stream W Q, layers that write it Qᵀ W.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from prox24_deploy.config.recipe import NormReaders, Recipe
from prox24_deploy.core.errors import RecipeError
from prox24_deploy.model.blocks import find_blocks

_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Reading:
    """A norm with a weight for each channel, and the layers that read what it gives."""

    norm: nn.Module
    layers: tuple[nn.Linear, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualStream:
    """Everything that reads or writes the residual stream of a model.

    Attributes:
        tables: embeddings, (tokens, channels).
        readings: in the blocks, in the order of the model.
        last: behind the last block.
        writers: layers of the blocks, (channels, inputs).
    """

    tables: tuple[nn.Embedding, ...]
    readings: tuple[Reading, ...]
    last: Reading
    writers: tuple[nn.Linear, ...]

    @property
    def width(self) -> int:
        """Its channels."""
        return self.tables[0].embedding_dim


def find_stream(model: nn.Module, recipe: Recipe) -> ResidualStream:
    """The residual stream of a model.

    Raises:
        RecipeError: the recipe declares none, or not that of this model.
    """
    if (declared := recipe.stream) is None:
        raise RecipeError(
            f"Recipe {recipe.family} does not declare a residual stream for {recipe.task} "
            "([stream]), so that it cannot be rotated; build the model as it is."
        )
    readings, writers = [], []
    for block in find_blocks(model, recipe):
        readings += [_reading(block, each, recipe) for each in declared.norms]
        writers += [layer for path in declared.writes for layer in _linear(block, path, recipe)]
    tables = [_table(model, path, recipe) for path in declared.tables]
    found = ResidualStream(
        tables=tuple(tables),
        readings=tuple(readings),
        last=_reading(model, declared.last, recipe),
        writers=tuple(writers),
    )
    _require_widths(found, recipe)
    return found


def _module(root: nn.Module, path: str, recipe: Recipe) -> Any:
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise RecipeError(
            f"Recipe {recipe.family}, [stream]: {type(root).__name__} has no {path}; correct it."
        ) from error


def _table(model: nn.Module, path: str, recipe: Recipe) -> nn.Embedding:
    table = _module(model, path, recipe)
    if not isinstance(table, nn.Embedding):
        raise RecipeError(
            f"Recipe {recipe.family}, [stream]: {path} is a {type(table).__name__}, expected an "
            "embedding; correct `tables`."
        )
    return table


def _reading(root: nn.Module, declared: NormReaders, recipe: Recipe) -> Reading:
    norm = _module(root, declared.norm, recipe)
    names = [name for name, _ in norm.named_parameters()]
    if names != ["weight"] or norm.weight.ndim != 1:
        raise RecipeError(
            f"Recipe {recipe.family}, [stream]: {declared.norm} is a {type(norm).__name__} with "
            f"the parameters {names}, expected a norm without a mean, with one weight a channel; "
            "such a stream cannot be rotated."
        )
    layers = [layer for path in declared.reads for layer in _linear(root, path, recipe)]
    return Reading(norm, tuple(layers))


def _linear(root: nn.Module, pattern: str, recipe: Recipe) -> Iterator[nn.Linear]:
    named = [(name, module) for name, module in root.named_modules() if fnmatch(name, pattern)]
    layers = [module for _, module in named if isinstance(module, nn.Linear)]
    if not layers or len(layers) != len(named):
        raise RecipeError(
            f"Recipe {recipe.family}, [stream]: {pattern} names no linear layer of a "
            f"{type(root).__name__}, or others too; correct it."
        )
    yield from layers


def _require_widths(found: ResidualStream, recipe: Recipe) -> None:
    widths = {table.weight.shape[-1] for table in found.tables}
    widths |= {len(writer.weight) for writer in found.writers}
    for reading in (*found.readings, found.last):
        widths |= {len(reading.norm.get_parameter("weight"))}
        widths |= {layer.weight.shape[1] for layer in reading.layers}
    if len(widths) != 1 or next(iter(widths)) % 4:
        raise RecipeError(
            f"Recipe {recipe.family}, [stream]: what reads and writes it has {sorted(widths)} "
            "channels, expected one multiple of four; correct what does not belong to it."
        )


@torch.no_grad()
def fold_norms(stream: ResidualStream) -> int:
    """Let layers take over the weights of the norms that they read, in place.

    A layer that shares its weight with a table gets one of its own.

    Returns:
        How many weights the model has gained by that.
    """
    shared = {id(table.weight) for table in stream.tables}
    gained = 0
    for reading in (*stream.readings, stream.last):
        weight = reading.norm.get_parameter("weight")
        for layer in reading.layers:
            if id(layer.weight) in shared:
                layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
                gained += layer.weight.numel()
            layer.weight.mul_(weight)
        weight.fill_(1.0)
    return gained


@torch.no_grad()
def rotate_stream(stream: ResidualStream, turn: Tensor) -> None:
    """Change the basis of a stream behind which norms are folded, in place.

    Args:
        stream: of a float32 model.
        turn: Q, (channels, channels), orthonormal, float64.
    """
    readers = [layer for each in (*stream.readings, stream.last) for layer in each.layers]
    modules: list[nn.Embedding | nn.Linear] = [*stream.tables, *readers]
    for module in modules:
        _turn_rows(module.weight, turn)
    for writer in stream.writers:
        _turn_rows(writer.weight.T, turn)
        if writer.bias is not None:
            _turn_rows(writer.bias[None], turn)


def _turn_rows(matrix: Tensor, turn: Tensor) -> None:
    """Multiply by Q, (rows, channels), in place; some rows at a time, for tables are long."""
    for rows in matrix.split(_ROWS):
        rows.copy_(rows.double() @ turn)
