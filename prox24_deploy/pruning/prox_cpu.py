"""The proximal operator of `prox.py` as one compiled, multi-threaded loop over cells for CPUs.

Same derivation and same result; what differs is that a cell stops iterating once it has converged
and that nothing is written to memory in between. Compiled on first use (some seconds), never cached
on disk, because nothing may be written beside the output of a build.
"""

import math
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

_TINY = 1e-6
_TWO_SPARSE = 2.0
_ITERATIONS = 12
_SMALLEST = 1e-30


def prox_24_compiled(weight: Tensor, lam: Tensor) -> Tensor:
    """Minimise ½|w - z|² + λ R(w) in every cell along the last axis.

    Args:
        weight: z, (rows, 4 n) on the CPU, float32 or float64, finite.
        lam: λ ≥ 0, (rows,), same dtype.

    Returns:
        The minimiser, shape and dtype of `weight`; ties and zeros as in `prox.prox_24`.
    """
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    # The pool is as large as the machine; torch may have been told to use less of it.
    pool: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(min(torch.get_num_threads(), pool))
    _prox_rows(weight.contiguous().numpy(), lam.contiguous().numpy(), result.numpy())
    return result


@numba.njit(parallel=True, error_model="numpy")
def _prox_rows(weight: Array, lam: Array, result: Array) -> None:
    rows, features = weight.shape
    # Newton converges quadratically: a step of the root of the precision is the last that counts.
    tolerance = weight.dtype.type(math.sqrt(np.finfo(weight.dtype).eps) * 0.3)
    for row in numba.prange(rows):
        for start in range(0, features, 4):
            cell = slice(start, start + 4)
            _prox_cell(weight[row, cell], lam[row], result[row, cell], tolerance)


@numba.njit(error_model="numpy", inline="always")
def _prox_cell(z: Array, lam: Any, out: Array, tolerance: Any) -> None:
    """Solve one cell: sort, choose among two, three and four non-zeros, restore order and signs."""
    zero = z[0] - z[0]
    if lam <= zero:
        for i in range(4):
            out[i] = z[i] + zero
        return
    i1, i2, i3, i4 = _order(abs(z[0]), abs(z[1]), abs(z[2]), abs(z[3]))
    m1, m2, m3, m4 = abs(z[i1]), abs(z[i2]), abs(z[i3]), abs(z[i4])
    w1, w2, w3, w4 = m1, m2, zero, zero
    if m3 > zero and lam * m1 <= _TWO_SPARSE:
        if lam * m1 < _TINY:
            w1, w2, w3, w4 = _small(m1, m2, m3, m4, lam)
        else:
            w1, w2, w3, w4 = _solve(m1, m2, m3, m4, lam, tolerance)
    out[i1] = math.copysign(w1, z[i1]) if w1 > zero else zero
    out[i2] = math.copysign(w2, z[i2]) if w2 > zero else zero
    out[i3] = math.copysign(w3, z[i3]) if w3 > zero else zero
    out[i4] = math.copysign(w4, z[i4]) if w4 > zero else zero


@numba.njit(inline="always")
def _swap(a: Any, i: Any, b: Any, j: Any) -> tuple[Any, Any, Any, Any]:
    """Order two elements by size; of equal ones the lower index comes first."""
    if b > a or (b == a and j < i):
        return b, j, a, i
    return a, i, b, j


@numba.njit(inline="always")
def _order(a: Any, b: Any, c: Any, d: Any) -> tuple[Any, Any, Any, Any]:
    """Indices from the largest to the smallest: a sorting network of five comparisons."""
    a, i, b, j = _swap(a, 0, b, 1)
    c, k, d, m = _swap(c, 2, d, 3)
    a, i, c, k = _swap(a, i, c, k)
    b, j, d, m = _swap(b, j, d, m)
    b, j, c, k = _swap(b, j, c, k)
    return i, j, k, m


@numba.njit(inline="always", error_model="numpy")
def _value(u1: Any, u2: Any, u3: Any, u4: Any, y1: Any, y2: Any, y3: Any, y4: Any) -> Any:
    """Objective at λ = 1."""
    d1, d2, d3, d4 = u1 - y1, u2 - y2, u3 - y3, u4 - y4
    triples = u1 * u2 * (u3 + u4) + u3 * u4 * (u1 + u2)
    return (d1 * d1 + d2 * d2 + d3 * d3 + d4 * d4) / 2 + triples


