"""N:M patterns along any axis: masks, projection and check. 2:4 unless told otherwise.

A pattern keeps at most `kept` non-zeros in every `group` consecutive elements along one axis. That
axis must be the reduction axis of the multiplication that the weight takes part in; which one it is
depends on the layout, so every function takes it as an argument.
"""

import torch
from torch import Tensor

# Elements of a group of 2:4, of which two may be kept.
GROUP = 4


def mask_24(score: Tensor, axis: int = -1, *, kept: int = 2, group: int = GROUP) -> Tensor:
    """Mark the `kept` largest scores of every group.

    Args:
        score: any shape and real dtype, without NaN; a tie goes to the lower index.
        axis: the axis of the groups; its length must be a multiple of `group`.
        kept: marks per group.
        group: group length.

    Returns:
        Boolean mask of the shape of `score` with exactly `kept` marks per group.

    Raises:
        ValueError: the axis does not divide into groups.
    """
    groups = _groups(score, axis, group).unbind(-1)
    beaten_by = [
        torch.zeros(groups[0].shape, dtype=torch.int8, device=score.device) for _ in groups
    ]
    for i in range(group):
        for j in range(i + 1, group):
            later_wins = groups[j] > groups[i]
            beaten_by[i] += later_wins
            beaten_by[j] += ~later_wins
    mask = torch.stack([count < kept for count in beaten_by], dim=-1)
    return mask.flatten(-2).movedim(-1, axis)


def project_24(weight: Tensor, axis: int = -1, *, kept: int = 2, group: int = GROUP) -> Tensor:
    """Zero all but the `kept` largest magnitudes of every group: the Euclidean projection.

    Masked elements become +0.0, never -0.0, so that byte-level checkers agree.
    """
    mask = mask_24(weight.abs(), axis, kept=kept, group=group)
    return weight.masked_fill(~mask, 0.0)


def is_24(weight: Tensor, axis: int = -1, *, kept: int = 2, group: int = GROUP) -> bool:
    """Tell whether no group has more than `kept` non-zeros. False if the axis does not divide."""
    if weight.shape[axis] % group:
        return False
    return first_violation(weight, axis, kept=kept, group=group) is None


def first_violation(
    weight: Tensor, axis: int = -1, *, kept: int = 2, group: int = GROUP
) -> tuple[int, ...] | None:
    """Return the index of the first element of the first group with too many non-zeros, or None.

    "First" is C order over the tensor with `axis` moved last; the index is that of the tensor as
    given.
    """
    axis %= weight.ndim
    bad = _nonzeros(weight, axis, group) > kept
    if not bool(bad.any()):
        return None
    *outer, number = (int(i) for i in bad.nonzero()[0])
    return (*outer[:axis], number * group, *outer[axis:])


def unconverged_groups(weight: Tensor) -> int:
    """Number of groups along the last axis with more than two non-zeros."""
    return int((_nonzeros(weight, -1, GROUP) > 2).sum())


def final_mask(iterate: Tensor, fallback: Tensor) -> Tensor:
    """The 2:4 mask of a solver's last iterate, (rows, d) bool.

    Keeps the largest non-zeros of `iterate`; groups with fewer than two are filled by |fallback|.
    """
    kept = mask_24(iterate.abs()) & (iterate != 0)
    # Two comparisons: one sum of both sizes would round away what tells tiny weights apart.
    return mask_24(fallback.abs().masked_fill(kept, torch.inf))


def _nonzeros(weight: Tensor, axis: int, group: int) -> Tensor:
    """How many of each group are not zero, (..., length / group), in the smallest type that does.

    torch sums flags in 64 bits unless told otherwise, which takes three times as long.
    """
    dtype = torch.int8 if group < 128 else torch.int64
    return (_groups(weight, axis, group) != 0).sum(-1, dtype=dtype)


def _groups(tensor: Tensor, axis: int, group: int) -> Tensor:
    """View with the groups as a new last dimension: (..., length / group, group)."""
    length = tensor.shape[axis]
    if length % group:
        raise ValueError(
            f"axis {axis} of a tensor of shape {tuple(tensor.shape)} has length {length}, "
            f"which is not a multiple of {group}"
        )
    groups: Tensor = tensor.movedim(axis, -1).unflatten(-1, (length // group, group))
    return groups
