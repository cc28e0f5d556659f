"""Compile a twin in a process of its own: `python -m` this module, a job on stdin.

A compiler may end the process, or never end. What it makes stays in Inductor's cache, from which
the parent takes it. Structure alone is compiled, so the weights are random: none is read.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from prox24_deploy.core.atomic import write_atomic
from prox24_deploy.core.child import end_on_termination
from prox24_deploy.core.records import Compilation
from prox24_deploy.core.shapes import Shape
from prox24_deploy.core.types import Quantize
from prox24_deploy.engines.cusparselt.inductor import try_compiling
from prox24_deploy.engines.cusparselt.merge import Groups
from prox24_deploy.engines.cusparselt.quantized import multiply_as, untrained
from prox24_deploy.engines.cusparselt.torch_model import Blueprint, build_torch_model
from prox24_deploy.model.layers import layer_at
from prox24_deploy.quantization.tensors import RoundedOutput, apply_inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileJob:
    """What to compile, as JSON on the way from parent to child.

    Groups of `merged` are one product each. `layers` are held compressed, with the algorithm for
    each number of rows; each of `shapes` gets a graph of its own. Layers in `input_scales` are
    quantised to `quantize`, and those in `output_scales` round what they give. How it went is
    written to `result`.
    """

    blueprint: Blueprint
    merged: Groups
    layers: dict[str, dict[int, int]]
    quantize: Quantize
    input_scales: dict[str, float]
    output_scales: dict[str, float]
    shapes: tuple[Shape, ...]
    result: Path


JOB, RESULT = TypeAdapter(CompileJob), TypeAdapter(Compilation)


def run_job(job: CompileJob) -> None:
    """Compile as the job says, run what was compiled, and write how it went."""
    opened = build_torch_model(job.blueprint)
    opened = opened.merge(job.merged)
    for name in job.layers:
        # Zeros are 2:4 too.
        layer_at(opened.wrapped, name).weight.zero_()
    quantized = None
    if job.quantize != "none":
        quantized = untrained(opened.wrapped, job.quantize, job.input_scales)
        apply_inputs(opened.wrapped, quantized)
        for name, scale in job.output_scales.items():
            hook = RoundedOutput(job.quantize, scale)
            opened.wrapped.get_submodule(name).register_forward_hook(hook)
    multiply_as(opened.wrapped, job.layers, quantized)
    runs = [opened.inputs(one) for one in opened.trial_feeds(job.shapes)]
    _, compilation = try_compiling(opened.compiled(job.shapes), runs)
    write_atomic(job.result, RESULT.dump_json(compilation))


if __name__ == "__main__":
    end_on_termination()
    run_job(JOB.validate_json(sys.stdin.buffer.read()))
