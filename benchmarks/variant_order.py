"""An order of the channels of the residual stream, beside that of the channels within blocks.

All layers that read the stream share its order: columns of these layers and of the embeddings, rows
of the layers that write it, and the weights of the norms move together, so that a Llama computes
what it did and its output layer may stay tied. Each layer's scores are divided by what its outputs
are worth, so that all count alike.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from variant_lab import Figures, Lab, order_channels
from variant_rotations import energy, grams, readers, require_same, writers

from prox24_deploy.pruning import permute_search

# Rows of all layers together that are looked at.
_ROWS = 4096


def ordered(lab: Lab, *, stream: bool) -> tuple[nn.Module, Figures]:
    """Order the channels within blocks as the tool does, and those of the stream; prune that."""
    model, figures = deepcopy(lab.dense), Figures()
    order_channels(lab, model)
    if stream:
        with _more_rows():
            found = permute_search.search_order(_stream_scores(lab, model))
        figures |= {"kept_before": found.before, "kept_after": found.after}
        _move_stream(model, found.order[0])
    figures["difference"] = require_same(lab, model)
    return lab.prune(model), figures


@contextmanager
def _more_rows() -> Iterator[None]:
    """Look at more rows than for the channels of one layer, for here are forty."""
    before = permute_search._ROWS
    permute_search._ROWS = _ROWS
    try:
        yield
    finally:
        permute_search._ROWS = before


@torch.no_grad()
def _stream_scores(lab: Lab, model: Any) -> Tensor:
    """What weights that read the stream are worth, (1, rows, channels), every layer alike."""
    moments = grams(lab, model)
    scores = []
    for layer in model.model.layers:
        for reader in readers(layer):
            gram = moments[id(reader)]
            score = reader.weight.square() * gram.diagonal()
            scores.append(score / energy(reader.weight, gram))
    return torch.cat(scores)[None]


@torch.no_grad()
def _move_stream(model: Any, order: Tensor) -> None:
    tables = {id(t.weight): t.weight for t in (model.model.embed_tokens, model.lm_head)}
    columns, rows = list(tables.values()), [model.model.norm.weight]
    for layer in model.model.layers:
        columns += [reader.weight for reader in readers(layer)]
        rows += [writer.weight for writer in writers(layer)]
        rows += [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
    for weight in columns:
        weight.copy_(weight[:, order])
    for weight in rows:
        weight.copy_(weight[order])
