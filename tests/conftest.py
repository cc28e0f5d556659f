"""Fixtures that more than one room uses."""

import importlib.util
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from brief_timing import timed_briefly
from chromium import find_chromium
from hypothesis import settings
from longest_files import LONGEST
from shared_traces import SharedTraces
from tiny_models import write_tiny_bert, write_tiny_gpt2, write_tiny_llama, write_tiny_qwen3
from untraced import untraced

from prox24_deploy.graph.export.trace import Traces
from prox24_deploy.pipeline.stages import bench

# On a busy machine an example takes long without being wrong.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# No test finds what another run has timed, or leaves something behind.
_CACHE = tempfile.TemporaryDirectory(prefix="prox24-cache-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name


_RANKS = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files; within a file the order stays."""
    items.sort(key=lambda item: _RANKS.get(item.path, len(_RANKS)))


@pytest.fixture(scope="session", autouse=True)
def _untraced_exporter() -> Iterator[None]:
    """Hide torch's exporter, in which tests spend most of their time."""
    export, optimize = torch.onnx.export, torch.onnx.ONNXProgram.optimize

    def faster(*args: Any, **options: Any) -> Any:
        with untraced():
            return export(*args, **options)

    def optimize_faster(program: torch.onnx.ONNXProgram) -> None:
        with untraced():
            optimize(program)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", faster)
        patch.setattr(torch.onnx.ONNXProgram, "optimize", optimize_faster)
        yield


_TRACE_ANEW = Traces.__init__


@pytest.fixture(scope="session", autouse=True)
def _traced_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All tests share what was traced, as the twins of one build do, and so do all workers."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "traces"
    folder.mkdir(exist_ok=True)
    traced = SharedTraces(folder).given()

    def share(self: Traces) -> None:
        vars(self).update(vars(traced))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Traces, "__init__", share)
        yield


@pytest.fixture
def traced_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test that is about tracing itself."""
    monkeypatch.setattr(Traces, "__init__", _TRACE_ANEW)


@pytest.fixture(scope="session", autouse=True)
def _timed_briefly() -> Iterator[None]:
    """Time tiny models in a tenth of the rounds, since hardly a test is about the figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "measure_latency", timed_briefly)
        yield


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory that tests read and never change."""
    return write_tiny_bert(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory that tests read and never change; fp16 in several shards."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama", shard="20KB")


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory that tests read and never change; its layers are Conv1D."""
    return write_tiny_gpt2(tmp_path_factory.mktemp("models") / "tiny-gpt2")


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory that tests read and never change."""
    return write_tiny_qwen3(tmp_path_factory.mktemp("models") / "tiny-qwen3")


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of 80 paragraphs, 40 to 180 characters each, all different."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    words = "layer weight sparse dense group kernel batch token engine".split()  # noqa: SIM905
    draw = random.Random(0)
    paragraphs = [" ".join(draw.choices(words, k=draw.randint(6, 28))) + "." for _ in range(80)]
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, by name, a test whose hardware is missing; fail it if PROX24_REQUIRE names it."""
    required = os.environ.get("PROX24_REQUIRE", "").split(",")
    found = {
        "gpu": torch.cuda.is_available(),
        "tensorrt": importlib.util.find_spec("tensorrt") is not None and torch.cuda.is_available(),
        "tensorrt_rtx": importlib.util.find_spec("tensorrt_rtx") is not None,
        "browser": find_chromium() is not None,
    }
    for name, available in found.items():
        if item.get_closest_marker(name) and not available:
            (pytest.fail if name in required else pytest.skip)(f"needs {name}, not found here")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder with models/docs-llama-29m and data/*.txt, named by PROX24_DATA; skips without."""
    folder = os.environ.get("PROX24_DATA")
    if not folder:
        pytest.skip("needs the trained model and texts, PROX24_DATA is not set")
    return Path(folder)
