"""How far a classifier stays with the dense one, and how often both are right."""

import torch
from torch import Tensor, nn

from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.core.metrics import ACCURACY, DIVERGENCE, SCORE_CHANGE, TOP_1
from prox24_deploy.core.records import Metric
from prox24_deploy.core.tasks import TEXT_CLASSIFICATION
from prox24_deploy.core.types import Progress
from prox24_deploy.evaluation.estimate import direct, divergence, paired
from prox24_deploy.model.batch import Batch
from prox24_deploy.model.blocks import run_model


@torch.no_grad()
def evaluate_classes(
    dense: nn.Module,
    sparse: nn.Module,
    batches: tuple[Batch, ...],
    progress: Progress,
    labels: Tensor | None = None,
) -> tuple[Metric, ...]:
    """How far a classifier stays with the dense one, and how often both are right, by sample.

    With `labels`, (samples,), the accuracy of both comes first. Several classes give top-1
    agreement and the divergence KL(dense, sparse) in nats; a single score, as a reranker gives it,
    has no classes and gives the mean change of the score, in standard deviations of the dense one.
    A classifier of tokens counts as the mean over the tokens of each text.

    Raises:
        ModelDirError: a logit is NaN or infinite.
    """
    parts: list[Tensor] = []
    chosen: list[Tensor] = []
    for i, batch in enumerate(batches):
        progress("evaluate", i, len(batches))
        logits = [run_model(m, batch, TEXT_CLASSIFICATION.name).logits for m in (dense, sparse)]
        if not all(bool(part.isfinite().all()) for part in logits):
            raise ModelDirError("A logit is NaN or infinite; check the checkpoint and the inputs.")
        chosen.append(torch.stack([part.argmax(-1) for part in logits]))
        parts.append(class_figures(logits[0].double(), logits[1].double(), batch.real))
    progress("evaluate", len(batches), len(batches))
    first, second = torch.cat(parts, dim=1)
    if dense.config.num_labels == 1:  # type: ignore[union-attr]  # of a transformers model
        change = (first - second).abs() / first.std().clamp(min=torch.finfo(first.dtype).tiny)
        return (direct(SCORE_CHANGE, change),)
    return (
        *(() if labels is None else (_accuracy(torch.cat(chosen, dim=1), labels),)),
        direct(TOP_1, first),
        direct(DIVERGENCE, second),
    )


def _accuracy(chosen: Tensor, labels: Tensor) -> Metric:
    """Share of samples whose class is the label, from the classes of both models, (2, samples)."""
    dense, sparse = (chosen == labels.to(chosen.device)).double()
    return paired(ACCURACY, dense, sparse)


def class_figures(dense: Tensor, sparse: Tensor, real: Tensor) -> Tensor:
    """(2, texts): agreement and divergence, or both scores where there is but one."""
    if dense.shape[-1] == 1:
        figures = torch.stack([dense[..., 0], sparse[..., 0]])
    else:
        same = (dense.argmax(-1) == sparse.argmax(-1)).double()
        figures = torch.stack([same, divergence(dense, sparse)])
    if figures.ndim == 2:
        return figures
    weight = real.to(figures.device, figures.dtype)
    return (figures * weight).sum(-1) / weight.sum(-1)
