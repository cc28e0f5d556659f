"""What the command `check` prints, and how it ends."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import run_cli
from graph_models import array_24, node, write_matmul, write_onnx
from graph_models import write_safetensors as write_tensors


def test_a_proven_file_ends_with_0_and_counts_its_weights(tmp_path: Path) -> None:
    run = run_cli("check", write_matmul(tmp_path / "m.onnx", array_24((8, 8), 0)))
    assert (run.code, run.err) == (0, "")
    counts, conclusion = run.out.splitlines()[-2:]
    assert counts == "Weights proven 2:4: 1, not 2:4: 0, not proven: 0, need not be: 0."
    assert conclusion.startswith("Proven: all 1 weights that must be")


def test_a_weight_that_is_not_24_ends_with_4(tmp_path: Path) -> None:
    run = run_cli("check", write_matmul(tmp_path / "m.onnx", np.ones((8, 8), np.float32)))
    assert run.code == 4
    assert "no: 4 non-zeros in group [0:4, 0]" in run.out
    assert len(run.err.splitlines()) == 1


def test_a_weight_that_is_not_proven_ends_with_5_and_a_remedy(tmp_path: Path) -> None:
    made = node("MatMulNBits", ["x", "w"], "y", domain="com.microsoft")
    path = write_onnx(tmp_path / "m.onnx", [made], {"w": np.ones((8, 2, 16), np.uint8)})
    run = run_cli("check", path)
    assert run.code == 5
    assert "not proven: MatMulNBits keeps it in a form that the check does not read" in run.out
    assert run.err.startswith(f"Error: In {path}, tensor 'w' is not proven 2:4: MatMulNBits keeps")
    assert run.err.endswith("; check the file from which it was packed.\n")
    # What is ignored is no proof, and neither is anything else of this file.
    run = run_cli("check", path, "--ignore", "*")
    assert (run.code, "not read: MatMulNBits" in run.out) == (5, True)
    assert "proves nothing" in run.err


def test_json_tells_the_three_apart(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["x", "proven"], "a"),
        node("MatMul", ["a", "lost"], "b"),
        node("MatMulNBits", ["b", "packed"], "y", domain="com.microsoft"),
    ]
    weights = {
        "proven": array_24((8, 8), 0),
        "lost": np.ones((8, 8), np.float32),
        "packed": np.ones((8, 2, 16), np.uint8),
    }
    run = run_cli("check", write_onnx(tmp_path / "m.onnx", nodes, weights), "--json")
    assert run.code == 4
    rows = json.loads(run.out)["tensors"]
    assert [(row["tensor"], row["is_24"], row["unproven"]) for row in rows] == [
        ("proven", True, False), ("lost", False, False), ("packed", False, True),
    ]  # fmt: skip
    assert rows[2]["remedy"] == "check the file from which it was packed"


def test_the_axis_of_a_bare_file_can_be_told(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m.safetensors", {"a.weight": array_24((8, 8), 0)})
    assert run_cli("check", path).code == 5
    assert run_cli("check", path, "--axis", "a.*=0").code == 0
    assert run_cli("check", path, "--axis", "a.*=1").code == 4


@pytest.mark.parametrize("text", ["a", "=1", "a=", "a=b", "a=-1", "a=111"])
def test_an_axis_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = write_tensors(tmp_path / "m.safetensors", {"a.weight": array_24((8, 8), 0)})
    run = run_cli("check", path, "--axis", text)
    assert run.code == 2
    assert f"--axis takes GLOB=AXIS, as '*.c_attn.weight=0', got {text!r}" in run.err


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path: Path) -> None:
    write_matmul(tmp_path / "m.onnx", array_24((8, 8), 0))
    (tmp_path / "2_Dense").mkdir()
    write_tensors(tmp_path / "2_Dense" / "model.safetensors", {"a": array_24((8, 8), 0)})
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    run = run_cli("check", tmp_path)
    assert run.code == 0
    assert run.out.splitlines()[-3:-1] == [
        "Not read: 2_Dense/model.safetensors", "Not read: pytorch_model.bin",
    ]  # fmt: skip


def test_a_name_of_many_characters_is_cut_in_the_sentence(tmp_path: Path) -> None:
    name = "w" * 10**5
    nodes = [node("MatMul", ["x", name], "y")]
    path = write_onnx(tmp_path / "m.onnx", nodes, {name: np.ones((8, 8), np.float32)})
    run = run_cli("check", path)
    assert run.code == 4
    assert len(run.err) < 1000


def test_markup_in_a_name_is_shown_and_not_taken(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w[/bold]"], "y")]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"w[/bold]": array_24((8, 8), 0)})
    run = run_cli("check", path)
    assert (run.code, "w[/bold]" in run.out) == (0, True)
