"""The stage that runs tasks of the lm-evaluation-harness on both models."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prox24_deploy.accuracy import TaskScores
from prox24_deploy.artifacts import PruneResult
from prox24_deploy.errors import UsageError
from prox24_deploy.options import BuildOptions, HarnessOptions
from prox24_deploy.recipe import Recipe
from prox24_deploy.release.bundle import Bundle
from prox24_deploy.release.environment import versions
from prox24_deploy.release.manifest import hash_file
from prox24_deploy.subject import Subject, torch_device

Progress = Callable[[str, int, int], None]

STAGE = "tasks"


def require_usable(options: HarnessOptions, recipe: Recipe) -> None:
    """Refuse what can be seen to be wrong before any work.

    Raises:
        BackendMissingError: the harness is not installed.
        UsageError: an option has no effect, or the model does not generate text.
    """
    if not options.tasks:
        if options.data is not None or options.limit is not None:
            raise UsageError(
                "--lm-eval-data and --lm-eval-limit have no effect without a task; add --lm-eval "
                "TASK."
            )
        return
    if recipe.task != "text-generation":
        raise UsageError(
            f"--lm-eval {options.tasks[0]} is for models of the task text-generation, and those of "
            f"recipe {recipe.family} are for {recipe.task}; leave it out."
        )
    from prox24_deploy.model.harness import require_harness

    require_harness()


def verify(bundle: Bundle, options: HarnessOptions) -> None:
    """Load every task once, so that what is missing is said before hours of work.

    Raises:
        UsageError: a task is unknown, or its data is not here.
    """
    if options.tasks:
        from prox24_deploy.model.harness import open_tasks

        with open_tasks(options, bundle.partial / "lm-eval"):
            pass


def measure(
    bundle: Bundle, subject: Subject, options: BuildOptions, progress: Progress
) -> TaskScores | None:
    """Score both models on the same documents; None where no task was asked for."""
    asked = options.harness
    if not asked.tasks:
        if STAGE in bundle.manifest.stages:
            bundle.forget(STAGE, [])
        return None
    from prox24_deploy.model.harness import harness_version, open_tasks, run_tasks, task_metrics

    version = harness_version()
    inputs = {
        "model": subject.directory.sha256,
        "pruned": bundle.load("prune", PruneResult).state_sha256,
        "tasks": list(asked.tasks),
        "data": _hashes(asked.data),
        "limit": asked.limit,
        "device": torch_device(options.device).type,
        "versions": {**versions(), "lm_eval": version},
    }

    def run() -> TaskScores:
        from prox24_deploy.model.directory import load_model, load_tokenizer, open_model_dir

        began = time.perf_counter()
        tokenizer = load_tokenizer(subject.directory)
        device = torch_device(options.device)
        results: list[Mapping[str, Any]] = []
        with open_tasks(asked, bundle.partial / "lm-eval") as load:
            for directory in (subject.directory, open_model_dir(bundle.root / "pruned")):
                progress(STAGE, len(results), 2)
                model = load_model(directory, subject.recipe, device)
                results.append(run_tasks(model, tokenizer, load(), asked.limit))
        progress(STAGE, 2, 2)
        metrics, left_out, documents = task_metrics(*results)
        seconds = time.perf_counter() - began
        return TaskScores(version, asked.limit, documents, metrics, left_out, seconds)

    return bundle.stage(STAGE, TaskScores, inputs, [], run)


def _hashes(folder: Path | None) -> dict[str, str]:
    """Every file below a folder with its hash."""
    if folder is None:
        return {}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hash_file(path).sha256 for path in files}
