from pathlib import Path

import pytest

from prox24_deploy.errors import RecipeError, UsageError
from prox24_deploy.limits import DEFAULT_METRICS, Limits, MetricLimits, limits_of, read_limits
from prox24_deploy.recipe import parse_recipe, shipped_recipes

BERT = (Path(__file__).parents[1] / "export" / "bert.toml").read_text(encoding="utf-8")


def written(folder: Path, text: str) -> Path:
    path = folder / "limits.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_a_table_per_glob(tmp_path: Path) -> None:
    found = read_limits(
        written(
            tmp_path,
            "[perplexity]\nthreshold = 20\nmax-degradation-standard-errors = 2\n"
            '["latency/*"]\nmax-degradation-percent = 3.5\n["size/*"]\n',
        )
    )
    assert found["perplexity"].threshold == 20
    assert found["perplexity"].max_degradation_standard_errors == 2
    assert found["latency/*"].max_degradation_percent == 3.5
    assert [limits.gates for limits in found.values()] == [True, True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]\nmax-degradatoin = 1\n", "unknown key 'max-degradatoin' under 'a'; the keys of a "),
        ("[a]\nmax_degradation = 1\n", "unknown key 'max_degradation' under 'a'"),
        ("threshold = 1\n", "'threshold' is 1, expected a table with some of threshold, max-"),
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


@pytest.mark.parametrize("family", sorted(shipped_recipes()))
def test_shipped_recipes_spell_the_defaults_out(family: str) -> None:
    text = shipped_recipes()[family]
    assert "[limits.metrics]" in text
    limits = parse_recipe(text, family).limits
    own = {"whisper": {"word error rate*"}}.get(family, set())
    assert limits.metrics.keys() == DEFAULT_METRICS.keys() | own
    kept = {name: limits.metrics[name] for name in DEFAULT_METRICS}
    assert limits.model_copy(update={"metrics": kept}) == Limits()


def test_a_recipe_sets_its_own_and_names_a_wrong_key() -> None:
    head = BERT[: BERT.index("[limits]")]
    recipe = parse_recipe(f"{head}[limits.metrics.perplexity]\nthreshold = 9\n", "mine")
    assert recipe.limits.metrics.keys() == {"perplexity"}
    assert recipe.limits.max_slowdown == 0.02
    with pytest.raises(RecipeError, match=r"limits\.metrics\.x\.threshhold.*the keys of a metric"):
        parse_recipe(f"{head}[limits.metrics.x]\nthreshhold = 9\n", "mine")


def test_what_a_report_keeps_of_limits_reads_back() -> None:
    assert Limits.model_validate(Limits().as_json()) == Limits()


def test_the_hash_of_a_recipe_is_of_what_it_says_of_the_model() -> None:
    recipe = parse_recipe(BERT, "bert")
    other_limits = BERT.replace("max_slowdown = 0.02", "max_slowdown = 0.5")
    assert parse_recipe(f"# comment\n{other_limits}", "bert").sha256 == recipe.sha256
    other_model = BERT.replace('"attention.self.query",', "")
    assert parse_recipe(other_model, "bert").sha256 != recipe.sha256
