"""How well two models predict text: perplexity, and how alike they are word by word."""

import math

import torch
from torch import Tensor, nn

from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.core.metrics import DIVERGENCE, LOG_PERPLEXITY, PERPLEXITY, TOP_1
from prox24_deploy.core.records import Estimate, Metric, PairedMetric
from prox24_deploy.core.tasks import TEXT_GENERATION
from prox24_deploy.core.types import Progress
from prox24_deploy.evaluation.estimate import direct, divergence, mean_estimate, paired, per_sample
from prox24_deploy.model.batch import IGNORED, Batch
from prox24_deploy.model.blocks import run_model

# exp() of more is no float.
_MOST_NLL = 700.0


@torch.no_grad()
def evaluate_text_generation(
    dense: nn.Module, sparse: nn.Module, batches: tuple[Batch, ...], progress: Progress
) -> tuple[Metric, ...]:
    """Perplexity of both models, their top-1 agreement and KL(dense, sparse), over windows of text.

    The divergence is in nats per token. A window of an encoder-decoder is the target of one text,
    on which its decoder is forced; windows count alike, whatever their length. Standard errors are
    over windows: of exp(mean NLL) by the delta method, and paired for the difference of
    log-perplexity.
    """
    nll: list[Tensor] = []
    agree: list[Tensor] = []
    diverge: list[Tensor] = []
    for i, batch in enumerate(batches):
        progress("evaluate", i, len(batches))
        logits = [next_logits(model, batch) for model in (dense, sparse)]
        nll.append(torch.stack([window_nll(part, batch) for part in logits]))
        same = logits[0].argmax(-1) == logits[1].argmax(-1)
        agree.append(_window_mean(same.double(), _next_tokens(batch)))
        # Row by row, because a batch of distributions over a large vocabulary is not small.
        rows = [divergence(*pair) for pair in zip(*logits, strict=True)]
        diverge.append(_window_mean(torch.stack(rows), _next_tokens(batch)))
    progress("evaluate", len(batches), len(batches))
    losses = torch.cat(nll, dim=1)
    return (
        _perplexities(losses),
        paired(LOG_PERPLEXITY, losses[0], losses[1]),
        direct(TOP_1, torch.cat(agree)),
        direct(DIVERGENCE, torch.cat(diverge)),
    )


def _perplexities(losses: Tensor) -> PairedMetric:
    """Of both models, from their mean negative log-likelihood per window, (2, windows)."""
    dense, sparse = (
        _perplexity(part, which) for part, which in zip(losses, ("dense", "pruned"), strict=True)
    )
    return PairedMetric(
        name=PERPLEXITY.name,
        higher_is_better=PERPLEXITY.higher_is_better,
        samples=losses.shape[1],
        dense=dense,
        sparse=sparse,
        difference=None,
        # To first order, as for the standard error: exp(mean) is no mean over windows.
        values=per_sample(sparse.value * (1 + losses[1] - losses[1].mean())),
    )


def _perplexity(losses: Tensor, which: str) -> Estimate:
    mean = mean_estimate(losses)
    # Not `<`, which NaN would pass.
    if not mean.value <= _MOST_NLL:
        raise ModelDirError(
            f"The {which} model has a log-perplexity of {mean.value:.3g} on the evaluation text, "
            "which no working model has; check the checkpoint and the text."
        )
    value = math.exp(mean.value)
    return Estimate(value=value, standard_error=value * mean.standard_error)


def next_logits(model: nn.Module, batch: Batch) -> Tensor:
    """What a model that generates text predicts, (windows, positions, vocabulary).

    The last position of a window has nothing to predict, unless there are targets of their own.
    """
    logits: Tensor = run_model(model, batch, TEXT_GENERATION.name).logits
    return logits[:, :-1] if batch.targets is None else logits


def window_nll(logits: Tensor, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of what follows, per window: (windows,), float64."""
    targets = _next_tokens(batch).to(logits.device)
    # Window by window, because what is made on the way is as large as what is predicted.
    losses = [
        nn.functional.cross_entropy(own.float(), ids, reduction="none", ignore_index=IGNORED)
        for own, ids in zip(logits, targets, strict=True)
    ]
    return _window_mean(torch.stack(losses).double(), targets)


def _next_tokens(batch: Batch) -> Tensor:
    """The tokens that `next_logits` should predict, (windows, positions)."""
    return batch.inputs["input_ids"][:, 1:] if batch.targets is None else batch.targets


def _window_mean(values: Tensor, targets: Tensor) -> Tensor:
    """Mean over the positions of each window that have a target, (windows,)."""
    known = (targets != IGNORED).to(values.device)
    return (values * known).sum(1) / known.sum(1)
