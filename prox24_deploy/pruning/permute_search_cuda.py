"""What each split of each pair of groups keeps, as one GPU kernel.

Of 8 channels there are 35 splits; in single operations of a tensor library that is some 400
launches a round, and a search takes hundreds of rounds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows that a program looks at at a time.
_ROWS = tl.constexpr(256)


def kept_cuda(flat: Tensor, paired: Tensor, splits: Tensor) -> Tensor:
    """As `permute_search.kept`.

    Args:
        flat: score (channels, rows) on a GPU, float32, contiguous.
        paired: channels (pairs, 8), int64, contiguous.
        splits: places of the eight in two groups of four, (splits, 8), int64, contiguous.

    Returns:
        (splits, pairs), float32.
    """
    out = torch.empty(len(splits), len(paired), device=flat.device)
    with torch.cuda.device(flat.device):
        _kept_kernel[(len(paired), len(splits))](
            flat, paired, splits, out, flat.shape[1], len(paired)
        )
    return out


@triton.jit
def _kept_kernel(flat_ptr, paired_ptr, splits_ptr, out_ptr, rows, pairs):
    """One split of one pair, over all rows."""
    pair, split = tl.program_id(0), tl.program_id(1)
    own = paired_ptr + pair.to(tl.int64) * 8
    place = splits_ptr + split * 8
    c0 = flat_ptr + tl.load(own + tl.load(place)) * rows
    c1 = flat_ptr + tl.load(own + tl.load(place + 1)) * rows
    c2 = flat_ptr + tl.load(own + tl.load(place + 2)) * rows
    c3 = flat_ptr + tl.load(own + tl.load(place + 3)) * rows
    c4 = flat_ptr + tl.load(own + tl.load(place + 4)) * rows
    c5 = flat_ptr + tl.load(own + tl.load(place + 5)) * rows
    c6 = flat_ptr + tl.load(own + tl.load(place + 6)) * rows
    c7 = flat_ptr + tl.load(own + tl.load(place + 7)) * rows
    total = tl.zeros((_ROWS,), tl.float32)
    for begin in range(0, rows, _ROWS):
        row = begin + tl.arange(0, _ROWS)
        inside = row < rows
        one = _two_of(_at(c0, row, inside), _at(c1, row, inside),
                      _at(c2, row, inside), _at(c3, row, inside))  # fmt: skip
        other = _two_of(_at(c4, row, inside), _at(c5, row, inside),
                        _at(c6, row, inside), _at(c7, row, inside))  # fmt: skip
        total += one + other
    tl.store(out_ptr + split * pairs + pair, tl.sum(total, axis=0))


@triton.jit
def _at(channel_ptr, row, inside):
    """The score of some rows, 0 beyond the last."""
    return tl.load(channel_ptr + row, mask=inside, other=0.0)


@triton.jit
def _two_of(a, b, c, d):
    """The sum of the two largest of four."""
    return tl.maximum(tl.maximum(a, b) + tl.maximum(c, d), tl.maximum(a + b, c + d))
