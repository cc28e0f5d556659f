"""What is noted of the GPU's clock, on a stand-in for the driver's interface."""

from dataclasses import replace

import pynvml
import pytest
from builders import make_records

from prox24_deploy.core.records import Clocks
from prox24_deploy.latency.clocks import ClockWatch
from prox24_deploy.report.checks import _clock_warnings

ROW = make_records().bench.latency[0]
POWER, IDLE = pynvml.nvmlClocksThrottleReasonSwPowerCap, pynvml.nvmlClocksThrottleReasonGpuIdle


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Clocks and reasons that the stand-in will tell, one pair for each sample."""
    told: list[tuple[int, int]] = []
    reasons: list[int] = []

    def clock(handle: object, kind: int) -> int:
        if not told:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        mhz, bits = told.pop(0)
        reasons.append(bits)
        return mhz

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 1)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: "a card")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetClockInfo", clock)
    monkeypatch.setattr(
        pynvml, "nvmlDeviceGetCurrentClocksThrottleReasons", lambda handle: reasons[-1]
    )
    return told


def test_range_and_reasons_are_those_since_the_last_look(driver: list[tuple[int, int]]) -> None:
    driver += [(1980, IDLE), (1755, POWER), (1905, 0), (1980, IDLE)]
    with ClockWatch() as watch:
        for _ in range(3):
            watch.sample()
        assert watch.take() == Clocks(sm_mhz_low=1755, sm_mhz_high=1980, slowed_by=("power cap",))
        assert watch.take() is None
        watch.sample()
        assert watch.take() == Clocks(sm_mhz_low=1980, sm_mhz_high=1980, slowed_by=())


def test_a_card_that_stops_answering_is_not_quoted(driver: list[tuple[int, int]]) -> None:
    driver += [(1980, 0)]
    with ClockWatch() as watch:
        watch.sample()
        watch.sample()
        watch.sample()
        assert watch.take() is None


def test_without_a_driver_nothing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    with ClockWatch() as watch:
        watch.sample()
        assert watch.take() is None


@pytest.mark.parametrize(
    ("clocks", "words"),
    [
        (None, None),
        (Clocks(sm_mhz_low=1950, sm_mhz_high=1980, slowed_by=()), None),
        (
            Clocks(sm_mhz_low=1200, sm_mhz_high=1980, slowed_by=()),
            "The GPU ran at 1200 to 1980 MHz while ",
        ),
        (
            Clocks(sm_mhz_low=1950, sm_mhz_high=1980, slowed_by=("power cap", "power brake")),
            "slowed by power cap and power brake",
        ),
    ],
)
def test_an_unsteady_clock_is_a_warning(clocks: Clocks | None, words: str | None) -> None:
    found = list(_clock_warnings([replace(ROW, clocks=clocks)]))
    assert len(found) == (words is not None)
    assert words is None or words in found[0]
