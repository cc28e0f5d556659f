"""The harness of spoilt inputs: it judges rightly, and a short share of it finds nothing."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import fuzz_binaries
import fuzz_documents
import pytest
from fuzz_documents import Spoiled, to_json, to_toml
from fuzz_onnx_seeds import onnx_seeds
from fuzz_targets import TARGETS
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_directories import write_recordings

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PLAIN = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
# TOML has integers of 64 bits, and no surrogates in its text.
SAFE = st.text(st.characters(exclude_categories=["Cs"]))
TABLES = st.dictionaries(
    SAFE,
    st.recursive(
        st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | SAFE,
        lambda inner: st.lists(inner) | st.dictionaries(SAFE, inner),
        max_leaves=8,
    ),
)


@given(PLAIN)
@settings(max_examples=30)
def test_documents_are_written_as_json_reads_them(value: Any) -> None:
    assert json.loads(to_json(value)) == value


@given(TABLES)
@settings(max_examples=30)
def test_documents_are_written_as_toml_reads_them(value: dict[str, Any]) -> None:
    assert tomllib.loads(to_toml(value)) == value


def header(tensors: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text + data


def sound(name: str, folder: Path) -> bytes:
    """A sound file for each way to spoil one."""
    if name == "spoil_safetensors":
        entry = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}
        return header({"a.weight": entry, "b.weight": entry}, bytes(32))
    if name == "spoil_onnx":
        model, _ = onnx_seeds()["folded"]
        data: bytes = model.SerializeToString()
        return data
    if name == "spoil_wave":
        return (write_recordings(folder / "waves", count=1) / "0.wav").read_bytes()
    if name == "spoil_image":
        Image.new("RGB", (8, 8)).save(folder / "image.png")
        return (folder / "image.png").read_bytes()
    if name == "spoil_toml":
        return b'a = 1\nb = [1.5, "x"]\n[c]\nd = { e = true }\n'
    return b'{"a": [1, 2.5, null], "b": {"c": "d"}}'


SPOILERS: tuple[Callable[[bytes, Random], Spoiled], ...] = (
    fuzz_documents.spoil_json,
    fuzz_documents.spoil_lines,
    fuzz_documents.spoil_text,
    fuzz_documents.spoil_toml,
    fuzz_binaries.spoil_bytes,
    fuzz_binaries.spoil_image,
    fuzz_binaries.spoil_onnx,
    fuzz_binaries.spoil_safetensors,
    fuzz_binaries.spoil_wave,
)


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__)
def test_a_number_gives_the_same_input_again_and_others_give_others(
    spoil: Callable[[bytes, Random], Spoiled], tmp_path: Path
) -> None:
    data = sound(spoil.__name__, tmp_path)
    first, again = ([spoil(data, Random(number)) for number in range(150)] for _ in range(2))
    assert first == again
    assert all(story for _, story in first)
    assert len({spoilt for spoilt, _ in first}) > 20
    unchanged = sum(spoilt == data for spoilt, _ in first)
    assert unchanged < 15, "inputs that are not spoilt show nothing"


@pytest.mark.parametrize("write", [to_json, to_toml])
def test_what_is_one_value_in_many_places_is_cut_where_it_is_written(
    write: Callable[[Any], str],
) -> None:
    """Else the harness itself would run out of memory, or of the time of an input."""
    text = write({"a": [{"b": "x" * 600_000}] * 2000})
    assert 2**25 < len(text) <= 2**26
    assert text.startswith(write({"a": [{"b": "x" * 600_000}]})[:1000])


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A script of its own, because the harness forks and a test runner has threads."""
    path = os.pathsep.join((str(BENCHMARKS), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


def test_every_kind_of_answer_is_judged() -> None:
    done = run(Path(__file__).with_name("fuzz_plants.py"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    here = {name: [(answer, wrong) for answer, wrong, _ in rows] for name, rows in found.items()}
    assert here == {
        "accept": [("accepted", False)] * 2,
        "exit_3": [("accepted", False)] * 2,
        "exit_1": [("RuntimeError", True)] * 2,
        "refuse": [("UsageError", False)] * 2,
        "refuse_with_1": [("ExportError", True)] * 2,
        "forbidden": [("PermissionError", False)] * 2,
        "crash": [("ValueError", True)] * 2,
        "deep": [("RecursionError", True)] * 2,
        "hang": [("killed: over 1 s", True)] * 2,
        "allocate": [("MemoryError", True)] * 2,
        "hide_that_memory_ended": [("ModelDirError", True)] * 2,
        "die": [("killed: exit 7", True)] * 2,
        "run_a_program": [("reached outside", True)] * 2,
        "write_elsewhere": [("reached outside", True)] * 2,
        "write_beside": [("accepted", False)] * 2,
        "steer_the_terminal": [("UncleanOutputError", True)] * 2,
        # Only every other input is asked for JSON.
        "print_no_json": [("accepted", False), ("UncleanOutputError", True)],
        "print_past_python": [("UncleanOutputError", True)] * 2,
        "warn_past_python": [("accepted", False)] * 2,
        "steer_past_python": [("UncleanOutputError", True)] * 2,
    }


# Parsers whose sound inputs take seconds each; malformed ones are in model/test_token_files.py,
# data/test_images.py, config/test_recipe.py, bundle/test_manifest.py and bundle/test_bundle.py.
SLOW = ("tokenizer", "preprocessor", "recipe", "manifest", "stages")
QUICK = tuple(name for name in TARGETS if name not in SLOW)


@pytest.mark.parametrize(
    "parsers", [QUICK, pytest.param(SLOW, marks=pytest.mark.large)], ids=["quick", "slow"]
)
def test_no_spoilt_input_meets_anything_but_a_documented_answer(parsers: tuple[str, ...]) -> None:
    only = [word for name in parsers for word in ("--parser", name)]
    done = run(BENCHMARKS / "fuzz.py", *only, "--inputs", "10", "--seed", "16", "--workers", "1")
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == 0
    assert [parser["parser"] for parser in found["parsers"]] == [*parsers]
    assert len(QUICK) >= 13
    assert all(parser["inputs"] >= 2 for parser in found["parsers"])


def test_the_time_is_shared_and_a_line_tells_how_far_each_parser_came() -> None:
    parsers = ("--parser", "plan", "--parser", "wav", "--parser", "plan")
    asked = ("--inputs", "1000000", "--minutes", "0.05", "--workers", "2", "--equal")
    done = run(BENCHMARKS / "fuzz.py", *parsers, *asked)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line.get("parser") for line in lines] == ["plan", "wav", None]
    assert lines[-1]["parsers"] == [
        {key: value for key, value in line.items() if key not in {"benchmark", "seed"}}
        for line in lines[:-1]
    ]
    assert all(line["inputs"] < 1_000_000 for line in lines[:-1])
