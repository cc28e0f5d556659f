"""Examples: their scripts call what is there, and their converters keep every weight."""

import json
import re
import shlex
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import typer
from ctranslate2_to_hf import convert
from tiny_directories import write_directory

from prox24_deploy.cli.main import app
from prox24_deploy.cli.options import hoist_common, join_shapes

Weights = dict[str, np.ndarray[Any, Any]]
Variables = Iterator[tuple[str, np.ndarray[Any, Any]]]
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples"
SCRIPTS = sorted(path for path in FOLDER.glob("*.sh") if path.name != "common.sh")
scripts = pytest.mark.parametrize("script", SCRIPTS, ids=[path.stem for path in SCRIPTS])


@scripts
def test_a_script_builds_with_options_that_exist(script: Path) -> None:
    text = script.read_text(encoding="utf-8").replace("\\\n", " ")
    subprocess.run(["bash", "-n", str(script)], check=True)
    (line,) = re.findall(r"^build (.*)$", text, flags=re.M)
    assert line.endswith('"$@"'), "what follows the name of the script is handed on"
    known: Any = typer.main.get_command(app)
    words = hoist_common(join_shapes(["build", *shlex.split(line)[:-1]]))
    known.commands["build"].make_context("build", words[1:])


@scripts
def test_a_script_pins_what_it_fetches_and_the_page_names_it(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    (wanted,) = re.findall(r"^fetch \S+ (.*)$", text, flags=re.M)
    assert all("==" in each for each in wanted.split())
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"`{script.name}`" in page
    for converter in re.findall(r"\$HERE/(\w+\.py)", text):
        assert (FOLDER / converter).is_file(), converter


def test_a_script_without_the_tool_says_how_to_get_it(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    ran = subprocess.run(
        ["bash", str(FOLDER / "minilm.sh")], env={"PYTHON": str(python), "PATH": "/usr/bin:/bin"},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 5
    assert "run `make demo` once, or set PYTHON" in ran.stderr


def pairs(weights: Weights, source: str, target: str, *, norm: bool = False) -> Variables:
    for kind, other in (("weight", "gamma"), ("bias", "beta")):
        yield f"{target}/{other if norm else kind}", weights[f"{source}.{kind}"]


def attention(weights: Weights, source: str, target: str, joined: tuple[str, ...]) -> Variables:
    """Projections as CTranslate2 joins them; a key has no bias, for which it stores zeros."""
    zero = np.zeros(len(weights[f"{source}.q_proj.weight"]), np.float32)
    for n, letters in enumerate(joined):
        for kind in ("weight", "bias"):
            parts = [weights.get(f"{source}.{x}_proj.{kind}", zero) for x in letters]
            yield f"{target}/linear_{n}/{kind}", np.concatenate(parts)
    yield from pairs(weights, f"{source}.out_proj", f"{target}/linear_{len(joined)}")
    yield from pairs(weights, f"{source}_layer_norm", f"{target}/layer_norm", norm=True)


def half_of(weights: Weights, half: str, heads: int) -> Variables:
    yield f"{half}/num_heads", np.array(heads, np.int16)
    yield f"{half}/position_encodings/encodings", weights[f"{half}.embed_positions.weight"]
    yield from pairs(weights, f"{half}.layer_norm", f"{half}/layer_norm", norm=True)
    blocks = {name.split(".")[2] for name in weights if name.startswith(f"{half}.layers.")}
    for i in blocks:
        here, there = f"{half}.layers.{i}", f"{half}/layer_{i}"
        yield from attention(weights, f"{here}.self_attn", f"{there}/self_attention", ("qkv",))
        if half == "decoder":
            yield from attention(weights, f"{here}.encoder_attn", f"{there}/attention", ("q", "kv"))
        yield from pairs(weights, f"{here}.fc1", f"{there}/ffn/linear_0")
        yield from pairs(weights, f"{here}.fc2", f"{there}/ffn/linear_1")
        yield from pairs(weights, f"{here}.final_layer_norm", f"{there}/ffn/layer_norm", norm=True)


def ctranslate2_names(state: dict[str, torch.Tensor], heads: int) -> Variables:
    """The variables of CTranslate2's file, made the other way than the converter goes."""
    weights = {name.removeprefix("model."): tensor.numpy() for name, tensor in state.items()}
    for half in ("encoder", "decoder"):
        yield from half_of(weights, half, heads)
    for n in (1, 2):
        yield from pairs(weights, f"encoder.conv{n}", f"encoder/conv{n}")
    yield "decoder/embeddings/weight", weights["decoder.embed_tokens.weight"]


def write_ctranslate2(path: Path, variables: list[tuple[str, np.ndarray[Any, Any]]]) -> None:
    def word(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    data = struct.pack("<I", 6) + word("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, values in variables:
        kind = {np.dtype(np.float32): 0, np.dtype(np.int16): 2}[values.dtype]
        data += word(name) + struct.pack(f"<B{values.ndim}I", values.ndim, *values.shape)
        data += struct.pack("<BI", kind, values.nbytes) + values.tobytes()
    half = len(data) // 2
    (path / "model.bin.part1").write_bytes(data[:half])
    (path / "model.bin.part2").write_bytes(data[half:])


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Whisper as CTranslate2 would store it, with the original beside it."""
    for i, name in enumerate(("END", "START", "TRANSLATE", "TRANSCRIBE", "NO_TIMES")):
        monkeypatch.setattr(f"ctranslate2_to_hf.{name}", i)
    write_directory(tmp_path / "original", "whisper")
    model = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "original")
    data = tmp_path / "data"
    data.mkdir()
    heads = model.config.encoder_attention_heads
    write_ctranslate2(data, [*ctranslate2_names(model.state_dict(), heads)])
    (data / "tokenizer.json").write_bytes((tmp_path / "original" / "tokenizer.json").read_bytes())
    given = {"lang_ids": [5], "suppress_ids": [6], "suppress_ids_begin": [7]}
    (data / "config.json").write_text(json.dumps(given), encoding="utf-8")
    return data


def test_a_whisper_comes_back_from_ctranslate2_weight_by_weight(
    source: Path, tmp_path: Path
) -> None:
    convert(source, tmp_path / "out")
    kinds = transformers.WhisperForConditionalGeneration
    before, after = (kinds.from_pretrained(tmp_path / n).state_dict() for n in ("original", "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def test_a_file_of_another_kind_is_refused(source: Path, tmp_path: Path) -> None:
    first = source / "model.bin.part1"
    first.write_bytes(struct.pack("<I", 9) + first.read_bytes()[4:])
    with pytest.raises(SystemExit, match="of version 9, not a WhisperSpec of 6"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
