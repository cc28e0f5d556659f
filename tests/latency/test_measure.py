from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pynvml
import pytest

from prox24_deploy.core.errors import EngineError
from prox24_deploy.core.records import Engine, EngineEvidence, Interval, OnnxModel, TensorCheck
from prox24_deploy.core.shapes import Shape
from prox24_deploy.engines.base import Array, Feeds, Session
from prox24_deploy.latency import measure
from prox24_deploy.latency.measure import (
    KEPT_SAMPLES,
    MeasureOptions,
    PairSamples,
    conditions,
    latency_verdict,
    measure_latency,
    measure_pair,
    speedup_interval,
    timing,
)

QUICK = MeasureOptions(seconds=0.0)


@dataclass
class FakeSession:
    """Latencies around `base_ms` with the skewed noise and rare spikes of a busy machine."""

    base_ms: float = 1.0
    seed: int = 0
    name: str = ""
    calls: list[tuple[str, int, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        return dict(feeds)

    def latencies_ms(self, feeds: Feeds, *, runs: int, warmup: int) -> npt.NDArray[np.float64]:
        self.calls.append((self.name, int(feeds["ids"][0]), runs, warmup))
        noise = self._random.gamma(2.0, 0.01, size=runs)
        spikes = (self._random.random(runs) < 0.02) * 2.0
        return self.base_ms * (1 + noise + spikes)


def feeds(count: int = 4) -> list[Feeds]:
    return [{"ids": np.array([index])} for index in range(count)]


def pair_at(slowdown: float, seed: int, rounds: int = 40) -> PairSamples:
    return measure_pair(
        FakeSession(seed=2 * seed),
        FakeSession(base_ms=1 + slowdown, seed=2 * seed + 1),
        feeds(),
        options=MeasureOptions(seconds=0.0, min_rounds=rounds),
    )


def test_equal_twins_have_one_inside_the_interval_about_95_times_in_100() -> None:
    intervals = [speedup_interval(pair_at(0.0, seed), seed=seed) for seed in range(100)]
    covered = sum(interval.low <= 1 <= interval.high for interval in intervals)
    # 95 are expected; 90 is two and a half binomial standard deviations below.
    assert covered >= 90


def test_planted_slowdown_of_five_percent_fails_the_two_percent_limit() -> None:
    verdicts = [
        latency_verdict(speedup_interval(pair_at(0.05, seed, rounds=100)), 0.02)
        for seed in range(20)
    ]
    assert verdicts.count("fail") >= 19
    assert "pass" not in verdicts


def test_equal_twins_never_fail_the_two_percent_limit() -> None:
    verdicts = [
        latency_verdict(speedup_interval(pair_at(0.0, seed, rounds=100)), 0.02)
        for seed in range(20)
    ]
    assert verdicts.count("pass") >= 19
    assert "fail" not in verdicts


def test_drift_that_both_twins_share_cancels() -> None:
    drift = np.linspace(1.0, 3.0, 60)[:, None]
    pair = PairSamples(drift, drift / 1.25)
    interval = speedup_interval(pair)
    assert interval.low == pytest.approx(1.25)
    assert interval.high == pytest.approx(1.25)


def test_interval_is_the_same_for_the_same_seed() -> None:
    pair = pair_at(0.01, 3)
    assert speedup_interval(pair, seed=7) == speedup_interval(pair, seed=7)
    assert speedup_interval(pair, seed=7) != speedup_interval(pair, seed=8)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1 / 1.02, 1.5, "pass"),
        (1.2, 1.5, "pass"),
        (0.9, 0.98, "fail"),
        (0.9, 1 / 1.02, "inconclusive"),
        (0.97, 1.03, "inconclusive"),
    ],
)
def test_verdict_at_the_edges(low: float, high: float, verdict: str) -> None:
    assert latency_verdict(Interval(value=(low + high) / 2, low=low, high=high), 0.02) == verdict


