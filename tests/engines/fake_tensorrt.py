"""A stand-in for TensorRT, for tests alone: full TensorRT cannot be installed where they run.

It has the classes and names that Polygraphy needs for what we ask of it, and those that we use
ourselves, with the differences between versions 10, 11 and TensorRT-RTX; it records every setting
and doubles its input. That the names are those of the real bindings is tested in
`test_tensorrt_names.py`; Polygraphy is the real one.

As a library of a process that builds it reads three variables: FAKE_TENSORRT_LOG, what to print
while building; FAKE_TENSORRT_LAYERS, what its inspector says; FAKE_TENSORRT_END, "none" to build
nothing, "crash" to die in native code.
"""

import ctypes
import enum
import importlib
import importlib.machinery
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx

Version = Literal["10", "11", "rtx"]
NUMBERS = {"10": "10.16.1.11", "11": "11.4.0.106", "rtx": "1.7.1.116"}

# Every call and setting, in order, as (class and name, values).
calls: list[tuple[str, tuple[Any, ...]]] = []


def said(name: str) -> list[tuple[Any, ...]]:
    """The values of every call, or setting, of this name."""
    return [values for called, values in calls if called == name]


class Strict:
    """Takes no setting that the class does not declare, and records those that it does."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            if not any(
                name in vars(kind).get("__annotations__", {}) for kind in type(self).__mro__
            ):
                raise AttributeError(f"{type(self).__name__} has no setting {name}")
            calls.append((f"{type(self).__name__.replace('Rtx', 'I')}.{name}", (value,)))
        super().__setattr__(name, value)


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    """What Polygraphy derives its own logger from."""

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class Logger(ILogger):
    INTERNAL_ERROR, ERROR = Severity.INTERNAL_ERROR, Severity.ERROR
    WARNING, INFO, VERBOSE = Severity.WARNING, Severity.INFO, Severity.VERBOSE


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class ProfilingVerbosity(enum.IntEnum):
    DETAILED = 2


class MemoryPoolType(enum.IntEnum):
    WORKSPACE = 0


class DeviceType(enum.IntEnum):
    GPU = 0
    DLA = 1


class HardwareCompatibilityLevel(enum.IntEnum):
    AMPERE_PLUS = 1


class LayerInformationFormat(enum.IntEnum):
    JSON = 1


class TensorIOMode(enum.IntEnum):
    INPUT = 1
    OUTPUT = 2


class TensorFormat(enum.IntEnum):
    LINEAR = 0
    CHW16 = 4
    HWC = 6


class DataType(enum.IntEnum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    BF16 = 7
    INT64 = 8


# As the bindings call them beside the enumeration.
SHORT = {
    "float32": DataType.FLOAT, "float16": DataType.HALF, "int32": DataType.INT32,
    "int8": DataType.INT8, "int64": DataType.INT64, "bfloat16": DataType.BF16,
    "bool": DataType.BOOL,
}  # fmt: skip


def init_libnvinfer_plugins(logger: ILogger, namespace: str) -> bool:
    return True


class ITimingCache(Strict):
    def __init__(self, data: bytes) -> None:
        self._data = data

    @contextmanager
    def serialize(self) -> Iterator[bytes]:
        yield self._data + b"timed;"

    def combine(self, input_cache: "ITimingCache", *, ignore_mismatch: bool) -> bool:
        return True


class IOptimizationProfile(Strict):
    def set_shape(self, name: str, low: Any, opt: Any, high: Any) -> None:
        calls.append(("IOptimizationProfile.set_shape", (name, low, opt, high)))


class IBuilderConfig(Strict):
    profiling_verbosity: ProfilingVerbosity
    builder_optimization_level: int
    hardware_compatibility_level: HardwareCompatibilityLevel
    default_device_type: DeviceType
    DLA_core: int
    num_optimization_profiles: int

    def __init__(self) -> None:
        self._flags: set[Any] = set()
        self._cache = ITimingCache(b"")
        fixed = {"default_device_type": DeviceType.GPU, "DLA_core": -1}
        for name, value in {**fixed, "num_optimization_profiles": 1}.items():
            object.__setattr__(self, name, value)

    def set_flag(self, flag: Any) -> None:
        calls.append(("IBuilderConfig.set_flag", (flag.name,)))
        self._flags.add(flag)

    def get_flag(self, flag: Any) -> bool:
        return flag in self._flags

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        calls.append(("IBuilderConfig.set_memory_pool_limit", (pool, size)))

    def get_memory_pool_limit(self, pool: MemoryPoolType) -> int:
        return 2**30

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        return 0

    def create_timing_cache(self, data: bytes) -> ITimingCache:
        calls.append(("IBuilderConfig.create_timing_cache", (data,)))
        return ITimingCache(bytes(data))

    def set_timing_cache(self, cache: ITimingCache, *, ignore_mismatch: bool) -> bool:
        calls.append(("IBuilderConfig.set_timing_cache", (ignore_mismatch,)))
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache:
        return self._cache


class RtxBuilderConfig(IBuilderConfig):
    num_compute_capabilities: int

    def set_compute_capability(self, capability: Any, index: int) -> None:
        calls.append(("IBuilderConfig.set_compute_capability", (capability.name, index)))


class ITensor(Strict):
    name: str
    dtype: DataType
    shape: tuple[int, ...]
    is_shape_tensor: bool

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        found = {"name": name, "dtype": DataType.HALF, "shape": shape, "is_shape_tensor": False}
        for setting, value in found.items():
            object.__setattr__(self, setting, value)


class INetworkDefinition(Strict):
    num_inputs: int

    def __init__(self, flags: int) -> None:
        calls.append(("Builder.create_network", (flags,)))
        self._flags = flags
        self._inputs: list[ITensor] = []

    def get_input(self, index: int) -> ITensor:
        return self._inputs[index]

    def get_flag(self, flag: NetworkDefinitionCreationFlag) -> bool:
        return bool(self._flags >> flag & 1)

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def _take(self, path: Path) -> None:
        """The inputs of a file, which this stand-in can read."""
        for value in onnx.load(path, load_external_data=False).graph.input:
            dims = value.type.tensor_type.shape.dim
            self._inputs.append(ITensor(value.name, tuple(d.dim_value or -1 for d in dims)))
        object.__setattr__(self, "num_inputs", len(self._inputs))


class ParserError(Strict):
    def __str__(self) -> str:
        return "In node 0 with name: node_linear and operator: Unheard: no operator of this name"


class OnnxParserFlag(enum.IntEnum):
    NATIVE_INSTANCENORM = 0


class OnnxParser(Strict):
    num_errors: int
    flags: int

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network = network
        object.__setattr__(self, "num_errors", 0)

    def parse_from_file(self, path: str) -> bool:
        calls.append(("OnnxParser.parse_from_file", (path,)))
        if Path(path).is_file():
            self._network._take(Path(path))
            return True
        object.__setattr__(self, "num_errors", 1)
        return False

    def get_error(self, index: int) -> ParserError:
        return ParserError()


class IHostMemory(bytes):
    def __enter__(self) -> "IHostMemory":
        return self

    def __exit__(self, *error: object) -> None: ...


class Builder(Strict):
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: Any, config: IBuilderConfig) -> IHostMemory | None:
        log = os.environ.get("FAKE_TENSORRT_LOG")
        for line in Path(log).read_text(encoding="utf-8").splitlines() if log else ():
            severity = Severity.ERROR if line.startswith("FATAL") else Severity.INFO
            self._logger.log(severity, line)
        if os.environ.get("FAKE_TENSORRT_END") == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        return None if os.environ.get("FAKE_TENSORRT_END") == "none" else IHostMemory(b"plan")


class RtxBuilder(Builder):
    def create_builder_config(self) -> IBuilderConfig:
        return RtxBuilderConfig()


class EngineInspector(Strict):
    def get_engine_information(self, format: LayerInformationFormat) -> str:
        return os.environ.get("FAKE_TENSORRT_LAYERS", '{"Layers": []}')


class IOutputAllocator:
    """What Polygraphy derives its own from, with methods that TensorRT calls by their names."""


class IExecutionContext(Strict):
    """Of a graph with bfloat16 inputs "x" (batch, 4) and "past" (batch, past); "y" is 2 x."""

    active_optimization_profile: int

    def __init__(self) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._allocator: Any = None
        object.__setattr__(self, "active_optimization_profile", 0)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = tuple(shape)
        return shape[0] <= 8

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes.get("x" if name == "y" else name, ())

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        calls.append(("IExecutionContext.set_tensor_address", (name, memory)))
        self._addresses[name] = memory
        return memory != 0

    def set_output_allocator(self, name: str, output_allocator: IOutputAllocator | None) -> bool:
        self._allocator = output_allocator
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        calls.append(("IExecutionContext.execute_async_v3", (stream_handle,)))
        if os.environ.get("FAKE_TENSORRT_END") == "no run":
            return False
        shape = self._shapes["x"]
        size = 2 * math.prod(shape)
        target = self._addresses.get("y", 0)
        if self._allocator is not None:
            target = self._allocator.reallocate_output_async("y", 0, size, 1, stream_handle)
            self._allocator.notify_shape("y", shape)
        value = np.frombuffer(ctypes.string_at(self._addresses["x"], size), ml_dtypes.bfloat16)
        ctypes.memmove(target, (value * ml_dtypes.bfloat16(2)).tobytes(), size)
        return True


class ICudaEngine(Strict):
    num_io_tensors: int

    def __init__(self) -> None:
        object.__setattr__(self, "num_io_tensors", 3)

    def get_tensor_name(self, index: int) -> str:
        return ("x", "past", "y")[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.OUTPUT if name == "y" else TensorIOMode.INPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType.BF16

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, -1) if name == "past" else (-1, 4)

    def get_tensor_format(self, name: str, profile: int) -> TensorFormat:
        return TensorFormat.LINEAR

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def create_execution_context(self) -> IExecutionContext | None:
        no_room = os.environ.get("FAKE_TENSORRT_END") == "no room"
        return None if no_room else IExecutionContext()

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector()


class Runtime(Strict):
    engine_host_code_allowed: bool

    def __init__(self, logger: ILogger) -> None: ...

    def deserialize_cuda_engine(self, plan: bytes) -> ICudaEngine | None:
        return ICudaEngine() if plan == b"plan" else None


class Refitter(Strict):
    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None: ...

    def refit_cuda_engine(self) -> bool:
        calls.append(("Refitter.refit_cuda_engine", ()))
        return True


class OnnxParserRefitter(Strict):
    def __init__(self, refitter: Refitter, logger: ILogger) -> None: ...

    def refit_from_file(self, path: str) -> bool:
        calls.append(("OnnxParserRefitter.refit_from_file", (path,)))
        return Path(path).is_file()


# The numbers differ between versions: STRIP_PLAN is 19 in 10.16 and 18 in 11.4.
_OLD_FLAGS = {
    "REFIT": 4, "TF32": 6, "SPARSE_WEIGHTS": 7, "VERSION_COMPATIBLE": 13, "STRIP_PLAN": 19,
}  # fmt: skip
_FLAGS = _OLD_FLAGS | {"VERSION_COMPATIBLE": 12, "STRIP_PLAN": 18}

CLASSES: tuple[type, ...] = (
    ILogger, Logger, NetworkDefinitionCreationFlag, ProfilingVerbosity, MemoryPoolType, DeviceType,
    HardwareCompatibilityLevel, LayerInformationFormat, TensorIOMode, TensorFormat, DataType,
    ITimingCache, IOptimizationProfile, IBuilderConfig, ITensor, INetworkDefinition, ParserError,
    OnnxParserFlag, OnnxParser, Builder, EngineInspector, IOutputAllocator, IExecutionContext,
    ICudaEngine, Runtime, Refitter, OnnxParserRefitter,
)  # fmt: skip


def library(version: Version) -> ModuleType:
    """A module in the shape of one version."""
    module = ModuleType("tensorrt_rtx" if version == "rtx" else "tensorrt")
    # Polygraphy asks for it to learn whether the library is installed.
    module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    found: dict[str, Any] = {kind.__name__: kind for kind in CLASSES}
    found["BuilderFlag"] = enum.IntEnum("BuilderFlag", _OLD_FLAGS if version == "10" else _FLAGS)
    if version == "rtx":
        capabilities = ["SM75", "SM80", "SM86", "SM89", "SM120", "SM121"]
        found["ComputeCapability"] = enum.IntEnum("ComputeCapability", capabilities)
        found |= {"Builder": RtxBuilder, "IBuilderConfig": RtxBuilderConfig}
    vars(module).update(
        found, **SHORT, init_libnvinfer_plugins=init_libnvinfer_plugins,
        __version__=NUMBERS[version],
    )  # fmt: skip
    return module


def offered(version: Version) -> dict[str, list[str]]:
    """Every public name of every class of one version, inherited settings included.

    Those of the module itself, which are no classes, stand under "".
    """
    names = {
        name: sorted(
            {
                entry
                for base in kind.__mro__
                if base.__module__ == __name__ or base is kind
                for entry in (*vars(base), *vars(base).get("__annotations__", {}))
                if not entry.startswith("_")
            }
        )
        for name, kind in vars(library(version)).items()
        if isinstance(kind, type)
    }
    return names | {"": [*SHORT, "init_libnvinfer_plugins"]}


def forget_polygraphy() -> None:
    """Let the next import of Polygraphy, which keeps the library that it found, find another."""
    for name in [name for name in sys.modules if name.split(".")[0] == "polygraphy"]:
        del sys.modules[name]


class HostCuda:
    """In the place of Polygraphy's wrapper of the CUDA runtime: memory of the host."""

    def __init__(self) -> None:
        self._rooms: dict[int, Any] = {}

    def create_stream(self) -> int:
        return 7

    def stream_synchronize(self, ptr: int) -> None: ...

    def destroy_stream(self, ptr: int) -> None: ...

    def malloc(self, nbytes: int) -> int:
        room = ctypes.create_string_buffer(max(nbytes, 1))
        self._rooms[ctypes.addressof(room)] = room
        return ctypes.addressof(room)

    def free(self, ptr: int) -> None:
        self._rooms.pop(ptr, None)

    def memcpy(self, dst: int, src: int, nbytes: int, kind: Any, stream_ptr: int = 0) -> None:
        ctypes.memmove(dst, src, nbytes)


def stand_in_for_cuda() -> None:
    """For the Polygraphy that is imported next, until it is forgotten."""
    vars(importlib.import_module("polygraphy.cuda.cuda"))["G_CUDA"] = HostCuda()
