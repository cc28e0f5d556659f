"""Hold a report against a baseline: a verdict for every figure that has a limit; pure.

The limits are those of the baseline's recipe, so that a change cannot loosen what judges it, with
those of a limits file over them. Runs of different days share no clock: where a latency exceeds its
limit, what decides is the change that is left once that of the dense twin, measured in turns with
the sparse one, is taken out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from prox24_deploy.artifacts import Interval, Verdict
from prox24_deploy.errors import BundleError
from prox24_deploy.limits import Limits, MetricLimits, limits_of
from prox24_deploy.release.baseline import Baseline
from prox24_deploy.release.figures import Figure, figures_of, negated, without_drift, worsening
from prox24_deploy.release.intervals import exactly, judge, standard_error
from prox24_deploy.release.likeness import MACHINE_KEYS, in_words, require_alike
from prox24_deploy.release.schema import Change, Check, Comparison, Report, Status

_BADNESS: tuple[Verdict, ...] = ("pass", "inconclusive", "fail")
RELEASE = "release verdict"


def compare_reports(
    report: Report,
    baseline: Baseline,
    *,
    limits: Mapping[str, MetricLimits],
    allow: Sequence[str] = (),
) -> Comparison:
    """Judge every figure of both; `limits` come before the recipe's and may be empty.

    A figure with a limit that the report lacks fails; one that the baseline lacks is listed and not
    gated.

    Raises:
        BundleError: the reports differ in what `allow` does not name.
        UsageError: `allow` names what is no key.
    """
    allowed = require_alike(report, baseline.report, allow, baseline.source)
    keys = {difference.key for difference in allowed}
    judges = _Judges(
        recipe=_recipe_limits(baseline),
        file=limits,
        paired="evaluation" not in keys,
        same_machine=not keys & MACHINE_KEYS,
    )
    new, old = figures_of(report), figures_of(baseline.report)
    changes = (
        _release(report),
        *(_change(judges, name, new, old) for name in {**old, **new}),
    )
    return Comparison(
        verdict=worst(change.verdict for change in changes if change.gated),
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
    limits: Mapping[str, MetricLimits] | None = None,
    allow: Sequence[str] = (),
) -> Report:
    """The report with its comparison among its checks, regressions and verdict.

    A report that is unlike its baseline was still made: it is inconclusive and says why. What
    differs and was allowed is among its warnings.

    Raises:
        UsageError: `allow` names what is no key.
    """
    try:
        comparison = compare_reports(report, baseline, limits=limits or {}, allow=allow)
    except BundleError as error:
        check = Check(
            name="comparison",
            kind="baseline",
            value=None,
            limit=None,
            gated=True,
            verdict="inconclusive",
            message=str(error),
        )
        return _judged(report, (check,), None)
    found = (_check(change) for change in comparison.changes if change.kind != "release")
    return _judged(report, tuple(found), comparison)


def worst(verdicts: Iterator[Verdict]) -> Verdict:
    """Fail if any fails, else inconclusive if any is, else pass."""
    return max(verdicts, key=_BADNESS.index, default="pass")


@dataclass(frozen=True, slots=True)
class _Judges:
    """Limits of the recipe and of a file, and what the reports have in common."""

    recipe: Mapping[str, MetricLimits]
    file: Mapping[str, MetricLimits]
    paired: bool
    same_machine: bool

    def of(self, figure: Figure) -> MetricLimits | None:
        """The limits of a figure; a file gates what the recipe leaves alone."""
        explicit = limits_of(self.file, figure.name)
        if explicit is None and self._left_alone(figure):
            return None
        found = explicit or limits_of(self.recipe, figure.name)
        return found if found and found.gates else None

    def _left_alone(self, figure: Figure) -> bool:
        return not figure.gated or (figure.kind == "latency" and not self.same_machine)


def _recipe_limits(baseline: Baseline) -> Mapping[str, MetricLimits]:
    try:
        return Limits.model_validate(baseline.report.options.get("limits", {})).metrics
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in ("options", "limits", *problem["loc"]))
        raise BundleError(
            f"Baseline {baseline.source} is damaged at {where!r}: {problem['msg']}; restore it."
        ) from error


def _release(report: Report) -> Change:
    """What the report says of itself; what it says of an earlier baseline is not asked."""
    own = (c.verdict for c in report.checks if c.gated and c.kind != "baseline")
    verdict = worst(own)
    sentence = {
        "pass": "Every gate of the release itself holds",
        "fail": "A gate of the release itself failed, its report says which",
        "inconclusive": "A gate of the release itself is inconclusive, its report says which",
    }
    return Change(
        name=RELEASE,
        kind="release",
        unit="",
        higher_is_better=True,
        before=None,
        after=None,
        worse=None,
        limits="pass",
        gated=True,
        status="compared",
        verdict=verdict,
        message=sentence[verdict],
    )


def _change(
    judges: _Judges, name: str, new: Mapping[str, Figure], old: Mapping[str, Figure]
) -> Change:
    after, before = new.get(name), old.get(name)
    if after is None:
        return _missing(judges, old[name])
    if before is None:
        return _record(
            after, None, after, None, None, "new", "pass", "Not in the baseline, so not gated"
        )
    worse = worsening(after, before, paired=judges.paired)
    limits = judges.of(after)
    if limits is None:
        message = _moved(after, before, worse)
        return _record(after, before, after, worse, None, "compared", "pass", message)
    verdict = _verdict(limits, after, before, worse)
    message = _moved(after, before, worse)
    if after.kind == "latency" and verdict == "fail":
        verdict, reason = _drift(limits, new, old, name)
        message += reason
    return _record(after, before, after, worse, limits, "compared", verdict, message)


def _missing(judges: _Judges, before: Figure) -> Change:
    limits = judges.of(before)
    message = "Missing in the report, or not a finite number there; the baseline has it"
    verdict: Verdict = "fail" if limits else "pass"
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
        bound = limits.max_degradation_standard_errors * standard_error(worse)
        # The limit is a statement about noise already.
        verdicts.append(judge(exactly(worse.value), bound))
    if limits.min_improvement is not None:
        verdicts.append(judge(worse, -limits.min_improvement))
    return worst(iter(verdicts))


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
    """A value with its unit; bytes are whole and too many for powers of ten to be read."""
    number = f"{value:,.0f}" if unit == "bytes" else f"{value:.{digits}g}"
    return f"{number} {unit}" if unit else number


def limits_in_words(limits: MetricLimits, higher_is_better: bool) -> str:
    """Every limit that is given, as a reader of a table wants it."""
    bound = "at least" if higher_is_better else "at most"
    zero = limits.max_degradation == 0
    words = {
        f"{bound} {{:g}}": limits.threshold,
        "no worse" if zero else "at most {:g} worse": limits.max_degradation,
        "at most {:g} % worse": limits.max_degradation_percent,
        "at most {:g} standard errors worse": limits.max_degradation_standard_errors,
        "at least {:g} better": limits.min_improvement,
    }
    return ", ".join(text.format(value) for text, value in words.items() if value is not None)


def _record(
    figure: Figure,
    before: Figure | None,
    after: Figure | None,
    worse: Interval | None,
    limits: MetricLimits | None,
    status: Status,
    verdict: Verdict,
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
        limits=limits_in_words(limits, figure.higher_is_better) if limits else "",
        gated=limits is not None,
        status=status,
        verdict=verdict,
        message=message,
    )


def _check(change: Change) -> Check:
    limits = f"; limit: {change.limits}" if change.limits else ""
    return Check(
        name=change.name,
        kind="baseline",
        value=change.after,
        limit=None,
        gated=change.gated,
        verdict=change.verdict,
        message=f"{change.message}{limits}",
    )


def _judged(report: Report, checks: tuple[Check, ...], comparison: Comparison | None) -> Report:
    every = (*report.checks, *checks)
    told = (
        [check.message for check in checks]
        if comparison is None
        else [f"Allowed against the baseline: {in_words(d)}" for d in comparison.allowed]
    )
    return report.model_copy(
        update={
            "warnings": (*report.warnings, *told),
            "verdict": worst(iter((report.verdict, *(c.verdict for c in checks if c.gated)))),
            "checks": every,
            "regressions": tuple(c for c in every if c.gated and c.verdict == "fail"),
            "baseline": comparison,
        }
    )
