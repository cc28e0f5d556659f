"""What lies between two W-steps of ADMM: on a GPU one kernel, elsewhere its parts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from prox24_deploy.pruning.solvers.kernels import has_triton
from prox24_deploy.pruning.solvers.prox import prox_24


@dataclass(slots=True)
class AdmmState:
    """What one step of ADMM leaves for the next, all (rows, 4 n).

    Attributes:
        weight: W, of the W-step.
        split: Z, of the Z-step.
        dual: U.
        target: what the inverse is multiplied by in the next W-step.
    """

    weight: Tensor
    split: Tensor
    dual: Tensor
    target: Tensor


def admm_step(
    state: AdmmState, linear: Tensor, lam: Tensor, rho: float, *, newton_iterations: int = 12
) -> None:
    """Take the Z-step, update the dual and make the target of the next W-step.

    Z = prox(W + U), U' = W + U - Z and B + ρ (Z - U') take the places of Z, U and the target. A GPU
    writes them into the memory that the state has.

    Args:
        state: as the W-step left it.
        linear: B, same shape, of the quadratic ½ tr(W A Wᵀ) - tr(W Bᵀ).
        lam: λ / ρ, (rows, 1).
        rho: ρ, of the W-step (A + ρ I)⁻¹.
        newton_iterations: see `prox_24`.
    """
    if has_admm_kernel(state.weight):
        from prox24_deploy.pruning.solvers.prox_cuda import admm_step_cuda

        admm_step_cuda(state, linear, lam.reshape(-1), rho)
        return
    state.dual.add_(state.weight)
    state.split = prox_24(state.dual, lam, newton_iterations=newton_iterations)
    state.dual.sub_(state.split)
    torch.sub(state.split, state.dual, out=state.target).mul_(rho).add_(linear)


def has_admm_kernel(weight: Tensor) -> bool:
    """Whether a step of ADMM on such weights is one kernel."""
    return weight.dtype == torch.float32 and has_triton(weight)
