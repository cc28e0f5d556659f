"""Pipelines in docs/ and the Dockerfile: sound to their linters, right about our exit codes."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from groovy_parser.parser import parse_and_digest_groovy_content
from lark.exceptions import LarkError
from schema_lint import lint
from untraced import untraced

from prox24_deploy import __version__
from prox24_deploy.cli.main import app

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "pipelines"
GITHUB, GITLAB, JENKINS = "github-actions.yml", "gitlab-ci.yml", "Jenkinsfile"
SCHEMAS = {
    GITHUB: ["--builtin-schema", "vendor.github-workflows"],
    GITLAB: ["--builtin-schema", "vendor.gitlab-ci", "--data-transform", "gitlab-ci"],
}
COMMANDS = ["build", "verify", "check", "compare", "package"]


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_pipeline_fits_the_schema_of_its_host(name: str, tmp_path: Path) -> None:
    ran = lint(FOLDER / name, *SCHEMAS[name])
    assert ran.exit_code == 0, ran.output
    wrong = tmp_path / name
    text = (FOLDER / name).read_text(encoding="utf-8")
    wrong.write_text(re.sub(r"^( +)timeout(-minutes)?:.*$", r"\1timeout: [1]", text, flags=re.M))
    assert lint(wrong, *SCHEMAS[name]).exit_code == 1


def leaves(node: dict[str, Any]) -> Iterator[str]:
    if "value" in node:
        yield node["value"]
    for child in node.get("children", ()):
        yield from leaves(child)


def blocks(tokens: list[str]) -> list[tuple[str, ...]]:
    """The path of names of every closure; a stage is named as it calls itself."""
    open_blocks: list[str] = []
    found = []
    for i, token in enumerate(tokens):
        if token == "{":
            named = tokens[i - 2] if tokens[i - 1] == ")" else tokens[i - 1]
            open_blocks.append(named.strip("'\""))
            found.append(tuple(open_blocks))
        elif token == "}":
            open_blocks.pop()
    assert not open_blocks
    return found


def test_the_jenkinsfile_is_groovy_with_the_sections_of_a_declarative_pipeline() -> None:
    """A parser of Groovy's own grammar; what Jenkins asks beyond it is checked by structure."""
    text = (FOLDER / JENKINS).read_text(encoding="utf-8")
    with untraced():
        tree = parse_and_digest_groovy_content(text)
    found = blocks(list(leaves(dict(tree))))
    sections = [path[1] for path in found if len(path) == 2]
    assert sections == ["options", "environment", "stages", "post"]
    assert found[0] == ("pipeline",)
    stages = [path[2] for path in found if len(path) == 3 and path[1] == "stages"]
    assert stages == ["Install", "Build", "Verify", "Compare", "Hand over"]
    for stage in stages:
        assert ("pipeline", "stages", stage, "steps") in found
    assert ("pipeline", "post", "always") in found
    with untraced(), pytest.raises(LarkError):
        parse_and_digest_groovy_content("pipeline { steps {{ }")


