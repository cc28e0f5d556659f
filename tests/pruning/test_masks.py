"""Masks made elsewhere are kept bit for bit, or refused in one sentence before any work."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from opened import open_tiny
from safetensors.torch import load_file, save_file
from tiny_families import tiny_model
from torch import Tensor

from prox24_deploy.config.options import BuildOptions, PruneOptions, TextOptions
from prox24_deploy.core.errors import Prox24Error, UsageError
from prox24_deploy.core.fingerprint import fingerprint
from prox24_deploy.core.records import PruneResult
from prox24_deploy.pipeline.context import read_context
from prox24_deploy.pruning.directory import prune_directory
from prox24_deploy.pruning.masks import open_masks, read_masks
from prox24_deploy.pruning.reconstruct import SCHEDULES, AdamOptions
from prox24_deploy.pruning.solvers.problem import layer_problem
from prox24_deploy.pruning.solvers.solver import solve_layer
from prox24_deploy.sparsity.pattern import is_24, mask_24

Masks = dict[str, Tensor]

OPTIONS = BuildOptions()


def silent(*_: object) -> None:
    """Progress that nobody sees."""


def weights(folder: Path) -> Masks:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def random_masks(model: Path, axis: int = 1) -> Masks:
    """Two of every four at random, for everything that looks like a layer of a block."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: mask_24(torch.rand(weight.shape, generator=generator), axis).contiguous()
        for name, weight in weights(model).items()
        if (weight.ndim == 2 and ".layer" in name) or (".h." in name and weight.ndim == 2)
    }


def options_for(text: Path, mask: Path, **changes: Any) -> BuildOptions:
    return BuildOptions(
        text=TextOptions(calibration=(text,), calibration_tokens=3072, evaluation_tokens=1024),
        prune=PruneOptions(preset="fast", mask=mask, **changes),
    )


def pruned_by(model: Path, folder: Path, options: BuildOptions) -> PruneResult:
    context = read_context(model, None, options)
    return prune_directory(
        context.source, context.recipe, context.calibration, context.held_out, options.prune,
        device=torch.device("cpu"), solved=folder / "solved", out=folder / "out",
        progress=silent,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "axis"), [("tiny_llama", 1), ("tiny_gpt2", 0)])
@pytest.mark.parametrize("reconstruct", [False, True])
def test_masks_are_kept_bit_for_bit(
    name: str, axis: int, prose: Path, tmp_path: Path, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    *, reconstruct: bool,
) -> None:  # fmt: skip
    # A few steps show whether a masked weight moves.
    monkeypatch.setitem(SCHEDULES, "fast", AdamOptions(steps=4))
    model: Path = request.getfixturevalue(name)
    masks = random_masks(model, axis)
    save_file(masks, tmp_path / "masks.safetensors")
    options = options_for(prose, tmp_path / "masks.safetensors", reconstruct=reconstruct)
    result = pruned_by(model, tmp_path, options)
    pruned = {layer.name: layer for layer in result.layers if layer.status == "pruned"}
    assert result.method == "mask"
    assert {layer.method for layer in pruned.values()} == {"mask"}
    assert result.orders == ()
    before, after = weights(model), weights(tmp_path / "out")
    assert {f"{layer}.weight" for layer in pruned} == masks.keys()
    for tensor, mask in masks.items():
        assert not after[tensor][~mask].any()
        # Refined, not cut.
        assert not torch.equal(after[tensor][mask], before[tensor][mask])
    # Any random mask loses more than this where its weights are not refined.
    assert max(layer.relative_error or 0 for layer in pruned.values()) < 0.6


def test_a_24_model_is_a_mask_and_gets_back_what_it_kept(
    tiny_llama: Path, prose: Path, tmp_path: Path
) -> None:
    """Weights of another method in a directory; what it kept is refined in its place."""
    first = options_for(prose, tmp_path / "none")
    first = replace(first, prune=PruneOptions(method="wanda", refinement="none", permute="none"))
    wanda = tmp_path / "wanda"
    pruned_by(tiny_llama, wanda, first)
    result = pruned_by(tiny_llama, tmp_path, options_for(prose, wanda / "out"))
    given, found = weights(wanda / "out"), weights(tmp_path / "out")
    for layer in (layer for layer in result.layers if layer.status == "pruned"):
        name = f"{layer.name}.weight"
        assert torch.equal(given[name] != 0, found[name] != 0)


def without(masks: Masks, name: str) -> Masks:
    return {known: mask for known, mask in masks.items() if known != name}


