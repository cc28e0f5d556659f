"""Build one TensorRT engine, in a process of its own: `python -m` this module, a job on stdin.

Polygraphy's loaders parse, configure and build, for TensorRT 10, TensorRT 11 and TensorRT-RTX. What
they and the library print goes to the log that the parent keeps. Whatever goes wrong ends the
process; the parent reads the log.

Full TensorRT was not exercised: no machine that tests this has it. TensorRT-RTX was, without a GPU.
"""

import glob
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prox24_deploy.config.options import Compatibility
from prox24_deploy.core.child import end_on_termination
from prox24_deploy.engines.tensorrt.library import Library, messages, polygraphy_for

# Least, usual and largest shape of one input.
ShapeRange = tuple[Sequence[int], Sequence[int], Sequence[int]]
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to build, as JSON on the way from parent to child.

    `flags` are names of BuilderFlag, `ranges` by graph input what the one optimisation profile
    allows, `capabilities` those of ComputeCapability (TensorRT-RTX only). `layers` is where to
    write the inspector's JSON, None where no GPU can load the engine.
    """

    library: Library
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
        PolygraphyException: the file does not parse, does not build, or asks for what the library
            lacks.
    """
    polygraphy = polygraphy_for(job.library)
    # All that TensorRT says: its verbose messages are Polygraphy's extra verbose ones.
    messages().module_severity = messages().EXTRA_VERBOSE
    trt = importlib.import_module(job.library)
    if job.timing_cache:
        # For the lock that Polygraphy puts beside it before it looks for the cache itself.
        Path(job.timing_cache).parent.mkdir(parents=True, exist_ok=True)
    # No plugin is in an engine for other versions or GPUs: as Polygraphy's command line has it.
    native = [trt.OnnxParserFlag.NATIVE_INSTANCENORM] if job.compatibility != "none" else None
    plan = polygraphy.EngineBytesFromNetwork(
        # The path, so that external data is found beside it.
        polygraphy.NetworkFromOnnxPath(job.onnx, strongly_typed=True, flags=native),
        config=_config(polygraphy, trt, job),
        save_timing_cache=job.timing_cache,
    )()
    Path(job.plan).write_bytes(plan)
    if job.layers:
        engine = polygraphy.EngineFromBytes(plan)()
        Path(job.layers).write_text(_layers(trt, engine), encoding="utf-8")


def _config(polygraphy: Any, trt: Any, job: Job) -> Any:
    """Polygraphy's loader of the settings; details for the inspector are its default."""
    profile = polygraphy.Profile()
    for name, (least, usual, most) in job.ranges.items():
        # Names there are patterns.
        profile.add(glob.escape(name), tuple(least), tuple(usual), tuple(most))
    everywhere = job.compatibility == "ampere+"
    workspace = None if job.workspace_gib is None else int(job.workspace_gib * GIB)
    return _kind(polygraphy, job)(
        profiles=[profile],
        sparse_weights="SPARSE_WEIGHTS" in job.flags,
        version_compatible="VERSION_COMPATIBLE" in job.flags,
        strip_plan="STRIP_PLAN" in job.flags,
        refittable="REFIT" in job.flags,
        hardware_compatibility_level=(
            trt.HardwareCompatibilityLevel.AMPERE_PLUS if everywhere else None
        ),
        memory_pool_limits=workspace and {trt.MemoryPoolType.WORKSPACE: workspace},
        builder_optimization_level=job.builder_level,
        load_timing_cache=job.timing_cache,
    )


def _kind(polygraphy: Any, job: Job) -> Any:
    """The loader of one library with what only that has."""
    if job.library == "tensorrt_rtx":
        rtx = importlib.import_module("polygraphy.backend.tensorrt_rtx")
        targets = [divmod(int(name.removeprefix("SM")), 10) for name in job.capabilities]
        return partial(rtx.CreateConfigRTX, compute_capabilities=targets)
    # On, as in TensorRT itself and in trtexec; Polygraphy alone turns it off.
    return partial(polygraphy.CreateConfig, tf32=True)


def _layers(trt: Any, engine: Any) -> str:
    """The inspector's own JSON.

    Not by Polygraphy's `inspect model`, which leaves out the nodes that a layer was made from and,
    where a tactic has a number, the name of its kernel; both are what is looked for. It also asks
    for `tensorrt` where TensorRT-RTX is meant (0.53.6).
    """
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


if __name__ == "__main__":
    end_on_termination()
    run_job(Job(**json.load(sys.stdin)))
