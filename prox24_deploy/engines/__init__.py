"""Backends that compile an ONNX file and run it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prox24_deploy.config.options import EngineOptions
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.errors import UsageError
from prox24_deploy.engines.base import Backend

if TYPE_CHECKING:
    from prox24_deploy.engines.cusparselt.profile import GpuProfile

AVAILABLE_BACKENDS = ("onnxruntime", "tensorrt", "tensorrt-rtx", "cusparselt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where the twins come from, for a backend that runs the model itself and not its ONNX file.

    `dense` is the dense model directory with its hash, `recipe` fits it, `gemms` are timings known
    already.
    """

    dense: Path
    dense_sha256: str
    recipe: Recipe
    gemms: "GpuProfile | None" = None


def backend_by_name(name: str, options: EngineOptions, origin: Origin) -> Backend:
    """The backend that `--backend NAME` selects; "auto" is the best one that needs no GPU.

    Args:
        name: of the backend.
        options: shapes that the model accepts, and how to build.
        origin: of the model.

    Raises:
        BackendMissingError: this machine lacks what the backend needs.
        UsageError: no backend has this name, or it cannot build as asked.
    """
    available = ", ".join(AVAILABLE_BACKENDS)
    match name:
        case "auto" | "onnxruntime":
            from prox24_deploy.engines.onnxruntime import OnnxRuntime

            return OnnxRuntime()
        case "cusparselt":
            from prox24_deploy.engines.cusparselt.backend import CuSparseLt
            from prox24_deploy.engines.cusparselt.torch_model import require_gpu

            require_one_graph(origin.recipe, "Backend 'cusparselt'")
            require_gpu("Backend 'cusparselt'", "--backend onnxruntime")
            return CuSparseLt(
                dense=origin.dense,
                dense_sha256=origin.dense_sha256,
                recipe=origin.recipe,
                options=options,
                known=origin.gemms,
            )
        case "tensorrt" | "tensorrt-rtx":
            from prox24_deploy.engines.tensorrt.backend import open_tensorrt

            return open_tensorrt("tensorrt" if name == "tensorrt" else "tensorrt_rtx", options)
        case _:
            raise UsageError(f"Backend {name!r} does not exist; pass one of auto, {available}.")


def require_one_graph(recipe: Recipe, asker: str) -> None:
    """Refuse an encoder-decoder where only models of one graph can be run.

    Raises:
        UsageError: the recipe has a decoder.
    """
    if recipe.decoder is not None:
        raise UsageError(
            f"{asker} runs models of one graph, and those of recipe {recipe.family} have an "
            "encoder and a decoder; pass --backend onnxruntime or tensorrt."
        )
