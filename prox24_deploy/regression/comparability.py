"""Whether two reports are about the same thing on the same machine, and what differs."""

from collections.abc import Iterator, Sequence
from pathlib import PurePath

from pydantic import JsonValue

from prox24_deploy.core.backends import BACKENDS
from prox24_deploy.core.errors import BundleError, UsageError
from prox24_deploy.regression.figures import row_path
from prox24_deploy.report.schema import Difference, Report

# What must be alike for figures to mean the same, in the order in which a refusal names it.
KEYS = (
    "model", "recipe", "evaluation", "dtype", "quantization", "shapes", "backend", "device", "gpu",
    "driver", "processor",
)  # fmt: skip
# Where one of these differs, milliseconds of both are of different machines.
MACHINE_KEYS = frozenset({"backend", "device", "gpu", "driver", "processor"})


def find_differences(report: Report, baseline: Report) -> tuple[Difference, ...]:
    """Every key of `KEYS` in which the reports differ."""
    new, old = dict(_facts(report)), dict(_facts(baseline))
    return tuple(
        Difference(key=k, report=_named(k, new[k], report), baseline=_named(k, old[k], baseline))
        for k in KEYS
        if new[k] != old[k]
    )


def _named(key: str, value: str, report: Report) -> str:
    """A fact as people tell it: of a hash what it is of, and enough of it to tell two apart."""
    if key == "evaluation":
        names = ", ".join(PurePath(path).name for path in report.accuracy.evaluation.paths)
        return f"{names or report.accuracy.evaluation.kind} (sha256 {value[:12]})"
    if key == "recipe":
        asked = report.options.get("recipe")
        name = PurePath(asked).name if isinstance(asked, str) else f"of {report.model.family}"
        return f"{name} (sha256 {value[:12]})"
    return value


def require_alike(
    report: Report, baseline: Report, allow: Sequence[str], source: str
) -> tuple[Difference, ...]:
    """The differences, if all are allowed; `source` names the baseline in errors.

    Raises:
        UsageError: `allow` names what is no key.
        BundleError: something differs that `allow` does not name.
    """
    require_keys(allow)
    found = find_differences(report, baseline)
    refused = [difference for difference in found if difference.key not in allow]
    if refused:
        names = "; ".join(f"{d.key} is {d.report!r} and was {d.baseline!r}" for d in refused)
        options = " ".join(f"--allow {d.key}" for d in refused)
        raise BundleError(
            f"The report cannot be compared with baseline {source}: {names}; compare like with "
            f"like, or accept the difference with {options}."
        )
    return found


def require_keys(allow: Sequence[str]) -> None:
    """Check the names of what may differ.

    Raises:
        UsageError: one is no key.
    """
    for key in allow:
        if key not in KEYS:
            raise UsageError(
                f"--allow {key} names nothing that is compared, expected one of {', '.join(KEYS)}."
            )


def in_words(difference: Difference) -> str:
    """A difference that was allowed, as a sentence."""
    return f"{difference.key} is {difference.report} and was {difference.baseline}."


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    """Each key with its value in words."""
    model, environment = report.model, report.environment
    engines = sorted(report.sparsity.engines, key=lambda engine: engine.backend)
    yield "model", f"{model.architecture}, family {model.family}, task {model.task}"
    yield "recipe", _text(report.options.get("recipe_sha256"))
    yield "evaluation", report.accuracy.evaluation.sha256
    yield "dtype", _text(report.options.get("dtype"))
    yield "quantization", report.quantization.format if report.quantization else "none"
    yield "shapes", " ".join(sorted(row_path(row) for row in report.latency)) or "none measured"
    yield "backend", ", ".join(_version(engine.backend, report) for engine in engines)
    yield "device", ", ".join(f"{engine.backend} on {engine.device}" for engine in engines)
    yield "gpu", _text(environment.get("gpu"))
    yield "driver", _text(environment.get("driver"))
    yield (
        "processor",
        (f"{_text(environment.get('processor'))}, {_text(environment.get('cores'))} cores"),
    )


def _version(backend: str, report: Report) -> str:
    names = BACKENDS[backend].versions if backend in BACKENDS else (backend,)
    versions = (f"{name} {_text(report.environment.get(name))}" for name in names)
    return f"{backend} ({', '.join(versions)})"


def _text(value: JsonValue) -> str:
    return "not known" if value is None else str(value)
