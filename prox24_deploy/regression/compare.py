"""Compare a report with a baseline: a verdict for every figure that has a limit.

The limits are those of the baseline's recipe, so that a change cannot loosen what judges it, with
those of a limits file over them. Runs of different days share no clock: where a latency exceeds its
limit, what decides is the change that is left once that of the dense twin, measured in turns with
the sparse one, is taken out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from prox24_deploy.config.limits import (
    DEFAULT_METRICS,
    GivenLimits,
    Limits,
    MetricLimits,
    joined,
    limits_of,
)
from prox24_deploy.core.documents import first_problem
from prox24_deploy.core.errors import BundleError
from prox24_deploy.core.intervals import FEWEST, exactly, judge, negated, standard_error, worst
from prox24_deploy.core.records import Interval
from prox24_deploy.core.types import Judgement, Verdict
from prox24_deploy.regression.baseline import Baseline, read_gate, report_path
from prox24_deploy.regression.comparability import MACHINE_KEYS, in_words, require_alike
from prox24_deploy.regression.figures import (
    Figure,
    figures_of,
    metric_groups,
    without_drift,
    worsening,
)
from prox24_deploy.report.against_dense import by_name, judge_metrics
from prox24_deploy.report.binding import (
    NO_FIGURE,
    part_of,
    require_figures,
    require_named,
    unmatched,
    unmatched_checks,
)
from prox24_deploy.report.formats import size, with_unit
from prox24_deploy.report.schema import (
    Change,
    ChangeKind,
    Check,
    Comparison,
    Report,
    Status,
    load_report,
)
from prox24_deploy.report.verdict import judge_parts, sentence_of, whole_verdict
from prox24_deploy.report.wording import limits_in_words

RELEASE = "release verdict"
_NOTHING_GIVEN = GivenLimits()


def compare_files(
    report: Path, baseline: Path, *, limits: Path | None = None, allow: Sequence[str] = ()
) -> Comparison:
    """Compare a report.json or a bundle with a baseline file, a report.json or a bundle.

    Raises:
        BundleError: a file cannot be read, or as `compare_reports`.
        UsageError: the limits file cannot be used, or as `compare_reports`.
    """
    new = load_report(report_path(report))
    gate = read_gate(baseline, limits, allow)
    return compare_reports(new, gate.baseline, limits=gate.limits, allow=gate.allow)


def compare_reports(
    report: Report,
    baseline: Baseline,
    *,
    limits: GivenLimits = _NOTHING_GIVEN,
    allow: Sequence[str] = (),
) -> Comparison:
    """Judge every figure of both; the `limits` of a file come before the recipe's.

    A figure with a limit that the report lacks fails; one that the baseline lacks is listed and not
    gated, unless the file names it. Where the file has limits against the dense model, the report
    is held to them instead of to its own, accepted losses among these.

    Raises:
        BundleError: the reports differ in what `allow` does not name.
        UsageError: `allow` names what is no key, or the file a figure that neither report has.
    """
    allowed = require_alike(report, baseline.report, allow, baseline.source)
    keys = {difference.key for difference in allowed}
    recipe = _limits_of(baseline.report, f"Baseline {baseline.source}").metrics
    judges = _Judges(
        recipe=recipe,
        file=limits.metrics,
        paired="evaluation" not in keys,
        same_machine=not keys & MACHINE_KEYS,
    )
    new, old = figures_of(report), figures_of(baseline.report)
    figures = {**old, **new}
    require_figures(limits.metrics, figures, f"Limits file {limits.source}")
    own = {name: entry for name, entry in recipe.items() if DEFAULT_METRICS.get(name) != entry}
    changes = (
        _release(report, limits),
        *(_change(judges, name, new, old) for name in figures),
        *_unmatched(joined(own, limits.metrics), figures),
    )
    return Comparison(
        verdict=worst(change.verdict for change in changes if change.verdict != "not gated"),
        baseline=baseline.source,
        reason=baseline.reason,
        date=baseline.date,
        allowed=allowed,
        changes=changes,
        history=baseline.history,
    )


def held_against(
    report: Report,
    baseline: Baseline,
    *,
    limits: GivenLimits = _NOTHING_GIVEN,
    allow: Sequence[str] = (),
) -> Report:
    """The report with its comparison among its checks, regressions and verdict.

    A report that is unlike its baseline was still made: it is inconclusive and says why. What
    differs and was allowed is among its warnings. The limits against the dense model have judged
    it when it was made.

    Raises:
        UsageError: as for `compare_reports`.
    """
    against_baseline = replace(limits, against_dense={})
    try:
        comparison = compare_reports(report, baseline, limits=against_baseline, allow=allow)
    except BundleError as error:
        check = Check(
            name="comparison",
            part="accuracy",
            kind="baseline",
            value=None,
            limit=None,
            verdict="inconclusive",
            message=str(error),
        )
        return _judged(report, (check,), None)
    found = (_check(change) for change in comparison.changes if change.kind != "release")
    return _judged(report, tuple(found), comparison)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judges:
    """Limits of the recipe and of a file, and what the reports have in common."""

    recipe: Mapping[str, MetricLimits]
    file: Mapping[str, MetricLimits]
    paired: bool
    same_machine: bool

    def of(self, before: Figure) -> MetricLimits | None:
        """Limits of a figure, as the baseline has it; a file gates what a recipe leaves alone."""
        explicit = self.given(before)
        if explicit is None and self._left_alone(before):
            return None
        found = explicit or limits_of(self.recipe, before.name)
        return found if found and found.gates else None

    def given(self, figure: Figure) -> MetricLimits | None:
        """Those of the file."""
        return limits_of(self.file, figure.name)

    def _left_alone(self, before: Figure) -> bool:
        if before.kind in {"layers", "kernels"} and before.value.value == 0:
            # There are none to lose.
            return True
        return not before.gated or (before.kind == "latency" and not self.same_machine)


def _limits_of(report: Report, source: str) -> Limits:
    """What a report was judged by; `source` names it in errors."""
    try:
        return Limits.model_validate(report.options.get("limits", {}))
    except ValidationError as error:
        found, what = first_problem(error)
        where = ".".join(filter(None, ("options.limits", found)))
        raise BundleError(f"{source} is damaged at {where!r}: {what}; restore it.") from error


def _release(report: Report, given: GivenLimits) -> Change:
    """What the report says of itself; what it says of an earlier baseline is not asked."""
    parts = judge_parts(_own_checks(report, given))
    verdict = whole_verdict(parts)
    found = [
        f"{name} is {part.verdict}: {part.reason.rstrip('.')}"
        for name, part in parts.by_name().items()
        if part.verdict == verdict or (name == "accuracy" and part.verdict == "not gated")
    ]
    message = "Every part of the release itself that was gated passes"
    if verdict != "pass":
        message = f"Of the release itself, {'; '.join(found)}"
    return _row(RELEASE, "release", "pass", "compared", verdict, message)


def _row(
    name: str, kind: ChangeKind, limits: str, status: Status, verdict: Judgement, message: str
) -> Change:
    """A row that is of no figure."""
    return Change(
        name=name,
        kind=kind,
        unit="",
        higher_is_better=True,
        before=None,
        after=None,
        worse=None,
        limits=limits,
        status=status,
        verdict=verdict,
        message=message,
    )


def _own_checks(report: Report, given: GivenLimits) -> list[Check]:
    """Checks of a report without those of its baseline; by other limits where any are given."""
    own = [check for check in report.checks if check.kind != "baseline"]
    if not given.against_dense:
        return own
    groups = metric_groups(report)
    names = by_name(groups)
    require_named(given, Limits(), names)
    table = joined(_limits_of(report, "The report").against_dense, given.against_dense)
    return [
        *(one.check for one in judge_metrics(groups, table)),
        *unmatched_checks(given, Limits(), names),
        *(check for check in own if check.kind != "accuracy"),
    ]


def _unmatched(
    table: Mapping[str, MetricLimits], figures: Mapping[str, Figure]
) -> Iterator[Change]:
    """A row that does not pass for each limit that found no figure."""
    for name in unmatched(table, figures):
        limits = limits_in_words(table[name], higher_is_better=True)
        yield _row(name, "limits", limits, "unmatched", "inconclusive", NO_FIGURE)


def _change(
    judges: _Judges, name: str, new: Mapping[str, Figure], old: Mapping[str, Figure]
) -> Change:
    after, before = new.get(name), old.get(name)
    if after is None:
        return _missing(judges, old[name])
    if before is None:
        return _added(judges, after)
    worse = worsening(after, before, paired=judges.paired)
    limits = judges.of(before)
    message = _moved(after, before, worse)
    if limits is None:
        return _record(after, before, after, worse, None, "compared", "not gated", message)
    if not (after.decides and before.decides):
        message += f"; fewer than {FEWEST} samples decide nothing"
        return _record(after, before, after, worse, limits, "compared", "inconclusive", message)
    verdict = _verdict(limits, after, before, worse)
    if after.kind == "latency" and verdict == "fail":
        verdict, reason = _drift(limits, new, old, name)
        message += reason
    return _record(after, before, after, worse, limits, "compared", verdict, message)


def _added(judges: _Judges, after: Figure) -> Change:
    """A figure that the baseline lacks: of limits in a file, a threshold alone can be judged."""
    limits = judges.given(after)
    if limits is None or not limits.gates:
        message = "Not in the baseline, so not gated"
        return _record(after, None, after, None, None, "new", "not gated", message)
    if limits.model_fields_set == {"threshold"} and limits.threshold is not None and after.decides:
        message = f"{_amount(after.value.value, after.unit, 6)}, not in the baseline"
        verdict = _within(after, limits.threshold)
        return _record(after, None, after, None, limits, "new", verdict, message)
    message = "Not in the baseline, so that its limit cannot be judged"
    return _record(after, None, after, None, limits, "new", "inconclusive", message)


def _missing(judges: _Judges, before: Figure) -> Change:
    limits = judges.of(before)
    message = "Missing in the report, or not a finite number there; the baseline has it"
    verdict: Judgement = "fail" if limits else "not gated"
    return _record(before, before, None, None, limits, "missing", verdict, message)


def _drift(
    limits: MetricLimits, new: Mapping[str, Figure], old: Mapping[str, Figure], name: str
) -> tuple[Verdict, str]:
    """Verdict of a latency beyond its limit: does it stay there without the dense twin's change?

    A threshold holds as it is, because it bounds what users see and not what changed.
    """
    speed = name.replace("latency/", "speed-up/", 1)
    left = without_drift(old[name], new[speed], old[speed])
    verdict = _verdict(limits, new[name], old[name], left)
    if verdict == "fail":
        return verdict, f"; without the change of the dense twin {_signed(left, 'ms')}"
    return "inconclusive", (
        f"; without the change of the dense twin {_signed(left, 'ms')}, so the machine may have "
        "been slower: measure again, or look for what slows both twins"
    )


def _verdict(limits: MetricLimits, after: Figure, before: Figure, worse: Interval) -> Verdict:
    """The worst over all limits that are given."""
    verdicts: list[Verdict] = []
    if limits.threshold is not None:
        verdicts.append(_within(after, limits.threshold))
    if limits.max_degradation is not None:
        verdicts.append(judge(worse, limits.max_degradation))
    if limits.max_degradation_percent is not None:
        bound = limits.max_degradation_percent / 100 * abs(before.value.value)
        verdicts.append(judge(worse, bound))
    if limits.max_degradation_standard_errors is not None:
        bound = limits.max_degradation_standard_errors * standard_error(
            worse, _fewer(after, before)
        )
        # The limit is a statement about noise already.
        verdicts.append(judge(exactly(worse.value), bound))
    if limits.min_improvement is not None:
        verdicts.append(judge(worse, -limits.min_improvement))
    return worst(verdicts)


def _fewer(after: Figure, before: Figure) -> int | None:
    known = [samples for samples in (after.samples, before.samples) if samples is not None]
    return min(known, default=None)


def _within(after: Figure, threshold: float) -> Verdict:
    if after.higher_is_better:
        return judge(negated(after.value), -threshold)
    return judge(after.value, threshold)


def _moved(after: Figure, before: Figure, worse: Interval) -> str:
    """What happened to a figure, in words."""
    now, was = (_amount(figure.value.value, after.unit, 6) for figure in (after, before))
    return f"{now}, was {was}: {_signed(worse, after.unit)}"


def _signed(worse: Interval, unit: str) -> str:
    if worse.low == worse.high == 0:
        return "unchanged"
    word = "better" if worse.value < 0 else "worse"
    shown = worse if worse.value >= 0 else negated(worse)
    text = f"{word} by {_amount(shown.value, unit, 4)}"
    if shown.low == shown.high:
        return text
    return f"{text}, 95 % interval {shown.low:.4g} to {shown.high:.4g}"


def _amount(value: float, unit: str, digits: int) -> str:
    """A value with its unit; of bytes a size, for these are too many to be read."""
    return size(value) if unit == "bytes" else with_unit(f"{value:.{digits}g}", unit)


def _record(
    figure: Figure,
    before: Figure | None,
    after: Figure | None,
    worse: Interval | None,
    limits: MetricLimits | None,
    status: Status,
    verdict: Judgement,
    message: str,
) -> Change:
    return Change(
        name=figure.name,
        kind=figure.kind,
        unit=figure.unit,
        higher_is_better=figure.higher_is_better,
        before=before.value.value if before else None,
        after=after.value.value if after else None,
        worse=worse,
        limits=limits_in_words(limits, higher_is_better=figure.higher_is_better) if limits else "",
        status=status,
        verdict=verdict,
        message=message,
    )


def _check(change: Change) -> Check:
    limits = f"; limit: {change.limits}" if change.limits else ""
    return Check(
        name=change.name,
        part=part_of(change.name),
        kind="baseline",
        value=change.after,
        limit=None,
        verdict=change.verdict,
        message=f"{change.message}{limits}",
    )


def _judged(report: Report, checks: tuple[Check, ...], comparison: Comparison | None) -> Report:
    every = (*report.checks, *checks)
    parts = judge_parts(every)
    told = (
        [check.message for check in checks]
        if comparison is None
        else [f"Allowed against the baseline: {in_words(d)}" for d in comparison.allowed]
    )
    return report.model_copy(
        update={
            "warnings": (*report.warnings, *told),
            "verdict": whole_verdict(parts),
            "sentence": sentence_of(parts, every, metric_groups(report)),
            "parts": parts,
            "checks": every,
            "regressions": tuple(check for check in every if check.verdict == "fail"),
            "baseline": comparison,
        }
    )