@numba.njit(inline="always", error_model="numpy")
def _solve(m1: Any, m2: Any, m3: Any, m4: Any, lam: Any, tolerance: Any) -> Any:
    """Compare the candidates of a sorted cell at λ = 1, sweep the best and scale it back."""
    y1, y2, y3, y4 = m1 * lam, m2 * lam, m3 * lam, m4 * lam
    zero = m1 - m1
    u1, u2, u3, u4 = y1, y2, zero, zero
    best = _value(u1, u2, u3, u4, y1, y2, y3, y4)
    a1, a2, a3 = _three(y1, y2, y3, tolerance)
    value = _value(a1, a2, a3, zero, y1, y2, y3, y4)
    if value < best:
        u1, u2, u3, u4, best = a1, a2, a3, zero, value
    if y4 > zero:
        b1, b2, b3, b4 = _four(y1, y2, y3, y4, tolerance)
        if _value(b1, b2, b3, b4, y1, y2, y3, y4) < best:
            u1, u2, u3, u4 = b1, b2, b3, b4
    if u3 > zero:
        u4 = max(y4 - (u1 * u2 + u1 * u3 + u2 * u3), zero)
        u3 = max(y3 - (u1 * u2 + u1 * u4 + u2 * u4), zero)
        u2 = max(y2 - (u1 * u3 + u1 * u4 + u3 * u4), zero)
        u1 = max(y1 - (u2 * u3 + u2 * u4 + u3 * u4), zero)
        # No element grows; scaling by λ and back could round one up.
        return min(u1 / lam, m1), min(u2 / lam, m2), min(u3 / lam, m3), min(u4 / lam, m4)
    return m1, m2, zero, zero


@numba.njit(inline="always", error_model="numpy")
def _three(y1: Any, y2: Any, y3: Any, tolerance: Any) -> Any:
    """Candidate with u4 = 0: Newton on φ from the right, see `prox.py`."""
    zero = y1 - y1
    one = zero + 1
    total, spread = y1 + y2, y1 - y2
    root_total, root_spread = math.sqrt(total), math.sqrt(spread)
    t = min(y3, (root_total - root_spread) / (root_total + root_spread))
    for _ in range(_ITERATIONS):
        # Of three equal elements t starts at 1, where the spread part is 0 / 0.
        plus, minus = one / (one + t), one / max(one - t, _SMALLEST)
        sum_part, spread_part = (total * plus) ** 2, (spread * minus) ** 2
        slope = one - (sum_part * plus + spread_part * minus) / 2
        if slope <= zero:
            break
        step = (t - y3 + (sum_part - spread_part) / 4) / slope
        t = min(max(t - step, zero), y3)
        if abs(step) <= tolerance * t:
            break
    sum_half = total / (one + t) / 2
    spread_half = spread / (one - t) / 2 if t < one else zero
    return sum_half + spread_half, max(sum_half - spread_half, zero), t


@numba.njit(inline="always", error_model="numpy")
def _four(y1: Any, y2: Any, y3: Any, y4: Any, tolerance: Any) -> Any:
    """Candidate with four non-zeros: Newton on Θ, see `prox.py`."""
    zero = y1 - y1
    half = zero + 0.5
    a = y4 + half * half - half * (y1 + y2 + y3 + y4)
    g1, g2, g3 = y1 - y4, y2 - y4, y3 - y4
    p = half + min(y4, half)
    for _ in range(_ITERATIONS):
        ratio = a / p
        t, bend = half * (p + ratio), half * (1 - ratio / p)
        square = t * t
        r1, r2, r3 = math.sqrt(g1 + square), math.sqrt(g2 + square), math.sqrt(g3 + square)
        theta = half * (3 * p - ratio) + r1 + r2 + r3 - 2
        slope = half * (3 + ratio / p)
        if r3 > zero:
            slope += t * bend * (1 / r1 + 1 / r2 + 1 / r3)
        step = theta / slope
        if not math.isfinite(step):
            break
        p = min(max(p - step, half * half), 2 * half)
        if abs(step) <= tolerance * p:
            break
    ratio = a / p
    base, t = half * (p - ratio - 1), half * (p + ratio)
    square = t * t
    u1 = max(base + math.sqrt(g1 + square), zero)
    u2 = max(base + math.sqrt(g2 + square), zero)
    u3 = max(base + math.sqrt(g3 + square), zero)
    return u1, u2, u3, max(p - half, zero)


@numba.njit(inline="always", error_model="numpy")
def _small(m1: Any, m2: Any, m3: Any, m4: Any, lam: Any) -> Any:
    """The coordinate sweep without scaling, where λ·m is at most 1e-6."""
    zero = m1 - m1
    s1, s2, s3 = lam * m1, lam * m2, lam * m3
    w4 = max(m4 - (s1 * m2 + s1 * m3 + s2 * m3), zero)
    w3 = max(m3 - (s1 * m2 + s1 * w4 + s2 * w4), zero)
    w2 = max(m2 - (s1 * w3 + s1 * w4 + s3 * w4), zero)
    w1 = max(m1 - (s2 * w3 + s2 * w4 + s3 * w4), zero)
    return w1, w2, w3, w4
