"""The optimisers of a recovery: rates relative to what each parameter is, and states as tensors.

AdamW (Loshchilov and Hutter, arXiv 1711.05101) keeps two values beside each that is trained.
Adafactor (Shazeer and Stern, arXiv 1804.04235) keeps one for each row and column of a matrix, and
none of past gradients. Neither decays weights. Both are those of torch.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prox24_deploy.core.types import RecoverOptimizer
from prox24_deploy.recovery.student import Trained

_BETAS = (0.9, 0.95)
# Adafactor of torch squares the first, and 1e-30 of the paper squared is 0 in float32. Steps are
# relative to the root mean square of a parameter, or to the second where that is larger.
_EPSILONS = (1e-16, 1e-3)
# Scales are rounded to so many in an octave, so that one kernel moves many parameters.
_IN_AN_OCTAVE = 4
_SCALE = "scale"


def make_optimizer(name: RecoverOptimizer, trained: Sequence[Trained]) -> torch.optim.Optimizer:
    """An optimiser whose groups are of parameters with about the same scale; or of one each."""
    if name == "adafactor":
        groups: list[dict[str, Any]] = [
            {"params": [each.parameter], _SCALE: each.scale} for each in trained
        ]
        # Over many tensors at once, it would hold their updates all at once, too.
        return torch.optim.Adafactor(groups, eps=_EPSILONS, weight_decay=0.0, foreach=False)
    alike: dict[float, list[Tensor]] = {}
    for each in trained:
        alike.setdefault(_rounded(each.scale), []).append(each.parameter)
    groups = [{"params": parameters, _SCALE: scale} for scale, parameters in alike.items()]
    # One kernel for each group, where there is one, in the place of a dozen.
    fused = all(each.parameter.is_cuda for each in trained)
    return torch.optim.AdamW(groups, betas=_BETAS, weight_decay=0.0, fused=fused)


def _rounded(scale: float) -> float:
    """The nearest scale of those that groups have; 0 stays 0."""
    if not scale:
        return 0.0
    return float(2.0 ** (round(_IN_AN_OCTAVE * math.log2(scale)) / _IN_AN_OCTAVE))


@torch.no_grad()
def set_rates(optimizer: torch.optim.Optimizer, trained: Sequence[Trained], rate: float) -> None:
    """Let a step move each parameter by `rate` times its scale, in root mean square at most."""
    sizes = [1.0] * len(optimizer.param_groups)
    if isinstance(optimizer, torch.optim.Adafactor):
        # It multiplies by what the parameter is.
        norms = torch.stack([each.parameter.norm() for each in trained]).tolist()
        means = (n / each.parameter.numel() ** 0.5 for n, each in zip(norms, trained, strict=True))
        sizes = [max(_EPSILONS[1], mean) for mean in means]
    for group, size in zip(optimizer.param_groups, sizes, strict=True):
        group["lr"] = rate * group[_SCALE] / size


def moments_of(
    optimizer: torch.optim.Optimizer, trained: Sequence[Trained]
) -> list[dict[str, Tensor]]:
    """What it keeps of each parameter by name; nothing of one that had no gradient yet."""
    states = [optimizer.state.get(each.parameter, {}) for each in trained]
    return [{n: t for n, t in state.items() if isinstance(t, Tensor)} for state in states]


def put_moments(
    optimizer: torch.optim.Optimizer,
    trained: Sequence[Trained],
    moments: Sequence[Mapping[str, Tensor]],
) -> None:
    """Set what `moments_of` gave; the number of steps stays on the CPU unless steps are fused."""
    fused = bool(optimizer.defaults.get("fused"))
    for each, known in zip(trained, moments, strict=True):
        if known:
            device = each.parameter.device
            optimizer.state[each.parameter] = {
                name: tensor.clone()
                if name == "step" and not fused
                else tensor.to(device, copy=True)
                for name, tensor in known.items()
            }


def state_bytes(name: RecoverOptimizer, matrices: int, vectors: int) -> int:
    """Bytes of its state for so many values; the rows and columns of Adafactor count as none."""
    return 8 * (matrices + vectors) if name == "adamw" else 4 * vectors
