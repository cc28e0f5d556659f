"""A compiler that crashes, hangs or lacks memory costs a twin its gain, and never the build."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from opened import open_tiny
from sentence_models import write_tiny_embedder
from tiny_sentences import NORMALIZE, pooling

from prox24_deploy.config.recipe import EMBEDDING, select_recipe
from prox24_deploy.core.records import Compilation
from prox24_deploy.core.shapes import Shape
from prox24_deploy.engines.cusparselt import compile_trial, cuda_graph, inductor, prepare
from prox24_deploy.engines.cusparselt.compile_trial import try_elsewhere
from prox24_deploy.engines.cusparselt.inductor import try_compiling
from prox24_deploy.engines.cusparselt.torch_model import TorchModel, open_torch_model
from prox24_deploy.model.directory import open_model_dir
from prox24_deploy.model.sentence import fitted_to_sentences

SHAPES = [Shape(batch=1, sequence=8), Shape(batch=2, sequence=16)]
# The job as it runs on a GPU, on the CPU, with a compiler that does as it is planted.
JOB = """
import os, sys, time
from prox24_deploy.engines.cusparselt import compile_job, cuda_graph, inductor
cuda_graph.DEVICE = "cpu"
def planted(graph, inputs):
    {planted}
inductor.BACKEND = planted if {on} else inductor.BACKEND
compile_job.run_job(compile_job.JOB.validate_json(sys.stdin.buffer.read()))
"""


def job(planted: str = "") -> list[str]:
    text = JOB.format(planted=planted or "pass", on=bool(planted))
    return [sys.executable, "-c", text]


@pytest.fixture
def opened(
    tiny_llama: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TorchModel]:
    """A tiny decoder in half precision on the CPU, and a cache of Inductor's own for the test."""
    monkeypatch.setattr(cuda_graph, "DEVICE", "cpu")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    tiny = open_tiny(tiny_llama, prose)
    yield open_torch_model(tiny.directory, tiny.recipe, "bfloat16")
    torch.compiler.reset()


