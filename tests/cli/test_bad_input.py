"""Whatever a user gets wrong: one sentence, exit code 2, nothing written, nothing lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import Run, run_cli, snapshot
from safetensors.torch import load_file, save_file

SMALL = ("--calibration-tokens", "1024", "--evaluation-tokens", "1024")


@pytest.fixture
def place(tmp_path: Path, tiny_bert: Path, prose: Path) -> Path:
    """A folder with a sound model, a sound text and nothing else."""
    shutil.copytree(tiny_bert, tmp_path / "model")
    shutil.copyfile(prose, tmp_path / "text.txt")
    return tmp_path


def assert_one_sentence(run: Run) -> None:
    assert run.code == 2, run
    assert run.out == ""
    lines = run.err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("Error: ")
    assert lines[0].endswith(".")
    assert "Traceback" not in run.err


def assert_refused(place: Path, *extra: str | Path, matches: tuple[str, ...]) -> None:
    """`build` on `place` fails in one sentence that holds `matches` and changes no file."""
    before = snapshot(place)
    arguments: tuple[str | Path, ...] = ("build", place / "model", "-o", place / "out", *SMALL)
    text = () if "--calibration" in extra else ("--calibration", place / "text.txt")
    run = run_cli(*arguments, *text, *extra)
    assert_one_sentence(run)
    for match in matches:
        assert match in run.err
    assert snapshot(place) == before


def _missing(model: Path) -> None:
    shutil.rmtree(model)


def _file(model: Path) -> None:
    shutil.rmtree(model)
    model.write_text("not a model", encoding="utf-8")


def _no_config(model: Path) -> None:
    (model / "config.json").unlink()


def _broken_config(model: Path) -> None:
    (model / "config.json").write_text("{", encoding="utf-8")


def _only_pickle(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04N.")


def _truncated(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _empty_weights(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"")


def _missing_shard(model: Path) -> None:
    names = dict.fromkeys(
        load_file(model / "model.safetensors"), "model-00002-of-00002.safetensors"
    )
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (model / "model.safetensors").unlink()


def _unsupported(model: Path) -> None:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["model_type"] = "perceiver"
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _not_a_number(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"][3, 5] = torch.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def _no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "matches"),
    [
        (_missing, ("model", "does not exist")),
        (_file, ("model", "is a file")),
        (_no_config, ("no config.json", "save_pretrained")),
        (_broken_config, ("config.json", "not readable JSON")),
        (_only_pickle, ("only pickled weights", "safe_serialization")),
        (_truncated, ("model.safetensors", "damaged")),
        (_empty_weights, ("model.safetensors", "damaged")),
        (_missing_shard, ("model-00002-of-00002.safetensors", "missing")),
        (_unsupported, ("'perceiver'", "--recipe")),
        (_not_a_number, ("encoder.layer.1.output.dense.weight", "1 NaN")),
        (_no_tokenizer, ("no tokenizer",)),
    ],
)
def test_a_damaged_model_directory_is_refused(
    place: Path, damage: Callable[[Path], None], matches: tuple[str, ...]
) -> None:
    damage(place / "model")
    assert_refused(place, matches=matches)


@pytest.mark.parametrize(
    ("name", "content", "matches"),
    [
        ("empty.txt", b"", ("empty.txt", "is empty")),
        ("blank.txt", b"\n \n\t\n", ("blank.txt", "is empty")),
        ("short.txt", b"One.\n\nTwo.\n\nThree.", ("short.txt", "at least 1024")),
        ("fifth.txt", (b"A word. " * 3 + b"\n\n") * 100, ("in the fifth of it that is held out",)),
        ("single.txt", b"word " * 2000, ("1 paragraph", "--evaluation")),
        ("latin.txt", b"caf\xe9\n\n" * 50, ("latin.txt", "not UTF-8")),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', ("bad.jsonl line 2", "not JSON")),
        (
            "wrong.jsonl",
            b'{"id": 1, "body": "a"}\n',
            ("wrong.jsonl line 1 has the columns 'id', 'body'", "--column NAME"),
        ),
    ],
)
def test_unusable_calibration_text_is_refused(
    place: Path, name: str, content: bytes, matches: tuple[str, ...]
) -> None:
    (place / name).write_bytes(content)
    assert_refused(place, "--calibration", place / name, matches=matches)


def test_missing_text_is_refused(place: Path) -> None:
    assert_refused(place, "--calibration", place / "nowhere.txt", matches=("nowhere.txt",))
    assert_refused(place, "--evaluation", place / "nowhere.txt", matches=("nowhere.txt",))


@pytest.mark.parametrize(
    ("content", "matches"),
    [
        (None, ("my.toml", "cannot be read")),
        (b"family = ", ("my.toml", "not valid TOML")),
        (b"\xff\xfe", ("my.toml", "not UTF-8")),
        (b'family = "x"\nspeed = 3\n', ("my.toml", "unknown key 'speed'")),
        (b'family = "x"\n', ("my.toml", "required key", "missing")),
    ],
)
def test_an_unusable_recipe_is_refused(
    place: Path, content: bytes | None, matches: tuple[str, ...]
) -> None:
    if content is not None:
        (place / "my.toml").write_bytes(content)
    assert_refused(place, "--recipe", place / "my.toml", matches=matches)


def test_a_recipe_that_does_not_fit_the_model_is_refused(place: Path) -> None:
    shipped = Path(__file__).parents[2] / "export" / "llama.toml"
    (place / "out").mkdir()
    run = run_cli(
        "prune", place / "model", "-o", place / "out", "--recipe", shipped, *SMALL,
        "--calibration", place / "text.txt",
    )  # fmt: skip
    assert_one_sentence(run)
    assert "BertLMHeadModel" in run.err or "lacks weight" in run.err


def test_an_output_that_is_a_file_is_refused(place: Path) -> None:
    (place / "out").write_text("precious", encoding="utf-8")
    assert_refused(place, matches=("out is a file",))


def test_an_output_that_holds_something_else_is_refused(place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "thesis.tex").write_text("precious", encoding="utf-8")
    assert_refused(place, matches=("thesis.tex", "not a bundle"))


def test_an_output_in_the_model_directory_is_refused(place: Path) -> None:
    before = snapshot(place)
    run = run_cli("build", place / "model", "-o", place / "model" / "out")
    assert_one_sentence(run)
    assert "lies in the model directory" in run.err
    assert snapshot(place) == before


def test_a_manifest_of_another_tool_is_left_alone(place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "manifest.json").write_text('{"name": "web app"}', encoding="utf-8")
    assert_refused(place, matches=("manifest.json", "another version", "-o"))
    assert_refused(place, "--fresh", matches=("manifest.json", "another version", "-o"))


def test_a_cuda_device_that_is_not_there_is_an_environment_error(place: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    run = run_cli(
        "build", place / "model", "-o", place / "out", "--device", "cuda", *SMALL,
        "--calibration", place / "text.txt",
    )  # fmt: skip
    assert run.code == 5
    assert "no CUDA device" in run.err


def test_no_amount_is_without_end(place: Path) -> None:
    for line in (("prune", "--memory-limit", "inf"), ("bench", "--seconds", "1e300")):
        command, option, value = line
        run = run_cli(command, place / "model", option, value)
        assert (run.code, f"Invalid value for '{option}'" in run.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "matches"),
    [
        (("--backend", "onnxrt"), ("'onnxrt'", "onnxruntime")),
        (("--shapes", "batch=0"), ("'batch=0'", "positive")),
        (("--shapes", "sequence=16", "time=3"), ("'time=3'", "sequence=N")),
        (("--shapes", "batch=1,"), ("'batch=1,'",)),
    ],
)
def test_an_option_value_that_cannot_be_used_is_refused(
    place: Path, arguments: tuple[str, ...], matches: tuple[str, ...]
) -> None:
    assert_refused(place, *arguments, matches=matches)


@pytest.mark.parametrize("command", ["export", "compile", "bench", "verify"])
def test_a_command_on_something_that_is_no_bundle_is_refused(place: Path, command: str) -> None:
    before = snapshot(place)
    for target in (place / "model", place / "nowhere", place / "text.txt"):
        run = run_cli(command, target)
        assert_one_sentence(run)
        assert str(target) in run.err
    assert snapshot(place) == before


def test_check_on_a_path_without_weights_is_refused(place: Path) -> None:
    for target in (place / "nowhere", place / "text.txt"):
        run = run_cli("check", target)
        assert_one_sentence(run)
        assert str(target) in run.err


def test_an_unknown_command_or_option_exits_with_2() -> None:
    assert run_cli("deploy").code == 2
    assert run_cli("build").code == 2
    assert run_cli("build", "x", "--method", "random").code == 2
