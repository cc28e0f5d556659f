"""Stage: how much of the dense model's behaviour the pruned one keeps."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.core.records import DirectMetric, Estimate, EvaluateResult, Metric, PairedMetric
from prox24_deploy.core.types import WRITES_TEXT, Progress
from prox24_deploy.evaluation.estimate import mean_estimate, per_sample
from prox24_deploy.model.batch import IGNORED, Batch, Samples
from prox24_deploy.model.blocks import run_model
from prox24_deploy.model.sentence_modules import embedding_of

# exp() of more is no float.
_MOST_NLL = 700.0


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
    if task == "automatic-speech-recognition":
        # Builds on this module.
        from prox24_deploy.evaluation.speech import evaluate_speech

        metrics = evaluate_speech(dense, sparse, held_out, model_dir, progress)
    elif task in WRITES_TEXT:
        metrics = evaluate_text_generation(dense, sparse, held_out.batches, progress)
    elif task.endswith("-classification"):
        metrics = evaluate_classes(dense, sparse, held_out.batches, progress, held_out.labels)
    else:
        metrics = evaluate_embeddings(dense, sparse, held_out.batches, progress)
    return EvaluateResult(
        metrics=metrics, evaluation=held_out.source, seconds=time.perf_counter() - began
    )


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
        rows = [_divergence(*pair) for pair in zip(*logits, strict=True)]
        diverge.append(_window_mean(torch.stack(rows), _next_tokens(batch)))
    progress("evaluate", len(batches), len(batches))
    losses = torch.cat(nll, dim=1)
    windows = losses.shape[1]
    gap = mean_estimate(losses[1] - losses[0])
    dense_perplexity, sparse_perplexity = (
        _perplexity(part, which) for part, which in zip(losses, ("dense", "pruned"), strict=True)
    )
    perplexity = PairedMetric(
        name="perplexity",
        higher_is_better=False,
        samples=windows,
        dense=dense_perplexity,
        sparse=sparse_perplexity,
        difference=None,
        # To first order, as for the standard error: exp(mean) is no mean over windows.
        values=per_sample(sparse_perplexity.value * (1 + losses[1] - losses[1].mean())),
    )
    log_perplexity = PairedMetric(
        name="log-perplexity",
        higher_is_better=False,
        samples=windows,
        dense=mean_estimate(losses[0]),
        sparse=mean_estimate(losses[1]),
        difference=gap,
        values=per_sample(losses[1]),
    )
    return (
        perplexity,
        log_perplexity,
        _agreement("top-1 agreement", torch.cat(agree), higher_is_better=True),
        _agreement("KL divergence", torch.cat(diverge), higher_is_better=False),
    )


@torch.no_grad()
def evaluate_embeddings(
    dense: nn.Module,
    sparse: nn.Module,
    batches: tuple[Batch, ...],
    progress: Progress,
) -> tuple[Metric, ...]:
    """Mean cosine of embeddings, dense against sparse, and nearest-neighbour agreement.

    Agreement is the share of texts whose nearest other text, by cosine among all texts, is the same
    in both models.
    """
    parts: list[Tensor] = []
    for i, batch in enumerate(batches):
        progress("evaluate", i, len(batches))
        both = [embed(model, batch) for model in (dense, sparse)]
        parts.append(torch.stack(both))
    progress("evaluate", len(batches), len(batches))
    embeddings = torch.cat(parts, dim=1)
    if not bool(torch.isfinite(embeddings).all()):
        raise ModelDirError("An embedding is NaN or infinite; check the checkpoint and the text.")
    cosine = (embeddings[0] * embeddings[1]).sum(1)
    neighbours = [_nearest(e) for e in embeddings]
    same = (neighbours[0] == neighbours[1]).double()
    return (
        _agreement("embedding cosine", cosine, higher_is_better=True),
        _agreement("nearest-neighbour agreement", same, higher_is_better=True),
    )


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
        logits = [run_model(m, batch, "text-classification").logits for m in (dense, sparse)]
        if not all(bool(part.isfinite().all()) for part in logits):
            raise ModelDirError("A logit is NaN or infinite; check the checkpoint and the inputs.")
        chosen.append(torch.stack([part.argmax(-1) for part in logits]))
        parts.append(class_figures(logits[0].double(), logits[1].double(), batch.real))
    progress("evaluate", len(batches), len(batches))
    first, second = torch.cat(parts, dim=1)
    if dense.config.num_labels == 1:  # type: ignore[union-attr]  # of a transformers model
        change = (first - second).abs() / first.std().clamp(min=torch.finfo(first.dtype).tiny)
        return (_agreement("score change", change, higher_is_better=False),)
    return (
        *(() if labels is None else (_accuracy(torch.cat(chosen, dim=1), labels),)),
        _agreement("top-1 agreement", first, higher_is_better=True),
        _agreement("KL divergence", second, higher_is_better=False),
    )


def _accuracy(chosen: Tensor, labels: Tensor) -> Metric:
    """Share of samples whose class is the label, from the classes of both models, (2, samples)."""
    dense, sparse = (chosen == labels.to(chosen.device)).double()
    return PairedMetric(
        name="accuracy",
        higher_is_better=True,
        samples=len(labels),
        dense=mean_estimate(dense),
        sparse=mean_estimate(sparse),
        difference=mean_estimate(sparse - dense),
        values=per_sample(sparse),
    )


def _agreement(name: str, values: Tensor, *, higher_is_better: bool) -> Metric:
    """A metric that compares the two models directly, from its value per sample."""
    return DirectMetric(
        name=name,
        higher_is_better=higher_is_better,
        samples=len(values),
        agreement=mean_estimate(values),
        values=per_sample(values),
    )


def class_figures(dense: Tensor, sparse: Tensor, real: Tensor) -> Tensor:
    """(2, texts): agreement and divergence, or both scores where there is but one."""
    if dense.shape[-1] == 1:
        figures = torch.stack([dense[..., 0], sparse[..., 0]])
    else:
        same = (dense.argmax(-1) == sparse.argmax(-1)).double()
        figures = torch.stack([same, _divergence(dense, sparse)])
    if figures.ndim == 2:
        return figures
    weight = real.to(figures.device, figures.dtype)
    return (figures * weight).sum(-1) / weight.sum(-1)


def _divergence(dense: Tensor, sparse: Tensor) -> Tensor:
    """KL(dense, sparse) in nats of what logits, (..., classes), predict: (...), float64."""
    logs = [part.double().log_softmax(-1) for part in (dense, sparse)]
    return (logs[0].exp() * (logs[0] - logs[1])).sum(-1)


def next_logits(model: nn.Module, batch: Batch) -> Tensor:
    """What a model that generates text predicts, (windows, positions, vocabulary).

    The last position of a window has nothing to predict, unless there are targets of their own.
    """
    logits: Tensor = run_model(model, batch, "text-generation").logits
    return logits[:, :-1] if batch.targets is None else logits


def window_nll(logits: Tensor, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of what follows, per window: (windows,), float64."""
    targets = _next_tokens(batch).to(logits.device)
    loss = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED
    )
    return _window_mean(loss.view(targets.shape).double(), targets)


