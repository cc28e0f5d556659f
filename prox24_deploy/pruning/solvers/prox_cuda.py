"""The proximal operator of `prox.py` as one GPU kernel, alone and within a step of ADMM.

Same derivation and same result. A thread holds a group in registers, in float32 whatever the
storage, so that a group is read and written once. Instructions are what it is bound by, so a warp
does what one of its groups asks for and no more:

* Without a group that can keep more than two non-zeros, no arithmetic; without one that can keep
  four (`prox.py` says which can), none for those.
* Steps are Halley's. They start from the root of the tangent at the sparser end, if that rises,
  and otherwise from the other end. All groups take a few. More follow for those whose result
  matters, whose step was long for how the function bends, and whose parabola at the last point has
  a root. Without a root, by some margin, they are taken to have no such minimiser: t or p would
  wander. Where that is wrong, a feasible point is compared. No group depends on its neighbours.
* Reciprocals are shared: an inverse square root gives the root too, and one division 1/(1+t) and
  1/(1-t).

The next groups are read while these are solved.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prox24_deploy.pruning.solvers.admm_step import AdmmState

# Groups of a block: one for each thread of a program, which is one warp.
_BLOCK = tl.constexpr(32)
# Blocks that a program solves, one after the other: starting one costs what 60 instructions do.
_BLOCKS = tl.constexpr(8)
# What a step of Halley's leaves is cubic in its length, measured by what its function bends over:
# for t twice φ'/φ'', and 1 for the third derivative; for p the least √(g + h²), as h passes zero
# there. A step that is shorter than these fractions needs none behind it: what is left is 1.2e-7 of
# ½|z|² at most, in groups that were searched for.
_BENT_T, _CLOSE_T, _CLOSE_P = tl.constexpr(0.05), tl.constexpr(0.05), tl.constexpr(0.12)
_ROUNDS = tl.constexpr(4)


def prox_24_cuda(weight: Tensor, lam: Tensor) -> Tensor:
    """Minimise ½|w - z|² + λ R(w) in every group along the last axis.

    Args:
        weight: z, (rows, 4 n) on a GPU, float32, float16 or bfloat16, finite.
        lam: λ ≥ 0, (rows,), float32.

    Returns:
        The minimiser, shape and dtype of `weight`; ties and zeros as in `prox.prox_24`.
    """
    weight = weight.contiguous()
    result = torch.empty_like(weight)
    per_row = weight.shape[-1] // 4
    if weight.numel():
        with torch.cuda.device(weight.device):
            _prox_kernel[_grid(weight)](weight, lam.contiguous(), result, per_row, num_warps=1)
    return result


def admm_step_cuda(state: AdmmState, linear: Tensor, lam: Tensor, rho: float) -> None:
    """Z-step, dual update and the right-hand side of the next W-step in one pass over memory.

    Args:
        state: of float32 on a GPU, contiguous, as the W-step left it. Z = prox(W + U),
            U' = W + U - Z and B + ρ (Z - U') are written over Z, U and the target.
        linear: B, same shape.
        lam: λ / ρ ≥ 0, (rows,), float32.
        rho: ρ.
    """
    weight = state.weight
    with torch.cuda.device(weight.device):
        _admm_kernel[_grid(weight)](
            weight, state.dual, linear.contiguous(), lam.contiguous(), state.split, state.target,
            rho, weight.shape[-1] // 4, num_warps=1,
        )  # fmt: skip


def _grid(weight: Tensor) -> tuple[int]:
    """A program for some blocks of each row."""
    return (len(weight) * triton.cdiv(weight.shape[-1] // 4, _BLOCK.value * _BLOCKS.value),)


@triton.jit
def _place(per_row):
    """Row of this program, its first group, and the end of its groups."""
    programs = tl.cdiv(per_row, _BLOCK * _BLOCKS)
    row = tl.program_id(0) // programs
    first = (tl.program_id(0) - row * programs) * (_BLOCK * _BLOCKS)
    return row.to(tl.int64), first, tl.minimum(first + _BLOCK * _BLOCKS, per_row)


@triton.jit
def _load_lam(lam_ptr):
    """λ of a row; too small to have a reciprocal it acts as zero, too large as 4.2e37."""
    lam = tl.minimum(tl.load(lam_ptr), 4.2e37)
    return tl.where(lam < 1.2e-38, 0.0, lam)


@triton.jit
def _elements(group, per_row):
    """Offsets in the row of the elements (groups, 4) of a block, and which lie in the row."""
    group = group + tl.arange(0, _BLOCK)
    inside = (group < per_row)[:, None] & (tl.arange(0, 4) >= 0)[None, :]
    return group[:, None] * 4 + tl.arange(0, 4)[None, :], inside


@triton.jit
def _prox_kernel(z_ptr, lam_ptr, out_ptr, per_row):
    """Solve rows of `per_row` groups into `out_ptr`, each with its λ."""
    row, first, end = _place(per_row)
    lam = _load_lam(lam_ptr + row)
    z_ptr += row * per_row * 4
    out_ptr += row * per_row * 4
    at, inside = _elements(first, per_row)
    z = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
    for group in range(first, end, _BLOCK):
        after, within = _elements(group + _BLOCK, end)
        following = tl.load(z_ptr + after, mask=within, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, _prox(z, lam).to(out_ptr.dtype.element_ty), mask=inside)
        z, at, inside = following, after, within


@triton.jit
def _admm_kernel(weight_ptr, dual_ptr, linear_ptr, lam_ptr, split_ptr, target_ptr, rho, per_row):
    """One step of ADMM on rows of `per_row` groups; see `admm_step_cuda`."""
    row, first, end = _place(per_row)
    lam = _load_lam(lam_ptr + row)
    start = row * per_row * 4
    for group in range(first, end, _BLOCK):
        at, inside = _elements(group, per_row)
        at += start
        z = tl.load(weight_ptr + at, mask=inside, other=0.0)
        z += tl.load(dual_ptr + at, mask=inside, other=0.0)
        linear = tl.load(linear_ptr + at, mask=inside, other=0.0)
        split = _prox(z, lam)
        dual = z - split
        tl.store(split_ptr + at, split, mask=inside)
        tl.store(dual_ptr + at, dual, mask=inside)
        tl.store(target_ptr + at, linear + rho * (split - dual), mask=inside)


@triton.jit
def _prox(z, lam):
    """The minimiser of every group, (groups, 4), for one λ."""
    even, odd = tl.split(tl.reshape(z, (_BLOCK, 2, 2)))
    z1, z3 = tl.split(even)
    z2, z4 = tl.split(odd)
    # Insertion sort, whose exchanges are undone in reverse; of equal elements the first stays so.
    e1, a, b = _exchange(tl.abs(z1), tl.abs(z2))
    e2, b, c = _exchange(b, tl.abs(z3))
    e3, a, b = _exchange(a, b)
    e4, c, d = _exchange(c, tl.abs(z4))
    e5, b, c = _exchange(b, c)
    e6, a, b = _exchange(a, b)
    work = (lam * a <= 2.0) & (c > 0.0)
    if _any(work):
        a, b, c, d = _solve(a, b, c, d, lam, work)
    else:
        c, d = c * 0.0, d * 0.0
    a, b = tl.where(e6, b, a), tl.where(e6, a, b)
    b, c = tl.where(e5, c, b), tl.where(e5, b, c)
    c, d = tl.where(e4, d, c), tl.where(e4, c, d)
    a, b = tl.where(e3, b, a), tl.where(e3, a, b)
    b, c = tl.where(e2, c, b), tl.where(e2, b, c)
    a, b = tl.where(e1, b, a), tl.where(e1, a, b)
    first = tl.join(_signed(z1, a), _signed(z3, c))
    second = tl.join(_signed(z2, b), _signed(z4, d))
    return tl.reshape(tl.join(first, second), (_BLOCK, 4))


@triton.jit
def _any(mask):
    """Whether it holds for any group of a block."""
    return tl.max(mask.to(tl.int32), 0) > 0


@triton.jit
def _exchange(a, b):
    """Whether the second is larger, and both in order."""
    return b > a, tl.maximum(a, b), tl.minimum(a, b)


@triton.jit
def _signed(z, w):
    """A magnitude with the sign of the input; zero is +0.0."""
    sign = z.to(tl.int32, bitcast=True) & -0x80000000
    return (w.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True) + 0.0


@triton.jit
def _inverse(x):
    """1/x to an ulp, by the one instruction that the hardware has for it."""
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _solve(m1, m2, m3, m4, lam, work):
    """Minimise over sorted magnitudes; without `work` two non-zeros are known to be right."""
    y1, y2, y3, y4 = m1 * lam, m2 * lam, m3 * lam, m4 * lam
    t1, t2, t3 = _three(y1, y2, y3, work)
    # Twice the objective at λ = 1, less y4²; strictly less, so that the sparser support wins a tie.
    d1, d2, d3 = t1 - y1, t2 - y2, t3 - y3
    three = d1 * d1 + d2 * d2 + d3 * d3 + 2.0 * (t1 * t2 * t3)
    better = work & (three < y3 * y3)
    u1, u2, u3 = tl.where(better, t1, y1), tl.where(better, t2, y2), tl.where(better, t3, 0.0)
    a = y4 + 0.25 - 0.5 * (y1 + y2 + y3 + y4)
    g1, g2, g3 = 4.0 * (y1 - y4), 4.0 * (y2 - y4), 4.0 * (y3 - y4)
    theta, slope, _, _ = _theta(0.5, 2.0, a, g1, g2, g3)
    most = tl.minimum(y4, 0.5)
    four = better & (y4 > 0.0) & (tl.minimum(theta, theta + slope * most) < 0.0)
    if _any(four):
        tangent = tl.minimum(0.0 - theta * _inverse(slope), most)
        p = 0.5 + tl.where(slope > 0.0, tangent, most)
        f1, f2, f3, f4 = _four(p, a, g1, g2, g3, four)
        four = four & (f3 > 0.0) & (f4 > 0.0) & (_value(f1, f2, f3, f4, y1, y2, y3, y4) < three)
        # u4 follows from the others in the sweep.
        u1, u2, u3 = tl.where(four, f1, u1), tl.where(four, f2, u2), tl.where(four, f3, u3)
    u1, u2, u3, u4 = _sweep(u1, u2, u3, y1, y2, y3, y4)
    dense = u3 > 0.0
    # No element grows; scaling by λ and back could round one up.
    inverse = _inverse(lam)
    w1 = tl.where(dense, tl.minimum(u1 * inverse, m1), m1)
    w2 = tl.where(dense, tl.minimum(u2 * inverse, m2), m2)
    w3 = tl.where(dense, tl.minimum(u3 * inverse, m3), 0.0)
    w4 = tl.where(dense, tl.minimum(u4 * inverse, m4), 0.0)
    tiny = work & (y1 < 1e-6)
    if _any(tiny):
        s1, s2, s3, s4 = _small(m1, m2, m3, m4, lam)
        w1, w2 = tl.where(tiny, s1, w1), tl.where(tiny, s2, w2)
        w3, w4 = tl.where(tiny, s3, w3), tl.where(tiny, s4, w4)
    return w1, w2, w3, w4


@triton.jit
def _three(y1, y2, y3, work):
    """The candidate with u4 = 0: Halley's steps on φ."""
    half_sum, half_spread = 0.5 * (y1 + y2), 0.5 * (y1 - y2)
    turn = y2 * _inverse(y1 + 2.0 * tl.sqrt(half_sum * half_spread))
    # Of three equal elements t could be 1, where the part of their difference is 0 / 0.
    end = tl.minimum(tl.minimum(y3, turn), 0.99999)
    # φ(0) and φ'(0), which tell whether three can beat two.
    first, fall = y1 * y2 - y3, 1.0 - (y1 * y1 + y2 * y2)
    wins = work & (tl.minimum(first, first + 0.5 * fall * end) < 0.0)
    tangent = tl.minimum(tl.maximum(0.0 - first * _inverse(fall), 0.0), end)
    t = tl.where(fall > 0.0, tangent, end)
    before, _ = _halley_three(t, half_sum, half_spread, y3)
    t, more = _halley_three(before, half_sum, half_spread, y3)
    far = wins & (more > 0.0)
    rounds = 0
    while _any(far) & (rounds < _ROUNDS):
        after, more = _halley_three(t, half_sum, half_spread, y3)
        t, far = tl.where(far, after, t), far & (more > 0.0)
        rounds += 1
    # Without a root, which is without a minimiser of this support, t ends in a feasible point.
    t = tl.minimum(t, end)
    inverse = _inverse(1.0 - t * t)
    return (y1 - t * y2) * inverse, tl.maximum((y2 - t * y1) * inverse, 0.0), t


