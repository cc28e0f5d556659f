"""Checks and warnings about accuracy through the engines that ship."""

from collections.abc import Iterator, Sequence

from prox24_deploy.core.accuracy import EngineAccuracy, EngineAccuracyResult, ParityCheck
from prox24_deploy.core.records import Metric, NotMeasured
from prox24_deploy.core.types import Judgement
from prox24_deploy.report.schema import Check
from prox24_deploy.report.wording import with_error


def engine_checks(result: EngineAccuracyResult) -> tuple[Check, ...]:
    """Whether each engine does what PyTorch does with the same weights; that gates the release."""
    return (
        *(_check(engine, one) for engine in result.engines for one in engine.parity),
        *(
            _check(engine, one, ", decoding")
            for engine in result.engines
            for one in (engine.decode.parity if engine.decode else ())
        ),
        *(_unmeasured(failed, fails=True) for failed in result.failed),
        *(_unmeasured(missing, fails=False) for missing in result.not_measured),
    )


def engine_warnings(result: EngineAccuracyResult, metrics: Sequence[Metric]) -> Iterator[str]:
    """What a reader must know of accuracy through engines; `metrics` are those of PyTorch."""
    for engine in result.engines:
        through = {metric.name for metric in engine.metrics}
        lacking = [metric.name for metric in metrics if metric.name not in through]
        if lacking:
            yield (
                f"Not measured through the engines of backend {engine.backend}, which generate "
                f"nothing here: {', '.join(lacking)}."
            )
        if engine.longest is not None:
            yield (
                f"Accuracy through the engines of backend {engine.backend} is that of samples cut "
                f"to {engine.longest} tokens, the most that they were compiled for; pass --shapes "
                "sequence=N to compile for longer ones."
            )
    for missing in result.not_measured:
        yield f"Accuracy through backend {missing.backend} was not measured: {missing.reason}"


def _check(engine: EngineAccuracy, found: ParityCheck, how: str = "") -> Check:
    verdict: Judgement = "not gated"
    if found.passed is not None:
        verdict = "pass" if found.passed else "fail"
    return Check(
        name=f"{engine.backend} {found.twin} {found.metric}{how}",
        part="export",
        kind="parity",
        value=found.deviation,
        limit=found.tolerance,
        verdict=verdict,
        message=f"{_figures(found)} over {found.samples} samples; {_judgement(engine, found)}",
    )


def _figures(found: ParityCheck) -> str:
    if found.torch and found.engine:
        text = f"Engine {found.engine.value:.4g}, PyTorch {found.torch.value:.4g}"
        return f"{text}, difference {with_error(found.difference)}" if found.difference else text
    if found.agreement:
        return f"Engine against PyTorch {with_error(found.agreement)}"
    return "Engine or PyTorch gave a figure that is not finite"


def _judgement(engine: EngineAccuracy, found: ParityCheck) -> str:
    if found.tolerance is None:
        return "not gated, because near ties decide it or another figure does"
    limit = f"tolerance {found.tolerance:g} for {engine.dtype}"
    if found.passed:
        return limit
    return (
        f"{limit}: the engine does not do what PyTorch does with the same weights; do not ship it, "
        "export with another --dtype or compile with another version of the backend"
    )


def _unmeasured(backend: NotMeasured, *, fails: bool) -> Check:
    """What was delivered but cannot run here is told and gates nothing, as for its latency."""
    verb = "could not be" if fails else "was not"
    return Check(
        name=f"{backend.backend} accuracy",
        part="export",
        kind="parity",
        value=None,
        limit=None,
        verdict="fail" if fails else "not gated",
        message=f"Accuracy through the engines {verb} measured: {backend.reason}",
    )
