"""Experts as modules of their own: loaded from what transformers writes, with the same outputs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_batches import batch, recipe_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, tiny_model
from torch import nn
from transformers import conversion_mapping

from prox24_deploy.config.recipe import ExpertLayers
from prox24_deploy.core.errors import ModelDirError, RecipeError
from prox24_deploy.model.batch import Batch
from prox24_deploy.model.blocks import find_blocks, real_tokens, run_model
from prox24_deploy.model.checkpoint import renamed_tensors, write_pruned
from prox24_deploy.model.directory import load_model, open_model_dir
from prox24_deploy.model.experts import Expert, Experts, experts_apart, place_of

CPU = torch.device("cpu")
ROWS = ["mixtral", "qwen3_moe"]
NAMES = ExpertLayers(path="mlp.experts", gate="gate", up="up", down="down")


def as_transformers_has_it(row: str) -> Any:
    """The model of a row with all experts of a block in two tensors."""
    torch.manual_seed(0)
    name, options = FAMILIES[row]
    made = getattr(transformers, name)
    return made(made.config_class(**options)).eval()


def logits(model: nn.Module, text: Batch) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = run_model(model, text, "text-generation").logits
    return found


@pytest.mark.parametrize("row", ROWS)
def test_what_transformers_saved_is_opened_with_its_experts_apart(row: str, tmp_path: Path) -> None:
    model = as_transformers_has_it(row)
    model.save_pretrained(tmp_path)
    kind = model.config.model_type
    before = conversion_mapping.get_checkpoint_conversion_mapping(kind)
    recipe, text = recipe_of(model), batch(recipe_of(model))
    opened = load_model(open_model_dir(tmp_path), recipe, CPU)
    experts = find_blocks(opened, recipe)[-1].get_submodule("mlp.experts")
    assert isinstance(experts, Experts)
    assert len(experts) == 4
    torch.testing.assert_close(logits(opened, text), logits(model, text), rtol=0, atol=1e-5)
    # Whoever opens a model afterwards has it as transformers does.
    after = conversion_mapping.get_checkpoint_conversion_mapping(kind)
    assert list(map(repr, after)) == list(map(repr, before))
    assert kind not in conversion_mapping.USER_REGISTERED_MAPPINGS
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, text), logits(model, text))


@pytest.mark.parametrize("row", ROWS)
def test_a_pruned_expert_goes_into_its_own_tensor_and_no_other_changes(
    row: str, tmp_path: Path
) -> None:
    as_transformers_has_it(row).half().save_pretrained(tmp_path / "model")
    directory = open_model_dir(tmp_path / "model")
    recipe = recipe_of(model := tiny_model(row))
    opened = load_model(directory, recipe, CPU)
    directory.renamed.update(renamed_tensors(directory, opened, recipe))
    index = len(find_blocks(model, recipe)) - 1
    assert recipe.experts is not None
    parameter = f"model.layers.{index}.mlp.experts.2.{recipe.experts.down}.weight"
    sparse = opened.get_parameter(parameter).detach().half()
    sparse[:, ::2] = 0
    write_pruned(directory, {parameter: sparse}, tmp_path / "pruned")
    stored = recipe.experts.as_stored(parameter)
    old, new = (load_file(tmp_path / d / "model.safetensors") for d in ("model", "pruned"))
    assert old.keys() == new.keys()
    assert [name for name in old if not torch.equal(old[name], new[name])] == [stored]
    assert torch.equal(new[stored], sparse)
    with safe_open(tmp_path / "pruned" / "model.safetensors", framework="pt") as handle:
        assert stored in handle.metadata()["prox24.sparse_weights"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    fused = loaded.get_parameter(f"model.layers.{index}.mlp.experts.down_proj")
    assert torch.equal(fused[2].half(), sparse)


def test_a_checkpoint_with_all_experts_in_one_tensor_is_refused(tmp_path: Path) -> None:
    model = as_transformers_has_it("qwen3_moe")
    model.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelDirError, match=r"mlp\.experts\.(gate_up|down)_proj and 1 more with"):
        load_model(open_model_dir(tmp_path), recipe_of(model), CPU)


class _Fused(nn.Module):
    """As transformers has it, of another layout where asked for."""

    def __init__(self, *gate_up: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(gate_up))
        self.down_proj = nn.Parameter(torch.zeros(3, 8, 4))
        self.act_fn = nn.SiLU()
        if bias:
            self.down_proj_bias = nn.Parameter(torch.zeros(3, 8))


class _Block(nn.Module):
    def __init__(self, experts: nn.Module, name: str = "experts") -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.add_module(name, experts)


def test_only_a_module_that_computes_the_same_is_replaced() -> None:
    with experts_apart(NAMES):
        taken = _Block(_Fused(3, 8, 8))
        left = [
            _Block(_Fused(3, 8, 8), name="others"),
            _Block(_Fused(3, 12, 8)),
            _Block(_Fused(3, 8, 8, bias=True)),
            _Block(nn.Linear(8, 8)),
        ]
    assert isinstance(taken.mlp.experts, Experts)
    assert not any(isinstance(module, Experts) for block in left for module in block.modules())
    assert isinstance(_Block(_Fused(3, 8, 8)).mlp.experts, _Fused)


def test_the_place_of_a_layer_tells_its_expert_and_what_it_reads() -> None:
    with experts_apart(NAMES):
        block = _Block(_Fused(3, 8, 8))
    block.mlp.add_module("7", nn.Linear(8, 8))
    place = place_of(block, "mlp.experts.1.up")
    assert place is not None
    assert (place.number, place.is_last) == (1, False)
    last = place_of(block, "mlp.experts.2.down")
    assert last is not None
    assert last.is_last
    assert place_of(block, "mlp.7") is None


def some_experts(count: int = 3) -> Experts:
    torch.manual_seed(0)
    like = torch.empty(count, 8, 4)
    return Experts((Expert(NAMES, like, nn.SiLU()) for _ in range(count)), exported="routed")


@torch.no_grad()
def test_experts_sum_what_each_gives_for_its_tokens() -> None:
    experts, hidden = some_experts(), torch.randn(5, 8)
    index, weights = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1]]), torch.rand(5, 2)
    found = experts(hidden, index, weights)
    for token in range(5):
        parts = [experts[int(n)](hidden[token]) * w for n, w in zip(index[token], weights[token])]  # noqa: B905
        torch.testing.assert_close(found[token], parts[0] + parts[1])
    # The third expert has no token, and no part in the sum.
    for parameter in experts[2].parameters():
        parameter.fill_(torch.inf)
    assert torch.equal(experts(hidden, index, weights), found)


@torch.no_grad()
def test_on_all_tokens_the_sum_is_the_same_and_no_other_expert_spoils_it() -> None:
    experts, hidden = some_experts(), torch.randn(6, 8)
    index, weights = torch.randint(3, (6, 1)), torch.rand(6, 1)
    torch.testing.assert_close(
        experts._on_all(hidden, index, weights), experts(hidden, index, weights)
    )
    for parameter in experts[0].parameters():
        parameter.fill_(1e30)
    own = index[:, 0] != 0
    assert bool(experts._on_all(hidden, index, weights)[own].isfinite().all())


def test_padding_is_not_among_the_tokens_of_an_expert() -> None:
    route = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2]])
    real = torch.tensor([[True, True], [True, False]])
    assert real_tokens(route, 0, real).tolist() == [True, True, False]
    assert real_tokens(route, 0, torch.ones(2, dtype=torch.bool)).tolist() == [True] * 3
    with pytest.raises(RecipeError, match=r"read 4 rows, expected \(2, 3\) positions"):
        real_tokens(route, 0, torch.ones(2, 3, dtype=torch.bool))
