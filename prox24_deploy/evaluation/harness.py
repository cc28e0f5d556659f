"""Tasks of the lm-evaluation-harness on both models, from local data.

The harness (https://github.com/EleutherAI/lm-evaluation-harness) comes with the extra `lm-eval` and
is imported here alone, when tasks are asked for. Nothing is fetched: a task reads files of the
user's folder, and what `datasets` keeps of them lies in a folder of ours.
"""

import contextlib
import hashlib
import io
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from prox24_deploy.config.options import HarnessOptions
from prox24_deploy.core.atomic import make_folder, write_atomic
from prox24_deploy.core.errors import BackendMissingError, UsageError
from prox24_deploy.core.extras import install_of
from prox24_deploy.core.records import Estimate, Metric, PairedMetric
from prox24_deploy.evaluation.estimate import mean_estimate, per_sample

# Builders of `datasets` that read a kind of file.
_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_BATCH_ROWS = 8
# The harness draws as many resamples for what has no formula for its standard error.
_RESAMPLES = 1000
_SEED = 1234
# The harness's name for answers that no filter has changed.
_WHOLE = "none"
# What says that two models were asked the same.
_ASKED = ("doc_hash", "prompt_hash", "target_hash", "filter")


def require_harness() -> None:
    """Refuse a machine without the harness.

    Raises:
        BackendMissingError: it is not installed, or a library that it needs is not.
    """
    try:
        import lm_eval.evaluator
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise BackendMissingError(
            f"--lm-eval needs the lm-evaluation-harness, which cannot be imported here ({error}); "
            f"install the extra lm-eval with {install_of('lm-eval')}."
        ) from error


def harness_version() -> str:
    """Version of the harness that is installed."""
    import lm_eval

    return str(lm_eval.__version__)


@contextlib.contextmanager
def open_tasks(options: HarnessOptions, work: Path) -> Iterator[Callable[[], dict[str, Any]]]:
    """Find every task, and read its data once; gives what loads the tasks anew, by name.

    A task is a YAML file below `options.data` or one of the harness's own. Where that folder holds
    TASK/SPLIT.jsonl (or .json, .csv, .parquet), that is its data. `work` is emptied at the end.

    Raises:
        UsageError: a task is unknown or a group of the harness, has no data here, cannot be loaded,
            or runs code that the model writes.
    """
    require_harness()
    make_folder(work)
    try:
        with _offline(work / "datasets"):
            manager = _manager(options, work)

            def load() -> dict[str, Any]:
                found: dict[str, Any] = {}
                for name in options.tasks:
                    found |= _loaded(manager, name, options)
                return found

            load()
            yield load
    finally:
        shutil.rmtree(work, ignore_errors=True)


