"""The setting of the paper in small: correlated features, and the optimum by enumeration.

Each draw is one row of weights over a few cells whose features come in nearly equal pairs, so that
keeping both of a pair wastes a slot. All masks are enumerated (six per cell) with exact least
squares on each. Printed per method, all refined to the optimum of their own mask: how often the
mask is the best one, and the mean loss relative to the best.

    python benchmarks/toy.py [--cells 3] [--draws 200] [--correlation 0.9] [--json]
"""

import argparse
import itertools
import json
from collections.abc import Callable

import torch
from torch import Tensor

from prox24_deploy.pruning.solvers.admm import prox_admm
from prox24_deploy.pruning.solvers.baselines import magnitude_mask, sparsegpt, wanda_mask
from prox24_deploy.pruning.solvers.ista import IstaOptions, ista
from prox24_deploy.pruning.solvers.problem import LayerProblem, layer_problem
from prox24_deploy.pruning.solvers.solver import PRESETS

METHODS: dict[str, Callable[[LayerProblem], Tensor]] = {
    "magnitude": magnitude_mask,
    "wanda": wanda_mask,
    "sparsegpt": lambda problem: sparsegpt(problem)[1],
    "ista": lambda problem: ista(problem, IstaOptions())[1],
    "prox fast": lambda problem: prox_admm(problem, PRESETS["fast"])[1],
    "prox default": lambda problem: prox_admm(problem, PRESETS["default"])[1],
    "prox best": lambda problem: prox_admm(problem, PRESETS["best"])[1],
}


def draw_layer(
    cells: int, rows: int, correlation: float, generator: torch.Generator
) -> LayerProblem:
    """Weights (rows, 4 cells) on features of unit variance, correlated in pairs inside a cell."""
    pair = torch.tensor([[1.0, correlation], [correlation, 1.0]])
    gram = torch.block_diag(*[pair] * (2 * cells))
    mixing = 0.3 * torch.randn(4 * cells, 4 * cells, generator=generator) / (4 * cells) ** 0.5
    mix = torch.eye(4 * cells) + mixing
    weight = torch.randn(rows, 4 * cells, generator=generator)
    return layer_problem(weight, mix @ gram @ mix.T, 0.01)


def optimum_per_mask(problem: LayerProblem, cells: int) -> tuple[Tensor, Tensor]:
    """All masks (6^cells, 4 cells) and the excess loss of the best weights on each, per row."""
    pairs = list(itertools.combinations(range(4), 2))
    kept = torch.tensor(
        [
            [4 * cell + i for cell, pair in enumerate(choice) for i in pair]
            for choice in itertools.product(pairs, repeat=cells)
        ]
    )
    curvature, linear = problem.curvature.double(), problem.linear.double()
    blocks = curvature[kept[:, :, None], kept[:, None, :]]
    sides = linear[:, kept].permute(1, 2, 0)
    gained = 0.5 * (sides * torch.linalg.solve(blocks, sides)).sum(1)
    dense = 0.5 * (linear * torch.linalg.solve(curvature, linear.T).T).sum(1)
    masks = torch.zeros(len(kept), 4 * cells, dtype=torch.bool).scatter_(1, kept, value=True)
    return masks, (dense - gained).T


def measure(cells: int, draws: int, correlation: float, seed: int) -> dict[str, dict[str, float]]:
    """Share of rows with the best mask and mean relative loss, per method."""
    generator = torch.Generator().manual_seed(seed)
    rows = 10
    ratios: dict[str, list[Tensor]] = {name: [] for name in METHODS}
    for _ in range(-(-draws // rows)):
        problem = draw_layer(cells, rows, correlation, generator)
        masks, losses = optimum_per_mask(problem, cells)
        for name, method in METHODS.items():
            same = (method(problem)[:, None, :] == masks).all(-1)
            ratios[name].append(losses[same] / losses.amin(1))
    result = {}
    for name, parts in ratios.items():
        ratio = torch.cat(parts)
        result[name] = {
            "optimal": float((ratio < 1 + 1e-6).double().mean()),
            "relative_loss": float(ratio.mean()),
            "standard_error": float(ratio.std() / len(ratio) ** 0.5),
        }
    return result


def main() -> None:
    """Print the table, or one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=3)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--correlation", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(options.cells, options.draws, options.correlation, options.seed)
    if options.json:
        print(json.dumps({"benchmark": "toy", **vars(options), "methods": result}))
        return
    print(f"{'mask of':14} {'is optimal':>10} {'loss / optimum':>22}")
    for name, row in result.items():
        error = f"{row['relative_loss']:.3f} ± {row['standard_error']:.3f}"
        print(f"{name:14} {row['optimal']:10.0%} {error:>22}")


if __name__ == "__main__":
    main()
