"""Limits that bind: a name without a figure is refused, and a glob without one does not pass."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase

from prox24_deploy.config.limits import (
    GivenLimits,
    Limits,
    MetricLimits,
    is_glob,
    joined,
)
from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.metrics import ENGINE, HARNESS, metrics_of, plain_name
from prox24_deploy.report.schema import Check, PartName

NO_FIGURE = "The limit matches no figure of this release, so it judges nothing"
_PARTS: dict[str, PartName] = {
    "speed-up": "speed",
    "latency": "speed",
    "kernels": "speed",
    "layers": "sparsity",
    "size": "export",
}


def part_of(name: str) -> PartName:
    """The part of the verdict that a figure counts for, by its name or a glob."""
    return _PARTS.get(name.partition("/")[0], "accuracy")


def require_figures(names: Iterable[str], known: Collection[str], source: str) -> None:
    """Refuse a name that is no figure; globs may match nothing, which `unmatched` tells.

    Args:
        names: of limits.
        known: names of figures, or globs of figures that may come.
        source: where the names stand, for the sentence.

    Raises:
        UsageError: a name is no figure.
    """
    every = {*known, *map(plain_name, known)}
    for name in names:
        if is_glob(name) or any(fnmatchcase(name, figure) for figure in every):
            continue
        near = get_close_matches(name, every, n=1, cutoff=0.5)
        listed = ", ".join(figure for figure in known if not is_glob(figure))
        advice = f"did you mean {near[0]!r}?" if near else f"the figures are {listed}."
        raise UsageError(f"{source} names {name!r}, which is no figure of this release; {advice}")


def require_named(given: GivenLimits, recipe: Limits, figures: Collection[str]) -> None:
    """Refuse limits against the dense model, of the user or a recipe, that name no metric.

    Raises:
        UsageError: a name is no metric.
    """
    require_figures(given.accepted, figures, "--accept-loss")
    require_figures(given.against_dense, figures, f"Limits file {given.source}")
    require_figures(recipe.against_dense, figures, "The recipe's [limits.against-dense]")


def require_expected(
    given: GivenLimits,
    recipe: Limits,
    metrics: Collection[str],
    backends: Collection[str],
    baseline: Collection[str],
) -> None:
    """Before any work, refuse every limit that no figure to come will have the name of.

    Args:
        given: limits of the user.
        recipe: those of the recipe.
        metrics: names of the metrics that the task may give, HARNESS + "*" for any of the harness.
        backends: that will be compiled for.
        baseline: figures of the baseline, empty where there is none.

    Raises:
        UsageError: a name is no figure.
    """
    accuracy = [*metrics, *(f"{ENGINE}{b}/{m}" for b in backends for m in metrics)]
    require_named(given, recipe, accuracy)
    every = [*accuracy, *baseline, *_other_figures(backends)]
    require_figures(given.metrics, every, f"Limits file {given.source}")
    require_figures(recipe.metrics, every, "The recipe's [limits.metrics]")


def expected_metrics(task: str, *, labelled: bool, harness: bool) -> list[str]:
    """Names of the metrics that a build may give, with a glob for those of the harness."""
    return [*metrics_of(task, labelled=labelled), *([f"{HARNESS}*"] if harness else [])]


def unmatched(table: Mapping[str, MetricLimits], figures: Collection[str]) -> list[str]:
    """The names and globs of a table that gate and that no figure has."""
    every = {*figures, *map(plain_name, figures)}
    gating = [glob for glob, limits in table.items() if limits.gates]
    return [glob for glob in gating if not any(fnmatchcase(name, glob) for name in every)]


def unmatched_checks(
    given: GivenLimits, recipe: Limits, figures: Collection[str]
) -> Iterator[Check]:
    """A check that does not pass for each limit against the dense model that found no figure."""
    for glob in unmatched(joined(recipe.against_dense, given.against_dense), figures):
        yield Check(
            name=glob,
            part=part_of(glob),
            kind="limits",
            value=None,
            limit=None,
            verdict="inconclusive",
            message=f"{NO_FIGURE}; take it out of [against-dense]",
        )


def _other_figures(backends: Collection[str]) -> Iterator[str]:
    yield from ("size/onnx sparse", "size/packed", "layers/pruned", "layers/proven")
    for backend in backends:
        yield from (f"size/engine {backend}", f"kernels/{backend}")
        yield from (f"speed-up/{backend}/*", f"latency/{backend}/*")
