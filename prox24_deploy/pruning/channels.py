"""Channels inside the blocks of a model whose order is free, as its recipe declares them.

What a layer reads may come in any order if those who write it give it in that order: rows of the
writing layers, their biases and what lies between move along with the columns of the reading one.
The model computes the same, and nothing runs beside it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from prox24_deploy.config.recipe import Channels, Recipe
from prox24_deploy.core.errors import RecipeError
from prox24_deploy.model.blocks import find_blocks
from prox24_deploy.model.layers import Layer, is_layer, layer_at, reduction_axis
from prox24_deploy.pruning.selection import sharing, target_paths
from prox24_deploy.sparsity.pattern import GROUP


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeChannels:
    """What one layer reads, and where else the same channels lie.

    Attributes:
        rule: of the recipe.
        reader: path of the layer in the model.
        writers: paths of those whose output it reads.
        vectors: names of parameters and buffers between, with the channels along their last axis.
        heads: within which channels stay; 1 where they are all alike.
        width: channels of each.
        readers: heads of queries that read each head of values, one after another in the columns.
    """

    rule: Channels
    reader: str
    writers: tuple[str, ...]
    vectors: tuple[str, ...]
    heads: int
    width: int
    readers: int


@dataclass(frozen=True, slots=True)
class Move:
    """A tensor of the model whose slices along one axis go to other places.

    `written` says that they are rows of the weight of a layer that writes the channels.
    """

    name: str
    axis: int
    index: Tensor
    written: bool = False


def free_channels(
    model: nn.Module, recipe: Recipe, dense: Mapping[str, str]
) -> tuple[tuple[FreeChannels, ...], dict[str, str]]:
    """The free channels that pruned layers read, and the reason against each that is declared.

    Args:
        model: of the recipe.
        recipe: declares channels in its part of the model.
        dense: targets that stay dense, which gain nothing.

    Raises:
        RecipeError: a layer that is read has none that writes it.
    """
    shared = sharing(recipe, model)
    targets = {*target_paths(recipe, model)} - {*dense}
    found, against = [], {}
    for part in recipe.parts:
        for index, block in enumerate(find_blocks(model, part)):
            prefix = f"{part.blocks}.{index}"
            for rule, name, stars in _readers(block, part.channels):
                path = f"{prefix}.{name}"
                if path not in targets:
                    continue
                writers, vectors = _others(block, rule, stars, name)
                reason = _obstacle(block, (name, *writers), prefix, shared)
                made = reason or _fitted(model, block, rule, name, writers, vectors, index)
                if isinstance(made, str):
                    against[path] = made
                    continue
                heads, width, readers = made
                found.append(
                    FreeChannels(
                        rule=rule,
                        reader=path,
                        writers=tuple(f"{prefix}.{writer}" for writer in writers),
                        vectors=tuple(f"{prefix}.{vector}" for vector in vectors),
                        heads=heads,
                        width=width,
                        readers=readers,
                    )
                )
    return tuple(found), against


def moves(model: nn.Module, free: FreeChannels, order: Tensor) -> list[Move]:
    """Everything that an order of the channels, (heads, width), moves in the model."""
    order = order.to(next(model.parameters()).device)
    at = torch.arange(free.heads, device=order.device)[:, None] * free.width
    rows = (at + order).flatten()
    per_reader = torch.arange(free.heads * free.readers, device=order.device)[:, None] * free.width
    columns = (per_reader + order.repeat_interleave(free.readers, 0)).flatten()
    reader = layer_at(model, free.reader)
    found = [Move(f"{free.reader}.weight", reduction_axis(reader), columns)]
    for path in free.writers:
        layer = layer_at(model, path)
        index = _rows_of(layer, free.rule, rows)
        found.append(Move(f"{path}.weight", 1 - reduction_axis(layer), index, written=True))
        if layer.bias is not None:
            found.append(Move(f"{path}.bias", 0, index))
    found.extend(Move(name, -1, rows) for name in free.vectors)
    return found


@torch.no_grad()
def apply_moves(model: nn.Module, moved: Sequence[Move], *, back: bool = False) -> None:
    """Move slices of tensors, or move them back."""
    tensors = tensors_of(model)
    for move in moved:
        index = move.index.argsort() if back else move.index
        tensor = tensors[move.name]
        tensor.copy_(tensor.index_select(move.axis, index))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those that are tied under each of theirs."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def column_scores(layer: Layer, squares: Tensor, free: FreeChannels) -> Tensor:
    """What each weight that reads the channels is worth, (heads, rows, width): w² · E[x²].

    That is the square of Wanda's score (Sun et al. 2024, arXiv 2306.11695).

    Args:
        layer: the one that reads.
        squares: (columns,), sum of squares of each column of its input.
        free: its channels.
    """
    weight = layer.weight.detach().movedim(reduction_axis(layer), -1).flatten(0, -2)
    score = weight.square() * squares.to(weight)
    by_head: Tensor = score.unflatten(-1, (free.heads, free.readers, -1)).permute(1, 2, 0, 3)
    return by_head.flatten(1, 2)


def _readers(
    block: nn.Module, rules: Sequence[Channels]
) -> Iterator[tuple[Channels, str, tuple[str, ...]]]:
    """Layers of a block that a rule names as readers, and what the stars stand for."""
    names = [name for name, module in block.named_modules() if is_layer(module)]
    for rule in rules:
        pattern = re.compile("(.*)".join(map(re.escape, rule.reads.split("*"))))
        for name in names:
            if match := pattern.fullmatch(name):
                yield rule, name, match.groups()


def _others(
    block: nn.Module, rule: Channels, stars: Sequence[str], reader: str
) -> tuple[list[str], list[str]]:
    """Layers that write the channels of a reader, and vectors between."""
    layers = [name for name, module in block.named_modules() if is_layer(module)]
    writers = []
    for glob in (_filled(glob, stars) for glob in rule.writes):
        named = [name for name in layers if fnmatch(name, glob)]
        if not named:
            raise RecipeError(
                f"[[channels]] of {rule.reads!r} says that {glob!r} writes what {reader} reads, "
                f"which matches no layer; its layers are {', '.join(layers)}."
            )
        writers += named
    globs = [_filled(glob, stars) for glob in rule.vectors]
    vectors = [
        name
        for name, tensor in tensors_of(block).items()
        if tensor.ndim and any(fnmatch(name, glob) for glob in globs)
    ]
    return writers, vectors


def _filled(glob: str, stars: Sequence[str]) -> str:
    """A glob with what its first stars stand for; further ones stay."""
    for star in stars:
        glob = glob.replace("*", star, 1)
    return glob


def _obstacle(
    block: nn.Module, names: Sequence[str], prefix: str, shared: Mapping[str, str]
) -> str:
    """Why the channels of these layers cannot be moved, "" if they can."""
    for path in (f"{prefix}.{name}" for name in names):
        if path in shared:
            return f"{path} {shared[path]}"
    grouped = [name for name in names if getattr(layer_at(block, name), "groups", 1) > 1]
    return f"{grouped[0]} is a convolution in groups of channels" if grouped else ""


def _fitted(
    model: nn.Module,
    block: nn.Module,
    rule: Channels,
    reader: str,
    writers: Sequence[str],
    vectors: Sequence[str],
    index: int,
) -> tuple[int, int, int] | str:
    """Heads, channels of each and heads that read each; or why the layers do not fit together."""
    layer = layer_at(block, reader)
    columns = layer.weight.shape[reduction_axis(layer)]
    counts = {_channels_of(layer_at(block, writer), rule, columns) for writer in writers}
    queries = 1 if rule.heads is None else _heads(model, rule.heads, index)
    written = max(counts)
    if len(counts) > 1 or min(queries, written) < 1 or columns % queries:
        return f"{', '.join(writers)} do not write the {columns} channels that {reader} reads"
    width = columns // queries if rule.heads else written
    if written % width or columns % written:
        return f"{', '.join(writers)} do not write the {columns} channels that {reader} reads"
    tensors = tensors_of(block)
    if other := [name for name in vectors if tensors[name].shape[-1] != written]:
        return f"{other[0]} is {tuple(tensors[other[0]].shape)}, expected {written} channels"
    if width % GROUP:
        return f"{width} channels do not divide into groups of four"
    return written // width, width, columns // written


def _heads(model: nn.Module, key: str, index: int) -> int:
    """Heads of queries by the configuration of the model; 0 where it does not say."""
    config: Any = model.config
    value = getattr(config, key, 0)
    if isinstance(value, list | tuple):
        value = value[index] if index < len(value) else 0
    return int(value) if isinstance(value, int) else 0


def _channels_of(layer: Layer, rule: Channels, columns: int) -> int:
    """How many channels a writing layer has; those of values lie behind as many keys."""
    rows = layer.weight.shape[1 - reduction_axis(layer)]
    if rule.rows == "values":
        return (rows - columns) // 2
    return rows // 2 if rule.rows == "halves" else rows


def _rows_of(layer: Layer, rule: Channels, rows: Tensor) -> Tensor:
    """Where the rows of a writing layer go."""
    total = layer.weight.shape[1 - reduction_axis(layer)]
    if rule.rows == "halves":
        return torch.cat([rows, rows + len(rows)])
    if rule.rows == "values":
        first = total - len(rows)
        return torch.cat([torch.arange(first, device=rows.device), rows + first])
    return rows
