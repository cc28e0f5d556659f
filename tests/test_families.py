"""Every shipped family from a model directory to a proven bundle."""

from pathlib import Path

import pytest
import torch
from command_line import run_cli
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from prox24_deploy.release.schema import load_report

AXES = {"tiny_gpt2": 0, "tiny_qwen3": 1}
TARGETS = {"tiny_gpt2": 8, "tiny_qwen3": 14}


@pytest.mark.parametrize("family", AXES)
def test_a_family_is_built_and_proven(
    family: str, prose: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model_dir: Path = request.getfixturevalue(family)
    out = tmp_path / "out"
    done = run_cli(
        "build", model_dir, "-o", out, "--calibration", prose,
        "--calibration-tokens", "4096", "--evaluation-tokens", "1024",
        "--shapes", "batch=1", "sequence=8",
    )  # fmt: skip
    assert done.code == 0, done.err
    report = load_report(out / "report.json")
    proven = [tensor for tensor in report.sparsity.tensors if tensor.expected and tensor.is_24]
    assert len(proven) == report.pruning.totals.pruned == TARGETS[family]
    with safe_open(out / "pruned" / "model.safetensors", framework="pt") as handle:
        declared = handle.metadata()["prox24.sparse_weights"]
    assert declared.count(f": {AXES[family]}") == TARGETS[family]
    assert run_cli("check", out / "pruned").code == 0
    model = AutoModelForCausalLM.from_pretrained(out / "pruned")
    with torch.no_grad():
        assert bool(model(input_ids=torch.arange(8)[None]).logits.isfinite().all())
