"""The action for GitHub: sound to its schema, with options that exist, and a gate by exit code."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from schema_lint import lint
from test_docs import DOCS, blocks

from prox24_deploy.cli.main import app

ROOT = Path(__file__).parents[1]
ACTION = ROOT / "action.yml"


def action() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(ACTION.read_text(encoding="utf-8"))
    return found


def step(name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(s for s in action()["runs"]["steps"] if s["name"] == name)
    return found


def test_it_fits_the_schema_of_its_host(tmp_path: Path) -> None:
    schema = ("--builtin-schema", "vendor.github-actions")
    ran = lint(ACTION, *schema)
    assert ran.exit_code == 0, ran.output
    wrong = tmp_path / "action.yml"
    wrong.write_text(ACTION.read_text(encoding="utf-8").replace("using: composite", "using: 1"))
    assert lint(wrong, *schema).exit_code == 1


def test_its_inputs_are_used_and_what_it_uses_is_an_input() -> None:
    text = ACTION.read_text(encoding="utf-8")
    assert set(re.findall(r"\binputs\.([\w-]+)", text)) == set(action()["inputs"])
    # Never inside of a script, where what was given would be run.
    for each in action()["runs"]["steps"]:
        assert "${{" not in each.get("run", "")


def test_the_pages_show_it_with_inputs_that_it_has() -> None:
    shown = [yaml.safe_load(text) for page in DOCS for text in blocks(page, "yaml action")]
    assert shown
    for steps in shown:
        (ours,) = [s for s in steps if s["uses"].startswith("./")]
        assert set(ours["with"]) <= set(action()["inputs"])
        assert {n for n, i in action()["inputs"].items() if i.get("required")} <= set(ours["with"])


def build(folder: Path, code: int, **given: str) -> tuple[list[str], str, str]:
    """Run the step against a stand-in that exits as told: its words, outputs, and what it said."""
    program = folder / "prox24" / "bin" / "prox24-deploy"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{folder}/words"\nexit {code}\n')
    program.chmod(0o755)
    (folder / "release").mkdir()
    (folder / "release" / "summary.md").write_text("what came out")
    names = dict.fromkeys(("CALIBRATION", "EVALUATION", "BASELINE", "OPTIONS"), "")
    names |= {"MODEL": "my model", "OUT": "release", "RUNNER_TEMP": str(folder), **given}
    names |= {n: str(folder / n) for n in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    ran = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", step("Build")["run"]],
        cwd=folder, env=os.environ | names, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (folder / "GITHUB_STEP_SUMMARY").read_text() == "what came out"
    words = (folder / "words").read_text().splitlines()
    return words, (folder / "GITHUB_OUTPUT").read_text(), ran.stdout


def test_build_takes_what_the_action_was_given(tmp_path: Path) -> None:
    baseline = tmp_path / "baseline.json"
    baseline.touch()
    words, outputs, said = build(
        tmp_path, 3, CALIBRATION="train.txt", EVALUATION="eval.jsonl", BASELINE=str(baseline),
        OPTIONS="--dtype float16 --layers 4",
    )  # fmt: skip
    expected = "--calibration train.txt --evaluation eval.jsonl"
    assert words[:4] == ["build", "my model", "-o", "release"]
    assert shlex.join(words[4:8]) == expected
    assert words[8:] == ["--baseline", str(baseline), "--dtype", "float16", "--layers", "4"]
    assert (outputs, said) == ("exit-code=3\n", "")
    known: Any = typer.main.get_command(app)
    known.commands["build"].make_context("build", words[1:])


def test_build_alone_is_the_model_alone_and_a_missing_baseline_is_said(tmp_path: Path) -> None:
    words, outputs, said = build(tmp_path, 0, BASELINE="none.json")
    assert words == ["build", "my model", "-o", "release"]
    assert outputs == "exit-code=0\n"
    assert said.startswith("::notice::There is no none.json, so nothing was compared")


@pytest.mark.parametrize(
    ("code", "inconclusive", "end"),
    [(0, "fail", 0), (3, "warn", 3), (5, "fail", 5), (5, "warn", 0), (4, "fail", 4)],
)
def test_the_gate_is_the_exit_code(code: int, inconclusive: str, end: int) -> None:
    names = {"CODE": str(code), "INCONCLUSIVE": inconclusive}
    command = ["bash", "-e", "-o", "pipefail", "-c", step("Gate")["run"]]
    ran = subprocess.run(
        command, env=os.environ | names, capture_output=True, text=True, check=False
    )
    assert ran.returncode == end
    assert ("::warning::" in ran.stdout) == (code == 5 and end == 0)
