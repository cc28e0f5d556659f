"""Pruning whole models: inputs, targets, records, skipped layers, resume."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from opened import Opened, open_tiny
from tiny_models import VOCABULARY
from torch import nn
from transformers import BertConfig, BertModel

from prox24_deploy.config.options import PruneOptions, Target
from prox24_deploy.config.recipe import Override, Recipe
from prox24_deploy.core.errors import CalibrationError, ModelDirError, RecipeError
from prox24_deploy.core.records import LayerRecord
from prox24_deploy.core.types import Method
from prox24_deploy.model.batch import Batch
from prox24_deploy.model.blocks import run_model
from prox24_deploy.model.checkpoint import BlockStore, stored_dtype
from prox24_deploy.pruning import block as block_module
from prox24_deploy.pruning.activations import BlockPair
from prox24_deploy.pruning.layer_group import SolvedLayer, solve_group
from prox24_deploy.pruning.prune import PrunedState, prune_model
from prox24_deploy.sparsity.pattern import is_24, project_24

FAST = PruneOptions(preset="fast")


def prune_opened(opened: Opened, folder: Path, options: PruneOptions = FAST) -> PrunedState:
    return prune_model(
        opened.model,
        opened.recipe,
        opened.batches[1:],
        opened.batches[:1],
        options,
        stored_dtype=lambda name: stored_dtype(opened.directory, name),
        store=BlockStore(folder),
        progress=lambda *_: None,
    )


@pytest.fixture(scope="module", params=["tiny_bert", "tiny_llama"])
def family(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module")
def done(
    family: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Opened, PrunedState]:
    opened = open_tiny(family, prose)
    return opened, prune_opened(opened, tmp_path_factory.mktemp("blocks"))


def by_name(state: PrunedState) -> dict[str, LayerRecord]:
    return {record.name: record for record in state.layers}


def test_every_linear_layer_of_every_block_is_24(done: tuple[Opened, PrunedState]) -> None:
    opened, state = done
    blocks = opened.model.get_submodule(opened.recipe.blocks)
    linears = {
        f"{opened.recipe.blocks}.{name}": module
        for name, module in blocks.named_modules()
        if isinstance(module, nn.Linear)
    }
    records = by_name(state)
    assert {n for n, r in records.items() if r.status == "pruned"} == linears.keys()
    for name, layer in linears.items():
        assert is_24(layer.weight), name
        stored = state.weights[f"{name}.weight"]
        assert stored.dtype == stored_dtype(opened.directory, f"{name}.weight")
        assert torch.equal(stored.float(), layer.weight)
        assert records[name].shape == tuple(layer.weight.shape)


def test_layers_outside_the_blocks_are_named_with_their_reason(
    done: tuple[Opened, PrunedState],
) -> None:
    opened, state = done
    skipped = {r.name: r.reason for r in state.layers if r.status == "skipped"}
    expected = {
        "bert": {"pooler.dense": "not a target of recipe bert"},
        "llama": {"lm_head": "shares its weight with model.embed_tokens"},
    }
    assert skipped == expected[opened.recipe.family]


def test_recorded_errors_are_those_of_the_final_models(
    done: tuple[Opened, PrunedState], family: Path, prose: Path
) -> None:
    """Recomputed with hooks on whole forward passes: the inputs come from the pruned model."""
    opened, state = done
    dense = open_tiny(family, prose).model
    for name, record in by_name(state).items():
        if record.status == "skipped":
            continue
        for batches, expected in (
            (opened.batches[1:], record.relative_error),
            (opened.batches[:1], record.held_out_error),
        ):
            first, second = (
                outputs(m, name, batches, opened.recipe) for m in (dense, opened.model)
            )
            error = float((first - second).square().sum() / first.square().sum())
            assert error == pytest.approx(expected, rel=2e-3), name


@torch.no_grad()
def outputs(
    model: nn.Module, name: str, batches: tuple[Batch, ...], recipe: Recipe
) -> torch.Tensor:
    """Outputs of one layer, bias excluded, over the positions that are not padding."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    rows: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda _, args, __: rows.append(args[0]))
    for batch in batches:
        run_model(model, batch, recipe.task)
    handle.remove()
    real = [seen[batch.real] for seen, batch in zip(rows, batches, strict=True)]
    return torch.cat(real).double() @ layer.weight.double().T


