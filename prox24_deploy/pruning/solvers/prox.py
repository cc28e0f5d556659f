"""The exact proximal operator of the 2:4 regulariser, vectorised over groups.

A group is four consecutive weights w = (w1, w2, w3, w4). Its regulariser

    R(w) = |w1 w2 w3| + |w2 w3 w4| + |w3 w4 w1| + |w4 w1 w2|

is zero exactly on 2:4-sparse groups. The operator returns argmin_w ½|w - z|² + λ R(w).

Source: Kübler et al., *A Proximal Operator for Inducing 2:4-Sparsity*, TMLR 2025, arXiv 2501.18015.
The paper splits the problem by the number of non-zeros; the reduction of each part to one scalar
Newton equation below is this project's own derivation:

* y = λ|z|, u = λ|w| scales λ to 1. Groups are sorted, y1 ≥ y2 ≥ y3 ≥ y4 ≥ 0; the minimiser keeps
  the order and the signs.
* Two non-zeros: u = (y1, y2, 0, 0). It is the minimiser whenever y1 > 2 or y3 = 0, without work.
* Three: with S = y1 + y2, D = y1 - y2 and t = u3, stationarity gives u1,2 = ½(S/(1+t) ± D/(1-t))
  and φ(t) = t - y3 + ¼(S²/(1+t)² - D²/(1-t)²) = 0. φ is convex on [0, tc], tc = (√S-√D)/(√S+√D),
  and φ(min(y3, tc)) ≥ 0, so Newton from there is monotone.
* Four: with p = u4 + ½, a = y4 + ¼ - ½Σy, d_i = y_i - y4 and T = ½(p + a/p), stationarity gives
  u_i = ½(p - a/p - 1) + √(d_i + T²) and Θ(p) = ½(3p - a/p) + Σ_{i<4} √(d_i + T²) - 2 = 0; Newton
  starts at p = ½ + min(y4, ½).

On each support the problem is convex where its Hessian is positive semidefinite, so each has at
most one local minimiser and comparing the three objective values is exact. One exact coordinate
sweep at the end never increases the objective and restores relative accuracy for tiny y.

The compiled forms leave out what cannot be best:

* Three, by a bound. Let V(t) be the objective with u3 = t, u4 = 0 and the best u1 and u2. V' = φ,
  and V(0) is that of two. φ lies above its tangent at 0, so V(t) - V(0) ≥ t (φ(0) + ½ t φ'(0)),
  which has to be negative at one of the ends of [0, min(y3, tc)].
* Four, unless Θ has a root. Θ is convex in p while T < 0 and increases from there, so it has one
  between p = ½ and the largest only if Θ(½) < 0 or its tangent there is negative at the largest.
* Four, unless three beat two. What four gain over two grows with y4; so let y4 = y3, and then
  u3 = u4 = s, since there is one local minimiser. With σ = u1 + u2, q = (2 u1 + s)² + (2 u2 + s)²
  and y3 = u1 u2 + s (1 + σ), which is stationarity, twice the objective is that of two and
  s² (q - 2 (1 + σ)), which is to be negative. That of three at the same u1 and u2 and at
  u3 = s (1 + σ) is that of two and s² (q - (1 + σ)²): less if σ ≥ 1. If σ < 1, the best u1 for this
  u2 and u3 takes off another s² (u2 (1 - σ) + s)², and then, as s ≤ u2 ≤ ½ σ, it is less again.
"""

import torch
from torch import Tensor

from prox24_deploy.pruning.solvers.kernels import has_triton
from prox24_deploy.sparsity.pattern import GROUP

# Below this largest scaled magnitude the minimiser is z - λ·e2(z) to second order, and the scaled
# formulas would underflow.
_TINY = 1e-6
# For y1 above this, two non-zeros are optimal: every third coordinate is worth less than its cost.
_TWO_SPARSE = 2.0
# Groups solved at a time on a CPU, so that the dozen temporaries of a step stay in its cache.
_CHUNK = 65536
# From this many groups on, a CPU runs the compiled loop: below, compiling it would not pay.
COMPILED_FROM = 16384

Planes = tuple[Tensor, Tensor, Tensor, Tensor]


def objective_24(candidate: Tensor, weight: Tensor, lam: Tensor | float) -> Tensor:
    """Return ½|w - z|² + λ R(w) of every group.

    Args:
        candidate: w, shape (..., 4 n).
        weight: z, same shape.
        lam: λ ≥ 0, a number or a tensor broadcastable to (..., n).

    Returns:
        Shape (..., n), in the dtype of the inputs.
    """
    w = candidate.unflatten(-1, (-1, GROUP))
    z = weight.unflatten(-1, (-1, GROUP))
    a, b, c, d = w.abs().unbind(-1)
    value: Tensor = 0.5 * (w - z).square().sum(-1) + lam * (a * b * (c + d) + c * d * (a + b))
    return value


