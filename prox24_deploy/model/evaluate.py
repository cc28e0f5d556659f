"""Stage: how much of the dense model's behaviour the pruned one keeps."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from prox24_deploy.artifacts import Estimate, EvaluateResult, Metric
from prox24_deploy.errors import ModelDirError
from prox24_deploy.model.blocks import run_model
from prox24_deploy.model.calibration import Batch, Samples

Progress = Callable[[str, int, int], None]
Pooling = Callable[[Tensor, Tensor], Tensor]
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
    """Measure what the task calls for: perplexity, or agreement of embeddings."""
    began = time.perf_counter()
    if task == "text-generation":
        metrics = evaluate_text_generation(dense, sparse, held_out.batches, progress)
    else:
        pooling = pooling_of(model_dir)
        metrics = evaluate_embeddings(dense, sparse, held_out.batches, pooling, progress)
    return EvaluateResult(metrics, held_out.source, time.perf_counter() - began)


@torch.no_grad()
def evaluate_text_generation(
    dense: nn.Module, sparse: nn.Module, batches: tuple[Batch, ...], progress: Progress
) -> tuple[Metric, ...]:
    """Perplexity of both models and their top-1 agreement, over windows of text.

    Standard errors are over windows: of exp(mean NLL) by the delta method, and paired for the
    difference of log-perplexity.
    """
    nll: list[Tensor] = []
    agree: list[Tensor] = []
    for i, batch in enumerate(batches):
        progress("evaluate", i, len(batches))
        logits = [run_model(m, batch, "text-generation").logits[:, :-1] for m in (dense, sparse)]
        targets = batch.inputs["input_ids"][:, 1:].to(logits[0].device)
        nll.append(torch.stack([window_nll(part, targets) for part in logits]))
        same = logits[0].argmax(-1) == logits[1].argmax(-1)
        agree.append(same.double().mean(1))
    progress("evaluate", len(batches), len(batches))
    losses = torch.cat(nll, dim=1)
    windows = losses.shape[1]
    gap = mean_estimate(losses[1] - losses[0])
    dense_perplexity, sparse_perplexity = (
        _perplexity(part, which) for part, which in zip(losses, ("dense", "pruned"), strict=True)
    )
    perplexity = Metric(
        "perplexity", False, windows, dense_perplexity, sparse_perplexity, None, None
    )
    log_perplexity = Metric(
        "log-perplexity",
        False,
        windows,
        mean_estimate(losses[0]),
        mean_estimate(losses[1]),
        gap,
        None,
    )
    agreement = Metric(
        "top-1 agreement", True, windows, None, None, None, mean_estimate(torch.cat(agree))
    )
    return perplexity, log_perplexity, agreement


@torch.no_grad()
def evaluate_embeddings(
    dense: nn.Module,
    sparse: nn.Module,
    batches: tuple[Batch, ...],
    pooling: Pooling,
    progress: Progress,
) -> tuple[Metric, ...]:
    """Mean cosine of embeddings, dense against sparse, and nearest-neighbour agreement.

    Agreement is the share of texts whose nearest other text, by cosine among all texts, is the same
    in both models.
    """
    parts: list[Tensor] = []
    for i, batch in enumerate(batches):
        progress("evaluate", i, len(batches))
        both = [embed(model, batch, pooling) for model in (dense, sparse)]
        parts.append(torch.stack(both))
    progress("evaluate", len(batches), len(batches))
    embeddings = torch.cat(parts, dim=1)
    if not bool(torch.isfinite(embeddings).all()):
        raise ModelDirError("An embedding is NaN or infinite; check the checkpoint and the text.")
    cosine = (embeddings[0] * embeddings[1]).sum(1)
    neighbours = [_nearest(e) for e in embeddings]
    same = (neighbours[0] == neighbours[1]).double()
    texts = len(cosine)
    return (
        Metric("embedding cosine", True, texts, None, None, None, mean_estimate(cosine)),
        Metric("nearest-neighbour agreement", True, texts, None, None, None, mean_estimate(same)),
    )


def loss_name(task: str) -> str:
    """What `loss_against` measures for a task."""
    return "log-perplexity" if task == "text-generation" else "1 - embedding cosine"


def loss_against(
    dense: nn.Module, task: str, batches: Sequence[Batch], pooling: Pooling
) -> Callable[[nn.Module], Tensor]:
    """A function from a model to its loss per sample, (samples,), float64, 0 for `dense` itself.

    The loss is the rise of the log-perplexity over `dense` where the task is text generation, else
    one less the cosine of the embeddings. `dense` is run at once and may change afterwards.
    """
    if task == "text-generation":
        reference = _window_losses(dense, batches)
        return lambda model: _window_losses(model, batches) - reference
    expected = [embed(dense, batch, pooling) for batch in batches]
    return lambda model: torch.cat(
        [
            1 - (embed(model, batch, pooling) * target).sum(1)
            for batch, target in zip(batches, expected, strict=True)
        ]
    )


def mean_estimate(values: Tensor) -> Estimate:
    """Mean with its standard error; 0 for a single value."""
    values = values.double()
    spread = float(values.std()) if len(values) > 1 else 0.0
    return Estimate(float(values.mean()), spread / math.sqrt(len(values)))


def pooling_of(model_dir: Path) -> Pooling:
    """The pooling a sentence-transformers directory declares; the mean over tokens otherwise.

    Raises:
        ModelDirError: the declaration cannot be read, or asks for neither the mean nor [CLS].
    """
    declared = model_dir / "1_Pooling" / "config.json"
    if not declared.is_file():
        return _mean_tokens
    try:
        options = json.loads(declared.read_text(encoding="utf-8"))
        flags = {n for n, on in options.items() if n.startswith("pooling_mode_") and on is True}
        chosen = {options["pooling_mode"]} if "pooling_mode" in options else flags
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ModelDirError(f"{declared} is not a readable pooling; restore it.") from error
    if len(chosen) > 1 or not chosen <= _POOLINGS.keys():
        modes = ", ".join(sorted(map(str, chosen)))
        raise ModelDirError(
            f"{declared} asks for pooling {modes}, expected the mean or the [CLS] token; "
            "embeddings pooled otherwise cannot be compared yet."
        )
    return _POOLINGS[chosen.pop()] if chosen else _mean_tokens


def window_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood per window: (windows,)."""
    loss = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="none"
    )
    return loss.view(targets.shape).double().mean(1)


