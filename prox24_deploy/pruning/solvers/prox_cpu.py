"""The proximal operator of `prox.py` as compiled, multi-threaded vector loops for CPUs.

Same derivation and same result; what differs is the order of the work. Groups are taken in blocks
that fit the first-level cache. One pass writes a block as if two non-zeros were right everywhere
and notes the groups where they may not be; those are gathered, sorted, into planes of a scratch
array, solved there with three by loops without branches, which the compiler turns into vector
instructions; the fewer that may keep four are gathered once more; and all are scattered back.

No group depends on its neighbours in a block: the number of steps is fixed, and fused
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

# Groups per block: the scratch planes take 42 KiB in float32.
BLOCK = 512
# Steps: one more than brought the objective of over a million groups within rounding, among them
# those close to y = (√½, √½, ½), where a nearly double root of φ is approached slowly.
_STEPS = {torch.float32: 5, torch.float64: 9}
# A Python number would widen float32 arithmetic to float64; these widen neither.
_ZERO, _QUARTER, _HALF, _ONE, _TWO, _THREE = map(np.float32, (0.0, 0.25, 0.5, 1.0, 2.0, 3.0))
_BELOW_ONE = np.float32(0.99999)
_TINY = np.float32(1e-6)
# Planes of the scratch array: the sorted magnitudes, overwritten by the solution; the same times
# λ; λ; the best candidate, whose fourth element the sweep finds; the largest u3; twice the best
# objective; where the steps for four start. Of the groups that may keep four: magnitudes times λ,
# which the candidate and twice its objective overwrite, and p.
_M1, _M2, _M3, _M4, _Y1, _Y2, _Y3, _Y4, _LAM, _U1, _U2, _U3, _END, _BEST, _START = range(15)
_F1, _F2, _F3, _F4, _P, _PLANES = range(15, 21)


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
        _choose_three(scratch, count, more)
        _four(scratch, count, steps, more)
        _finish(scratch, count)
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
        m1, m2, m3, _ = _sorted(a, b, c, d)
        y1, y2, y3 = lam * m1, lam * m2, lam * m3
        start, fall = _at_two(y1, y2, y3)
        # A tiny group has its own solution, and its products may underflow.
        wins = (min(start, start + _HALF * fall * _end(y1, y2, y3)) < _ZERO) | (y1 < _TINY)
        more[i] = (not identity) & (y1 <= _TWO) & (m3 > _ZERO) & wins


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


@numba.njit(inline="always")
def _at_two(y1: Any, y2: Any, y3: Any) -> Any:
    """φ and its slope where u3 = 0."""
    return y1 * y2 - y3, _ONE - (y1 * y1 + y2 * y2)


@numba.njit(inline="always", error_model="numpy")
def _end(y1: Any, y2: Any, y3: Any) -> Any:
    """The largest u3 of a candidate with u4 = 0; of three equal ones it would be 1, a pole of φ."""
    return min(min(y3, y2 / (y1 + math.sqrt((y1 + y2) * (y1 - y2)))), _BELOW_ONE)


@numba.njit(error_model="numpy")
def _three(scratch: Array, count: int, steps: int) -> None:
    """Plane U3 of the candidate with u4 = 0, by Halley's steps on φ, see `prox.py`."""
    for i in range(count):
        y1, y2, y3 = scratch[_Y1, i], scratch[_Y2, i], scratch[_Y3, i]
        first, fall = _at_two(y1, y2, y3)
        end = _end(y1, y2, y3)
        scratch[_END, i] = end
        scratch[_U3, i] = min(max(-first, _ZERO) / fall, end) if fall > _ZERO else end
    for _ in range(steps):
        for i in range(count):
            y1, y2, y3, t = scratch[_Y1, i], scratch[_Y2, i], scratch[_Y3, i], scratch[_U3, i]
            plus, minus = _inverses(t)
            total, spread = _HALF * (y1 + y2) * plus, _HALF * (y1 - y2) * minus
            total, spread = total * total, spread * spread
            phi = t - y3 + (total - spread)
            total, spread = total * plus, spread * minus
            slope = _ONE - _TWO * (total + spread)
            bend = _THREE * (total * plus - spread * minus)
            step = _halley(phi, slope, bend)
            scratch[_U3, i] = min(max(t - step, _ZERO), scratch[_END, i])


@numba.njit(inline="always", error_model="numpy")
def _inverses(t: Any) -> Any:
    """1/(1+t) and 1/(1-t) by one division."""
    inverse = _ONE / (_ONE - t * t)
    part = t * inverse
    return inverse - part, inverse + part


@numba.njit(inline="always", error_model="numpy")
def _halley(value: Any, slope: Any, bend: Any) -> Any:
    """A step of Halley's method, by half of the second derivative."""
    divisor = slope * slope - value * bend
    return value * slope / divisor if divisor != _ZERO else _ZERO


