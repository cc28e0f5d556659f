"""Build one TensorRT engine, in a process of its own: `python -m` this module, a job on stdin.

One path for TensorRT 10, TensorRT 11 and TensorRT-RTX, by the API that all of them document. What
they print goes to the log that the parent keeps, and so does what this module adds to it. Whatever
goes wrong ends the process; the parent reads the log.

Full TensorRT was not exercised: no machine that tests this has it. TensorRT-RTX was, without a GPU.
"""

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prox24_deploy.config.options import Compatibility
from prox24_deploy.core.atomic import write_atomic
from prox24_deploy.core.errors import EngineError
from prox24_deploy.engines.child import end_on_termination

# Least, usual and largest shape of one input.
ShapeRange = tuple[Sequence[int], Sequence[int], Sequence[int]]
GIB = 2**30
# Said where the builder itself has said why.
NO_ENGINE = "builder: it made no engine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to build, as JSON on the way from parent to child.

    `flags` are names of BuilderFlag, `ranges` by graph input what the one optimisation profile
    allows, `capabilities` those of ComputeCapability (TensorRT-RTX only). `layers` is where to
    write the inspector's JSON, None where no GPU can load the engine.
    """

    library: str
    onnx: str
    plan: str
    layers: str | None
    flags: Sequence[str]
    ranges: Mapping[str, ShapeRange]
    capabilities: Sequence[str]
    workspace_gib: float | None
    builder_level: int | None
    compatibility: Compatibility
    timing_cache: str | None


def run_job(job: Job) -> None:
    """Build as the job says and write the plan, the timing cache and the layers.

    Raises:
        EngineError: the file does not parse, does not build, or asks for what the library lacks.
    """
    trt = importlib.import_module(job.library)
    messages = trt.Logger(trt.Logger.VERBOSE)
    builder = trt.Builder(messages)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, messages)
    # The path, so that external data is found beside it.
    if not parser.parse_from_file(job.onnx):
        raise EngineError(f"parser: {_parser_error(parser)}")
    config = _config(trt, builder, job)
    for line in _settings(trt, config, job):
        messages.log(trt.Logger.INFO, f"prox24-deploy: {line}")
    cache = Path(job.timing_cache) if job.timing_cache else None
    if cache:
        _use_timings(config, cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(NO_ENGINE)
    Path(job.plan).write_bytes(plan)
    if cache:
        _keep_timings(config, cache)
    if job.layers:
        Path(job.layers).write_text(_inspect(trt, messages, plan, job), encoding="utf-8")


def open_engine(trt: Any, messages: Any, plan: Any, flags: Sequence[str]) -> Any:
    """Deserialise a plan that was built with these flags.

    Raises:
        EngineError: this library or this GPU cannot load it.
    """
    runtime = trt.Runtime(messages)
    # A version-compatible plan brings its own lean runtime, which is host code.
    runtime.engine_host_code_allowed = "VERSION_COMPATIBLE" in flags
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(
            "The engine does not load here, on this GPU with this version of the library; compile "
            "it again on this machine."
        )
    return engine


def _parser_error(parser: Any) -> str:
    if not parser.num_errors:
        return "no reason given"
    error = parser.get_error(0)
    return f"node {error.node_name()} ({error.node_operator()}): {error.desc()}"


def _config(trt: Any, builder: Any, job: Job) -> Any:
    config = builder.create_builder_config()
    # Details, so that the inspector names the kernel of each layer.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for name in job.flags:
        config.set_flag(_builder_flag(trt, name))
    if job.workspace_gib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(job.workspace_gib * GIB))
    if job.builder_level is not None:
        config.builder_optimization_level = job.builder_level
    if job.compatibility == "ampere+":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if job.capabilities:
        config.num_compute_capabilities = len(job.capabilities)
        for index, name in enumerate(job.capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    profile = builder.create_optimization_profile()
    for name, shapes in job.ranges.items():
        profile.set_shape(name, *(tuple(shape) for shape in shapes))
    if config.add_optimization_profile(profile) < 0:
        raise EngineError(f"builder: it refuses the optimisation profile {dict(job.ranges)}")
    return config


def _builder_flag(trt: Any, name: str) -> Any:
    """A flag by its name, because its number differs between versions."""
    if not hasattr(trt.BuilderFlag, name):
        raise EngineError(f"builder: version {trt.__version__} has no flag {name}")
    return getattr(trt.BuilderFlag, name)


def _settings(trt: Any, config: Any, job: Job) -> list[str]:
    """What was set, as the configuration gives it back."""
    taken = [name for name in job.flags if config.get_flag(_builder_flag(trt, name))]
    lost = sorted(set(job.flags) - set(taken))
    if lost:
        raise EngineError(f"builder: it does not take the flags {', '.join(lost)}")
    return [
        f"version {trt.__version__}, flags {', '.join(taken) or 'none'}",
        f"optimisation level {config.builder_optimization_level}, workspace "
        f"{config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)} bytes",
        f"compatibility {job.compatibility}, targets {', '.join(job.capabilities) or 'this GPU'}",
        *(f"profile of {name}: {shapes}" for name, shapes in job.ranges.items()),
    ]


def _use_timings(config: Any, path: Path) -> None:
    stored = path.read_bytes() if path.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(stored), ignore_mismatch=False):
        raise EngineError(f"builder: it refuses the timing cache {path}; delete it")


def _keep_timings(config: Any, path: Path) -> None:
    # Of builds that share it at the same time the last one wins; what is lost is timed again.
    write_atomic(path, bytes(config.get_timing_cache().serialize()))


def _inspect(trt: Any, messages: Any, plan: Any, job: Job) -> str:
    inspector = open_engine(trt, messages, plan, job.flags).create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


if __name__ == "__main__":
    end_on_termination()
    run_job(Job(**json.load(sys.stdin)))
