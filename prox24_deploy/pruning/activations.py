"""Batches on their way through the blocks, in the dense and in the pruned model side by side."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor, nn

from prox24_deploy.config.recipe import Recipe
from prox24_deploy.model.batch import Batch
from prox24_deploy.model.blocks import (
    BlockCall,
    calls_do_without_blocks,
    expert_inputs,
    find_blocks,
    is_handed,
    layer_input,
    layer_input_and_output,
    layer_runs,
    real_rows,
    real_tokens,
    record_calls,
    require_one_run,
    run_block,
    skipping,
)
from prox24_deploy.model.experts import experts_of, place_of
from prox24_deploy.model.layers import Layer, layer_at, matrix_shape
from prox24_deploy.model.offload import bring, device_of, drop
from prox24_deploy.pruning.hidden_states import HiddenStates, Keep, keep_on_device
from prox24_deploy.pruning.ranks import ALONE, Ranks
from prox24_deploy.pruning.second_moments import SecondMoments


@dataclass(slots=True)
class Activations:
    """One set of batches before some block.

    Attributes:
        batches: the text.
        real: per batch, which positions of the hidden states are not padding.
        calls: per batch, what the dense model passes to each block beside the hidden states.
        pruned_calls: what the partly pruned model passes; the same, unless these are the blocks of
            a decoder, whose encoder has been pruned before.
        dense: per batch, hidden states (batch, sequence, hidden) in the dense model.
        pruned: the same in the partly pruned model.
        dense_is_ahead: whether `dense` is behind the block already, see `collect`.
    """

    batches: tuple[Batch, ...]
    real: list[Tensor]
    calls: list[list[BlockCall]]
    pruned_calls: list[list[BlockCall]]
    dense: HiddenStates
    pruned: HiddenStates
    dense_is_ahead: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPair:
    """One block twice: as it was, and being pruned.

    Attributes:
        index: of the block among its likes.
        prefix: its path in the model.
        dense: as it was.
        pruned: being pruned.
        following: the next block, not yet pruned; None after the last.
    """

    index: int
    prefix: str
    dense: nn.Module
    pruned: nn.Module
    following: nn.Module | None = None


def record_activations(
    model: nn.Module,
    blocks: nn.ModuleList,
    recipe: Recipe,
    batches: tuple[Batch, ...],
    *,
    name: str = "",
    keep: Keep = keep_on_device,
    known: bool = False,
) -> Activations:
    """Run the batches up to the first block of a model of which nothing is pruned yet.

    Args:
        model: dense.
        blocks: to be run one by one.
        recipe: of the part of the model that they are.
        batches: samples.
        name: tells these streams from others that are kept.
        keep: where hidden states are kept.
        known: that the model runs each block once, from other batches.

    Raises:
        RecipeError: the model runs a block more than once, or not at all.
    """
    for batch in () if known else batches[:1]:
        require_one_run(model, blocks, batch, recipe)
    recorded = _recorded(model, blocks, recipe, batches)
    hidden = [first for first, _ in recorded]
    calls = [calls for _, calls in recorded]
    real = [_positions(batch, recipe) for batch in batches]
    dense, pruned = (keep(f"{name}-{stream}", hidden) for stream in ("dense", "pruned"))
    return Activations(batches, real, calls, calls, dense, pruned)


def _recorded(
    model: nn.Module, blocks: nn.ModuleList, recipe: Recipe, batches: Sequence[Batch]
) -> list[tuple[Tensor, list[BlockCall]]]:
    """The input of the first block and the calls of all, for each batch.

    Blocks run only where the calls of later ones depend on it, as found out on the first batch.
    """
    task = recipe.task
    found = [record_calls(model, blocks, batch, task) for batch in batches[:1]]
    if not batches[1:]:
        return found
    skips = calls_do_without_blocks(model, blocks, batches[0], task, found[0])
    with skipping(blocks) if skips else nullcontext():
        return found + [record_calls(model, blocks, batch, task) for batch in batches[1:]]


def after_pruning(
    activations: Activations,
    model: nn.Module,
    blocks: nn.ModuleList,
    recipe: Recipe,
    *,
    name: str = "",
    keep: Keep = keep_on_device,
) -> Activations:
    """The same with what the model, pruned up to these blocks, passes to them and into the first.

    The dense stream stays as it was recorded, when the whole model was dense.
    """
    recorded = _recorded(model, blocks, recipe, activations.batches)
    return replace(
        activations,
        pruned_calls=[calls for _, calls in recorded],
        pruned=keep(f"{name}-again", [first for first, _ in recorded]),
    )


def advance(twin: BlockPair, sets: Sequence[Activations]) -> None:
    """Carry both streams of every set through the block."""
    for activations in sets:
        for i, (calls, pruned_calls) in enumerate(
            zip(activations.calls, activations.pruned_calls, strict=True)
        ):
            if not activations.dense_is_ahead:
                activations.dense[i] = run_block(
                    twin.dense, calls[twin.index], activations.dense[i]
                )
            activations.pruned[i] = run_block(
                twin.pruned, pruned_calls[twin.index], activations.pruned[i]
            )
        activations.dense_is_ahead = False


def input_pairs(
    twin: BlockPair, name: str, activations: Activations, *, dense_goes_on: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows (tokens, d) that a layer reads in the dense and in the pruned block, batch by batch.

    If the dense stream goes on, it is behind the block once all batches have been asked for. It
    does not for a layer of an expert, see `expert_pairs`.
    """
    for (pair,) in _wave_pairs(twin, [name], activations, dense_goes_on=dense_goes_on):
        yield pair


