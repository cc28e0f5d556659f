"""Tutorials run from top to bottom, and name only what is there; `make bench` really runs them."""

import ast
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import ROOT, TUTORIALS, tokens

tutorials = pytest.mark.parametrize("page", TUTORIALS, ids=[page.stem for page in TUTORIALS])


def steps(page: Path) -> list[tuple[str, str]]:
    """Language and text of what a reader runs, in order; blocks of text are shown only."""
    found = [(t.info, t.content) for t in tokens(page) if t.type == "fence"]
    return [(language, text) for language, text in found if language in {"sh", "python"}]


@tutorials
def test_a_tutorial_builds_checks_and_uses_a_model(page: Path) -> None:
    """What its lines for the shell say is held against the program by `test_docs.py`."""
    shell = "\n".join(text for language, text in steps(page) if language == "sh")
    assert "prox24-deploy check " in shell
    assert "prox24-deploy build " in shell or "examples/" in shell
    assert any("assert " in text for language, text in steps(page) if language == "python")


@tutorials
def test_its_snippets_are_shell_and_python(page: Path) -> None:
    for language, text in steps(page):
        if language == "python":
            ast.parse(text)
            continue
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.large
@pytest.mark.timeout(3600)
@tutorials
def test_a_tutorial_runs(page: Path, tmp_path: Path) -> None:
    """In an empty folder with the examples beside it; the speech one skips without its voice."""
    needed = "espeak-ng" if page.stem == "speech" else "bash"
    if subprocess.run(["which", needed], capture_output=True, check=False).returncode:
        pytest.skip(f"needs {needed}, not found here")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    script = tmp_path / "prox24-deploy"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m prox24_deploy "$@"\n')
    script.chmod(0o755)
    # The folder of this interpreter comes second: its own prox24-deploy may be of another tree.
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **os.environ, "PATH": path, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    for language, text in steps(page):
        command = ["bash", "-euo", "pipefail"] if language == "sh" else [sys.executable, "-"]
        ran = subprocess.run(
            command, input=text, text=True, cwd=tmp_path, env=environment, capture_output=True,
            check=False,
        )  # fmt: skip
        assert ran.returncode == 0, f"{text}\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"
