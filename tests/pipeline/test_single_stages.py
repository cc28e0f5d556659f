"""A run in single stages ends where `build` ends."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import ANY_EMBEDDING, run_cli

from prox24_deploy.bundle.bundle import Bundle, open_bundle
from prox24_deploy.config.options import BuildOptions
from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.records import ModelInfo
from prox24_deploy.core.types import silent
from prox24_deploy.pipeline import context, finish, stages

SAMPLES = ("--calibration-tokens", "2048", "--evaluation-tokens", "1024")
SHAPES = ("--shapes", "batch=2", "sequence=8")


@pytest.fixture(scope="module")
def bundles(
    tiny_bert: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """What `build` makes of a copy of a bundle, and what the single stages made of it before."""
    whole, single = (tmp_path_factory.mktemp("stages") / name for name in ("whole", "single"))
    given = (tiny_bert, "--calibration", prose, *SAMPLES, "--method", "magnitude")
    engines = ("--backend", "onnxruntime", *SHAPES)
    for line in (
        ("prune", *given, "-o", single),
        ("export", single),
        ("compile", single, *engines),
        ("bench", single, *SHAPES, "--rounds", "20"),
        ("evaluate", single, "--engine-tokens", "1024"),
    ):
        ran = run_cli(*line)
        assert ran.code == 0, ran.err
    ended = run_cli("report", single, *ANY_EMBEDDING)
    shutil.copytree(single, whole)
    asked = (*engines, "--engine-tokens", "1024", *ANY_EMBEDDING)
    built = run_cli("build", *given, *asked, "-o", whole)
    # All that was told to the single stages, and in a way that gives the same keys.
    for stage in ("prune", "export", "compile", "evaluate", "accuracy"):
        assert f"stage {stage}: unchanged, not run again" in built.err
    assert (ended.code, ended.out.splitlines()[0]) == (built.code, built.out.splitlines()[0])
    return whole, single


def test_single_stages_quantise_on_what_the_bundle_was_pruned_on(
    bundles: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(bundles[0], out)
    seen: list[Any] = []

    def stop(*asked: Any) -> None:
        seen.append(asked)
        raise UsageError("far enough")

    monkeypatch.setattr(stages.quantize, "run", stop)
    for command in ("export", "compile"):
        ran = run_cli(command, out, "--quantize", "int8")
        assert (ran.code, ran.err.splitlines()[-1]) == (2, "Error: far enough")
    for _, opened, pruned, options, _ in seen:
        assert options.quantize == "int8"
        assert opened.calibration.source.sha256 == pruned.calibration.sha256
    assert len(seen) == 2


def test_a_decoder_is_quantised_on_the_text_that_it_wrote_to_be_pruned_on(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, written = SimpleNamespace(), SimpleNamespace()
    seen: list[Any] = []
    monkeypatch.setattr(finish, "stored_options", lambda _: BuildOptions())
    monkeypatch.setattr(finish, "read_context", lambda *_: given)
    monkeypatch.setattr(stages.quantize, "require_usable", lambda *_: None)
    monkeypatch.setattr(
        stages.write, "run", lambda _, context, *__: {id(given): written}[id(context)]
    )
    monkeypatch.setattr(stages.quantize, "run", lambda *found: seen.append(found[1]))
    with open_bundle(tmp_path / "out") as bundle:
        source: Any = SimpleNamespace(path=tiny_bert)
        pruned: Any = None
        finish.quantize(bundle, pruned, source, "int8", silent)
    assert seen == [written]


@pytest.mark.large
def test_a_bundle_is_quantised_in_single_stages(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    whole, _ = bundles
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    ran = run_cli("compile", out, "--backend", "onnxruntime", *SHAPES, "--quantize", "int8")
    assert ran.code == 0, ran.err
    manifest = json.loads((out / "manifest.json").read_text())
    assert (out / "quantized" / "quantization.safetensors").is_file()
    assert manifest["options"]["quantize"] == "int8"
    for stage in ("export", "compile"):
        assert "quantized" in manifest["stages"][stage]["reads"], stage
    # Left as it is, and taken back.
    assert run_cli("export", out, "--dtype", "float32").code == 0
    assert (out / "quantized").exists()
    assert run_cli("export", out, "--dtype", "float32", "--quantize", "none").code == 0
    assert not (out / "quantized").exists()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["options"]["quantize"] is None
    assert "compile" not in manifest["stages"]


def test_both_end_in_the_same_report(bundles: tuple[Path, Path]) -> None:
    whole, single = (json.loads((path / "report.json").read_text()) for path in bundles)
    for key in ("verdict", "sentence", "parts", "accepted_losses", "model"):
        assert whole[key] == single[key]
    for metrics in ("metrics", "dense", "sparse", "agreement"):
        assert whole["accuracy"][metrics] == single["accuracy"][metrics]
    one, other = (found["accuracy"]["engines"][0] for found in (whole, single))
    assert one["metrics"] == other["metrics"]
    assert single["options"]["dtype"] == whole["options"]["dtype"]
    for name in ("batches", "sequences"):
        assert single["options"]["engine"][name] == whole["options"]["engine"][name]


def test_a_bundle_of_single_stages_is_sealed_and_can_be_compared(
    bundles: tuple[Path, Path],
) -> None:
    whole, single = bundles
    sealed = run_cli("verify", single)
    assert sealed.code == 0
    digest = json.loads((single / "report.json").read_text())["contents_sha256"]
    assert f"contents sha256 {digest}." in sealed.out
    assert "cannot be compared" not in run_cli("compare", single, whole).err


def test_a_stage_that_is_run_again_says_that_the_report_is_old(
    bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    out = shutil.copytree(bundles[1], tmp_path / "out")
    timed = run_cli("bench", out, *SHAPES, "--rounds", "20")
    assert timed.code == 0
    assert "its report is of what it was before: run report on it" in " ".join(timed.err.split())
    assert run_cli("verify", out).code != 0
    again = run_cli("report", out, *ANY_EMBEDDING)
    assert "of what it was before" not in again.err
    assert run_cli("verify", out).code == 0


def test_a_model_that_was_moved_is_found_where_the_user_says(
    bundles: tuple[Path, Path],
    tiny_bert: Path,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = shutil.copytree(bundles[1], tmp_path / "out")
    known = context.model_of

    def elsewhere(bundle: Bundle) -> ModelInfo:
        return replace(known(bundle), path=str(tmp_path / "gone"))

    monkeypatch.setattr(context, "model_of", elsewhere)
    for command in ("evaluate", "report"):
        lost = run_cli(command, out)
        assert (lost.code, "--model DIR" in lost.err) == (2, True)
        other = run_cli(command, out, "--model", tiny_llama)
        assert (other.code, "is not the model that" in other.err) == (2, True)
        assert "Error" not in run_cli(command, out, "--model", tiny_bert).err
    assert run_cli("verify", out).code == 0


def test_a_report_names_the_stage_that_is_lacking(
    tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = ("--calibration", prose, *SAMPLES, "--method", "magnitude", "-o", out)
    assert run_cli("prune", tiny_bert, *given).code == 0
    for command, stage in (("report", "export"), ("evaluate", "compile")):
        run = run_cli(command, out)
        assert run.code == 2
        assert run.err.endswith(f"holds no finished stage '{stage}'; run it first.\n")
