"""Whatever a name holds, the terminal shows it and does nothing else."""

import ast
import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import make_records
from command_line import Run, run_cli
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.torch import save_file

import prox24_deploy.cli
from prox24_deploy.cli import tables, terminal
from prox24_deploy.core.errors import UsageError
from prox24_deploy.pipeline import run as pipeline

HOSTILE = {
    "colour": "\x1b[31mred",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;https://evil.example\x1b\\here\x1b]8;;\x1b\\",
    "clear": "\x9b2J",
    "back": "layer\b\b\b\b\bweight",
    "bidi": "\u202egnp.exe\u2066",
    "line": "a\nVerdict: pass",
    "return": "a\rError: none",
    "markup": "[bold red]a[/bold red]",
    "closing": "a[/b]",
    "link of markup": "[link=https://evil.example]a[/link]",
    "emoji": ":skull:",
    "invisible": "a\u200b\u2060b\ufeff",
}


def assert_plain(run: Run) -> None:
    """Nothing but text, and no sentence that a name began."""
    for text in (run.out, run.err):
        assert all(line.isprintable() for line in text.split("\n")), ascii(text)
        assert not any(line.startswith("Verdict:") for line in text.split("\n"))
    assert "Traceback" not in run.err


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_check_shows_names_of_tensors_as_they_are(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({f"{name}.weight": torch.ones(4, 8), "zero.weight": torch.zeros(4, 8)}, path)
    run = run_cli("check", path)
    assert run.code == 4
    assert_plain(run)
    if "[" in name and "\x1b" not in name:
        assert name in run.out
    as_json = run_cli("check", path, "--json")
    assert_plain(as_json)
    shown = [tensor["tensor"] for tensor in json.loads(as_json.out)["tensors"]]
    assert f"{name}.weight" in shown


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_folders_are_shown_as_they_are(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir(parents=True)
    for command in ("verify", "build", "check", "export"):
        run = run_cli(command, folder)
        assert run.code == 2
        assert_plain(run)
        assert len(run.err.strip().split("\n")) == 1
        assert run.err.startswith("Error: ")


def test_a_bundle_in_a_folder_of_markup_verifies(tmp_path: Path) -> None:
    from prox24_deploy.bundle.bundle import open_bundle

    for name in ("o[/b]", "o[bold]"):
        with open_bundle(tmp_path / name) as bundle:
            bundle.seal(())
        run = run_cli("verify", tmp_path / name)
        assert run.code == 0, run
        assert str(tmp_path / name) in run.out


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_strings_of_a_configuration_are_shown_as_they_are(
    name: str, tmp_path: Path, tiny_bert: Path
) -> None:
    model = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    config = json.loads((model / "config.json").read_bytes())
    (model / "config.json").write_text(json.dumps(config | {"model_type": name}))
    run = run_cli("build", model, "-o", tmp_path / "out")
    assert run.code == 2
    assert_plain(run)
    assert len(run.err.strip().split("\n")) == 1


def test_a_megabyte_of_a_name_is_not_shown(tmp_path: Path, tiny_bert: Path) -> None:
    model = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    config = json.loads((model / "config.json").read_bytes())
    for long in ("x" * 10**6, "x " * 10**6):
        (model / "config.json").write_text(json.dumps(config | {"model_type": long}))
        run = run_cli("build", model, "-o", tmp_path / "out")
        assert run.code == 2
        assert len(run.err) < 6000
        assert "--recipe" in run.err


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_what_is_logged_is_one_plain_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def warns(*_: object, **__: object) -> None:
        logging.getLogger("prox24_deploy.model").warning("layer %s is odd", name)
        raise UsageError("Nothing more.")

    monkeypatch.setattr(pipeline, "export", warns)
    run = run_cli("export", "somewhere")
    assert_plain(run)
    assert "is odd" in run.err


def test_a_panic_of_a_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """What a library in Rust raises."""

    def panics(*_: object, **__: object) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr(pipeline, "export", panics)
    run = run_cli("export", "somewhere")
    assert run.code == 1
    assert run.err.startswith("Error: Internal error, PanicException: index out of bounds; run ag")


def test_everything_is_printed_in_one_module() -> None:
    folder = Path(prox24_deploy.cli.__file__).parent
    for path in folder.glob("*.py"):
        if path.stem == "terminal":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                assert node.attr not in {"print", "echo", "secho", "write", "add_row"} or (
                    node.attr == "add_row" and path.stem == "tables"
                ), path


def test_names_that_are_not_utf8_are_refused_before_any_work(
    tmp_path: Path, tiny_bert: Path
) -> None:
    odd = os.fsdecode(b"m\xff")
    for arguments in (("build", odd), ("verify", odd), ("build", tiny_bert, "-o", odd)):
        run = run_cli(*arguments)
        assert run.code == 2
        assert_plain(run)
        assert (
            run.err == r"Error: Argument 'm\udcff' is not UTF-8; rename the file or folder." + "\n"
        )
    model = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    (model / os.fsdecode(b"\xff.json")).write_text("{}")
    run = run_cli("build", model, "-o", tmp_path / "out")
    assert run.code == 2
    assert_plain(run)
    assert r"\udcff.json is not UTF-8; rename it." in run.err


def table_of(*rows: tuple[str, ...]) -> Table:
    table = Table("figure", "now", "finding", box=None)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


@pytest.mark.parametrize(("width", "stacked"), [(200, False), (60, True), (30, True)])
def test_no_name_is_cut_on_a_narrow_terminal(
    width: int, *, stacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "engine/onnxruntime/nearest-neighbour-agreement-of-a-model"
    page = Console(width=width, force_terminal=True, color_system=None, record=True)
    monkeypatch.setattr(terminal, "stdout", page)
    terminal.print_table(table_of((name, "0.97", "worse than it was"), ("size", "", "as before")))
    lines = [line.strip() for line in page.export_text().splitlines()]
    assert sum(name in line for line in lines) == 1
    if stacked:
        assert lines == [name, "now: 0.97", "finding: worse than it was", "size",
                         "finding: as before"]  # fmt: skip
    else:
        assert len(lines) == 3


def test_a_pipe_gets_a_line_for_each_row(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_table(table_of(("a" * 90, "1", "b " * 100), ("c", "2", "")))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.isascii() for line in lines)


def test_a_table_folds_between_words_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    row = ("onnxruntime-providers", "CPUExecutionProvider and another", "install what is missing")
    words = {word for cell in row for word in cell.split()}
    for width in range(30, 100):
        page = Console(width=width, force_terminal=True, color_system=None, record=True)
        monkeypatch.setattr(terminal, "stdout", page)
        terminal.print_table(table_of(row))
        assert words <= set(page.export_text().split())


def test_a_line_in_a_pipe_ends_where_its_text_does(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_table(table_of(("a", "b", "c" * 90), ("d", "e", "")))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [line.rstrip() for line in lines]
    terminal.print_table(table_of(("a", "b " * 60, "c")), piped=100)
    assert capsys.readouterr().out.splitlines()[::2] == ["a", "  finding: c"]


@pytest.mark.parametrize(
    ("line", "code"),
    [(("build", "--help"), 0), (("check", "PATH"), 4), (("check", "PATH", "--json"), 4)],
)
def test_a_pipe_that_is_closed_leaves_the_exit_code(
    line: tuple[str, ...], code: int, tmp_path: Path
) -> None:
    path = tmp_path / "m.safetensors"
    save_file({f"{i}.weight": torch.ones(4, 8) for i in range(200)}, path)
    source, sink = os.pipe()
    os.close(source)
    ran = subprocess.run(
        [sys.executable, "-m", "prox24_deploy", *(str(path) if w == "PATH" else w for w in line)],
        stdout=sink, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(sink)
    assert ran.returncode == code
    assert "Broken" not in ran.stderr
    assert "Internal error" not in ran.stderr


def test_a_column_that_says_nothing_is_not_shown() -> None:
    def headers(*pasts: int) -> list[str]:
        rows = [
            replace(row, past=past)
            for row, past in zip(make_records().bench.latency, pasts, strict=False)
        ]
        return [str(column.header) for column in tables.latency(rows).columns]

    assert "past" not in headers(0, 0)
    assert "past" in headers(0, 8)
    assert "dense ms" in headers(0, 0)
