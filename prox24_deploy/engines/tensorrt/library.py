"""The two libraries that can be driven, and Polygraphy, which drives either of them.

Polygraphy (github.com/NVIDIA/TensorRT, tools/Polygraphy) is how others build, run and ask about
TensorRT every day; what it does is not written here again.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from prox24_deploy.core.backends import BACKENDS
from prox24_deploy.core.errors import BackendMissingError, EngineError

Library = Literal["tensorrt", "tensorrt_rtx"]

TITLES: dict[Library, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
# Polygraphy reads it once, when it is first imported; it has no other switch.
SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"


def load_library(library: Library) -> Any:
    """Import `tensorrt` or `tensorrt_rtx`, beside which Polygraphy has to be.

    Raises:
        BackendMissingError: one is not installed, or a library that it needs is not.
    """
    try:
        found = importlib.import_module(library)
    except ImportError as error:
        raise _missing(library, error) from error
    # Not imported, for then it would have chosen between the libraries.
    if importlib.util.find_spec("polygraphy") is None:
        raise _missing(library, "No module named 'polygraphy'")
    return found


def polygraphy_for(library: Library) -> Any:
    """`polygraphy.backend.trt`, which drives one of the libraries in this process from now on.

    Raises:
        EngineError: it drives the other library in this process already.
    """
    rtx = library == "tensorrt_rtx"
    if "polygraphy" not in sys.modules:
        os.environ[SWITCH] = "1" if rtx else "0"
    if rtx != importlib.import_module("polygraphy.config").USE_TENSORRT_RTX:
        raise EngineError(
            f"Polygraphy drives the other library than {TITLES[library]} in this process, and "
            "cannot change; open these engines in a process of their own."
        )
    return importlib.import_module("polygraphy.backend.trt")


def messages() -> Any:
    """What Polygraphy, and TensorRT through it, speak by."""
    found = importlib.import_module("polygraphy.logger").G_LOGGER
    # A log is read by programs, and asking for colours prints that a module for them is missing.
    found.colors = False
    return found


@contextmanager
def refused_by(source: str, remedy: str) -> Iterator[None]:
    """What Polygraphy refuses is an EngineError that says what it is about, and what to do."""
    refusal = importlib.import_module("polygraphy.exception").PolygraphyException
    try:
        yield
    except refusal as error:
        reason = "; ".join(line.strip().rstrip(".") for line in str(error).splitlines())
        raise EngineError(f"{source}: {reason}; {remedy}.") from error


def _missing(library: Library, reason: object) -> BackendMissingError:
    install = next(kind.install for kind in BACKENDS.values() if kind.library == library)
    return BackendMissingError(f"{TITLES[library]} is not installed here ({reason}); {install}.")
