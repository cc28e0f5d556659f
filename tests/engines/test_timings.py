"""What was timed once on a GPU is known to later builds, and nothing else is."""

from dataclasses import replace
from pathlib import Path

import pytest

from prox24_deploy.engines.cusparselt.profile import GemmShape, GemmTiming, GpuProfile
from prox24_deploy.engines.cusparselt.timings import remember, remembered

HERE = GpuProfile("a card", "1.0", "float16", {"torch": "2.13"}, ())
FIRST = GemmTiming(GemmShape(64, 64, 8), 10.0, 8.0, 3)
SECOND = GemmTiming(GemmShape(64, 128, 8), 20.0, 12.0, 1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "prox24-deploy"


def test_timings_add_up_over_builds() -> None:
    assert remembered(HERE) == HERE
    remember(replace(HERE, gemms=(FIRST,)))
    remember(replace(HERE, gemms=(SECOND,)))
    assert remembered(HERE).gemms == (FIRST, SECOND)


@pytest.mark.parametrize(
    "other",
    [
        replace(HERE, gpu="another card"),
        replace(HERE, driver="2.0"),
        replace(HERE, dtype="bfloat16"),
        replace(HERE, versions={"torch": "2.14"}),
    ],
)
def test_timings_of_another_machine_are_not_used(other: GpuProfile) -> None:
    remember(replace(HERE, gemms=(FIRST,)))
    assert remembered(other) == other


def test_a_damaged_file_is_measured_again_and_replaced(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remember(replace(HERE, gemms=(FIRST,)))
    (file,) = cache.iterdir()
    file.write_text("{")
    assert remembered(HERE) == HERE
    assert "are measured again" in caplog.text
    remember(replace(HERE, gemms=(SECOND,)))
    assert remembered(HERE).gemms == (SECOND,)


def test_a_cache_that_cannot_be_written_is_told_and_stops_nothing(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("in the way")
    remember(replace(HERE, gemms=(FIRST,)))
    assert "are not kept for later builds" in caplog.text
    assert remembered(HERE) == HERE
