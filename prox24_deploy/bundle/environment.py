"""What this machine is and which versions are installed: provenance and `doctor`."""

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from prox24_deploy import __version__
from prox24_deploy.core.backends import AUTO, BACKENDS, NVFP4, BackendKind
from prox24_deploy.core.extras import install_of
from prox24_deploy.core.host import cpu_model, gpu

_PACKAGES = (
    "torch", "transformers", "numpy", "numba", "onnx", "onnxscript", "onnx-ir", "onnxruntime",
    "safetensors",
)  # fmt: skip
_ABSENT = "not installed"
# What only some need: a package, the extra that brings it, and what it is for.
_EXTRAS = (
    ("pyarrow", "tables", "samples in Parquet files"),
    ("pillow", "images", "models of images"),
    ("soundfile", "speech", "recordings other than WAV"),
    ("soxr", "speech", "recordings at another rate than the model's"),
    ("cyclonedx-python-lib", "sbom", "package --sbom"),
    ("lm-eval", "lm-eval", "build --lm-eval"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """One line of `doctor`: what was looked for, what was found, what to do if it is missing.

    `use` is what it is for, where not every build needs it.
    """

    name: str
    found: str
    usable: bool
    remedy: str
    use: str = ""


def versions() -> dict[str, str]:
    """Version of this tool, of Python and of every package that shapes the result."""
    known = {"prox24-deploy": __version__, "python": platform.python_version()}
    return known | {package: _version(package) for package in _PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return _ABSENT


def machine() -> dict[str, str]:
    """System, processor, memory and GPU of this machine, in words."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory:.0f} GiB",
        **gpu(),
    }


def diagnose() -> list[Diagnosis]:
    """Look for everything that a stage or backend can need."""
    installed = versions()
    findings = [
        Diagnosis(name=name, found=text, usable=text != _ABSENT, remedy=f"pip install {name}")
        for name, text in installed.items()
    ]
    card = gpu()
    has_gpu = "compute capability" in card
    findings += [
        Diagnosis(name="processor", found=cpu_model(), usable=True, remedy=""),
        Diagnosis(
            name="GPU",
            found=", ".join(card.values()),
            usable=has_gpu,
            remedy="pruning and ONNX Runtime run without",
        ),
        _cuda(has_gpu=has_gpu),
        *(
            _PROBES.get(kind.name, _library)(kind, has_gpu=has_gpu)
            for kind in sorted(BACKENDS.values(), key=lambda kind: kind.title.casefold())
        ),
        *map(_extra, *zip(*_EXTRAS, strict=True)),
        Diagnosis(name="2:4 in NVFP4", found="on no GPU", usable=False, remedy=NVFP4),
    ]
    return findings


def abilities(findings: Sequence[Diagnosis]) -> str:
    """What this machine can do, from what was found on it."""
    usable = {finding.name for finding in findings if finding.usable}
    lacking = [f.name for f in findings if f.name in versions() and f.name not in usable]
    if lacking:
        return f"This machine cannot build yet: {', '.join(lacking)} missing, see above."
    backends = sorted(kind.name for kind in BACKENDS.values() if kind.title in usable)
    fast = [name for name in backends if name != AUTO.name and "GPU" in usable]
    where = "on the GPU" if "torch CUDA" in usable else "on the CPU"
    speed = (
        f"Sparse kernels can be timed with {' or '.join(fast)}."
        if fast
        else "Sparse kernels cannot be timed: that takes an NVIDIA GPU and a backend that has them."
    )
    return (
        f"This machine can prune, evaluate, export and prove {where}, and compile for "
        f"{', '.join(backends)}. {speed}"
    )


def _extra(package: str, extra: str, use: str) -> Diagnosis:
    found, remedy = _version(package), install_of(extra)
    return Diagnosis(name=package, found=found, usable=found != _ABSENT, remedy=remedy, use=use)


def _cuda(*, has_gpu: bool) -> Diagnosis:
    name = "torch CUDA"
    try:
        import torch
    except ImportError as error:
        return _not_importable(name, "torch", error)
    usable = torch.cuda.is_available()
    remedy = "install a CUDA build of torch" if has_gpu else "needs an NVIDIA GPU"
    return Diagnosis(
        name=name, found=torch.version.cuda or "CPU build", usable=usable, remedy=remedy
    )


class _Probe(Protocol):
    """Looks whether a machine has what a backend needs."""

    def __call__(self, kind: BackendKind, *, has_gpu: bool) -> Diagnosis: ...


def _cusparselt(kind: BackendKind, *, has_gpu: bool) -> Diagnosis:
    try:
        import torch
    except ImportError as error:
        return _not_importable(kind.title, kind.library, error)
    usable = bool(torch.backends.cusparselt.is_available())
    number = torch.backends.cusparselt.version() if usable else None
    # Thousands, hundreds and the rest: 602 is 0.6.2.
    version = f"{number // 1000}.{number // 100 % 10}.{number % 100}" if number else None
    remedy = kind.install if has_gpu else kind.needs_gpu
    return Diagnosis(
        name=kind.title, found=version or "not available", usable=usable, remedy=remedy
    )


def _onnxruntime(kind: BackendKind, *, has_gpu: bool) -> Diagnosis:  # noqa: ARG001  # runs without
    try:
        import onnxruntime
    except ImportError as error:
        return _not_importable(kind.title, kind.library, error)
    return Diagnosis(
        name=kind.title,
        found=", ".join(onnxruntime.get_available_providers()),
        usable=True,
        remedy="",
    )


def _library(kind: BackendKind, *, has_gpu: bool) -> Diagnosis:
    """Whether a backend's library and its driver are there, and a GPU if it builds on one."""
    found = replace(_module(kind.library, kind.install), name=kind.title)
    if found.usable and kind.driver and importlib.util.find_spec(kind.driver) is None:
        return replace(found, found=f"{found.found}, without {kind.driver}", usable=False)
    if found.usable and kind.needs_gpu and not has_gpu:
        return replace(found, usable=False, remedy=kind.needs_gpu)
    return found


# Of backends for which it is not enough that their library can be imported.
_PROBES: dict[str, _Probe] = {"onnxruntime": _onnxruntime, "cusparselt": _cusparselt}


def _not_importable(name: str, package: str, error: ImportError) -> Diagnosis:
    return Diagnosis(
        name=name,
        found=f"{package} cannot be imported ({error})",
        usable=False,
        remedy=f"pip install {package}",
    )


def _module(name: str, remedy: str) -> Diagnosis:
    """Whether an engine library can be imported; found without importing it."""
    if importlib.util.find_spec(name) is None:
        return Diagnosis(name=name, found=_ABSENT, usable=False, remedy=remedy)
    # Module tensorrt may come from distribution tensorrt, tensorrt-cu13 or another like it.
    owners = importlib.metadata.packages_distributions().get(name, [])
    for distribution in (name.replace("_", "-"), *owners):
        try:
            return Diagnosis(
                name=name,
                found=importlib.metadata.version(distribution),
                usable=True,
                remedy=remedy,
            )
        except importlib.metadata.PackageNotFoundError:
            continue
    return Diagnosis(name=name, found="installed, of unknown version", usable=True, remedy=remedy)
