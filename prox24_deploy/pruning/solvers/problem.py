"""The local squared loss of one linear layer in diagonally normalised units.

With inputs X_p of the pruned model, X_d of the dense one and weights W0, the layer is asked to
minimise ½‖X_d W0ᵀ - X_p Wᵀ‖² / tokens + ½ δ ‖(W - W0) n‖², n = √diag(H), H = X_pᵀX_p / tokens. In
normalised weights W̃ = W n this is the quadratic

    f(W̃) = ½ tr(W̃ A W̃ᵀ) - tr(W̃ Bᵀ),   A = H/(n nᵀ) + δ I,   B = (W0 C)/n + δ W̃0,

with C = X_dᵀX_p / tokens; C = H gives the symmetric target (dense weights on pruned inputs). Rows
of W are independent.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prox24_deploy.pruning.solvers.products import ExactFactor

MIN_DAMPING, MAX_DAMPING = 0.01, 0.3
# Columns of second moments that are normalised at a time.
_STRIP = 2048
# Damping that one token per feature asks for.
_DAMPING = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProblem:
    """One quadratic per row, sharing `curvature`.

    Attributes:
        start: W̃0, (rows, d), float32; zero in the columns of dead features.
        curvature: A, (d, d), symmetric positive definite, diagonal 1 + δ.
        linear: B, (rows, d).
        scale: n, (d,), positive; 1 for a dead feature.
        dead: (d,) bool, features that calibration never activated.
    """

    start: Tensor
    curvature: Tensor
    linear: Tensor
    scale: Tensor
    dead: Tensor

    def loss(self, candidate: Tensor) -> Tensor:
        """Evaluate f, up to a constant, for normalised weights (rows, d): one value per row."""
        return ((0.5 * candidate @ self.curvature - self.linear) * candidate).sum(1)

    def to_weight(self, candidate: Tensor) -> Tensor:
        """Undo the normalisation: W = W̃ / n, (rows, d)."""
        return candidate / self.scale

    def unscaled(self) -> "LayerProblem":
        """The same minimisation in the units of the weights, its mean diagonal brought to 1."""
        curvature = self.curvature * (self.scale[:, None] * self.scale[None, :])
        size = curvature.diagonal().mean()
        return LayerProblem(
            start=self.start / self.scale,
            curvature=curvature / size,
            linear=self.linear * self.scale / size,
            scale=torch.ones_like(self.scale),
            dead=self.dead,
        )

    def largest_curvature(self) -> float:
        """L, the largest eigenvalue of A; gradient steps of 1/L never raise the loss."""
        return float(torch.linalg.eigvalsh(self.curvature)[-1])


def damping_for(features: int, tokens: int) -> float:
    """Damping δ in normalised units: clip(0.4 · d_in / tokens, 0.01, 0.3)."""
    return min(max(_DAMPING * features / max(tokens, 1), MIN_DAMPING), MAX_DAMPING)


def missing_tokens(features: int, tokens: int) -> float:
    """How many tokens a layer lacks that so few were routed to: max(0.4 · d_in - 0.3 · tokens, 0).

    From 4/3 tokens per feature on it is 0. With fewer, damping as strong as they ask for would be
    beyond its limit; the rest of it, 0.4 · d_in / tokens - 0.3, times the tokens, is this number.
    """
    return max(_DAMPING * features - MAX_DAMPING * tokens, 0.0)


def layer_problem(
    weight: Tensor, gram: Tensor, damping: float, cross: Tensor | None = None, *, tokens: int = 1
) -> LayerProblem:
    """Build the normalised quadratic of one layer, or of several layers that share inputs.

    Args:
        weight: W0, (rows, d), rows of one layer or of several stacked.
        gram: H, (d, d), of any positive scale.
        damping: δ > 0, the strength of the pull towards W0.
        cross: C, (d, d) = X_dᵀX_p on the scale of `gram`; None for the symmetric target.
        tokens: what both are divided by.

    Raises:
        ValueError: a value is NaN or infinite, or the diagonal of H is negative.
    """
    for name, tensor in (("weight", weight), ("gram", gram), ("cross gram", cross)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"the {name} matrix holds NaN or infinity")
    diagonal = gram.diagonal().double() / tokens
    if bool((diagonal < 0).any()):
        raise ValueError("the gram matrix has a negative diagonal")
    dead = diagonal == 0
    scale = torch.where(dead, 1.0, diagonal.sqrt())
    start = (weight.double() * scale).float().masked_fill(dead, 0.0)
    linear = torch.empty_like(start)
    for strip, target in _normalised(gram if cross is None else cross, scale, tokens):
        linear[:, strip] = ExactFactor.of(target).after(start)
    curvature = torch.empty_like(gram, dtype=torch.float32)
    for strip, normal in _normalised(gram, scale, tokens):
        curvature[:, strip] = normal
    curvature.diagonal().add_(damping)
    return LayerProblem(
        start=start,
        curvature=curvature,
        linear=linear.masked_fill_(dead, 0.0).add_(damping * start),
        scale=scale.float(),
        dead=dead,
    )


def plus_diagonal(matrix: Tensor, value: float) -> Tensor:
    """The matrix plus a multiple of the identity."""
    result = matrix.clone()
    result.diagonal().add_(value)
    return result


def _normalised(moments: Tensor, scale: Tensor, tokens: int) -> Iterator[tuple[slice, Tensor]]:
    """Second moments (d, d) in units of the scale of either feature, float32.

    Some columns at a time, for a matrix of a wide layer is large.
    """
    for begin in range(0, len(scale), _STRIP):
        strip = slice(begin, min(begin + _STRIP, len(scale)))
        outer = scale[:, None] * scale[None, strip]
        yield strip, (moments[:, strip].double() / tokens / outer).float()
