"""Stage: how much of the dense model's behaviour the pruned one keeps."""

import time
from pathlib import Path

from torch import nn

from prox24_deploy.core.records import EvaluateResult, Metric
from prox24_deploy.core.tasks import TASKS
from prox24_deploy.core.types import Progress
from prox24_deploy.evaluation.classes import evaluate_classes
from prox24_deploy.evaluation.embeddings import evaluate_embeddings
from prox24_deploy.evaluation.language import evaluate_text_generation
from prox24_deploy.evaluation.speech import evaluate_speech
from prox24_deploy.model.batch import Samples


def evaluate_models(
    dense: nn.Module,
    sparse: nn.Module,
    task: str,
    held_out: Samples,
    model_dir: Path,
    progress: Progress,
) -> EvaluateResult:
    """Measure what the task calls for: words, perplexity, classes, or agreement of embeddings."""
    began = time.perf_counter()
    metrics = _metrics(dense, sparse, task, held_out, model_dir, progress)
    return EvaluateResult(
        metrics=metrics, evaluation=held_out.source, seconds=time.perf_counter() - began
    )


def _metrics(
    dense: nn.Module,
    sparse: nn.Module,
    task: str,
    held_out: Samples,
    model_dir: Path,
    progress: Progress,
) -> tuple[Metric, ...]:
    batches = held_out.batches
    match TASKS[task].judged_by:
        case "speech":
            return evaluate_speech(dense, sparse, held_out, model_dir, progress)
        case "language":
            return evaluate_text_generation(dense, sparse, batches, progress)
        case "classes":
            return evaluate_classes(dense, sparse, batches, progress, held_out.labels)
        case "embeddings":
            return evaluate_embeddings(dense, sparse, batches, progress)
