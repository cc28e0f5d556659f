"""Which backend a name selects, and what is said of a name that selects none."""

import subprocess
import sys

import pytest

from prox24_deploy.engines import AVAILABLE_BACKENDS, backend_by_name
from prox24_deploy.errors import BackendMissingError, Prox24Error, UsageError

AVAILABLE = "onnxruntime, tensorrt, tensorrt-rtx"


def refused(name: str) -> Prox24Error:
    with pytest.raises(Prox24Error) as caught:
        backend_by_name(name)
    return caught.value


@pytest.mark.parametrize("name", AVAILABLE_BACKENDS)
def test_an_available_backend_bears_the_name_it_is_chosen_by(name: str) -> None:
    try:
        backend = backend_by_name(name)
    except BackendMissingError as error:
        pytest.skip(f"needs what backend {name} needs: {error}")
    assert backend.name == name
    assert backend.device()


def test_auto_is_one_of_the_available_backends_and_always_the_same() -> None:
    assert backend_by_name("auto") == backend_by_name("auto")
    assert backend_by_name("auto").name in AVAILABLE_BACKENDS


@pytest.mark.parametrize("name", ["cusparselt"])
def test_a_backend_of_a_later_version_is_missing_and_no_usage_error(name: str) -> None:
    error = refused(name)
    assert type(error) is BackendMissingError
    assert str(error) == f"Backend {name!r} is not part of this version; available: {AVAILABLE}."


# Names are matched whole: no case folding, no prefixes, no spaces.
@pytest.mark.parametrize("name", ["openvino", "", "ONNXRuntime", "onnx", " auto", "tensorrt_rtx"])
def test_an_unknown_name_is_a_usage_error_that_lists_the_names(name: str) -> None:
    error = refused(name)
    assert type(error) is UsageError
    assert str(error) == f"Backend {name!r} does not exist; pass one of auto, {AVAILABLE}."


def test_no_engine_is_loaded_before_it_is_chosen() -> None:
    """Also not for the message of a missing one: it must appear where nothing is installed."""
    code = (
        "import sys; sys.modules['onnxruntime'] = sys.modules['tensorrt'] = None\n"
        "from prox24_deploy.engines import backend_by_name\n"
        "from prox24_deploy.errors import BackendMissingError\n"
        "try: backend_by_name('tensorrt')\n"
        "except BackendMissingError: print('missing')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "missing\n"
