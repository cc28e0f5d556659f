"""What is said of few samples, before any work and in the report."""

import math
from dataclasses import replace

import pytest
from builders import make_records, perplexities, with_metrics
from test_engine_checks import engine

from prox24_deploy.config.limits import Limits
from prox24_deploy.core.records import Estimate, PairedMetric, TextSource
from prox24_deploy.report.against_dense import Group, judge_metrics
from prox24_deploy.report.sample_checks import few_samples, sample_warnings, seen_samples

TEXT = TextSource(kind="file", paths=("eval.txt",), sha256="c" * 64, samples=64, tokens=32_768)
TABLE = Limits().over_defaults("text-generation", []).against_dense


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [
        (1, "Evaluation has 1 sample (512 tokens), which decide nothing"),
        (2, "Evaluation has 2 samples (1,024 tokens), which decide nothing"),
        (3, "Evaluation has 3 samples (1,536 tokens), which decide little"),
        (29, "Evaluation has 29 samples (14,848 tokens), which decide little"),
    ],
)
def test_few_samples_are_said_with_the_tokens_that_would_do(samples: int, sentence: str) -> None:
    found = few_samples(replace(TEXT, samples=samples, tokens=512 * samples))
    assert found is not None
    assert found.startswith(sentence)
    assert found.endswith(
        "pass about 15,360 tokens with --evaluation and --evaluation-tokens 15360."
    )
    assert few_samples(replace(TEXT, samples=30)) is None


def test_samples_that_were_calibrated_on_are_said() -> None:
    assert seen_samples(replace(TEXT, shared=3)) is None
    seen = replace(TEXT, shared=4)
    warning = seen_samples(seen)
    assert warning is not None
    assert warning.startswith("4 of 64 samples (32,768 tokens) to evaluate on are calibration")
    judged = judge_metrics([Group("", perplexities(11.7, 12.6, 64, spread=0.2))], TABLE)
    first, *rest = sample_warnings(judged, seen, ())
    assert (first, len(rest)) == (warning, 1)


def test_images_and_recordings_have_options_of_their_own() -> None:
    images = few_samples(replace(TEXT, unit="image", samples=5, tokens=5))
    assert images is not None
    assert images.endswith("pass about 30 images with --evaluation and --images 30.")
    recordings = few_samples(replace(TEXT, unit="recording", samples=2, tokens=2))
    assert recordings is not None
    assert "2 samples, which decide nothing" in recordings
    assert "--recordings 30" in recordings


def test_what_is_open_says_how_many_samples_would_decide() -> None:
    judged = judge_metrics([Group("", perplexities(11.7, 12.6, 64, spread=0.2))], TABLE)
    (warning,) = sample_warnings(judged, TEXT, ())
    assert warning.startswith(
        "Whether perplexity is within the limit is open on 64 samples; about "
    )
    wanted = judged[0].wanted
    assert wanted is not None
    assert f"about {wanted:,} would decide" in warning
    tokens = math.ceil(wanted * 512 / 1024) * 1024
    assert f"--evaluation-tokens {tokens}." in warning
    near = judge_metrics([Group("", perplexities(11.7, 12.8699, 64, spread=0.2))], TABLE)
    assert "very many more would be needed" in "".join(sample_warnings(near, TEXT, ()))


def test_engines_and_tasks_have_remedies_of_their_own() -> None:
    groups = [
        Group("engine/onnxruntime/", perplexities(11.7, 12.6, 4, spread=0.2)),
        Group(
            "lm-eval/",
            (
                PairedMetric(
                    name="arc/acc",
                    higher_is_better=True,
                    samples=100,
                    dense=Estimate(value=0.5, standard_error=0.05),
                    sparse=Estimate(value=0.49, standard_error=0.05),
                    difference=Estimate(value=-0.01, standard_error=0.03),
                ),
            ),
        ),
    ]
    first, second = sample_warnings(judge_metrics(groups, TABLE), TEXT, (engine(),))
    assert first.startswith(
        "Whether perplexity through onnxruntime is within the limit is open on 4"
    )
    assert first.endswith("; raise --engine-tokens and the evaluation.")
    assert "--accept-loss 'lm-eval/arc/acc=AMOUNT'" in second


def test_enough_samples_that_decide_are_not_mentioned() -> None:
    report = with_metrics(make_records(), "text-generation", *perplexities(11.7, 12.0, 64)).report()
    assert not [text for text in report.warnings if "sample" in text]
