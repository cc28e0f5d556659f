"""Second moments of layer inputs: plain, cross and dense Gram matrices."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class SecondMoments:
    """Sums over tokens for one group of layers that share their input.

    Products are taken in float32, whatever the model computes in, and summed in float64.

    Attributes:
        pruned: X_pᵀX_p, (d, d), inputs in the partly pruned model.
        cross: X_dᵀX_p, (d, d), dense against pruned inputs of the same tokens.
        dense: X_dᵀX_d, (d, d).
        tokens: rows summed.
    """

    pruned: Tensor
    cross: Tensor
    dense: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, features: int, device: torch.device) -> "SecondMoments":
        """All zero, for inputs with `features` columns."""
        zeros = [torch.zeros(features, features, dtype=torch.float64, device=device) for _ in "123"]
        return cls(zeros[0], zeros[1], zeros[2])

    def add(self, dense: Tensor, pruned: Tensor) -> None:
        """Add the rows of one batch, both (tokens, d), padding already removed."""
        dense, pruned = dense.float(), pruned.float()
        self.pruned += pruned.T @ pruned
        self.cross += dense.T @ pruned
        self.dense += dense.T @ dense
        self.tokens += len(pruned)

    def relative_error(self, before: Tensor, after: Tensor) -> float:
        """‖X_d W0ᵀ - X_p Wᵀ‖² / ‖X_d W0ᵀ‖² for weights (rows, d); 0 where the dense output is 0."""
        w0, w1 = before.double(), after.double()
        reference = float(((w0 @ self.dense) * w0).sum())
        mixed = float(((w0 @ self.cross) * w1).sum())
        own = float(((w1 @ self.pruned) * w1).sum())
        # Rounding may leave a tiny negative sum; NaN stays NaN, so that nothing broken looks good.
        return max(reference - 2 * mixed + own, 0.0) / reference if reference != 0 else 0.0
