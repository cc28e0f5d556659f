"""The shapes of the inputs of a graph that engines are built for, and those they are timed at."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx

from prox24_deploy.config.options import EngineOptions
from prox24_deploy.config.recipe import TensorSpec, dynamic_names, shape_of
from prox24_deploy.engines.tensorrt.job import ShapeRange


def profile_of(model: Path, options: EngineOptions) -> dict[str, ShapeRange]:
    """Least, usual and largest shape of every input, over all shapes asked for.

    Kernels are timed at the usual shape, which is the largest asked for. A graph with a cache also
    decodes: its sequences begin at 1 and its past at 0.
    """
    longest = max(options.sequences)
    inputs = _inputs(model)
    cached = any("past" in spec.axes for spec in inputs)
    least = {
        "batch": min(options.batches),
        "sequence": 1 if cached else min(options.sequences),
        "past": 0,
        "source": min(options.sequences),
    }
    most = {"batch": max(options.batches), **dict.fromkeys(("sequence", "past", "source"), longest)}
    return {
        spec.name: (shape_of(spec, least), shape_of(spec, most), shape_of(spec, most))
        for spec in inputs
    }


def timed_shapes(model: Path, options: EngineOptions) -> tuple[Mapping[str, Sequence[int]], ...]:
    """The shapes of every input that an engine is timed at, those of `feeds.random_feeds`."""
    inputs = _inputs(model)
    shapes = options.shapes(images="sequence" not in dynamic_names(inputs))
    sizes = [{"batch": b, "sequence": s, "source": s, "past": 0} for b, s in shapes]
    return tuple({spec.name: shape_of(spec, each) for spec in inputs} for each in sizes)


def _inputs(model: Path) -> list[TensorSpec]:
    return [
        TensorSpec(
            name=value.name,
            dtype="float",
            axes=[dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in onnx.load(model, load_external_data=False).graph.input
    ]
