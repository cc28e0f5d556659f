"""Backends that compile an ONNX file and run it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prox24_deploy.engines.base import Backend
from prox24_deploy.errors import BackendMissingError, UsageError
from prox24_deploy.recipe import Recipe

if TYPE_CHECKING:
    from prox24_deploy.engines.profile import GpuProfile

AVAILABLE_BACKENDS = ("onnxruntime", "cusparselt")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the twins come from, for a backend that runs the model itself and not its ONNX file.

    `dense` is the dense model directory, `recipe` fits it, `shapes` are the (batch, sequence) to
    run at, `gemms` timings that are known already.
    """

    dense: Path
    recipe: Recipe
    shapes: Sequence[tuple[int, int]]
    gemms: "GpuProfile | None" = None


def backend_by_name(name: str, origin: Origin) -> Backend:
    """The backend that `--backend NAME` selects; "auto" is the best one that needs no GPU.

    Raises:
        BackendMissingError: this machine or this version lacks what the backend needs.
        UsageError: no backend has this name.
    """
    available = ", ".join(AVAILABLE_BACKENDS)
    match name:
        case "auto" | "onnxruntime":
            from prox24_deploy.engines.onnxruntime import OnnxRuntime

            return OnnxRuntime()
        case "cusparselt":
            from prox24_deploy.engines.cusparselt import CuSparseLt
            from prox24_deploy.engines.torch_model import require_gpu

            require_gpu("Backend 'cusparselt'", "--backend onnxruntime")
            return CuSparseLt(origin.dense, origin.recipe, tuple(origin.shapes), origin.gemms)
        case "tensorrt" | "tensorrt-rtx":
            raise BackendMissingError(
                f"Backend {name!r} is not part of this version; available: {available}."
            )
        case _:
            raise UsageError(f"Backend {name!r} does not exist; pass one of auto, {available}.")
