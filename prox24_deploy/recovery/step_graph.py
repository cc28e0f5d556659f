"""A forward pass of both models with the backward pass of one, replayed as a CUDA graph.

For small models a GPU waits for the thousand kernels of a step to be launched one by one. A CUDA
graph launches them at once. It serves batches of one shape without padding, whose kernels do not
depend on what is in them; all others, and what cannot be captured, run as they are.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from prox24_deploy.model.batch import Batch

log = logging.getLogger(__name__)

_WARM_UPS = 3
_MASK = "attention_mask"

# Adds the gradient of its loss, times a factor, to what the parameters have; returns the product.
Pass = Callable[[Batch, Tensor], Tensor]
Shape = tuple[tuple[str, torch.Size], ...]


@dataclass(slots=True)
class StepGraph:
    """One pass as a CUDA graph; it reads and writes the tensors that were there at its capture.

    Gradients of the parameters have to be there before, and to stay the same tensors after.

    Attributes:
        step: the pass.
        shape: of the batches that it is for; None for none.
    """

    step: Pass
    shape: Shape | None
    _graph: torch.cuda.CUDAGraph | None = field(default=None)
    _batch: Batch | None = field(default=None)
    _factor: Tensor | None = field(default=None)
    _loss: Tensor | None = field(default=None)

    @classmethod
    def of(cls, step: Pass, batches: Sequence[Batch], device: torch.device) -> "StepGraph":
        """For the most frequent shape of some batches on a GPU; for none elsewhere."""
        shapes = Counter(_shape(each) for each in batches if _is_whole(each))
        usable = shapes if device.type == "cuda" else Counter[Shape]()
        return cls(step, next((shape for shape, _ in usable.most_common(1)), None))

    @property
    def captured(self) -> bool:
        """Whether there is a graph."""
        return self._graph is not None

    def add(self, batch: Batch, factor: float, device: torch.device) -> Tensor:
        """Run the pass on a batch; its loss times the factor, on the device until the next call."""
        if self.shape is not None and _is_whole(batch) and _shape(batch) == self.shape:
            try:
                return self._replay(batch, factor, device)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError) or self._graph is not None:
                    raise
                log.warning("steps run without a CUDA graph, for the capture failed: %s", error)
                self.shape = None
        return self.step(batch, torch.tensor(factor, device=device))

    def _replay(self, batch: Batch, factor: float, device: torch.device) -> Tensor:
        if self._graph is None:
            self._capture(batch, device)
        assert self._graph is not None
        assert self._batch is not None
        assert self._factor is not None
        assert self._loss is not None
        for name, tensor in self._batch.inputs.items():
            tensor.copy_(batch.inputs[name])
        self._factor.fill_(factor)
        self._graph.replay()
        return self._loss

    def _capture(self, batch: Batch, device: torch.device) -> None:
        # Nothing is masked, and whether nothing is could not be asked during a capture.
        inputs = {n: t.to(device, copy=True) for n, t in batch.inputs.items() if n != _MASK}
        own, factor = replace(batch, inputs=inputs), torch.zeros((), device=device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # A factor of 0 leaves gradients as they are.
            for _ in range(_WARM_UPS):
                self.step(own, factor)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self.step(own, factor)
        self._graph, self._batch, self._factor, self._loss = graph, own, factor, loss


def _is_whole(batch: Batch) -> bool:
    """Whether all of its positions are real and it has no other text beside it."""
    return batch.targets is None and bool(batch.real.all())


def _shape(batch: Batch) -> Shape:
    return tuple((name, tensor.shape) for name, tensor in sorted(batch.inputs.items()))