@numba.njit(error_model="numpy")
def _choose_three(scratch: Array, count: int, more: Array) -> None:
    """Planes U and BEST of two or three non-zeros; note where there may be four."""
    for i in range(count):
        y1, y2, y3, y4 = scratch[_Y1, i], scratch[_Y2, i], scratch[_Y3, i], scratch[_Y4, i]
        t = scratch[_U3, i]
        plus, minus = _inverses(t)
        total, spread = _HALF * (y1 + y2) * plus, _HALF * (y1 - y2) * minus
        u1, u2 = total + spread, max(total - spread, _ZERO)
        d1, d2, d3, last = u1 - y1, u2 - y2, t - y3, y4 * y4
        two, three = y3 * y3 + last, d1 * d1 + d2 * d2 + d3 * d3 + last + _TWO * (u1 * u2 * t)
        # Strictly less, so that the sparser support wins a tie.
        better = three < two
        scratch[_U1, i], scratch[_U2, i] = u1 if better else y1, u2 if better else y2
        scratch[_U3, i], scratch[_BEST, i] = t if better else _ZERO, three if better else two
        theta, slope, _ = _theta(_HALF, y1, y2, y3, y4)
        most = min(y4, _HALF)
        scratch[_START, i] = _HALF + (min(-theta / slope, most) if slope > _ZERO else most)
        falls = min(theta, theta + slope * most) < _ZERO
        more[i] = better & (y4 > _ZERO) & falls


@numba.njit(error_model="numpy")
def _four(scratch: Array, count: int, steps: int, more: Array) -> None:
    """Planes U where four non-zeros are best, by Halley's steps on Θ, see `prox.py`."""
    where = np.empty(BLOCK, np.int64)
    fours = 0
    for i in range(count):
        where[fours] = i
        fours += more[i]
    for k in range(fours):
        i = where[k]
        y1, y2, y3, y4 = scratch[_Y1, i], scratch[_Y2, i], scratch[_Y3, i], scratch[_Y4, i]
        scratch[_F1, k], scratch[_F2, k], scratch[_F3, k], scratch[_F4, k] = y1, y2, y3, y4
        scratch[_P, k] = scratch[_START, i]
    for _ in range(steps):
        for k in range(fours):
            p = scratch[_P, k]
            theta, slope, bend = _theta(
                p, scratch[_F1, k], scratch[_F2, k], scratch[_F3, k], scratch[_F4, k]
            )
            step = _halley(theta, slope, bend)
            # Every u4 in [0, ½] has p in [½, 1]; the margin lets a step undershoot and come back.
            scratch[_P, k] = min(max(p - step, _QUARTER), _ONE)
    for k in range(fours):
        y = scratch[_F1, k], scratch[_F2, k], scratch[_F3, k], scratch[_F4, k]
        u = _four_from(y, scratch[_P, k])
        scratch[_F1, k], scratch[_F2, k], scratch[_F3, k] = u[0], u[1], u[2]
        scratch[_F4, k] = _value(u, y)
    for k in range(fours):
        i = where[k]
        better = scratch[_F4, k] < scratch[_BEST, i]
        scratch[_U1, i] = scratch[_F1, k] if better else scratch[_U1, i]
        scratch[_U2, i] = scratch[_F2, k] if better else scratch[_U2, i]
        scratch[_U3, i] = scratch[_F3, k] if better else scratch[_U3, i]


@numba.njit(inline="always", error_model="numpy")
def _theta(p: Any, y1: Any, y2: Any, y3: Any, y4: Any) -> Any:
    """Θ at p, its slope, and half of its second derivative."""
    inverse = _ONE / p
    ratio = _offset(y1, y2, y3, y4) * inverse
    bend = ratio * inverse
    t, lean = _HALF * (p + ratio), _HALF * (_ONE - bend)
    square = t * t
    r1 = math.sqrt(y1 - y4 + square)
    r2 = math.sqrt(y2 - y4 + square)
    r3 = math.sqrt(y3 - y4 + square)
    # The inverses with one division. A product that underflows means t = 0, where their terms
    # vanish: p + a/p cancels to zero or to over a hundredth of the precision.
    product = r1 * r2 * r3
    shared = _ONE / product if product > _ZERO else _ZERO
    i1, i2, i3 = r2 * r3 * shared, r1 * r3 * shared, r1 * r2 * shared
    total, cubes = i1 + i2 + i3, i1 * i1 * i1 + i2 * i2 * i2 + i3 * i3 * i3
    grow, twist = t * lean, bend * inverse
    theta = _HALF * (_THREE * p - ratio) + (r1 + r2 + r3) - _TWO
    slope = _HALF * (_THREE + bend) + grow * total
    curve = _HALF * ((lean * lean + t * twist) * total - twist - grow * grow * cubes)
    return theta, slope, curve


@numba.njit(inline="always")
def _offset(y1: Any, y2: Any, y3: Any, y4: Any) -> Any:
    """The a of `prox.py`."""
    return y4 + _QUARTER - _HALF * (y1 + y2 + y3 + y4)


@numba.njit(error_model="numpy")
def _finish(scratch: Array, count: int) -> None:
    """Sweep the best candidate and scale it back, into planes M."""
    for i in range(count):
        y = scratch[_Y1, i], scratch[_Y2, i], scratch[_Y3, i], scratch[_Y4, i]
        m = scratch[_M1, i], scratch[_M2, i], scratch[_M3, i], scratch[_M4, i]
        u3, lam = scratch[_U3, i], scratch[_LAM, i]
        swept = _sweep(scratch[_U1, i], scratch[_U2, i], u3, y)
        # No element grows; scaling by λ and back could round one up.
        w = (
            min(swept[0] / lam, m[0]),
            min(swept[1] / lam, m[1]),
            min(swept[2] / lam, m[2]),
            min(swept[3] / lam, m[3]),
        )
        w = _pick(u3 > _ZERO, w, (m[0], m[1], m[2] - m[2], m[2] - m[2]))
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
def _sweep(u1: Any, u2: Any, u3: Any, y: Any) -> Any:
    """One pass of exact coordinate minimisation, smallest coordinate first."""
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
