"""A stand-in for TensorRT, for tests alone: full TensorRT cannot be installed where they run.

It has the classes and names that our code may use and no others, with the differences between
versions 10, 11 and TensorRT-RTX; it computes nothing and records every setting. That the names are
those of the real bindings is tested in `test_tensorrt_names.py`.

As a library of a process that builds it reads three variables: FAKE_TENSORRT_LOG, what to print
while building; FAKE_TENSORRT_LAYERS, what its inspector says; FAKE_TENSORRT_END, "none" to build
nothing, "crash" to die in native code.
"""

import enum
import os
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

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
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class Logger(Strict):
    WARNING, INFO, VERBOSE = Severity.WARNING, Severity.INFO, Severity.VERBOSE

    def __init__(self, severity: Severity) -> None:
        calls.append(("Logger", (severity,)))

    def log(self, severity: Severity, msg: str) -> None:
        sys.stdout.write(f"[11/25/2026-12:00:00] [TRT] [I] {msg}\n")


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class ProfilingVerbosity(enum.IntEnum):
    DETAILED = 2


class MemoryPoolType(enum.IntEnum):
    WORKSPACE = 0


class HardwareCompatibilityLevel(enum.IntEnum):
    AMPERE_PLUS = 1


class LayerInformationFormat(enum.IntEnum):
    JSON = 1


class TensorIOMode(enum.IntEnum):
    INPUT = 1
    OUTPUT = 2


class DataType(enum.IntEnum):
    FLOAT = 0
    HALF = 1
    INT32 = 3
    BOOL = 4
    BF16 = 7
    INT64 = 8


class ITimingCache(Strict):
    def __init__(self, data: bytes) -> None:
        self._data = data

    def serialize(self) -> bytes:
        return self._data + b"timed;"


class IOptimizationProfile(Strict):
    def set_shape(self, name: str, low: Any, opt: Any, high: Any) -> None:
        calls.append(("IOptimizationProfile.set_shape", (name, low, opt, high)))


class IBuilderConfig(Strict):
    profiling_verbosity: ProfilingVerbosity
    builder_optimization_level: int
    hardware_compatibility_level: HardwareCompatibilityLevel

    def __init__(self) -> None:
        self._flags: set[Any] = set()
        self._cache = ITimingCache(b"")
        object.__setattr__(self, "builder_optimization_level", 3)

    def set_flag(self, flag: Any) -> None:
        calls.append(("IBuilderConfig.set_flag", (flag.name,)))
        self._flags.add(flag)

    def get_flag(self, flag: Any) -> bool:
        return flag in self._flags and os.environ.get("FAKE_TENSORRT_END") != "no flags"

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        calls.append(("IBuilderConfig.set_memory_pool_limit", (pool, size)))

    def get_memory_pool_limit(self, pool: MemoryPoolType) -> int:
        return 2**30

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        return -1 if os.environ.get("FAKE_TENSORRT_END") == "no profile" else 0

    def create_timing_cache(self, data: bytes) -> ITimingCache:
        calls.append(("IBuilderConfig.create_timing_cache", (data,)))
        return ITimingCache(data)

    def set_timing_cache(self, cache: ITimingCache, *, ignore_mismatch: bool) -> bool:
        calls.append(("IBuilderConfig.set_timing_cache", (ignore_mismatch,)))
        self._cache = cache
        return cache._data != b"of another version"

    def get_timing_cache(self) -> ITimingCache:
        return self._cache


class RtxBuilderConfig(IBuilderConfig):
    num_compute_capabilities: int

    def set_compute_capability(self, capability: Any, index: int) -> None:
        calls.append(("IBuilderConfig.set_compute_capability", (capability.name, index)))


class INetworkDefinition(Strict):
    def __init__(self, flags: int) -> None:
        calls.append(("Builder.create_network", (flags,)))


class ParserError(Strict):
    def desc(self) -> str:
        return "no operator of this name"

    def node_name(self) -> str:
        return "node_linear"

    def node_operator(self) -> str:
        return "Unheard"


class OnnxParser(Strict):
    num_errors: int

    def __init__(self, network: INetworkDefinition, logger: Logger) -> None:
        object.__setattr__(self, "num_errors", 1)

    def parse_from_file(self, path: str) -> bool:
        calls.append(("OnnxParser.parse_from_file", (path,)))
        return Path(path).is_file()

    def get_error(self, index: int) -> ParserError:
        return ParserError()


