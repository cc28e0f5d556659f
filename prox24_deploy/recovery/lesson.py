"""What a model learns from another: the loss, its gradient, and a step that keeps every mask.

Gradients are masked before the optimiser sees them and weights after it moved them, so that what it
keeps of single weights is zero, too, wherever a weight is.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prox24_deploy.model.batch import Batch
from prox24_deploy.recovery.objective import Objective
from prox24_deploy.recovery.processes import Crew
from prox24_deploy.recovery.schedule import tokens_of
from prox24_deploy.recovery.step_graph import StepGraph
from prox24_deploy.recovery.student import Trained

_MOST_GRADIENT = 1.0
# Batches to train on by which the first loss of a step and the loss in the end are measured.
_MOST_TRIED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What is learnt from what.

    Attributes:
        dense: the model to be like, not trained.
        sparse: the model to train, evaluation mode.
        trained: its parameters that may change.
        objective: the loss between both.
        batches: to train on; those that were written come behind those that were `given`.
        withheld: to tell by when to stop.
        unit: what an entry of `Batch.real` counts for.
        captures: whether passes over a GPU may become CUDA graphs.
        crew: the processes that share each batch.
    """

    dense: nn.Module
    sparse: nn.Module
    trained: Sequence[Trained]
    objective: Objective
    batches: Sequence[Batch]
    given: int
    withheld: Sequence[Batch]
    unit: int
    captures: bool = True
    crew: Crew = field(default_factory=Crew)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.trained[0].parameter.device

    @property
    def sizes(self) -> list[int]:
        """Tokens of each batch to train on, padding included."""
        return [tokens_of([batch], self.unit) for batch in self.batches]

    def withheld_loss(self) -> float:
        """Mean loss on the withheld batches; NaN or infinite where it is."""
        return self._loss_on(self.withheld)

    def hardest_loss(self) -> float:
        """The largest finite mean loss of some batches to train on, evenly spaced; else 0.

        Text that the model wrote may be far harder for it than the text that it was pruned on.
        """
        losses = (self._loss_on([batch]) for batch in _some(self.batches))
        return max(filter(math.isfinite, losses), default=0.0)

    def fitted_loss(self) -> float:
        """Mean loss on some of the given batches to train on, evenly spaced."""
        return self._loss_on(_some(self.batches[: self.given]))

    @torch.no_grad()
    def _loss_on(self, batches: Sequence[Batch]) -> float:
        total, count = 0.0, 0
        for batch in self.crew.shares(batches):
            with half_precision(self.device):
                loss, number = self.objective(self.dense, self.sparse, batch)
            total, count = total + float(loss), count + number
        total, whole = self.crew.sums(total, count)
        return total / whole

    def gradient(self, chosen: Sequence[int], graph: StepGraph) -> float:
        """Add the gradient of the mean loss of some batches; returns that loss."""
        whole = [self.batches[i] for i in chosen]
        total = sum(int(batch.real.sum()) for batch in whole)
        loss_of_all = 0.0
        for batch in self.crew.shares(whole):
            # Batches count by what is real in them.
            loss_of_all += float(graph.add(batch, int(batch.real.sum()) / total, self.device))
        self._add_up()
        return self.crew.sums(loss_of_all)[0]

    def backward(self, batch: Batch, factor: Tensor) -> Tensor:
        """Add the gradient of the mean loss of a batch, times a factor; returns their product."""
        with half_precision(self.device):
            loss, number = self.objective(self.dense, self.sparse, batch)
        part = loss / number * factor
        part.backward()
        return part.detach()

    def _add_up(self) -> None:
        """Let each process have the gradients of all."""
        for each in self.trained:
            assert each.parameter.grad is not None
            self.crew.add_up(each.parameter.grad)


def _some(batches: Sequence[Batch]) -> Sequence[Batch]:
    return batches[:: -(-len(batches) // _MOST_TRIED)]


@contextmanager
def half_precision(device: torch.device) -> Iterator[None]:
    """bfloat16 products on a GPU; a CPU computes in float32."""
    # What the cache keeps would not be there when a graph is replayed.
    enabled = device.type == "cuda"
    with torch.autocast(device.type, torch.bfloat16, enabled, cache_enabled=False):
        yield


@contextmanager
def trainable(lesson: Lesson) -> Iterator[StepGraph]:
    """Let gradients, which are zero, reach what is trained, and nothing else.

    Gives the pass that adds to them; it must not be used any more behind this.
    """
    for each in lesson.trained:
        each.parameter.requires_grad = True
        each.parameter.grad = torch.zeros_like(each.parameter)
    batches = lesson.batches if lesson.captures else ()
    try:
        yield StepGraph.of(lesson.backward, batches, lesson.device)
    finally:
        for each in lesson.trained:
            each.parameter.requires_grad = False
            each.parameter.grad = None


def masked_step(optimizer: torch.optim.Optimizer, trained: Sequence[Trained]) -> None:
    """Move what is trained by its gradients, which are zero behind this; zeros stay zero."""
    parameters = [each.parameter for each in trained]
    for parameter, each in zip(parameters, trained, strict=True):
        assert parameter.grad is not None
        each.clear(parameter.grad)
    nn.utils.clip_grad_norm_(parameters, _MOST_GRADIENT)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    with torch.no_grad():
        for each in trained:
            each.clear(each.parameter)
