"""The catalogue of metrics against what evaluations really give."""

import ast
from pathlib import Path

import pytest

from prox24_deploy.core.metrics import METRICS, is_bounded, is_direct, metrics_of, plain_name

EVALUATION = Path(__file__).parents[2] / "prox24_deploy" / "evaluation"


def named_in(module: str) -> set[str]:
    """Name of every metric that a module makes, where it is written out."""
    tree = ast.parse((EVALUATION / module).read_text(encoding="utf-8"))
    return {
        name.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in {"PairedMetric", "DirectMetric", "_agreement"}
        for name in (*node.args[:1], *(k.value for k in node.keywords if k.arg == "name"))
        if isinstance(name, ast.Constant) and isinstance(name.value, str)
    }


def test_every_metric_of_an_evaluation_is_declared_and_no_other() -> None:
    assert named_in("evaluate.py") | named_in("speech.py") == METRICS.keys()


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
