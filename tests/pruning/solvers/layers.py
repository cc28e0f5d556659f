"""Random layers with correlated inputs, as calibration would give them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from prox24_deploy.pruning.solvers.problem import LayerProblem, layer_problem


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights (rows, d), inputs (tokens, d) to prune on and as many held out."""

    weight: Tensor
    inputs: Tensor
    held_out: Tensor

    @property
    def gram(self) -> Tensor:
        """XᵀX / tokens, (d, d)."""
        return self.inputs.T @ self.inputs / len(self.inputs)

    def problem(self, damping: float = 0.01) -> LayerProblem:
        """Its quadratic with the symmetric target."""
        return layer_problem(self.weight, self.gram, damping)

    def held_out_error(self, weight: Tensor) -> float:
        """‖X (W - W0)ᵀ‖² / ‖X W0ᵀ‖² on the held-out inputs."""
        change = (self.held_out @ (weight - self.weight).T).square().sum()
        return float(change / (self.held_out @ self.weight.T).square().sum())


def correlated_layer(
    rows: int = 48, features: int = 64, tokens: int = 2048, seed: int = 0
) -> Layer:
    """Inputs share a few strong factors and differ in scale, like those of a transformer."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(features // 4, features, generator=generator)
    scale = torch.randn(features, generator=generator).mul(0.7).exp()

    def draw() -> Tensor:
        hidden = torch.randn(tokens, features // 4, generator=generator)
        noise = torch.randn(tokens, features, generator=generator)
        return (hidden @ factors + noise) * scale

    weight = torch.randn(rows, features, generator=generator)
    return Layer(weight, draw(), draw())
