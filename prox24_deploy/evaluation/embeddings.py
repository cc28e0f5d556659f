"""How near two models put the same text or image: the cosine of its embeddings, and neighbours."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.core.metrics import COSINE, NEIGHBOURS
from prox24_deploy.core.records import Metric
from prox24_deploy.core.tasks import FEATURE_EXTRACTION
from prox24_deploy.core.types import Progress
from prox24_deploy.evaluation.estimate import direct
from prox24_deploy.model.batch import Batch
from prox24_deploy.model.blocks import run_model
from prox24_deploy.model.sentence_modules import embedding_of


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
    return direct(COSINE, cosine), direct(NEIGHBOURS, same)


def embed(model: nn.Module, batch: Batch) -> Tensor:
    """Embeddings of unit length, (samples, width), float64."""
    result = run_model(model, batch, FEATURE_EXTRACTION.name)
    if not batch.has_padding:
        return nn.functional.normalize(image_states(result).double(), dim=-1)
    return nn.functional.normalize(embedding_of(model, result, batch.real).double(), dim=-1)


def image_states(result: Any) -> Tensor:
    """What the model itself pools, else the mean over positions: (images, hidden)."""
    for name in ("image_embeds", "pooler_output"):
        if (pooled := getattr(result, name, None)) is not None:
            return torch.as_tensor(pooled).flatten(1)
    hidden: Tensor = result.last_hidden_state
    return hidden.mean((2, 3)) if hidden.ndim == 4 else hidden.mean(1)


def _nearest(embeddings: Tensor) -> Tensor:
    similarity = embeddings @ embeddings.T
    return similarity.fill_diagonal_(-math.inf).argmax(1)
