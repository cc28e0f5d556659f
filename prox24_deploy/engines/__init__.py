"""Backends that compile an ONNX file and run it."""

from prox24_deploy.engines.base import Backend
from prox24_deploy.errors import BackendMissingError, UsageError

AVAILABLE_BACKENDS = ("onnxruntime",)


def backend_by_name(name: str) -> Backend:
    """The backend that `--backend NAME` selects; "auto" is the best one of this version.

    Raises:
        BackendMissingError: the product plans this backend, but this version does not have it.
        UsageError: no backend has this name.
    """
    available = ", ".join(AVAILABLE_BACKENDS)
    match name:
        case "auto" | "onnxruntime":
            from prox24_deploy.engines.onnxruntime import OnnxRuntime

            return OnnxRuntime()
        case "tensorrt" | "tensorrt-rtx" | "cusparselt":
            raise BackendMissingError(
                f"Backend {name!r} is not part of this version; available: {available}."
            )
        case _:
            raise UsageError(f"Backend {name!r} does not exist; pass one of auto, {available}.")
