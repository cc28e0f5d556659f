"""Block reconstruction: what it improves, what it must not touch, when it stops."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from opened import Opened, open_tiny
from test_prune import by_name, prune_opened

from prox24_deploy.config.options import PruneOptions
from prox24_deploy.core.errors import CalibrationError
from prox24_deploy.model.blocks import find_blocks, run_block, run_model
from prox24_deploy.model.layers import layer_at as linear
from prox24_deploy.pruning.activations import Activations, BlockPair, record_activations
from prox24_deploy.pruning.prune import PrunedState
from prox24_deploy.pruning.reconstruct import AdamOptions, Reconstruction, reconstruct_block
from prox24_deploy.sparsity.pattern import is_24, project_24

PLAIN = PruneOptions(preset="fast")
TUNED = PruneOptions(preset="fast", reconstruct=True)


@pytest.fixture(params=["tiny_bert", "tiny_llama"])
def family(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module")
def tuned_llama(
    tiny_llama: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Opened, PrunedState]:
    """Pruned and reconstructed whole; only read."""
    opened = open_tiny(tiny_llama, prose)
    return opened, prune_opened(opened, tmp_path_factory.mktemp("tuned"), TUNED)


def first_block(opened: Opened, dense: Opened) -> tuple[BlockPair, Activations]:
    """The first block, its targets projected by magnitude, and text in front of it."""
    blocks = find_blocks(opened.model, opened.recipe)
    activations = record_activations(opened.model, blocks, opened.recipe, opened.batches)
    twin = BlockPair(
        index=0, prefix="block", dense=find_blocks(dense.model, dense.recipe)[0], pruned=blocks[0]
    )
    for name in names_of(twin):
        layer = linear(twin.pruned, name)
        layer.weight.copy_(project_24(layer.weight))
    return twin, activations


def names_of(twin: BlockPair) -> list[str]:
    return [n for n, m in twin.pruned.named_modules() if isinstance(m, torch.nn.Linear)]


@torch.no_grad()
def tuned(
    family: Path, prose: Path, options: AdamOptions
) -> tuple[BlockPair, dict[str, torch.Tensor], Reconstruction]:
    twin, activations = first_block(open_tiny(family, prose), open_tiny(family, prose))
    before = {name: p.clone() for name, p in twin.pruned.named_parameters()}
    return twin, before, reconstruct_block(twin, names_of(twin), activations, options)


def test_it_lowers_the_withheld_error_and_moves_kept_weights_only(
    family: Path, prose: Path
) -> None:
    twin, before, result = tuned(family, prose, AdamOptions(steps=60))
    assert result.after < 0.8 * result.before
    for name, parameter in twin.pruned.named_parameters():
        assert not parameter.requires_grad
        if name.removesuffix(".weight") not in names_of(twin):
            assert torch.equal(parameter, before[name]), name
            continue
        assert is_24(parameter), name
        assert bool((parameter[before[name] == 0] == 0).all()), name
        assert not torch.equal(parameter, before[name]), name


def test_steps_that_only_harm_leave_every_bit_as_it_was(family: Path, prose: Path) -> None:
    options = AdamOptions(steps=200, learning_rate=50.0, check_every=2)
    twin, before, result = tuned(family, prose, options)
    assert (result.after, result.steps) == (result.before, 0)
    for name, parameter in twin.pruned.named_parameters():
        assert torch.equal(parameter, before[name]), name


@torch.no_grad()
def test_what_later_blocks_make_of_the_output_counts_too(tiny_llama: Path, prose: Path) -> None:
    """Against tuning for the block's own output alone, the next block's output comes nearer."""
    errors = {}
    for looks_ahead in (False, True):
        opened, dense = open_tiny(tiny_llama, prose), open_tiny(tiny_llama, prose)
        twin, activations = first_block(opened, dense)
        following = find_blocks(dense.model, dense.recipe)[1]
        seen = replace(twin, following=following if looks_ahead else None)
        reconstruct_block(seen, names_of(twin), activations, AdamOptions(steps=60))
        outputs = [
            run_block(
                following,
                activations.calls[0][1],
                run_block(block, activations.calls[0][0], hidden),
            )
            for block, hidden in (
                (twin.dense, activations.dense[0]),
                (twin.pruned, activations.pruned[0]),
            )
        ]
        errors[looks_ahead] = float((outputs[0] - outputs[1]).square().sum())
    assert errors[True] < errors[False]


def test_the_same_bits_come_out_twice(tiny_llama: Path, prose: Path) -> None:
    first, second = (tuned(tiny_llama, prose, AdamOptions(steps=25))[0] for _ in "ab")
    for name in names_of(first):
        assert torch.equal(linear(first.pruned, name).weight, linear(second.pruned, name).weight)


def test_the_whole_model_comes_nearer_to_the_dense_one(
    tiny_llama: Path, tuned_llama: tuple[Opened, PrunedState], prose: Path, tmp_path: Path
) -> None:
    dense, plain = open_tiny(tiny_llama, prose), open_tiny(tiny_llama, prose)
    distance = {}
    plainly = (plain, prune_opened(plain, tmp_path, PLAIN))
    for name, (opened, state) in {"plain": plainly, "tuned": tuned_llama}.items():
        assert all(is_24(weight) for weight in state.weights.values())
        with torch.no_grad():
            outputs = [run_model(o.model, o.batches[0], o.recipe.task)[0] for o in (dense, opened)]
        distance[name] = float((outputs[0] - outputs[1]).square().sum())
    assert distance["tuned"] < 0.95 * distance["plain"]


def test_recorded_errors_belong_to_the_tuned_weights(
    tiny_llama: Path, tuned_llama: tuple[Opened, PrunedState], prose: Path
) -> None:
    """The first group of a model sees the same inputs in both models: recompute its error."""
    dense, (_, state) = open_tiny(tiny_llama, prose), tuned_llama
    blocks = find_blocks(dense.model, dense.recipe)
    activations = record_activations(dense.model, blocks, dense.recipe, dense.batches[1:])
    inputs = torch.cat([
        blocks[0].get_submodule("input_layernorm")(hidden)[batch.real]
        for hidden, batch in zip(activations.dense, activations.batches, strict=True)
    ]).double()  # fmt: skip
    for part in ("q_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{part}"
        w0 = linear(blocks[0], f"self_attn.{part}").weight.double()
        change = inputs @ (state.weights[f"{name}.weight"].double() - w0).T
        error = float(change.square().sum() / (inputs @ w0.T).square().sum())
        assert error == pytest.approx(by_name(state)[name].relative_error, rel=1e-3)


def test_layers_that_were_24_already_keep_their_bits(
    tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    opened = open_tiny(tiny_bert, prose)
    layer = opened.model.get_submodule("encoder.layer.1.output.dense")
    layer.get_parameter("weight").copy_(project_24(layer.get_parameter("weight")))
    before = layer.get_parameter("weight").clone()
    state = prune_opened(opened, tmp_path, TUNED)
    assert torch.equal(state.weights["encoder.layer.1.output.dense.weight"], before)


def test_one_batch_is_refused_before_anything_is_solved(
    tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    opened = open_tiny(tiny_bert, prose)
    few = replace(opened, batches=opened.batches[:2])
    with pytest.raises(CalibrationError, match="at least two batches of calibration text"):
        prune_opened(few, tmp_path, TUNED)
    assert list(tmp_path.iterdir()) == []


def test_only_the_best_preset_reconstructs_unasked() -> None:
    assert PruneOptions(preset="best").reconstructs
    assert not PruneOptions().reconstructs
    assert not PruneOptions(preset="best", reconstruct=False).reconstructs
    assert TUNED.reconstructs
