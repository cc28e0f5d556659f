"""`build --quantize`: the stage, what it leaves behind, and what is refused before it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import ANY_EMBEDDING, run_cli, snapshot

from prox24_deploy.config.options import BuildOptions
from prox24_deploy.core.backends import BACKENDS
from prox24_deploy.core.errors import CalibrationError, UsageError
from prox24_deploy.core.records import TextSource
from prox24_deploy.model.batch import Samples
from prox24_deploy.pipeline import stages
from prox24_deploy.quantization.tensors import read_quantized

SMALL = ("--calibration-tokens", "2048", "--evaluation-tokens", "1024", "--method", "magnitude")


def build(model: Path, prose: Path, out: Path, *more: str) -> int:
    return run_cli(
        "build", model, "-o", out, "--calibration", prose, "--shapes", "batch=1", "sequence=8",
        *SMALL, *ANY_EMBEDDING, *more,
    ).code  # fmt: skip


def test_too_few_samples_for_ranges_are_refused_before_any_work() -> None:
    source = TextSource(kind="file", paths=(), sha256="", samples=7, tokens=7168)
    context: Any = SimpleNamespace(calibration=Samples(batches=(), source=source))
    with pytest.raises(CalibrationError, match=r"needs at least 8 calibration samples .* got 7"):
        stages.quantize.require_usable(BuildOptions(quantize="int8"), context, [])
    stages.quantize.require_usable(BuildOptions(), context, [])


@pytest.mark.large
def test_a_quantised_build_is_whole_and_one_without_takes_it_back(
    tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert build(tiny_bert, prose, out, "--quantize", "int8") in {0, 5}
    record = json.loads((out / "quantized" / "quantization.json").read_bytes())
    layers = read_quantized(out / "quantized" / "quantization.safetensors").layers
    assert record["format"] == "int8"
    assert {layer["name"] for layer in record["layers"] if not layer["reason"]} == layers.keys()
    report = json.loads((out / "report.json").read_bytes())
    assert len(report["quantization"]["layers"]) == len(record["layers"]) == 12
    assert [step["name"] for step in report["accuracy"]["steps"]] == ["pruned"]
    assert run_cli("verify", out).code == 0
    before = snapshot(out)
    assert build(tiny_bert, prose, out, "--quantize", "int8") in {0, 5}
    assert snapshot(out) == before
    assert build(tiny_bert, prose, out) in {0, 5}
    assert not (out / "quantized").exists()
    report = json.loads((out / "report.json").read_bytes())
    assert report["quantization"] is None
    assert report["accuracy"]["steps"] == []
    assert run_cli("verify", out).code == 0


class Opened:
    """A backend, of which only the name is asked."""

    def __init__(self, name: str) -> None:
        self.name = name


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_that_computes_in_16_bits_is_refused(name: str) -> None:
    def ask() -> None:
        stages.quantize.require_backends(BuildOptions(quantize="fp8"), [Opened(name)])  # type: ignore[list-item]

    if name == "cusparselt":
        with pytest.raises(UsageError, match=r"cusparselt runs the model in 16 bits .*; pass "):
            ask()
    else:
        ask()
