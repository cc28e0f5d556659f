"""Rotations that the weights absorb: one of the residual stream, one of each head of values.

Once the weights of the norms are folded into the matrices behind them, a Llama computes the same
with its residual stream in any orthonormal basis: embeddings and the layers that read or write the
stream are multiplied by Q, and a tied output layer becomes one of its own. The values of each head
may be rotated likewise between v_proj and o_proj. The rotations are random (Hadamard with random
signs), or descend from the identity on what the weights that 2:4 drops are worth.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from variant_lab import Figures, Lab

from prox24_deploy.model.blocks import run_model

# Relative to the largest logit; rounding in float32 is far below, and a wrong rotation far above.
_ALIKE = 1e-4
# Of the Gram matrices, relative to their mean diagonal.
_DAMPING = 0.01
# Root mean square of an element of the first step's generator, times √d, and the decay of momentum.
_STEP, _MOMENTUM = 0.05, 0.9
# Of the rows that score a rotation every so many are looked at in a step, others in the next.
_STRIDE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A matrix as a rotation Q of n channels changes it, for scores.

    Attributes:
        weight: (rows, n) of one that reads, W Q; (n, columns) of one that writes, Qᵀ W.
        moments: E[x xᵀ] of what a reader reads, (n, n); E[x²] of what a writer reads, (columns,).
        energy: what its output is worth, by which its score is divided.
    """

    weight: Tensor
    moments: Tensor
    energy: float

    @property
    def reads(self) -> bool:
        """Whether the channels are its inputs."""
        return self.moments.ndim == 2


def rotated(lab: Lab, *, stream: str, heads: bool) -> tuple[nn.Module, Figures]:
    """Rotate the dense model, prove that it computes the same, and prune it.

    Args:
        lab: the model and its texts.
        stream: of the residual stream: "none", "hadamard" or "learned".
        heads: whether the values of each head are rotated, too, as learned.

    Raises:
        AssertionError: the rotated model computes something else.
    """
    model, figures = _folded(lab.dense), Figures()
    if heads:
        found = _attention(model, grams(lab, model))
        totals = [_rotate_heads(layer, each, lab.turns // 2) for layer, each in found]
        sums = torch.tensor(totals).mean(0).tolist()
        figures |= {"heads_dropped_before": sums[0], "heads_dropped_after": sums[1]}
    if stream != "none":
        moments = grams(lab, model)
        sides = _stream_sides(model, moments)
        turn = _learned(sides, lab.turns) if stream == "learned" else _hadamard(sides)
        figures |= {f"dropped_{k}": v for k, v in _scores(sides, turn).items()}
        _rotate_stream(model, turn)
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
def _folded(dense: nn.Module) -> nn.Module:
    """A copy whose norms have weights of 1, and whose output layer is its own."""
    model: Any = deepcopy(dense)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _fold(layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj))
        _fold(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj))
    _fold(model.model.norm, (model.lm_head,))
    folded: nn.Module = model
    return folded


def _fold(norm: Any, behind: Sequence[nn.Linear]) -> None:
    for reader in behind:
        reader.weight.mul_(norm.weight)
    norm.weight.fill_(1)


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


def _stream_sides(model: Any, grams: dict[int, Tensor]) -> list[Side]:
    """Every matrix of the blocks, as a rotation of the stream changes it."""
    sides = []
    for layer in model.model.layers:
        sides += [_reader(each.weight, grams[id(each)]) for each in readers(layer)]
        sides += [_writer(each.weight, grams[id(each)]) for each in writers(layer)]
    return sides


def _reader(weight: Tensor, gram: Tensor) -> Side:
    return Side(weight=weight, moments=gram, energy=energy(weight, gram))


def _writer(weight: Tensor, gram: Tensor) -> Side:
    return Side(weight=weight, moments=gram.diagonal(), energy=energy(weight, gram))


def energy(weight: Tensor, gram: Tensor) -> float:
    return float(((weight @ gram) * weight).sum())


@torch.no_grad()
def _rotate_stream(model: Any, turn: Tensor) -> None:
    for table in (model.model.embed_tokens, model.lm_head):
        table.weight.copy_(table.weight @ turn)
    for layer in model.model.layers:
        for each in readers(layer):
            each.weight.copy_(each.weight @ turn)
        for each in writers(layer):
            each.weight.copy_(turn.T @ each.weight)


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
        turn = _learned(sides, turns)
        scores = _scores(sides, turn)
        before, after = before + scores["before"] / heads, after + scores["after"] / heads
        values[own] = turn.T @ values[own]
        for part in reads:
            outputs[:, part] = outputs[:, part] @ turn
    return before, after


@torch.no_grad()
def _scores(sides: Sequence[Side], turn: Tensor) -> dict[str, float]:
    score = _score(sides)
    eye = torch.eye(len(turn), device=turn.device)
    return {"before": float(score(eye, None)), "after": float(score(turn, None))}


def _hadamard(sides: Sequence[Side]) -> Tensor:
    """A Hadamard matrix with random signs, whose size must be a power of two."""
    size = next(len(side.moments) for side in sides if side.reads)
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    if len(matrix) != size:
        raise ValueError(f"{size} channels are no power of two")
    signs = torch.randint(2, (size, 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return (signs * matrix / math.sqrt(size)).to(sides[0].weight.device)


def _score(sides: Sequence[Side]) -> Callable[[Tensor, int | None], Tensor]:
    """What 2:4 drops of the scores w² E[x²], over what the outputs of a layer are worth."""

    def dropped(turn: Tensor, begin: int | None) -> Tensor:
        part = slice(None) if begin is None else slice(begin, None, _STRIDE)
        total = turn.new_zeros(())
        for side in sides:
            if side.reads:
                sizes = ((side.moments @ turn) * turn).sum(0)
                squares = (side.weight[part] @ turn).square() * sizes
            else:
                cells = side.weight.unflatten(1, (-1, 4))[:, part].flatten(1)
                sizes = side.moments.unflatten(0, (-1, 4))[part].flatten()
                squares = (turn.T @ cells).square() * sizes
            total = total + _two_smallest(squares).sum() / side.energy
        return total / len(sides) * (1 if begin is None else _STRIDE)

    return dropped


def _two_smallest(scores: Tensor) -> Tensor:
    """Sum of the two smallest of each four along the last axis."""
    a, b, c, d = scores.unflatten(-1, (-1, 4)).unbind(-1)
    first, second = torch.minimum(a, b), torch.minimum(c, d)
    return torch.minimum(first + second, torch.minimum(a + b, c + d))


@torch.enable_grad()
def _learned(sides: Sequence[Side], turns: int) -> Tensor:
    """Descend on the score over rotations, by Cayley steps with momentum from the identity."""
    score = _score(sides)
    size = next(len(side.moments) for side in sides if side.reads)
    eye = torch.eye(size, device=sides[0].weight.device)
    turn, momentum = eye, torch.zeros_like(eye)
    for number in range(turns):
        free = turn.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(score(free, number % _STRIDE), free)
        tangent = turn.T @ gradient
        momentum = _MOMENTUM * momentum + tangent - tangent.T
        length = _STEP * (0.5 + 0.5 * math.cos(math.pi * number / turns))
        scale = momentum.square().mean().sqrt() * math.sqrt(size)
        if not float(scale):
            break
        step = -0.5 * length * momentum / scale
        turn = turn @ torch.linalg.solve(eye - step, eye + step)
    # Rounding of many products is taken out: the nearest orthonormal matrix.
    left, _, right = torch.linalg.svd(turn.double())
    nearest: Tensor = (left @ right).float()
    return nearest
