"""Files that change between stages and within them: a bundle is of one model, or there is none."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import run_cli, snapshot
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_bert

from prox24_deploy.bundle.bundle import open_bundle
from prox24_deploy.bundle.manifest import read_manifest, verify
from prox24_deploy.config.options import BuildOptions, EngineOptions, PruneOptions, TextOptions
from prox24_deploy.config.recipe import shipped_recipes
from prox24_deploy.core.errors import BackendMissingError, BundleError, ModelDirError, Prox24Error
from prox24_deploy.pipeline import run as pipeline
from prox24_deploy.pipeline import stages

Progress = Callable[[str, int, int], None]


def silent(*_: object) -> None:
    """Progress that nobody sees."""


@pytest.fixture
def model(tiny_bert: Path, tmp_path: Path) -> Path:
    """A model directory that a test may change."""
    return Path(shutil.copytree(tiny_bert, tmp_path / "model"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same shapes."""
    return write_tiny_bert(tmp_path_factory.mktemp("other") / "model", seed=7)


@pytest.fixture
def options(prose: Path) -> BuildOptions:
    return BuildOptions(
        text=TextOptions(calibration=(prose,), calibration_tokens=2048, evaluation_tokens=1024),
        prune=PruneOptions(method="magnitude"),
        device="cpu",
        engine=EngineOptions(batches=(1,), sequences=(8,)),
    )


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, prose: Path) -> Path:
    """A finished bundle, to be copied."""
    out = tmp_path_factory.mktemp("sealed") / "bundle"
    run = run_cli(
        "build", tiny_bert, "-o", out, "--calibration", prose, "--calibration-tokens", "2048",
        "--evaluation-tokens", "1024", "--method", "magnitude", "--shapes", "batch=1", "sequence=8",
    )  # fmt: skip
    assert run.code in {0, 3, 5}, run.err
    return out


@pytest.fixture
def bundle(sealed: Path, tmp_path: Path) -> Iterator[Path]:
    yield Path(shutil.copytree(sealed, tmp_path / "bundle"))
    shutil.rmtree(tmp_path / "bundle")


def weights_of(other: Path, model: Path) -> None:
    """Replace the weights of a model by another's, as a download does: by a rename."""
    shutil.copyfile(other / "model.safetensors", model / "new")
    (model / "new").replace(model / "model.safetensors")


def embeddings_in_place(other: Path, model: Path) -> None:
    """Write other values into the file that is open, and put the old ones back."""
    path = model / "model.safetensors"
    before = path.read_bytes()
    path.write_bytes(before[:-64] + bytes(64))
    path.write_bytes(before)


def another_tokenizer(other: Path, model: Path) -> None:
    path = model / "tokenizer_config.json"
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")


def a_file_more(other: Path, model: Path) -> None:
    (model / "added_tokens.json").write_text("{}", encoding="utf-8")


def a_file_less(other: Path, model: Path) -> None:
    (model / "tokenizer_config.json").unlink()


CHANGES = [weights_of, embeddings_in_place, another_tokenizer, a_file_more, a_file_less]


def at(moment: str, act: Callable[[], None]) -> Progress:
    """Do something when a stage first tells of its progress."""
    waiting = [act]

    def progress(label: str, done: int, _: int) -> None:
        if label == moment and done and waiting:
            waiting.pop()()

    return progress


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_that_changes_while_it_is_pruned_is_never_sealed(
    change: Callable[[Path, Path], None],
    model: Path, other: Path, tiny_bert: Path, options: BuildOptions, tmp_path: Path,
) -> None:  # fmt: skip
    """What was made of both is not kept, so that the first one put back gives its own bundle."""
    out = tmp_path / "out"
    disturbed = at("prune", lambda: change(other, model))
    with pytest.raises(ModelDirError, match=r"was changed while it was read: .* is not what it"):
        pipeline.prune(model, out, options, fresh=False, progress=disturbed)
    manifest = read_manifest(out)
    assert (manifest.model, manifest.stages) == (None, {})
    assert not (out / "pruned").exists()
    shutil.rmtree(model)
    shutil.copytree(tiny_bert, model)
    pipeline.prune(model, out, options, fresh=False, progress=silent)
    pipeline.prune(tiny_bert, tmp_path / "expected", options, fresh=False, progress=silent)
    expected = snapshot(tmp_path / "expected" / "pruned")
    assert snapshot(out / "pruned") == expected


