"""Block reconstruction: tune the kept weights of one block together against the dense model.

Layer by layer, each weight matrix is the best for its own output; what the block as a whole puts
out is not. Adam on the kept weights, masks fixed, minimises the squared difference between pruned
and dense hidden states after the block and, since what matters is what later blocks make of it,
also after the next block, which is still dense. A trial on seven eighths of the calibration text
tells on the rest for how many steps this is safe; then all of the text is trained on.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from prox24_deploy.core.errors import CalibrationError
from prox24_deploy.core.types import Preset
from prox24_deploy.model.batch import WITHHELD
from prox24_deploy.model.blocks import BlockCall, run_block
from prox24_deploy.model.layers import Layer, layer_at, reduction_axis
from prox24_deploy.pruning.activations import Activations, BlockPair
from prox24_deploy.pruning.masks import fixed_mask
from prox24_deploy.pruning.ranks import ALONE, Ranks
from prox24_deploy.sparsity.pattern import mask_24

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamOptions:
    """Schedule of one block.

    Attributes:
        steps: of one batch each, if that is enough for `epochs`.
        epochs: passes over all batches at least.
        learning_rate: relative to the root mean square of a layer's kept weights; falls to zero
            along a cosine.
        check_every: steps between measurements on withheld batches in the trial.
        tolerance: by which the withheld error may rise, as a fraction. In late blocks, whose inputs
            carry errors that no weight can undo, it rises by a percent or two while the perplexity
            of the model still falls; overfitting raises it by far more.
    """

    steps: int = 200
    epochs: int = 2
    learning_rate: float = 0.01
    check_every: int = 20
    tolerance: float = 0.05


# Twice the steps of half the length gain another per cent or two where time matters least.
SCHEDULES: dict[Preset, AdamOptions] = {
    "fast": AdamOptions(),
    "default": AdamOptions(),
    "best": AdamOptions(steps=400, learning_rate=0.005),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconstruction:
    """Relative squared error on withheld batches before and after the trial, and its steps."""

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
    twin: BlockPair,
    names: Sequence[str],
    activations: Activations,
    options: AdamOptions,
    ranks: Ranks = ALONE,
) -> Reconstruction:
    """Tune the kept weights of some layers of the pruned block in place.

    Args:
        twin: the block, its layers already 2:4.
        names: paths of the layers to tune; no other parameter changes.
        activations: calibration batches in front of the block.
        options: schedule.
        ranks: the processes that share the batches; each step is taken by all, on the gradients of
            the one that has its batch.

    Returns:
        Errors of the trial; if its first steps already went beyond the tolerance, `after` equals
        `before` and the weights are what they were.
    """
    count = int(ranks.total(len(activations.batches)))
    require_batches(count)
    everything = list(range(count))
    # What is withheld watches the trial.
    trained, withheld = [i for i in everything if i % WITHHELD], everything[::WITHHELD]
    training = _Training(twin, names, activations, options, ranks, count)
    before = training.error(withheld)
    after, steps = before, 0
    for taken in training.steps(trained):
        if taken % options.check_every == 0 or taken == training.length:
            error = training.error(withheld)
            if not error <= before * (1 + options.tolerance):
                break
            after, steps = error, taken
    training.reset()
    for _ in islice(training.steps(everything), steps):
        pass
    log.info("%s: block error %.4f, reconstructed %.4f", twin.prefix, before, after)
    return Reconstruction(before=before, after=after, steps=steps)


class _Training:
    """Adam over the masked weights of one block, from the weights it had at first."""

    def __init__(
        self,
        twin: BlockPair,
        names: Sequence[str],
        activations: Activations,
        options: AdamOptions,
        ranks: Ranks,
        count: int,
    ) -> None:
        self._twin, self._activations, self._options = twin, activations, options
        self._ranks, self._count = ranks, count
        layers = [layer_at(twin.pruned, name) for name in names]
        self._weights = [layer.weight for layer in layers]
        self._start = [weight.clone() for weight in self._weights]
        self._masks = [_mask(layer) for layer in layers]
        self._targets = [
            self._outputs(twin.dense, activations.calls[batch], batch, hidden)
            for batch, hidden in enumerate(activations.dense)
        ]

    @property
    def length(self) -> int:
        """Steps of the whole schedule."""
        return max(self._options.steps, self._options.epochs * self._count)

    def reset(self) -> None:
        """Go back to the first weights."""
        for weight, start in zip(self._weights, self._start, strict=True):
            weight.copy_(start)

    def steps(self, batches: list[int]) -> Iterator[int]:
        """Take the steps of the schedule one by one; yields how many have been taken."""
        steps = self.length
        adam = torch.optim.Adam(
            {
                "params": [weight],
                "lr": self._options.learning_rate * float(weight[mask].square().mean().sqrt()),
            }
            for weight, mask in zip(self._weights, self._masks, strict=True)
        )
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        for taken, batch in enumerate(_order(batches, steps, self._twin.index), start=1):
            for weight, gradient in zip(self._weights, self._gradients(batch), strict=True):
                weight.grad = gradient
            adam.step()
            decay.step()
            adam.zero_grad()
            yield taken

    def error(self, batches: list[int]) -> float:
        """Mean relative squared error of the outputs over some batches."""
        own = (self._own(batch) for batch in batches)
        errors = sum(float(self._error(batch)) for batch in own if batch is not None)
        return self._ranks.total(errors) / len(batches)

    def _own(self, batch: int) -> int | None:
        """Where a batch of all stands among those of this process, if it is one of them."""
        number = self._ranks.number
        return batch // self._ranks.count if self._ranks.owner(batch) == number else None

    def _gradients(self, batch: int) -> list[Tensor]:
        own = self._own(batch)
        if own is None:
            gradients = [torch.empty_like(weight) for weight in self._weights]
        else:
            gradients = self._own_gradients(own)
        self._ranks.from_owner(batch, gradients)
        return gradients

    def _own_gradients(self, batch: int) -> list[Tensor]:
        for weight in self._weights:
            weight.requires_grad = True
        try:
            with torch.enable_grad():
                gradients = torch.autograd.grad(self._error(batch), self._weights)
        finally:
            for weight in self._weights:
                weight.requires_grad = False
        pairs = zip(gradients, self._masks, strict=True)
        return [gradient.masked_fill(~mask, 0.0) for gradient, mask in pairs]

    def _error(self, batch: int) -> Tensor:
        activations = self._activations
        outputs = self._outputs(
            self._twin.pruned, activations.pruned_calls[batch], batch, activations.pruned[batch]
        )
        errors = [
            (output - target).square().sum() / target.square().sum()
            for output, target in zip(outputs, self._targets[batch], strict=True)
        ]
        return torch.stack(errors).mean()

    def _outputs(
        self, block: nn.Module, calls: Sequence[BlockCall], batch: int, hidden: Tensor
    ) -> list[Tensor]:
        """Hidden states after the block and after the next one, (tokens, hidden) each."""
        index = self._twin.index
        outputs = [run_block(block, calls[index], hidden)]
        if self._twin.following is not None:
            outputs.append(run_block(self._twin.following, calls[index + 1], outputs[0]))
        real = self._activations.real[batch].to(hidden.device)
        return [output[real] for output in outputs]


def _mask(layer: Layer) -> Tensor:
    """A kept weight may be zero: there are two marks per group whatever the weights are."""
    fixed = fixed_mask(layer)
    return mask_24(layer.weight.abs(), reduction_axis(layer)) if fixed is None else fixed


def _order(batches: list[int], steps: int, seed: int) -> list[int]:
    """Batches to train on, each once before any comes again, shuffled anew every time."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = []
    while len(drawn) < steps:
        drawn += [batches[i] for i in torch.randperm(len(batches), generator=generator)]
    return drawn[:steps]
