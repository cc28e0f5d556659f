"""Batches on their way through the blocks, in the dense and in the pruned model side by side."""

from dataclasses import dataclass

from torch import Tensor, nn

from prox24_deploy.model.blocks import BlockCall, layer_input, real_rows, record_calls, run_block
from prox24_deploy.model.calibration import Batch
from prox24_deploy.model.grams import Grams
from prox24_deploy.model.layers import layer_at, matrix_shape
from prox24_deploy.recipe import Recipe


@dataclass(slots=True)
class Flow:
    """One set of batches before some block.

    Attributes:
        batches: the text.
        calls: per batch, what the model passes to each block beside the hidden states.
        dense: per batch, hidden states (batch, sequence, hidden) in the dense model.
        pruned: the same in the partly pruned model.
    """

    batches: tuple[Batch, ...]
    calls: list[list[BlockCall]]
    dense: list[Tensor]
    pruned: list[Tensor]


@dataclass(frozen=True, slots=True)
class Twin:
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
    """Run the batches up to the first block."""
    recorded = [record_calls(model, blocks, batch, recipe.task) for batch in batches]
    hidden = [first for first, _ in recorded]
    return Flow(batches, [calls for _, calls in recorded], hidden, list(hidden))


def advance(twin: Twin, flows: list[Flow]) -> None:
    """Carry both streams of every flow through the block."""
    for flow in flows:
        for i, calls in enumerate(flow.calls):
            call = calls[twin.index]
            flow.dense[i] = run_block(twin.dense, call, flow.dense[i])
            flow.pruned[i] = run_block(twin.pruned, call, flow.pruned[i])


def collect(twin: Twin, name: str, flow: Flow) -> Grams:
    """Gram matrices of one layer's input over all batches of a flow."""
    dense_layer, pruned_layer = (layer_at(block, name) for block in (twin.dense, twin.pruned))
    grams = Grams.empty(matrix_shape(pruned_layer)[1], pruned_layer.weight.device)
    for i, batch in enumerate(flow.batches):
        call = flow.calls[i][twin.index]
        dense = layer_input(twin.dense, call, flow.dense[i], dense_layer)
        pruned = layer_input(twin.pruned, call, flow.pruned[i], pruned_layer)
        grams.add(real_rows(dense, batch.real), real_rows(pruned, batch.real))
    return grams
