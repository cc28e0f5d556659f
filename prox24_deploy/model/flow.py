"""Batches on their way through the blocks, in the dense and in the pruned model side by side."""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from prox24_deploy.model.blocks import (
    BlockCall,
    is_handed,
    layer_input,
    real_rows,
    record_calls,
    require_one_run,
    run_block,
)
from prox24_deploy.model.calibration import Batch
from prox24_deploy.model.grams import Grams
from prox24_deploy.model.layers import layer_at, matrix_shape
from prox24_deploy.recipe import Recipe


@dataclass(slots=True)
class Flow:
    """One set of batches before some block.

    Attributes:
        batches: the text.
        real: per batch, which positions of the hidden states are not padding.
        calls: per batch, what the dense model passes to each block beside the hidden states.
        pruned_calls: what the partly pruned model passes; the same, unless these are the blocks of
            a decoder, whose encoder has been pruned before.
        dense: per batch, hidden states (batch, sequence, hidden) in the dense model.
        pruned: the same in the partly pruned model.
    """

    batches: tuple[Batch, ...]
    real: list[Tensor]
    calls: list[list[BlockCall]]
    pruned_calls: list[list[BlockCall]]
    dense: list[Tensor]
    pruned: list[Tensor]


@dataclass(frozen=True, slots=True)
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


def start_flow(
    model: nn.Module, blocks: nn.ModuleList, recipe: Recipe, batches: tuple[Batch, ...]
) -> Flow:
    """Run the batches up to the first block of a model of which nothing is pruned yet.

    Raises:
        RecipeError: the model runs a block more than once, or not at all.
    """
    for batch in batches[:1]:
        require_one_run(model, blocks, batch, recipe)
    recorded = [record_calls(model, blocks, batch, recipe.task) for batch in batches]
    hidden = [first for first, _ in recorded]
    calls = [calls for _, calls in recorded]
    real = [_positions(batch, recipe) for batch in batches]
    return Flow(batches, real, calls, calls, hidden, list(hidden))


def after_pruning(flow: Flow, model: nn.Module, blocks: nn.ModuleList, recipe: Recipe) -> Flow:
    """The flow with what the model, pruned up to these blocks, passes to them and into the first.

    The dense stream stays as it was recorded, when the whole model was dense.
    """
    recorded = [record_calls(model, blocks, batch, recipe.task) for batch in flow.batches]
    return replace(
        flow,
        pruned_calls=[calls for _, calls in recorded],
        pruned=[first for first, _ in recorded],
    )


def advance(twin: BlockPair, flows: list[Flow]) -> None:
    """Carry both streams of every flow through the block."""
    for flow in flows:
        for i, (calls, pruned_calls) in enumerate(zip(flow.calls, flow.pruned_calls, strict=True)):
            flow.dense[i] = run_block(twin.dense, calls[twin.index], flow.dense[i])
            flow.pruned[i] = run_block(twin.pruned, pruned_calls[twin.index], flow.pruned[i])


def collect(twin: BlockPair, name: str, flow: Flow) -> Grams:
    """Gram matrices of one layer's input over all batches of a flow."""
    dense_layer, pruned_layer = (layer_at(block, name) for block in (twin.dense, twin.pruned))
    grams = Grams.empty(matrix_shape(pruned_layer)[1], pruned_layer.weight.device)
    for i, batch in enumerate(flow.batches):
        call, pruned_call = flow.calls[i][twin.index], flow.pruned_calls[i][twin.index]
        dense = layer_input(twin.dense, call, flow.dense[i], dense_layer)
        pruned = layer_input(twin.pruned, pruned_call, flow.pruned[i], pruned_layer)
        # A decoder's layer that is fed the states of the encoder sees the positions of that text.
        real = batch.real if is_handed(dense, call) else flow.real[i]
        grams.add(real_rows(dense, real), real_rows(pruned, real))
    return grams


def _positions(batch: Batch, recipe: Recipe) -> Tensor:
    """Which positions of the hidden states that enter the blocks of `recipe` are real."""
    if recipe.is_decoder and batch.targets is not None:
        return batch.targets >= 0
    return batch.real
