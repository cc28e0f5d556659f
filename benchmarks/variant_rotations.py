"""Rotations that the weights absorb: one of the residual stream, one of each head of values.

That of the residual stream is what `rotate` finds, or random (Hadamard with random signs). The
values of each head are rotated likewise between v_proj and o_proj. With an order, the channels
within blocks are put into one behind that, as `--permute auto` does.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from variant_lab import Figures, Lab, order_channels

from prox24_deploy.core.types import silent
from prox24_deploy.data.text import thin
from prox24_deploy.model.blocks import run_model
from prox24_deploy.rotation.learning import Side, learned, score_of, sides_of
from prox24_deploy.rotation.rotate import TOKENS
from prox24_deploy.rotation.stream import find_stream, fold_norms, rotate_stream

# Relative to the largest logit; rounding in float32 is far below, and a wrong rotation far above.
_ALIKE = 1e-4


@torch.no_grad()
def rotated(
    lab: Lab, *, stream: str, heads: bool, order: bool = False
) -> tuple[nn.Module, Figures]:
    """Rotate the dense model, prove that it computes the same, and prune it.

    Args:
        lab: the model and its texts.
        stream: of the residual stream: "none", "hadamard" or "learned".
        heads: whether the values of each head are rotated, too, as learned.
        order: whether channels within blocks then come in a better order.

    Raises:
        AssertionError: the rotated model computes something else.
    """
    model, figures = deepcopy(lab.dense), Figures()
    found = find_stream(model, lab.recipe)
    fold_norms(found)
    if heads:
        attention = _attention(model, grams(lab, model))
        totals = [_rotate_heads(layer, each, lab.turns // 2) for layer, each in attention]
        sums = torch.tensor(totals).mean(0).tolist()
        figures |= {"heads_dropped_before": sums[0], "heads_dropped_after": sums[1]}
    if stream != "none":
        sides = sides_of(model, found, thin(lab.context.calibration, TOKENS), lab.recipe.task)
        turn = _hadamard(found.width, lab.device)
        if stream == "learned":
            turn = learned(sides, found.width, lab.turns, silent)
        figures |= {f"dropped_{k}": v for k, v in _scores(sides, turn.float()).items()}
        rotate_stream(found, turn)
    if order:
        order_channels(lab, model)
    figures["difference"] = require_same(lab, model)
    return lab.prune(_stored(model, lab)), figures


def require_same(lab: Lab, model: nn.Module) -> float:
    """Largest difference of the logits over the largest logit, on one batch of calibration text."""
    batch = lab.calibration[0]
    with torch.no_grad():
        first, second = (run_model(m, batch, lab.recipe.task).logits for m in (lab.dense, model))
    difference = float((first - second).abs().max() / first.abs().max())
    assert difference < _ALIKE, f"the rotated model differs by {difference:.2g}"
    return difference


@torch.no_grad()
def _stored(model: nn.Module, lab: Lab) -> nn.Module:
    """The model with every value rounded to the dtype that most of the checkpoint has."""
    dtypes = [each.dtype for each in lab.context.source.tensors.values()]
    dtype = max(set(dtypes), key=dtypes.count)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    return model


@torch.no_grad()
def grams(lab: Lab, model: nn.Module) -> dict[int, Tensor]:
    """E[x xᵀ] of what each layer of the blocks reads, by its identity."""
    found: dict[int, Tensor] = {}

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].flatten(0, -2)
        gram = rows.T @ rows / len(rows)
        found[id(layer)] = found[id(layer)] + gram if id(layer) in found else gram

    some = lab.calibration[:: max(1, len(lab.calibration) // 4)]
    blocks: Any = model
    with ExitStack() as stack:
        for layer in blocks.model.layers.modules():
            if isinstance(layer, nn.Linear):
                stack.callback(layer.register_forward_pre_hook(note).remove)
        for batch in some:
            run_model(model, batch, lab.recipe.task)
    return {key: gram / len(some) for key, gram in found.items()}


def readers(layer: Any) -> tuple[nn.Linear, ...]:
    """What of a block reads the residual stream."""
    attention, mlp = layer.self_attn, layer.mlp
    return attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj


def writers(layer: Any) -> tuple[nn.Linear, ...]:
    """What of a block writes it."""
    return layer.self_attn.o_proj, layer.mlp.down_proj


def _reader(weight: Tensor, gram: Tensor) -> Side:
    return Side(weights=(weight,), moments=gram, energies=(energy(weight, gram),))


def _writer(weight: Tensor, gram: Tensor) -> Side:
    moments = gram.diagonal()
    return Side(weights=(weight,), moments=moments, energies=(energy(weight, gram),))


def energy(weight: Tensor, gram: Tensor) -> float:
    return float(((weight @ gram) * weight).sum())


def _attention(model: Any, grams: dict[int, Tensor]) -> list[tuple[Any, tuple[Tensor, Tensor]]]:
    """Each attention with the Gram matrices of what v_proj and o_proj read."""
    found = [layer.self_attn for layer in model.model.layers]
    return [(each, (grams[id(each.v_proj)], grams[id(each.o_proj)])) for each in found]


@torch.no_grad()
def _rotate_heads(attention: Any, grams: tuple[Tensor, Tensor], turns: int) -> tuple[float, float]:
    """Rotate the values of each head as learned; returns what is dropped, before and after."""
    width = attention.head_dim
    values, outputs = attention.v_proj.weight, attention.o_proj.weight
    heads = len(values) // width
    sharing = outputs.shape[1] // len(values)
    before = after = 0.0
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        reads = [
            slice(i * width, (i + 1) * width) for i in range(head * sharing, (head + 1) * sharing)
        ]
        sides = [_writer(values[own], grams[0])]
        sides += [_reader(outputs[:, part], grams[1][part, part]) for part in reads]
        turn = learned(sides, width, turns, silent).float()
        scores = _scores(sides, turn)
        before, after = before + scores["before"] / heads, after + scores["after"] / heads
        values[own] = turn.T @ values[own]
        for part in reads:
            outputs[:, part] = outputs[:, part] @ turn
    return before, after


def _scores(sides: Sequence[Side], turn: Tensor) -> dict[str, float]:
    eye = torch.eye(len(turn), device=turn.device)
    return {"before": score_of(sides, eye), "after": score_of(sides, turn)}


def _hadamard(size: int, device: torch.device) -> Tensor:
    """A Hadamard matrix with random signs, whose size must be a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    if len(matrix) != size:
        raise ValueError(f"{size} channels are no power of two")
    signs = torch.randint(2, (size, 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return (signs * matrix / math.sqrt(size)).double().to(device)