def scripts(name: str) -> list[str]:
    """Every shell script of a pipeline."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    if name == JENKINS:
        found = re.findall(r"(?:sh|script:) ('''.*?'''|'[^'\n]*')", text, flags=re.DOTALL)
        return [script.strip("'").replace("\\\\", "\\") for script in found]
    data = yaml.safe_load(text)
    if name == GITLAB:
        return [*data["release"]["before_script"], *data["release"]["script"]]
    return [step["run"] for step in data["jobs"]["release"]["steps"] if "run" in step]


@pytest.mark.parametrize("name", [GITHUB, GITLAB, JENKINS])
def test_every_script_is_shell(name: str) -> None:
    assert len(scripts(name)) >= 6
    for script in scripts(name):
        ran = subprocess.run(
            ["bash", "-n"], input=script, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, script + ran.stderr


@pytest.mark.parametrize("name", [GITHUB, GITLAB, JENKINS])
def test_every_command_is_one_of_ours_with_options_it_has(name: str) -> None:
    joined = "\n".join(scripts(name)).replace("\\\n", " ")
    lines = [line.partition("||")[0] for line in joined.splitlines() if "prox24-deploy " in line]
    called = [shlex.split(line.partition("prox24-deploy ")[2]) for line in lines]
    assert [line[0] for line in called] == COMMANDS
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for command, *arguments in called:
        if command == "compare" and command not in known:
            continue  # comes with the gate on baselines; checked from then on
        known[command].make_context(command, arguments)


def stand_in(folder: Path, codes: dict[str, int]) -> dict[str, str]:
    """An environment in which prox24-deploy notes what it was asked and exits as told."""
    script = folder / "bin" / "prox24-deploy"
    script.parent.mkdir()
    cases = "".join(f"{command}) exit {code};; " for command, code in codes.items())
    script.write_text(f'#!/bin/sh\necho "$1" >> "{folder}/called"\ncase "$1" in {cases}esac\n')
    script.chmod(0o755)
    path = f"{script.parent}{os.pathsep}{os.environ['PATH']}"
    names = {"MODEL": "m", "CALIBRATION": "c", "EVALUATION": "e", "BASELINE": "baseline.json"}
    return os.environ | names | {"PATH": path}


def run_script(script: str, folder: Path, codes: dict[str, int]) -> tuple[int, list[str], str]:
    ran = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script], cwd=folder,
        env=stand_in(folder, codes), capture_output=True, text=True, check=False,
    )  # fmt: skip
    called = folder / "called"
    return ran.returncode, called.read_text().split() if called.exists() else [], ran.stdout


@pytest.mark.parametrize(("code", "end"), [(0, 0), (3, 3), (5, 0), (2, 2)])
def test_github_fails_on_a_regression_and_warns_of_noise(
    code: int, end: int, tmp_path: Path
) -> None:
    script = next(script for script in scripts(GITHUB) if "compare" in script)
    (tmp_path / "baseline.json").touch()
    ended, called, said = run_script(script, tmp_path, {"compare": code})
    assert (ended, called) == (end, ["compare"])
    assert ("::warning::" in said) == (code == 5)


@pytest.mark.parametrize(
    ("codes", "end", "called"),
    [
        ({}, 0, COMMANDS),
        ({"build": 3}, 3, COMMANDS[:1]),
        ({"build": 5}, 1, COMMANDS[:1]),
        ({"verify": 2}, 2, COMMANDS[:2]),
        ({"check": 4}, 4, COMMANDS[:3]),
        ({"compare": 3}, 3, COMMANDS[:4]),
        ({"compare": 5}, 5, COMMANDS),
        ({"package": 2}, 2, COMMANDS),
    ],
)
def test_gitlab_ends_with_5_only_where_the_comparison_was_inconclusive(
    codes: dict[str, int], end: int, called: list[str], tmp_path: Path
) -> None:
    """GitLab joins the lines of `script` into one shell; 5 is then a warning."""
    (tmp_path / "baseline.json").touch()
    whole = "\n".join(script for script in scripts(GITLAB) if "pip" not in script)
    assert run_script(whole, tmp_path, codes)[:2] == (end, called)
    data = yaml.safe_load((FOLDER / GITLAB).read_text(encoding="utf-8"))
    assert data["release"]["allow_failure"] == {"exit_codes": [5]}


@pytest.mark.parametrize("name", [GITHUB, GITLAB])
def test_a_missing_baseline_is_said(name: str, tmp_path: Path) -> None:
    script = next(script for script in scripts(name) if "compare" in script)
    ended, called, said = run_script(script, tmp_path, {"compare": 3})
    assert ended == 0
    assert "compare" not in called
    assert "There is no baseline.json, so nothing was compared" in said


@pytest.mark.parametrize("name", [GITHUB, GITLAB, JENKINS])
def test_reports_are_published_also_where_a_gate_failed(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    for published in ("junit.xml", "release.sha256", "comparison"):
        assert published in text
    if name == GITHUB:
        steps = {s.get("name"): s for s in yaml.safe_load(text)["jobs"]["release"]["steps"]}
        for step in ("Keep the bundle", "Show the summary", "Publish reports"):
            assert steps[step]["if"] == "${{ !cancelled() }}"
    elif name == GITLAB:
        job = yaml.safe_load(text)["release"]
        assert job["artifacts"]["when"] == job["cache"]["when"] == "always"
    else:
        always = text[text.index("always {") :]
        assert "junit testResults: 'release/junit.xml" in always


def test_the_dockerfile_passes_its_linter(tmp_path: Path) -> None:
    def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("hadolint")), "--format", "json", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    dockerfile = ROOT / "docker" / "Dockerfile"
    ran = hadolint(dockerfile)
    assert ran.returncode == 0, ran.stdout
    wrong = tmp_path / "Dockerfile"
    wrong.write_text(dockerfile.read_text(encoding="utf-8").replace("AS cpu", "AS tensorrt"))
    found = hadolint(wrong)
    assert found.returncode == 1
    assert {finding["code"] for finding in json.loads(found.stdout)} >= {"DL3024"}


def targets() -> dict[str, str]:
    """Name and text of every stage of the Dockerfile, in order."""
    text = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    parts = re.split(r"^FROM \S+ AS (\w+)$", text, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_every_image_is_labelled_checked_and_not_run_by_root() -> None:
    assert [*targets()][-1] == "cpu", "the last target is the default one"
    assert set(targets()) == {"cpu", "cuda", "tensorrt"}
    for text in targets().values():
        assert f'image.version="{__version__}"' in text
        assert 'image.licenses="Apache-2.0"' in text
        assert re.search(r"^HEALTHCHECK .*\n +CMD \[", text, flags=re.M)
        user = re.findall(r"^USER (\d+):(\d+)$", text, flags=re.M)
        assert user, "no user"
        assert "0" not in user[-1]
        assert text.index("USER ") < text.index("ENTRYPOINT ")


def test_base_images_are_pinned_and_the_page_says_which_only_by_tag() -> None:
    text = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    images = dict(re.findall(r"^ARG (\w+_IMAGE)=(\S+)$", text, flags=re.M))
    assert set(re.findall(r"^FROM \$\{(\w+)\}", text, flags=re.M)) == set(images)
    page = (ROOT / "docker" / "README.md").read_text(encoding="utf-8")
    for image in images.values():
        pinned = re.search(r":[\w.-]+@sha256:[0-9a-f]{64}$", image)
        assert pinned or image in page, image
        assert not image.endswith(":latest")


def test_the_dockerfile_copies_what_the_context_has() -> None:
    """And what a wheel is built from; test_packaging.py builds one from the same."""
    text = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    copied = {
        name for line in re.findall(r"^COPY (.*)$", text, flags=re.M) for name in line.split()[:-1]
    }
    admitted = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    names = {name.removeprefix("./") for name in copied}
    assert names == {line.removeprefix("!") for line in admitted if line.startswith("!")}
    assert names == {
        "constraints.txt",
        "pyproject.toml",
        "PACKAGE.md",
        "LICENSE",
        "export",
        "prox24_deploy",
    }
    assert all((ROOT / name).exists() for name in names)
