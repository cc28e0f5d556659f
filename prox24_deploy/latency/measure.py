"""Time a dense engine against its sparse twin so that the difference can be believed.

The twins run in turns within short rounds, so that a clock that drifts or a neighbour that wakes up
touches both; the interval of their ratio is a bootstrap over rounds that keeps each pair together.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pynvml

from prox24_deploy.core.errors import EngineError
from prox24_deploy.core.host import cpu_model, first_gpu
from prox24_deploy.core.records import Clocks, Engine, Interval, LatencyRow, Timing
from prox24_deploy.core.shapes import Shape
from prox24_deploy.core.types import Verdict
from prox24_deploy.engines.base import Backend, Feeds, Session
from prox24_deploy.latency.clocks import ClockWatch, throttle_reasons

logger = logging.getLogger(__name__)

Samples = npt.NDArray[np.float64]
MakeFeeds = Callable[[Shape, int], Feeds]

KEPT_SAMPLES = 200
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureOptions:
    """How long to measure one shape and how to resample.

    After `min_rounds` rounds no further one starts once the timed runs add up to `seconds`; so a
    slow model takes longer than `seconds`, and the number of rounds depends on nothing but the
    measured times.
    """

    min_rounds: int = 20
    max_rounds: int = 500
    seconds: float = 4.0
    runs_per_turn: int = 1
    warmup: int = 3
    input_sets: int = 4
    resamples: int = 2000
    seed: int = 0


@dataclass(frozen=True, slots=True)
class PairSamples:
    """Milliseconds of every run, both (rounds, runs per turn); row r of both is round r."""

    dense: Samples
    sparse: Samples


DEFAULT_OPTIONS = MeasureOptions()


def measure_pair(
    dense: Session,
    sparse: Session,
    feeds_sets: Sequence[Feeds],
    *,
    options: MeasureOptions = DEFAULT_OPTIONS,
    after_round: Callable[[], None] = lambda: None,
) -> PairSamples:
    """Time two sessions in alternating order (dense sparse, sparse dense, ...) on rotated inputs.

    Each input set serves two rounds in a row, so that it meets both orders. `after_round` is called
    outside all timed runs.
    """
    for feeds in feeds_sets:
        for session in (dense, sparse):
            session.latencies_ms(feeds, runs=1, warmup=options.warmup)
    dense_rounds: list[Samples] = []
    sparse_rounds: list[Samples] = []
    spent_ms = 0.0
    while _wants_round(len(dense_rounds), spent_ms, options):
        index = len(dense_rounds)
        feeds = feeds_sets[index // 2 % len(feeds_sets)]
        turns = [(dense, dense_rounds), (sparse, sparse_rounds)]
        for session, rounds in turns if index % 2 == 0 else reversed(turns):
            elapsed = session.latencies_ms(feeds, runs=options.runs_per_turn, warmup=0)
            rounds.append(elapsed)
            spent_ms += float(elapsed.sum())
        after_round()
    return PairSamples(np.stack(dense_rounds), np.stack(sparse_rounds))


def measure_latency(
    backend: Backend,
    bundle: Path,
    dense_engine: Engine,
    sparse_engine: Engine,
    shapes: Sequence[Shape],
    make_feeds: MakeFeeds,
    limit: float,
    *,
    options: MeasureOptions = DEFAULT_OPTIONS,
    after_shape: Callable[[int], None] = lambda _: None,
) -> tuple[LatencyRow, ...]:
    """Measure both engines at every shape and judge each row against `limit`.

    `make_feeds(shape, seed)` makes the inputs of one run; `limit` is the largest
    tolerated slow-down of the sparse engine, as a fraction. `after_shape` is told how many shapes
    are done.

    Raises:
        EngineError: the engines are not a dense and a sparse one of the same backend, graph and
            dtype.
    """
    _check_twins(backend, dense_engine, sparse_engine)
    rows = []
    with (
        backend.open(bundle, dense_engine) as dense,
        backend.open(bundle, sparse_engine) as sparse,
        ClockWatch() as watch,
    ):
        for shape in shapes:
            feeds_sets = [make_feeds(shape, i) for i in range(options.input_sets)]
            pair = measure_pair(
                dense, sparse, feeds_sets, options=options, after_round=watch.sample
            )
            clocks = watch.take() if backend.on_gpu else None
            row = _row(backend, sparse_engine, shape, pair, limit, options, clocks)
            logger.info("%s %s: speed-up %.3f", backend.name, shape, row.speedup.value)
            rows.append(row)
            after_shape(len(rows))
    return tuple(rows)


def speedup_interval(pair: PairSamples, *, resamples: int = 2000, seed: int = 0) -> Interval:
    """Ratio of medians, dense over sparse, with a 95 % percentile bootstrap over whole rounds.

    Both twins of a round are drawn together, so what slows a whole round cancels in the ratio.
    """
    rounds = len(pair.dense)
    draw = np.random.default_rng(seed).integers(0, rounds, size=(resamples, rounds))
    ratios = np.median(pair.dense[draw], axis=(1, 2)) / np.median(pair.sparse[draw], axis=(1, 2))
    low, high = np.percentile(ratios, [2.5, 97.5])
    value = np.median(pair.dense) / np.median(pair.sparse)
    return Interval(value=float(value), low=float(low), high=float(high))


def latency_verdict(speedup: Interval, limit: float) -> Verdict:
    """Judge "sparse is not more than `limit` slower": inconclusive if the interval straddles it."""
    least = 1 / (1 + limit)
    if speedup.low >= least:
        return "pass"
    return "fail" if speedup.high < least else "inconclusive"


def timing(samples: Samples) -> Timing:
    """Percentiles over all runs; keeps at most `KEPT_SAMPLES` of them, evenly spread in time."""
    flat = samples.ravel()
    median, p90, p99 = np.percentile(flat, [50, 90, 99])
    kept = np.linspace(0, flat.size - 1, min(flat.size, KEPT_SAMPLES)).round().astype(int)
    return Timing(
        median_ms=float(median),
        p90_ms=float(p90),
        p99_ms=float(p99),
        runs=flat.size,
        samples_ms=tuple(round(value, 6) for value in flat[kept].tolist()),
    )


def conditions() -> dict[str, str]:
    """State of the machine now, in words: what a reader needs to trust or doubt a latency."""
    found = {"cpu": cpu_model(), "load average": _load_average(), "governor": _governor()}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {"gpu": "no NVIDIA GPU", **found}
    try:
        handle = first_gpu()
        return ({"gpu": "no NVIDIA GPU"} if handle is None else _gpu_conditions(handle)) | found
    except pynvml.NVMLError as error:
        return {"gpu": f"the NVIDIA GPU cannot be read: {error}", **found}
    finally:
        pynvml.nvmlShutdown()


def _wants_round(done: int, spent_ms: float, options: MeasureOptions) -> bool:
    if done < options.min_rounds:
        return True
    return done < options.max_rounds and spent_ms < options.seconds * 1e3


def _check_twins(backend: Backend, dense: Engine, sparse: Engine) -> None:
    for engine, twin in ((dense, "dense"), (sparse, "sparse")):
        if engine.twin != twin or engine.backend != backend.name:
            raise EngineError(
                f"Engine {engine.path} is the {engine.twin} one of {engine.backend}, expected the "
                f"{twin} one of {backend.name}; compile both again."
            )
    if dense.graph != sparse.graph:
        raise EngineError(
            f"Engines are of different graphs, dense of {dense.graph} and sparse of "
            f"{sparse.graph}; compare like with like."
        )
    if dense.dtype != sparse.dtype:
        raise EngineError(
            f"Engines differ in dtype, dense {dense.dtype} and sparse {sparse.dtype}; compile both "
            "from one export."
        )


def _row(
    backend: Backend,
    engine: Engine,
    shape: Shape,
    pair: PairSamples,
    limit: float,
    options: MeasureOptions,
    clocks: Clocks | None,
) -> LatencyRow:
    speedup = speedup_interval(pair, resamples=options.resamples, seed=options.seed)
    return LatencyRow(
        backend=backend.name,
        device=engine.device,
        dtype=engine.dtype,
        batch=shape.batch,
        sequence=shape.sequence,
        past=shape.past,
        dense=timing(pair.dense),
        sparse=timing(pair.sparse),
        speedup=speedup,
        limit=limit,
        gated=backend.sparse_kernels,
        verdict=latency_verdict(speedup, limit) if backend.sparse_kernels else "not gated",
        clocks=clocks,
        graph=engine.graph,
    )


def _load_average() -> str:
    try:
        return " ".join(f"{load:.2f}" for load in os.getloadavg())
    except OSError:
        return "not reported"


def _governor() -> str:
    try:
        return GOVERNOR.read_text(encoding="utf-8").strip()
    except OSError:
        return "not reported"


def _gpu_conditions(handle: Any) -> dict[str, str]:
    sm, memory = pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM
    return {
        "gpu": _ask(lambda: str(pynvml.nvmlDeviceGetName(handle))),
        "driver": _ask(lambda: str(pynvml.nvmlSystemGetDriverVersion())),
        "sm clock": _ask(lambda: f"{pynvml.nvmlDeviceGetClockInfo(handle, sm)} MHz"),
        "memory clock": _ask(lambda: f"{pynvml.nvmlDeviceGetClockInfo(handle, memory)} MHz"),
        "power": _ask(lambda: f"{pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3:.0f} W"),
        "temperature": _ask(
            lambda: f"{pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)} °C"
        ),
        "throttle reasons": _ask(
            lambda: (
                ", ".join(
                    throttle_reasons(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
                )
                or "none"
            )
        ),
    }


def _ask(question: Callable[[], str]) -> str:
    """One answer of the driver; many cards answer only some questions."""
    try:
        return question()
    except pynvml.NVMLError:
        return "not reported"
