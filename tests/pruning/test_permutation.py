"""Channels in another order: the model computes what it did, and what is wrong is moved back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from family_batches import batch, recipe_of
from opened import open_tiny
from safetensors.torch import load_file
from tiny_families import FAMILIES, tiny_model
from torch import Tensor, nn

from prox24_deploy.config.options import BuildOptions, PruneOptions, TextOptions
from prox24_deploy.config.recipe import Channels, Recipe
from prox24_deploy.core.errors import RecipeError
from prox24_deploy.model.blocks import run_model
from prox24_deploy.model.checkpoint import BlockStore
from prox24_deploy.model.directory import load_model, open_model_dir
from prox24_deploy.pipeline.context import read_context
from prox24_deploy.pruning import permutation
from prox24_deploy.pruning.directory import prune_directory
from prox24_deploy.pruning.permutation import OrderStore, Permuted, permute_channels
from prox24_deploy.pruning.ranks import ALONE, Ranks

# One of each structure: gated and plain, fused, grouped heads, encoder and decoder, convolutions.
_ROWS = [
    "llama", "phi3", "gpt2", "modernbert, text classes", "t5, gated", "whisper", "swin, classes",
    "resnet, classes", "convnextv2, classes",
]  # fmt: skip


def silent(*_: object) -> None:
    """Progress that nobody sees."""


def permuted(
    model: nn.Module,
    recipe: Recipe,
    folder: Path,
    *,
    dense: Mapping[str, str] | None = None,
    has_tensor: Any = lambda _: True,
    ranks: Ranks = ALONE,
) -> Permuted:
    return permute_channels(
        model,
        recipe,
        (batch(recipe),),
        dense or {},
        has_tensor=has_tensor,
        store=OrderStore(folder, silent),
        progress=silent,
        ranks=ranks,
    )


@torch.no_grad()
def output(model: nn.Module, recipe: Recipe) -> Tensor:
    first: Tensor = run_model(model, batch(recipe), recipe.task)[0]
    return first


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "row",
    [row if row in _ROWS else pytest.param(row, marks=pytest.mark.large) for row in FAMILIES],
)
def test_every_declared_order_is_free_in_every_family(row: str, tmp_path: Path) -> None:
    model = tiny_model(row)
    recipe = recipe_of(model)
    before, was = output(model, recipe), state(model)
    found = permuted(model, recipe, tmp_path)
    assert [order.reason for order in found.orders] == [""] * len(found.orders)
    assert len(found.orders) >= len(recipe.channels) > 0
    difference = (output(model, recipe) - before).abs().max()
    assert float(difference) <= 1e-5 * float(before.abs().max())
    moved = {
        name for name, value in model.state_dict().items() if not torch.equal(value, was[name])
    }
    assert moved <= set(found.tensors(model))
    for name in moved:
        assert torch.equal(
            model.state_dict()[name].flatten().sort()[0], was[name].flatten().sort()[0]
        )
    gained = [order for order in found.orders if (order.kept_after or 0) > (order.kept_before or 0)]
    assert gained
    assert all(order.tensors and len(order.order_sha256) == 64 for order in found.orders)


def test_all_processes_take_the_orders_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of a run before, whose sums may have been rounded elsewhere."""
    model, helper = tiny_model("llama"), tiny_model("llama")
    recipe = recipe_of(model)
    permuted(model, recipe, tmp_path)
    known = OrderStore(tmp_path, silent).load()
    monkeypatch.setattr(Ranks, "told", lambda ranks, value: value if ranks.writes else known)
    monkeypatch.setattr(permutation, "_searched", None)
    again = tiny_model("llama")
    found = [
        permuted(each, recipe, folder, ranks=Ranks(number, 2, torch.device("cpu")))
        for number, (each, folder) in enumerate(((again, tmp_path), (helper, tmp_path / "none")))
    ]
    assert found[0].orders == found[1].orders
    for each in (again, helper):
        for name, value in model.state_dict().items():
            assert torch.equal(each.state_dict()[name], value)


