"""Time in fewer rounds than a user would, where hardly anything is about the figures."""

from dataclasses import replace
from typing import Any

from prox24_deploy.core.records import LatencyRow
from prox24_deploy.latency.measure import DEFAULT_OPTIONS, MeasureOptions, measure_latency

# So many tell the median of a tiny model as well as is needed.
ROUNDS = 50


def timed_briefly(
    *arguments: Any, options: MeasureOptions = DEFAULT_OPTIONS, **others: Any
) -> tuple[LatencyRow, ...]:
    """As `measure_latency` does, but in at most 50 rounds where nobody said how many."""
    if options.max_rounds == DEFAULT_OPTIONS.max_rounds:
        options = replace(options, max_rounds=ROUNDS)
    return measure_latency(*arguments, options=options, **others)