@triton.jit
def _halley_three(t, half_sum, half_spread, y3):
    """A step from t, which ends at zero at the least.

    And a number above zero only where another should follow: the step was long, φ rises at t and
    its parabola there has a root.
    """
    plus, minus = _inverses(t)
    total, spread = half_sum * plus, half_spread * minus
    total, spread = total * total, spread * spread
    phi = t - y3 + total - spread
    total, spread = total * plus, spread * minus
    slope = 1.0 - 2.0 * (total + spread)
    bend = 3.0 * (total * plus - spread * minus)
    square, mixed = slope * slope, phi * bend
    after = tl.maximum(t + phi * slope * _inverse(mixed - square), 0.0)
    far = tl.maximum(tl.abs(mixed) - _BENT_T * square, tl.abs(after - t) - _CLOSE_T)
    return after, tl.minimum(tl.minimum(slope, square - 4.0 * mixed), far)


@triton.jit
def _inverses(t):
    """1/(1+t) and 1/(1-t) by one division."""
    inverse = _inverse(1.0 - t * t)
    part = t * inverse
    return inverse - part, inverse + part


@triton.jit
def _four(p, a, g1, g2, g3, matters):
    """The candidate with four non-zeros: Halley's steps on Θ; u4 is p - ½."""
    p, more = _halley_four(p, a, g1, g2, g3)
    far = matters & (more > 0.0)
    rounds = 0
    while _any(far) & (rounds < _ROUNDS):
        after, more = _halley_four(p, a, g1, g2, g3)
        p, far = tl.where(far, after, p), far & (more > 0.0)
        rounds += 1
    p = tl.minimum(p, 1.0)
    ratio = a * _inverse(p)
    base, h = 0.5 * (p - ratio - 1.0), p + ratio
    square = h * h
    u1 = base + 0.5 * tl.sqrt(g1 + square)
    u2 = base + 0.5 * tl.sqrt(g2 + square)
    u3 = base + 0.5 * tl.sqrt(g3 + square)
    return u1, u2, u3, p - 0.5


