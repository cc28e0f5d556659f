"""Dense rows in a 2:4 matrix: in each layer the rows that lose most by the pattern stay dense.

What a row loses is how far its quadratic is above the minimum over all weights. A dense row takes
that minimum, so that it makes up for what was pruned before it. The matrix becomes two products and
a concatenation, or a scatter where the rows do not lie together.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from unittest.mock import patch

import torch
from torch import Tensor, nn
from variant_lab import Figures, Lab

from prox24_deploy.config.options import PruneOptions
from prox24_deploy.engines.cusparselt.profile import GemmTiming, GpuProfile, read_profile
from prox24_deploy.model.layers import from_matrix, layer_at, to_matrix
from prox24_deploy.pruning import block
from prox24_deploy.pruning.activations import BlockPair
from prox24_deploy.pruning.layer_group import SolvedLayer, group_problem, solve_group
from prox24_deploy.pruning.ranks import Ranks
from prox24_deploy.pruning.second_moments import SecondMoments
from prox24_deploy.pruning.solvers.problem import LayerProblem
from prox24_deploy.pruning.solvers.products import float32_products

# Bytes of an output of a product in 16 bits that a concatenation reads and writes.
_MOVED = 4


def with_rows(lab: Lab, share: float) -> tuple[nn.Module, Figures]:
    """Prune with so many rows of each layer left dense."""
    with dense_rows(share) as counts:
        model = lab.prune()
    return model, {"dense": counts[0] / counts[1], "rows": share}


def with_layers(lab: Lab, name: str) -> tuple[nn.Module, Figures]:
    """Prune all but the layers of one name, which stay as they are."""
    left = [path for path in lab.targets if path.endswith(name)]
    model = lab.prune(dense=dict.fromkeys(left, "the variant leaves it dense"))
    sizes = {path: layer_at(model, path).weight.numel() for path in lab.targets}
    return model, {"dense": sum(sizes[path] for path in left) / sum(sizes.values())}


@contextmanager
def dense_rows(share: float) -> Iterator[list[int]]:
    """Let the solver leave rows dense; yields the number of dense weights and of all."""
    counts = [0, 0]

    def solve(
        twin: BlockPair,
        group: Sequence[str],
        moments: SecondMoments,
        options: PruneOptions,
        dtype: Callable[[str], torch.dtype],
        ranks: Ranks,
        **_: bool,
    ) -> dict[str, SolvedLayer]:
        # The moments are asked for once more below, whatever else is solved on them.
        solved = solve_group(twin, group, moments, options, dtype, ranks)
        for name, found in solved.items():
            layer = layer_at(twin.pruned, name)
            problem = group_problem(to_matrix(layer, layer.weight), moments, options, name)
            with float32_products():
                after = _filled(to_matrix(layer, found.weight).float(), problem, share)
            counts[0] += round(share * len(after)) * after.shape[1]
            counts[1] += after.numel()
            weight = from_matrix(layer, after).to(found.weight.dtype)
            solved[name] = replace(found, weight=weight)
        return solved

    with patch.object(block, "solve_group", solve):
        yield counts


def _filled(pruned: Tensor, problem: LayerProblem, share: float) -> Tensor:
    """The weights with the rows that lose most replaced by their minimum over all weights."""
    factor = torch.linalg.cholesky(problem.curvature)
    best = torch.cholesky_solve(problem.linear.T, factor).T
    lost = problem.loss(pruned * problem.scale) - problem.loss(best)
    chosen = lost.topk(round(share * len(lost))).indices
    result = pruned.clone()
    result[chosen] = problem.to_weight(best).masked_fill(problem.dead, 0.0)[chosen]
    return result


def costs(share: float, profiles: Sequence[str], least: int) -> list[Figures]:
    """What dense rows cost in time: speed-up of a layer without, with, and with no concatenation.

    The dense and the 2:4 part are taken to run at the rates of the whole matrix, and the outputs to
    be moved once at the rate of the memory. Small products are slower than that; outputs that a
    cache holds are moved faster. Geometric means over measured shapes of at least so many rows of
    activations for which 2:4 pays.
    """
    found: list[Figures] = []
    for name in profiles:
        profile = read_profile(Path(f"{name}.json"))
        half = [t for t in profile.gemms if t.format in {"float16", "bfloat16"}]
        paying = [t for t in half if t.shape.m >= least and t.speedup > 1]
        if paying:
            split = [share + (1 - share) / timing.speedup for timing in paying]
            moved = [_moved(profile, timing) for timing in paying]
            both = [a + b for a, b in zip(split, moved, strict=True)]
            found.append(
                {
                    "gpu": profile.gpu,
                    "shapes": len(paying),
                    "rows": share,
                    "speedup": _mean([timing.speedup for timing in paying]),
                    "with_rows": 1 / _mean(both),
                    "in_place": 1 / _mean(split),
                }
            )
    return found


def _moved(profile: GpuProfile, timing: GemmTiming) -> float:
    """Time of moving the outputs once, in units of the dense product."""
    moved = _MOVED * timing.shape.m * timing.shape.n / profile.memory_rate
    return moved / timing.dense_us


def _mean(values: Sequence[float]) -> float:
    return math.exp(fmean(map(math.log, values)))
