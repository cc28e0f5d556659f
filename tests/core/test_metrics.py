"""The catalogue of metrics against what evaluations really give."""

import ast
from pathlib import Path

import pytest

from prox24_deploy.core import metrics
from prox24_deploy.core.metrics import (
    METRICS,
    MetricKind,
    is_bounded,
    is_direct,
    metrics_of,
    plain_name,
)

PACKAGE = Path(__file__).parents[2] / "prox24_deploy"
EVALUATION = PACKAGE / "evaluation"


def kinds_used_in(folder: Path) -> set[str]:
    """Names of the metrics of the catalogue that the modules of a folder refer to."""
    kinds = {
        name: kind.name for name, kind in vars(metrics).items() if isinstance(kind, MetricKind)
    }
    return {
        kinds[node.id]
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name) and node.id in kinds
    }


def test_every_metric_of_an_evaluation_is_declared_and_no_other() -> None:
    assert kinds_used_in(EVALUATION) == METRICS.keys()


def test_no_module_but_the_catalogue_writes_the_name_of_a_metric() -> None:
    # Stages, parts and kinds of checks are called "accuracy" as well.
    names = METRICS.keys() - {"accuracy"}
    for path in PACKAGE.rglob("*.py"):
        if path.name == "metrics.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in names, (path, node.value)


def test_names_through_engines_are_those_of_the_metric() -> None:
    assert plain_name("engine/onnxruntime/KL divergence") == "KL divergence"
    assert plain_name("lm-eval/arc/acc") == "lm-eval/arc/acc"
    assert plain_name("engine/x") == "engine/x"
    assert is_direct("engine/tensorrt/embedding cosine")
    assert not is_direct("lm-eval/arc/acc")


@pytest.mark.parametrize(
    ("name", "values", "bounded"),
    [
        ("perplexity", (0.5,), False),
        ("word error rate", (1.5,), True),
        ("lm-eval/arc/acc", (0.0, 1.0), True),
        ("lm-eval/wikitext/word_perplexity", (12.0,), False),
    ],
)
def test_values_tell_the_range_of_a_metric_that_is_not_known(
    name: str, values: tuple[float, ...], *, bounded: bool
) -> None:
    assert is_bounded(name, values) == bounded


def test_labels_bring_their_own_metrics() -> None:
    assert "accuracy" in metrics_of("image-classification", labelled=True)
    assert "accuracy" not in metrics_of("image-classification", labelled=False)
    assert metrics_of("text-generation", labelled=False) == [
        "perplexity", "log-perplexity", "top-1 agreement", "KL divergence",
    ]  # fmt: skip
