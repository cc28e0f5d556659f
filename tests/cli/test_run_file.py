"""A run in a file is the run on the command line."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
from command_line import Run, run_cli
from hypothesis import given
from hypothesis import strategies as st

from prox24_deploy.cli.main import app
from prox24_deploy.cli.run_file import SCHEMA_FILE, run_file_text, schema_text
from prox24_deploy.config.options import BuildOptions
from prox24_deploy.core.errors import UsageError
from prox24_deploy.pipeline import run as pipeline

# A word for each kind of argument: paths, globs, choices, numbers, flags and a pair of flags.
LINE = (
    "--out", "release", "--calibration", "a.txt", "--calibration", "b.txt", "--exclude", "*.v_proj",
    "--preset", "best", "--dtype", "fp16", "--calibration-tokens", "2048", "--max-loss", "0.25",
    "--no-reconstruct", "--eager", "--backend", "cusparselt", "--shapes", "batch=1,16 past=64",
    "--accept-loss", "perplexity=25%", "--fresh", "--seed", "7", "--quantize", "fp8", "--json",
)  # fmt: skip
FILE = """
model = "m"
out = "release"
calibration = ["a.txt", "b.txt"]
exclude = ["*.v_proj"]
preset = "best"
dtype = "fp16"
calibration-tokens = 2048
max-loss = 0.25
reconstruct = false
eager = true
backend = ["cusparselt"]
shapes = ["batch=1,16 past=64"]
accept-loss = ["perplexity=25%"]
fresh = true
seed = 7
quantize = "fp8"
json = true
"""

Built = Callable[..., tuple[Path, Path, BuildOptions, bool]]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Built:
    """Run `build` up to where the work begins, and tell what it would be done with."""
    heard: list[tuple[Path, Path, BuildOptions, bool]] = []

    def stand_in(
        model: Path, out: Path, options: BuildOptions, *, fresh: bool, progress: Any
    ) -> None:
        heard.append((model, out, options, fresh))
        raise UsageError("that is all.")

    monkeypatch.setattr(pipeline, "build", stand_in)

    def run(*line: str | Path) -> tuple[Path, Path, BuildOptions, bool]:
        ended = run_cli("build", *line)
        assert ended.err == "Error: that is all.\n"
        return heard.pop()

    return run


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_says_what_the_command_line_says(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m").mkdir()
    written(tmp_path, FILE)
    assert built("--config", "run.toml") == built("m", *LINE)


def test_the_command_line_goes_before_the_file(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "other").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    path = written(tmp_path, FILE)
    model, out, options, _ = built(
        "other", "--config", path, "--seed", "8", "--exclude", "*.q_proj"
    )
    # Paths of the file are those beside it, paths of the command line those of the command line.
    assert (model, out) == (Path("other"), tmp_path / "release")
    assert options.text.calibration == (tmp_path / "a.txt", tmp_path / "b.txt")
    assert options.text.seed == 8
    assert options.prune.exclude == ("*.q_proj",)
    assert options.prune.preset == "best"


def test_a_key_is_the_long_name_of_an_option() -> None:
    command = typer.main.get_command(app).commands["build"]  # type: ignore[attr-defined]
    words = {word for parameter in command.params for word in parameter.opts}
    keys = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))["properties"].keys()
    assert {f"--{key}" for key in keys - {"model"}} <= words


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (("--name", "a b/c/d"), "Name 'a b/c/d' cannot be used"),
        (("--shapes", "depth=1"), "Shape 'depth=1' is not understood"),
        (("--backend", "onnxrt"), "Backend 'onnxrt' does not exist"),
        (("--allow", "weather"), "--allow weather names nothing"),
        (("--allow", "driver"), "--allow driver has no effect on a build that is held against no"),
        (("--accept-loss", "perplexity=many"), "many"),
        (("--recover-rate", "0.1"), "has no effect without --recover"),
        (("--method", "none"), "--method none leaves the model as it is"),
        (("--method", "none", "--recover", "5min"), "prunes nothing that --recover could"),
    ],
)
def test_a_run_that_would_be_refused_is_not_printed(line: tuple[str, ...], said: str) -> None:
    run = run_cli("build", "m", *line, "--print-config")
    assert (run.code, run.out) == (2, "")
    assert said in run.err


def test_a_printed_run_is_a_run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = run_cli("build", "m", *LINE, "--print-config")
    assert (printed.code, printed.err) == (0, "")
    written(tmp_path, printed.out)
    again = run_cli("build", "--config", "run.toml", "--print-config")
    assert again == printed
    keys = {line.partition(" =")[0].removeprefix("# ") for line in printed.out.splitlines()}
    assert keys >= json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))["properties"].keys()
    assert not (tmp_path / "release").exists()


def test_the_schema_that_ships_is_that_of_the_command() -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text()
    schema = json.loads(schema_text())
    jsonschema.validate(tomllib.loads(FILE), schema)
    for wrong in ({"seed": "7"}, {"seeds": 7}, {"calibration-tokens": 1}, {"method": "x"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sede = 7", "no option of a run is called 'sede'; did you mean seed? `"),
        ("calibration_tokens = 7", "'calibration_tokens'; did you mean calibration-tokens? `"),
        ("hue = 7", "no option of a run is called 'hue'; `"),
        ("seed = '7'", "is wrong at 'seed': Input should be a valid integer"),
        ("calibration-tokens = 1", "is wrong at 'calibration-tokens': Input should be greater"),
        ("calibration = 'a.txt'", "is wrong at 'calibration': Input should be a valid array"),
        ("method = 'magic'", "is wrong at 'method': Input should be 'prox', "),
        ("max-loss = nan", "is wrong at 'max-loss': "),
        ("seed = ", "run.toml"),
    ],
)
def test_a_wrong_file_is_refused_with_the_key(text: str, said: str, tmp_path: Path) -> None:
    run = run_cli("build", "m", "--config", written(tmp_path, text))
    assert run.code == 2
    assert run.err.startswith("Error: Run file ")
    assert said in run.err
    assert run.err.endswith(
        "`prox24-deploy build MODEL_DIR --print-config` writes one with every key.\n"
    )


def test_a_file_that_is_not_there_or_names_no_model_is_refused(tmp_path: Path) -> None:
    absent = run_cli("build", "--config", tmp_path / "none.toml")
    assert (absent.code, absent.err.count("none.toml")) == (2, 1)
    nothing: Run = run_cli("build", "--config", written(tmp_path, ""))
    assert nothing.code == 2
    assert "MODEL_DIR" in nothing.err


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives(text: str) -> None:
    assert tomllib.loads(run_file_text({"name": text}))["name"] == text