@pytest.mark.large
def test_what_a_child_compiled_is_taken_from_the_cache(opened: TorchModel) -> None:
    """One graph for each shape and two for all others, padded or not, and no weight read twice."""
    trial = try_elsewhere(opened, SHAPES, {}, None, job())
    assert (trial.reason, trial.graphs, trial.cached) == ("", 4, 0)
    assert trial.seconds > 0
    runs = [opened.inputs(one) for one in opened.trial_feeds(SHAPES)]
    outputs, here = try_compiling(opened.compiled(SHAPES), runs)
    assert (here.reason, here.graphs, here.cached) == ("", 4, 4)
    assert [len(one[0]) for one in outputs] == [len(run[0]) for run in runs]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "import os, sys; sys.stderr.write('LLVM ERROR: no registers\\n\\n'); "
            "sys.stderr.flush(); os.abort()",
            "its compiler was ended by a signal (Aborted), its last message was: LLVM ERROR: no "
            "registers",
        ),
        (
            "import os; os.kill(os.getpid(), 9)",
            "its compiler was ended by a signal (Killed), its last message was: it said nothing",
        ),
        (
            "raise MemoryError('none left')",
            "its compiler ended with code 1: MemoryError: none left",
        ),
        (
            "import sys; sys.exit('Odd: 1 fault in a job\\n  a value\\n    For more see a page')",
            "its compiler ended with code 1: Odd: 1 fault in a job",
        ),
        ("pass", "its compiler ended with code 0: it said nothing"),
        ("import time; time.sleep(600)", "its compiler did not end within 1 s"),
    ],
)
def test_a_child_that_gives_no_answer_is_a_reason(
    script: str, reason: str, opened: TorchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = "sleep" in script
    monkeypatch.setattr(compile_trial, "_START_SECONDS", 1.0 if hangs else 120.0)
    monkeypatch.setattr(compile_trial, "_GRAPH_SECONDS", 0.0)
    found = try_elsewhere(opened, SHAPES, {}, None, [sys.executable, "-c", script])
    assert found.reason == reason
    assert 0 < found.seconds < 60


@pytest.mark.large
def test_a_compiler_that_runs_out_of_memory_is_a_reason(opened: TorchModel) -> None:
    planted = "import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried 2 GiB.')"
    reason = try_elsewhere(opened, SHAPES, {}, None, job(planted)).reason
    assert reason.endswith("OutOfMemoryError: CUDA out of memory. Tried 2 GiB")


def test_a_child_builds_an_embedder_with_its_pooling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What pools adds an output to the recipe, which no recipe file says."""
    monkeypatch.setattr(cuda_graph, "DEVICE", "cpu")
    directory = open_model_dir(write_tiny_embedder(tmp_path / "model", pooling("mean"), NORMALIZE))
    recipe, _ = select_recipe(directory.path, directory.model_type, None)
    fitted = fitted_to_sentences(recipe, directory.architecture, directory.path)
    opened = open_torch_model(directory, fitted, "bfloat16")
    assert EMBEDDING in opened.output_names
    planted = "raise RuntimeError('reached the compiler')"
    reason = try_elsewhere(opened, SHAPES, {}, None, job(planted)).reason
    assert reason.endswith("RuntimeError: reached the compiler")
    torch.compiler.reset()


@pytest.mark.large
def test_a_twin_whose_compiler_crashes_runs_without(
    opened: TorchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process nothing is compiled at all, for that would end it."""
    monkeypatch.setattr(inductor, "BACKEND", "not to be reached")
    crashing = partial(try_elsewhere, command=job("os.abort()"))
    monkeypatch.setattr(prepare, "try_elsewhere", crashing)
    with prepare.prepare(opened, SHAPES, (), eager=False) as ready:
        assert ready.compiled is None
        assert ready.compilation.reason.startswith("its compiler was ended by a signal (Aborted)")
        assert ready.run_last()[0].shape[:2] == (2, 16)


@pytest.mark.large
def test_layers_are_compressed_in_the_child_too(
    opened: TorchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without their weights: those of the child are zeros there, which are 2:4."""
    names = {"model.layers.0.mlp.up_proj": {8: 1}}
    said = """
import json, sys
from prox24_deploy.engines.cusparselt import compile_job, cuda_graph
cuda_graph.DEVICE = "cpu"
def replaced(model, layers, quantized):
    weight = model.get_submodule(*layers).weight
    raise SystemExit(f"{weight.dtype} {bool(weight.any())} {json.dumps(layers)}")
compile_job.multiply_as = replaced
compile_job.run_job(compile_job.JOB.validate_json(sys.stdin.buffer.read()))
"""
    found = try_elsewhere(opened, SHAPES, names, None, [sys.executable, "-c", said])
    assert found.reason == (
        'its compiler ended with code 1: torch.bfloat16 False {"model.layers.0.mlp.up_proj": '
        '{"8": 1}}'
    )


def test_a_model_without_a_directory_is_not_tried(opened: TorchModel) -> None:
    nameless = TorchModel(opened.module, opened.dtype, opened.vocabulary)
    assert try_elsewhere(nameless, SHAPES, {}, None, ["no such command"]) == Compilation()


def test_a_large_model_makes_room_for_the_child(
    opened: TorchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights go to the host and come back."""
    places: list[str] = []
    monkeypatch.setattr(compile_trial, "_move", lambda module, place: places.append(str(place)))
    answers = [sys.executable, "-c", "pass"]
    assert try_elsewhere(opened, SHAPES, {}, None, answers).reason
    assert places == []
    monkeypatch.setattr(compile_trial, "_crowds", lambda model, place: True)
    assert try_elsewhere(opened, SHAPES, {}, None, answers).reason
    assert places == ["cpu", "cpu"]
