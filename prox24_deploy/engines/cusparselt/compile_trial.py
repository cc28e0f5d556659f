"""Try in a process of its own whether a twin compiles, so that no compiler can end a build."""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from prox24_deploy.core.child import run_child
from prox24_deploy.core.records import Compilation
from prox24_deploy.core.shapes import Shape
from prox24_deploy.engines.cusparselt.compile_job import JOB, RESULT, CompileJob
from prox24_deploy.engines.cusparselt.inductor import with_another
from prox24_deploy.engines.cusparselt.torch_model import TorchModel
from prox24_deploy.quantization.tensors import QuantizedModel, rounded_outputs

_COMMAND = (sys.executable, "-m", "prox24_deploy.engines.cusparselt.compile_job")
# After which a compiler is taken to hang: until the model is built, and for each graph.
_START_SECONDS, _GRAPH_SECONDS = 300.0, 600.0
# A model that holds more of the GPU than this leaves it while a child builds the same in float32.
_MOST_SHARE = 1 / 8


def try_elsewhere(
    opened: TorchModel,
    shapes: Sequence[Shape],
    layers: Mapping[str, Mapping[int, int]],
    quantized: QuantizedModel | None = None,
    command: Sequence[str] = _COMMAND,
) -> Compilation:
    """Compile a twin in a child, for Inductor's cache.

    Args:
        opened: the model, its layers still dense.
        shapes: those that get a graph each.
        layers: those to be held compressed, with the algorithm by rows.
        quantized: what some layers multiply in 8 bits.
        command: reads and answers as `compile_job` does.

    Returns:
        How it went; its `reason` says why the twin is not to be compiled here. Nothing is tried of
        a model that no directory describes, and that is then compiled at the caller's own risk.
    """
    if opened.blueprint is None:
        return Compilation()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, _room_for_another(opened):
        job = CompileJob(
            blueprint=opened.blueprint,
            merged=opened.merged,
            layers={name: dict(algorithms) for name, algorithms in layers.items()},
            quantize=quantized.format if quantized else "none",
            input_scales={name: q.input_scale for name, q in quantized.layers.items()}
            if quantized
            else {},
            output_scales=rounded_outputs(opened.wrapped),
            shapes=tuple(shapes),
            result=Path(folder) / "result.json",
        )
        found = _run(job, command, Path(folder) / "log")
    return replace(found, seconds=time.perf_counter() - began)


def _run(job: CompileJob, command: Sequence[str], log: Path) -> Compilation:
    seconds = _START_SECONDS + _GRAPH_SECONDS * len(with_another(job.shapes))
    try:
        with log.open("wb") as file:
            code = run_child(command, JOB.dump_json(job), file, seconds)
    except subprocess.TimeoutExpired:
        return Compilation(reason=f"its compiler did not end within {seconds:.0f} s")
    if code == 0 and job.result.is_file():
        return RESULT.validate_json(job.result.read_bytes())
    last = _last_message(log.read_text(encoding="utf-8", errors="replace").split("\n"))
    if code < 0:
        said = f"its compiler was ended by a signal ({signal.strsignal(-code)})"
        return Compilation(reason=f"{said}, its last message was: {last}")
    return Compilation(reason=f"its compiler ended with code {code}: {last}")


def _last_message(lines: Sequence[str]) -> str:
    """The last line that begins one: what is indented behind it explains it, or is a link."""
    said = [line for line in lines if line.strip()]
    beginnings = [line for line in said if not line[0].isspace()]
    return (beginnings or said or ["it said nothing"])[-1].strip()


@contextmanager
def _room_for_another(opened: TorchModel) -> Iterator[None]:
    """Give memory of the GPU to a child: what this process has cached, and a large model's own."""
    place = next(opened.module.parameters()).device
    aside = _crowds(opened, place)
    if aside:
        _move(opened.module, torch.device("cpu"))
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        if aside:
            _move(opened.module, place)


def _crowds(opened: TorchModel, place: torch.device) -> bool:
    """Whether a model may leave too little of its GPU to another of its kind."""
    if place.type != "cuda":
        return False
    total = torch.cuda.get_device_properties(place).total_memory
    return opened.held_bytes() > _MOST_SHARE * total


def _move(module: nn.Module, place: torch.device) -> None:
    # transformers wraps `to` of a model in a decorator that loses its signature.
    nn.Module.to(module, place)
