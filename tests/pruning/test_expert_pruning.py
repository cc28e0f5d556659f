"""Experts are pruned on the tokens routed to them, and pulled to their weights where these lack."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_batches import batch, recipe_of
from tiny_families import tiny_model
from torch import nn
from transformers import MixtralForCausalLM

from prox24_deploy.config.options import PruneOptions
from prox24_deploy.model.batch import Batch
from prox24_deploy.model.blocks import find_blocks
from prox24_deploy.model.checkpoint import BlockStore
from prox24_deploy.model.experts import Experts
from prox24_deploy.model.notes import FUSED_EXPERTS
from prox24_deploy.pruning import reconstruct, waves
from prox24_deploy.pruning.activations import BlockPair, collect, input_pairs, record_activations
from prox24_deploy.pruning.memory import needs_of
from prox24_deploy.pruning.module import prune_module
from prox24_deploy.pruning.prune import PrunedState, prune_model
from prox24_deploy.pruning.reconstruct import AdamOptions
from prox24_deploy.pruning.second_moments import SecondMoments
from prox24_deploy.pruning.sensitivity import measure_sensitivity
from prox24_deploy.pruning.solvers.problem import layer_problem, missing_tokens
from prox24_deploy.pruning.solvers.solver import solve_layer
from prox24_deploy.quantization.quantize import quantize_model
from prox24_deploy.sparsity.pattern import is_24, mask_24

CPU = torch.device("cpu")


def padded(text: Batch) -> Batch:
    """The same with padding at the end of the last row."""
    real = text.real.clone()
    real[2, 7:] = False
    return replace(text, inputs=text.inputs | {"attention_mask": real.long()}, real=real)


def pruned(
    model: nn.Module, folder: Path, options: PruneOptions, texts: tuple[Batch, ...] = ()
) -> PrunedState:
    recipe = recipe_of(model)
    texts = texts or (batch(recipe),)
    return prune_model(
        model, recipe, texts, texts[:1], options, stored_dtype=lambda _: torch.float32,
        store=BlockStore(folder), progress=lambda *_: None,
    )  # fmt: skip


@torch.no_grad()
def test_an_expert_reads_the_real_tokens_that_the_pruned_block_routes_to_it() -> None:
    dense, changed = tiny_model("mixtral"), tiny_model("mixtral")
    recipe, text = recipe_of(dense), padded(batch(recipe_of(dense)))
    blocks, others = find_blocks(dense, recipe), find_blocks(changed, recipe)
    # Another router: the dense block would send tokens elsewhere.
    others[0].get_parameter("mlp.gate.weight").copy_(torch.randn(4, 32))
    twin = BlockPair(index=0, prefix="model.layers.0", dense=blocks[0], pruned=others[0])
    activations = record_activations(dense, blocks, recipe, (text,))
    hidden, call = activations.dense[0], activations.calls[0][0]
    read: list[torch.Tensor] = []
    routes: list[torch.Tensor] = []
    for block in (blocks[0], others[0]):

        def note(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            read.append(args[0])
            routes.append(args[1])

        handle = block.get_submodule("mlp.experts").register_forward_pre_hook(note)
        block(hidden, *call.args, **call.kwargs)
        handle.remove()
    real = text.real.flatten()
    chosen = (routes[1] == 3).any(1) & real
    assert not torch.equal(chosen, (routes[0] == 3).any(1) & real)
    ((found, own),) = input_pairs(twin, "mlp.experts.3.w1", activations)
    assert torch.equal(found, read[0][chosen])
    assert torch.equal(own, read[1][chosen])
    # What the last layer reads is what the expert makes of the same tokens.
    expert = blocks[0].get_submodule("mlp.experts")[3]  # type: ignore[index]
    ((last, _),) = input_pairs(twin, "mlp.experts.3.w2", activations)
    assert torch.allclose(last, nn.functional.silu(expert.w1(found)) * expert.w3(found))
    moments = collect(twin, "mlp.experts.3.w1", activations)
    assert (moments.tokens, moments.routed) == (int(chosen.sum()), True)
    torch.testing.assert_close(moments.cross, (found.T @ own).double())


def test_experts_share_passes_as_far_as_their_gram_matrices_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = find_blocks(model := tiny_model("mixtral"), recipe_of(model))[0]
    groups = [["self_attn.o_proj"]]
    for n in range(4):
        groups += [[f"mlp.experts.{n}.w1", f"mlp.experts.{n}.w3"], [f"mlp.experts.{n}.w2"]]
    together = waves.waves(block, groups)
    assert together == [groups[:1], groups[1::2], groups[2::2]]
    monkeypatch.setattr(waves, "MOST_GRAM", 2 * waves.gram_bytes(32))
    parts = waves.waves(block, groups)
    assert parts[:3] == [groups[:1], groups[1:5:2], groups[5::2]]
    assert [len(part) for part in parts[3:]] == [1, 1, 1, 1]


def test_memory_is_asked_for_one_expert_at_a_time() -> None:
    """Those that are solved and the tokens that each reads, not those of all experts together."""
    needs = []
    for count in (4, 16):
        model = tiny_model("mixtral", num_local_experts=count, intermediate_size=8192)
        recipe = recipe_of(model)
        needs.append(needs_of(model, recipe, [batch(recipe)], PruneOptions()))
    assert needs[1].block > 3 * needs[0].block
    assert needs[1].working == needs[0].working
    # A down projection, its problem, and the Gram matrices of both sets of samples.
    square = 8192**2
    assert needs[0].working == 40 * square + 32 * 8192 * 72 + waves.MOST_GRAM


def test_tokens_are_missing_where_damping_would_be_beyond_its_limit() -> None:
    assert missing_tokens(96, 0) == pytest.approx(38.4)
    assert missing_tokens(96, 64) == pytest.approx(19.2)
    assert missing_tokens(96, 128) == pytest.approx(0)
    assert missing_tokens(96, 1000) == 0


def moments_of(dense: torch.Tensor, own: torch.Tensor, *, routed: bool = True) -> SecondMoments:
    found = SecondMoments.empty(dense.shape[1], CPU, routed=routed)
    found.add(dense, own)
    return found


def solved(weight: torch.Tensor, moments: SecondMoments) -> torch.Tensor:
    gram, cross, tokens = moments.for_solving(cross=True)
    return solve_layer(weight, layer_problem(weight, gram, 0.3, cross, tokens=tokens)).weight


def test_without_a_token_the_largest_weights_stay_as_they_were() -> None:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    nothing = moments_of(torch.zeros(0, 32), torch.zeros(0, 32))
    assert nothing.pull == 1
    expected = weight.masked_fill(~mask_24(weight.abs()), 0.0)
    torch.testing.assert_close(solved(weight, nothing), expected, rtol=0, atol=1e-6)


def test_few_tokens_prune_better_with_the_pull_than_without() -> None:
    """Inputs that go together as those of layers do; what is not seen is judged, too."""
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(64, 64, generator=draw) * torch.rand(64, generator=draw) ** 2
    inputs = torch.randn(2000, 64, generator=draw) @ mix.T
    weight = torch.randn(48, 64, generator=draw)
    few = inputs[:8]
    errors = {}
    for routed in (True, False):
        found = solved(weight, moments_of(few, few, routed=routed))
        errors[routed] = float(((inputs @ (found - weight).T) ** 2).sum())
    assert errors[True] < 0.9 * errors[False]


def test_enough_tokens_are_left_alone() -> None:
    inputs = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    one, other = (
        moments_of(inputs, inputs, routed=r).for_solving(cross=True) for r in (True, False)
    )
    for a, b in zip(one[:2], other[:2], strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)
    assert one[2] == other[2] == 64
    assert moments_of(inputs, inputs).pull == 0


def never_routed(model: nn.Module, expert: int) -> None:
    """Let the router of the last block send no token to one expert."""
    recipe = recipe_of(model)
    experts = find_blocks(model, recipe)[-1].get_submodule("mlp.experts")

    def elsewhere(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, index, weights = args
        free = torch.stack([(index + step) % len(experts) for step in range(4)])  # type: ignore[arg-type]
        taken = (free == expert) | (free == index.flip(-1))
        first = (~taken).int().argmax(0, keepdim=True)
        return hidden, free.gather(0, first)[0], weights

    assert isinstance(experts, Experts)
    experts.register_forward_pre_hook(elsewhere)


@pytest.mark.parametrize("row", ["mixtral", "qwen3_moe"])
def test_an_expert_without_tokens_is_pruned_and_named(row: str, tmp_path: Path) -> None:
    model = tiny_model(row)
    never_routed(model, 2)
    dense = {name: p.clone() for name, p in model.named_parameters()}
    state = pruned(model, tmp_path, PruneOptions(preset="fast"))
    of_it = [layer for layer in state.layers if ".experts.2." in layer.name]
    assert len(of_it) == 3
    for layer in of_it:
        assert (layer.rows, layer.pull, layer.relative_error) == (0, 1.0, None)
        assert layer.note.startswith("no calibration token was routed to its expert")
        weight, before = state.weights[f"{layer.name}.weight"], dense[f"{layer.name}.weight"]
        assert is_24(weight)
        kept = weight != 0
        assert torch.equal(kept, mask_24(before.abs()))
        torch.testing.assert_close(weight[kept], before[kept], rtol=1e-4, atol=1e-6)
    others = [layer for layer in state.layers if ".experts." in layer.name and layer not in of_it]
    assert all(0 < layer.rows < 72 for layer in others)
    assert all(layer.pull == 0 for layer in state.layers if "self_attn" in layer.name)


def test_a_block_of_experts_is_reconstructed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(reconstruct.SCHEDULES, "fast", AdamOptions(steps=8, check_every=4))
    model = tiny_model("mixtral")
    text = batch(recipe_of(model))
    state = pruned(
        model, tmp_path, PruneOptions(method="wanda", preset="fast", reconstruct=True), (text, text)
    )
    assert len(state.weights) == 16
    assert all(is_24(state.weights[name]) for name in state.weights)
    assert all(layer.relative_error for layer in state.layers if layer.status == "pruned")


def test_what_each_layer_of_an_expert_costs_is_measured() -> None:
    model = tiny_model("mixtral")
    text = batch(recipe_of(model))
    found = measure_sensitivity(
        model, recipe_of(model), (text, text), PruneOptions(method="magnitude", max_layers=3),
        dense={}, stored_dtype=lambda _: torch.float32, progress=lambda *_: None,
    )  # fmt: skip
    assert sum(".experts." in layer.name for layer in found.layers) == 12


def test_experts_stay_in_16_bits_and_are_named() -> None:
    model = tiny_model("mixtral")
    text = batch(recipe_of(model))
    made, records, _ = quantize_model(
        model, recipe_of(model), (text, text), "int8", sparse=(), progress=lambda *_: None
    )
    left = {record.name: record.reason for record in records if ".experts." in record.name}
    assert set(left.values()) == {"it is a layer of an expert, which stays in 16 bits for now"}
    assert len(left) == 12
    assert made.layers
    assert not left.keys() & made.layers.keys()


def test_a_module_whose_experts_are_fused_is_told_that_they_stay_dense() -> None:
    model = MixtralForCausalLM(tiny_model("mixtral").config).eval()  # type: ignore[arg-type]
    text = batch(recipe_of(model))
    done = prune_module(
        model, [text.inputs], blocks="model.layers", options=PruneOptions(method="magnitude")
    )
    left = {layer.name: layer.shape for layer in done.layers if layer.reason == FUSED_EXPERTS}
    assert left == {
        "model.layers.0.mlp.experts.gate_up_proj": (4 * 128, 32),
        "model.layers.0.mlp.experts.down_proj": (4 * 32, 64),
    }
