"""ADMM on the local squared loss plus λ R(W), λ growing until every group is 2:4.

The W-step is exact with one Cholesky inverse, the Z-step is the exact prox (Kübler et al., arXiv
2501.18015). The schedule λ_k = λ0 · gᵏ / mean|W̃_row|, the splitting and the presets are this
project's own; the paper descends by proximal gradient steps, and its schedule is not public.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from prox24_deploy.pruning.solvers.admm_step import AdmmState, admm_step, has_admm_kernel
from prox24_deploy.pruning.solvers.factors import inverse_of
from prox24_deploy.pruning.solvers.problem import LayerProblem, plus_diagonal
from prox24_deploy.pruning.solvers.shares import WHOLE, Shares
from prox24_deploy.sparsity.pattern import final_mask, mask_24, unconverged_groups

# Iterates are projected and compared from where no more than this share of groups is not 2:4 yet.
_FEW = 0.25
# Up to so many weights a GPU takes less time for a step than launching it takes.
_SMALL = 4_000_000


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
        newton_iterations: of the eager prox, for small layers on a CPU and where there is no
            compiler; six change the pruned loss by less than 1e-6.
    """

    start: float
    growth: float
    rho: float
    max_iterations: int
    check_every: int = 5
    unconverged_fraction: float = 1e-3
    newton_iterations: int = 6


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
    steps = _Steps(problem, options, shares)
    best = _Best(problem)
    groups = shares.total(problem.start.numel() / 4)
    while steps.taken < options.max_iterations:
        steps.take(min(options.check_every, options.max_iterations - steps.taken))
        left = shares.total(unconverged_groups(steps.state.split))
        # With a fraction of zero, until there is none.
        last = steps.taken == options.max_iterations
        last |= left < max(options.unconverged_fraction * groups, 1)
        if last or left <= _FEW * groups:
            best.offer(steps.state.split, steps.state.weight)
        if last:
            break
    return best.weight, best.mask, steps.taken


class _Steps:
    """Steps of ADMM, which a GPU takes for a small layer as one CUDA graph.

    Attributes:
        state: behind the steps taken.
        taken: how many.
    """

    def __init__(self, problem: LayerProblem, options: AdmmOptions, shares: Shares) -> None:
        # The kernel walks over memory as it lies.
        start, self._linear = problem.start.contiguous(), problem.linear.contiguous()
        self._options = options
        self._inverse = inverse_of(plus_diagonal(problem.curvature, options.rho), shares)
        row_scale = start.abs().mean(1)
        # A zero row has no scale; any finite λ leaves it zero.
        self._base = options.start / torch.where(row_scale > 0, row_scale, 1.0)
        powers = [options.growth**step for step in range(options.max_iterations)]
        self._powers = torch.tensor(powers, dtype=start.dtype, device=start.device)[:, None]
        self.state = AdmmState(
            weight=torch.empty_like(start),
            split=start.clone(),
            dual=torch.zeros_like(start),
            target=self._linear + options.rho * start,
        )
        self.taken = 0
        self._graph: _Graph | None = None

    def take(self, count: int) -> None:
        """Take the next steps."""
        # λ / ρ of each, (count, rows).
        lam = self._base * self._powers[self.taken : self.taken + count] / self._options.rho
        small = len(self._base) * len(self._inverse) <= _SMALL
        if self._graph and self._graph.lam.shape == lam.shape:
            self._graph.replay(lam)
        elif self._graph is None and small and has_admm_kernel(self.state.weight):
            self._graph = _Graph(self.run, lam)
        else:
            self.run(lam)
        self.taken += count

    def run(self, lam: Tensor) -> None:
        """Run a step for each λ / ρ of (steps, rows)."""
        for each in lam:
            torch.mm(self.state.target, self._inverse, out=self.state.weight)
            admm_step(
                self.state, self._linear, each[:, None], self._options.rho,
                newton_iterations=self._options.newton_iterations,
            )  # fmt: skip


class _Graph:
    """Steps that allocate nothing as one CUDA graph; to make it takes the first of them.

    Attributes:
        lam: of the last steps, (steps, rows).
    """

    def __init__(self, run: Callable[[Tensor], None], lam: Tensor) -> None:
        self.lam = lam
        self._graph = torch.cuda.CUDAGraph()
        stream = _capture_stream(lam.device)
        stream.wait_stream(torch.cuda.current_stream(lam.device))
        with torch.cuda.device(lam.device), torch.cuda.stream(stream):
            # Compiles the kernel and makes the workspace of products on this stream.
            run(lam)
            # Other threads of this process may copy to the GPU meanwhile.
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                run(lam)
            finally:
                self._graph.capture_end()
        torch.cuda.current_stream(lam.device).wait_stream(stream)

    def replay(self, lam: Tensor) -> None:
        """Take the next steps with λ / ρ of (steps, rows)."""
        self.lam.copy_(lam)
        self._graph.replay()


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs of a GPU, for each stream keeps a workspace of its own."""
    return torch.cuda.Stream(device)


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