def test_order_alternates_and_every_input_set_meets_both_orders() -> None:
    calls: list[tuple[str, int, int, int]] = []
    dense = FakeSession(name="dense", calls=calls)
    sparse = FakeSession(name="sparse", calls=calls)
    options = MeasureOptions(seconds=0.0, min_rounds=4, runs_per_turn=3, warmup=2)
    pair = measure_pair(dense, sparse, feeds(2), options=options)
    warm, timed = calls[:4], calls[4:]
    assert warm == [(name, s, 1, 2) for s in (0, 1) for name in ("dense", "sparse")]
    assert [(name, s) for name, s, _, _ in timed] == [
        ("dense", 0), ("sparse", 0), ("sparse", 0), ("dense", 0),
        ("dense", 1), ("sparse", 1), ("sparse", 1), ("dense", 1),
    ]  # fmt: skip
    assert {(runs, warmup) for _, _, runs, warmup in timed} == {(3, 0)}
    assert pair.dense.shape == pair.sparse.shape == (4, 3)


@pytest.mark.parametrize(("base_ms", "rounds"), [(1000.0, 20), (50.0, 39), (0.01, 500)])
def test_rounds_adapt_to_the_budget(base_ms: float, rounds: int) -> None:
    pair = measure_pair(
        FakeSession(base_ms), FakeSession(base_ms), feeds(), options=MeasureOptions()
    )
    assert len(pair.dense) == pytest.approx(rounds, rel=0.1)


def test_timing_keeps_an_even_thinning_of_the_samples() -> None:
    samples = np.arange(1000, dtype=np.float64).reshape(500, 2)
    record = timing(samples)
    assert record.runs == 1000
    assert record.median_ms == 499.5
    assert (record.p90_ms, record.p99_ms) == pytest.approx((899.1, 989.01))
    assert len(record.samples_ms) == KEPT_SAMPLES
    assert record.samples_ms[0] == 0
    assert record.samples_ms[-1] == 999
    assert set(np.diff(record.samples_ms)) == {5, 6}
    assert timing(samples[:3]).samples_ms == (0, 1, 2, 3, 4, 5)


@dataclass(frozen=True)
class FakeBackend:
    """The sparse twin takes `slowdown` longer."""

    slowdown: float
    sparse_kernels: bool = True
    name: str = "fake"
    on_gpu: bool = False

    def device(self) -> str:
        return "fake device"

    def build(
        self, bundle: Path, model: OnnxModel, out: Path, *, twin: Literal["dense", "sparse"]
    ) -> Engine:
        raise NotImplementedError

    def evidence(
        self, bundle: Path, engine: Engine, sparsity: tuple[TensorCheck, ...]
    ) -> EngineEvidence:
        raise NotImplementedError

    @contextmanager
    def open(self, bundle: Path, engine: Engine) -> Iterator[Session]:
        sparse = engine.twin == "sparse"
        yield FakeSession(base_ms=1 + self.slowdown * sparse, seed=int(sparse))


def engine(twin: Literal["dense", "sparse"]) -> Engine:
    return Engine(
        path=f"{twin}.plan",
        backend="fake",
        twin=twin,
        onnx="m.onnx",
        onnx_sha256="00",
        device="fake device",
        dtype="float16",
        versions={},
        size_bytes=1,
    )


def make_feeds(shape: Shape, seed: int) -> Mapping[str, Array]:
    return {"ids": np.full((shape.batch * shape.sequence,), seed)}


@pytest.mark.parametrize("gated", [True, False])
def test_rows_carry_shape_limit_and_gate(tmp_path: Path, *, gated: bool) -> None:
    backend = FakeBackend(0.5, sparse_kernels=gated)
    shapes = [Shape(batch=1, sequence=128), Shape(batch=8, sequence=1, past=64)]
    rows = measure_latency(
        backend, tmp_path, engine("dense"), engine("sparse"), shapes, make_feeds, 0.02,
        options=QUICK,
    )  # fmt: skip
    assert [(row.batch, row.sequence, row.past) for row in rows] == [(1, 128, 0), (8, 1, 64)]
    for row in rows:
        assert (row.backend, row.device, row.dtype) == ("fake", "fake device", "float16")
        verdict = "fail" if gated else "not gated"
        assert (row.limit, row.gated, row.verdict) == (0.02, gated, verdict)
        assert row.speedup.value == row.dense.median_ms / row.sparse.median_ms
        assert row.speedup.low <= row.speedup.value <= row.speedup.high < 0.75
        assert row.dense.runs == row.sparse.runs == 20


