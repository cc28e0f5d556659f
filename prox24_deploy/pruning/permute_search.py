"""Which channels to put into one group of four, so that two of four keep most of the score.

Which input channels share a group is a matter of their order alone. Any two groups have eight
channels, which 35 splits make two groups of; in each round all groups are paired at random, and
each pair takes the best of its splits. The sum that two of four keep never falls. Pairs of groups
and exhaustive splits of small sets are the search of Pool and Yu, Channel Permutations for N:M
Sparsity, NeurIPS 2021; that pairs are drawn at random, a sample of rows and the stop are our own.
"""

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from prox24_deploy.pruning.solvers.kernels import has_triton
from prox24_deploy.sparsity.pattern import GROUP

# Each split of eight channels once: the first stays in the first group.
_SPLITS = [
    ((0, *three), tuple(i for i in range(1, 8) if i not in three))
    for three in combinations(range(1, 8), 3)
]
# Rounds at most, and those in a row that together must gain this part of the score.
_ROUNDS, _WATCHED, _LEAST_GAIN = 800, 40, 1e-4
# Rows of a set that are looked at; more tell hardly more of which channels go together.
_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Found:
    """An order of channels.

    Attributes:
        order: (sets, channels), the channel that goes to each place.
        before: the share of the score that two of four keep in the order that was given.
        after: the share in the order that was found.
    """

    order: Tensor
    before: float
    after: float


def search_order(score: Tensor, seed: int = 0) -> Found:
    """Find an order of the channels of each set in which the best two of four keep more.

    Args:
        score: (sets, rows, channels), at least 0, what each weight is worth; channels are a
            multiple of four and stay within their set.
        seed: of the pairs.

    Raises:
        ValueError: the channels do not divide into groups of four.
    """
    sets, rows, channels = score.shape
    if channels % GROUP:
        raise ValueError(f"{channels} channels do not divide into groups of {GROUP}")
    # Channels first, so that one of them is one run of memory.
    sample = score[:, :: -(-rows // _ROWS)].transpose(1, 2).float().contiguous()
    flat = sample.flatten(0, 1)
    groups = torch.arange(sets * channels, device=score.device).view(sets, -1, GROUP)
    groups = _improved(flat, groups, torch.Generator().manual_seed(seed))
    # Sorted, so that an order that gains nothing is the order that was given.
    groups = groups.sort(-1).values
    first = groups[..., 0].argsort(1)
    groups = groups.gather(1, first[..., None].expand_as(groups))
    order = groups.flatten(1) - channels * torch.arange(sets, device=score.device)[:, None]
    return Found(order=order, before=retained(score), after=retained(reordered(score, order)))


def reordered(score: Tensor, order: Tensor) -> Tensor:
    """Channels (sets, rows, channels) in an order (sets, channels) of each set."""
    return score.gather(2, order[:, None].expand_as(score))


def retained(score: Tensor) -> float:
    """The share of the score (sets, rows, channels) that the best two of each group keep."""
    total = float(score.double().sum())
    kept = score.unflatten(-1, (-1, GROUP)).topk(2, dim=-1).values.double().sum()
    return float(kept) / total if total > 0 else 1.0


def _improved(flat: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
    """Rounds of pairs until they gain next to nothing; `flat` is (channels, rows)."""
    count = groups.shape[1]
    if count < 2:
        return groups
    total, gained = float(flat.sum()), []
    for _ in range(_ROUNDS):
        drawn = torch.rand(groups.shape[:2], generator=generator).argsort(1).to(groups.device)
        mixed = groups.gather(1, drawn[..., None].expand_as(groups))
        paired = mixed[:, : count // 2 * 2].reshape(-1, 2 * GROUP)
        paired, gain = _split(flat, paired)
        mixed[:, : count // 2 * 2] = paired.view(len(groups), -1, GROUP)
        groups = mixed
        gained.append(gain)
        if len(gained) >= _WATCHED and sum(gained[-_WATCHED:]) <= _LEAST_GAIN * total:
            break
    return groups


def _split(flat: Tensor, paired: Tensor) -> tuple[Tensor, float]:
    """The best split of each pair of groups, (pairs, 8) channels, and what all gain."""
    splits = torch.tensor([one + other for one, other in _SPLITS], device=flat.device)
    if has_triton(flat):
        from prox24_deploy.pruning.permute_search_cuda import kept_cuda

        sums = kept_cuda(flat, paired, splits)
    else:
        sums = kept(flat, paired)
    best, chosen = sums.max(0)
    return paired.gather(1, splits[chosen]), float((best - sums[0]).sum())


def kept(flat: Tensor, paired: Tensor) -> Tensor:
    """What the best two of four keep in both groups of each split, (splits, pairs).

    Args:
        flat: score (channels, rows).
        paired: channels (pairs, 8).
    """
    values = [flat[channel] for channel in paired.unbind(1)]
    larger = {(i, j): torch.maximum(values[i], values[j]) for i, j in combinations(range(8), 2)}
    both = {(i, j): values[i] + values[j] for i, j in combinations(range(8), 2)}

    def two_of(four: tuple[int, ...]) -> Tensor:
        # They come from its first two, from its last two, or one from each.
        first, last = (four[0], four[1]), (four[2], four[3])
        mixed = larger[first] + larger[last]
        return torch.maximum(mixed, torch.maximum(both[first], both[last])).sum(1)

    return torch.stack([two_of(one) + two_of(other) for one, other in _SPLITS])