@triton.jit
def _halley_four(p, a, g1, g2, g3):
    """A step from p. Every u4 in [0, ½] has p in [½, 1]; a step may undershoot and come back.

    And a number above zero only where another should follow: the step was long, and the parabola of
    Θ at p has a root, or nearly has one. Its discriminant has a 4, and a 3 is the margin for what
    the parabola leaves out.
    """
    theta, slope, curve, rate = _theta(p, _inverse(p), a, g1, g2, g3)
    square, mixed = slope * slope, theta * curve
    after = tl.maximum(p + theta * slope * _inverse(mixed - square), 0.25)
    far = tl.abs((after - p) * rate) - _CLOSE_P
    return after, tl.minimum(square - 3.0 * mixed, far)


@triton.jit
def _theta(p, inverse, a, g1, g2, g3):
    """2 Θ at p, its slope, half of its second derivative, and how fast h = p + a/p, 2 T, changes.

    That is h' in units of each √(g_i + h²), summed; g_i is 4 d_i.
    """
    ratio = a * inverse
    bend = ratio * inverse
    h, lean = p + ratio, 1.0 - bend
    # Kept from zero, where all gaps may be zero too.
    square = h * h + 1e-30
    s1, s2, s3 = g1 + square, g2 + square, g3 + square
    i1, i2, i3 = tl.rsqrt(s1), tl.rsqrt(s2), tl.rsqrt(s3)
    total, cubes = i1 + i2 + i3, i1 * i1 * i1 + i2 * i2 * i2 + i3 * i3 * i3
    theta = 3.0 * p - 4.0 - ratio + s1 * i1 + s2 * i2 + s3 * i3
    grow, twist = h * lean, bend * inverse
    slope = 3.0 + bend + grow * total
    curve = (0.5 * lean * lean + h * twist) * total - twist - 0.5 * grow * grow * cubes
    return theta, slope, curve, lean * total


