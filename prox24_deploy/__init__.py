"""prox24-deploy: from a Hugging Face model to a 2:4-sparse, proven and measured release.

    import prox24_deploy as p24

    report = p24.build("model_dir", "bundle")
    print(report.verdict, report.sentence)

Importing this package loads neither torch nor any engine; each name is loaded when it is first
asked for, and each function imports what it needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prox24_deploy.config.options import (
        BenchOptions,
        BuildOptions,
        EngineOptions,
        HarnessOptions,
        PruneOptions,
        RecoverOptions,
        TensorRtOptions,
        TextOptions,
    )
    from prox24_deploy.core.errors import (
        BackendMissingError,
        BundleError,
        CalibrationError,
        EngineError,
        ExportError,
        ModelDirError,
        Prox24Error,
        RecipeError,
        SparsityLostError,
        SparsityUnprovenError,
        UsageError,
    )
    from prox24_deploy.packaging.triton import TritonOptions
    from prox24_deploy.pipeline.api import (
        bench,
        build,
        check,
        compare,
        compile,
        evaluate,
        evaluate_bundle,
        export,
        package,
        plan,
        prune,
        recover,
        report_bundle,
        rotate,
        verify,
    )
    from prox24_deploy.pruning.module import prune_module
    from prox24_deploy.report.schema import Report

__version__ = "0.2.0"

__all__ = [
    "BackendMissingError",
    "BenchOptions",
    "BuildOptions",
    "BundleError",
    "CalibrationError",
    "EngineError",
    "EngineOptions",
    "ExportError",
    "HarnessOptions",
    "ModelDirError",
    "Prox24Error",
    "PruneOptions",
    "RecipeError",
    "RecoverOptions",
    "Report",
    "SparsityLostError",
    "SparsityUnprovenError",
    "TensorRtOptions",
    "TextOptions",
    "TritonOptions",
    "UsageError",
    "__version__",
    "bench",
    "build",
    "check",
    "compare",
    "compile",
    "evaluate",
    "evaluate_bundle",
    "export",
    "package",
    "plan",
    "prune",
    "prune_module",
    "recover",
    "report_bundle",
    "rotate",
    "verify",
]

_HOMES = {
    "config.options": [
        "BuildOptions",
        "BenchOptions",
        "EngineOptions",
        "HarnessOptions",
        "PruneOptions",
        "RecoverOptions",
        "TensorRtOptions",
        "TextOptions",
    ],
    "packaging.triton": ["TritonOptions"],
    "pipeline.api": [
        "bench",
        "build",
        "check",
        "compare",
        "compile",
        "evaluate",
        "evaluate_bundle",
        "export",
        "package",
        "plan",
        "prune",
        "recover",
        "report_bundle",
        "rotate",
        "verify",
    ],
    "pruning.module": ["prune_module"],
    "report.schema": ["Report"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Load a public name; PEP 562."""
    home = _HOME_OF.get(name, "core.errors" if name in __all__ else None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
