"""Backends that compile an ONNX file and run it."""

from prox24_deploy.engines.base import Backend
from prox24_deploy.errors import BackendMissingError, UsageError
from prox24_deploy.options import EngineOptions

AVAILABLE_BACKENDS = ("onnxruntime", "tensorrt", "tensorrt-rtx")
_DEFAULTS = EngineOptions()


def backend_by_name(name: str, options: EngineOptions = _DEFAULTS) -> Backend:
    """The backend that `--backend NAME` selects; "auto" is the best one that needs no GPU.

    Raises:
        BackendMissingError: the product plans this backend, but this version does not have it, or
            this machine lacks what it needs.
        UsageError: no backend has this name, or it cannot build as asked.
    """
    available = ", ".join(AVAILABLE_BACKENDS)
    match name:
        case "auto" | "onnxruntime":
            from prox24_deploy.engines.onnxruntime import OnnxRuntime

            return OnnxRuntime()
        case "tensorrt" | "tensorrt-rtx":
            from prox24_deploy.engines.tensorrt import open_tensorrt

            return open_tensorrt("tensorrt" if name == "tensorrt" else "tensorrt_rtx", options)
        case "cusparselt":
            raise BackendMissingError(
                f"Backend {name!r} is not part of this version; available: {available}."
            )
        case _:
            raise UsageError(f"Backend {name!r} does not exist; pass one of auto, {available}.")