def third(masks: Masks, name: str) -> Masks:
    wrong = masks[name].clone()
    wrong[1, 4:8] = torch.tensor([True, True, False, True])
    return {**masks, name: wrong}


_GATE = "model.layers.0.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: without(m, _GATE), rf"has no tensors for {_GATE}, expected one; add it, or "),
        (lambda m: {**m, _GATE: m[_GATE][:, :8]}, r"has the shape \(\d+, 8\), expected"),
        (
            lambda m: {**m, _GATE: m[_GATE].float() / m[_GATE]},
            r"gate_proj.weight of .* holds NaN, which says neither",
        ),
        (lambda m: {**m, _GATE: m[_GATE] & False}, r"gate_proj.weight of .* keeps no weight"),
        (lambda m: third(m, _GATE), r"keeps more than two of the four weights from \(1, 4\) along"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_before_any_work(
    spoil: Callable[[Masks], Masks], message: str, tiny_llama: Path, prose: Path, tmp_path: Path
) -> None:
    path = tmp_path / "masks.safetensors"
    save_file({n: m.contiguous() for n, m in spoil(random_masks(tiny_llama)).items()}, path)
    with pytest.raises(UsageError, match=message) as raised:
        read_context(tiny_llama, None, options_for(prose, path))
    assert _GATE.removesuffix(".weight") in str(raised.value)
    assert str(raised.value).count(". ") == 0
    # The layer may be left dense instead.
    exclude = ("model.layers.0.mlp.gate_proj",)
    assert read_context(tiny_llama, None, options_for(prose, path, exclude=exclude)).masks


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(without, "has no tensors for {}, expected one"), (third, "keeps more than two of the four")],
)
def test_a_mask_of_an_expert_is_looked_at_before_any_work(
    spoil: Callable[[Masks, str], Masks], message: str, prose: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    tiny_model("mixtral").save_pretrained(model)  # type: ignore[operator]
    masks = {
        name: mask_24(torch.rand(weight.shape))
        for name, weight in weights(model).items()
        if ".layers." in name and weight.ndim == 2
    }
    # As the checkpoint calls it, which is not what the model does.
    name = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
    save_file(spoil(masks, name), tmp_path / "masks.safetensors")
    with pytest.raises(
        UsageError, match=message.format(r"model\.layers\.0\.mlp\.experts\.2\.w2\.weight")
    ):
        read_context(model, None, options_for(prose, tmp_path / "masks.safetensors"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": Path("nowhere.safetensors")}, "Mask nowhere.safetensors does not exist; pass"),
        ({"method": "wanda"}, "so that --method wanda has no effect; leave one of them out"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    changes: dict[str, Any], message: str, tiny_llama: Path, prose: Path, tmp_path: Path
) -> None:
    path = tmp_path / "masks.safetensors"
    save_file(random_masks(tiny_llama), path)
    options = options_for(prose, path)
    options = replace(options, prune=replace(options.prune, **changes))
    with pytest.raises(UsageError, match=message):
        read_context(tiny_llama, None, options)


def test_a_file_that_is_none_is_refused(tiny_llama: Path, prose: Path, tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    path.write_bytes(b"no such thing")
    with pytest.raises(UsageError, match="is not a safetensors file"):
        read_context(tiny_llama, None, options_for(prose, path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(Prox24Error, match=r"has no model.safetensors"):
        read_context(tiny_llama, None, options_for(prose, tmp_path / "empty"))


def test_the_content_counts_and_not_the_place(
    tiny_llama: Path, prose: Path, tmp_path: Path
) -> None:
    masks = random_masks(tiny_llama)
    seen = []
    options = OPTIONS
    for name in ("a", "b", "c"):
        if name == "c":
            masks[_GATE] = masks[_GATE].flip(1)
        save_file(masks, tmp_path / f"{name}.safetensors")
        options = options_for(prose, tmp_path / f"{name}.safetensors")
        found = read_context(tiny_llama, None, options).masks
        assert found is not None
        found.require_unchanged()
        seen.append((fingerprint(found), fingerprint(options.prune)))
    assert seen[0] == seen[1]
    assert seen[1][0] != seen[2][0]
    given = open_masks(options.prune)
    assert given is not None
    (tmp_path / "c.safetensors").write_bytes(b"other")
    with pytest.raises(UsageError, match=r"c.safetensors was changed while the model was pruned"):
        given.require_unchanged()


def test_no_baseline_takes_the_place_of_a_mask() -> None:
    """The worst mask there is, where SparseGPT's has by far the lower loss."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(n, 16, generator=generator) for n in (8, 64))
    problem = layer_problem(weight, inputs.T @ inputs / 64, 0.01)
    worst = ~mask_24(problem.start.abs())
    solution = solve_layer(weight, problem, fixed=worst)
    assert solution.used == "mask"
    assert torch.equal(solution.mask, worst)
    assert not solution.weight[~worst].any()
    assert float(problem.loss(solution.weight * problem.scale).sum()) < float(
        problem.loss(problem.start.masked_fill(~worst, 0.0)).sum()
    )


def test_weights_that_a_mask_keeps_are_unchanged_and_others_go() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    mask = mask_24(weight.abs())
    weight = weight.masked_fill(~mask, 0.0)
    problem = layer_problem(weight, torch.eye(8), 0.01)
    assert solve_layer(weight, problem, fixed=mask).used == "unchanged"
    other = solve_layer(weight, problem, fixed=~mask)
    assert other.used == "mask"
    assert is_24(other.weight)
    assert not other.weight.any()


def test_a_group_that_keeps_one_keeps_the_largest_other(
    tiny_llama: Path, prose: Path, tmp_path: Path
) -> None:
    masks = random_masks(tiny_llama)
    masks[_GATE] = torch.zeros_like(masks[_GATE])
    masks[_GATE][:, ::4] = True
    save_file(masks, tmp_path / "masks.safetensors")
    options = options_for(prose, tmp_path / "masks.safetensors", include=("mlp.gate_proj",))
    pruned_by(tiny_llama, tmp_path, options)
    kept = weights(tmp_path / "out")[_GATE].unflatten(1, (-1, 4)) != 0
    size = weights(tiny_llama)[_GATE].unflatten(1, (-1, 4)).abs()
    assert bool((kept.sum(-1) == 2).all())
    assert bool(kept[..., 0].all())
    assert torch.equal(kept[..., 1:].int().argmax(-1), size[..., 1:].argmax(-1))


@pytest.mark.parametrize("spelling", ["{}", "{}.mask", "{}.weight_mask", "model.{}.weight"])
def test_masks_are_found_by_the_names_that_tools_give_them(
    spelling: str, tiny_llama: Path, prose: Path, tmp_path: Path
) -> None:
    masks = random_masks(tiny_llama)
    named = {spelling.format(name.removesuffix(".weight")): mask for name, mask in masks.items()}
    save_file(named, tmp_path / "masks.safetensors")
    assert read_context(tiny_llama, None, options_for(prose, tmp_path / "masks.safetensors")).masks


def test_a_bundle_is_no_mask_but_has_one(tiny_llama: Path, prose: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match=r"is a bundle; pass the model in it, .*pruned\."):
        read_context(tiny_llama, None, options_for(prose, tmp_path))


def test_masks_that_are_of_no_layer_are_said(
    tiny_llama: Path, prose: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    masks = random_masks(tiny_llama)
    more = {"model.layers.7.mlp.up_proj.weight": masks[_GATE].clone()}
    save_file({**masks, **more}, tmp_path / "masks.safetensors")
    read_context(tiny_llama, None, options_for(prose, tmp_path / "masks.safetensors"))
    assert "1 tensors that no layer to prune has a use for, first model.layers.7" in caplog.text


def test_weights_of_another_model_are_doubted_as_masks(
    tiny_llama: Path, prose: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = open_tiny(tiny_llama, prose, tokens=1024)
    masks = random_masks(tiny_llama)
    own = {name: (weights(tiny_llama)[name] * mask) for name, mask in masks.items()}
    ones = {name: mask.bfloat16() for name, mask in masks.items()}
    others = {name: torch.randn(mask.shape) * mask for name, mask in masks.items()}
    # As channels in another order leave it.
    moved = {name: t.roll(8, 1) for name, t in own.items()}
    eights = {name: t.to(torch.float8_e4m3fn) for name, t in own.items()}
    for number, (given, said) in enumerate(
        ((own, ""), (ones, ""), (masks, ""), (eights, ""), (others, "that"), (moved, "that"))
    ):
        save_file(given, file := tmp_path / f"{number}.safetensors")
        options = PruneOptions(mask=file)
        files = open_masks(options)
        assert files is not None
        caplog.clear()
        read_masks(files, opened.model, opened.directory, opened.recipe, options)
        assert bool(said) == ("that have nothing to do with those of the model" in caplog.text)