def _wave_pairs(
    twin: BlockPair, names: Sequence[str], activations: Activations, *, dense_goes_on: bool
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """As `input_pairs`, for layers that take the same passes: one layer, or some of experts."""
    if place_of(twin.pruned, names[0]) is not None:
        yield from expert_pairs(twin, names, activations)
        return
    (name,) = names
    for pair in _layer_pairs(twin, name, activations, dense_goes_on=dense_goes_on):
        yield [pair]


def _layer_pairs(
    twin: BlockPair, name: str, activations: Activations, *, dense_goes_on: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """As `input_pairs`, for a layer that reads all tokens of its block."""
    dense_layer, pruned_layer = (layer_at(block, name) for block in (twin.dense, twin.pruned))
    for i, batch in enumerate(activations.batches):
        call, pruned_call = (
            activations.calls[i][twin.index],
            activations.pruned_calls[i][twin.index],
        )
        hidden = activations.dense[i]
        if dense_goes_on:
            dense, activations.dense[i] = layer_input_and_output(
                twin.dense, call, hidden, dense_layer
            )
        else:
            dense = layer_input(twin.dense, call, hidden, dense_layer)
        pruned = layer_input(twin.pruned, pruned_call, activations.pruned[i], pruned_layer)
        # A decoder's layer that is fed the states of the encoder sees the positions of that text.
        real = batch.real if is_handed(dense, call) else activations.real[i]
        yield real_rows(dense, real), real_rows(pruned, real)
    activations.dense_is_ahead = dense_goes_on


def expert_pairs(
    twin: BlockPair, names: Sequence[str], activations: Activations
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """As `input_pairs`, for layers of experts of one block, of which none reads what another gives.

    The tokens of an expert are those that the pruned block routes to it, for on them it will run;
    the dense block reads the same tokens, wherever it would route them itself. So what it gives is
    not what the dense model has behind the block, and the dense stream cannot go on by it.
    """
    pruned_layers, dense_layers = (
        [layer_at(block, name) for name in names] for block in (twin.pruned, twin.dense)
    )
    experts, numbers = experts_of(twin.pruned, names)
    same, _ = experts_of(twin.dense, names)
    for i, real in enumerate(activations.real):
        call, pruned_call = (
            calls[i][twin.index] for calls in (activations.calls, activations.pruned_calls)
        )
        pruned, route = expert_inputs(
            twin.pruned, pruned_call, activations.pruned[i], experts, pruned_layers
        )
        dense, _ = expert_inputs(twin.dense, call, activations.dense[i], same, dense_layers, route)
        kept = [real_tokens(route, number, real) for number in numbers]
        yield [(d[k], p[k]) for d, p, k in zip(dense, pruned, kept, strict=True)]


def collect(
    twin: BlockPair, name: str, activations: Activations, *, dense_goes_on: bool = False
) -> SecondMoments:
    """Gram matrices of one layer's input over all batches of one set; see `collect_wave`."""
    return collect_wave(twin, [[name]], activations, dense_goes_on=dense_goes_on)[0]


def collect_wave(
    twin: BlockPair,
    wave: Sequence[Sequence[str]],
    activations: Activations,
    *,
    dense_goes_on: bool = False,
) -> list[SecondMoments]:
    """Gram matrices of the input of each group of layers over all batches of one set.

    Args:
        twin: the block.
        wave: of `waves`: one group, or some of layers of experts.
        activations: in front of the block.
        dense_goes_on: the dense stream is not needed in front of the block any more; it is taken
            through the block in the same forward passes, but for experts, see `expert_pairs`.
    """
    names = [group[0] for group in wave]
    layers = [layer_at(twin.pruned, name) for name in names]
    routed = place_of(twin.pruned, names[0]) is not None
    found = [
        SecondMoments.empty(matrix_shape(layer)[1], layer.weight.device, routed=routed)
        for layer in layers
    ]
    for pairs in _wave_pairs(twin, names, activations, dense_goes_on=dense_goes_on):
        for moments, pair in zip(found, pairs, strict=True):
            moments.add(*pair)
    return found


def not_run_once(
    twin: BlockPair, layers: Mapping[str, Layer], activations: Activations
) -> dict[str, str]:
    """Reason against each layer that a forward pass of its block runs never or more than once."""
    if not layers:
        return {}
    runs = layer_runs(
        twin.pruned, layers, activations.pruned_calls[0][twin.index], activations.pruned[0]
    )
    return {
        name: (
            f"its block runs it on {runs[name]} inputs in one forward pass"
            if runs[name]
            else "no forward pass on calibration text reaches it"
        )
        for name in layers
    }


@dataclass(frozen=True, slots=True)
class BlockStep:
    """One block, the part of the recipe that it belongs to, and the batches in front of it."""

    recipe: Recipe
    twin: BlockPair
    sets: list[Activations]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a run over all blocks has.

    Attributes:
        keep: where hidden states are kept.
        streamed: whether each block is read from the checkpoint when it is its turn, and given up
            behind it; the model was then opened for that.
        look_ahead: whether the next block is to be there too.
        ranks: the processes that share the run.
    """

    keep: Keep = keep_on_device
    streamed: bool = False
    look_ahead: bool = False
    ranks: Ranks = ALONE


IN_MEMORY = Resources()


def block_steps(
    model: nn.Module,
    recipe: Recipe,
    texts: Sequence[tuple[Batch, ...]],
    resources: Resources = IN_MEMORY,
) -> Iterator[BlockStep]:
    """Every block in order; what is done to it before the next is asked for reaches the next.

    Args:
        model: dense.
        recipe: says where the blocks are.
        texts: sets of batches, of which this process takes its share.
        resources: of the run.
    """
    parts = [(part, find_blocks(model, part)) for part in recipe.parts]
    # All start in the dense model: a decoder's dense stream must have seen the dense encoder.
    starts = [
        [
            record_activations(
                model,
                blocks,
                part,
                text,
                name=f"{part.blocks}-{i}",
                keep=resources.keep,
                known=i > 0,
            )
            for i, text in enumerate(map(resources.ranks.share, texts))
        ]
        for part, blocks in parts
    ]
    for part, blocks in parts:
        sets = starts.pop(0)
        if part.is_decoder:
            sets = [
                after_pruning(
                    activations, model, blocks, part, name=f"{part.blocks}-{i}", keep=resources.keep
                )
                for i, activations in enumerate(sets)
            ]
        # The blocks of an encoder run again in front of the decoder.
        yield from _steps_of(part, blocks, sets, resources, device_of(model), last=not starts)


def _steps_of(
    recipe: Recipe,
    blocks: nn.ModuleList,
    sets: list[Activations],
    resources: Resources,
    device: torch.device,
    *,
    last: bool,
) -> Iterator[BlockStep]:
    for index, (block, following) in enumerate(zip_longest(blocks, list(blocks)[1:])):
        if resources.streamed:
            for each in (block, following) if resources.look_ahead and following else (block,):
                bring(each, device)
        twin = BlockPair(
            index=index,
            prefix=f"{recipe.blocks}.{index}",
            dense=deepcopy(block),
            pruned=block,
            following=following,
        )
        yield BlockStep(recipe, twin, sets)
        if following is not None:
            advance(twin, sets)
        if resources.streamed and last:
            drop(block)


def _positions(batch: Batch, recipe: Recipe) -> Tensor:
    """Which positions of the hidden states that enter the blocks of `recipe` are real."""
    if recipe.is_decoder and batch.targets is not None:
        return batch.targets >= 0
    return batch.real
