"""The table of peers: same windows for all, weights held against 2:4, and faults as rows."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import peer_runs
import peers
import pytest
import torch
from safetensors.torch import load_file

from prox24_deploy.config.options import BuildOptions, TextOptions
from prox24_deploy.model.directory import load_model
from prox24_deploy.pipeline.context import RunContext, read_context
from prox24_deploy.sparsity.pattern import is_24


@pytest.fixture
def context(tiny_llama: Path, prose: Path) -> RunContext:
    text = TextOptions(calibration=(prose,), calibration_tokens=1024, evaluation_tokens=1024)
    return read_context(tiny_llama, None, BuildOptions(text=text))


def given(tiny_llama: Path, work: Path, context: RunContext) -> Namespace:
    windows = peers.windows_of(context.calibration.batches, 2)
    assert len({len(window) for window in windows}) == 1
    np.save(work / "windows.npy", windows.numpy())
    return Namespace(model_dir=tiny_llama, work=work)


def test_a_run_prunes_every_layer_of_the_blocks_and_says_what_it_took(
    tiny_llama: Path, tmp_path: Path, context: RunContext, capsys: pytest.CaptureFixture[str]
) -> None:
    given(tiny_llama, tmp_path, context)
    out = tmp_path / "out.safetensors"
    peer_runs.main("prox24 fast", tiny_llama, tmp_path / "windows.npy", out)
    inside = {name: w for name, w in load_file(out).items() if ".layers." in name}
    assert inside
    assert all(map(is_24, inside.values()))
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said.keys() == {"seconds", "cpu_seconds", "peak_gib"}
    assert min(said.values()) > 0


def test_weights_that_come_back_are_measured_against_the_dense_model(
    tiny_llama: Path, tmp_path: Path, context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = given(tiny_llama, tmp_path, context)

    def answer(command: list[str]) -> str:
        tool, *paths = command[2:]
        peer_runs.main(tool, *map(Path, paths))
        return json.dumps({"seconds": 1.0, "cpu_seconds": 1.0, "peak_gib": 1.0})

    monkeypatch.setattr(peers, "_run", answer)
    model = load_model(context.source, context.recipe, torch.device("cpu"))
    dense = peers.losses(model, context.held_out.batches)
    row = peers.measure("prox24 fast", context, arguments, dense)
    assert row.fault == ""
    assert row.sparse == row.layers > 0
    assert row.gap != 0
    assert row.perplexity > 1


def test_a_tool_that_does_not_run_is_a_row_that_says_so(
    tiny_llama: Path, tmp_path: Path, context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(command: list[str]) -> str:
        raise RuntimeError("no such package")

    monkeypatch.setattr(peers, "_run", broken)
    arguments = given(tiny_llama, tmp_path, context)
    row = peers.measure("prox24 fast", context, arguments, torch.zeros(1))
    assert row.fault == "did not run: no such package"


def test_every_tool_is_ours_or_has_an_environment() -> None:
    assert {tool.split()[0] for tool in peer_runs.TOOLS} == {"prox24", *peers.REQUIREMENTS}
    for wanted in peers.REQUIREMENTS.values():
        assert any(each.startswith("torch==") for each in wanted)
