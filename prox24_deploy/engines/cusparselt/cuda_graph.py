"""Run a PyTorch module as one CUDA graph per input shape, and time it on the GPU's own clock."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prox24_deploy.core.errors import EngineError
from prox24_deploy.engines.base import Array, Feeds

Tensors = tuple[Tensor, ...]
Run = Callable[..., Tensors]

# Where modules and buffers live.
DEVICE = "cuda"

_WARM_RUNS = 2


@dataclass(frozen=True, slots=True)
class Captured:
    """Work captured as a CUDA graph, and the tensors that each replay writes."""

    replay: Callable[[], None]
    outputs: tuple[Tensor, ...]


def capture(run: Callable[[], tuple[Tensor, ...]]) -> Captured:
    """Run `run` a few times, then capture what it launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_RUNS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return Captured(graph.replay, outputs)


class Stopwatch:
    """Times replays by the GPU's own clock, each with the L2 cache overwritten before it."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(2 * cache, dtype=torch.uint8, device=DEVICE)

    def milliseconds(self, replay: Callable[[], None], runs: int) -> npt.NDArray[np.float64]:
        """Time of each of `runs` replays, shape (runs,)."""
        marks = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(runs)
        ]
        for first, last in marks:
            self._flush.zero_()
            first.record()
            replay()
            last.record()
        torch.cuda.synchronize()
        return np.array([first.elapsed_time(last) for first, last in marks], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class _Kept:
    """The graph of one set of shapes and the tensors that it reads."""

    shapes: tuple[torch.Size, ...]
    inputs: tuple[Tensor, ...]
    graph: Captured


class GraphSession:
    """A module on a GPU whose inputs and outputs have names; its graph for the last shape is kept.

    Args:
        run: a module, or what runs it: takes its inputs by position and returns a tuple.
        inputs: names of the inputs, in order.
        outputs: names of the outputs, in order.
        source: what the module is, for messages.
        fit: from inputs by those names to inputs of the module; as they are by default.
        trim: from inputs and outputs of the module to outputs by those names.
    """

    def __init__(
        self,
        run: Run,
        inputs: Sequence[str],
        outputs: Sequence[str],
        source: str,
        *,
        fit: Callable[[Tensors], Tensors] = lambda given: given,
        trim: Callable[[Tensors, Tensors], Tensors] = lambda _, outputs: outputs,
    ) -> None:
        self._run: Run | None = run
        self._fit, self._trim = fit, trim
        self._inputs, self._outputs, self._source = tuple(inputs), tuple(outputs), source
        self._captured: _Kept | None = None
        self._sent: dict[str, tuple[Array, Tensor]] = {}
        self._stopwatch = Stopwatch()

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        """Run once; inputs and outputs by graph name.

        Raises:
            EngineError: an input is missing or unknown, or the module does not run on it.
        """
        kept = self._graph_of(feeds, lambda _, array: to_tensor(array))
        kept.graph.replay()
        outputs = self._trim(kept.inputs, kept.graph.outputs)
        arrays = (to_array(output) for output in outputs)
        return dict(zip(self._outputs, arrays, strict=True))

    def latencies_ms(self, feeds: Feeds, *, runs: int, warmup: int) -> npt.NDArray[np.float64]:
        """GPU time of each of `runs` replays after `warmup` untimed ones; shape (runs,), ms.

        The L2 cache is overwritten before each run. Copies between host and GPU are not timed, and
        an array that was fed before is not sent again: it must not have been written to since.

        Raises:
            EngineError: an input is missing or unknown, or the module does not run on it.
        """
        replay = self._graph_of(feeds, self._send).graph.replay
        for _ in range(warmup):
            replay()
        return self._stopwatch.milliseconds(replay, runs)

    def close(self) -> None:
        """Release the memory of the module and its graph; running afterwards is an error."""
        self._run = self._captured = None
        self._sent.clear()

    @torch.inference_mode()
    def _graph_of(self, feeds: Feeds, send: Callable[[str, Array], Tensor]) -> _Kept:
        """The graph for the shapes of `feeds`, its inputs filled with them."""
        given = self._fit(self._tensors(feeds, send))
        shapes = tuple(tensor.shape for tensor in given)
        if self._captured is None or self._captured.shapes != shapes:
            # The memory of the old graph is needed for the new one.
            self._captured = None
            self._captured = self._capture(given)
        for static, tensor in zip(self._captured.inputs, given, strict=True):
            static.copy_(tensor)
        return self._captured

    def _send(self, name: str, array: Array) -> Tensor:
        """A copy on the GPU, kept for as long as the same array is fed by this name."""
        known, tensor = self._sent.get(name, (None, None))
        if tensor is None or known is not array:
            tensor = to_tensor(array)
            self._sent[name] = array, tensor
        return tensor

    def _tensors(self, feeds: Feeds, send: Callable[[str, Array], Tensor]) -> Tensors:
        missing = sorted(set(self._inputs) - feeds.keys())
        extra = sorted(feeds.keys() - set(self._inputs))
        if missing or extra:
            raise EngineError(
                f"Inputs do not fit {self._source}: missing {', '.join(missing) or 'none'}, not "
                f"known {', '.join(extra) or 'none'}; feed exactly {', '.join(self._inputs)}."
            )
        return tuple(send(name, feeds[name]) for name in self._inputs)

    def _capture(self, given: tuple[Tensor, ...]) -> _Kept:
        run = self._run
        if run is None:
            raise EngineError(f"The session of {self._source} is closed; open the engine again.")
        static = tuple(tensor.clone() for tensor in given)
        try:
            graph = capture(lambda: tuple(run(*static)))
        except (RuntimeError, ValueError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in given)
            raise EngineError(
                f"{self._source} does not run as a CUDA graph on inputs of shape {shapes}: {first}."
            ) from error
        return _Kept(tuple(tensor.shape for tensor in given), static, graph)


def to_tensor(array: Array) -> Tensor:
    """Copy a NumPy array to the GPU; bfloat16 keeps its bits."""
    contiguous = np.ascontiguousarray(array)
    if contiguous.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(contiguous.view(np.int16)).to(DEVICE).view(torch.bfloat16)
    return torch.from_numpy(contiguous).to(DEVICE)


def to_array(tensor: Tensor) -> Array:
    """Copy a tensor to NumPy; bfloat16 keeps its bits."""
    # The next replay writes to the tensor, wherever it lies.
    host = tensor.detach().to("cpu", copy=True)
    if host.dtype == torch.bfloat16:
        return host.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    found: Array = host.numpy()
    return found
