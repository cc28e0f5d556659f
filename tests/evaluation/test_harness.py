"""Tasks of the lm-evaluation-harness: found by name, fed from files, in its own figures."""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fake_harness
import numpy as np
import pytest
import torch
import yaml

from prox24_deploy.config.options import HarnessOptions
from prox24_deploy.config.recipe import read_recipe
from prox24_deploy.core.errors import BackendMissingError, UsageError
from prox24_deploy.evaluation.harness import open_tasks, require_harness, run_tasks, task_metrics
from prox24_deploy.model.directory import load_model, open_model_dir
from prox24_deploy.model.processors import load_tokenizer

LLAMA = read_recipe(Path(__file__).parents[2] / "export" / "llama.toml")


def definition(name: str, **more: Any) -> dict[str, Any]:
    return {"task": name, "dataset_path": f"hub/{name}", "test_split": "validation", **more}


def write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False), encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for data; the stand-in ships the tasks `known`, `code` and the group `many`."""
    shipped = tmp_path / "shipped"
    for name in ("known", "knowledge"):
        write(shipped / f"{name}.yaml", definition(name))
    write(shipped / "code.yaml", definition("code", unsafe_code=True))
    write(shipped / "many.yaml", {"group": "many", "dataset_path": "hub/many"})
    fake_harness.install(monkeypatch, shipped)
    folder = tmp_path / "data"
    folder.mkdir()
    before = dict(vars(fake_harness.Datasets.config))
    yield folder
    assert vars(fake_harness.Datasets.config) == before
    assert not (tmp_path / "work").exists()


def documents(folder: Path, name: str, split: str = "validation", kind: str = ".jsonl") -> None:
    (folder / name).mkdir(exist_ok=True)
    lines = [json.dumps({"text": f"document {i} of {name}"}) for i in range(6)]
    (folder / name / f"{split}{kind}").write_text("\n".join(lines), encoding="utf-8")


def opened(folder: Path | None, *names: str) -> dict[str, Any]:
    work = (folder or Path.cwd()).parent / "work"
    with open_tasks(HarnessOptions(tasks=names, data=folder), work) as load:
        assert str(work / "datasets") == fake_harness.Datasets.config.HF_DATASETS_CACHE
        first, second = load(), load()
    assert all(first[name] is not second[name] for name in first)
    return second


def test_a_task_of_the_harness_reads_files_named_by_its_splits(data: Path) -> None:
    documents(data, "known")
    documents(data, "known", "train")
    assert len(opened(data, "known")["known"].documents) == 6


def test_a_task_of_ones_own_brings_its_data_or_finds_it_by_its_name(data: Path) -> None:
    documents(data, "mine")
    documents(data, "elsewhere")
    files = {"validation": str(data / "elsewhere" / "validation.jsonl")}
    own = definition("whole") | {"dataset_path": "json", "dataset_kwargs": {"data_files": files}}
    write(data / "whole.yaml", own)
    write(data / "mine.yaml", definition("mine"))
    assert set(opened(data, "whole", "mine")) == {"whole", "mine"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("knwon", r"--lm-eval knwon names no task of the harness or .*; near it are known"),
        ("zzzz", r"zzzz names no task .*; `lm-eval ls tasks` lists them\."),
        ("many", r"many names a group of tasks, .* pass the tasks themselves\."),
        ("known", r"known reads hub/known from the network, .* put its splits in \S*data/known as"),
        ("remote", r"remote cannot be loaded \(Couldn't reach 'hub/remote' on the Hub\); nothing"),
        ("halved", r"halved cannot be loaded \(Task dataset must .*check its YAML file and its"),
        ("mixed", r"Folder \S*data/mixed holds test.csv, validation.jsonl, expected one file for"),
        ("code", r"--lm-eval code runs code that the model writes, which is never done here"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_said_in_one_sentence(data: Path, name: str, message: str) -> None:
    write(data / "remote.yaml", definition("remote"))
    for other in ("halved", "mixed"):
        write(data / f"{other}.yaml", definition(other))
    documents(data, "halved", "train")
    documents(data, "mixed")
    documents(data, "mixed", "test", ".csv")
    documents(data, "code")
    with pytest.raises(UsageError, match=message) as caught:
        opened(data, name)
    assert str(caught.value).count("\n") == 0


def test_without_a_folder_the_option_is_named(data: Path) -> None:
    options = HarnessOptions(tasks=("known",))
    with (
        pytest.raises(UsageError, match=r"in DIR/known as files .* and pass --lm-eval-data DIR\."),
        open_tasks(options, data.parent / "work"),
    ):
        pass
    with pytest.raises(UsageError, match="is not a folder; pass one with tasks and data"):
        opened(data / "absent", "known")


def test_a_machine_without_the_harness_is_told_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(BackendMissingError, match=r"install the extra lm-eval with pip install"):
        require_harness()


def results(values: list[float], **changes: Any) -> dict[str, Any]:
    samples = [
        {"doc_id": i, "doc_hash": str(i), "prompt_hash": "p", "target_hash": "t",
         "filter": chosen, "acc": value, "pair": (1, 2)}
        for chosen in ("none", "strict")
        for i, value in enumerate(values)
    ]  # fmt: skip
    mean = float(np.mean(values))
    found: dict[str, Any] = {
        "results": {"t": {
            "alias": "t", "sample_len": len(values),
            "acc,none": mean, "acc_stderr,none": 0.25,
            "acc,strict": mean, "acc_stderr,strict": 0.5,
            "pair,none": 7.5, "pair_stderr,none": 0.125,
            "vague,none": 1.0, "vague_stderr,none": 0.1,
            "bare,none": 1.0, "bare_stderr,none": "N/A",
        }},
        "n-samples": {"t": {"original": 100, "effective": len(values)}},
        "higher_is_better": {"t": {"acc": True, "pair": False, "bare": True}},
        "samples": {"t": samples},
    }  # fmt: skip
    return found | changes


def test_figures_are_the_harness_and_differences_are_by_document() -> None:
    dense, sparse = [1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]
    metrics, left_out, digest = task_metrics(results(dense), results(sparse))
    assert [metric.name for metric in metrics] == ["t/acc", "t/acc (strict)", "t/pair"]
    assert left_out == ("t/vague", "t/bare")
    first, strict, pair = metrics
    assert first.dense is not None
    assert first.sparse is not None
    assert (first.dense.value, first.dense.standard_error) == (0.75, 0.25)
    assert (first.sparse.value, first.samples, first.higher_is_better) == (0.5, 4, True)
    gaps = np.subtract(sparse, dense)
    assert first.difference is not None
    assert first.difference.value == pytest.approx(gaps.mean())
    assert first.difference.standard_error == pytest.approx(gaps.std(ddof=1) / math.sqrt(4))
    assert first.values == tuple(sparse)
    assert strict.sparse is not None
    assert strict.sparse.standard_error == 0.5
    # Not a mean of one number per document, so neither a difference nor values are known.
    assert (pair.difference, pair.values, pair.higher_is_better) == (None, (), False)
    assert digest == task_metrics(results(dense), results(dense))[2]
    assert digest != task_metrics(results(dense[:3]), results(dense[:3]))[2]


def test_models_that_were_asked_different_things_are_not_compared() -> None:
    dense, sparse = results([1.0, 0.0]), results([1.0, 0.0])
    sparse["samples"]["t"][1]["prompt_hash"] = "other"
    with pytest.raises(ValueError, match="document 1 of task t differs between models"):
        task_metrics(dense, sparse)


def test_the_real_harness_scores_what_the_model_says(tiny_llama: Path, tmp_path: Path) -> None:
    """Accuracy of a choice recomputed from the model's own log-likelihoods."""
    pytest.importorskip("lm_eval", reason="needs lm_eval, the extra lm-eval, not found here")
    draw = np.random.default_rng(0)
    words = ["layer", "weight", "sparse", "dense", "token"]
    rows = [
        {"q": " ".join(draw.choice(words, 4)), "choices": list(draw.permutation(words)[:3]),
         "label": int(draw.integers(3))}
        for _ in range(12)
    ]  # fmt: skip
    folder = tmp_path / "data"
    (folder / "mini").mkdir(parents=True)
    text = "\n".join(map(json.dumps, rows))
    (folder / "mini" / "validation.jsonl").write_text(text, encoding="utf-8")
    metric = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    write(folder / "mini.yaml", {
        "task": "mini", "test_split": "validation", "output_type": "multiple_choice",
        "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}",
        "metric_list": [metric],
    })  # fmt: skip
    directory = open_model_dir(tiny_llama)
    model = load_model(directory, LLAMA, torch.device("cpu"))
    tokenizer = load_tokenizer(directory)
    with open_tasks(HarnessOptions(tasks=("mini",), data=folder), tmp_path / "work") as load:
        found = [run_tasks(model, tokenizer, load(), limit) for limit in (None, 5)]
    metrics, left_out, _ = task_metrics(found[0], found[0])
    (metric_found,) = metrics
    assert left_out == ()
    right = [choice(model, tokenizer, row) == row["label"] for row in rows]
    assert metric_found.sparse is not None
    assert metric_found.values == tuple(map(float, right))
    assert metric_found.sparse.value == pytest.approx(np.mean(right))
    spread = np.std(right, ddof=1) / math.sqrt(len(rows))
    assert metric_found.sparse.standard_error == pytest.approx(spread)
    assert found[1]["n-samples"]["mini"]["effective"] == 5


@torch.no_grad()
def choice(model: Any, tokenizer: Any, row: Mapping[str, Any]) -> int:
    """The choice that the model finds likeliest behind the question."""
    scores = []
    for text in row["choices"]:
        start = len(tokenizer(row["q"])["input_ids"])
        ids = torch.tensor([tokenizer(f"{row['q']} {text}")["input_ids"]])
        logs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        scores.append(float(logs.gather(-1, ids[0, 1:, None])[start - 1 :].sum()))
    return int(np.argmax(scores))
