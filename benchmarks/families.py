"""Every model family in every dtype, from a model directory to ONNX and TensorRT-RTX, in one table.

    python benchmarks/families.py [ROW ...] [--dtype DTYPE | --quantize FORMAT] [--jobs N]

The models are tiny and random, their weights projected to 2:4 by magnitude. The command fails
unless every row is exported, agrees with PyTorch, is proven 2:4, carries the bits of the checkpoint
and, where TensorRT-RTX is installed, builds for SM86 and SM120. With a format every row is
quantised instead (`quantized_families.py`).
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - makes "bfloat16" a dtype that numpy knows
import onnx
import torch
from onnx import numpy_helper
from safetensors import safe_open
from tiny_families import (
    FAMILIES,
    FEATURES,
    MODULES,
    PIXELS,
    REFUSED,
    REFUSED_DTYPES,
    VOCABULARY,
    tiny_model,
)
from tiny_sentences import write_modules
from torch import nn

from prox24_deploy.config.options import EngineOptions, TensorRtOptions
from prox24_deploy.config.recipe import Recipe, select_recipe
from prox24_deploy.core.errors import BackendMissingError, EngineError, ExportError, RecipeError
from prox24_deploy.core.records import OnnxModel
from prox24_deploy.core.types import DType
from prox24_deploy.engines.tensorrt.backend import open_tensorrt
from prox24_deploy.graph.check.check import check_path, require_24
from prox24_deploy.graph.export.export import export_graphs
from prox24_deploy.graph.export.module import TORCH_DTYPES
from prox24_deploy.graph.export.trace import Traces
from prox24_deploy.graph.parity.numerics import compare_with_torch
from prox24_deploy.model.blocks import find_blocks, target_layers
from prox24_deploy.model.checkpoint import checkpoint_name, renamed_tensors
from prox24_deploy.model.directory import ModelDir, load_model, open_model_dir
from prox24_deploy.model.layers import layer_at, reduction_axis
from prox24_deploy.model.recipe_template import advise
from prox24_deploy.model.sentence import fitted_to_sentences
from prox24_deploy.quantization.formats import FORMATS
from prox24_deploy.sparsity.pattern import mask_24

DTYPES: tuple[DType, ...] = ("float32", "float16", "bfloat16")
CAPABILITIES = ("SM86", "SM120")
NO_KERNELS = "no bfloat16 kernels"
NOT_INSTALLED = "not installed"
# Of models with experts, and what TensorRT-RTX says of them.
NO_ROUTES, NO_ROUTES_ERROR = "no NonZero", "operator: NonZero"
# Least and largest size of each axis in the optimisation profile.
BATCHES, SEQUENCES = (1, 4), (1, 32)


@dataclass(frozen=True)
class Row:
    """What one model did in one dtype; the two graphs of an encoder-decoder count together.

    `difference` is ONNX Runtime's largest from PyTorch over all outputs, relative to the largest
    magnitude of each, or why there is none. `same_bits` counts the `linear` weights alone: a
    convolution may be rescaled by the norm that is folded into it. `plans` says of each capability
    what came of it.
    """

    family: str
    dtype: DType
    outputs: int
    pruned: int
    proven: int
    linear: int
    same_bits: int
    difference: float | str
    plans: dict[str, str]
    seconds: float


def measure(family: str, dtype: DType) -> Row:
    """Take one model through everything; every failure but a missing TensorRT-RTX is raised."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        directory, recipe, names = write_pruned(root / "model", family, dtype)
        model = load_model(directory, recipe, torch.device("cpu"))
        # As in a build: what another model of the same form was traced for.
        traces = Traces()
        export_graphs(twin_of(model), recipe, root / "twin", dtype=dtype, traces=traces)
        paths = export_graphs(
            model, recipe, root / "onnx", dtype=dtype, sparse=names, traces=traces
        )
        assert len(traces) == len(paths), f"{family} is not traced once for both twins"
        require_24(report := check_path(root / "onnx"))
        checks = [
            check
            for part, path in zip(recipe.parts, paths, strict=True)
            for check in compare_with_torch(
                model, path, part, dtype=dtype, twin="sparse", vocabulary=VOCABULARY
            )
        ]
        # The tolerance is a fixed part of the largest magnitude: 1e-4 or 2e-2.
        part = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 0.0}[dtype]
        ratios = [part * check.max_abs_difference / check.tolerance for check in checks]
        return Row(
            family,
            dtype,
            sum(len(onnx.load(p, load_external_data=False).graph.output) for p in paths),
            len(names),
            sum(check.expected and check.is_24 for check in report.tensors),
            len(linear := [n for n in names if not isinstance(layer_at(model, n), nn.Conv2d)]),
            sum(same_bits(directory, path, linear) for path in paths),
            max(ratios) if ratios else NO_KERNELS,
            refused_plans(paths, dtype) if recipe.experts else build_plans(paths, dtype),
            time.perf_counter() - began,
        )


