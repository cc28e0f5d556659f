"""Means of values by sample, with their standard errors, and the metrics that are made of them."""

import math

from torch import Tensor

from prox24_deploy.core.metrics import MetricKind
from prox24_deploy.core.records import DirectMetric, Estimate, PairedMetric


def mean_estimate(values: Tensor) -> Estimate:
    """Mean with its standard error; 0 for a single value."""
    values = values.double()
    spread = float(values.std()) if len(values) > 1 else 0.0
    return Estimate(value=float(values.mean()), standard_error=spread / math.sqrt(len(values)))


def per_sample(values: Tensor) -> tuple[float, ...]:
    """Values to nine digits, which is more than any of them is known to."""
    return tuple(float(f"{value:.9g}") for value in values.double().tolist())


def paired(kind: MetricKind, dense: Tensor, sparse: Tensor) -> PairedMetric:
    """A metric that either model has, from its value per sample of each, (samples,)."""
    return PairedMetric(
        name=kind.name,
        higher_is_better=kind.higher_is_better,
        samples=len(sparse),
        dense=mean_estimate(dense),
        sparse=mean_estimate(sparse),
        difference=mean_estimate(sparse - dense),
        values=per_sample(sparse),
    )


def direct(kind: MetricKind, values: Tensor) -> DirectMetric:
    """A metric that compares the two models with each other, from its value per sample."""
    return DirectMetric(
        name=kind.name,
        higher_is_better=kind.higher_is_better,
        samples=len(values),
        agreement=mean_estimate(values),
        values=per_sample(values),
    )


def divergence(dense: Tensor, sparse: Tensor) -> Tensor:
    """KL(dense, sparse) in nats of what logits, (..., classes), predict: (...), float64."""
    logs = [part.double().log_softmax(-1) for part in (dense, sparse)]
    return (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
