"""What counts as a regression: against the dense model, and against a baseline.

The defaults stand here, once. A recipe has its own under `[limits]`. A limits file has those
against a baseline at its top level and those against the dense model under `against-dense`. Names
of metrics are globs. Of defaults, recipe, file and accepted losses each comes before those in front
of it, and within one table the last that matches applies whole.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from prox24_deploy.core.documents import Document, parse_toml, read_toml_text
from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.metrics import ENGINE, HARNESS, METRICS, is_direct, plain_name
from prox24_deploy.core.tasks import TASKS

_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AGAINST_DENSE = "against-dense"


class MetricLimits(BaseModel):
    """Limits of one metric; every one that is given must hold, and without any nothing is gated.

    A degradation is how far the new value lies from the reference in the worse direction, which the
    metric itself knows; the reference is the baseline's value or that of the dense model.
    `threshold` bounds the new value itself, `max_degradation` the degradation in units of the
    metric, `max_degradation_percent` the same in percent of the reference and
    `max_degradation_standard_errors` in standard errors of the difference. `min_improvement` asks
    for the opposite of a degradation, in units of the metric. A metric that compares the sparse
    model with the dense one directly can have nothing but a threshold against the dense model. In
    files the keys are written with hyphens.
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


def _baseline_defaults() -> dict[str, dict[str, float]]:
    percents = {
        name: percent
        for kind in METRICS.values()
        for name, percent in kind.against_baseline.items()
    }
    engine = {name: percent for name, percent in percents.items() if name.startswith(ENGINE)}
    percents = {
        "*": 2,
        **{name: percent for name, percent in percents.items() if name not in engine},
        # Of fewer samples; that an engine does what PyTorch does is checked on its own.
        f"{ENGINE}*": 5,
        **engine,
        "speed-up/*": 2,
        "latency/*": 10,
        "size/*": 5,
    }
    counts = {"layers/*": 0, "kernels/*": 0}
    return {
        **{name: {"max-degradation-percent": percent} for name, percent in percents.items()},
        **{name: {"max-degradation": count} for name, count in counts.items()},
    }


DEFAULT_METRICS = _TABLE.validate_python(_baseline_defaults())
# Of other metrics of the harness neither scale nor meaning is known.
_HARNESS: dict[str, dict[str, float]] = {
    f"{HARNESS}*/acc*": {"max-degradation": 0.02},
    f"{HARNESS}*/exact_match*": {"max-degradation": 0.02},
}