def test_an_asymmetric_target_follows_the_dense_outputs_better(
    family: Path, prose: Path, tmp_path: Path
) -> None:
    totals = {}
    targets: tuple[Target, ...] = ("asymmetric", "symmetric")
    for target in targets:
        options = PruneOptions(preset="fast", target=target)
        state = prune_opened(open_tiny(family, prose), tmp_path / target, options)
        last = [r for r in state.layers if ".1." in r.name and r.relative_error is not None]
        totals[target] = sum(r.relative_error or 0.0 for r in last)
    assert totals["asymmetric"] < totals["symmetric"]


def test_padding_changes_nothing(tiny_bert: Path, prose: Path, tmp_path: Path) -> None:
    plain = open_tiny(tiny_bert, prose)
    padded = replace(open_tiny(tiny_bert, prose), batches=tuple(map(with_padding, plain.batches)))
    first, second = prune_opened(plain, tmp_path / "a"), prune_opened(padded, tmp_path / "b")
    for name, weight in first.weights.items():
        assert torch.allclose(weight, second.weights[name], atol=2e-3), name


def with_padding(batch: Batch) -> Batch:
    """Ten more positions of rubbish that the mask excludes."""
    extra = (batch.real.shape[0], 10)
    filler = {
        "input_ids": torch.full(extra, 77),
        "attention_mask": torch.zeros(extra, dtype=torch.int64),
        "token_type_ids": torch.zeros(extra, dtype=torch.int64),
    }
    inputs = {name: torch.cat([part, filler[name]], 1) for name, part in batch.inputs.items()}
    return Batch(inputs, torch.cat([batch.real, torch.zeros(extra, dtype=torch.bool)], 1))


