"""What counts as a regression: limits of a build on its own and against a baseline.

The recipe holds the defaults under `[limits]`; a limits file has the tables of `[limits.metrics]`
at its top level. Names of metrics are globs and the last one that matches a metric applies whole.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from prox24_deploy.documents import Document, parse_toml, read_toml_text
from prox24_deploy.errors import UsageError

_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class MetricLimits(BaseModel):
    """Limits of one metric; every one that is given must hold, and without any nothing is gated.

    A degradation is how far the new value lies from the baseline's in the worse direction, which
    the metric itself knows. `threshold` bounds the new value itself, `max_degradation` the
    degradation in units of the metric, `max_degradation_percent` the same in percent of the
    baseline's value and `max_degradation_standard_errors` in standard errors of the difference.
    `min_improvement` asks for the opposite of a degradation, in units of the metric. In files the
    keys are written with hyphens.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=lambda name: name.replace("_", "-"),
    )

    threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None
    max_degradation: _NotNegative | None = None
    max_degradation_percent: _NotNegative | None = None
    max_degradation_standard_errors: _NotNegative | None = None
    min_improvement: _NotNegative | None = None

    @property
    def gates(self) -> bool:
        """Whether any limit is given."""
        return bool(self.model_fields_set)


MetricTable = dict[str, MetricLimits]
_TABLE: TypeAdapter[MetricTable] = TypeAdapter(MetricTable)

DEFAULT_METRICS = _TABLE.validate_python(
    {
        "*": {"max-degradation-percent": 2},
        # Figures near zero, of which percents are small.
        "KL divergence": {"max-degradation-percent": 10},
        "score change": {"max-degradation-percent": 10},
        # Of fewer samples; that an engine does what PyTorch does is checked on its own.
        "engine/*": {"max-degradation-percent": 5},
        "engine/*/KL divergence": {"max-degradation-percent": 20},
        "engine/*/score change": {"max-degradation-percent": 20},
        "speed-up/*": {"max-degradation-percent": 2},
        "latency/*": {"max-degradation-percent": 10},
        "size/*": {"max-degradation-percent": 5},
        "layers/*": {"max-degradation": 0},
        "kernels/*": {"max-degradation": 0},
    }
)


class Limits(BaseModel):
    """What counts as a regression of a build on its own, and against a baseline.

    `max_slowdown` is the largest tolerated excess of sparse over dense latency, as a fraction; it
    gates only backends that have sparse kernels. `metrics` are the limits against a baseline.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    max_slowdown: Annotated[float, Field(ge=0, le=10)] = 0.02
    metrics: MetricTable = DEFAULT_METRICS

    def as_json(self) -> dict[str, JsonValue]:
        """As it is written in a recipe, without what is not given."""
        return self.model_dump(by_alias=True, exclude_none=True)


def limits_of(table: Mapping[str, MetricLimits], name: str) -> MetricLimits | None:
    """The last entry whose glob matches the name of a metric; None if there is none."""
    found = [limits for glob, limits in table.items() if fnmatchcase(name, glob)]
    return found[-1] if found else None


def read_limits(path: Path) -> MetricTable:
    """Read a limits file: TOML, a table for each glob over names of metrics.

    Raises:
        UsageError: the file is missing, is not TOML, or has an unknown key or a wrong value.
    """
    document = Document(f"Limits {path}", UsageError, "pass a TOML file of limits with --limits")
    try:
        return _TABLE.validate_python(parse_toml(read_toml_text(path, document), document))
    except ValidationError as error:
        raise UsageError(f"Limits {path}: {_problem(error)}.") from error


def _problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = " under ".join(repr(str(part)) for part in reversed(problem["loc"]))
    keys = ", ".join(name.replace("_", "-") for name in MetricLimits.model_fields)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {where}; the keys of a metric are {keys}"
    if problem["type"] in {"model_type", "dict_type"}:
        return f"{where} is {problem['input']!r}, expected a table with some of {keys}"
    return f"key {where}: {problem['msg']}, got {problem['input']!r}"
