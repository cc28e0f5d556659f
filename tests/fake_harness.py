"""Stands in for the lm-evaluation-harness where it is not installed: only names that we use.

Tasks are YAML files like the harness's own; every document is scored by its length.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml


@dataclass
class Entry:
    """What the index knows of a task."""

    yaml_path: Path
    kind: str


@dataclass
class Task:
    """A task with its documents; unanswered."""

    documents: list[str]
    config: dict[str, Any]
    UNSAFE_CODE: bool = False
    seeds: list[int] = field(default_factory=list)

    def get_config(self, key: str) -> Any:
        return self.config.get(key)

    def set_config(self, *, key: str, value: Any) -> None:
        self.config[key] = value

    def set_fewshot_seed(self, seed: int) -> None:
        self.seeds.append(seed)


def read(path: Path) -> dict[str, Any]:
    own: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {**read(Path(own["include"])), **own} if "include" in own else own


class TaskManager:
    """Finds and loads tasks below folders; `shipped` is where those of the harness lie."""

    shipped: Path

    def __init__(
        self, include_path: str | list[str] | None = None, *, include_defaults: bool = True
    ) -> None:
        paths = [include_path] if isinstance(include_path, str) else include_path or []
        folders = [*([self.shipped] if include_defaults else []), *map(Path, paths)]
        files = [file for folder in folders for file in sorted(folder.rglob("*.yaml"))]
        self.task_index = {
            read(f).get("task", read(f).get("group")): Entry(
                f, "Kind.GROUP" if "group" in read(f) else "Kind.TASK"
            )
            for f in files
        }

    def load(self, names: list[str]) -> dict[str, Any]:
        assert Datasets.config.HF_HUB_OFFLINE is True
        found = {}
        for name in names:
            definition = read(self.task_index[name].yaml_path)
            if definition["dataset_path"] not in {"json", "csv", "parquet"}:
                raise ConnectionError(f"Couldn't reach {definition['dataset_path']!r} on the Hub")
            files = definition["dataset_kwargs"]["data_files"]
            if definition["test_split"] not in files:
                raise ValueError("Task dataset must have valid or test docs!")
            lines = Path(files[definition["test_split"]]).read_text(encoding="utf-8").splitlines()
            unsafe = bool(definition.get("unsafe_code"))
            found[name] = Task(lines, {"num_fewshot": None}, UNSAFE_CODE=unsafe)
        return {"tasks": found}


class HFLM:
    """Holds a model."""

    def __init__(self, *, pretrained: Any, tokenizer: Any, batch_size: int, backend: str) -> None:
        assert backend == "causal"
        sys.stderr.write("Passed an already-initialized model")
        self.model, self.tokenizer = pretrained, tokenizer


def evaluate(
    lm: HFLM, tasks: Mapping[str, Any], *, limit: int | None, bootstrap_iters: int,
    log_samples: bool,
) -> dict[str, Any]:  # fmt: skip
    """The score of a document is the share of its tokens that the model ranks first."""
    assert log_samples
    assert bootstrap_iters
    results: dict[str, Any] = {
        "results": {}, "samples": {}, "n-samples": {}, "higher_is_better": {},
    }  # fmt: skip
    for name, task in tasks["tasks"].items():
        assert task.config["num_fewshot"] == 0
        assert task.seeds
        scores = [score(lm, document) for document in task.documents[:limit]]
        mean = sum(scores) / len(scores)
        results["results"][name] = {
            "alias": name, "acc,none": mean, "acc_stderr,none": 0.125, "odd,none": 1.0,
            "odd_stderr,none": "N/A",
        }  # fmt: skip
        results["n-samples"][name] = {"original": len(task.documents), "effective": len(scores)}
        results["higher_is_better"][name] = {"acc": True, "odd": True}
        results["samples"][name] = [
            {"doc_id": i, "doc_hash": document, "prompt_hash": "", "target_hash": "",
             "filter": "none", "acc": value, "odd": 1.0}
            for i, (document, value) in enumerate(zip(task.documents, scores, strict=False))
        ]  # fmt: skip
    return results


def score(lm: HFLM, document: str) -> float:
    ids = lm.tokenizer(document, return_tensors="pt")["input_ids"]
    top = lm.model(input_ids=ids, use_cache=False).logits[0, :-1].argmax(-1)
    return float((top % 2 == ids[0, 1:] % 2).double().mean())


class Datasets(ModuleType):
    """The module `datasets`, of which only the configuration is touched."""

    config = SimpleNamespace(
        HF_DATASETS_CACHE="home", HF_HUB_OFFLINE=False, HF_DATASETS_OFFLINE=False
    )


def install(patch: pytest.MonkeyPatch, shipped: Path) -> None:
    """Put the stand-in where the harness would be imported from, also if that is installed."""
    modules: dict[str, dict[str, Any]] = {
        "lm_eval": {"__version__": "0 (a stand-in)"},
        "lm_eval.evaluator": {"evaluate": evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": HFLM},
        "lm_eval.tasks": {"TaskManager": TaskManager},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        for key, value in content.items():
            setattr(module, key, value)
        patch.setitem(sys.modules, name, module)
    for name in ("lm_eval.evaluator", "lm_eval.models", "lm_eval.tasks"):
        patch.setattr(sys.modules["lm_eval"], name.partition(".")[2], sys.modules[name], False)
    patch.setitem(sys.modules, "datasets", Datasets("datasets"))
    patch.setattr(TaskManager, "shipped", shipped, False)