def prox_24(weight: Tensor, lam: Tensor | float, *, newton_iterations: int = 12) -> Tensor:
    """Minimise ½|w - z|² + λ R(w) in every group along the last axis.

    Args:
        weight: z, shape (..., 4 n), float32 or float64, finite; on a GPU also float16 or bfloat16,
            which is computed in float32.
        lam: λ ≥ 0, a number or a tensor broadcastable to (..., 1). λ = 0 is the identity.
        newton_iterations: of the eager form, where 12 give an objective within 1e-12 of the
            optimum in float64, and 8 within 1e-9: a nearly double root of φ, close to y = (√½, √½,
            ½), halves the error at each. The compiled ones have their own number.

    Returns:
        The minimiser, shape and dtype of `weight`; zeros are +0.0. On a tie between supports the
        sparser one, between equal weights the lower index.

    Raises:
        ValueError: the last axis is not a multiple of four.
    """
    if weight.shape[-1] % GROUP:
        raise ValueError(f"last axis has length {weight.shape[-1]}, expected a multiple of {GROUP}")
    precise = torch.promote_types(weight.dtype, torch.float32)
    per_row = torch.as_tensor(lam, dtype=precise, device=weight.device)
    per_row = per_row.expand(*weight.shape[:-1], 1)
    if weight.device.type == "cpu" and weight.numel() >= COMPILED_FROM * GROUP:
        from prox24_deploy.pruning.solvers.prox_cpu import prox_24_compiled

        rows = weight.reshape(-1, weight.shape[-1])
        return prox_24_compiled(rows, per_row.reshape(-1)).view(weight.shape)
    if _has_kernel(weight):
        from prox24_deploy.pruning.solvers.prox_cuda import prox_24_cuda

        rows = weight.reshape(-1, weight.shape[-1])
        return prox_24_cuda(rows, per_row.reshape(-1)).view(weight.shape)
    return _prox_eager(weight, per_row, newton_iterations)


def _has_kernel(weight: Tensor) -> bool:
    """Whether the kernel of `prox_cuda` serves a tensor."""
    return weight.dtype in {torch.float32, torch.float16, torch.bfloat16} and has_triton(weight)


