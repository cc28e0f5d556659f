"""Which layers a budget prunes: losses recomputed, limits, and a model left as it was."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import run_cli
from model_cases import silent
from opened import Opened, open_tiny

from prox24_deploy.config.options import PruneOptions
from prox24_deploy.config.recipe import Override
from prox24_deploy.core.errors import CalibrationError, UsageError
from prox24_deploy.core.records import Sensitivity
from prox24_deploy.evaluation.embeddings import embed
from prox24_deploy.evaluation.losses import loss_against
from prox24_deploy.model.checkpoint import BlockStore, stored_dtype
from prox24_deploy.pruning import sensitivity
from prox24_deploy.pruning.prune import prune_model
from prox24_deploy.pruning.selection import left_dense
from prox24_deploy.pruning.sensitivity import SensitivityStore, measure_sensitivity, over_budget

ALL = PruneOptions(max_layers=1000)


def measure(opened: Opened, options: PruneOptions) -> Sensitivity:
    return measure_sensitivity(
        opened.model,
        opened.recipe,
        opened.batches,
        options,
        dense={},
        stored_dtype=lambda name: stored_dtype(opened.directory, name),
        progress=silent,
    )


@pytest.fixture(scope="module", params=["tiny_bert", "tiny_llama"])
def family(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module")
def whole(family: Path, prose: Path) -> Sensitivity:
    return measure(open_tiny(family, prose), ALL)


def test_every_target_is_measured_and_the_model_keeps_its_bits(family: Path, prose: Path) -> None:
    opened = open_tiny(family, prose)
    before = {name: p.clone() for name, p in opened.model.named_parameters()}
    found = measure(opened, ALL)
    for name, parameter in opened.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert len(found.layers) == 2 * len(opened.recipe.targets)
    assert found.samples == sum(len(batch.real) for batch in opened.batches[::8])
    for layer in found.layers:
        weight = opened.model.get_submodule(layer.name).get_parameter("weight")
        assert layer.weights == weight.numel()
        assert layer.loss.standard_error > 0
        # Damage may help a random decoder by chance, a random encoder never.
        assert layer.loss.value > 0 or opened.recipe.task == "text-generation"


def test_layers_come_in_the_order_of_harm_per_weight_and_the_curve_counts_them(
    whole: Sensitivity,
) -> None:
    harm = [layer.loss.value / layer.weights for layer in whole.layers]
    assert harm == sorted(harm)
    counts = [point.layers for point in whole.curve]
    assert counts == sorted(set(counts))
    assert counts[-1] == whole.chosen == len(whole.layers)
    for point in whole.curve:
        assert point.weights == sum(layer.weights for layer in whole.layers[: point.layers])
    if whole.metric == "1 - embedding cosine":
        assert whole.curve[0].layers == 1
        assert whole.curve[0].loss == whole.layers[0].loss
    assert whole.curve[-1].loss.value > 3 * whole.curve[0].loss.value


def test_the_loss_of_a_layer_is_that_of_the_model_with_its_weight_alone_replaced(
    tiny_bert: Path, prose: Path
) -> None:
    """Magnitude without refinement needs no calibration, so the weight is known beforehand."""
    opened = open_tiny(tiny_bert, prose)
    options = PruneOptions(method="magnitude", refinement="none", max_layers=1)
    found = measure(opened, options)
    name = found.layers[-1].name
    batches = opened.batches[::8]
    with torch.no_grad():
        expected = torch.cat([embed(opened.model, batch) for batch in batches])
        weight = opened.model.get_submodule(name).get_parameter("weight")
        cells = weight.unflatten(1, (-1, 4))
        dropped = cells.abs().argsort(-1)[..., :2]
        weight.copy_(cells.scatter(-1, dropped, 0.0).flatten(1))
        got = torch.cat([embed(opened.model, batch) for batch in batches])
    losses = 1 - (got * expected).sum(1)
    assert found.layers[-1].loss.value == pytest.approx(float(losses.mean()), rel=1e-6)


def test_a_limit_prunes_the_longest_prefix_within_it(
    family: Path, prose: Path, whole: Sensitivity
) -> None:
    limit = whole.curve[len(whole.curve) // 2].loss.value * 1.01
    found = measure(open_tiny(family, prose), PruneOptions(max_loss=limit))
    losses = {point.layers: point.loss.value for point in found.curve}
    assert 0 < found.chosen < len(found.layers)
    assert losses[found.chosen] <= limit
    assert losses[found.chosen + 1] > limit
    both = measure(open_tiny(family, prose), PruneOptions(max_loss=limit, max_layers=2))
    assert both.chosen == 2
    assert [layer.name for layer in both.layers] == [layer.name for layer in whole.layers]


def test_a_limit_below_the_least_harm_is_refused(tiny_bert: Path, prose: Path) -> None:
    message = r"least harmful layer alone raises the loss by .*, more than --max-loss 1e-12; raise"
    with pytest.raises(UsageError, match=message):
        measure(open_tiny(tiny_bert, prose), PruneOptions(max_loss=1e-12))


def test_one_batch_of_text_is_too_little(tiny_bert: Path, prose: Path) -> None:
    opened = open_tiny(tiny_bert, prose)
    with pytest.raises(CalibrationError, match="at least two batches of calibration text"):
        measure(replace(opened, batches=opened.batches[:1]), ALL)


def test_what_is_over_budget_stays_dense_with_its_loss_as_the_reason(
    tiny_llama: Path, prose: Path, tmp_path: Path
) -> None:
    opened = open_tiny(tiny_llama, prose)
    found = measure(opened, PruneOptions(max_layers=5))
    dense = over_budget(found)
    assert list(dense) == [layer.name for layer in found.layers[5:]]
    state = prune_model(
        opened.model,
        opened.recipe,
        opened.batches,
        (),
        PruneOptions(preset="fast"),
        stored_dtype=lambda name: stored_dtype(opened.directory, name),
        store=BlockStore(tmp_path),
        progress=silent,
        dense=dense,
    )
    pruned = {layer.name for layer in state.layers if layer.status == "pruned"}
    assert pruned == {layer.name for layer in found.layers[:5]}
    assert {f"{name}.weight" for name in pruned} == state.weights.keys()
    reasons = {layer.name: layer.reason for layer in state.layers if layer.status == "skipped"}
    worst = found.layers[-1]
    assert reasons[worst.name].startswith("over the budget of --layers 5: pruned alone it costs ")
    assert f"{worst.loss.value:.2g}" in reasons[worst.name]


def test_overrides_are_solved_their_own_way(tiny_bert: Path, prose: Path) -> None:
    opened = open_tiny(tiny_bert, prose)
    plain = measure(opened, ALL)
    override = Override(layers="output.dense", method="magnitude", refinement="none")
    recipe = opened.recipe.model_copy(update={"overrides": [override]})
    other = measure(replace(opened, recipe=recipe), ALL)
    losses = [{layer.name: layer.loss.value for layer in found.layers} for found in (plain, other)]
    for name in losses[0]:
        overridden = name.endswith(".output.dense") and "attention" not in name
        assert (losses[1][name] > losses[0][name]) == overridden, name


def test_what_was_saved_is_loaded_and_damage_is_no_sensitivity(
    tmp_path: Path, whole: Sensitivity
) -> None:
    store = SensitivityStore(tmp_path / "solved")
    assert store.load() is None
    store.save(whole)
    assert store.load() == whole
    assert [path.name for path in (tmp_path / "solved").iterdir()] == ["sensitivity.json"]
    (tmp_path / "solved" / "sensitivity.json").write_text('{"layers": 3}')
    assert store.load() is None


def test_text_beyond_eight_withheld_batches_is_not_measured(
    tiny_bert: Path, prose: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "_MOST_BATCHES", 2)
    opened = open_tiny(tiny_bert, prose)
    many = replace(opened, batches=opened.batches * 9)
    found = measure(many, PruneOptions(method="magnitude", max_layers=1))
    withheld = many.batches[::8]
    assert len(withheld) > 2
    step = -(-len(withheld) // 2)
    assert found.samples == sum(len(batch.real) for batch in withheld[::step])


def test_the_loss_of_the_dense_model_is_zero(family: Path, prose: Path) -> None:
    opened = open_tiny(family, prose)
    with torch.no_grad():
        loss = loss_against(opened.model, opened.recipe.task, opened.batches)
        values = loss.of(opened.model)
    assert len(values) == sum(len(batch.real) for batch in opened.batches)
    torch.testing.assert_close(values, torch.zeros_like(values), rtol=0, atol=1e-12)


def test_globs_leave_layers_dense_with_the_reason(tiny_llama: Path, prose: Path) -> None:
    opened = open_tiny(tiny_llama, prose)
    options = PruneOptions(include=("mlp.*", "*.0.self_attn.*"), exclude=("mlp.down_proj",))
    dense = left_dense(opened.recipe, opened.model, options)
    for block, name in itertools.product(range(2), opened.recipe.targets):
        path = f"model.layers.{block}.{name}"
        if name == "mlp.down_proj":
            assert dense[path] == "excluded by --exclude mlp.down_proj"
        elif name.startswith("self_attn") and block == 1:
            assert dense[path] == "not matched by --include"
        else:
            assert path not in dense


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_glob_that_matches_nothing_is_refused(option: str, tiny_llama: Path, prose: Path) -> None:
    opened = open_tiny(tiny_llama, prose)
    options = PruneOptions(**{option: ("q_proj",)})  # type: ignore[arg-type]
    message = (
        rf"--{option} 'q_proj' matches no target layer of recipe llama; they are named like "
        r"model\.layers\.0\.self_attn\.q_proj or self_attn\.q_proj\."
    )
    with pytest.raises(UsageError, match=message):
        left_dense(opened.recipe, opened.model, options)


@pytest.mark.parametrize("command", ["build", "prune"])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--include", "q_proj"), "--include 'q_proj' matches no target layer of recipe llama"),
        (("--exclude", "*"), r"All target layers .*q_proj: excluded by --exclude \*; leave one"),
        (("--include", "*q_proj", "--exclude", "*q_proj"), "All target layers of recipe llama are"),
    ],
)
def test_a_choice_of_no_layers_leaves_nothing(
    tiny_llama: Path, tmp_path: Path, command: str, given: tuple[str, ...], said: str
) -> None:
    # Without --calibration the model would first write some text.
    done = run_cli(command, tiny_llama, *given, "-o", tmp_path / "out")
    assert done.code == 2
    assert re.search(said, done.err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--reconstruct",), "Block reconstruction needs at least two batches"),
        (("--layers", "3"), "A budget needs at least two batches"),
    ],
)
def test_too_little_text_of_the_user_leaves_nothing(
    tiny_llama: Path, prose: Path, tmp_path: Path, given: tuple[str, ...], said: str
) -> None:
    text = ("--calibration", prose, "--calibration-tokens", "1024")
    done = run_cli("prune", tiny_llama, *text, *given, "-o", tmp_path / "out")
    assert done.code == 2
    assert said in done.err
    assert not (tmp_path / "out").exists()
