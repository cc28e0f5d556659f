"""The stage that compiles both twins with every backend."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from prox24_deploy.bundle.bundle import Bundle
from prox24_deploy.bundle.environment import versions
from prox24_deploy.bundle.layout import ENGINES, ONNX, reproduction_of
from prox24_deploy.bundle.stage import Artifact, Stage, Workspace
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.atomic import write_atomic
from prox24_deploy.core.records import (
    CompileResult,
    Engine,
    EngineEvidence,
    ExportResult,
    OnnxModel,
    TensorCheck,
)
from prox24_deploy.core.types import TWINS, Progress, Twin
from prox24_deploy.engines.base import Backend, Reproducible
from prox24_deploy.pipeline.stages.quantize import quantized_of
from prox24_deploy.pipeline.stages.recover import shipped_of


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileInputs:
    """What the engines and the evidence about them depend on.

    `blocks` has the prefix of the modules of each graph, and `devices` what each backend builds on
    or for.
    """

    dense: tuple[OnnxModel, ...]
    sparse: tuple[OnnxModel, ...]
    sparsity: tuple[TensorCheck, ...]
    onnx: Artifact
    pruned: Artifact
    quantized: Artifact | None
    blocks: Mapping[str, str]
    backends: tuple[Backend, ...]
    devices: tuple[str, ...]
    versions: Mapping[str, str]


def run(
    bundle: Bundle,
    exported: ExportResult,
    recipe: Recipe,
    backends: Sequence[Backend],
    progress: Progress,
) -> CompileResult:
    """Compile both twins with every backend into `engines/BACKEND/TWIN/`.

    Encoder and decoder get a folder each in there.
    """
    parts = recipe.parts
    inputs = CompileInputs(
        dense=exported.dense,
        sparse=exported.sparse,
        sparsity=exported.sparsity,
        onnx=bundle.artifact(ONNX),
        pruned=shipped_of(bundle),
        quantized=quantized_of(bundle),
        blocks={part.graph: f"{part.blocks}." if len(parts) > 1 else "" for part in parts},
        backends=tuple(backends),
        devices=tuple(backend.device() for backend in backends),
        versions=versions(),
    )
    return bundle.run(STAGE, inputs, progress)


def _compile(inputs: CompileInputs, work: Workspace, progress: Progress) -> CompileResult:
    began = time.perf_counter()
    engines: list[Engine] = []
    evidence: list[EngineEvidence] = []
    total = 2 * len(inputs.backends)
    for i, backend in enumerate(inputs.backends):
        for j, twin in enumerate(TWINS):
            progress("compile", 2 * i + j, total)
            for model in inputs.dense if twin == "dense" else inputs.sparse:
                out = _engine_folder(backend, twin, model)
                engines.append(backend.build(work.root, model, out, twin=twin))
        evidence += _evidence(inputs, work.root, backend, engines)
        _write_reproduction(work.root, backend, engines)
    progress("compile", total, total)
    return CompileResult(
        engines=tuple(engines), evidence=tuple(evidence), seconds=time.perf_counter() - began
    )


STAGE = Stage(name="compile", result=CompileResult, run=_compile, outputs=(ENGINES,))


def _write_reproduction(root: Path, backend: Backend, engines: Sequence[Engine]) -> None:
    if isinstance(backend, Reproducible):
        own = [engine for engine in engines if engine.backend == backend.name]
        script = root / reproduction_of(backend.name)
        text = backend.reproduction(root, own, reproduction_of(backend.name))
        write_atomic(script, text.encode())
        # Whoever may read it may run it.
        script.chmod(script.stat().st_mode | 0o111)


def _engine_folder(backend: Backend, twin: Twin, model: OnnxModel) -> Path:
    folder = Path(ENGINES) / backend.name / twin
    return folder if model.graph == "model" else folder / model.graph


def _evidence(
    inputs: CompileInputs, root: Path, backend: Backend, engines: Sequence[Engine]
) -> list[EngineEvidence]:
    """What a backend did with each graph; a weight belongs to the graph of its block."""
    found = []
    for engine in engines:
        if (engine.backend, engine.twin) == (backend.name, "sparse"):
            prefix = inputs.blocks[engine.graph]
            own = tuple(c for c in inputs.sparsity if c.module.startswith(prefix))
            evidence = backend.evidence(root, engine, own)
            found.append(replace(evidence, graph=engine.graph))
    return found
