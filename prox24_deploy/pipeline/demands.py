"""What a build is held to, read and checked before any work: limits and a baseline."""

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace

from prox24_deploy.config.limits import (
    AGAINST_DENSE,
    GivenLimits,
    MetricLimits,
    accepted_loss,
    read_limits,
)
from prox24_deploy.config.options import BuildOptions
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.errors import UsageError
from prox24_deploy.pipeline.context import RunContext, warn_of_lengths
from prox24_deploy.regression.baseline import Gate, read_gate
from prox24_deploy.regression.figures import figures_of
from prox24_deploy.report.binding import expected_metrics, require_expected
from prox24_deploy.report.sample_checks import few_samples, seen_samples

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Demands:
    """A baseline with its limits, if there is one, and limits that come before the recipe's."""

    gate: Gate | None
    given: GivenLimits


def read_demands(options: BuildOptions) -> Demands:
    """Read what the report will be held to.

    Raises:
        BundleError: the baseline cannot be read.
        UsageError: a file or an amount is wrong, or an option would have no effect.
    """
    path = options.limits_file
    gate = read_gate(options.baseline, path, options.allow) if options.baseline else None
    given = gate.limits if gate else read_limits(path) if path else GivenLimits()
    if gate is None:
        require_effect(options, given)
    return Demands(gate, replace(given, accepted=accepted_losses(options)))


def accepted_losses(options: BuildOptions) -> dict[str, MetricLimits]:
    """The losses that the options accept, as limits of their metrics.

    Raises:
        UsageError: an amount is none.
    """
    return {name: accepted_loss(name, amount) for name, amount in options.accept_loss}


def check_demands(
    demands: Demands, context: RunContext, backends: Collection[str], options: BuildOptions
) -> None:
    """Before any work, refuse limits of figures that will not come.

    Raises:
        UsageError: a limit, or an accepted loss, names no figure.
    """
    held_out, recipe = context.held_out, context.recipe
    labelled = held_out.labels is not None or any(t is not None for t in held_out.transcripts)
    metrics = expected_metrics(recipe.task, labelled=labelled, harness=bool(options.harness.tasks))
    known = figures_of(demands.gate.baseline.report) if demands.gate else ()
    require_expected(demands.given, recipe.limits, metrics, backends, known)


def warn_of_idle(options: BuildOptions, recipe: Recipe) -> None:
    """Say before any work which options of the pruning have no effect."""
    overridden = any(override.method is not None for override in recipe.overrides)
    if idle := options.prune.idle(overridden=overridden):
        log.warning("%s", idle)


def warn_beforehand(context: RunContext, options: BuildOptions) -> None:
    """Say before any work what will decide little, or nothing, or is not what was asked for."""
    evaluation = context.held_out.source
    for said in (seen_samples(evaluation), few_samples(evaluation)):
        if said is not None:
            log.warning("%s", said)
    warn_of_idle(options, context.recipe)
    warn_of_lengths(options.engine, context.model)


def require_effect(options: BuildOptions, given: GivenLimits) -> None:
    """Refuse what says something of a baseline where there is none."""
    idle = [f"--allow {key}" for key in options.allow]
    if options.limits_file and given.metrics:
        idle.insert(0, f"[{next(iter(given.metrics))}] in --limits {options.limits_file}")
    elif options.limits_file and not given.against_dense:
        idle.insert(0, f"--limits {options.limits_file}, which is empty,")
    if idle:
        raise UsageError(
            f"{idle[0]} has no effect on a build that is held against no baseline; name one with "
            f"--baseline, or leave it out. Limits against the dense model stand under "
            f"[{AGAINST_DENSE}]."
        )
