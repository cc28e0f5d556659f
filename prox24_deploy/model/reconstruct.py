"""Block reconstruction: tune the kept weights of one block together against the dense block.

Layer by layer, each weight matrix is the best for its own output; what the block as a whole puts
out is not. Adam on the kept weights, masks fixed, minimises the squared difference between the
block's output on the pruned model's hidden states and the dense block's output in the dense model.
Part of the calibration text is withheld to choose the step at which to stop.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prox24_deploy.errors import CalibrationError
from prox24_deploy.model.blocks import run_block
from prox24_deploy.model.flow import Flow, Twin, linear
from prox24_deploy.pruning.pattern import mask_24

log = logging.getLogger(__name__)

# Every eighth batch chooses the step; the others are trained on.
_WITHHELD = 8


@dataclass(frozen=True, slots=True)
class AdamOptions:
    """Schedule of one block.

    Attributes:
        steps: of one batch each.
        learning_rate: relative to the root mean square of a layer's kept weights; falls to zero
            along a cosine.
        check_every: steps between measurements on withheld batches.
        patience: measurements without a new best after which to stop.
    """

    steps: int = 200
    learning_rate: float = 0.01
    check_every: int = 20
    patience: int = 4


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """Relative squared error of a block's output on withheld batches, before and after."""

    before: float
    after: float
    steps: int


def require_batches(count: int) -> None:
    """Refuse text too short to train on one part and choose on another.

    Raises:
        CalibrationError: there is only one batch.
    """
    if count < 2:
        raise CalibrationError(
            "Block reconstruction needs at least two batches of calibration text, got one; pass "
            "more text or --no-reconstruct."
        )


def reconstruct_block(
    twin: Twin, names: Sequence[str], flow: Flow, options: AdamOptions
) -> Reconstruction:
    """Tune the kept weights of some layers of the pruned block in place.

    Args:
        twin: the block, its layers already 2:4.
        names: paths of the layers to tune; no other parameter changes.
        flow: calibration batches in front of the block.
        options: schedule.

    Returns:
        Errors on withheld batches; `after` is never above `before`, and equal to it if no step
        helped, in which case the weights are what they were.
    """
    require_batches(len(flow.batches))
    targets = [
        run_block(twin.dense, calls[twin.index], hidden)
        for calls, hidden in zip(flow.calls, flow.dense, strict=True)
    ]
    withheld = list(range(0, len(flow.batches), _WITHHELD))
    trained = [i for i in range(len(flow.batches)) if i % _WITHHELD]
    layers = [linear(twin.pruned, name) for name in names]
    # A kept weight may be zero: the mask has two marks per cell whatever the weights are.
    masks = [mask_24(layer.weight.abs()) for layer in layers]
    before = best = _withheld_error(twin, flow, targets, withheld)
    kept, kept_step, taken = [layer.weight.clone() for layer in layers], 0, 0
    training = _Training(twin, flow, targets, layers, masks, options)
    order = _order(trained, options.steps, seed=twin.index)
    for taken, batch in enumerate(order, start=1):
        training.step(batch)
        if taken % options.check_every == 0:
            error = _withheld_error(twin, flow, targets, withheld)
            if error < best:
                best, kept_step = error, taken
                kept = [layer.weight.clone() for layer in layers]
            elif taken - kept_step >= options.patience * options.check_every:
                break
    for layer, weight in zip(layers, kept, strict=True):
        layer.weight.copy_(weight)
    log.info("%s: block error %.4f, reconstructed %.4f", twin.prefix, before, best)
    return Reconstruction(before, best, taken)


class _Training:
    """Adam over the masked weights of one block."""

    def __init__(
        self,
        twin: Twin,
        flow: Flow,
        targets: list[Tensor],
        layers: list[nn.Linear],
        masks: list[Tensor],
        options: AdamOptions,
    ) -> None:
        self._twin, self._flow, self._targets = twin, flow, targets
        self._layers, self._masks = layers, masks
        groups = [
            {
                "params": [layer.weight],
                "lr": options.learning_rate * float(layer.weight[mask].square().mean().sqrt()),
            }
            for layer, mask in zip(layers, masks, strict=True)
        ]
        self._adam = torch.optim.Adam(groups)
        self._decay = torch.optim.lr_scheduler.CosineAnnealingLR(self._adam, options.steps)

    def step(self, batch: int) -> None:
        weights = [layer.weight for layer in self._layers]
        for weight in weights:
            weight.requires_grad_(True)
        try:
            with torch.enable_grad():
                difference, reference = _squares(self._twin, self._flow, self._targets, batch)
                gradients = torch.autograd.grad(difference / reference, weights)
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        for weight, mask, gradient in zip(weights, self._masks, gradients, strict=True):
            weight.grad = gradient.masked_fill(~mask, 0.0)
        self._adam.step()
        self._decay.step()
        self._adam.zero_grad()


def _order(batches: list[int], steps: int, seed: int) -> list[int]:
    """Batches to train on, each once before any comes again, shuffled anew every time."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = []
    while len(drawn) < steps:
        drawn += [batches[i] for i in torch.randperm(len(batches), generator=generator)]
    return drawn[:steps]


def _withheld_error(twin: Twin, flow: Flow, targets: list[Tensor], withheld: list[int]) -> float:
    difference = reference = 0.0
    for batch in withheld:
        parts = _squares(twin, flow, targets, batch)
        difference += float(parts[0])
        reference += float(parts[1])
    return difference / reference


def _squares(twin: Twin, flow: Flow, targets: list[Tensor], batch: int) -> tuple[Tensor, Tensor]:
    """Squared difference of the two blocks' outputs, and of the dense one, without padding."""
    output = run_block(twin.pruned, flow.calls[batch][twin.index], flow.pruned[batch])
    real = flow.batches[batch].real.to(output.device)
    target = targets[batch][real]
    return (output[real] - target).square().sum(), target.square().sum()