class Limits(BaseModel):
    """What counts as a regression of a build, against the dense model and against a baseline.

    `max_slowdown` is the largest tolerated excess of sparse over dense latency, as a fraction; it
    gates only backends that have sparse kernels. `metrics` are the limits against a baseline,
    `against_dense` those of accuracy against the dense model. A recipe has only what differs from
    the defaults.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_by_name=True, validate_by_alias=True
    )

    max_slowdown: Annotated[float, Field(ge=0, le=10)] = 0.02
    metrics: MetricTable = {}
    against_dense: Annotated[MetricTable, Field(alias=AGAINST_DENSE)] = {}

    def as_json(self) -> dict[str, JsonValue]:
        """As it is written in a recipe, without what is not given."""
        return self.model_dump(by_alias=True, exclude_none=True)

    def over_defaults(
        self, task: str, measured: Collection[str], given: "GivenLimits | None" = None
    ) -> "Limits":
        """Everything that applies to a task of which these metrics were measured.

        `given` comes before the recipe's, and the recipe's before the defaults.
        """
        given = given or GivenLimits()
        return Limits(
            max_slowdown=self.max_slowdown,
            metrics=joined(DEFAULT_METRICS, self.metrics),
            against_dense=joined(
                dense_defaults(task, measured),
                self.against_dense,
                given.against_dense,
                given.accepted,
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenLimits:
    """Limits that are not the recipe's: those of a file, and losses that were accepted.

    `source` names the file, "" where there is none.
    """

    source: str = ""
    metrics: MetricTable = field(default_factory=dict)
    against_dense: MetricTable = field(default_factory=dict)
    accepted: MetricTable = field(default_factory=dict)


def dense_defaults(task: str, measured: Collection[str]) -> MetricTable:
    """Limits of a task against the dense model; where labels decide, agreement informs."""
    kind = TASKS[task]
    informs = {m.instead.name for m in METRICS.values() if m.instead and m.name in measured}
    table: dict[str, Mapping[str, float]] = {
        metric.name: metric.limits_in(kind.judged_by)
        for metric in METRICS.values()
        if metric.name not in informs and metric.limits_in(kind.judged_by)
    }
    return _TABLE.validate_python({**table, **(_HARNESS if kind.decoder_alone else {})})


def joined(*tables: Mapping[str, MetricLimits]) -> MetricTable:
    """One table in which a later one comes before an earlier one."""
    found: MetricTable = {}
    for name, limits in (entry for table in tables for entry in table.items()):
        # Taken out first, for it is the last that matches which applies.
        found.pop(name, None)
        found[name] = limits
    return found


def limits_of(table: Mapping[str, MetricLimits], *names: str) -> MetricLimits | None:
    """The last entry whose glob matches a name of a metric; None if there is none."""
    found = [
        limits for glob, limits in table.items() if any(fnmatchcase(name, glob) for name in names)
    ]
    return found[-1] if found else None


def dense_limits_of(table: Mapping[str, MetricLimits], name: str) -> MetricLimits | None:
    """The limits of a metric against the dense model; through an engine it has the same ones."""
    found = limits_of(table, name, plain_name(name))
    return found if found and found.gates else None


def is_glob(name: str) -> bool:
    """Whether a name stands for all that it matches."""
    return any(sign in name for sign in "*?[")


def accepted_loss(name: str, amount: str) -> MetricLimits:
    """The limit against the dense model that `--accept-loss NAME=AMOUNT` sets.

    An amount in percent is of the dense model's value, another is in units of the metric; of a
    metric that compares the models directly it is the value to reach.

    Raises:
        UsageError: it is no such number.
    """
    if is_direct(name):
        key, number, example = "threshold", amount, f"{name}=0.9"
    else:
        percent = amount.endswith("%")
        key = "max-degradation-percent" if percent else "max-degradation"
        number, example = amount.removesuffix("%"), f"{name}=25% or {name}=0.05"
    try:
        return MetricLimits.model_validate({key: float(number)})
    except ValueError as error:
        raise UsageError(
            f"--accept-loss {name}={amount} is not understood, expected {example}."
        ) from error


def read_limits(path: Path) -> GivenLimits:
    """Read a limits file: TOML, a table for each glob over names of metrics.

    Raises:
        UsageError: the file is missing, is not TOML, or has an unknown key or a wrong value.
    """
    document = Document(f"Limits {path}", UsageError, "pass a TOML file of limits with --limits")
    try:
        tables = parse_toml(read_toml_text(path, document), document)
        dense = tables.pop(AGAINST_DENSE, {})
        found = _TABLE.validate_python(tables), _TABLE.validate_python(dense)
    except ValidationError as error:
        raise UsageError(f"Limits {path}: {_problem(error)}.") from error
    return GivenLimits(source=str(path), metrics=found[0], against_dense=found[1])


def _problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = " under ".join(repr(str(part)) for part in reversed(problem["loc"]))
    keys = ", ".join(name.replace("_", "-") for name in MetricLimits.model_fields)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {where}; the keys of a metric are {keys}"
    if problem["type"] in {"model_type", "dict_type"}:
        where = where or repr(AGAINST_DENSE)
        return f"{where} is {problem['input']!r}, expected a table with some of {keys}"
    return f"key {where}: {problem['msg']}, got {problem['input']!r}"
