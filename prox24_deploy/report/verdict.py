"""From checks to the verdict in four parts, and to the sentence that every view begins with."""

from collections.abc import Iterable, Mapping, Sequence

from prox24_deploy.core.intervals import FEWEST, worst
from prox24_deploy.core.records import Metric
from prox24_deploy.core.types import Judgement, Verdict
from prox24_deploy.report.against_dense import Group, by_name
from prox24_deploy.report.schema import PARTS, Check, CheckKind, Part, PartName, Parts
from prox24_deploy.report.wording import change_in_words

_BEGINNINGS = {"pass": "Passed", "fail": "Failed", "inconclusive": "Inconclusive"}
# What must have been checked for a part to pass; any other check can only keep it from that.
_PROOFS: Mapping[PartName, frozenset[CheckKind]] = {
    "sparsity": frozenset({"sparsity"}),
    "export": frozenset({"numerics", "parity"}),
    "accuracy": frozenset({"accuracy"}),
    "speed": frozenset({"latency"}),
}
_PASSED: Mapping[PartName, str] = {
    "sparsity": "Every pruned weight is proven 2:4 on the exported files: {} of {}",
    "export": "Files and engines do what PyTorch does with the same weights: {} of {} comparisons "
    "are within their tolerance",
    "accuracy": "{} of {} metrics with a limit against the dense model hold it: {first}",
    "speed": "The sparse model is not slower than the limit allows: {} of {} shapes; {first}",
}
_NOT_GATED: Mapping[PartName, str] = {
    "sparsity": "No layer was pruned, so there is no pattern to prove",
    "export": "No output of the exported files could be compared with PyTorch on this machine",
    "accuracy": "No metric has a limit against the dense model",
    "speed": "No backend with sparse kernels was timed, so nothing says whether the sparse model "
    "is slower or faster",
}


def judge_parts(checks: Sequence[Check]) -> Parts:
    """The four parts, each from its own checks."""
    return Parts(**{name: _part(name, [c for c in checks if c.part == name]) for name in PARTS})


def whole_verdict(parts: Parts) -> Verdict:
    """Fail if a part fails, else inconclusive if one is or accuracy is not gated, else pass."""
    verdicts = [part.verdict for part in parts.by_name().values()]
    if "fail" in verdicts:
        return "fail"
    open_ones = "inconclusive" in verdicts or parts.accuracy.verdict == "not gated"
    return "inconclusive" if open_ones else "pass"


def sentence_of(parts: Parts, checks: Sequence[Check], groups: Sequence[Group]) -> str:
    """What changed, and whether that may ship: "Failed on accuracy: perplexity +187 %, …"."""
    verdict = whole_verdict(parts)
    blamed = _blamed(parts, verdict)
    on = f" on {_listed(blamed)}" if blamed else ""
    told = [_telling(name, parts, checks) for name in blamed if name != "accuracy"]
    change = _change(checks, groups)
    told.insert(0 if "accuracy" in blamed or not told else len(told), change)
    left = [name for name, part in parts.by_name().items() if part.verdict == "not gated"]
    left = [name for name in left if name not in blamed]
    ungated = f"; {_listed(left)} not gated" if left else ""
    return f"{_BEGINNINGS[verdict]}{on}: {'; '.join(told)}{ungated}"


def _part(name: PartName, checks: Sequence[Check]) -> Part:
    gated = [check for check in checks if check.gated]
    proofs = [check for check in gated if check.kind in _PROOFS[name]]
    bad = worst(_verdicts(gated))
    if bad != "pass":
        guilty = [check for check in gated if check.verdict == bad]
        more = f", and {len(guilty) - 1} more" if len(guilty) > 1 else ""
        return Part(verdict=bad, reason=_sentence(_told(guilty[0]) + more))
    if not proofs:
        return Part(verdict="not gated", reason=_sentence(_NOT_GATED[name]))
    number = len(proofs)
    reason = _PASSED[name].format(number, number, first=_told(proofs[0]))
    return Part(verdict="pass", reason=_sentence(reason))


def _verdicts(checks: Iterable[Check]) -> list[Verdict]:
    return [check.verdict for check in checks if check.verdict != "not gated"]


def _blamed(parts: Parts, verdict: Verdict) -> list[PartName]:
    """The parts that keep a release from passing."""
    if verdict == "pass":
        return []
    found = [name for name, part in parts.by_name().items() if part.verdict == verdict]
    if verdict == "inconclusive" and parts.accuracy.verdict == "not gated":
        found.append("accuracy")
    return sorted(found, key=PARTS.index)


def _telling(name: PartName, parts: Parts, checks: Sequence[Check]) -> str:
    """The check that decided a part; of a figure of the baseline no more than its two values."""
    verdict = parts.by_name()[name].verdict
    check = next(c for c in checks if c.part == name and c.verdict == verdict)
    if check.kind == "baseline":
        check = check.model_copy(update={"message": check.message.partition(": ")[0]})
    return _told(check)


def _change(checks: Sequence[Check], groups: Sequence[Group]) -> str:
    """The change of the metric that decided, or of the headline where none is gated."""
    named = by_name(groups)
    order: tuple[Judgement, ...] = ("fail", "inconclusive", "pass", "not gated")
    own = [check for check in checks if check.part == "accuracy"]
    check = min(own, key=lambda c: order.index(c.verdict), default=None)
    if check is None:
        return "no metric was measured"
    metric = named.get(check.name)
    if metric is None or check.kind != "accuracy":
        return _told(check)
    if check.verdict == "not gated":
        return f"{change_in_words(check.name, metric)}, without a limit"
    return change_in_words(check.name, metric) + _why_open(check, metric)


def _why_open(check: Check, metric: Metric) -> str:
    if check.verdict != "inconclusive":
        return ""
    return ", too few to tell" if metric.samples < FEWEST else ", too near to the limit to tell"


def _told(check: Check) -> str:
    """A check in words; the message about a metric begins with its name."""
    message = check.message.rstrip(".")
    if check.kind == "accuracy":
        return message
    against = " against the baseline" if check.kind == "baseline" else ""
    return f"{check.name}{against}: {message}"


def _listed(names: Sequence[str]) -> str:
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _sentence(text: str) -> str:
    return f"{text.rstrip('.')}."
