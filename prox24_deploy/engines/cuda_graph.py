"""Run a PyTorch module as one CUDA graph per input shape, and time it on the GPU's own clock."""

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from prox24_deploy.engines.base import Array, Feeds
from prox24_deploy.errors import EngineError

_WARM_RUNS = 2


@dataclass(frozen=True, slots=True)
class _Captured:
    """A graph, the tensors that it reads and those that it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class GraphSession:
    """A module on a GPU whose inputs and outputs have names; its graph for the last shape is kept.

    Args:
        module: takes its inputs by position and returns a tuple.
        inputs: names of the inputs, in order.
        outputs: names of the outputs, in order.
        source: what the module is, for messages.
    """

    def __init__(
        self, module: nn.Module, inputs: Sequence[str], outputs: Sequence[str], source: str
    ) -> None:
        self._module: nn.Module | None = module
        self._inputs, self._outputs, self._source = tuple(inputs), tuple(outputs), source
        self._captured: tuple[tuple[tuple[int, ...], ...], _Captured] | None = None
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(2 * cache, dtype=torch.uint8, device="cuda")

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        """Run once; inputs and outputs by graph name.

        Raises:
            EngineError: an input is missing or unknown, or the module does not run on it.
        """
        captured = self._graph_of(feeds)
        captured.graph.replay()
        torch.cuda.synchronize()
        arrays = (to_array(output) for output in captured.outputs)
        return dict(zip(self._outputs, arrays, strict=True))

    def latencies_ms(self, feeds: Feeds, *, runs: int, warmup: int) -> npt.NDArray[np.float64]:
        """GPU time of each of `runs` replays after `warmup` untimed ones; shape (runs,), ms.

        The L2 cache is overwritten before each run. Copies between host and GPU are not timed.

        Raises:
            EngineError: an input is missing or unknown, or the module does not run on it.
        """
        graph = self._graph_of(feeds).graph
        for _ in range(warmup):
            graph.replay()
        marks = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(runs)
        ]
        for first, last in marks:
            self._flush.zero_()
            first.record()
            graph.replay()
            last.record()
        torch.cuda.synchronize()
        return np.array([first.elapsed_time(last) for first, last in marks], dtype=np.float64)

    def close(self) -> None:
        """Release the memory of the module and its graph; running afterwards is an error."""
        self._module = self._captured = None

    @torch.inference_mode()
    def _graph_of(self, feeds: Feeds) -> _Captured:
        """The graph for the shapes of `feeds`, its inputs filled with them."""
        inputs = self._tensors(feeds)
        key = tuple(tuple(tensor.shape) for tensor in inputs)
        if self._captured is None or self._captured[0] != key:
            self._captured = None
            self._captured = key, self._capture(inputs)
        captured = self._captured[1]
        for static, given in zip(captured.inputs, inputs, strict=True):
            static.copy_(given)
        return captured

    def _tensors(self, feeds: Feeds) -> tuple[Tensor, ...]:
        missing = sorted(set(self._inputs) - feeds.keys())
        extra = sorted(feeds.keys() - set(self._inputs))
        if missing or extra:
            raise EngineError(
                f"Inputs do not fit {self._source}: missing {', '.join(missing) or 'none'}, not "
                f"known {', '.join(extra) or 'none'}; feed exactly {', '.join(self._inputs)}."
            )
        return tuple(to_tensor(feeds[name]) for name in self._inputs)

    def _capture(self, inputs: tuple[Tensor, ...]) -> _Captured:
        module = self._module
        if module is None:
            raise EngineError(f"The session of {self._source} is closed; open the engine again.")
        static = tuple(tensor.clone() for tensor in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(stream):
                for _ in range(_WARM_RUNS):
                    module(*static)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                outputs = module(*static)
        except (RuntimeError, ValueError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
            raise EngineError(
                f"{self._source} does not run as a CUDA graph on inputs of shape {shapes}: {first}."
            ) from error
        return _Captured(graph, static, tuple(outputs))


def to_tensor(array: Array) -> Tensor:
    """Copy a NumPy array to the GPU; bfloat16 keeps its bits."""
    contiguous = np.ascontiguousarray(array)
    if contiguous.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(contiguous.view(np.int16)).cuda().view(torch.bfloat16)
    return torch.from_numpy(contiguous).cuda()


def to_array(tensor: Tensor) -> Array:
    """Copy a tensor to NumPy; bfloat16 keeps its bits."""
    host = tensor.detach().cpu()
    if host.dtype == torch.bfloat16:
        return host.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    found: Array = host.numpy()
    return found
