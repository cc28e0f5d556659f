"""What each layer is solved on, what is left alone, and what is refused, in whole models."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from model_cases import (
    BERT_TARGETS,
    CPU,
    LLAMA_TARGETS,
    NEST,
    RECIPES,
    Nest,
    hooks,
    inputs_of,
    linear,
    load,
    random_batch,
    silent,
)
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_bert
from torch import Tensor, nn

from prox24_deploy.config.options import PruneOptions, Target
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.errors import ModelDirError, Prox24Error, RecipeError
from prox24_deploy.core.records import LayerRecord, PruneResult
from prox24_deploy.data.text import make_samples, read_texts
from prox24_deploy.model.batch import Batch, Samples
from prox24_deploy.model.checkpoint import BlockStore
from prox24_deploy.model.directory import open_model_dir
from prox24_deploy.model.processors import load_tokenizer
from prox24_deploy.pruning import block as block_module
from prox24_deploy.pruning import layer_group as solve_module
from prox24_deploy.pruning.directory import prune_directory
from prox24_deploy.pruning.prune import PrunedState, prune_model
from prox24_deploy.pruning.solvers.problem import LayerProblem, damping_for, layer_problem
from prox24_deploy.sparsity.pattern import is_24, project_24

FAST = PruneOptions(preset="fast")
GROUPS = {
    "bert": (BERT_TARGETS[:3], BERT_TARGETS[3:4], BERT_TARGETS[4:5], BERT_TARGETS[5:]),
    "llama": (LLAMA_TARGETS[:3], LLAMA_TARGETS[3:4], LLAMA_TARGETS[4:6], LLAMA_TARGETS[6:]),
}


def run(
    model: nn.Module,
    recipe: Recipe,
    store: Path,
    *,
    calibration: tuple[Batch, ...] = (),
    held_out: tuple[Batch, ...] = (),
    options: PruneOptions = FAST,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[str, int, int], None] = silent,
) -> PrunedState:
    return prune_model(
        model,
        recipe,
        calibration or batches_of(recipe),
        held_out,
        options,
        stored_dtype=lambda _: dtype,
        store=BlockStore(store),
        progress=progress,
    )


def batches_of(recipe: Recipe, seed: int = 0) -> tuple[Batch, ...]:
    """About 600 tokens in two padded batches of different widths."""
    lengths = ([40, 12, 33, 8, 40, 25, 31], [50, 60, 44, 7, 58, 61, 64, 35])
    return tuple(random_batch(recipe, part, seed + i) for i, part in enumerate(lengths))


def records_of(state: PrunedState) -> dict[str, LayerRecord]:
    return {record.name: record for record in state.layers}


def timeless(state: PrunedState) -> list[LayerRecord]:
    return [replace(record, seconds=0.0) for record in state.layers]


@dataclass(frozen=True)
class Solved:
    """A pruned model beside its dense original, and the problems that were posed on the way."""

    recipe: Recipe
    dense: nn.Module
    pruned: nn.Module
    state: PrunedState
    batches: tuple[Batch, ...]
    held_out: tuple[Batch, ...]
    posed: list[tuple[Tensor, Tensor, float, Tensor | None]]


def solve(path: Path, family: str, store: Path, options: PruneOptions) -> Solved:
    recipe = RECIPES[family]
    dense, pruned = load(path, recipe), load(path, recipe)
    batches, held_out = batches_of(recipe), batches_of(recipe, seed=100)
    posed: list[tuple[Tensor, Tensor, float, Tensor | None]] = []

    def noted(
        weight: Tensor, gram: Tensor, damping: float, cross: Tensor | None, *, tokens: int
    ) -> LayerProblem:
        posed.append((weight, gram / tokens, damping, None if cross is None else cross / tokens))
        return layer_problem(weight, gram, damping, cross, tokens=tokens)

    dtype = {"bert": torch.float32, "llama": torch.float16}[family]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solve_module, "layer_problem", noted)
        state = run(
            pruned,
            recipe,
            store,
            calibration=batches,
            held_out=held_out,
            options=options,
            dtype=dtype,
        )
    return Solved(recipe, dense, pruned, state, batches, held_out, posed)


@pytest.fixture(scope="module", params=["bert-asymmetric", "llama-asymmetric", "llama-symmetric"])
def solved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Solved:
    family, target = request.param.split("-")
    path: Path = request.getfixturevalue(f"tiny_{family}")
    options = PruneOptions(preset="fast", target=target)
    return solve(path, family, tmp_path_factory.mktemp("solved"), options)


def real_inputs(
    model: nn.Module, names: list[str], batches: tuple[Batch, ...]
) -> dict[str, Tensor]:
    """Float64 inputs of each layer in whole forward passes, (tokens, d), padding left out."""
    parts = [(inputs_of(model, names, batch), batch.real) for batch in batches]
    return {n: torch.cat([seen[n][real] for seen, real in parts]).double() for n in names}


def test_every_group_is_solved_on_inputs_of_the_final_pruned_model(solved: Solved) -> None:
    groups = [
        [f"{solved.recipe.blocks}.{i}.{target}" for target in group]
        for i in range(2)
        for group in GROUPS[solved.recipe.family]
    ]
    names = [name for group in groups for name in group]
    dense, pruned = (
        real_inputs(model, names, solved.batches) for model in (solved.dense, solved.pruned)
    )
    symmetric = solved.posed[0][3] is None
    assert len(solved.posed) == len(groups)
    for group, (weight, gram, damping, cross) in zip(groups, solved.posed, strict=True):
        before = torch.cat([linear(solved.dense, name).weight for name in group])
        assert torch.equal(weight, before)
        x_dense, x_pruned = dense[group[0]], pruned[group[0]]
        tokens, features = x_pruned.shape
        assert tokens == sum(int(batch.real.sum()) for batch in solved.batches)
        assert damping == damping_for(features, tokens)
        expected = x_pruned.T @ x_pruned / tokens
        scale = float(expected.abs().max())
        torch.testing.assert_close(gram, expected, rtol=0, atol=1e-5 * scale)
        assert (cross is None) == symmetric
        if cross is not None:
            torch.testing.assert_close(
                cross, x_dense.T @ x_pruned / tokens, rtol=0, atol=1e-5 * scale
            )
    # Inputs of the last layer differ between the models, or the comparison would say nothing.
    last = names[-1]
    assert float((dense[last] - pruned[last]).norm() / dense[last].norm()) > 0.05


def test_recorded_errors_are_those_between_the_final_models(solved: Solved) -> None:
    done = [record for record in solved.state.layers if record.status == "pruned"]
    names = [record.name for record in done]
    for batches, attribute in (
        (solved.batches, "relative_error"), (solved.held_out, "held_out_error"),
    ):  # fmt: skip
        dense, pruned = (
            real_inputs(model, names, batches) for model in (solved.dense, solved.pruned)
        )
        for record in done:
            wanted = dense[record.name] @ linear(solved.dense, record.name).weight.double().T
            got = pruned[record.name] @ linear(solved.pruned, record.name).weight.double().T
            error = float((wanted - got).square().sum() / wanted.square().sum())
            assert getattr(record, attribute) == pytest.approx(error, rel=1e-3), record.name


def test_records_follow_the_forward_pass_and_tell_shape_and_effort(solved: Solved) -> None:
    blocks = solved.recipe.blocks
    targets = [target for group in GROUPS[solved.recipe.family] for target in group]
    done = [record for record in solved.state.layers if record.status == "pruned"]
    assert [r.name for r in done] == [f"{blocks}.{i}.{t}" for i in range(2) for t in targets]
    for record in done:
        layer = linear(solved.pruned, record.name)
        assert record.shape == (layer.out_features, layer.in_features)
        assert (record.method, record.reason) == ("prox", "")
        assert record.iterations > 0
        assert record.seconds > 0
        assert is_24(layer.weight)
        stored = solved.state.weights[f"{record.name}.weight"]
        assert torch.equal(stored.float(), layer.weight)
        # A masked weight is +0.0: the sign bit of -0.0 would show in the bytes of the file.
        assert not bool((torch.signbit(stored) & (stored == 0)).any())
    assert len(solved.state.weights) == len(done)


def test_nothing_but_target_weights_changes_and_no_hook_stays(solved: Solved) -> None:
    before, after = (dict(m.named_parameters()) for m in (solved.dense, solved.pruned))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # A pooler that the checkpoint lacks is made at random every time the model is opened.
    assert changed - {"pooler.dense.weight"} == solved.state.weights.keys()
    assert hooks(solved.pruned) == 0


def test_the_symmetric_target_gives_other_weights(tiny_llama: Path, tmp_path: Path) -> None:
    weights = []
    for target in get_args(Target):
        options = PruneOptions(preset="fast", target=target)
        done = solve(tiny_llama, "llama", tmp_path / target, options)
        weights.append(done.state.weights)
    names = [[n for n in weights[0] if n.startswith(f"model.layers.{i}.")] for i in range(2)]
    # Where no input has changed yet the two targets are one.
    for name in (f"model.layers.0.{target}.weight" for target in LLAMA_TARGETS[:3]):
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=0, atol=1e-2)
    assert not any(torch.equal(weights[0][name], weights[1][name]) for name in names[1])


def test_the_same_run_gives_the_same_bits_whatever_is_held_out(
    tiny_bert: Path, tmp_path: Path
) -> None:
    recipe = RECIPES["bert"]
    runs = [
        run(load(tiny_bert, recipe), recipe, tmp_path / str(i), held_out=held_out)
        for i, held_out in enumerate((batches_of(recipe, 7), batches_of(recipe, 7), ()))
    ]
    for other in runs[1:]:
        assert other.weights.keys() == runs[0].weights.keys()
        for name, weight in runs[0].weights.items():
            assert torch.equal(weight.view(torch.int32), other.weights[name].view(torch.int32))
    assert timeless(runs[0]) == timeless(runs[1])
    without = [replace(record, held_out_error=None) for record in timeless(runs[0])]
    assert timeless(runs[2]) == without


def test_a_damaged_stored_block_is_solved_again_with_the_same_result(
    tiny_bert: Path, tmp_path: Path
) -> None:
    recipe = RECIPES["bert"]
    first = run(load(tiny_bert, recipe), recipe, tmp_path)
    file = tmp_path / "block-0000.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    again = run(load(tiny_bert, recipe), recipe, tmp_path)
    assert timeless(again) == timeless(first)
    assert load_file(file).keys() == set(BERT_TARGETS)
    assert all(torch.equal(again.weights[n], w) for n, w in first.weights.items())


def test_a_stored_block_is_used_as_it_is(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPES["bert"]
    first = run(load(tiny_bert, recipe), recipe, tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("solved again")

    monkeypatch.setattr(block_module, "solve_group", refuse)
    model = load(tiny_bert, recipe)
    again = run(model, recipe, tmp_path)
    assert again.layers == first.layers
    for name, weight in first.weights.items():
        assert torch.equal(again.weights[name], weight)
        assert torch.equal(model.get_parameter(name), weight)


def test_a_stored_block_of_another_model_is_not_applied(tiny_bert: Path, tmp_path: Path) -> None:
    BlockStore(tmp_path).save(0, {"attention.self": torch.zeros(32, 32)}, ())
    with pytest.raises(TypeError, match=r"attention\.self is a BertSelfAttention, expected Linear"):
        run(load(tiny_bert, RECIPES["bert"]), RECIPES["bert"], tmp_path)


def test_progress_counts_blocks(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    run(nest(), NEST, tmp_path, progress=lambda *call: calls.append(call))
    assert calls == [("prune", 0, 2), ("prune", 1, 2), ("prune", 2, 2)]


def nest() -> Nest:
    torch.manual_seed(0)
    return Nest().eval().requires_grad_(requires_grad=False)


@pytest.mark.parametrize("method", ["prox", "ista", "sparsegpt", "wanda", "magnitude"])
def test_every_method_prunes_a_decoder_in_half_precision(
    tiny_llama: Path, tmp_path: Path, method: str
) -> None:
    recipe = RECIPES["llama"]
    options = PruneOptions(method=method, preset="fast")  # type: ignore[arg-type]
    state = run(load(tiny_llama, recipe), recipe, tmp_path, options=options, dtype=torch.float16)
    done = [record for record in state.layers if record.status == "pruned"]
    assert len(done) == 2 * len(LLAMA_TARGETS)
    for record in done:
        weight = state.weights[f"{record.name}.weight"]
        assert weight.dtype == torch.float16
        assert is_24(weight)
        assert record.method == method
        assert record.relative_error is not None
        assert 0 < record.relative_error < 0.6
        assert record.held_out_error is None


def test_the_preset_is_the_solver_s_schedule(tmp_path: Path) -> None:
    iterations = []
    for preset in ("fast", "default", "best"):
        options = PruneOptions(preset=preset)
        state = run(nest(), NEST, tmp_path / preset, options=options)
        iterations.append(sum(record.iterations for record in state.layers))
    assert iterations == sorted(set(iterations))


def test_a_layer_that_is_2_to_4_keeps_its_bits_beside_others_that_are_not(
    tiny_bert: Path, tmp_path: Path
) -> None:
    recipe = RECIPES["bert"]
    model = load(tiny_bert, recipe)
    name = "encoder.layer.0.attention.self.key"
    weight = linear(model, name).weight
    weight.copy_(project_24(weight))
    before = weight.clone()
    state = run(model, recipe, tmp_path)
    assert torch.equal(state.weights[f"{name}.weight"], before)
    record = records_of(state)[name]
    assert (record.method, record.iterations) == ("unchanged", 0)
    assert records_of(state)[name.replace("key", "query")].method == "prox"


def test_a_target_that_the_recipe_ignores_is_named_and_left_dense(
    tiny_bert: Path, tmp_path: Path
) -> None:
    recipe = RECIPES["bert"].model_copy(update={"ignore": ["attention.self.key", "output.*"]})
    dense, model = load(tiny_bert, recipe), load(tiny_bert, recipe)
    state = run(model, recipe, tmp_path)
    skipped = {r.name: r for r in state.layers if r.status == "skipped"}
    ignored = [
        f"encoder.layer.{i}.{target}"
        for i in range(2)
        for target in ("attention.self.key", "output.dense")
    ]
    assert skipped.keys() == {*ignored, "pooler.dense"}
    for name in ignored:
        record = skipped[name]
        assert record.reason == "not a target of recipe bert"
        assert (record.relative_error, record.held_out_error) == (None, None)
        assert (record.method, record.iterations, record.seconds) == ("", 0, 0.0)
        assert torch.equal(linear(model, name).weight, linear(dense, name).weight)
    assert len(state.weights) == 8


def test_targets_that_no_forward_pass_reaches_are_told_in_their_order(tmp_path: Path) -> None:
    names = ["south", "north", "up", "down", "left", "right"]
    model = nest()
    for name in names:
        model.layers[1].add_module(name, nn.Linear(4, 4))
    recipe = NEST.model_copy(update={"targets": ["*"]})
    state = run(model, recipe, tmp_path)
    skipped = {r.name: r.reason for r in state.layers if r.status == "skipped"}
    # Always in this order, however Python hashes strings in this process.
    wanted = ["layers.0.unused", "layers.1.unused", *(f"layers.1.{name}" for name in names)]
    assert list(skipped) == wanted
    assert all("reaches it" in reason for reason in skipped.values())
    assert set(state.weights) == {
        f"layers.{i}.{n}.weight" for i in range(2) for n in ("one", "two")
    }


def test_a_wrong_target_is_refused_before_anything_runs(tiny_bert: Path, tmp_path: Path) -> None:
    recipe = RECIPES["bert"].model_copy(update={"targets": ["attention.*", "feed_forward"]})
    model = load(tiny_bert, recipe)

    def fail(*_: object) -> None:
        raise AssertionError("was run")

    model.get_submodule("embeddings").register_forward_pre_hook(fail)
    with pytest.raises(RecipeError, match="target 'feed_forward' matches no linear layer"):
        run(model, recipe, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_is_nan_is_refused_with_the_layer_s_name(
    tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = RECIPES["llama"]
    model = load(tiny_llama, recipe)
    # The last layer of all: nothing downstream could show it.
    linear(model, "model.layers.1.mlp.down_proj").weight[3, 7] = math.nan
    with pytest.raises(ModelDirError, match=r"model\.layers\.1\.mlp\.down_proj: the weight matrix"):
        run(model, recipe, tmp_path)


def test_activations_that_overflow_in_a_later_block_are_refused_by_name(
    tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = RECIPES["llama"]
    model = load(tiny_llama, recipe)
    for name in ("gate_proj", "up_proj"):
        linear(model, f"model.layers.1.mlp.{name}").weight.mul_(1e18)
    message = r"Layer model\.layers\.1\.mlp\.down_proj: .* activations overflow"
    with pytest.raises(ModelDirError, match=message):
        run(model, recipe, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["block-0000.safetensors"]


def test_activations_that_overflow_on_held_out_text_are_refused_by_name(tmp_path: Path) -> None:
    model = nest()
    model.embed.weight[299] = 1e38
    held_out = random_batch(NEST, [20, 30])
    held_out.inputs["input_ids"][0, 3] = 299
    with pytest.raises(ModelDirError, match=r"Layer layers\.0\.one"):
        run(model, NEST, tmp_path, held_out=(held_out,))


@dataclass(frozen=True)
class Done:
    """What `prune_directory` was given and what it returned."""

    family: str
    source: Path
    calibration: Samples
    held_out: Samples
    result: PruneResult
    out: Path


def prune_to(path: Path, recipe: Recipe, text: Path, folder: Path) -> Done:
    family, directory = recipe.family, open_model_dir(path)
    tokenizer = load_tokenizer(directory)
    texts = read_texts([text], [], 0)
    length = {"bert": 128, "llama": 64}[family]
    calibration, held_out = (
        make_samples(part, tokenizer, recipe, tokens=tokens, max_length=length)
        for part, tokens in zip(texts, (2048, 1100), strict=True)
    )
    result = prune_directory(
        directory,
        recipe,
        calibration,
        held_out,
        FAST,
        device=CPU,
        solved=folder / "solved",
        out=folder / "out",
        progress=silent,
    )
    return Done(family, path, calibration, held_out, result, folder / "out")


@pytest.fixture(scope="module", params=["bert", "llama"])
def done(
    request: pytest.FixtureRequest, prose: Path, tmp_path_factory: pytest.TempPathFactory
) -> Done:
    path: Path = request.getfixturevalue(f"tiny_{request.param}")
    return prune_to(path, RECIPES[request.param], prose, tmp_path_factory.mktemp("directory"))


def test_the_written_directory_holds_what_was_solved(done: Done) -> None:
    dense = load(done.source, RECIPES[done.family])
    pruned = load(done.out, RECIPES[done.family])
    names = {layer.name for layer in done.result.layers if layer.status == "pruned"}
    blocks = RECIPES[done.family].blocks
    for name, parameter in pruned.named_parameters():
        if name.startswith("pooler"):
            continue
        same = torch.equal(parameter, dense.get_parameter(name))
        assert same == (name.removesuffix(".weight") not in names), name
        if not same:
            assert is_24(parameter)
            assert name.startswith(blocks)


def test_the_result_tells_options_text_and_damping(done: Done) -> None:
    result = done.result
    assert (result.method, result.preset, result.target) == ("prox", "fast", "asymmetric")
    assert result.device == "cpu"
    assert result.calibration == done.calibration.source
    assert result.held_out == done.held_out.source
    narrow, wide = {"bert": (32, 64), "llama": (32, 48)}[done.family]
    tokens = done.calibration.source.tokens
    assert result.damping == (damping_for(narrow, tokens), damping_for(wide, tokens))
    assert sum(layer.seconds for layer in result.layers) < result.seconds
    for layer in result.layers:
        if layer.status == "pruned":
            assert layer.held_out_error is not None
            assert 0 < layer.held_out_error < 0.5
            # Measured on another text than the error beside it.
            assert layer.held_out_error != pytest.approx(layer.relative_error, rel=1e-6)


def test_the_directory_s_hash_is_that_of_the_weights_it_was_given(
    done: Done, prose: Path, tmp_path: Path
) -> None:
    again = prune_to(done.source, RECIPES[done.family], prose, tmp_path)
    assert again.result.state_sha256 == done.result.state_sha256
    for shard in done.out.glob("*.safetensors"):
        assert shard.read_bytes() == (again.out / shard.name).read_bytes()


def test_a_model_in_which_no_layer_can_be_pruned_is_refused(prose: Path, tmp_path: Path) -> None:
    path = write_tiny_bert(tmp_path / "odd", hidden=30)
    recipe = RECIPES["bert"].model_copy(update={"ignore": ["output.dense"]})
    with pytest.raises(Prox24Error, match="multiple of 4"):
        prune_to(path, recipe, prose, tmp_path)


def test_a_weight_whose_checkpoint_has_another_dtype_is_rounded_to_it_first(
    tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    path = write_tiny_bert(tmp_path / "mixed")
    weights = load_file(path / "model.safetensors")
    half = "encoder.layer.0.attention.self.query.weight"
    weights[half] = weights[half].bfloat16()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    done = prune_to(path, RECIPES["bert"], prose, tmp_path)
    stored = load_file(done.out / "model.safetensors")
    dtypes = {name: tensor.dtype for name, tensor in stored.items() if tensor.is_floating_point()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.bfloat16} == {half}
    assert is_24(stored[half])