def _prox_eager(weight: Tensor, per_row: Tensor, newton_iterations: int) -> Tensor:
    """`prox_24` in tensor operations, on any device: λ per row, (..., 1)."""
    z = weight.reshape(-1, GROUP).t().contiguous()
    lam_group = per_row.expand(*weight.shape[:-1], weight.shape[-1] // GROUP)
    chunk = _CHUNK if weight.device.type == "cpu" else max(1, z.shape[1])
    solved = [
        _prox_groups(part, lam_part, newton_iterations)
        for part, lam_part in zip(
            z.split(chunk, dim=1), lam_group.reshape(-1).split(chunk), strict=True
        )
    ]
    return torch.cat(solved, dim=1).t().reshape(weight.shape)


def _prox_groups(z: Tensor, lam: Tensor, newton_iterations: int) -> Tensor:
    """`prox_24` on planes: z (4, groups), lam (groups,)."""
    magnitude = z.abs()
    rank = _ranks(magnitude)
    result = torch.where(rank < 2, z, 0.0)
    largest = magnitude.amax(0)
    # The largest but two is zero exactly when at least two elements are zero.
    work = (lam * largest <= _TWO_SPARSE) & ((magnitude == 0).sum(0) < 2) & (lam > 0)
    # Adding +0.0 turns the -0.0 of an input into +0.0 and changes nothing else.
    result = torch.where(lam > 0, result, z) + 0.0
    index = work.nonzero().squeeze(1)
    if index.numel() == 0:
        return result
    rank_w, lam_w = rank[:, index], lam[index]
    ordered = torch.empty_like(magnitude[:, index]).scatter_(0, rank_w, magnitude[:, index])
    solved = _solve_sorted(ordered, lam_w, newton_iterations).gather(0, rank_w)
    # No element grows; scaling by λ and back could round one up.
    solved = torch.minimum(solved, magnitude[:, index])
    result[:, index] = torch.copysign(solved, z[:, index]).where(solved > 0, 0.0)
    return result


def _ranks(magnitude: Tensor) -> Tensor:
    """Rank of every element in its group, 0 = largest; ties go to the lower index. (4, groups)."""
    rank = torch.zeros(magnitude.shape, dtype=torch.int64, device=magnitude.device)
    for i in range(GROUP):
        for j in range(i + 1, GROUP):
            later_wins = magnitude[j] > magnitude[i]
            rank[i] += later_wins
            rank[j] += ~later_wins
    return rank


def _solve_sorted(magnitude: Tensor, lam: Tensor, newton_iterations: int) -> Tensor:
    """Minimise over sorted non-negative groups (4, n) with λ·m1 ≤ 2 and m3 > 0."""
    y = _planes(magnitude * lam)
    three = _three_sparse(y, newton_iterations)
    four = _four_sparse(y, newton_iterations)
    zero = torch.zeros_like(y[0])
    two = (y[0], y[1], zero, zero)
    best, best_value = two, _value(two, y)
    for candidate in (three, four):
        value = _value(candidate, y)
        better = value < best_value
        best = _select(better, candidate, best)
        best_value = torch.where(better, value, best_value)
    dense = best[2] > 0
    polished = torch.stack(_select(dense, _sweep(best, y), best)) / lam
    tiny = y[0] < _TINY
    return torch.where(tiny, torch.stack(_small(_planes(magnitude), lam)), polished)


def _three_sparse(y: Planes, newton_iterations: int) -> Planes:
    """Candidate with u4 = 0. A group without such a minimiser gets some feasible point."""
    total, spread = y[0] + y[1], y[0] - y[1]
    root_total, root_spread = total.sqrt(), spread.sqrt()
    t = torch.minimum(y[2], (root_total - root_spread) / (root_total + root_spread))
    tiny = torch.finfo(t.dtype).tiny
    for _ in range(newton_iterations):
        plus, minus = 1 + t, (1 - t).clamp_min(tiny)
        sum_part, spread_part = (total / plus).square(), (spread / minus).square()
        phi = t - y[2] + 0.25 * (sum_part - spread_part)
        slope = 1 - 0.5 * (sum_part / plus + spread_part / minus)
        # φ > 0 with no positive slope: no root to the left, so no minimiser of this support.
        t = torch.where(slope > 0, t - phi / slope.clamp_min(tiny), t).clamp_min(0.0)
        t = torch.minimum(t, y[2])
    sum_half, spread_half = 0.5 * total / (1 + t), 0.5 * spread / (1 - t).clamp_min(tiny)
    u2 = (sum_half - spread_half).clamp_min(0.0)
    return sum_half + spread_half, u2, t, torch.zeros_like(t)


def _four_sparse(y: Planes, newton_iterations: int) -> Planes:
    """Candidate with four non-zeros. A group without such a minimiser gets some feasible point."""
    a = y[3] + 0.25 - 0.5 * (y[0] + y[1] + y[2] + y[3])
    gaps = tuple(plane - y[3] for plane in y[:3])
    p = 0.5 + y[3].clamp_max(0.5)
    for _ in range(newton_iterations):
        ratio = a / p
        t, t_slope = 0.5 * (p + ratio), 0.5 * (1 - ratio / p)
        theta, slope = 0.5 * (3 * p - ratio) - 2, 0.5 * (3 + ratio / p)
        for gap in gaps:
            root = (gap + t * t).sqrt().clamp_min(torch.finfo(p.dtype).tiny)
            theta = theta + root
            slope = slope + t * t_slope / root
        step = torch.nan_to_num(theta / slope, nan=0.0, posinf=0.0, neginf=0.0)
        # Every u4 in [0, 1/2] has p in [1/2, 1]; the margin lets Newton undershoot and come back.
        p = (p - step).clamp(0.25, 1.0)
    ratio = a / p
    base, t = 0.5 * (p - ratio - 1), 0.5 * (p + ratio)
    u1, u2, u3 = ((base + (gap + t * t).sqrt()).clamp_min(0.0) for gap in gaps)
    return u1, u2, u3, (p - 0.5).clamp_min(0.0)


def _sweep(u: Planes, y: Planes) -> Planes:
    """One pass of exact coordinate minimisation, smallest coordinate first."""
    u1, u2, u3, u4 = u
    u4 = (y[3] - (u1 * u2 + u1 * u3 + u2 * u3)).clamp_min(0.0)
    u3 = (y[2] - (u1 * u2 + u1 * u4 + u2 * u4)).clamp_min(0.0)
    u2 = (y[1] - (u1 * u3 + u1 * u4 + u3 * u4)).clamp_min(0.0)
    u1 = (y[0] - (u2 * u3 + u2 * u4 + u3 * u4)).clamp_min(0.0)
    return u1, u2, u3, u4


def _small(m: Planes, lam: Tensor) -> Planes:
    """The coordinate sweep in unscaled variables, where λ·m is at most 1e-6."""
    m1, m2, m3, m4 = m
    s1, s2, s3 = lam * m1, lam * m2, lam * m3
    w4 = (m4 - (s1 * m2 + s1 * m3 + s2 * m3)).clamp_min(0.0)
    w3 = (m3 - (s1 * m2 + s1 * w4 + s2 * w4)).clamp_min(0.0)
    w2 = (m2 - (s1 * w3 + s1 * w4 + s3 * w4)).clamp_min(0.0)
    w1 = (m1 - (s2 * w3 + s2 * w4 + s3 * w4)).clamp_min(0.0)
    return w1, w2, w3, w4


def _value(u: Planes, y: Planes) -> Tensor:
    """Objective at λ = 1 of non-negative candidates."""
    distance = sum(((a - b).square() for a, b in zip(u, y, strict=True)), torch.zeros_like(u[0]))
    return 0.5 * distance + u[0] * u[1] * (u[2] + u[3]) + u[2] * u[3] * (u[0] + u[1])


def _planes(stacked: Tensor) -> Planes:
    first, second, third, fourth = stacked.unbind(0)
    return first, second, third, fourth


def _select(condition: Tensor, yes: Planes, no: Planes) -> Planes:
    first, second, third, fourth = (
        torch.where(condition, a, b) for a, b in zip(yes, no, strict=True)
    )
    return first, second, third, fourth
