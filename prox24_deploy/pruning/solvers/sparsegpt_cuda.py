"""The columns of a block of SparseGPT as one GPU kernel.

Column by column, each of 128 columns of a block would be some twenty launches on vectors of a few
thousand rows. Rows do not depend on each other: here a program holds the block of some rows in
registers from the first column to the last.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of a program.
_ROWS = tl.constexpr(32)
# The most columns of a block.
_COLUMNS = tl.constexpr(128)


def prune_block_cuda(weight: Tensor, mask: Tensor, factor: Tensor, begin: int, end: int) -> Tensor:
    """Prune columns begin..end in place; see `baselines._prune_block`.

    Args:
        weight: (rows, d) on a GPU, float32, contiguous, d a multiple of four.
        mask: (rows, d) bool, contiguous.
        factor: upper Cholesky factor of the inverse curvature, (d, d), float32, contiguous.
        begin: first column, a multiple of four.
        end: one behind the last, at most 128 further.

    Returns:
        The errors of the columns over the diagonal of the factor, (rows, end - begin).
    """
    rows, features = weight.shape
    width = end - begin
    errors = torch.empty(rows, width, device=weight.device)
    with torch.cuda.device(weight.device):
        _prune_kernel[(triton.cdiv(rows, _ROWS.value),)](
            weight, mask.view(torch.uint8), factor, errors, rows, features, begin, width
        )
    return errors


@triton.jit
def _prune_kernel(
    weight_ptr, mask_ptr, factor_ptr, errors_ptr, rows, features, begin, width
):  # fmt: skip
    """Go through the groups of `width` columns from `begin` on, for some rows."""
    row = (tl.program_id(0) * _ROWS + tl.arange(0, _ROWS)).to(tl.int64)
    columns = tl.arange(0, _COLUMNS)
    in_rows = row < rows
    at = row[:, None] * features + begin + columns[None, :]
    inside = in_rows[:, None] & (columns < width)[None, :]
    w = tl.load(weight_ptr + at, mask=inside, other=0.0)
    errors = tl.zeros((_ROWS, _COLUMNS), tl.float32)
    for first in range(0, width, 4):
        u = factor_ptr + (begin + first).to(tl.int64) * features + begin
        line0 = tl.load(u + columns, mask=columns < width, other=0.0)
        line1 = tl.load(u + features + columns, mask=columns < width, other=0.0)
        line2 = tl.load(u + 2 * features + columns, mask=columns < width, other=0.0)
        line3 = tl.load(u + 3 * features + columns, mask=columns < width, other=0.0)
        d0, d1 = _pick(line0, columns, first), _pick(line1, columns, first + 1)
        d2, d3 = _pick(line2, columns, first + 2), _pick(line3, columns, first + 3)
        w0, w1 = _column(w, columns, first), _column(w, columns, first + 1)
        w2, w3 = _column(w, columns, first + 2), _column(w, columns, first + 3)
        k0, k1, k2, k3 = _kept(w0 / d0, w1 / d1, w2 / d2, w3 / d3)
        e0 = tl.where(k0, 0.0, w0 / d0)
        w1 -= e0 * _pick(line0, columns, first + 1)
        e1 = tl.where(k1, 0.0, w1 / d1)
        w2 -= e0 * _pick(line0, columns, first + 2) + e1 * _pick(line1, columns, first + 2)
        e2 = tl.where(k2, 0.0, w2 / d2)
        w3 -= e0 * _pick(line0, columns, first + 3) + e1 * _pick(line1, columns, first + 3)
        w3 -= e2 * _pick(line2, columns, first + 3)
        e3 = tl.where(k3, 0.0, w3 / d3)
        ahead = e0[:, None] * line0[None, :] + e1[:, None] * line1[None, :]
        ahead += e2[:, None] * line2[None, :] + e3[:, None] * line3[None, :]
        w = tl.where((columns >= first + 4)[None, :], w - ahead, w)
        w = _place(w, columns, first, tl.where(k0, w0, 0.0), tl.where(k1, w1, 0.0),
                   tl.where(k2, w2, 0.0), tl.where(k3, w3, 0.0))  # fmt: skip
        errors = _place(errors, columns, first, e0, e1, e2, e3)
        kept = mask_ptr + row * features + begin + first
        tl.store(kept, k0.to(tl.uint8), mask=in_rows)
        tl.store(kept + 1, k1.to(tl.uint8), mask=in_rows)
        tl.store(kept + 2, k2.to(tl.uint8), mask=in_rows)
        tl.store(kept + 3, k3.to(tl.uint8), mask=in_rows)
    tl.store(weight_ptr + at, w, mask=inside)
    tl.store(errors_ptr + row[:, None] * width + columns[None, :], errors, mask=inside)


@triton.jit
def _pick(line, columns, number):
    """One element of a vector."""
    return tl.sum(tl.where(columns == number, line, 0.0), axis=0)


@triton.jit
def _column(block, columns, number):
    """One column of a block, (rows,)."""
    return tl.sum(tl.where((columns == number)[None, :], block, 0.0), axis=1)


@triton.jit
def _place(block, columns, first, c0, c1, c2, c3):
    """The block with four columns in the place of those from `first` on."""
    offset = (columns - first)[None, :]
    block = tl.where(offset == 0, c0[:, None], block)
    block = tl.where(offset == 1, c1[:, None], block)
    block = tl.where(offset == 2, c2[:, None], block)
    return tl.where(offset == 3, c3[:, None], block)


@triton.jit
def _kept(s0, s1, s2, s3):
    """Which two of four numbers have the largest squares; a tie goes to the lower index."""
    s0, s1, s2, s3 = s0 * s0, s1 * s1, s2 * s2, s3 * s3
    b01, b02, b03 = (s1 > s0).to(tl.int32), (s2 > s0).to(tl.int32), (s3 > s0).to(tl.int32)
    b12, b13, b23 = (s2 > s1).to(tl.int32), (s3 > s1).to(tl.int32), (s3 > s2).to(tl.int32)
    k0 = b01 + b02 + b03 < 2
    k1 = (1 - b01) + b12 + b13 < 2
    k2 = (1 - b02) + (1 - b12) + b23 < 2
    k3 = (1 - b03) + (1 - b13) + (1 - b23) < 2
    return k0, k1, k2, k3
