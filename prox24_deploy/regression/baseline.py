"""The baseline: an accepted report, why it was accepted, and the figures of those before it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from prox24_deploy.bundle.layout import REPORT_FILE
from prox24_deploy.config.limits import GivenLimits, read_limits
from prox24_deploy.core.atomic import write_atomic
from prox24_deploy.core.documents import (
    Document,
    first_problem,
    parse_json,
    read_document,
    require_object,
)
from prox24_deploy.core.errors import BundleError, UsageError
from prox24_deploy.regression.comparability import require_keys
from prox24_deploy.regression.figures import figures_of
from prox24_deploy.report.formats import place
from prox24_deploy.report.schema import SCHEMA_VERSION, Headline, Report, load_report, parse_report

BASELINE_VERSION: Final = 1
KEPT_RELEASES = 10
# What of a report is worth a trend.
_TRENDS = {"accuracy", "speed-up", "latency", "size"}


class BaselineFile(BaseModel):
    """Contents of a baseline file; `history` has the accepted releases, this one last."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    baseline_version: Literal[1] = BASELINE_VERSION
    reason: str
    date: str
    history: tuple[Headline, ...]
    report: Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """What a report is held against: a report, with its history where a baseline file has one.

    `source` names it in messages; `reason` and `date` are "" for a plain report.
    """

    source: str
    report: Report
    reason: str = ""
    date: str = ""
    history: tuple[Headline, ...] = ()


@dataclass(frozen=True, slots=True)
class Gate:
    """A baseline, the limits that come before those of its recipe, and what may differ from it."""

    baseline: Baseline
    limits: GivenLimits
    allow: tuple[str, ...]


def report_path(path: Path) -> Path:
    """The report that a path stands for: itself, or that of a bundle."""
    return path / REPORT_FILE if path.is_dir() else path


def read_baseline(path: Path) -> Baseline:
    """Read a baseline file, a report.json, or the report of a bundle.

    Raises:
        BundleError: it cannot be read, is damaged, or is of another schema version.
    """
    path = report_path(path)
    remedy = "pass a baseline file, a report.json or a bundle"
    data = read_document(path, Document(f"Baseline {path}", BundleError, remedy))
    if not _is_baseline(data, path):
        return Baseline(source=str(path), report=parse_report(data, str(path)))
    found = parse_baseline(data, str(path))
    return Baseline(
        source=str(path),
        report=found.report,
        reason=found.reason,
        date=found.date,
        history=found.history,
    )


def read_gate(baseline: Path, limits: Path | None, allow: Sequence[str]) -> Gate:
    """Read what a report is held against, and check it before any work.

    Raises:
        BundleError: as for `read_baseline`.
        UsageError: the limits file cannot be used, or `allow` names what is no key.
    """
    require_keys(allow)
    given = read_limits(limits) if limits else GivenLimits()
    return Gate(read_baseline(baseline), given, tuple(allow))


def read_baseline_file(path: Path) -> BaselineFile:
    """Read a baseline file, and nothing else.

    Raises:
        BundleError: it cannot be read, or is a report or something else.
    """
    data = read_document(path, Document(f"Baseline {path}", BundleError, "pass a baseline file"))
    if not _is_baseline(data, path):
        raise BundleError(
            f"{path} is no baseline file; make one with prox24-deploy baseline update."
        )
    return parse_baseline(data, str(path))


def parse_baseline(data: bytes, source: str) -> BaselineFile:
    """Parse the bytes of a baseline file; `source` names it in errors.

    Raises:
        BundleError: it is damaged, or of another version than this one writes.
    """
    raw = _parsed(data, source)
    report = raw.get("report")
    versions = {
        "baseline_version": (raw.get("baseline_version"), BASELINE_VERSION),
        "schema_version": (
            report.get("schema_version") if isinstance(report, dict) else None,
            SCHEMA_VERSION,
        ),
    }
    for key, (version, expected) in versions.items():
        if version != expected:
            raise BundleError(
                f"Baseline {source} has {key} {version!r}, expected {expected}; move it away and "
                "run prox24-deploy baseline update with a report of this version."
            )
    try:
        return BaselineFile.model_validate(raw)
    except ValidationError as error:
        where, what = first_problem(error)
        raise BundleError(
            f"Baseline {source} is damaged at {where!r}: {what}; restore it."
        ) from error


def updated(
    report: Report, old: Baseline | None, *, reason: str, date: str, keep: int
) -> BaselineFile:
    """A baseline of this report, with the last `keep` releases of the old one and this; pure."""
    figures = {
        figure.name: figure.value.value
        for figure in figures_of(report).values()
        if figure.kind in _TRENDS
    }
    now = Headline(date=date, reason=reason, verdict=report.verdict, figures=figures)
    history = ((*old.history, now) if old else (now,))[-keep:]
    return BaselineFile(reason=reason, date=date, history=history, report=_without_places(report))


def _without_places(report: Report) -> Report:
    """The report without where files lay on the machine of a user, for others read a baseline."""
    model, accuracy, against = report.model, report.accuracy, report.baseline
    paths = tuple(map(place, accuracy.evaluation.paths))
    evaluation = replace(accuracy.evaluation, paths=paths)
    return report.model_copy(
        update={
            "model": replace(model, path=model.title),
            "options": _placed(report.options),
            "accuracy": accuracy.model_copy(update={"evaluation": evaluation}),
            "baseline": against
            and against.model_copy(update={"baseline": place(against.baseline)}),
        }
    )


def _placed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _placed(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_placed(part) for part in value]
    return place(value) if isinstance(value, str) else value


def update_baseline(
    report: Path, baseline: Path, *, reason: str, date: str, keep: int = KEPT_RELEASES
) -> BaselineFile:
    """Make a report the baseline, in a file that is replaced at once.

    Raises:
        UsageError: no reason is given.
        BundleError: the report cannot be read, or `baseline` is something else than a baseline.
    """
    if not reason.strip():
        raise UsageError("A baseline needs a reason; say with --reason why this release is good.")
    accepted = load_report(report_path(report))
    old = read_baseline(baseline) if baseline.exists() else None
    if old is not None and not old.history:
        raise BundleError(
            f"{baseline} is a report and no baseline file; pass another path for the baseline."
        )
    made = updated(accepted, old, reason=reason.strip(), date=date, keep=keep)
    write_atomic(baseline, (made.model_dump_json(indent=2) + "\n").encode())
    return made


def _is_baseline(data: bytes, path: Path) -> bool:
    """Whether this is meant to be a baseline file; any other object is taken for a report."""
    return "baseline_version" in _parsed(data, str(path))


def _parsed(data: bytes, source: str) -> dict[str, JsonValue]:
    document = Document(f"Baseline {source}", BundleError, "pass a baseline file or a report.json")
    return require_object(parse_json(data, document), document)
