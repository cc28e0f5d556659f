"""Prune one layer to 2:4: prox-ADMM, refined on its mask, guarded by a baseline."""

from dataclasses import dataclass

from torch import Tensor

from prox24_deploy.core.types import Method, Preset, Refinement
from prox24_deploy.pruning.solvers.admm import AdmmOptions, prox_admm
from prox24_deploy.pruning.solvers.baselines import magnitude_mask, sparsegpt, wanda_mask
from prox24_deploy.pruning.solvers.ista import IstaOptions, ista
from prox24_deploy.pruning.solvers.problem import LayerProblem
from prox24_deploy.pruning.solvers.refine import masked_conjugate_gradient, masked_gradient
from prox24_deploy.pruning.solvers.shares import WHOLE, Shares
from prox24_deploy.sparsity.pattern import is_24, mask_24

PRESETS: dict[Preset, AdmmOptions] = {
    "fast": AdmmOptions(start=0.05, growth=1.2, rho=1.0, max_iterations=105),
    "default": AdmmOptions(start=0.02, growth=1.1, rho=1.0, max_iterations=225),
    "best": AdmmOptions(start=0.01, growth=1.05, rho=0.7, max_iterations=450),
}


_PAPER = IstaOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSolution:
    """A pruned layer.

    Attributes:
        weight: (rows, d), 2:4 along d, +0.0 outside the mask, in the units of the given weights.
        mask: (rows, d) bool, two True per group; a kept weight may be zero.
        iterations: solver iterations, 0 for one-shot methods.
        used: the method whose result this is: the one asked for, "unchanged" for weights that were
            2:4 already, "sparsegpt" where it beat the prox on the damped loss, or "mask".
    """

    weight: Tensor
    mask: Tensor
    iterations: int
    used: str


def solve_layer(
    weight: Tensor,
    problem: LayerProblem,
    *,
    method: Method = "prox",
    options: AdmmOptions = PRESETS["default"],
    ista_options: IstaOptions = _PAPER,
    refinement: Refinement = "auto",
    fixed: Tensor | None = None,
    shares: Shares = WHOLE,
) -> LayerSolution:
    """Prune the rows of one problem to 2:4.

    Args:
        weight: W0, (rows, d), d a multiple of four, as given to `layer_problem`.
        problem: its quadratic.
        method: "prox", the paper's literal "ista", or a baseline.
        options: schedule of "prox".
        ista_options: schedule of "ista".
        refinement: of the kept weights on the mask found: conjugate gradients, the masked gradient
            steps of the paper, or "none", which leaves the method's own weights. "auto" takes the
            gradient for "ista" and conjugate gradients for all others.
        fixed: a mask made elsewhere, (rows, d) bool, which takes the place of the method.
        shares: the part of this process, if `weight` holds only some rows of the layers; all
            processes must call this function.

    Returns:
        The solution. Weights that are 2:4 already, by `fixed` if there is one, come back
        bit-identical.

    Raises:
        ValueError: d is not a multiple of four.
    """
    if shares.total(0.0 if is_solved(weight, fixed) else 1.0) == 0:
        mask = mask_24(weight.abs()) if fixed is None else fixed
        return LayerSolution(weight=weight, mask=mask, iterations=0, used="unchanged")
    if fixed is not None:
        start = problem.start.masked_fill(~fixed, 0.0)
        kind = "conjugate-gradient" if refinement == "auto" else refinement
        return _solution(problem, fixed, _refine(problem, fixed, start, kind), 0, "mask")
    if refinement == "auto":
        refinement = "gradient" if method == "ista" else "conjugate-gradient"
    candidate, mask, iterations = _propose(problem, method, options, ista_options, shares)
    found = _solution(
        problem, mask, _refine(problem, mask, candidate, refinement), iterations, method
    )
    return _guarded(problem, found, refinement, shares) if method == "prox" else found


def _guarded(
    problem: LayerProblem, found: LayerSolution, refinement: Refinement, shares: Shares
) -> LayerSolution:
    """The solution, or that of SparseGPT where that has the lower damped loss before refinement."""
    rival, mask = sparsegpt(problem)
    own = found.weight * problem.scale
    losses = [shares.total(float(problem.loss(each).sum())) for each in (rival, own)]
    if losses[0] >= losses[1]:
        return found
    better = _refine(problem, mask, rival, refinement)
    return _solution(problem, mask, better, found.iterations, "sparsegpt")


def is_solved(weight: Tensor, fixed: Tensor | None = None) -> bool:
    """Whether weights (rows, d) are 2:4 already, by a mask that was made elsewhere if there is one.

    Raises:
        ValueError: d is not a multiple of four.
    """
    return is_24(weight) and (fixed is None or not bool((weight.masked_fill(fixed, 0) != 0).any()))


def _solution(
    problem: LayerProblem, mask: Tensor, candidate: Tensor, iterations: int, used: str
) -> LayerSolution:
    result = problem.to_weight(candidate).masked_fill(~mask | problem.dead, 0.0)
    return LayerSolution(weight=result, mask=mask, iterations=iterations, used=used)


def _propose(
    problem: LayerProblem,
    method: Method,
    options: AdmmOptions,
    ista_options: IstaOptions,
    shares: Shares,
) -> tuple[Tensor, Tensor, int]:
    """Return normalised weights, mask and iterations of one method, before refinement."""
    match method:
        case "prox":
            return prox_admm(problem, options, shares)
        case "ista":
            return ista(problem, ista_options, shares)
        case "sparsegpt":
            weight, mask = sparsegpt(problem)
            return weight, mask, 0
        case "wanda" | "magnitude":
            mask = wanda_mask(problem) if method == "wanda" else magnitude_mask(problem)
            return problem.start.masked_fill(~mask, 0.0), mask, 0


def _refine(problem: LayerProblem, mask: Tensor, start: Tensor, kind: Refinement) -> Tensor:
    match kind:
        case "none":
            return start
        case "gradient":
            return masked_gradient(problem, mask, start)
        case _:
            return masked_conjugate_gradient(problem, mask, start)