@triton.jit
def _sweep(u1, u2, u3, y1, y2, y3, y4):
    """One pass of exact coordinate minimisation, smallest coordinate first."""
    u4 = tl.maximum(y4 - (u1 * u2 + (u1 + u2) * u3), 0.0)
    u3 = tl.maximum(y3 - (u1 * u2 + (u1 + u2) * u4), 0.0)
    u2 = tl.maximum(y2 - (u1 * u3 + (u1 + u3) * u4), 0.0)
    u1 = tl.maximum(y1 - (u2 * u3 + (u2 + u3) * u4), 0.0)
    return u1, u2, u3, u4


@triton.jit
def _value(u1, u2, u3, u4, y1, y2, y3, y4):
    """Twice the objective at λ = 1, less that of dropping the smallest element, y4²."""
    d1, d2, d3 = u1 - y1, u2 - y2, u3 - y3
    triples = u1 * u2 * (u3 + u4) + u3 * u4 * (u1 + u2)
    return d1 * d1 + d2 * d2 + d3 * d3 + u4 * (u4 - 2.0 * y4) + 2.0 * triples


@triton.jit
def _small(m1, m2, m3, m4, lam):
    """The coordinate sweep without scaling, where λ·m is at most 1e-6."""
    s1, s2, s3 = lam * m1, lam * m2, lam * m3
    w4 = tl.maximum(m4 - (s1 * m2 + s1 * m3 + s2 * m3), 0.0)
    w3 = tl.maximum(m3 - (s1 * m2 + s1 * w4 + s2 * w4), 0.0)
    w2 = tl.maximum(m2 - (s1 * w3 + s1 * w4 + s3 * w4), 0.0)
    w1 = tl.maximum(m1 - (s2 * w3 + s2 * w4 + s3 * w4), 0.0)
    return w1, w2, w3, w4
