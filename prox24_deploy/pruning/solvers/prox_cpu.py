"""The proximal operator of `prox.py` as compiled, multi-threaded vector loops for CPUs.

Same derivation and same result; what differs is the order of the work. Groups are taken in blocks
that fit the first-level cache. One pass writes a block as if two non-zeros were right everywhere
and notes the groups where they may not be; those are gathered, sorted, into planes of a scratch
array, solved there by loops without branches, which the compiler turns into vector instructions,
and scattered back.

No group depends on its neighbours in a block: the number of Newton steps is fixed, and fused
multiply-add stays off, so that vector loops and their scalar remainders give the same bits.
Compiled on first use (some seconds), never cached on disk, because nothing may be written beside
the output of a build.
"""

import math
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

# Groups per block: the scratch planes take 22 KiB in float32.
BLOCK = 512
# Newton steps: one more than brought the objective of over a million groups within rounding.
_STEPS = {torch.float32: 7, torch.float64: 9}
# A Python number would widen float32 arithmetic to float64; these widen neither.
_ZERO, _QUARTER, _HALF, _ONE, _TWO, _THREE = map(np.float32, (0.0, 0.25, 0.5, 1.0, 2.0, 3.0))
_TINY = np.float32(1e-6)
_SMALLEST = np.float32(1e-30)
# Planes of the scratch array: the sorted magnitudes, overwritten by the solution; the same times
# λ; λ; the unknowns of the two Newton iterations.
_M1, _M2, _M3, _M4, _Y1, _Y2, _Y3, _Y4, _LAM, _T, _P, _PLANES = range(12)


def prox_24_compiled(weight: Tensor, lam: Tensor) -> Tensor:
    """Minimise ½|w - z|² + λ R(w) in every group along the last axis.

    Args:
        weight: z, (rows, 4 n) on the CPU, float32 or float64, finite.
        lam: λ ≥ 0, (rows,), same dtype.

    Returns:
        The minimiser, shape and dtype of `weight`; ties and zeros as in `prox.prox_24`.
    """
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    # The pool is as large as the machine; torch may have been told to use less of it.
    pool: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, pool))
    _prox_blocks(
        weight.contiguous().view(-1).numpy(),
        lam.contiguous().numpy(),
        weight.shape[-1] // 4,
        _STEPS[weight.dtype],
        result.view(-1).numpy(),
    )
    # Starting its pool, Numba sets the thread count of the OpenMP runtime that torch also uses.
    torch.set_num_threads(threads)
    return result