def _next_tokens(batch: Batch) -> Tensor:
    """The tokens that `next_logits` should predict, (windows, positions)."""
    return batch.inputs["input_ids"][:, 1:] if batch.targets is None else batch.targets


def _window_mean(values: Tensor, targets: Tensor) -> Tensor:
    """Mean over the positions of each window that have a target, (windows,)."""
    known = (targets != IGNORED).to(values.device)
    return (values * known).sum(1) / known.sum(1)


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


def embed(model: nn.Module, batch: Batch) -> Tensor:
    """Embeddings of unit length, (samples, width), float64."""
    result = run_model(model, batch, "feature-extraction")
    if batch.real.ndim == 1:
        return nn.functional.normalize(_image_states(result).double(), dim=-1)
    return nn.functional.normalize(embedding_of(model, result, batch.real).double(), dim=-1)


def _image_states(result: Any) -> Tensor:
    """What the model itself pools, else the mean over positions: (images, hidden)."""
    for name in ("image_embeds", "pooler_output"):
        if (pooled := getattr(result, name, None)) is not None:
            return torch.as_tensor(pooled).flatten(1)
    hidden: Tensor = result.last_hidden_state
    return hidden.mean((2, 3)) if hidden.ndim == 4 else hidden.mean(1)


def _nearest(embeddings: Tensor) -> Tensor:
    similarity = embeddings @ embeddings.T
    return similarity.fill_diagonal_(-math.inf).argmax(1)
