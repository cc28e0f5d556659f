"""The stage that exports the dense and the sparse twin, compared with PyTorch and proven."""

import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from prox24_deploy.bundle.bundle import Bundle
from prox24_deploy.bundle.layout import ONNX
from prox24_deploy.bundle.stage import Artifact, Stage, Workspace
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.atomic import make_folder
from prox24_deploy.core.records import (
    ExportResult,
    NumericsCheck,
    OnnxModel,
    PruneResult,
)
from prox24_deploy.core.types import TWINS, DType, Progress, Twin
from prox24_deploy.pipeline.context import MEMORY_LIMIT, torch_device, vocabulary_of
from prox24_deploy.pipeline.stages.quantize import quantized_of, tensors_of
from prox24_deploy.pipeline.stages.recover import shipped_of
from prox24_deploy.pipeline.stages.versions import numeric_versions

if TYPE_CHECKING:
    from prox24_deploy.graph.export.trace import Traces
    from prox24_deploy.model.directory import ModelDir


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportInputs:
    """What the ONNX files, their proof and their numerics depend on; `layers` were pruned."""

    source: "ModelDir"
    pruned: Artifact
    quantized: Artifact | None
    layers: tuple[str, ...]
    recipe: Recipe
    dtype: DType
    seed: int
    versions: Mapping[str, str]
    memory_limit: int | None = field(default=None, metadata=MEMORY_LIMIT)


def run(
    bundle: Bundle,
    source: "ModelDir",
    recipe: Recipe,
    pruned: PruneResult,
    dtype: DType,
    progress: Progress,
    *,
    memory_limit: int | None = None,
) -> ExportResult:
    """Export dense and sparse twins to `onnx/`, prove 2:4 and compare numerics."""
    inputs = ExportInputs(
        source=source,
        pruned=shipped_of(bundle),
        quantized=quantized_of(bundle),
        layers=tuple(layer.name for layer in pruned.layers if layer.status == "pruned"),
        recipe=recipe,
        dtype=dtype,
        seed=bundle.manifest.seed,
        versions=numeric_versions(),
        memory_limit=memory_limit,
    )
    return bundle.run(STAGE, inputs, progress)


def _export(inputs: ExportInputs, work: Workspace, progress: Progress) -> ExportResult:
    from prox24_deploy.graph.check.check import check_onnx
    from prox24_deploy.graph.export.trace import Traces
    from prox24_deploy.model.directory import open_model_dir

    began = time.perf_counter()
    directories = {"dense": inputs.source, "sparse": open_model_dir(inputs.pruned.path)}
    exported: dict[Twin, tuple[OnnxModel, ...]] = {}
    numerics: list[NumericsCheck] = []
    traces = Traces()
    for i, twin in enumerate(TWINS):
        progress("export", i, len(TWINS))
        exported[twin], found = _export_twin(inputs, twin, directories[twin], work, traces)
        numerics += found
        # What the exporter leaves behind holds the weights in circles of references.
        gc.collect()
    progress("export", len(TWINS), len(TWINS))
    files = [work.partial / model.path for model in exported["sparse"]]
    sparsity = tuple(check for file in files for check in check_onnx(file))
    seconds = time.perf_counter() - began
    return ExportResult(
        dense=exported["dense"],
        sparse=exported["sparse"],
        sparsity=sparsity,
        numerics=tuple(numerics),
        seconds=seconds,
    )


def _export_twin(
    inputs: ExportInputs, twin: Twin, directory: "ModelDir", work: Workspace, traces: "Traces"
) -> tuple[tuple[OnnxModel, ...], list[NumericsCheck]]:
    """Export one twin, and compare each graph with PyTorch.

    The sparse twin is quantised where that was asked for; the dense one is what it is held against.
    """
    from prox24_deploy.graph.export.export import export_graphs
    from prox24_deploy.graph.parity.numerics import compare_with_torch
    from prox24_deploy.model.mapped import Memory
    from prox24_deploy.quantization.tensors import apply_weights, read_quantized

    recipe = inputs.recipe
    # The model, a copy of it in another dtype, and the file in ONNX Runtime.
    memory = Memory(folder=work.kept, limit=inputs.memory_limit, models=3)
    # Before the model takes what is free, for it counts among the three.
    keep = memory.keep(directory, recipe)
    module = memory.load(directory, recipe, torch_device("cpu"), changes=True)
    tensors = tensors_of(inputs.quantized) if twin == "sparse" else None
    quantized = read_quantized(tensors) if tensors else None
    if quantized:
        apply_weights(module, quantized)
    folder = work.partial / ONNX / twin
    make_folder(folder.parent)
    paths = export_graphs(
        module,
        recipe,
        folder,
        dtype=inputs.dtype,
        sparse=inputs.layers if twin == "sparse" else (),
        quantized=quantized,
        keep=keep,
        traces=traces,
    )
    numerics: list[NumericsCheck] = []
    for part, path in zip(recipe.parts, paths, strict=True):
        numerics += compare_with_torch(
            module,
            path,
            part,
            dtype=inputs.dtype,
            twin=twin,
            vocabulary=vocabulary_of(inputs.source.config),
            seed=inputs.seed,
            quantized=quantized,
            keep=keep,
        )
    return tuple(_described(path, twin, inputs) for path in paths), numerics


def _described(path: Path, twin: Twin, inputs: ExportInputs) -> OnnxModel:
    from prox24_deploy.graph.export.export import hash_onnx

    sha256, size = hash_onnx(path)
    return OnnxModel(
        path=f"{ONNX}/{twin}/{path.name}",
        dtype=inputs.dtype,
        opset=inputs.recipe.opset,
        sha256=sha256,
        size_bytes=size,
    )


STAGE = Stage(name="export", result=ExportResult, run=_export, outputs=(ONNX,))
