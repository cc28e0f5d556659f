"""A process that has met no TensorRT yet, for tests with the stand-in."""

from collections.abc import Iterator

import fake_tensorrt
import pytest

from prox24_deploy.engines.tensorrt.library import SWITCH


def afresh_each_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No calls yet, and a Polygraphy that has met no library; a fixture yields from this."""
    fake_tensorrt.calls.clear()
    monkeypatch.delenv(SWITCH, raising=False)
    fake_tensorrt.forget_polygraphy()
    yield
    fake_tensorrt.forget_polygraphy()
