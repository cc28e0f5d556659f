"""One figure per sample for how far a model has moved from the dense one; 0 is not at all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prox24_deploy.core.metrics import COSINE, DIVERGENCE, LOG_PERPLEXITY, SCORE_CHANGE
from prox24_deploy.core.tasks import TASKS, TEXT_CLASSIFICATION
from prox24_deploy.evaluation.classes import class_figures
from prox24_deploy.evaluation.embeddings import embed
from prox24_deploy.evaluation.language import next_logits, window_nll
from prox24_deploy.model.batch import Batch
from prox24_deploy.model.blocks import run_model


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss against one dense model.

    Attributes:
        name: as the metrics of an evaluation call it, with "1 - " before one that should be high.
        of: from a model to its loss per sample, (samples,), float64.
    """

    name: str
    of: Callable[[nn.Module], Tensor]


def loss_against(dense: nn.Module, task: str, batches: Sequence[Batch]) -> Loss:
    """The loss that a task calls for, on some batches.

    That is the rise of the log-perplexity where the model generates text, the divergence
    KL(dense, model) for a classifier (the change of its score, in standard deviations of the dense
    one, where there is but one), else one less the cosine of the embeddings. `dense` is run at
    once and may change afterwards.
    """
    match TASKS[task].judged_by:
        case "language" | "speech":
            return _language_loss(dense, batches)
        case "classes":
            return _class_loss(dense, batches)
        case "embeddings":
            return _embedding_loss(dense, batches)


def _language_loss(dense: nn.Module, batches: Sequence[Batch]) -> Loss:
    expected = _window_losses(dense, batches)
    return Loss(LOG_PERPLEXITY.loss, lambda model: _window_losses(model, batches) - expected)


def _embedding_loss(dense: nn.Module, batches: Sequence[Batch]) -> Loss:
    expected = [embed(dense, batch) for batch in batches]

    def cosine_loss(model: nn.Module) -> Tensor:
        pairs = zip(batches, expected, strict=True)
        return torch.cat([1 - (embed(model, b) * target).sum(1) for b, target in pairs])

    return Loss(COSINE.loss, cosine_loss)


def _class_loss(dense: nn.Module, batches: Sequence[Batch]) -> Loss:
    expected = [_logits(dense, batch) for batch in batches]

    def figures(model: nn.Module) -> Tensor:
        pairs = zip(batches, expected, strict=True)
        return torch.cat([class_figures(e, _logits(model, b), b.real) for b, e in pairs], dim=1)

    if expected[0].shape[-1] > 1:
        return Loss(DIVERGENCE.loss, lambda model: figures(model)[1])
    spread = figures(dense)[0].std().clamp(min=torch.finfo(torch.float64).tiny)

    def change(model: nn.Module) -> Tensor:
        scores = figures(model)
        return (scores[0] - scores[1]).abs() / spread

    return Loss(SCORE_CHANGE.loss, change)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = run_model(model, batch, TEXT_CLASSIFICATION.name).logits.double()
    return logits


def _window_losses(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    return torch.cat([window_nll(next_logits(model, batch), batch) for batch in batches])
