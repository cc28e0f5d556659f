"""The model card: what the Hub reads of it, what it takes from the source, what it says."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import make_records, quantised, recovery, with_numerics_failed
from huggingface_hub import ModelCard, ModelCardData

from prox24_deploy.core.records import ChannelOrder
from prox24_deploy.packaging.card import SourceCard, read_source_card, render_card

PLAIN = SourceCard(metadata={}, text="")


def model_dir(path: Path, card: str | None, config: dict[str, Any] | None = None) -> Path:
    (path / "config.json").write_text(json.dumps(config or {}), encoding="utf-8")
    if card is not None:
        (path / "README.md").write_text(card, encoding="utf-8")
    return path


def metadata(card: ModelCard) -> dict[str, Any]:
    """What the Hub reads above the text."""
    found: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    return found


def test_it_is_a_card_of_the_hub_without_what_nobody_said() -> None:
    card = ModelCard(render_card(make_records().report(), PLAIN))
    found = metadata(card)
    assert found.pop("model-index")[0]["name"] == "all-MiniLM-L6-v2, 2:4 sparse"
    assert found == {
        "library_name": "transformers",
        "pipeline_tag": "feature-extraction",
        "tags": ["2:4-sparsity", "semi-structured", "pruned", "prox24-deploy"],
    }
    for section in ("How it was pruned", "Accuracy", "How to run", "Limits"):
        assert f"\n## {section}\n" in card.text
    assert "names no licence" in card.text
    assert "No repository of the source model was named; add `base_model`" in card.text
    assert "Card of the source model" not in card.text


def test_the_hub_indexes_what_was_measured() -> None:
    records = make_records()
    report = records.report()
    data = ModelCard(render_card(report, PLAIN)).data
    assert isinstance(data, ModelCardData)
    results = data.eval_results
    assert results is not None
    assert [(one.metric_name, one.metric_value) for one in results] == [
        (metric.name, (metric.sparse or metric.agreement).value)  # type: ignore[union-attr]
        for metric in report.accuracy.metrics
    ]
    assert {one.task_type for one in results} == {"feature-extraction"}
    assert {one.dataset_name for one in results} == {
        "512 samples (131,072 tokens) given by its maker"
    }


def test_the_same_report_gives_the_same_text_whenever_it_was_measured() -> None:
    first = make_records(blocks=2)
    slower = replace(first, prune=replace(first.prune, seconds=7.0), bench=replace(
        first.bench, latency=first.bench.latency[:1], seconds=1.0))  # fmt: skip
    assert render_card(first.report(), PLAIN) == render_card(slower.report(), PLAIN)


def test_dense_sparse_and_difference_stand_with_their_standard_errors() -> None:
    report = make_records().report()
    text = render_card(report, PLAIN)
    row = next(line for line in text.splitlines() if line.startswith("| STS-B"))
    assert "| higher | 1,379 | 0.8203 ± 0.0091 |" in row
    layer = report.pruning.layers[-1]
    assert f"- {layer.reason}: `{layer.name}`" in text


def test_the_card_says_what_was_put_into_another_order() -> None:
    records = make_records()
    order = ChannelOrder(
        layer="encoder.layer.0.output.dense", tensors=("encoder.layer.0.output.dense.weight",),
        kept_before=0.8, kept_after=0.9, order_sha256="d" * 64, reason="",
    )  # fmt: skip
    assert "Every tensor that was not pruned has the bytes" in render_card(records.report(), PLAIN)
    prune = replace(records.prune, orders=(order, replace(order, reason="it does not fit")))
    text = render_card(replace(records, prune=prune).report(), PLAIN)
    assert "the inputs of pruned layers (1) were put into another order" in text
    assert "Every tensor that was not pruned" not in text
    mask = replace(records.prune, method="mask")
    assert "the masks were made elsewhere" in render_card(
        replace(records, prune=mask).report(), PLAIN
    )


def test_the_card_says_how_kept_weights_were_trained() -> None:
    records = replace(make_records(2), recover=recovery())
    text = render_card(records.report(), PLAIN)
    assert "Then the kept weights of 12 layers, 30 norms and biases were trained against" in text
    assert "KL(dense, sparse) went from 0.62 to 0.33." in text
    assert "Every tensor that was neither pruned nor trained has the bytes" in text
    idle = render_card(replace(records, recover=recovery(kept=0)).report(), PLAIN)
    assert "That gave nothing better, and the weights are those of pruning." in idle
    assert "Every tensor that was not pruned has the bytes" in idle


def test_figures_of_8_bit_numbers_are_not_those_of_the_weights_beside_the_card() -> None:
    """`pruned/` has 16-bit weights, whatever files and engines of the release compute in."""
    records = quantised(make_records())
    (own,) = records.evaluate.steps
    changed = [
        replace(m, agreement=replace(m.agreement, value=0.5)) for m in own.metrics if m.agreement
    ]
    assert changed
    step = replace(own, metrics=tuple(changed))
    report = replace(records, evaluate=replace(records.evaluate, steps=(step,))).report()
    card = ModelCard(render_card(report, PLAIN))
    assert isinstance(card.data, ModelCardData)
    values = {each.metric_name: each.metric_value for each in card.data.eval_results or ()}
    last = {metric.name: metric.agreement for metric in report.accuracy.metrics}
    for metric in changed:
        found = last[metric.name]
        assert found is not None
        assert values[metric.name] == 0.5
        assert values[f"{metric.name} in FP8"] == found.value
    assert "The model in `pruned/` of the release, in float32:" in card.text
    assert "The same with its layers in FP8, as ONNX files and engines" in card.text


def test_a_model_that_was_not_pruned_is_not_called_sparse() -> None:
    records = make_records(2)
    none = [replace(layer, status="skipped", reason="asked") for layer in records.prune.layers]
    prune = replace(records.prune, layers=tuple(none), method="none")
    card = ModelCard(render_card(replace(quantised(records), prune=prune).report(), PLAIN))
    assert metadata(card)["tags"] == ["prox24-deploy"]
    assert metadata(card)["model-index"][0]["name"] == "all-MiniLM-L6-v2, dense"
    assert "as it is: no layer of it was pruned." in card.text
    for word in ("2:4", "How it was pruned", "zeros", "sparse model on"):
        assert word not in card.text.split("**", 4)[-1].replace("prox24", "")


def test_a_verdict_other_than_pass_is_said() -> None:
    card = ModelCard(render_card(with_numerics_failed(make_records()).report(), PLAIN))
    first, second = [line for line in card.text.splitlines() if line][1:3]
    assert first == "**This model did not pass its own release checks.**"
    assert second.startswith("**Failed on export: sparse last_hidden_state: ONNX Runtime and PyTor")
    assert "the verdict of its release report is fail" in card.text
    passed = render_card(make_records().report(), PLAIN)
    assert "did not pass" not in passed
    assert "**Passed: embedding cosine 0.9712, 512 samples; speed not gated.**" in passed


def test_no_path_of_the_maker_is_published() -> None:
    records = make_records()
    model = replace(records.model, path="/home/somebody/secret/bert")
    text = replace(records.prune.calibration, paths=("/home/somebody/customers.txt",))
    moved = replace(records, model=model, prune=replace(records.prune, calibration=text))
    card = render_card(moved.report(), PLAIN)
    assert "somebody" not in card
    assert "customers" not in card
    assert "# bert, 2:4 sparse" in card


def test_licence_language_and_text_are_kept_of_the_source(tmp_path: Path) -> None:
    source = read_source_card(
        model_dir(
            tmp_path,
            "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\nlanguage: [de, en]\n"
            "model-index: [{name: x}]\n---\n\n# Dense\n\n---\n\nkept: yes\n",
            {"license": "mit", "_name_or_path": "org/what-it-was-made-from"},
        )
    )
    records = make_records()
    model = replace(records.model, name="org/dense-model")
    card = ModelCard(render_card(replace(records, model=model).report(), source))
    found = metadata(card)
    assert found.pop("tags")[0] == "2:4-sparsity"
    assert found.pop("model-index")[0]["name"] == "dense-model, 2:4 sparse"
    assert found == {
        "license": "other",
        "license_name": "own",
        "license_link": "LICENSE",
        "language": ["de", "en"],
        "base_model": "org/dense-model",
        "library_name": "transformers",
        "pipeline_tag": "feature-extraction",
    }
    assert card.text.rstrip().endswith("# Dense\n\n---\n\nkept: yes")
    assert "figures in it are not those of this one" in card.text
    assert "names no" not in card.text
    assert "No repository" not in card.text
    assert "what-it-was-made-from" not in card.text
    assert "# `org/dense-model`, 2:4 sparse" in card.text
    assert "| source model | `org/dense-model`, `" in card.text


def test_the_licence_of_the_configuration_is_taken_where_the_card_names_none(
    tmp_path: Path,
) -> None:
    source = read_source_card(model_dir(tmp_path, "# Only text\n", {"license": "apache-2.0"}))
    assert source == SourceCard(metadata={"license": "apache-2.0"}, text="# Only text")


@pytest.mark.parametrize(
    ("model_type", "opened_by"),
    [(None, "SentenceTransformer"), ("CrossEncoder", "CrossEncoder")],
)
def test_a_model_of_sentence_transformers_is_opened_by_that_library(
    tmp_path: Path, model_type: str | None, opened_by: str
) -> None:
    (tmp_path / "modules.json").write_text("[]", encoding="utf-8")
    if model_type is not None:
        library = json.dumps({"model_type": model_type})
        (tmp_path / "config_sentence_transformers.json").write_text(library, encoding="utf-8")
    source = read_source_card(model_dir(tmp_path, None))
    assert source.opened_by == opened_by
    card = ModelCard(render_card(make_records().report(), source))
    assert metadata(card)["library_name"] == "sentence-transformers"
    assert f"from sentence_transformers import {opened_by}\n" in card.text
    assert f'model = {opened_by}("path/to/this/directory")\n' in card.text
    assert ("the output `sentence_embedding`" in card.text) == (model_type is None)
    assert "from transformers import" not in card.text


@pytest.mark.parametrize(
    ("front", "problem"), [("a: [1", "while parsing"), ("- a\n- b", "it is no mapping")]
)
def test_metadata_that_cannot_be_read_is_said(front: str, problem: str, tmp_path: Path) -> None:
    source = read_source_card(model_dir(tmp_path, f"---\n{front}\n---\nText\n"))
    assert source.problem.startswith(problem)
    assert source.text == "Text"
    card = ModelCard(render_card(make_records().report(), source))
    assert f"could not be read (`{problem}" in card.text
    assert "license" not in metadata(card)
