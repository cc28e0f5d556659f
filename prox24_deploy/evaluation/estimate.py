"""Means of values by sample, with their standard errors."""

import math

from torch import Tensor

from prox24_deploy.core.records import Estimate


def mean_estimate(values: Tensor) -> Estimate:
    """Mean with its standard error; 0 for a single value."""
    values = values.double()
    spread = float(values.std()) if len(values) > 1 else 0.0
    return Estimate(value=float(values.mean()), standard_error=spread / math.sqrt(len(values)))


def per_sample(values: Tensor) -> tuple[float, ...]:
    """Values to nine digits, which is more than any of them is known to."""
    return tuple(float(f"{value:.9g}") for value in values.double().tolist())
