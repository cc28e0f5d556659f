"""Does the measuring tell nothing where there is nothing, and something where there is?

    python benchmarks/measure_noise.py [--runs 100] [--seconds 2]

Times one ONNX Runtime engine on the CPU against itself, and then against a twin that waits 5 % of
the median after each run. Against itself, the 95 % interval must contain 1 in at least 95 of 100
runs and the verdict must never be "fail" more often than that allows; the planted slow-down must be
found. Prints one JSON line and fails if a bar is missed.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper, save

from prox24_deploy.core.records import Interval
from prox24_deploy.engines.base import Array, Feeds, Session
from prox24_deploy.engines.onnxruntime import PROVIDER, OrtSession
from prox24_deploy.latency.measure import (
    MeasureOptions,
    latency_verdict,
    measure_pair,
    speedup_interval,
)

WIDTH, LAYERS, ROWS = 512, 4, 64
LIMIT = 0.02
SLOWDOWN = 0.05
COVERAGE = 0.95


@dataclass(frozen=True, slots=True)
class Waiting:
    """A session that takes `extra_ms` longer for each run."""

    session: Session
    extra_ms: float

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        return self.session.infer(feeds)

    def latencies_ms(self, feeds: Feeds, *, runs: int, warmup: int) -> npt.NDArray[np.float64]:
        found = np.empty(runs, np.float64)
        self.session.latencies_ms(feeds, runs=1, warmup=warmup)
        for i in range(runs):
            began = time.perf_counter_ns()
            self.session.infer(feeds)
            wanted = time.perf_counter_ns() + self.extra_ms * 1e6
            while time.perf_counter_ns() < wanted:
                pass
            found[i] = (time.perf_counter_ns() - began) / 1e6
        return found


def open_session(path: Path) -> OrtSession:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    return OrtSession(ort.InferenceSession(path, settings, providers=[PROVIDER]), path.name)


def write_model(path: Path) -> None:
    """A chain of square MatMuls."""
    draw = np.random.default_rng(0)
    names = [f"x{i}" for i in range(LAYERS + 1)]
    shape: list[str | int | None] = ["rows", WIDTH]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names]
    weights = [
        numpy_helper.from_array(draw.standard_normal((WIDTH, WIDTH), np.float32) / 23, f"w{i}")
        for i in range(LAYERS)
    ]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(LAYERS)]
    graph = helper.make_graph(nodes, "chain", values[:1], values[-1:], weights)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


@dataclass(frozen=True, slots=True)
class Bench:
    """A session and inputs for it."""

    session: OrtSession
    feeds: list[dict[str, Array]]


@contextmanager
def bench() -> Iterator[Bench]:
    draw = np.random.default_rng(1)
    feeds = [{"x0": draw.standard_normal((ROWS, WIDTH), np.float32)} for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chain.onnx"
        write_model(path)
        yield Bench(open_session(path), feeds)


def against_itself(made: Bench, runs: int, options: MeasureOptions) -> list[Interval]:
    """The speed-up of a twin that is the same session, in each of `runs` measurements.

    Two sessions of one file may truly differ, by a per cent or so, by where their memory lies.
    """
    return [
        speedup_interval(measure_pair(made.session, made.session, made.feeds, options=options))
        for _ in range(runs)
    ]


def with_slowdown(
    made: Bench, runs: int, options: MeasureOptions, slowdown: float = SLOWDOWN
) -> list[Interval]:
    """The same of a twin that takes `slowdown` longer, as a fraction."""
    median = float(np.median(made.session.latencies_ms(made.feeds[0], runs=50, warmup=5)))
    twins = Waiting(made.session, 0.0), Waiting(made.session, slowdown * median)
    return [
        speedup_interval(measure_pair(*twins, made.feeds, options=options)) for _ in range(runs)
    ]


def verdicts(intervals: list[Interval]) -> Counter[str]:
    return Counter(latency_verdict(interval, LIMIT) for interval in intervals)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=2.0)
    arguments = parser.parse_args()
    options = MeasureOptions(seconds=arguments.seconds)
    with bench() as made:
        same = against_itself(made, arguments.runs, options)
        slower = with_slowdown(made, max(1, arguments.runs // 10), options)
    contained = sum(interval.low <= 1 <= interval.high for interval in same) / len(same)
    found = verdicts(slower)["fail"] / len(slower)
    width = float(np.median([interval.high - interval.low for interval in same]))
    result = {
        "benchmark": "measure_noise",
        "runs": arguments.runs,
        "contains_1": contained,
        "verdicts": verdicts(same),
        "interval_width": width,
        "slowdown_found": found,
    }
    print(json.dumps(result))
    faults = []
    if contained < COVERAGE:
        faults.append(f"the interval contains 1 in {contained:.0%} of the runs")
    if verdicts(same)["fail"] > (1 - COVERAGE) * len(same):
        faults.append(f"{verdicts(same)['fail']} of {len(same)} runs fail against themselves")
    if found < COVERAGE:
        faults.append(f"the planted slow-down is found in {found:.0%} of the runs")
    if faults:
        sys.exit("; ".join(faults))


if __name__ == "__main__":
    main()
