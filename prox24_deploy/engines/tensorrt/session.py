"""Run a TensorRT engine by Polygraphy's runner, and time it by the events of torch.

Not exercised on a GPU with TensorRT: no machine that tests this has both. What tests reach is the
runner of Polygraphy on a stand-in for the library, and every name, on the real bindings.
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from prox24_deploy.core.errors import EngineError
from prox24_deploy.engines.base import Array, Feeds
from prox24_deploy.engines.tensorrt.library import (
    Library,
    messages,
    polygraphy_for,
    refused_by,
)

_SHAPES = "feed shapes that it was compiled for, or compile the model again with --shapes"
_AGAIN = "compile the model again on this machine"


class TensorRtSession:
    """An engine in an active runner of Polygraphy, on the first GPU. Not exercised on a GPU."""

    def __init__(self, runner: Any, source: str, device: str) -> None:
        self._runner = runner
        self._source = source
        self._device = device

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        """Run once; inputs and outputs by graph name.

        Raises:
            EngineError: an input is missing, unknown, or of a shape outside the profile.
        """
        # Tensors of torch, because those of numpy have no bfloat16 there.
        tensors = {name: _to_torch(array) for name, array in feeds.items()}
        with refused_by(f"{self._source} does not run", _SHAPES):
            outputs = self._runner.infer(tensors)
        return {name: _to_numpy(tensor) for name, tensor in outputs.items()}

    def latencies_ms(self, feeds: Feeds, *, runs: int, warmup: int) -> npt.NDArray[np.float64]:
        """Time between CUDA events around each of `runs` runs after `warmup`; shape (runs,), ms.

        Inputs lie on the GPU already; the launch of the kernels counts, no CUDA graph is captured.
        Polygraphy's own figure is not that: it takes the clock of the host, with the copies of
        inputs and outputs.

        Raises:
            EngineError: as for `infer`.
        """
        # An empty tensor has no address on the GPU; Polygraphy finds room for one that is not.
        tensors = {n: self._placed(_to_torch(array)) for n, array in feeds.items()}
        with refused_by(f"{self._source} does not run", _SHAPES):
            self._runner.infer(tensors, copy_outputs_to_host=False)
        self._fix_outputs()
        stream = torch.cuda.ExternalStream(self._runner.stream.ptr)
        for _ in range(warmup):
            self._enqueue()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        for begin, end in events:
            begin.record(stream)
            self._enqueue()
            end.record(stream)
        stream.synchronize()
        return np.array([begin.elapsed_time(end) for begin, end in events], dtype=np.float64)

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device) if tensor.numel() else tensor

    def _fix_outputs(self) -> None:
        """Keep outputs where they are: the runner's allocator is Python, asked in every run."""
        address = importlib.import_module("polygraphy.util").array.data_ptr
        for name, room in self._runner.output_allocator.buffers.items():
            self._runner.context.set_output_allocator(name, None)
            self._runner.context.set_tensor_address(name, address(room))

    def _enqueue(self) -> None:
        if not self._runner.context.execute_async_v3(self._runner.stream.ptr):
            raise EngineError(f"{self._source} did not run; see the messages of TensorRT.")


@contextmanager
def opened(
    library: Library, plan: Path, weights: Path | None, source: str, device: str = "cuda"
) -> Iterator[TensorRtSession]:
    """An engine on the GPU; one that was stored without weights takes those of an ONNX file.

    Not exercised on a GPU.

    Args:
        library: that built it.
        plan: the engine.
        weights: the ONNX file, None for an engine that has its own.
        source: what to call it.
        device: for the inputs of timed runs.

    Raises:
        EngineError: this library or this GPU cannot load it, or the file has other weights.
    """
    polygraphy = polygraphy_for(library)
    messages().use_python_logging_system = True
    messages().module_severity = messages().WARNING
    _show_cuda()
    with refused_by(f"{source} does not load here", _AGAIN):
        # Not from its path, which is a file that Polygraphy never closes (0.53.6).
        engine = polygraphy.EngineFromBytes(plan.read_bytes())()
    if weights is not None:
        _refit(library, polygraphy, engine, weights)
    runner = polygraphy.TrtRunner(engine, name=source)
    with refused_by(f"{source} has no room on the GPU", "free memory of it"):
        runner.activate()
    try:
        yield TensorRtSession(runner, source, device)
    finally:
        runner.deactivate()


def _show_cuda() -> None:
    """Name the folder of the CUDA runtime that torch for CUDA 13 brings to Polygraphy.

    It looks into LD_LIBRARY_PATH, folders of the system and the wheel of CUDA 12 (0.53.6).
    """
    found = Path(torch.__file__).parents[1].glob("nvidia/cu[0-9]*/lib/libcudart.so*")
    known = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    folders = dict.fromkeys([*known, *(str(path.parent) for path in sorted(found))])
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, folders))


def _refit(library: Library, polygraphy: Any, engine: Any, onnx: Path) -> None:
    """By TensorRT itself, for Polygraphy builds engines without weights and cannot refit them."""
    trt = importlib.import_module(library)
    refitter = trt.Refitter(engine, polygraphy.get_trt_logger())
    parser = trt.OnnxParserRefitter(refitter, polygraphy.get_trt_logger())
    if not parser.refit_from_file(str(onnx)) or not refitter.refit_cuda_engine():
        raise EngineError(
            f"The engine does not take the weights of {onnx}; compile the model again."
        )


def _to_torch(array: Array) -> torch.Tensor:
    """A tensor on the same memory; torch does not know numpy's bfloat16."""
    contiguous = np.ascontiguousarray(array)
    if contiguous.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(contiguous.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(contiguous)


def _to_numpy(tensor: torch.Tensor) -> Array:
    """A copy, for the runner uses the memory of outputs again."""
    host = tensor.cpu().clone()
    if host.dtype == torch.bfloat16:
        return host.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return host.numpy()
