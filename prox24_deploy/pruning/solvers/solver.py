"""Prune one layer to 2:4: prox-ADMM, refined on its mask, guarded by a baseline.

The method minimises the local squared loss plus λ R(W) for a growing λ (Kübler et al., arXiv
2501.18015) by ADMM: the W-step is exact with one Cholesky inverse, the Z-step is the exact prox.
The schedule λ_k = λ0 · gᵏ / mean|W̃_row|, the splitting and the presets are this project's own; the
paper descends by proximal gradient steps, and its schedule is not public.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from prox24_deploy.core.types import Method, Preset, Refinement
from prox24_deploy.pruning.solvers.baselines import magnitude_mask, sparsegpt, wanda_mask
from prox24_deploy.pruning.solvers.factors import inverse_of
from prox24_deploy.pruning.solvers.ista import IstaOptions, ista
from prox24_deploy.pruning.solvers.problem import LayerProblem, plus_diagonal
from prox24_deploy.pruning.solvers.prox import admm_step
from prox24_deploy.pruning.solvers.refine import masked_conjugate_gradient, masked_gradient
from prox24_deploy.pruning.solvers.shares import WHOLE, Shares
from prox24_deploy.sparsity.pattern import final_mask, is_24, mask_24, unconverged_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmmOptions:
    """Schedule of the prox-ADMM solver.

    Attributes:
        start: λ0 in units of 1 / mean |W̃_row|.
        growth: factor g on λ per iteration, > 1.
        rho: ADMM penalty relative to the unit diagonal of the normalised Gram matrix.
        max_iterations: hard cap; groups that are not 2:4 by then are projected.
        check_every: iterations between tests for convergence.
        unconverged_fraction: stop early once fewer groups than this fraction are not yet 2:4.
        newton_iterations: of the prox; six change the pruned loss by less than 1e-6.
    """

    start: float
    growth: float
    rho: float
    max_iterations: int
    check_every: int = 5
    unconverged_fraction: float = 1e-3
    newton_iterations: int = 6


PRESETS: dict[Preset, AdmmOptions] = {
    "fast": AdmmOptions(start=0.05, growth=1.2, rho=1.0, max_iterations=105),
    "default": AdmmOptions(start=0.02, growth=1.1, rho=1.0, max_iterations=225),
    "best": AdmmOptions(start=0.01, growth=1.05, rho=0.7, max_iterations=450),
}


_PAPER = IstaOptions()
# Iterates are projected and compared from where no more than this share of groups is not 2:4 yet.
_FEW = 0.25


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
    """The solution, or that of SparseGPT, refined alike, where it has the lower damped loss."""
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


def prox_admm(
    problem: LayerProblem, options: AdmmOptions, shares: Shares = WHOLE
) -> tuple[Tensor, Tensor, int]:
    """Minimise the quadratic plus λ R with λ growing until every group is 2:4.

    ADMM on a function that is not convex need not descend. Of the iterates at which convergence is
    tested, projected to 2:4, each row takes the one with the lowest loss. An iterate of which much
    is not 2:4 yet is not among them: projected it is worse than those after it.

    Returns:
        (weights, mask, iterations): normalised weights (rows, d), not yet refined, masked.
    """
    rho = options.rho
    inverse = inverse_of(plus_diagonal(problem.curvature, rho), shares)
    row_scale = problem.start.abs().mean(1, keepdim=True)
    # A zero row has no scale; any finite λ leaves it zero.
    base = options.start / torch.where(row_scale > 0, row_scale, 1.0)
    weight = split = problem.start
    dual, target = torch.zeros_like(split), problem.linear + rho * split
    steps, iterations = options.newton_iterations, 0
    best = _Best(problem)
    groups = shares.total(split.numel() / 4)
    while iterations < options.max_iterations:
        lam = base * options.growth**iterations
        weight = target @ inverse
        split, dual, target = admm_step(
            weight, dual, problem.linear, lam / rho, rho, newton_iterations=steps
        )
        iterations += 1
        last = iterations == options.max_iterations
        if iterations % options.check_every == 0 or last:
            left = shares.total(unconverged_groups(split))
            # With a fraction of zero, until there is none.
            last |= left < max(options.unconverged_fraction * groups, 1)
            if last or left <= _FEW * groups:
                best.offer(split, weight)
        if last:
            break
    return best.weight, best.mask, iterations


class _Best:
    """The best 2:4 weights of every row so far, by loss; those of magnitude before any offer."""

    def __init__(self, problem: LayerProblem) -> None:
        self._problem = problem
        self.mask = mask_24(problem.start.abs())
        self.weight = problem.start.masked_fill(~self.mask, 0.0)
        self._loss = torch.full_like(problem.start[:, 0], torch.inf)

    def offer(self, iterate: Tensor, fallback: Tensor) -> None:
        """Project an iterate and keep the rows that are better than before."""
        mask = final_mask(iterate, fallback)
        weight = iterate.masked_fill(~mask, 0.0)
        loss = self._problem.loss(weight)
        better = loss <= self._loss
        self._loss = torch.where(better, loss, self._loss)
        self.weight = torch.where(better[:, None], weight, self.weight)
        self.mask = torch.where(better[:, None], mask, self.mask)