def _window_losses(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    parts = []
    for batch in batches:
        logits = run_model(model, batch, "text-generation").logits[:, :-1]
        parts.append(window_nll(logits, batch.inputs["input_ids"][:, 1:].to(logits.device)))
    return torch.cat(parts)


def _perplexity(losses: Tensor, which: str) -> Estimate:
    mean = mean_estimate(losses)
    # Not `<`, which NaN would pass.
    if not mean.value <= _MOST_NLL:
        raise ModelDirError(
            f"The {which} model has a log-perplexity of {mean.value:.3g} on the evaluation text, "
            "which no working model has; check the checkpoint and the text."
        )
    value = math.exp(mean.value)
    return Estimate(value, value * mean.standard_error)


def embed(model: nn.Module, batch: Batch, pooling: Pooling) -> Tensor:
    """Embeddings of unit length, (texts, hidden), float64."""
    hidden = run_model(model, batch, "feature-extraction").last_hidden_state
    pooled = pooling(hidden, batch.real.to(hidden.device))
    return nn.functional.normalize(pooled.double(), dim=-1)


def _mean_tokens(hidden: Tensor, real: Tensor) -> Tensor:
    weight = real[..., None].to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


def _first_token(hidden: Tensor, _: Tensor) -> Tensor:
    return hidden[:, 0]


def _nearest(embeddings: Tensor) -> Tensor:
    similarity = embeddings @ embeddings.T
    return similarity.fill_diagonal_(-math.inf).argmax(1)


# Keys of both forms of the declaration: one flag per mode, and one name.
_POOLINGS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": _mean_tokens,
    "pooling_mode_cls_token": _first_token,
    "mean": _mean_tokens,
    "cls": _first_token,
}