@torch.no_grad()
def run_tasks(
    model: nn.Module, tokenizer: Any, tasks: Mapping[str, Any], limit: int | None
) -> Mapping[str, Any]:
    """Results of the harness for one model; examples in prompts are those the task asks for.

    Args:
        model: a causal language model, on its device.
        tokenizer: its own.
        tasks: freshly loaded, for a task keeps what it was answered.
        limit: how many documents of each task; None for all.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)
    # Its progress bars know no terminal; ours does.
    with contextlib.redirect_stderr(io.StringIO()):
        language_model = HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=_BATCH_ROWS, backend="causal"
        )
        results: Mapping[str, Any] = evaluate(
            language_model,
            {"tasks": dict(tasks)},
            limit=limit,
            bootstrap_iters=_RESAMPLES,
            log_samples=True,
        )
    return results


def task_metrics(
    dense: Mapping[str, Any], sparse: Mapping[str, Any]
) -> tuple[tuple[Metric, ...], tuple[str, ...], str]:
    """Metrics of both models from results of the harness; pure.

    Values and standard errors are the harness's own. The difference is over documents, with its
    own standard error, where a metric is the mean of a value per document.

    Returns:
        The metrics, named TASK/METRIC; names of figures without a standard error or a better side,
        which are not among them; and a hash over every document and prompt.

    Raises:
        ValueError: the models were asked different things.
    """
    metrics: list[Metric] = []
    left_out: list[str] = []
    digest = hashlib.sha256()
    for task, samples in sorted(sparse["samples"].items()):
        for one, other in zip(samples, dense["samples"][task], strict=True):
            asked, as_well = ([str(each[key]) for key in _ASKED] for each in (one, other))
            if asked != as_well:
                raise ValueError(f"document {one['doc_id']} of task {task} differs between models")
            digest.update("\0".join((task, *asked)).encode())
        for key in sparse["results"][task]:
            name, _, chosen = key.partition(",")
            if not chosen or name.endswith("_stderr"):
                continue
            metric = _metric(task, name, chosen, dense, sparse)
            if metric is None:
                left_out.append(_named(task, name, chosen))
            else:
                metrics.append(metric)
    return tuple(metrics), tuple(left_out), digest.hexdigest()


def _metric(
    task: str, name: str, chosen: str, dense: Mapping[str, Any], sparse: Mapping[str, Any]
) -> Metric | None:
    """One figure of a task, after one of its filters; None where it cannot be judged."""
    better = sparse["higher_is_better"].get(task, {}).get(name)
    estimates = [_estimate(results["results"][task], name, chosen) for results in (dense, sparse)]
    if better is None or None in estimates:
        return None
    values = [_values(results["samples"][task], name, chosen) for results in (dense, sparse)]
    difference = None
    means = all(
        len(v) and estimate and math.isclose(float(v.mean()), estimate.value, abs_tol=1e-9)
        for v, estimate in zip(values, estimates, strict=True)
    )
    if means:
        difference = mean_estimate(values[1] - values[0])
    return PairedMetric(
        name=_named(task, name, chosen),
        higher_is_better=bool(better),
        samples=int(sparse["n-samples"][task]["effective"]),
        dense=estimates[0],
        sparse=estimates[1],
        difference=difference,
        values=per_sample(values[1]) if means else (),
    )


def _named(task: str, name: str, chosen: str) -> str:
    return f"{task}/{name}" if chosen == _WHOLE else f"{task}/{name} ({chosen})"


def _estimate(results: Mapping[str, Any], name: str, chosen: str) -> Estimate | None:
    value, error = results[f"{name},{chosen}"], results.get(f"{name}_stderr,{chosen}")
    if not isinstance(value, int | float) or not isinstance(error, int | float):
        return None
    return Estimate(value=float(value), standard_error=float(error))


def _values(samples: Sequence[Mapping[str, Any]], name: str, chosen: str) -> torch.Tensor:
    """The value of each document, (documents,); empty where it is not a number."""
    found = [sample.get(name) for sample in samples if sample["filter"] == chosen]
    numbers = [float(value) for value in found if isinstance(value, bool | int | float)]
    return torch.tensor(numbers if len(numbers) == len(found) else [], dtype=torch.float64)


def _manager(options: HarnessOptions, work: Path) -> Any:
    """Knows the tasks asked for, each with its data."""
    from lm_eval.tasks import TaskManager

    folder = options.data
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--lm-eval-data {folder} is not a folder; pass one with tasks and data.")
    index: dict[str, Any] = {}
    if folder is not None:
        index = TaskManager(include_path=str(folder), include_defaults=False).task_index
    own = set(index)
    if not own.issuperset(options.tasks):
        # The harness reads its 14,000 definitions for this, which takes some seconds.
        index = {**TaskManager().task_index, **index}
    for name in options.tasks:
        _require_known(name, index)
        files = _files_of(folder, name)
        if files:
            _write_definition(name, index[name].yaml_path, files, work)
        elif name not in own:
            raise UsageError(_without_data(name, index[name], folder))
    paths = [str(path) for path in (folder, work) if path is not None]
    return TaskManager(include_path=paths, include_defaults=False)


def _require_known(name: str, index: Mapping[str, Any]) -> None:
    if name not in index:
        near = get_close_matches(name, index, n=3)
        advice = f"near it are {' and '.join(near)}" if near else "`lm-eval ls tasks` lists them"
        raise UsageError(
            f"--lm-eval {name} names no task of the harness or of --lm-eval-data; {advice}."
        )


def _files_of(folder: Path | None, name: str) -> dict[str, Path]:
    """Data files of a task by split."""
    if folder is None or not (folder / name).is_dir():
        return {}
    files = sorted(path for path in (folder / name).iterdir() if path.suffix in _READERS)
    kinds, splits = ({of(path) for path in files} for of in (_kind, _split))
    if len(kinds) > 1 or len(splits) < len(files):
        names = ", ".join(path.name for path in files)
        raise UsageError(
            f"Folder {folder / name} holds {names}, expected one file for each split, all of one "
            "kind; remove the others."
        )
    return {path.stem: path.resolve() for path in files}


def _kind(path: Path) -> str:
    return _READERS[path.suffix]


def _split(path: Path) -> str:
    return path.stem


def _write_definition(name: str, original: Path, files: Mapping[str, Path], work: Path) -> None:
    """A task that is the original but for its data."""
    reader = _READERS[next(iter(files.values())).suffix]
    definition = {
        "include": str(Path(original).resolve()),
        "task": name,
        "dataset_path": reader,
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}},
    }
    path = work / f"{name}.yaml"
    write_atomic(path, yaml.safe_dump(definition).encode())


def _without_data(name: str, entry: Any, folder: Path | None) -> str:
    """What to do about a task of the harness whose data is not here."""
    if entry.yaml_path is None or "TASK" not in str(entry.kind).rpartition(".")[2]:
        return (
            f"--lm-eval {name} names a group of tasks, whose data cannot be found by its name; "
            "pass the tasks themselves."
        )
    text = Path(entry.yaml_path).read_text(encoding="utf-8")
    told = re.search(r"^dataset_path:\s*(\S+)", text, flags=re.MULTILINE)
    dataset = told[1] if told else "its data set"
    place = folder / name if folder else f"DIR/{name}"
    option = "" if folder else " and pass --lm-eval-data DIR"
    return (
        f"--lm-eval {name} reads {dataset} from the network, which is not used; put its splits in "
        f"{place} as files such as validation.jsonl{option}."
    )


def _loaded(manager: Any, name: str, options: HarnessOptions) -> dict[str, Any]:
    """A task, or those of a group of the user's, with their documents."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            tasks: dict[str, Any] = manager.load([name])["tasks"]
    except Exception as error:  # the harness and `datasets` share no base class below Exception
        first = (str(error).splitlines() or [type(error).__name__])[0]
        network = isinstance(error, ConnectionError)
        remedy = (
            f"nothing is fetched, so put its splits in {options.data}/{name} as files such as "
            "validation.jsonl"
            if network
            else f"check its YAML file and its data in {options.data}/{name}"
        )
        raise UsageError(f"--lm-eval {name} cannot be loaded ({first}); {remedy}.") from error
    for task in tasks.values():
        if getattr(task, "UNSAFE_CODE", False):
            raise UsageError(
                f"--lm-eval {name} runs code that the model writes, which is never done here; "
                "leave it out."
            )
    return tasks


@contextlib.contextmanager
def _offline(cache: Path) -> Iterator[None]:
    """Keep `datasets` from the network, and from writing anywhere but into `cache`."""
    import datasets

    wanted = {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": True, "HF_DATASETS_OFFLINE": True}
    before = {name: getattr(datasets.config, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(datasets.config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(datasets.config, name, value)
