"""Backends that compile an ONNX file and run it."""

import importlib

from prox24_deploy.config.options import EngineOptions
from prox24_deploy.core.backends import AUTO, BACKENDS, BackendKind
from prox24_deploy.core.errors import UsageError
from prox24_deploy.engines.base import Backend, Origin, require_fixed_work

__all__ = ["AVAILABLE_BACKENDS", "Origin", "backend_by_name", "kind_by_name", "require_fixed_work"]

AVAILABLE_BACKENDS = tuple(BACKENDS)


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
    kind = kind_by_name(name)
    # By its name, for the library of a backend that is not asked for may not be here.
    backend: Backend = importlib.import_module(kind.module).open_backend(kind, options, origin)
    return backend


def kind_by_name(name: str) -> BackendKind:
    """What is known of the backend that `--backend NAME` selects, wherever it can run.

    Raises:
        UsageError: no backend has this name.
    """
    kind = AUTO if name == "auto" else BACKENDS.get(name)
    if kind is None:
        raise UsageError(
            f"Backend {name!r} does not exist; pass one of auto, {', '.join(BACKENDS)}."
        )
    return kind