def twin_of(model: nn.Module) -> nn.Module:
    """A copy with other values in all its parameters."""
    twin = deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.mul_(0.5)
    return twin


def refusal(family: str) -> str:
    """What a family that cannot be exported is told; fails if it is not refused."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(family).save_pretrained(folder)  # type: ignore[operator]  # of transformers
        directory = open_model_dir(Path(folder))
        try:
            recipe_for(directory)
        except RecipeError as error:
            return str(error).replace(f" of {folder}", "")
    raise AssertionError(f"{family} is not refused any more; give it a row of its own")


def dtype_refusal(family: str, dtype: DType) -> str:
    """What is said of a family that cannot be exported in one dtype; fails if it can be."""
    try:
        measure(family, dtype)
    except ExportError as error:
        return str(error)
    raise AssertionError(f"{family} is not refused in {dtype} any more; give it a row of its own")


def recipe_for(directory: ModelDir) -> Recipe:
    """The shipped recipe that a build of this directory would take."""
    recipe, _ = select_recipe(directory.path, directory.model_type, None, lambda: advise(directory))
    fitted = fitted_to_sentences(recipe, directory.architecture, directory.path)
    return fitted.with_sizes(PIXELS | FEATURES)


def write_pruned(path: Path, family: str, dtype: DType) -> tuple[ModelDir, Recipe, list[str]]:
    """Write the family's model in `dtype` with all targets 2:4; also returns their names."""
    model = tiny_model(family)
    model.save_pretrained(path)  # type: ignore[operator]  # a transformers model
    if family in MODULES:
        write_modules(path, *MODULES[family])
    directory = open_model_dir(path)
    recipe = recipe_for(directory)
    names = targets(model, recipe)
    for name in names:
        layer = model.get_submodule(name)
        weight = layer.get_parameter("weight")
        kept = mask_24(weight.data.abs(), reduction_axis(layer))  # type: ignore[arg-type]
        weight.data = torch.where(kept, weight.data, 0.0)
    nn.Module.to(model, TORCH_DTYPES[dtype])
    model.save_pretrained(path)  # type: ignore[operator]
    directory = open_model_dir(path)
    loaded = load_model(directory, recipe, torch.device("cpu"))
    return replace(directory, renamed=renamed_tensors(directory, loaded, recipe)), recipe, names


def targets(model: nn.Module, recipe: Recipe) -> list[str]:
    """Module paths of every layer that the recipe prunes."""
    return [
        f"{part.blocks}.{i}.{name}"
        for part in recipe.parts
        for i, block in enumerate(find_blocks(model, part))
        for name in target_layers(block, part)
    ]


def same_bits(directory: ModelDir, path: Path, names: Sequence[str]) -> int:
    """How many weights have the bytes of the checkpoint in the ONNX file, plain or transposed."""
    stored = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer
    }
    return sum(
        any(
            f"{name}.{suffix}" in stored
            and stored[f"{name}.{suffix}"].tobytes()
            == _bytes(directory, name, transposed=transposed)
            for suffix, transposed in (("weight_t", True), ("weight", False))
        )
        for name in names
    )


def _bytes(directory: ModelDir, name: str, *, transposed: bool) -> bytes:
    tensor_name = checkpoint_name(directory, f"{name}.weight")
    with safe_open(directory.tensors[tensor_name].shard, framework="pt") as handle:
        tensor: torch.Tensor = handle.get_tensor(tensor_name)
    tensor = (tensor.T if transposed else tensor).contiguous()
    return tensor.view(torch.uint8).numpy().tobytes()