class Builder(Strict):
    def __init__(self, logger: Logger) -> None: ...

    def create_network(self, flags: int) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: Any, config: IBuilderConfig) -> bytes | None:
        log = os.environ.get("FAKE_TENSORRT_LOG")
        sys.stdout.write(Path(log).read_text(encoding="utf-8") if log else "")
        sys.stdout.flush()
        if os.environ.get("FAKE_TENSORRT_END") == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        return None if os.environ.get("FAKE_TENSORRT_END") == "none" else b"plan"


class RtxBuilder(Builder):
    def create_builder_config(self) -> IBuilderConfig:
        return RtxBuilderConfig()


class EngineInspector(Strict):
    def get_engine_information(self, format: LayerInformationFormat) -> str:
        return os.environ.get("FAKE_TENSORRT_LAYERS", '{"Layers": []}')


class IExecutionContext(Strict):
    """Of a graph with inputs "x" (batch, 4) and "past" (batch, past); "y" doubles x in place."""

    def __init__(self) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return shape[0] <= 8

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes["x"]

    def set_tensor_address(self, name: str, address: int) -> bool:
        calls.append(("IExecutionContext.set_tensor_address", (name, address)))
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        calls.append(("IExecutionContext.execute_async_v3", (stream_handle,)))
        return os.environ.get("FAKE_TENSORRT_END") != "no run"


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

    def create_execution_context(self) -> IExecutionContext | None:
        no_room = os.environ.get("FAKE_TENSORRT_END") == "no room"
        return None if no_room else IExecutionContext()

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector()


class Runtime(Strict):
    engine_host_code_allowed: bool

    def __init__(self, logger: Logger) -> None: ...

    def deserialize_cuda_engine(self, plan: bytes) -> ICudaEngine | None:
        return ICudaEngine() if plan == b"plan" else None


class Refitter(Strict):
    def __init__(self, engine: ICudaEngine, logger: Logger) -> None: ...

    def refit_cuda_engine(self) -> bool:
        calls.append(("Refitter.refit_cuda_engine", ()))
        return True


class OnnxParserRefitter(Strict):
    def __init__(self, refitter: Refitter, logger: Logger) -> None: ...

    def refit_from_file(self, path: str) -> bool:
        calls.append(("OnnxParserRefitter.refit_from_file", (path,)))
        return Path(path).is_file()


# The numbers differ between versions: STRIP_PLAN is 19 in 10.16 and 18 in 11.4.
_OLD_FLAGS = {
    "REFIT": 4, "SPARSE_WEIGHTS": 7, "VERSION_COMPATIBLE": 13, "STRIP_PLAN": 19,
    "REFIT_IDENTICAL": 20,
}  # fmt: skip
_FLAGS = _OLD_FLAGS | {"VERSION_COMPATIBLE": 12, "STRIP_PLAN": 18, "REFIT_IDENTICAL": 19}

CLASSES: tuple[type, ...] = (
    Logger, NetworkDefinitionCreationFlag, ProfilingVerbosity, MemoryPoolType,
    HardwareCompatibilityLevel, LayerInformationFormat, TensorIOMode, DataType, ITimingCache,
    IOptimizationProfile, IBuilderConfig, INetworkDefinition, ParserError, OnnxParser, Builder,
    EngineInspector, IExecutionContext, ICudaEngine, Runtime, Refitter, OnnxParserRefitter,
)  # fmt: skip


def library(version: Version) -> ModuleType:
    """A module in the shape of one version."""
    module = ModuleType("tensorrt_rtx" if version == "rtx" else "tensorrt")
    found: dict[str, Any] = {kind.__name__: kind for kind in CLASSES}
    found["BuilderFlag"] = enum.IntEnum("BuilderFlag", _OLD_FLAGS if version == "10" else _FLAGS)
    if version == "rtx":
        capabilities = ["SM75", "SM80", "SM86", "SM89", "SM120", "SM121"]
        found["ComputeCapability"] = enum.IntEnum("ComputeCapability", capabilities)
        found |= {"Builder": RtxBuilder, "IBuilderConfig": RtxBuilderConfig}
    vars(module).update(found, __version__=NUMBERS[version])
    return module


def offered(version: Version) -> dict[str, list[str]]:
    """Every public name of every class of one version, inherited settings included."""
    return {
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
