"""Run a TensorRT engine by the runtime API of TensorRT 10 and 11, with torch for its buffers.

Not exercised on a GPU: no machine that tests this has TensorRT and a GPU. What tests reach is the
order of the calls, on a stand-in, and every name, on the real bindings of both versions.
"""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from prox24_deploy.core.errors import EngineError
from prox24_deploy.engines.base import Array, Feeds

# By name of tensorrt.DataType; exported graphs have no other types at their inputs and outputs.
_TORCH_TYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "BOOL": torch.bool,
}


class TensorRtSession:
    """An engine with its execution context on one stream of the first GPU.

    Not exercised on a GPU.
    """

    def __init__(self, trt: Any, engine: Any, source: str, device: str = "cuda") -> None:
        self._context = engine.create_execution_context()
        if self._context is None:
            raise EngineError(f"{source} has no room on the GPU; free memory of it.")
        self._source = source
        self._device = device
        # Of its own, because TensorRT synchronises more on the default one.
        self._stream = torch.cuda.Stream()
        # What TensorRT has the addresses of.
        self._rooms: dict[str, torch.Tensor] = {}
        self._inputs: set[str] = set()
        self._outputs: dict[str, torch.dtype] = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                self._inputs.add(name)
            else:
                self._outputs[name] = _TORCH_TYPES[engine.get_tensor_dtype(name).name]

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        """Run once; inputs and outputs by graph name.

        Raises:
            EngineError: an input is missing, unknown, or of a shape outside the profile.
        """
        tensors = self._bind(feeds)
        self._enqueue()
        self._stream.synchronize()
        return {name: _to_numpy(tensors[name]) for name in self._outputs}

    def latencies_ms(self, feeds: Feeds, *, runs: int, warmup: int) -> npt.NDArray[np.float64]:
        """Time between CUDA events around each of `runs` runs after `warmup`; shape (runs,), ms.

        Inputs lie on the GPU already; the launch of the kernels counts, no CUDA graph is captured.

        Raises:
            EngineError: as for `infer`.
        """
        self._bind(feeds)
        for _ in range(warmup):
            self._enqueue()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        for begin, end in events:
            begin.record(self._stream)
            self._enqueue()
            end.record(self._stream)
        self._stream.synchronize()
        return np.array([begin.elapsed_time(end) for begin, end in events], dtype=np.float64)

    def _bind(self, feeds: Feeds) -> dict[str, torch.Tensor]:
        """Move the inputs to the GPU, make room for the outputs and tell TensorRT where."""
        if feeds.keys() != self._inputs:
            raise EngineError(
                f"Inputs do not fit {self._source}: got {', '.join(sorted(feeds))}; feed exactly "
                f"{', '.join(sorted(self._inputs))}."
            )
        tensors = {name: _to_torch(array).to(self._device) for name, array in feeds.items()}
        for name, tensor in tensors.items():
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                raise EngineError(
                    f"{self._source} does not take shape {tuple(tensor.shape)} for {name}, it lies "
                    "outside the shapes that it was compiled for; compile with --shapes."
                )
        for name, dtype in self._outputs.items():
            shape = tuple(self._context.get_tensor_shape(name))
            tensors[name] = torch.empty(shape, dtype=dtype, device=self._device)
        # TensorRT wants an address even for an empty tensor, which has none in torch.
        self._rooms = {
            name: tensor if tensor.numel() else torch.empty(1, device=self._device)
            for name, tensor in tensors.items()
        }
        for name, room in self._rooms.items():
            self._context.set_tensor_address(name, room.data_ptr())
        torch.cuda.synchronize()  # the inputs were copied on another stream
        return tensors

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise EngineError(f"{self._source} did not run; see the messages of TensorRT.")


def refit(trt: Any, messages: Any, engine: Any, onnx: Path) -> None:
    """Give an engine that was stored without weights those of its ONNX file.

    Not exercised on a GPU.

    Raises:
        EngineError: the file does not have the weights of the engine.
    """
    refitter = trt.Refitter(engine, messages)
    parser = trt.OnnxParserRefitter(refitter, messages)
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
    host = tensor.cpu()
    if host.dtype == torch.bfloat16:
        return host.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return host.numpy()
