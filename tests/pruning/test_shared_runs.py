"""Blocks and layers that one forward pass runs more than once, and weights of two modules."""

from pathlib import Path

import pytest
import torch
from model_cases import NEST, Nest
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertModel

from prox24_deploy.config.options import PruneOptions
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.errors import RecipeError
from prox24_deploy.model.batch import Batch
from prox24_deploy.model.blocks import find_blocks, require_one_run
from prox24_deploy.model.checkpoint import BlockStore
from prox24_deploy.pruning.activations import record_activations
from prox24_deploy.pruning.prune import PrunedState, prune_model
from prox24_deploy.pruning.selection import left_dense
from prox24_deploy.pruning.sensitivity import measure_sensitivity

MAGNITUDE = PruneOptions(method="magnitude", refinement="none")
ALBERT = NEST.model_copy(
    update={
        "family": "albert",
        "task": "feature-extraction",
        "blocks": "encoder.albert_layer_groups",
        "targets": ["albert_layers.0.ffn", "albert_layers.0.ffn_output"],
    }
)


def batches() -> tuple[Batch, ...]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 60, (6, 9), generator=draw)
    real = torch.ones_like(ids, dtype=torch.bool)
    half = [slice(0, 3), slice(3, 6)]
    return tuple(
        Batch({"input_ids": ids[part], "attention_mask": real[part].long()}, real[part])
        for part in half
    )


@pytest.fixture
def albert() -> nn.Module:
    """Two passes through one block."""
    config = AlbertConfig(
        vocab_size=64, embedding_size=16, hidden_size=16, intermediate_size=32,
        num_attention_heads=2, num_hidden_layers=2, max_position_embeddings=32,
    )  # fmt: skip
    model: nn.Module = AlbertModel(config).eval()
    return model.requires_grad_(requires_grad=False)


class Recurrent(Nest):
    """One list of two blocks, run twice, as a universal transformer does."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in [*self.layers, *self.layers]:
            hidden = layer(hidden_states=hidden, scale=1.0)[0]
        return torch.as_tensor(hidden)


class Repeated(Nest):
    """A list that holds one block twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.layers[0]] * 2)


class Backwards(Nest):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in reversed(list(self.layers)):
            hidden = layer(hidden_states=hidden, scale=1.0)[0]
        return torch.as_tensor(hidden)


class Idle(Nest):
    """A model whose last block no forward pass runs."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.layers[0](hidden_states=self.embed(input_ids), scale=1.0)[0]
        return hidden


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (Recurrent, "block layers.0 2 times"),
        (Repeated, "block layers.0 2 times"),
        (Idle, "block layers.1 0 times"),
        (Backwards, "in the order 1, 0"),
    ],
)
@torch.no_grad()
def test_blocks_that_do_not_run_once_each_are_refused(kind: type[Nest], told: str) -> None:
    model = kind().eval().requires_grad_(requires_grad=False)
    with pytest.raises(RecipeError, match=f"{kind.__name__} runs {told} in one forward pass, exp"):
        record_activations(model, find_blocks(model, NEST), NEST, batches())
    assert not any(block._forward_pre_hooks for block in find_blocks(model, NEST))


@torch.no_grad()
def test_a_shared_block_is_refused_before_anything_is_solved(
    albert: nn.Module, tmp_path: Path
) -> None:
    store = BlockStore(tmp_path / "solved")
    told = "AlbertModel runs block encoder.albert_layer_groups.0 2 times"
    with pytest.raises(RecipeError, match=told):
        solve(albert, ALBERT, store)
    assert not store.folder.exists()
    with pytest.raises(RecipeError, match=told):
        measure_sensitivity(
            albert, ALBERT, batches(), MAGNITUDE, dense={},
            stored_dtype=lambda _: torch.float32, progress=lambda *_: None,
        )  # fmt: skip


@torch.no_grad()
def test_a_model_that_runs_its_blocks_once_is_run_no_further_for_it() -> None:
    model = Nest().eval().requires_grad_(requires_grad=False)
    require_one_run(model, find_blocks(model, NEST), batches()[0], NEST)
    assert model.reached_the_end == 1


class Twice(nn.Module):
    """A block that runs one of its layers on both halves of what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, scale: float) -> tuple[Tensor]:
        halves = [self.one(part) for part in hidden_states.chunk(2, dim=1)]
        return (scale * self.two(torch.cat(halves, dim=1)),)


def solve(model: nn.Module, recipe: Recipe, store: BlockStore, **dense: str) -> PrunedState:
    return prune_model(
        model, recipe, batches(), (), MAGNITUDE, stored_dtype=lambda _: torch.float32,
        store=store, progress=lambda *_: None,
        dense={path.replace("__", "."): why for path, why in dense.items()},
    )  # fmt: skip


@torch.no_grad()
def test_a_layer_that_its_block_runs_twice_stays_dense_by_name(tmp_path: Path) -> None:
    model = Nest()
    model.layers = nn.ModuleList([Twice(), Twice()])
    recipe = NEST.model_copy(update={"targets": ["one", "two"]})
    state = solve(
        model.eval().requires_grad_(requires_grad=False), recipe, BlockStore(tmp_path / "solved")
    )
    assert sorted(state.weights) == ["layers.0.two.weight", "layers.1.two.weight"]
    reasons = {layer.name: layer.reason for layer in state.layers}
    assert reasons["layers.0.one"] == "its block runs it on 2 inputs in one forward pass"


def test_a_weight_of_two_layers_stays_dense_by_name() -> None:
    model = Nest()
    first, second = model.layers
    assert isinstance(first.one, nn.Linear)
    assert isinstance(second.two, nn.Linear)
    second.two.weight = first.one.weight
    dense = left_dense(NEST.model_copy(update={"targets": ["one", "two"]}), model, MAGNITUDE)
    assert dense == {
        "layers.0.one": "shares its weight with layers.1.two",
        "layers.1.two": "shares its weight with layers.0.one",
    }
