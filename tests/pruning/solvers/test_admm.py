"""Steps of ADMM: each row's best iterate is kept, and a CUDA graph takes the same steps."""

import itertools
from dataclasses import fields, replace

import pytest
import torch
from layers import correlated_layer

from prox24_deploy.pruning.solvers import admm
from prox24_deploy.pruning.solvers.admm import prox_admm
from prox24_deploy.pruning.solvers.problem import LayerProblem
from prox24_deploy.pruning.solvers.products import tensor_cores
from prox24_deploy.pruning.solvers.solver import PRESETS


def on_gpu(problem: LayerProblem) -> LayerProblem:
    return LayerProblem(
        **{each.name: getattr(problem, each.name).cuda() for each in fields(problem)}
    )


def test_more_iterations_never_end_with_a_worse_row() -> None:
    """A penalty this small makes ADMM swing; the best iterate is kept whatever comes after it.

    After ten iterations a quarter of the groups is left, from where iterates are compared.
    """
    problem = correlated_layer(rows=24, features=64, seed=3).problem()
    losses = []
    for cap in range(10, 50, 5):
        options = replace(PRESETS["default"], rho=0.05, growth=1.05, max_iterations=cap)
        weight, mask, iterations = prox_admm(problem, options)
        assert iterations == cap
        assert bool((weight[~mask] == 0).all())
        losses.append(problem.loss(weight))
    for earlier, later in itertools.pairwise(losses):
        assert bool((later <= earlier).all())
    assert float(losses[-1].sum()) < float(losses[0].sum())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_weights_that_lie_transposed_are_solved_alike(device: str) -> None:
    plain = correlated_layer(rows=48, features=64).problem()
    problem = on_gpu(plain) if device == "cuda" else plain
    turned = replace(
        problem, start=problem.start.T.contiguous().T, linear=problem.linear.T.contiguous().T
    )
    assert not turned.start.is_contiguous()
    for one, other in zip(
        prox_admm(problem, PRESETS["fast"])[:2], prox_admm(turned, PRESETS["fast"])[:2], strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("iterations", [3, 5, 8, 225])
def test_a_cuda_graph_takes_the_same_steps(
    iterations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(PRESETS["default"], max_iterations=iterations)
    for rows, features in ((48, 64), (20, 256), (48, 64)):
        problem = on_gpu(correlated_layer(rows=rows, features=features).problem())
        with tensor_cores(torch.device("cuda")):
            weight, mask, taken = prox_admm(problem, options)
            with monkeypatch.context() as launched:
                launched.setattr(admm, "_SMALL", 0)
                plain, plain_mask, plain_taken = prox_admm(problem, options)
        assert taken == plain_taken
        assert torch.equal(mask, plain_mask)
        assert torch.equal(weight, plain)


@pytest.mark.gpu
def test_cuda_graphs_leave_no_memory_behind() -> None:
    problem = on_gpu(correlated_layer(rows=512, features=512).problem())
    held = []
    for _ in range(12):
        prox_admm(problem, PRESETS["fast"])
        held.append(torch.cuda.memory_reserved())
    assert held[-1] == held[1]