def build_plans(
    paths: Sequence[Path], dtype: DType, capabilities: tuple[str, ...] = CAPABILITIES
) -> dict[str, str]:
    """Compile every graph into one plan for all capabilities; the bytes of all plans."""
    tensorrt = TensorRtOptions(capabilities=capabilities)
    options = EngineOptions(batches=BATCHES, sequences=SEQUENCES, tensorrt=tensorrt)
    try:
        backend = open_tensorrt("tensorrt_rtx", options)
    except BackendMissingError:
        return dict.fromkeys(capabilities, NOT_INSTALLED)
    size = 0
    for path in paths:
        model = OnnxModel(
            path=path.name, dtype=dtype, opset=20, sha256="", size_bytes=path.stat().st_size
        )
        out = Path("plans") / path.stem
        size += backend.build(path.parent, model, out, twin="sparse").size_bytes
    return dict.fromkeys(capabilities, f"{size} B")


def refused_plans(paths: Sequence[Path], dtype: DType) -> dict[str, str]:
    """That TensorRT-RTX lacks what routes tokens to experts; fails if it does not any more."""
    try:
        plans = build_plans(paths, dtype)
    except EngineError as error:
        told = NO_ROUTES if NO_ROUTES_ERROR in str(error) else str(error)
        return dict.fromkeys(CAPABILITIES, told)
    assert set(plans.values()) == {NOT_INSTALLED}, "TensorRT-RTX has NonZero now: expect a plan"
    return plans


def require(row: Row) -> None:
    """Assert what every row must reach."""
    assert row.pruned == row.proven > 0, row
    assert row.same_bits == row.linear, row
    assert (row.difference == NO_KERNELS) == (row.dtype == "bfloat16"), row
    told = {NOT_INSTALLED, NO_ROUTES}
    assert all(plan in told or plan.endswith(" B") for plan in row.plans.values()), row


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    head = ["family", "dtype", "outputs", "ONNX Runtime", "2:4", "same bits", *CAPABILITIES, "s"]
    cells = [
        [
            row.family,
            row.dtype,
            str(row.outputs),
            row.difference if isinstance(row.difference, str) else f"{row.difference:.1e}",
            f"{row.proven}/{row.pruned}",
            f"{row.same_bits}/{row.linear}",
            *(row.plans[name] for name in CAPABILITIES),
            f"{row.seconds:.1f}",
        ]
        for row in rows
    ]
    return aligned(head, cells)


def aligned(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A head and rows of cells as text."""
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    lines = [head, ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def prepare() -> None:
    """Set up a process of the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", default=list(FAMILIES), metavar="ROW")
    parser.add_argument("--dtype", choices=DTYPES, help="one dtype in place of all three")
    parser.add_argument("--quantize", choices=FORMATS, help="quantise the models, in float16")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options: Any = parser.parse_args(arguments)
    if options.quantize:
        # It imports this module, which runs as the main one.
        from quantized_families import main as quantized

        quantized(options.rows, options.quantize, options.jobs)
        return
    began = time.perf_counter()
    dtypes = (options.dtype,) if options.dtype else DTYPES
    refused_dtypes = {pair: why for pair, why in REFUSED_DTYPES.items() if pair[1] in dtypes}
    pairs = [(f, d) for f in options.rows for d in dtypes if (f, d) not in refused_dtypes]
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), prepare) as pool:
        rows = list(pool.map(measure, *zip(*pairs, strict=True)))
    seconds = time.perf_counter() - began
    refused = {family: refusal(family) for family in REFUSED}
    refused |= {", ".join(pair): dtype_refusal(*pair) for pair in refused_dtypes}
    print(table(rows))
    print("\nNot exported:\n" + "\n".join(f"{name}: {why}" for name, why in refused.items()))
    print(json.dumps({"families": [asdict(row) for row in rows], "seconds": round(seconds, 1)}))
    for row in rows:
        require(row)
    reasons = {family: why for family, (_, _, why) in REFUSED.items()}
    reasons |= {", ".join(pair): why for pair, why in refused_dtypes.items()}
    for name, why in reasons.items():
        assert refused[name].endswith(why), refused[name]


if __name__ == "__main__":
    main(sys.argv[1:])