@numba.njit(parallel=True, error_model="numpy")
def _prox_blocks(z: Array, lam: Array, per_row: int, steps: int, out: Array) -> None:
    """Solve z (4 groups,) into out; each λ of lam (rows,) holds for `per_row` groups."""
    groups = z.size // 4
    for block in numba.prange((groups + BLOCK - 1) // BLOCK):
        first = block * BLOCK
        _prox_block(z, lam, per_row, steps, out, first, min(first + BLOCK, groups))


@numba.njit(error_model="numpy")
def _prox_block(
    z: Array, lam: Array, per_row: int, steps: int, out: Array, first: int, last: int
) -> None:
    """Solve the groups from `first` to before `last`, which may lie in several rows."""
    scratch = np.empty((_PLANES, BLOCK), z.dtype)
    where = np.empty(BLOCK, np.int64)
    more = np.empty(BLOCK, np.bool_)
    count = 0
    while first < last:
        row = first // per_row
        end = min(last, (row + 1) * per_row)
        _two(z[4 * first : 4 * end], lam[row], out[4 * first : 4 * end], more)
        for i in range(end - first):
            # Written for every group and kept by the count alone: a branch would be a coin toss.
            where[count] = first + i
            scratch[_LAM, count] = lam[row]
            count += more[i]
        first = end
    if count > 0:
        _gather(z, where, scratch, count)
        _three(scratch, count, steps)
        _four(scratch, count, steps)
        _choose(scratch, count)
        _scatter(z, where, scratch, count, out)


@numba.njit(error_model="numpy")
def _two(z: Array, lam: Any, out: Array, more: Array) -> None:
    """Keep the two largest of every group, of equal ones the first; note where this may not do."""
    identity = lam <= _ZERO
    for i in range(z.size // 4):
        z1, z2, z3, z4 = z[4 * i], z[4 * i + 1], z[4 * i + 2], z[4 * i + 3]
        a, b, c, d = abs(z1), abs(z2), abs(z3), abs(z4)
        ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
        # An element stays if it wins against two. Adding +0.0 only turns -0.0 into +0.0.
        out[4 * i] = z1 + _ZERO if identity | _two_of(ab, ac, ad) else _ZERO
        out[4 * i + 1] = z2 + _ZERO if identity | _two_of(not ab, bc, bd) else _ZERO
        out[4 * i + 2] = z3 + _ZERO if identity | _two_of(not ac, not bc, cd) else _ZERO
        out[4 * i + 3] = z4 + _ZERO if identity | _two_of(not ad, not bd, not cd) else _ZERO
        m1, _, m3, _ = _sorted(a, b, c, d)
        more[i] = (not identity) & (lam * m1 <= _TWO) & (m3 > _ZERO)


@numba.njit(inline="always")
def _two_of(a: Any, b: Any, c: Any) -> Any:
    """Whether at least two of three conditions hold."""
    return (a & b) | (a & c) | (b & c)


@numba.njit(inline="always")
def _sorted(a: Any, b: Any, c: Any, d: Any) -> Any:
    """Four numbers from the largest to the smallest."""
    a, b = max(a, b), min(a, b)
    c, d = max(c, d), min(c, d)
    a, c = max(a, c), min(a, c)
    b, d = max(b, d), min(b, d)
    return a, max(b, c), min(b, c), d


@numba.njit(error_model="numpy")
def _gather(z: Array, where: Array, scratch: Array, count: int) -> None:
    """Fill planes M and Y from the groups at `where` (count,)."""
    for i in range(count):
        at = 4 * where[i]
        m1, m2, m3, m4 = _sorted(abs(z[at]), abs(z[at + 1]), abs(z[at + 2]), abs(z[at + 3]))
        scratch[_M1, i], scratch[_M2, i], scratch[_M3, i], scratch[_M4, i] = m1, m2, m3, m4
        lam = scratch[_LAM, i]
        scratch[_Y1, i], scratch[_Y2, i] = m1 * lam, m2 * lam
        scratch[_Y3, i], scratch[_Y4, i] = m3 * lam, m4 * lam


@numba.njit(error_model="numpy")
def _three(scratch: Array, count: int, steps: int) -> None:
    """Plane T: u3 of the candidate with u4 = 0, by Newton on φ from the right, see `prox.py`."""
    for i in range(count):
        y1, y2 = scratch[_Y1, i], scratch[_Y2, i]
        root_total, root_spread = math.sqrt(y1 + y2), math.sqrt(y1 - y2)
        turn = (root_total - root_spread) / (root_total + root_spread)
        scratch[_T, i] = min(scratch[_Y3, i], turn)
    for _ in range(steps):
        for i in range(count):
            y1, y2, y3, t = scratch[_Y1, i], scratch[_Y2, i], scratch[_Y3, i], scratch[_T, i]
            # Of three equal elements t starts at 1, where the spread part is 0 / 0.
            plus, minus = _ONE / (_ONE + t), _ONE / max(_ONE - t, _SMALLEST)
            total, spread = (y1 + y2) * plus, (y1 - y2) * minus
            sum_part, spread_part = total * total, spread * spread
            slope = _ONE - (sum_part * plus + spread_part * minus) * _HALF
            step = (t - y3 + (sum_part - spread_part) * _QUARTER) / slope
            # φ > 0 with no positive slope: no root to the left, so no minimiser of this support.
            scratch[_T, i] = min(max(t - step, _ZERO), y3) if slope > _ZERO else t


@numba.njit(error_model="numpy")
def _four(scratch: Array, count: int, steps: int) -> None:
    """Plane P: u4 + ½ of the candidate with four non-zeros, by Newton on Θ, see `prox.py`."""
    for i in range(count):
        scratch[_P, i] = _HALF + min(scratch[_Y4, i], _HALF)
    for _ in range(steps):
        for i in range(count):
            y1, y2, y3, y4 = scratch[_Y1, i], scratch[_Y2, i], scratch[_Y3, i], scratch[_Y4, i]
            p = scratch[_P, i]
            ratio = _offset(y1, y2, y3, y4) / p
            bend = ratio / p
            t = _HALF * (p + ratio)
            square = t * t
            r1 = math.sqrt(y1 - y4 + square)
            r2 = math.sqrt(y2 - y4 + square)
            r3 = math.sqrt(y3 - y4 + square)
            # 1/r1 + 1/r2 + 1/r3 with one division. A product that underflows means t = 0, where
            # the term vanishes: p + a/p cancels to zero or to over a hundredth of the precision.
            product = r1 * r2 * r3
            inverses = (r1 * r2 + (r1 + r2) * r3) / product if product > _ZERO else _ZERO
            slope = _HALF * (_THREE + bend + t * (_ONE - bend) * inverses)
            theta = _HALF * (_THREE * p - ratio) + r1 + r2 + r3 - _TWO
            step = theta / slope if slope != _ZERO else _ZERO
            # Every u4 in [0, ½] has p in [½, 1]; the margin lets Newton undershoot and come back.
            scratch[_P, i] = min(max(p - step, _QUARTER), _ONE)


@numba.njit(inline="always")
def _offset(y1: Any, y2: Any, y3: Any, y4: Any) -> Any:
    """The a of `prox.py`."""
    return y4 + _QUARTER - _HALF * (y1 + y2 + y3 + y4)


@numba.njit(error_model="numpy")
def _choose(scratch: Array, count: int) -> None:
    """Compare the candidates at λ = 1, sweep the best and scale it back, into planes M."""
    for i in range(count):
        y = scratch[_Y1, i], scratch[_Y2, i], scratch[_Y3, i], scratch[_Y4, i]
        m = scratch[_M1, i], scratch[_M2, i], scratch[_M3, i], scratch[_M4, i]
        lam = scratch[_LAM, i]
        two = y[0], y[1], y[0] - y[0], y[0] - y[0]
        three = _three_from(y, scratch[_T, i])
        four = _four_from(y, scratch[_P, i])
        # Strictly less, so that the sparser support wins a tie.
        u = _pick(_value(three, y) < _value(two, y), three, two)
        u = _pick((y[3] > _ZERO) & (_value(four, y) < _value(u, y)), four, u)
        swept = _sweep(u, y)
        # No element grows; scaling by λ and back could round one up.
        w = (
            min(swept[0] / lam, m[0]),
            min(swept[1] / lam, m[1]),
            min(swept[2] / lam, m[2]),
            min(swept[3] / lam, m[3]),
        )
        w = _pick(u[2] > _ZERO, w, (m[0], m[1], two[2], two[3]))
        w = _pick(y[0] < _TINY, _small(m, lam), w)
        scratch[_M1, i], scratch[_M2, i], scratch[_M3, i], scratch[_M4, i] = w


@numba.njit(inline="always")
def _pick(condition: Any, yes: Any, no: Any) -> Any:
    """The first of two quadruples where the condition holds, without a branch."""
    return (
        yes[0] if condition else no[0],
        yes[1] if condition else no[1],
        yes[2] if condition else no[2],
        yes[3] if condition else no[3],
    )


@numba.njit(inline="always", error_model="numpy")
def _three_from(y: Any, t: Any) -> Any:
    """The candidate with u3 = t and u4 = 0."""
    sum_half = _HALF * (y[0] + y[1]) / (_ONE + t)
    spread_half = _HALF * (y[0] - y[1]) / max(_ONE - t, _SMALLEST)
    return sum_half + spread_half, max(sum_half - spread_half, _ZERO), t, t - t


@numba.njit(inline="always", error_model="numpy")
def _four_from(y: Any, p: Any) -> Any:
    """The candidate with u4 = p - ½."""
    ratio = _offset(y[0], y[1], y[2], y[3]) / p
    base, t = _HALF * (p - ratio - _ONE), _HALF * (p + ratio)
    square = t * t
    u1 = max(base + math.sqrt(y[0] - y[3] + square), _ZERO)
    u2 = max(base + math.sqrt(y[1] - y[3] + square), _ZERO)
    u3 = max(base + math.sqrt(y[2] - y[3] + square), _ZERO)
    return u1, u2, u3, max(p - _HALF, _ZERO)


@numba.njit(inline="always")
def _value(u: Any, y: Any) -> Any:
    """Twice the objective at λ = 1."""
    d1, d2, d3, d4 = u[0] - y[0], u[1] - y[1], u[2] - y[2], u[3] - y[3]
    triples = u[0] * u[1] * (u[2] + u[3]) + u[2] * u[3] * (u[0] + u[1])
    return d1 * d1 + d2 * d2 + d3 * d3 + d4 * d4 + _TWO * triples


@numba.njit(inline="always")
def _sweep(u: Any, y: Any) -> Any:
    """One pass of exact coordinate minimisation, smallest coordinate first."""
    u1, u2, u3, _ = u
    u4 = max(y[3] - (u1 * u2 + u1 * u3 + u2 * u3), _ZERO)
    u3 = max(y[2] - (u1 * u2 + u1 * u4 + u2 * u4), _ZERO)
    u2 = max(y[1] - (u1 * u3 + u1 * u4 + u3 * u4), _ZERO)
    u1 = max(y[0] - (u2 * u3 + u2 * u4 + u3 * u4), _ZERO)
    return u1, u2, u3, u4


@numba.njit(inline="always")
def _small(m: Any, lam: Any) -> Any:
    """The coordinate sweep without scaling, where λ·m is at most 1e-6."""
    m1, m2, m3, m4 = m
    s1, s2, s3 = lam * m1, lam * m2, lam * m3
    w4 = max(m4 - (s1 * m2 + s1 * m3 + s2 * m3), _ZERO)
    w3 = max(m3 - (s1 * m2 + s1 * w4 + s2 * w4), _ZERO)
    w2 = max(m2 - (s1 * w3 + s1 * w4 + s3 * w4), _ZERO)
    w1 = max(m1 - (s2 * w3 + s2 * w4 + s3 * w4), _ZERO)
    return w1, w2, w3, w4


@numba.njit(error_model="numpy")
def _scatter(z: Array, where: Array, scratch: Array, count: int, out: Array) -> None:
    """Write planes M to the groups at `where` (count,), with their order and signs."""
    for i in range(count):
        at = 4 * where[i]
        a, b, c, d = abs(z[at]), abs(z[at + 1]), abs(z[at + 2]), abs(z[at + 3])
        ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
        # The plane of an element is the number of elements that it loses to. Adding +0.0 only
        # turns -0.0 into +0.0.
        out[at] = math.copysign(scratch[3 - ab - ac - ad, i], z[at]) + _ZERO
        out[at + 1] = math.copysign(scratch[2 + ab - bc - bd, i], z[at + 1]) + _ZERO
        out[at + 2] = math.copysign(scratch[1 + ac + bc - cd, i], z[at + 2]) + _ZERO
        out[at + 3] = math.copysign(scratch[ad + bd + cd, i], z[at + 3]) + _ZERO
