"""`build --recover` and `recover`: the stage, what it leaves behind, and what is refused before."""

import html
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import make_records, quantised, recovery
from command_line import ANY_TEXT, run_cli, snapshot

import prox24_deploy as p24
from prox24_deploy.cli.tables import report_head
from prox24_deploy.config.options import parse_budget
from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.records import AccuracyStep
from prox24_deploy.pipeline import run as pipeline
from prox24_deploy.report.assemble import load_report, write_report
from prox24_deploy.report.render import render_html, render_summary
from prox24_deploy.report.steps import step_rows, step_titles

SMALL = ("--calibration-tokens", "2048", "--evaluation-tokens", "1024", "--method", "magnitude")
RECOVER = ("--recover", "6steps", "--recover-tokens", "256")


def build(model: Path, prose: Path, out: Path, *more: str) -> int:
    return run_cli(
        "build", model, "-o", out, "--calibration", prose, "--shapes", "batch=1", "sequence=8",
        *SMALL, *ANY_TEXT, *more,
    ).code  # fmt: skip


@pytest.mark.large
def test_a_recovered_build_is_whole_and_one_without_takes_it_back(
    tiny_llama: Path, prose: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert build(tiny_llama, prose, out) in {0, 5}
    assert (out / "pruned" / "README.md").is_file()
    text = ("--calibration", prose, "--calibration-tokens", "2048")
    alone = run_cli("recover", out, "--teacher", tiny_llama, *text, *RECOVER)
    assert alone.code == 0, alone.err
    # Nothing is left that was made of another model than the one that now ships.
    stages = json.loads((out / "manifest.json").read_bytes())["stages"]
    assert stages.keys() == {"prune", "recover"}
    assert not (out / "onnx").exists()
    weights = snapshot(out / "recovered")
    assert build(tiny_llama, prose, out, *RECOVER) in {0, 5}
    assert weights.items() <= snapshot(out / "recovered").items()
    assert run_cli("verify", out).code == 0
    assert run_cli("check", out / "recovered").code == 0
    # Its figures are of the model that ships.
    assert not (out / "pruned" / "README.md").exists()
    assert (out / "recovered" / "README.md").is_file()
    report = json.loads((out / "report.json").read_bytes())
    assert report["recovery"]["kept"] in range(7)
    assert [step["name"] for step in report["accuracy"]["steps"]] == ["pruned"]
    manifest = json.loads((out / "manifest.json").read_bytes())
    for name in ("export", "bench", "accuracy", "compile"):
        assert "recovered" in manifest["stages"][name]["reads"], name
    before = snapshot(out)
    assert build(tiny_llama, prose, out, *RECOVER) in {0, 5}
    assert snapshot(out) == before
    assert run_cli("package", out, "--vllm", tmp_path / "vllm", "--force").code == 0
    for file in (out / "recovered").glob("*.safetensors"):
        assert (tmp_path / "vllm" / file.name).read_bytes() == file.read_bytes()
    assert not (tmp_path / "vllm" / "recipe.toml").exists()
    assert build(tiny_llama, prose, out) in {0, 5}
    assert not (out / "recovered").exists()
    assert json.loads((out / "report.json").read_bytes())["recovery"] is None
    assert run_cli("verify", out).code == 0


def test_the_command_recovers_a_bundle_or_into_another(
    tiny_llama: Path, prose: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    text = ("--calibration", prose, "--calibration-tokens", "2048")
    pruned = run_cli("prune", tiny_llama, "-o", bundle, *text, "--method", "magnitude")
    assert pruned.code == 0
    longer = ("--recover", "20steps", "--recover-tokens", "512", "--no-recover-write")
    both = (*longer, *text, "--teacher", tiny_llama)
    # The text of a bundle is that which it was pruned on.
    found = run_cli("recover", bundle, *longer, "--teacher", tiny_llama)
    assert found.code == 0, found.err
    sources = [
        json.loads((bundle / "stages" / f"{stage}.json").read_bytes())["calibration"]
        for stage in ("prune", "recover")
    ]
    assert sources[0] == sources[1]
    assert "Recovered: KL(dense, sparse) on withheld samples" in found.out
    rest = run_cli("verify", bundle)
    assert "without them the recovered model is removed; or run export, compile, " in rest.err
    for given in (bundle / "pruned", bundle):
        out = tmp_path / f"out-{given.name}"
        other = run_cli("recover", given, "-o", out, "--json", *both)
        assert other.code == 0, other.err
        assert json.loads(other.out)["kept"] > 0
        assert run_cli("check", out / "recovered").code == 0
    # The first is of the same weights as the bundle itself has now, the second goes on from them.
    weights = [
        sorted(p.read_bytes() for p in (folder / "recovered").glob("*.safetensors"))
        for folder in (bundle, tmp_path / "out-pruned", tmp_path / "out-bundle")
    ]
    assert weights[0] == weights[1]
    require_told_what_to_do(tmp_path / "out-pruned", tmp_path, tiny_llama)
    # A model that is pruned there is not the one that was recovered.
    pruned = run_cli("prune", tiny_llama, "-o", tmp_path / "out-pruned", *text, "--method", "wanda")
    assert pruned.code == 0
    assert not (tmp_path / "out-pruned" / "recovered").exists()
    # What a bundle is evaluated by is what it ships.
    options = p24.BuildOptions(
        text=p24.TextOptions(calibration=(prose,), calibration_tokens=1024, evaluation_tokens=1024),
        device="cpu",
    )
    shipped, before = (
        p24.evaluate(tiny_llama, path, options).metrics for path in (bundle, bundle / "pruned")
    )
    assert shipped == p24.evaluate(tiny_llama, bundle / "recovered", options).metrics
    assert shipped != before


def require_told_what_to_do(out: Path, folder: Path, teacher: Path) -> None:
    """A bundle without a stage that pruned is proven, and told from an unfinished one."""
    checked = run_cli("check", out)
    assert checked.code == 0, checked.err
    assert "weights of recovered are 2:4, all that must be" in checked.out
    words: list[tuple[str | Path, ...]] = [
        (name, out) for name in ("verify", "export", "compile", "bench", "evaluate", "report")
    ]
    words += [("package", out, "--vllm", folder / "vllm"), ("recover", out, "--teacher", teacher)]
    for command in words:
        found = run_cli(*command)
        assert found.code == 2, command
        assert "use recovered/ as a model directory, or run recover on the bundle" in found.err


def test_what_makes_no_sense_is_refused_before_any_work(
    tiny_llama: Path, tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    def said(*words: str | Path) -> str:
        found = run_cli(*words)
        assert found.code == 2
        return found.err

    out = ("-o", tmp_path / "out")
    assert "--recover soon is not understood" in said(
        "build", tiny_llama, *out, "--recover", "soon"
    )
    assert "--recover-quantized has no effect without --quantize; add --quantize int8." in said(
        "build", tiny_llama, *out, "--calibration", prose, "--calibration-tokens", "2048",
        "--recover-quantized", "3", *RECOVER,
    )  # fmt: skip
    assert "no effect without --recover;" in said("build", tiny_llama, *out, "--recover-rate", "1")
    assert "prunes nothing that --recover could recover" in said(
        "build", tiny_llama, *out, "--calibration", prose, "--method", "none", "--quantize", "int8",
        "--calibration-tokens", "2048", *RECOVER,
    )  # fmt: skip
    text = ("--calibration", prose, "--calibration-tokens", "2048")
    plain = said("recover", tiny_llama, "--teacher", tiny_llama, *text)
    assert "is not a bundle that the recovered model could go to; pass another folder" in plain
    other = said("recover", tiny_bert, "--teacher", tiny_llama, *text, *out)
    assert "pass the model that it was pruned from as --teacher." in other
    assert not (tmp_path / "out").exists()


def test_a_budget_without_options_is_five_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(pipeline, "recover", lambda *rest, **_: seen.append(rest))
    p24.recover("pruned", "dense")
    assert seen[0][:3] == (Path("pruned"), Path("dense"), None)
    assert seen[0][3].recover == p24.RecoverOptions(minutes=5)


@pytest.mark.parametrize(
    ("word", "found"),
    [("200steps", (200, None)), ("1 step", (1, None)), ("5min", (None, 5.0)), ("0.5", (None, 0.5))],
)
def test_budgets_are_steps_or_minutes(word: str, found: tuple[int | None, float | None]) -> None:
    assert parse_budget(word) == found


@pytest.mark.parametrize("word", ["", "5m", "0", "0steps", "0min", "-1min", "5 hours", "1e3steps"])
def test_other_budgets_are_refused(word: str) -> None:
    with pytest.raises(UsageError, match="expected a number of steps or of minutes such as"):
        parse_budget(word)


def test_the_report_shows_each_step_and_the_curve(tmp_path: Path) -> None:
    records = make_records(2)
    metrics = records.evaluate.metrics
    steps = (AccuracyStep(name="pruned", metrics=metrics),)
    results = replace(records, evaluate=replace(records.evaluate, steps=steps), recover=recovery())
    report = results.report()
    assert step_titles(report) == ("dense", "2:4", "2:4, recovered")
    assert {len(row.cells) for row in step_rows(report)} == {3}
    page = html.unescape(render_html(report))
    assert "step 10: trained 0.41, withheld 0.33" in page
    assert "256,000 tokens that the dense model wrote itself" in page
    assert page.count("2:4, recovered</th>") == 1
    assert "| metric | dense | 2:4 | 2:4, recovered |" in render_summary(report)
    assert any(line.startswith("Step by step: ") for line in report_head(report))
    write_report(report, tmp_path)
    assert load_report(tmp_path / "report.json").recovery == recovery()
    tuned = replace(results, prune=replace(results.prune, reconstructed=True)).report()
    assert step_titles(tuned) == ("dense", "2:4, reconstructed", "2:4, reconstructed, recovered")
    both = (*steps, AccuracyStep(name="recovered", metrics=metrics))
    last = quantised(results)
    last = replace(last, evaluate=replace(last.evaluate, steps=both))
    assert step_titles(last.report()) == ("dense", "2:4", "2:4, recovered", "2:4, recovered + FP8")
    assert html.unescape(render_html(last.report())).count("2:4, recovered</th>") == 1


def test_a_recovery_that_gave_nothing_is_a_warning() -> None:
    records = make_records(2)
    warned = replace(records, recover=recovery(warning="Recovery diverged.", kept=0, curve=()))
    assert "Recovery diverged." in warned.report().warnings
    assert "Recovery" in render_html(warned.report())
    idle = replace(records, recover=recovery(kept=0)).report()
    assert any("found no weights that are better" in warning for warning in idle.warnings)
    assert not any("Recovery" in w for w in replace(records, recover=recovery()).report().warnings)
