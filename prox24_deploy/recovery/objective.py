"""What a pruned model is trained for: to give what the dense model gives.

Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531: KL(dense, sparse) of
the softened outputs, times the square of the temperature. No label and no next token of the text is
used, so that the text need not be right. Models that give no logits are held to the direction of
their embedding and to their hidden states.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from prox24_deploy.core.tasks import TASKS
from prox24_deploy.evaluation.embeddings import image_states
from prox24_deploy.model.batch import IGNORED, Batch
from prox24_deploy.model.blocks import run_model
from prox24_deploy.model.config_file import has_one_score
from prox24_deploy.model.sentence_modules import embedding_of

# From the outputs of the dense and of the sparse model on a batch to a sum, and what of.
Compare = Callable[[Any, Any, Batch, nn.Module], tuple[Tensor, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A loss between two models.

    Attributes:
        name: as the report calls it.
        task: of the models.
        compare: sums over tokens or samples, so that the mean of several batches can be taken.
    """

    name: str
    task: str
    compare: Compare

    def __call__(self, dense: nn.Module, sparse: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """Loss of `sparse`, summed over what it is a mean of, and the number of these.

        Only `sparse` gets gradients.
        """
        with torch.no_grad():
            expected = run_model(dense, batch, self.task)
        return self.compare(expected, run_model(sparse, batch, self.task), batch, sparse)


def objective_for(task: str, *, temperature: float = 1.0, top_k: int | None = None) -> Objective:
    """The loss that a task calls for; see `RecoverOptions` for the others."""
    match TASKS[task].judged_by:
        case "language" | "speech" | "classes":
            compare = partial(_compare_logits, temperature=temperature, top_k=top_k)
            return Objective(name="KL(dense, sparse)", task=task, compare=compare)
        case "embeddings":
            name = "1 - cosine + relative error of hidden states"
            return Objective(name=name, task=task, compare=_compare_states)


def loss_name(task: str, config: Mapping[str, Any]) -> str:
    """What the loss of a model of the task is called, by its config.json."""
    if has_one_score(task, config):
        return "squared difference of scores"
    return objective_for(task).name


def _compare_logits(
    dense: Any, sparse: Any, batch: Batch, _: nn.Module, *, temperature: float, top_k: int | None
) -> tuple[Tensor, int]:
    expected, given = dense.logits, sparse.logits
    if expected.ndim == 3:
        real = batch.real if batch.targets is None else batch.targets != IGNORED
        expected, given = (_where(real, part) for part in (expected, given))
    expected, given = expected.float(), given.float()
    if expected.shape[-1] == 1:
        # A single score has no distribution.
        return (given - expected).square().sum(), len(expected)
    losses = divergences(expected / temperature, given / temperature, top_k)
    return temperature**2 * losses.sum(), len(losses)


def _where(real: Tensor, values: Tensor) -> Tensor:
    """Values (batch, sequence, n) of real positions, (positions, n), in the order of the batch."""
    return values.flatten(0, 1) if bool(real.all()) else values[real.to(values.device)]


def divergences(expected: Tensor, given: Tensor, top_k: int | None = None) -> Tensor:
    """KL in nats of what logits, (rows, classes), predict: (rows,).

    With `top_k` all classes but the `top_k` likeliest of `expected` count as one, which is a lower
    bound of the whole.
    """
    logs = [part.log_softmax(-1) for part in (expected, given)]
    if top_k is not None and top_k < expected.shape[-1]:
        chosen = logs[0].topk(top_k, dim=-1).indices
        logs = [_grouped(part, chosen) for part in logs]
    return (logs[0].exp() * (logs[0] - logs[1])).sum(-1)


def _grouped(logs: Tensor, chosen: Tensor) -> Tensor:
    """Log-probabilities of the chosen classes, and of all others in sum."""
    picked = logs.gather(-1, chosen)
    others = logs.scatter(-1, chosen, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([picked, others], dim=-1)


def _compare_states(dense: Any, sparse: Any, batch: Batch, model: nn.Module) -> tuple[Tensor, int]:
    samples = len(batch.real)
    pooled = [_pooled(part, batch, model).float() for part in (dense, sparse)]
    away = 1 - functional.cosine_similarity(pooled[1], pooled[0], dim=-1)
    states = [part.last_hidden_state.float() for part in (dense, sparse)]
    if batch.has_padding:
        states = [_where(batch.real, part) for part in states]
    wrong = (states[1] - states[0]).square().sum() / states[0].square().sum()
    return away.sum() + samples * wrong, samples


def _pooled(result: Any, batch: Batch, model: nn.Module) -> Tensor:
    if not batch.has_padding:
        return image_states(result)
    real = batch.real
    if bool(real.all()):
        # Made where it is needed, for a CUDA graph cannot copy it there.
        real = torch.ones_like(real, device=result.last_hidden_state.device)
    return embedding_of(model, result, real)