def with_channels(recipe: Recipe, *channels: Channels) -> Recipe:
    return recipe.model_copy(update={"channels": list(channels)})


@pytest.mark.parametrize(
    "wrong",
    [
        # Heads of values are read head by head, not in any order of all channels.
        Channels(reads="attention.output.dense", writes=["attention.self.value"]),
        # The keys are not what the projection behind attention reads.
        Channels(
            reads="attention.output.dense",
            writes=["attention.self.key"],
            heads="num_attention_heads",
        ),
        # A norm that compares channels and has one value for each was forgotten.
        Channels(reads="intermediate.dense", writes=["attention.output.dense"]),
    ],
)
def test_what_changes_the_model_is_moved_back_and_named(wrong: Channels, tmp_path: Path) -> None:
    model = tiny_model("bert")
    right = recipe_of(model)
    recipe = with_channels(right, right.channels[0], wrong)
    was = state(model)
    found = permuted(model, recipe, tmp_path)
    refused = {order.layer: order for order in found.orders if order.reason}
    assert {name.partition(".layer.")[2][2:] for name in refused} == {wrong.reads}
    assert all("which is more than rounding" in order.reason for order in refused.values())
    kept = set(found.tensors(model))
    assert kept
    for name, value in model.state_dict().items():
        assert torch.equal(value, was[name]) or name in kept
    assert kept == {name for order in found.orders for name in order.tensors}


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        ({"heads": "no_such_key"}, "do not write the 32 channels that"),
        ({"heads": "num_hidden_layers", "writes": ["intermediate.dense"]}, "do not write the 32"),
        ({"heads": "hidden_size"}, "1 channels do not divide into groups of four"),
        ({"vectors": ["output.LayerNorm.weight", "intermediate.dense.bias"]}, "is .64,., expected"),
    ],
)
def test_layers_that_do_not_fit_are_named(
    update: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model = tiny_model("bert, text classes")
    right = recipe_of(model)
    recipe = with_channels(right, right.channels[1].model_copy(update=update))
    was = state(model)
    (order,) = permuted(model, recipe, tmp_path).orders
    assert reason.replace(".64,.", "(64,)") in order.reason
    assert order.kept_after is None
    assert all(torch.equal(value, was[name]) for name, value in model.state_dict().items())


def test_a_writer_that_is_not_there_is_a_fault_of_the_recipe(tmp_path: Path) -> None:
    model = tiny_model("bert, text classes")
    recipe = with_channels(recipe_of(model), Channels(reads="output.dense", writes=["up"]))
    with pytest.raises(RecipeError, match=r"says that 'up' writes what output.dense reads, which"):
        permuted(model, recipe, tmp_path)


def test_tensors_that_the_checkpoint_has_not_leave_the_order_as_it_is(tmp_path: Path) -> None:
    model = tiny_model("bert, text classes")
    recipe = recipe_of(model)
    found = permuted(model, recipe, tmp_path, has_tensor=lambda n: not n.endswith("value.bias"))
    (order,) = [order for order in found.orders if order.reason]
    assert order.layer.endswith("attention.output.dense")
    assert order.reason.startswith("the checkpoint has no tensor of its own for bert.encoder")


def test_what_stays_dense_keeps_its_order_or_gets_it_back(tmp_path: Path) -> None:
    model = tiny_model("bert")
    recipe, was = recipe_of(model), state(model)
    dense = {"encoder.layer.0.output.dense": "excluded"}
    found = permuted(model, recipe, tmp_path, dense=dense)
    assert {order.layer for order in found.orders} == {
        "encoder.layer.0.attention.output.dense", "encoder.layer.1.attention.output.dense",
        "encoder.layer.1.output.dense",
    }  # fmt: skip
    rest = found.without(model, {order.layer: "over" for order in found.orders[:2]} | dense)
    assert [order.layer for order in rest.orders] == ["encoder.layer.1.output.dense"]
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, was[n])}
    # A bias that is zero all over is moved, too.
    assert changed == {name for name in rest.tensors(model) if was[name].any()}
    assert all(name.startswith("encoder.layer.1.") for name in changed)


