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
    decodes: its sequences begin at 1 and its past at 0, which ends at the longest asked for.
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
    most = {
        "batch": max(options.batches),
        "sequence": longest,
        "past": max((longest, *options.pasts)),
        # What a decoder reads of an encoder is as long as what it has written.
        "source": max((longest, *(past + 1 for past in options.pasts))),
    }
    return {
        spec.name: (shape_of(spec, least), shape_of(spec, most), shape_of(spec, most))
        for spec in inputs
    }


def timed_shapes(model: Path, options: EngineOptions) -> tuple[Mapping[str, Sequence[int]], ...]:
    """The shapes of every input that an engine is timed at, those of `feeds.random_feeds`."""
    inputs = _inputs(model)
    names = dynamic_names(inputs)
    shapes = options.shapes(images="sequence" not in names, cached="past" in names)
    return tuple({spec.name: shape_of(spec, one.sizes) for spec in inputs} for one in shapes)


def _inputs(model: Path) -> list[TensorSpec]:
    return [
        TensorSpec(
            name=value.name,
            dtype="float",
            axes=[dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in onnx.load(model, load_external_data=False).graph.input
    ]
