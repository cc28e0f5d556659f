"""The backends of a run, opened for its model and the shapes that it accepts."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from prox24_deploy.bundle.layout import PRUNED, QUANTIZED_TENSORS
from prox24_deploy.config.options import EngineOptions
from prox24_deploy.core.errors import BackendMissingError
from prox24_deploy.core.records import CompileResult, NotMeasured
from prox24_deploy.engines import Origin, backend_by_name
from prox24_deploy.engines.base import Backend
from prox24_deploy.pipeline.context import ModelContext, fitted_shapes

if TYPE_CHECKING:
    from prox24_deploy.engines.cusparselt.profile import GpuProfile


def open_backends(
    options: EngineOptions, model: ModelContext, shipped: str = PRUNED
) -> tuple[Backend, ...]:
    """The backends asked for, each once; `shipped` is the folder of the sparse model.

    Raises:
        BackendMissingError: one is not available here.
    """
    fitted = fitted_shapes(options, model.config, model.recipe)
    origin = Origin(
        dense=model.path,
        dense_sha256=model.sha256,
        pruned=shipped,
        quantized=QUANTIZED_TENSORS,
        recipe=model.recipe,
        gemms=planned_gemms(options.plan),
    )
    backends = (backend_by_name(name, fitted, origin) for name in options.backends)
    return tuple({backend.name: backend for backend in backends}.values())


def backends_of(
    compiled: CompileResult, options: EngineOptions, model: ModelContext, shipped: str
) -> tuple[list[Backend], list[NotMeasured]]:
    """The backends that engines are of, and those that are not available here."""
    found: list[Backend] = []
    missing: list[NotMeasured] = []
    for name in dict.fromkeys(engine.backend for engine in compiled.engines):
        try:
            found += open_backends(replace(options, backends=(name,)), model, shipped)
        except BackendMissingError as error:
            missing.append(NotMeasured(backend=name, reason=str(error)))
    return found, missing


def planned_gemms(plan: Path | None) -> "GpuProfile | None":
    """The GEMM timings that a plan was made from.

    Raises:
        UsageError: the file is no plan.
    """
    if plan is None:
        return None
    from prox24_deploy.engines.cusparselt.planning import read_plan

    return read_plan(plan).profile
