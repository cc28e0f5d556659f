"""ADMM of whole layers on a GPU: its steps launched one by one, and as CUDA graphs.

Layers of random weights with correlated inputs, preset `default`; the inverse, the tests for
convergence and the capture are in the time. Prints a table and one JSON line. Both ways give the
same bits.
"""

import json
import statistics
import time
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from prox24_deploy.pruning.solvers import admm
from prox24_deploy.pruning.solvers.problem import LayerProblem, layer_problem
from prox24_deploy.pruning.solvers.products import tensor_cores
from prox24_deploy.pruning.solvers.solver import PRESETS

# Outputs by inputs: of MiniLM, of SmolLM2, and of larger models.
SHAPES = (
    (384, 384), (384, 1536), (576, 576), (3072, 576), (576, 1536), (1024, 1024), (4096, 1024),
    (2048, 2048), (2048, 4096), (4096, 4096),
)  # fmt: skip
ROUNDS = 5
DEVICE = torch.device("cuda")


def problem_of(rows: int, features: int) -> LayerProblem:
    """A random layer whose inputs share strong factors."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    inputs = draw(8 * features, features // 4) @ draw(features // 4, features)
    inputs += draw(*inputs.shape)
    return layer_problem(draw(rows, features), inputs.T @ inputs / len(inputs), 0.05)


def milliseconds(problem: LayerProblem, small: int) -> tuple[float, Tensor]:
    """Median time of a layer, and its weights; a graph is taken up to so many weights."""
    taken: list[float] = []
    weight = problem.start
    with patch.object(admm, "_SMALL", small), tensor_cores(DEVICE):
        for _ in range(1 + ROUNDS):
            torch.cuda.synchronize()
            began = time.perf_counter()
            weight, _, _ = admm.prox_admm(problem, PRESETS["default"])
            torch.cuda.synchronize()
            taken.append((time.perf_counter() - began) * 1e3)
    return statistics.median(taken[1:]), weight


def main() -> None:
    table = Table("outputs x inputs", "launched ms", "graph ms", "times as fast", box=None)
    figures = {}
    for rows, features in SHAPES:
        problem = problem_of(rows, features)
        launched, plain = milliseconds(problem, 0)
        captured, same = milliseconds(problem, rows * features)
        assert torch.equal(plain, same)
        shape = f"{rows} x {features}"
        figures[shape] = {"launched_ms": launched, "graph_ms": captured}
        ratio = f"{launched / captured:.2f}"
        table.add_row(shape, f"{launched:.1f}", f"{captured:.1f}", ratio)
    Console().print(table)
    card = torch.cuda.get_device_name()
    print(json.dumps({"benchmark": "admm_speed_gpu", "gpu": card, **figures}))


if __name__ == "__main__":
    main()
