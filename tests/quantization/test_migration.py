"""What is moved before a layer: powers of two, into a place that leaves the function as it is."""

from pathlib import Path

import pytest
import torch
from opened import open_tiny
from torch import Tensor, nn

from prox24_deploy.model.blocks import find_blocks, record_calls, run_block
from prox24_deploy.model.layers import layer_at, matrix_shape
from prox24_deploy.quantization.migration import (
    migration_factors,
    multiply_columns,
    place_before,
)


def test_factors_are_bounded_powers_of_two_and_even_out_channels() -> None:
    draw = torch.Generator().manual_seed(0)
    largest = torch.exp(2 * torch.randn(64, generator=draw))
    largest[3] = 0
    weight = torch.randn(32, 64, generator=draw)
    factors = migration_factors(largest, weight, 0.8)
    assert torch.equal(factors.log2(), factors.log2().round())
    assert float(factors.amax()) <= 64
    assert float(factors[3]) == 1
    known = largest > 0
    assert float((largest / factors)[known].log().std()) < float(largest[known].log().std())


CASES = {
    "llama": {
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj": "input_layernorm",
        "mlp.gate_proj mlp.up_proj": "post_attention_layernorm",
        "mlp.down_proj": "mlp.up_proj",
        # Without up_proj, the norm feeds somebody who is not told.
        "mlp.gate_proj": None,
    },
    # The norm of a BERT feeds the residual too, and its activation is not proportional.
    "bert": {
        "attention.self.query attention.self.key attention.self.value": None,
        "attention.output.dense": "attention.self.value",
        "intermediate.dense": None,
        "output.dense": None,
    },
    "gpt2": {"attn.c_attn": "ln_1", "mlp.c_fc": "ln_2", "mlp.c_proj": None},
}


@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_the_place_before_layers_is_found_by_what_it_does(
    family: str, request: pytest.FixtureRequest, prose: Path
) -> None:
    opened = open_tiny(request.getfixturevalue(f"tiny_{family}"), prose)
    blocks = find_blocks(opened.model, opened.recipe)
    block, batch = blocks[0], opened.batches[0]
    hidden, calls = record_calls(opened.model, blocks, batch, opened.recipe.task)

    def run() -> Tensor:
        return run_block(block, calls[0], hidden)

    before = {name: p.clone() for name, p in block.named_parameters()}
    expected = run()
    for names, place in CASES[family].items():
        readers: list[nn.Module] = [layer_at(block, name) for name in names.split()]
        width = matrix_shape(layer_at(block, names.split()[0]))[1]
        found = place_before(block, readers, width, run)
        assert (found.path if found else None) == place, names
        assert all(torch.equal(p, before[name]) for name, p in block.named_parameters())
        if found:
            factors = torch.tensor([4.0, 0.25, 1.0, 2.0]).repeat(width)[:width]
            found.divide(factors)
            multiply_columns(readers, factors)
            assert torch.allclose(run(), expected, atol=1e-5)
            for name, parameter in block.named_parameters():
                parameter.copy_(before[name])