@pytest.mark.parametrize("moment", ["evaluate", "accuracy"])
def test_a_checkpoint_that_changes_during_a_later_stage_ends_the_build(
    moment: str, bundle: Path, model: Path, other: Path, options: BuildOptions
) -> None:
    """Evaluation would hold the pruned model against another dense one."""
    with open_bundle(bundle) as opened:
        opened.forget(moment)
    disturbed = at(moment, lambda: weights_of(other, model))
    with pytest.raises(ModelDirError, match=r"was changed while .* model\.safetensors is not"):
        pipeline.build(model, bundle, options, fresh=False, progress=disturbed)
    manifest = read_manifest(bundle)
    assert moment not in manifest.stages
    assert not manifest.complete


def test_a_source_that_changed_before_its_card_is_read_is_not_sealed(
    bundle: Path, model: Path, options: BuildOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(*_: object) -> None:
        (model / "README.md").write_text("# Of another model", encoding="utf-8")

    # The last before the report.
    monkeypatch.setattr(stages.tasks, "run", change)
    with pytest.raises(ModelDirError, match=r"README\.md is not what it was"):
        pipeline.build(model, bundle, options, fresh=False, progress=silent)
    assert not read_manifest(bundle).complete


def test_no_solved_block_of_a_changed_checkpoint_is_gone_on_from(
    model: Path, other: Path, options: BuildOptions, tmp_path: Path
) -> None:
    """A kill right after the change: the blocks that are kept are of the first checkpoint."""
    options = replace(options, prune=PruneOptions(preset="fast"))
    pipeline.prune(model, tmp_path / "expected", options, fresh=False, progress=silent)

    kept = tmp_path / "kept"
    shutil.copytree(model, kept)
    disturbed = at("prune", lambda: weights_of(other, model))
    with pytest.raises(ModelDirError, match="was changed while it was read"):
        pipeline.prune(model, tmp_path / "out", options, fresh=False, progress=disturbed)
    blocks = sorted((tmp_path / "out" / ".partial").rglob("block-*"))
    assert [path.name for path in blocks] == ["block-0000.safetensors"]
    pipeline.prune(kept, tmp_path / "out", options, fresh=False, progress=silent)
    expected = snapshot(tmp_path / "expected" / "pruned")
    assert snapshot(tmp_path / "out" / "pruned") == expected


def test_latency_of_files_that_were_exchanged_is_not_measured(bundle: Path) -> None:
    """With ONNX Runtime the engine is the ONNX file, which bench must hash for itself."""
    before = read_manifest(bundle).stages["bench"]
    dense, sparse = (bundle / "onnx" / twin / "model.onnx" for twin in ("dense", "sparse"))
    kept = dense.read_bytes()
    dense.write_bytes(sparse.read_bytes())
    run = run_cli("bench", bundle, "--shapes", "batch=1", "sequence=8")
    assert run.code == 2
    assert "onnx/dense/model.onnx is not what the stage 'export' left there" in run.err
    dense.write_bytes(kept)
    assert read_manifest(bundle).stages["bench"] == before
    assert verify(bundle) == []


@pytest.mark.parametrize("command", ["compile", "bench"])
def test_files_that_are_exchanged_during_a_stage_and_put_back_are_noticed(
    command: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, sparse = (bundle / "onnx" / twin / "model.onnx" for twin in ("dense", "sparse"))
    kept = dense.read_bytes()

    def progress(*_: object) -> None:
        dense.write_bytes(sparse.read_bytes())
        dense.write_bytes(kept)

    options = EngineOptions(batches=(2,), sequences=(4,))
    if command == "compile":
        with open_bundle(bundle) as opened:
            opened.forget("compile")
    stages: dict[str, Callable[..., object]] = {
        "compile": pipeline.compile_engines,
        "bench": pipeline.bench,
    }
    with pytest.raises(BundleError, match="is not what the stage 'export' left there"):
        stages[command](bundle, options, progress=progress)
    assert command not in read_manifest(bundle).stages


@pytest.mark.parametrize("command", ["export", "compile", "bench"])
def test_a_build_that_could_not_begin_leaves_the_bundle_to_its_model(
    command: str, bundle: Path, other: Path, options: BuildOptions, tiny_bert: Path
) -> None:
    """Else single stages would go on with the dense twin of one model and the 2:4 of another."""
    before = snapshot(bundle)
    with pytest.raises(BackendMissingError):
        pipeline.build(other, bundle, replace(options, device="cuda"), fresh=False, progress=silent)
    assert snapshot(bundle) == before
    manifest = read_manifest(bundle)
    assert manifest.model is not None
    assert Path(manifest.model.path) == tiny_bert.resolve()
    assert run_cli(command, bundle).code == 0
    dense = load_file(tiny_bert / "model.safetensors")
    pruned = load_file(bundle / "pruned" / "model.safetensors")
    name = "embeddings.word_embeddings.weight"
    assert (dense[name] == pruned[name]).all()


def test_a_single_stage_refuses_a_source_that_is_not_the_one_that_was_pruned(
    model: Path, other: Path, options: BuildOptions, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pipeline.prune(model, out, options, fresh=False, progress=silent)
    weights_of(other, model)
    run = run_cli("export", out)
    assert run.code == 2
    assert "has changed since" in run.err
    assert "run prune again" in run.err


def test_pruning_anew_leaves_nothing_of_the_old_stages(
    bundle: Path, other: Path, options: BuildOptions
) -> None:
    """`prune` alone, so that the engines in the bundle would be of the model before."""
    pipeline.prune(other, bundle, options, fresh=False, progress=silent)
    assert set(read_manifest(bundle).stages) == {"prune"}
    assert {path.name for path in bundle.iterdir()} & {"onnx", "engines"} == set()
    for command in ("compile", "bench"):
        run = run_cli(command, bundle)
        assert run.code == 2
        assert "run it first" in run.err


def test_a_pruned_model_that_was_exchanged_is_not_exported(bundle: Path) -> None:
    path = bundle / "pruned" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    with pytest.raises(BundleError, match="holds no finished stage 'prune'"):
        pipeline.export(bundle, "float16", progress=silent)


def test_a_changed_limit_prunes_and_times_nothing_again(
    bundle: Path, tiny_bert: Path, options: BuildOptions, tmp_path: Path
) -> None:
    """The rows of latency are judged by the limit of this build."""
    before = read_manifest(bundle).stages
    recipe = tmp_path / "recipe.toml"
    text = shipped_recipes()["bert"].split("[limits]")[0]
    recipe.write_text(f"{text}[limits]\nmax_slowdown = 3.0\n", encoding="utf-8")
    options = replace(options, recipe=recipe)
    report = pipeline.build(tiny_bert, bundle, options, fresh=False, progress=silent)
    assert read_manifest(bundle).stages == before
    assert {(row.limit, row.verdict) for row in report.latency} == {(3.0, "not gated")}
    assert recipe.read_bytes() == (bundle / "pruned" / "recipe.toml").read_bytes()
    assert verify(bundle) == []


def test_a_build_that_says_0_verifies_and_one_that_cannot_says_why(
    bundle: Path, tiny_bert: Path, options: BuildOptions
) -> None:
    (bundle / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(Prox24Error, match=r"holds 'notes.txt', which no stage of it made"):
        pipeline.build(tiny_bert, bundle, options, fresh=False, progress=silent)
    (bundle / "notes.txt").unlink()

    def meanwhile() -> None:
        (bundle / "notes.txt").write_text("mine", encoding="utf-8")

    changed = replace(options, engine_tokens=512)
    with pytest.raises(Prox24Error, match=r"does not verify: notes.txt is not listed"):
        pipeline.build(tiny_bert, bundle, changed, fresh=False, progress=at("accuracy", meanwhile))
    assert (bundle / "notes.txt").read_text(encoding="utf-8") == "mine"
    (bundle / "notes.txt").unlink()
    pipeline.build(tiny_bert, bundle, changed, fresh=False, progress=silent)
    assert verify(bundle) == []


def test_engines_of_another_stage_are_not_timed(bundle: Path) -> None:
    with open_bundle(bundle) as opened:
        assert opened.load(stages.prune.STAGE).layers
        opened.forget("export")
    with open_bundle(bundle) as opened, pytest.raises(BundleError, match="no finished stage 'com"):
        opened.load(stages.compile.STAGE)
