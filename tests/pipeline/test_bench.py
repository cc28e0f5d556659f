"""Timing needs both twins in memory, and says so where they are not."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from prox24_deploy.core.errors import BackendMissingError
from prox24_deploy.core.records import Engine
from prox24_deploy.pipeline.stages import bench

GIB = 2**30
ENGINE = Engine(
    path="engine.json",
    backend="onnxruntime",
    twin="dense",
    onnx="model.onnx",
    onnx_sha256="0",
    device="CPU",
    dtype="float16",
    versions={},
    size_bytes=3 * GIB,
)


@dataclass(frozen=True)
class Backend:
    """What of a backend is asked here."""

    on_gpu: bool
    name: str = "onnxruntime"


@pytest.mark.parametrize(
    ("dtype", "small", "free", "fits"),
    [
        ("float16", 3, 12, True),
        ("float16", 3, 11.9, False),
        ("float32", 3, 6, True),
        ("float32", 3, 5.9, False),
        # A file of 8-bit numbers stands for as many values as the other.
        ("float16", 1, 11.9, False),
    ],
)
def test_twins_that_do_not_fit_beside_each_other_are_not_timed(
    dtype: Any, small: int, free: float, monkeypatch: pytest.MonkeyPatch, *, fits: bool
) -> None:
    monkeypatch.setattr(bench, "free_memory", lambda: int(free * GIB))
    dense = replace(ENGINE, dtype=dtype)
    engines = [dense, replace(dense, twin="sparse", size_bytes=small * GIB)]
    bench._require_room(Backend(on_gpu=True), engines)  # type: ignore[arg-type]
    if fits:
        bench._require_room(Backend(on_gpu=False), engines)  # type: ignore[arg-type]
        return
    with pytest.raises(BackendMissingError, match=r"about \d+\.00 GiB .* \d+\.90 GiB are free"):
        bench._require_room(Backend(on_gpu=False), engines)  # type: ignore[arg-type]