def test_swapped_or_foreign_engines_are_refused(tmp_path: Path) -> None:
    def run(dense: Engine, sparse: Engine) -> None:
        measure_latency(FakeBackend(0.0), tmp_path, dense, sparse, [], make_feeds, 0.02)

    with pytest.raises(EngineError, match="is the sparse one of fake, expected the dense one"):
        run(engine("sparse"), engine("dense"))
    with pytest.raises(EngineError, match="one of other, expected the sparse one of fake"):
        run(engine("dense"), replace(engine("sparse"), backend="other"))
    with pytest.raises(EngineError, match="dense of m and sparse of decoder; compare like"):
        run(engine("dense"), replace(engine("sparse"), onnx="onnx/sparse/decoder.onnx"))
    with pytest.raises(EngineError, match="dense float16 and sparse float32"):
        run(engine("dense"), replace(engine("sparse"), dtype="float32"))


def raise_nvml(code: int) -> Any:
    def fail(*args: object) -> None:
        raise pynvml.NVMLError(code)

    return fail


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    answers: dict[str, Any] = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": "handle",
        "nvmlDeviceGetName": "Fake H200",
        "nvmlSystemGetDriverVersion": "580.1",
        "nvmlDeviceGetClockInfo": 1980,
        "nvmlDeviceGetPowerUsage": 312_400,
        "nvmlDeviceGetTemperature": 61,
        "nvmlDeviceGetCurrentClocksThrottleReasons": 0x4 | 0x20,
    }
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, lambda *_, answer=answer: answer)
    return monkeypatch


def test_conditions_without_a_gpu_describe_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pynvml, "nvmlInit", raise_nvml(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    governor = tmp_path / "scaling_governor"
    governor.write_text("performance\n", encoding="utf-8")
    monkeypatch.setattr(measure, "GOVERNOR", governor)
    found = conditions()
    assert found["gpu"] == "no NVIDIA GPU"
    assert found["cpu"]
    assert found["governor"] == "performance"
    assert len(found["load average"].split()) == 3


def test_conditions_of_a_gpu_are_in_words(fake_gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_gpu.setattr(measure, "GOVERNOR", tmp_path / "none")
    found = conditions()
    assert found["gpu"] == "Fake H200"
    assert found["sm clock"] == found["memory clock"] == "1980 MHz"
    assert found["power"] == "312 W"
    assert found["temperature"] == "61 °C"
    assert found["throttle reasons"] == "power cap, software thermal"
    assert found["governor"] == "not reported"


def test_conditions_survive_a_gpu_that_does_not_answer(fake_gpu: pytest.MonkeyPatch) -> None:
    not_supported = raise_nvml(pynvml.NVML_ERROR_NOT_SUPPORTED)
    fake_gpu.setattr(pynvml, "nvmlDeviceGetPowerUsage", not_supported)
    assert conditions()["power"] == "not reported"
    fake_gpu.setattr(pynvml, "nvmlDeviceGetHandleByIndex", not_supported)
    assert conditions()["gpu"] == "the NVIDIA GPU cannot be read: Not Supported"


def test_conditions_are_not_those_of_a_gpu_that_is_hidden(fake_gpu: pytest.MonkeyPatch) -> None:
    fake_gpu.setenv("CUDA_VISIBLE_DEVICES", "")
    found = conditions()
    assert found["gpu"] == "no NVIDIA GPU"
    assert "sm clock" not in found


def test_conditions_without_load_average(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError

    monkeypatch.setattr("os.getloadavg", fail)
    assert conditions()["load average"] == "not reported"
