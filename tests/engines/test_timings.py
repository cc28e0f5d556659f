"""What was timed once on a GPU is known to later builds, and nothing else is."""

from dataclasses import replace
from pathlib import Path

import pytest

from prox24_deploy.engines.cusparselt.profile import GemmShape, GemmTiming, GpuProfile
from prox24_deploy.engines.cusparselt.timings import remember, remembered

HERE = GpuProfile(gpu="a card", driver="1.0", versions={"torch": "2.13"}, gemms=())
FIRST = GemmTiming(shape=GemmShape(n=64, k=64, m=8), dense_us=10.0, sparse_us=8.0, algorithm=3)
SECOND = GemmTiming(shape=GemmShape(n=64, k=128, m=8), dense_us=20.0, sparse_us=12.0, algorithm=1)


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
    (file,) = cache.glob("gemms-*.json")
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


def test_a_user_without_a_home_builds_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    # The specification says of a relative path that it is to be ignored.
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setattr(Path, "home", homeless)
    assert remembered(HERE) == HERE
    remember(replace(HERE, gemms=(FIRST,)))
    assert caplog.text.count("Could not determine home directory") == 2
    assert not Path("here").exists()


def test_a_folder_that_may_not_be_searched_is_as_good_as_none(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", denied)
    assert remembered(HERE) == HERE
