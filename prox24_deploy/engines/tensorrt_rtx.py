"""TensorRT-RTX: compile an ONNX file for GPUs that need not be in this machine.

What it proves without a GPU is that the file parses and builds. Which kernels run is decided on the
GPU, so nothing here says that a 2:4 weight is multiplied by a sparse kernel.
"""

import importlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prox24_deploy.errors import BackendMissingError, EngineError

# Least, usual and largest shape of one input.
ShapeRange = tuple[Sequence[int], Sequence[int], Sequence[int]]


def compile_plans(
    onnx: Path, out: Path, capabilities: Sequence[str], ranges: Mapping[str, ShapeRange]
) -> dict[str, Path]:
    """Compile one plan per compute capability ("SM86") into `out`, in a process of its own.

    A failed build leaves state behind and native code may crash; neither reaches the caller.

    Args:
        onnx: the file; external data lies beside it.
        out: folder for `SM86.plan` and its likes; made where it is missing.
        capabilities: names of `tensorrt_rtx.ComputeCapability`.
        ranges: by graph input, what the one optimisation profile allows.

    Returns:
        The plans by capability.

    Raises:
        BackendMissingError: TensorRT-RTX is not installed.
        EngineError: the file does not parse or does not build; says what the builder said.
    """
    load_library()
    out.mkdir(parents=True, exist_ok=True)
    plans = {capability: out / f"{capability}.plan" for capability in capabilities}
    job = {
        "onnx": str(onnx),
        "plans": {capability: str(plan) for capability, plan in plans.items()},
        "ranges": {name: [list(shape) for shape in shapes] for name, shapes in ranges.items()},
    }
    ran = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        said = ran.stderr.strip().splitlines() or [f"it ended with code {ran.returncode}"]
        raise EngineError(
            f"TensorRT-RTX does not compile {onnx} for {', '.join(capabilities)}: {said[-1]}; "
            "export it again with another opset or dtype."
        )
    return plans


def load_library() -> Any:
    """Import `tensorrt_rtx`.

    Raises:
        BackendMissingError: it is not installed, or a library that it needs is not.
    """
    try:
        return importlib.import_module("tensorrt_rtx")
    except ImportError as error:
        raise BackendMissingError(
            f"TensorRT-RTX is not installed ({error}); pip install tensorrt-rtx-cu13."
        ) from error


def run_job(job: Mapping[str, Any]) -> None:
    """Compile as `compile_plans` says, in this process.

    Raises:
        EngineError: the file does not parse or does not build.
    """
    rtx = load_library()
    logger = rtx.Logger(rtx.Logger.ERROR)
    for capability, plan in job["plans"].items():
        builder = rtx.Builder(logger)
        flags = 1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(flags)
        parser = rtx.OnnxParser(network, logger)
        if not parser.parse_from_file(job["onnx"]):
            reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise EngineError(f"parser: {reasons[0] if reasons else 'no reason given'}")
        built = builder.build_serialized_network(
            network, _config(rtx, builder, capability, job["ranges"])
        )
        if built is None:
            raise EngineError(f"builder: no plan for {capability}, see its messages")
        Path(plan).write_bytes(built)


def _config(rtx: Any, builder: Any, capability: str, ranges: Mapping[str, ShapeRange]) -> Any:
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(rtx.ComputeCapability, capability), 0)
    profile = builder.create_optimization_profile()
    for name, shapes in ranges.items():
        profile.set_shape(name, *(tuple(shape) for shape in shapes))
    config.add_optimization_profile(profile)
    return config


if __name__ == "__main__":
    run_job(json.load(sys.stdin))
