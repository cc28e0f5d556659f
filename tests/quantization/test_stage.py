"""`build --quantize`: the stage, what it leaves behind, and what is refused before it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import ANY_EMBEDDING, ANY_TEXT, run_cli, snapshot

from prox24_deploy.config.options import BuildOptions
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
def test_a_recovered_build_trains_its_numbers_too(
    tiny_llama: Path, prose: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    recover = ("--recover", "6steps", "--recover-tokens", "256", "--recover-rate", "0.005")
    train = ("--quantize", "int8", "--recover-quantized", "6")
    words: tuple[str | Path, ...] = (
        "build", tiny_llama, "-o", out, "--calibration", prose, "--shapes", "batch=1",
        "sequence=8", *SMALL, *ANY_TEXT, *recover, *train,
    )  # fmt: skip
    assert run_cli(*words).code in {0, 5}
    report = json.loads((out / "report.json").read_bytes())
    found = report["quantization"]["training"]
    assert found["kept"] > 0
    assert found["after"] < found["before"]
    names = [step["name"] for step in report["accuracy"]["steps"]]
    assert names == ["pruned", "recovered"]
    assert run_cli("verify", out).code == 0
    proven = run_cli("check", out)
    assert "14 weights of onnx/sparse are 2:4, all that must be" in proven.out
    before = snapshot(out)
    assert run_cli(*words).code in {0, 5}
    assert snapshot(out) == before


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


class Older:
    """A backend of which only the GPU is asked, and that has kernels for INT8 alone."""

    name = "cusparselt"

    def quantize_obstacle(self, format: str) -> str:
        return "" if format == "int8" else "fp8 needs compute capability 8.9, and this GPU has 8.6"


def test_a_gpu_without_the_format_is_refused() -> None:
    refusal = r"Backend cusparselt cannot run --quantize fp8: fp8 needs compute capability 8\.9"
    with pytest.raises(UsageError, match=refusal):
        stages.quantize.require_backends(BuildOptions(quantize="fp8"), [Older()])  # type: ignore[list-item]
    stages.quantize.require_backends(BuildOptions(quantize="int8"), [Older()])  # type: ignore[list-item]
