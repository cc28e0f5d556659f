"""Layers whose weights or inputs say nothing about which weights to keep."""

import torch
from torch import Tensor

from prox24_deploy.pruning.second_moments import SecondMoments

_NO_WEIGHTS = "all its weights are zero"
_NO_TOKENS = (
    "no calibration token was routed to its expert, so it keeps the largest of its dense weights"
)
_NO_INPUTS = "its inputs are all zero on the calibration samples, so that its weights are 0 now"
_TINY_WEIGHTS = (
    "its weights are so near the smallest number of their type that products of them vanish"
)
_TINY_INPUTS = (
    "its inputs are so near the smallest number of float32 that products of them vanish, so which "
    "weights it keeps was chosen blindly"
)
# From this share of its inputs on, that calibration never activates some is said of a layer.
_MANY = 0.1


def doubt_about(
    weight: Tensor, stored: torch.dtype, moments: SecondMoments, *, chosen: bool = True
) -> str:
    """Why the error of a pruned layer says nothing, as the end of a sentence; "" if it does.

    Such a layer is pruned all the same: the mask does no harm where nothing comes in or goes out,
    but its relative error is 0, or anything, whatever was pruned; or it is that of the inputs that
    the samples have, and others may come.

    Args:
        weight: before pruning, (rows, d).
        stored: the type that the checkpoint stores it in.
        moments: of the inputs that it was pruned on.
        chosen: whether weights were chosen at all; not in a layer that was 2:4 before.
    """
    single = torch.finfo(torch.float32)
    largest = float(weight.abs().max())
    square = float(moments.pruned.diagonal().max()) / max(moments.tokens, 1)
    if largest == 0:
        return _NO_WEIGHTS
    if not chosen:
        return ""
    if moments.tokens == 0:
        return _NO_TOKENS
    if square == 0:
        return _NO_INPUTS
    # The square of a smaller weight is no normal number of float32, in which layers are solved.
    if largest < max(single.tiny**0.5, torch.finfo(stored).tiny):
        return _TINY_WEIGHTS
    if square < single.tiny:
        return _TINY_INPUTS
    dead = int((moments.pruned.diagonal() == 0).sum())
    return _some_inputs(dead, len(moments.pruned)) if dead >= _MANY * len(moments.pruned) else ""


def _some_inputs(dead: int, inputs: int) -> str:
    return (
        f"{dead} of its {inputs} inputs are zero on all calibration samples, so that their weights "
        "are 0 now"
    )