def test_a_run_that_goes_on_has_the_order_of_the_first(tmp_path: Path) -> None:
    first, second, third = (tiny_model("llama") for _ in "123")
    recipe = recipe_of(first)
    found = permuted(first, recipe, tmp_path)
    blocks = BlockStore(tmp_path)
    blocks.save(0, {}, ())
    assert permuted(second, recipe, tmp_path).orders == found.orders
    assert all(torch.equal(first.state_dict()[n], v) for n, v in second.state_dict().items())
    assert blocks.load(0) is not None
    # A damaged file is found anew, and blocks of another order are worth nothing.
    (tmp_path / "order.safetensors").write_bytes(b"damaged")
    assert permuted(third, recipe, tmp_path).orders == found.orders
    assert blocks.load(0) is None


def test_the_directory_holds_a_model_in_one_order(
    tiny_llama: Path, prose: Path, tmp_path: Path
) -> None:
    """Only down_proj is pruned; the layers in front of it are written in the new order, too."""
    options = BuildOptions(
        text=TextOptions(calibration=(prose,), calibration_tokens=1024, evaluation_tokens=1024),
        prune=PruneOptions(method="magnitude", refinement="none", include=("mlp.down_proj",)),
    )
    context = read_context(tiny_llama, None, options)
    result = prune_directory(
        context.source, context.recipe, context.calibration, context.held_out, options.prune,
        device=torch.device("cpu"), solved=tmp_path / "solved", out=tmp_path / "out",
        progress=silent,
    )  # fmt: skip
    before = {n: t for f in tiny_llama.glob("*.safetensors") for n, t in load_file(f).items()}
    after = {
        n: t for f in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(f).items()
    }
    moved = {name for order in result.orders for name in order.tensors}
    assert {order.layer.rpartition(".")[2] for order in result.orders} == {"down_proj"}
    assert {name for name in before if not torch.equal(before[name], after[name])} == moved
    model = load_model(open_model_dir(tmp_path / "out"), context.recipe, torch.device("cpu"))
    for order in result.orders:
        gate = order.layer.replace("down", "gate") + ".weight"
        rows = (after[gate][:, None] == before[gate][None]).all(-1).float().argmax(1)
        assert torch.equal(after[gate], before[gate][rows])
        down = before[f"{order.layer}.weight"][:, rows]
        pruned = after[f"{order.layer}.weight"]
        assert torch.equal(pruned, torch.where(pruned != 0, down, 0))
        model.get_parameter(f"{order.layer}.weight").copy_(down)
    opened = open_tiny(tiny_llama, prose)
    with torch.no_grad():
        dense, same = (
            run_model(each, opened.batches[0], context.recipe.task).logits
            for each in (opened.model, model)
        )
    assert torch.allclose(dense, same, atol=1e-5 * float(dense.abs().max()))


def test_none_leaves_every_channel_where_it_is(
    tiny_llama: Path, prose: Path, tmp_path: Path
) -> None:
    options = BuildOptions(
        text=TextOptions(calibration=(prose,), calibration_tokens=1024, evaluation_tokens=1024),
        prune=PruneOptions(method="magnitude", permute="none", include=("mlp.down_proj",)),
    )
    context = read_context(tiny_llama, None, options)
    result = prune_directory(
        context.source, context.recipe, context.calibration, context.held_out, options.prune,
        device=torch.device("cpu"), solved=tmp_path / "solved", out=tmp_path / "out",
        progress=silent,
    )  # fmt: skip
    assert result.orders == ()
    before = {n: t for f in tiny_llama.glob("*.safetensors") for n, t in load_file(f).items()}
    after = {
        n: t for f in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(f).items()
    }
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("down_proj.weight")}
