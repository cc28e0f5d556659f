from pathlib import Path
from typing import get_args

import pytest

from prox24_deploy.config.limits import (
    DEFAULT_METRICS,
    Limits,
    MetricLimits,
    accepted_loss,
    dense_defaults,
    dense_limits_of,
    joined,
    limits_of,
    read_limits,
)
from prox24_deploy.config.options import parse_losses
from prox24_deploy.config.recipe import parse_recipe, shipped_recipes
from prox24_deploy.core.errors import RecipeError, UsageError
from prox24_deploy.core.metrics import is_direct, metrics_of
from prox24_deploy.core.tasks import Task

BERT = (Path(__file__).parents[2] / "export" / "bert.toml").read_text(encoding="utf-8")


def limits(**given: float) -> MetricLimits:
    return MetricLimits.model_validate({k.replace("_", "-"): float(v) for k, v in given.items()})


def written(folder: Path, text: str) -> Path:
    path = folder / "limits.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_a_table_per_glob(tmp_path: Path) -> None:
    found = read_limits(
        written(
            tmp_path,
            "[perplexity]\nthreshold = 20\nmax-degradation-standard-errors = 2\n"
            '["latency/*"]\nmax-degradation-percent = 3.5\n["size/*"]\n'
            "[against-dense.perplexity]\nmax-degradation-percent = 20\n",
        )
    )
    assert found.against_dense == {"perplexity": limits(max_degradation_percent=20)}
    assert found.metrics["perplexity"].threshold == 20
    assert found.metrics["perplexity"].max_degradation_standard_errors == 2
    assert found.metrics["latency/*"].max_degradation_percent == 3.5
    assert [entry.gates for entry in found.metrics.values()] == [True, True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]\nmax-degradatoin = 1\n", "unknown key 'max-degradatoin' under 'a'; the keys of a "),
        ("[a]\nmax_degradation = 1\n", "unknown key 'max_degradation' under 'a'"),
        ("threshold = 1\n", "'threshold' is 1, expected a table with some of threshold, max-"),
        ("against-dense = 1\n", "'against-dense' is 1, expected a table"),
        ("[against-dense.a]\nmax-slowdown = 1\n", "unknown key 'max-slowdown' under 'a'"),
        ("[a]\nmax-degradation = -1\n", "greater than or equal to 0, got -1"),
        ("[a]\nmin-improvement = nan\n", "key 'min-improvement' under 'a': .*, got nan"),
        ("[a]\nthreshold = inf\n", "finite number, got inf"),
        ('[a]\nthreshold = "1"\n', "valid number, got '1'"),
        ("[a\n", "is not valid TOML"),
    ],
)
def test_a_wrong_file_is_refused_by_the_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_limits(written(tmp_path, text))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.toml cannot be read \(No such file"):
        read_limits(tmp_path / "none.toml")
    path = tmp_path / "latin.toml"
    path.write_bytes(b"# \xe4\n")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_limits(path)


@pytest.mark.parametrize(
    ("name", "percent"),
    [
        ("perplexity", 2),
        ("KL divergence", 10),
        ("speed-up/tensorrt/batch=1", 2),
        ("latency/tensorrt/batch=1,sequence=128", 10),
        ("size/packed", 5),
    ],
)
def test_defaults_by_name(name: str, percent: float) -> None:
    found = limits_of(DEFAULT_METRICS, name)
    assert found is not None
    assert found.max_degradation_percent == percent


def test_counts_may_not_fall_by_default() -> None:
    for name in ("layers/pruned", "kernels/tensorrt"):
        found = limits_of(DEFAULT_METRICS, name)
        assert found is not None
        assert (found.max_degradation, found.max_degradation_percent) == (0, None)


def test_no_glob_no_limits() -> None:
    assert limits_of({"latency/*": MetricLimits()}, "perplexity") is None


def test_no_shipped_recipe_repeats_a_limit() -> None:
    for family, text in shipped_recipes().items():
        assert parse_recipe(text, family).limits == Limits(), family


def test_a_recipe_comes_before_the_defaults_and_names_a_wrong_key() -> None:
    recipe = parse_recipe(
        f"{BERT}[limits.metrics.perplexity]\nthreshold = 9\n"
        '[limits.against-dense."embedding*"]\nthreshold = 0.9\n',
        "mine",
    )
    assert recipe.limits.max_slowdown == 0.02
    applied = recipe.limits.over_defaults(recipe.task, ["embedding cosine"])
    assert limits_of(applied.metrics, "perplexity") == limits(threshold=9)
    assert limits_of(applied.metrics, "accuracy") == DEFAULT_METRICS["*"]
    dense = dense_limits_of(applied.against_dense, "embedding cosine")
    assert dense == limits(threshold=0.9)
    for table in ("metrics", "against-dense"):
        with pytest.raises(
            RecipeError, match=rf"limits\.{table}\.x\.threshhold.*the keys of a metric"
        ):
            parse_recipe(f"{BERT}[limits.{table}.x]\nthreshhold = 9\n", "mine")


@pytest.mark.parametrize("task", get_args(Task))
def test_every_task_is_held_to_the_dense_model_by_metrics_that_it_has(task: str) -> None:
    every = metrics_of(task, labelled=True)
    for labelled in (True, False):
        names = metrics_of(task, labelled=labelled)
        table = dense_defaults(task, names)
        own = {name for name in table if not name.startswith("lm-eval/")}
        assert own & set(names)
        assert own <= set(every)
        for name in own:
            assert (table[name].threshold is not None) == is_direct(name)


@pytest.mark.parametrize(
    ("labels", "instead"),
    [("accuracy", "top-1 agreement"), ("word error rate", "word error rate to dense")],
)
def test_where_labels_decide_agreement_informs(labels: str, instead: str) -> None:
    task = "image-classification" if labels == "accuracy" else "automatic-speech-recognition"
    with_labels, without = dense_defaults(task, [labels, instead]), dense_defaults(task, [instead])
    assert dense_limits_of(with_labels, labels) == limits(max_degradation=0.02)
    assert dense_limits_of(with_labels, instead) is None
    assert dense_limits_of(without, instead) is not None


def test_a_metric_has_the_same_limit_through_an_engine_unless_that_is_named() -> None:
    table = dense_defaults("text-generation", ["perplexity"])
    through = "engine/tensorrt/perplexity"
    assert dense_limits_of(table, through) == limits(max_degradation_percent=10)
    named = joined(table, {"engine/*/perplexity": limits(max_degradation_percent=15)})
    assert dense_limits_of(named, through) == limits(max_degradation_percent=15)
    assert dense_limits_of(named, "perplexity") == limits(max_degradation_percent=10)
    accepted = joined(named, {"perplexity": limits(max_degradation_percent=30)})
    assert dense_limits_of(accepted, through) == limits(max_degradation_percent=30)


def test_a_later_table_wins_also_where_an_earlier_one_names_more() -> None:
    early = {"perplexity": limits(threshold=1), "*": limits(threshold=2)}
    late = joined(early, {"perplexity": limits(threshold=3)})
    assert limits_of(late, "perplexity") == limits(threshold=3)


@pytest.mark.parametrize(
    ("name", "amount", "expected"),
    [
        ("perplexity", "25%", {"max-degradation-percent": 25}),
        ("perplexity", "2.5", {"max-degradation": 2.5}),
        ("accuracy", "0.05", {"max-degradation": 0.05}),
        ("embedding cosine", "0.9", {"threshold": 0.9}),
        ("engine/onnxruntime/top-1 agreement", "0.8", {"threshold": 0.8}),
        ("lm-eval/arc/acc", "0.1", {"max-degradation": 0.1}),
    ],
)
def test_an_accepted_loss_is_a_limit(name: str, amount: str, expected: dict[str, float]) -> None:
    assert accepted_loss(name, amount) == MetricLimits.model_validate(
        {key: float(value) for key, value in expected.items()}
    )


@pytest.mark.parametrize(
    ("name", "amount", "example"),
    [
        ("embedding cosine", "5%", "embedding cosine=0.9"),
        ("perplexity", "-1%", "perplexity=25% or perplexity=0.05"),
        ("accuracy", "much", "accuracy=25% or accuracy=0.05"),
        ("accuracy", "nan", "accuracy=25% or"),
        ("accuracy", "%", "accuracy=25% or"),
    ],
)
def test_an_amount_that_is_none_is_refused_with_one_that_is(
    name: str, amount: str, example: str
) -> None:
    with pytest.raises(UsageError, match=rf"--accept-loss {name}={amount} is not .*{example}"):
        accepted_loss(name, amount)


@pytest.mark.parametrize("word", ["perplexity", "=5", "perplexity=", ""])
def test_a_word_that_is_no_loss_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match="expected METRIC=AMOUNT such as perplexity=25%"):
        parse_losses([word])
    assert parse_losses(["a b = 5%", "x=1", "x=2"]) == (("a b", "5%"), ("x", "2"))


def test_what_a_report_keeps_of_limits_reads_back() -> None:
    assert Limits.model_validate(Limits().as_json()) == Limits()


def test_the_hash_of_a_recipe_is_of_what_it_says_of_the_model() -> None:
    recipe = parse_recipe(BERT, "bert")
    other_limits = f"# comment\n{BERT}[limits]\nmax_slowdown = 0.5\n"
    assert parse_recipe(other_limits, "bert").sha256 == recipe.sha256
    other_model = BERT.replace('"attention.self.query",', "")
    assert parse_recipe(other_model, "bert").sha256 != recipe.sha256
