"""How often the gate on the speed-up decides, and how, by simulation of pairs of reports.

Run with `python benchmarks/gate_power.py`. Runs have independent noise; what a busy machine does in
bursts is not in it, so a real gate leaves more open. The last line is JSON.
"""

import argparse
import json
from collections import Counter

import numpy as np
import numpy.typing as npt

from prox24_deploy.config.limits import DEFAULT_METRICS, limits_of
from prox24_deploy.core.intervals import judge, ratio_of_intervals
from prox24_deploy.core.records import Interval
from prox24_deploy.core.types import Verdict
from prox24_deploy.latency.measure import DEFAULT_OPTIONS, PairSamples, speedup_interval

NOISE = 0.05
ROUNDS = (DEFAULT_OPTIONS.min_rounds, 200, DEFAULT_OPTIONS.max_rounds)
SLOWDOWNS = (0.0, 0.03, 0.05)


def speed_up(random: np.random.Generator, rounds: int, slowdown: float, seed: int) -> Interval:
    """What one report says: `rounds` of both twins, the sparse one slower by `slowdown`."""
    draw: npt.NDArray[np.float64] = 1 + random.gamma(4.0, NOISE / 2, (2, rounds, 1))
    return speedup_interval(PairSamples(draw[0], draw[1] * (1 + slowdown)), seed=seed)


def verdict(rounds: int, slowdown: float, limit: float, seed: int) -> Verdict:
    """The gate on a new report, slower by `slowdown`, against a baseline that is not."""
    random = np.random.default_rng([seed, rounds])
    new, old = (speed_up(random, rounds, slow, seed) for slow in (slowdown, 0.0))
    ratio = ratio_of_intervals(new, old)
    return judge(Interval(value=1 - ratio.value, low=1 - ratio.high, high=1 - ratio.low), limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=200)
    pairs = parser.parse_args().pairs
    gate = limits_of(DEFAULT_METRICS, "speed-up/any")
    assert gate is not None
    assert gate.max_degradation_percent is not None
    limit = gate.max_degradation_percent / 100
    rows = []
    print(f"| rounds | slower by | fail | inconclusive | pass |  of {pairs}, limit {limit:.0%}")
    for rounds in ROUNDS:
        for slowdown in SLOWDOWNS:
            found = Counter(verdict(rounds, slowdown, limit, seed) for seed in range(pairs))
            shares = {name: found[name] / pairs for name in ("fail", "inconclusive", "pass")}
            cells = " | ".join(f"{share:.0%}" for share in shares.values())
            print(f"| {rounds} | {slowdown:.0%} | {cells} |")
            rows.append({"rounds": rounds, "slowdown": slowdown, **shares})
            wrong = shares["pass"] if 1 - 1 / (1 + slowdown) > limit else shares["fail"]
            assert wrong <= 0.05, rows[-1]
    print(json.dumps({"benchmark": "gate_power", "noise": NOISE, "pairs": pairs, "rows": rows}))


if __name__ == "__main__":
    main()