def test_a_resumed_run_gives_the_same_bits_and_solves_only_the_rest(
    family: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prune_opened(open_tiny(family, prose), tmp_path)
    (tmp_path / "block-0001.safetensors").unlink()
    blocks: list[int] = []
    solve = solve_group

    def watch(twin: BlockPair, *arguments: Any, **options: Any) -> dict[str, SolvedLayer]:
        blocks.append(twin.index)
        return solve(twin, *arguments, **options)

    monkeypatch.setattr(block_module, "solve_group", watch)
    resumed = prune_opened(open_tiny(family, prose), tmp_path)
    assert set(blocks) == {1}
    assert resumed.weights.keys() == whole.weights.keys()
    assert all(torch.equal(resumed.weights[n], whole.weights[n]) for n in whole.weights)
    timeless = [[replace(r, seconds=0.0) for r in state.layers] for state in (whole, resumed)]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("method", ["ista", "sparsegpt", "wanda", "magnitude"])
def test_every_method_prunes_a_whole_model(
    tiny_bert: Path, prose: Path, tmp_path: Path, method: Method
) -> None:
    options = PruneOptions(method=method, preset="fast")
    state = prune_opened(open_tiny(tiny_bert, prose), tmp_path, options)
    assert all(is_24(weight) for weight in state.weights.values())
    assert {r.method for r in state.layers if r.status == "pruned"} == {method}


def test_a_width_that_does_not_divide_is_skipped_by_name(
    tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=50, max_position_embeddings=128,
    )  # fmt: skip
    opened = open_tiny(tiny_bert, prose)
    model = BertModel(config).eval().requires_grad_(requires_grad=False)
    state = prune_model(
        model, opened.recipe, opened.batches[1:], (), FAST,
        stored_dtype=lambda _: torch.float32, store=BlockStore(tmp_path),
        progress=lambda *_: None,
    )  # fmt: skip
    records = by_name(state)
    odd = records["encoder.layer.0.output.dense"]
    assert (odd.status, odd.reason) == ("skipped", "in_features 50 is not a multiple of 4")
    assert "encoder.layer.0.output.dense.weight" not in state.weights
    assert records["encoder.layer.0.intermediate.dense"].status == "pruned"
    assert records["encoder.layer.0.intermediate.dense"].held_out_error is None


def test_a_layer_that_is_24_already_keeps_its_bits(
    tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    opened = open_tiny(tiny_bert, prose)
    layer = opened.model.get_submodule("encoder.layer.1.output.dense")
    assert isinstance(layer, nn.Linear)
    layer.weight.copy_(project_24(layer.weight))
    before = layer.weight.clone()
    state = prune_opened(opened, tmp_path)
    assert torch.equal(state.weights["encoder.layer.1.output.dense.weight"], before)
    assert by_name(state)["encoder.layer.1.output.dense"].method == "unchanged"


def test_a_dead_feature_gets_weight_zero(tiny_bert: Path, prose: Path, tmp_path: Path) -> None:
    opened = open_tiny(tiny_bert, prose)
    norm = opened.model.get_submodule("embeddings.LayerNorm")
    assert isinstance(norm, nn.LayerNorm)
    norm.weight[5] = 0.0
    norm.bias[5] = 0.0
    state = prune_opened(opened, tmp_path)
    for name in ("query", "key", "value"):
        weight = state.weights[f"encoder.layer.0.attention.self.{name}.weight"]
        assert bool((weight[:, 5] == 0).all())


def test_activations_that_overflow_are_refused_with_the_layer_s_name(
    tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    opened = open_tiny(tiny_bert, prose)
    layer = opened.model.get_submodule("encoder.layer.0.intermediate.dense")
    assert isinstance(layer, nn.Linear)
    layer.weight.fill_(3e38)
    layer.bias.fill_(3e38)
    match = r"Layer encoder.layer.0.intermediate.dense: its output is NaN or infinite"
    with pytest.raises(ModelDirError, match=match):
        prune_opened(opened, tmp_path)


def test_without_batches_nothing_is_pruned(tiny_bert: Path, prose: Path, tmp_path: Path) -> None:
    opened = open_tiny(tiny_bert, prose)
    with pytest.raises(CalibrationError, match="no calibration batch"):
        prune_opened(replace(opened, batches=()), tmp_path)


def test_the_head_keeps_the_embeddings_bits(tiny_llama: Path, prose: Path, tmp_path: Path) -> None:
    opened = open_tiny(tiny_llama, prose)
    before = opened.model.get_submodule("lm_head").get_parameter("weight").clone()
    prune_opened(opened, tmp_path)
    assert torch.equal(opened.model.get_submodule("lm_head").get_parameter("weight"), before)


def test_a_head_of_its_own_stays_dense_whatever_the_recipe_asks_for(
    tiny_llama: Path, prose: Path, tmp_path: Path
) -> None:
    opened = open_tiny(tiny_llama, prose)
    head = opened.model.get_submodule("lm_head")
    embeddings = opened.model.get_submodule("model.embed_tokens").get_parameter("weight")
    head.register_parameter("weight", nn.Parameter(embeddings.flip(0), requires_grad=False))
    before = embeddings.clone()
    everything = opened.recipe.model_copy(update={"targets": ["*"]})
    state = prune_opened(
        replace(opened, recipe=everything), tmp_path, PruneOptions(method="magnitude")
    )
    assert torch.equal(head.get_parameter("weight"), before.flip(0))
    assert torch.equal(embeddings, before)
    skipped = {r.name: r.reason for r in state.layers if r.status == "skipped"}
    assert skipped == {"lm_head": "not a target of recipe llama"}
    assert all(name.startswith("model.layers.") for name in state.weights)


def test_an_override_of_the_recipe_prunes_its_layers_in_another_way(
    tiny_llama: Path, prose: Path, tmp_path: Path
) -> None:
    """Queries and values share an input and a problem; the override takes the values out of it."""
    opened = open_tiny(tiny_llama, prose)
    overrides = [
        Override(layers="self_attn.v_proj", method="wanda", refinement="none"),
        Override(layers="model.layers.1.mlp.*", method="magnitude"),
    ]
    recipe = opened.recipe.model_copy(update={"overrides": overrides})
    dense = opened.model.get_submodule("model.layers.0.self_attn.v_proj").get_parameter("weight")
    before = dense.clone()
    state = prune_opened(replace(opened, recipe=recipe), tmp_path)
    methods = {record.name: record.method for record in state.layers if record.method}
    assert methods["model.layers.0.self_attn.q_proj"] in {"prox", "sparsegpt"}
    assert methods["model.layers.0.self_attn.v_proj"] == "wanda"
    assert methods["model.layers.1.mlp.up_proj"] == "magnitude"
    assert methods["model.layers.0.mlp.up_proj"] in {"prox", "sparsegpt"}
    pruned = state.weights["model.layers.0.self_attn.v_proj.weight"].float()
    kept = pruned != 0
    torch.testing.assert_close(pruned[kept], before[kept], rtol=1e-3, atol=1e-6)


def test_an_override_that_matches_nothing_is_refused(
    tiny_llama: Path, prose: Path, tmp_path: Path
) -> None:
    opened = open_tiny(tiny_llama, prose)
    recipe = opened.recipe.model_copy(update={"overrides": [Override(layers="mlp.gate")]})
    with pytest.raises(RecipeError, match=r"overrides 'mlp\.gate', which matches no target layer"):
        prune_opened(replace(opened, recipe=recipe), tmp_path)
