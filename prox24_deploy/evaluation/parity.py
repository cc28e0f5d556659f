"""The metrics of a model through its engines, and how far each engine is from PyTorch."""

import math

from prox24_deploy.core.accuracy import ParityCheck
from prox24_deploy.core.intervals import NORMAL_95
from prox24_deploy.core.metrics import METRICS
from prox24_deploy.core.records import Estimate, Metric
from prox24_deploy.core.types import DType, Twin

# How far an engine may be from PyTorch in float32: nats of log-perplexity and divergence, shares of
# accuracy, 1 - cosine, standard deviations of a score. Rounding explains less in each dtype.
METRIC_TOLERANCES: dict[DType, float] = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}


def parity_of(twin: Twin, metric: Metric, dtype: DType) -> ParityCheck:
    """Judge a metric whose "dense" model is PyTorch and whose "sparse" one is the engine; pure.

    The deviation counts what is beyond the 95 % interval of a paired difference; an agreement has
    no noise to speak of, for its perfect value is known.
    """
    found = metric.change
    kind = METRICS.get(metric.name)
    deviate = kind.deviation if kind else None
    tolerance = METRIC_TOLERANCES[dtype] if deviate and found else None
    deviation = None
    if found and math.isfinite(found.value) and math.isfinite(found.standard_error):
        noise = NORMAL_95 * found.standard_error if metric.difference else 0.0
        deviation = max(0.0, deviate(found.value) - noise) if deviate else None
    passed = None
    if tolerance is not None:
        passed = deviation is not None and deviation <= tolerance
    return ParityCheck(
        twin=twin,
        metric=metric.name,
        samples=metric.samples,
        torch=_known(metric.dense),
        engine=_known(metric.sparse),
        difference=_known(metric.difference),
        agreement=_known(metric.agreement),
        deviation=deviation,
        tolerance=tolerance,
        passed=passed,
    )


def _known(estimate: Estimate | None) -> Estimate | None:
    """An estimate that JSON can hold."""
    finite = estimate and math.isfinite(estimate.value) and math.isfinite(estimate.standard_error)
    return estimate if finite else None
