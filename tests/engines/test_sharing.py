"""Equal expressions are computed once; what draws or writes is left alone."""

from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from prox24_deploy.engines.cusparselt.sharing import ShareEqual
from prox24_deploy.quantization.formats import to_numbers


def traced(function: Callable[..., object], *inputs: Tensor) -> fx.GraphModule:
    module: fx.GraphModule = make_fx(function)(*inputs)
    return module


def count(module: fx.GraphModule, operator: object) -> int:
    return sum(node.target is operator for node in module.graph.nodes)


def shared(module: fx.GraphModule) -> fx.GraphModule:
    ShareEqual()(module.graph)
    module.graph.lint()
    module.recompile()
    return module


def test_layers_that_share_an_input_and_its_scale_quantise_it_once() -> None:
    def layers(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, second = (to_numbers(hidden, 0.5, torch.int8) for _ in range(2))
        other = to_numbers(hidden, 0.25, torch.int8)
        return first.reshape(-1, 4), second.reshape(-1, 4) + 1, other

    hidden = torch.randn(2, 3, 4)
    module = traced(layers, hidden)
    assert count(module, torch.ops.aten.round.default) == 3
    found = shared(module)(hidden)
    assert count(module, torch.ops.aten.round.default) == 2
    for one, expected in zip(found, layers(hidden), strict=True):
        assert torch.equal(one, expected)


def test_what_draws_or_writes_stays_as_it_is() -> None:
    def draws(hidden: Tensor) -> Tensor:
        first, second = torch.rand_like(hidden), torch.rand_like(hidden)
        return first.add_(1).add_(1) - second

    module = traced(draws, torch.zeros(4))
    before = len(module.graph.nodes)
    assert len(shared(module).graph.nodes) == before


def test_an_integer_is_not_taken_for_the_number_that_it_equals() -> None:
    def powers(hidden: Tensor) -> tuple[Tensor, Tensor]:
        return hidden * 2, hidden * 2.0

    module = traced(powers, torch.ones(3, dtype=torch.int64))
    whole, real = shared(module)(torch.ones(3, dtype=torch.int64))
    assert (whole.dtype, real.dtype) == (torch.int64, torch.float32)
