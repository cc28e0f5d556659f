"""What `doctor` finds; NVML is replaced where it meets the driver, which CI does not have."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pynvml
import pytest
import torch

from prox24_deploy import __version__
from prox24_deploy.bundle import environment
from prox24_deploy.bundle.environment import Diagnosis, diagnose, machine, versions
from prox24_deploy.core.host import gpu
from prox24_deploy.latency.clocks import ClockWatch

HANDLE = SimpleNamespace()


def fake_nvml(monkeypatch: pytest.MonkeyPatch, **functions: object) -> mock.Mock:
    """Replace functions of NVML; returns the mock that stands for its shutdown."""
    for name, function in functions.items():
        monkeypatch.setattr(pynvml, name, function)
    shutdown = mock.Mock()
    monkeypatch.setattr(pynvml, "nvmlShutdown", shutdown)
    return shutdown


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """A machine without an NVIDIA driver."""

    def no_driver() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    return fake_nvml(monkeypatch, nvmlInit=no_driver)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """A machine with one readable GPU."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake_nvml(
        monkeypatch,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex={0: HANDLE}.__getitem__,
        nvmlDeviceGetCudaComputeCapability=lambda handle: (9, 0) if handle is HANDLE else (0, 0),
        nvmlDeviceGetName=lambda handle: "NVIDIA H200" if handle is HANDLE else "?",
        nvmlSystemGetDriverVersion=lambda: "580.1",
    )


def found(name: str) -> Diagnosis:
    """The one finding of that name."""
    (finding,) = [finding for finding in diagnose() if finding.name == name]
    return finding


def test_versions_name_everything_that_shapes_a_result() -> None:
    assert versions() == {
        "prox24-deploy": __version__,
        "python": platform.python_version(),
        **{
            name: importlib.metadata.version(name)
            for name in (
                "torch", "transformers", "numpy", "numba", "onnx", "onnxscript", "onnx-ir",
                "onnxruntime", "safetensors",
            )
        },
    }  # fmt: skip


def test_the_machine_is_described_in_words(
    one_gpu: mock.Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"SC_PAGE_SIZE": 2**12, "SC_PHYS_PAGES": 3 * 2**18}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    monkeypatch.setattr(os, "sched_getaffinity", {0: {1, 4, 5}}.__getitem__)
    described = machine()
    assert described.pop("system").startswith("Linux ")
    assert described.pop("processor") == found("processor").found
    assert described == {"cores": "3", "memory": "3 GiB"} | gpu()


def test_no_driver_is_no_gpu(no_gpu: mock.Mock) -> None:
    assert gpu() == {"gpu": "none"}
    assert machine()["gpu"] == "none"
    # What was never opened must not be closed: NVML answers with an error.
    no_gpu.assert_not_called()
    assert found("GPU") == Diagnosis(
        name="GPU", found="none", usable=False, remedy="pruning and ONNX Runtime run without"
    )


def test_a_gpu_is_described(one_gpu: mock.Mock) -> None:
    assert gpu() == {"gpu": "NVIDIA H200", "compute capability": "9.0", "driver": "580.1"}
    one_gpu.assert_called_once_with()
    finding = found("GPU")
    assert (finding.usable, finding.found) == (True, "NVIDIA H200, 9.0, 580.1")


@pytest.mark.parametrize(
    ("shown", "seen"),
    [
        (None, "card 0"), ("0,1", "card 0"), ("2", "card 2"), (" 1 ,0", "card 1"),
        ("GPU-1b2c", "card 1"), ("GPU-1", "card 1"), ("GPU-9", "none"),
        ("MIG-77", "card of MIG-77"), ("", "none"), ("-1", "none"), ("-1,0", "none"), ("3", "none"),
        ("NoDevFiles", "none"),
    ],
)  # fmt: skip
def test_the_gpu_is_the_first_that_cuda_shows(
    shown: str | None, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = fake_nvml(
        monkeypatch,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=lambda index: f"card {index}",
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetDeviceHandleFromMigDeviceHandle=lambda part: f"card of {part}",
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle[-1]}b2c3d4e",
        nvmlDeviceGetCudaComputeCapability=lambda _: (9, 0),
        nvmlDeviceGetName=lambda handle: handle,
        nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetClockInfo=lambda handle, _: {"card 2": 1200}.get(handle, 1980),
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda _: 0,
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert gpu()["gpu"] == seen
    with ClockWatch() as watch:
        watch.sample()
        clocks = watch.take()
    assert (clocks.sm_mhz_low if clocks else None) == {"none": None, "card 2": 1200}.get(seen, 1980)
    assert closed.call_count == 2


@pytest.mark.parametrize("name", ["nvmlDeviceGetHandleByIndex", "nvmlDeviceGetName"])
def test_a_gpu_that_does_not_answer_is_said_to_be_so(
    one_gpu: mock.Mock, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(_: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, name, lost)
    assert gpu() == {"gpu": f"not readable ({pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)})"}
    one_gpu.assert_called_once_with()
    assert not found("GPU").usable


def test_whatever_is_missing_has_a_remedy(no_gpu: mock.Mock) -> None:
    findings = diagnose()
    names = [finding.name for finding in findings]
    assert len(names) == len(set(names))
    assert set(versions()) <= set(names)
    assert set(names) - set(versions()) == {
        "processor", "GPU", "torch CUDA", "cuSPARSELt", "ONNX Runtime providers", "tensorrt",
        "tensorrt_rtx", "2:4 in NVFP4", "pyarrow", "pillow", "soundfile", "soxr",
        "cyclonedx-python-lib", "lm-eval",
    }  # fmt: skip
    for finding in findings:
        assert finding.found
        assert finding.usable or finding.remedy, finding.name
    assert "CPUExecutionProvider" in found("ONNX Runtime providers").found


def absent(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


def test_every_extra_is_one_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    monkeypatch.setattr(importlib.metadata, "version", absent)
    for finding in (f for f in diagnose() if f.use):
        (extra,) = re.findall(r"pip install 'prox24-deploy\[(.*)\]'", finding.remedy)
        brought = [re.split(r"[\[>]", line)[0] for line in project["optional-dependencies"][extra]]
        assert finding.name.replace("-", "_") in {name.replace("-", "_") for name in brought}
        assert (finding.found, finding.usable) == ("not installed", False)


def test_a_package_that_is_not_there_is_named_with_the_line_that_installs_it(
    no_gpu: mock.Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "_PACKAGES", ("torch", "no-such-package"))
    assert versions()["no-such-package"] == "not installed"
    expected = Diagnosis(
        name="no-such-package",
        found="not installed",
        usable=False,
        remedy="pip install no-such-package",
    )
    assert found("no-such-package") == expected
    assert found("torch").usable


@pytest.mark.parametrize(
    ("module", "lines"),
    [("torch", ["torch CUDA", "cuSPARSELt"]), ("onnxruntime", ["ONNX Runtime providers"])],
)
def test_a_library_that_cannot_be_imported_does_not_stop_the_diagnosis(
    no_gpu: mock.Mock, module: str, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for line in lines:
        assert not found(line).usable
        assert found(line).remedy


def test_cuda_and_cusparselt_are_told_as_torch_tells_them(
    one_gpu: mock.Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 712)
    assert (found("torch CUDA").found, found("torch CUDA").usable) == ("13.0", True)
    assert (found("cuSPARSELt").found, found("cuSPARSELt").usable) == ("0.7.12", True)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 12003)
    assert found("cuSPARSELt").found == "12.0.3"


@pytest.mark.parametrize("name", ["torch CUDA", "cuSPARSELt"])
def test_a_cpu_build_of_torch_is_blamed_only_where_a_gpu_is_there(
    name: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    # A library that cannot be used must not look usable by its version.
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 602)
    request.getfixturevalue("no_gpu")
    assert found(name).remedy.startswith("needs an NVIDIA GPU")
    request.getfixturevalue("one_gpu")
    assert found(name).remedy == "install a CUDA build of torch"
    expected = {"torch CUDA": "CPU build", "cuSPARSELt": "not available"}
    assert (found(name).found, found(name).usable) == (expected[name], False)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed modules that must not be imported, only found."""
    for name in ("tensorrt", "tensorrt_rtx"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemError", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def install(site: Path, distribution: str, version: str) -> None:
    folder = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n", encoding="utf-8"
    )


def test_an_engine_library_is_found_without_importing_it(one_gpu: mock.Mock, site: Path) -> None:
    install(site, "tensorrt", "10.16.1")
    install(site, "tensorrt-rtx", "1.5.0")
    for name, version in (("tensorrt", "10.16.1"), ("tensorrt_rtx", "1.5.0")):
        assert (found(name).found, found(name).usable) == (version, True)


def test_tensorrt_is_not_usable_without_a_gpu_and_tensorrt_rtx_is(
    no_gpu: mock.Mock, site: Path
) -> None:
    install(site, "tensorrt", "10.16.1")
    finding = found("tensorrt")
    assert (finding.found, finding.usable) == ("10.16.1", False)
    assert finding.remedy == "builds on an NVIDIA GPU, and there is none"
    assert found("tensorrt_rtx").usable


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_an_engine_library_that_is_missing_comes_with_the_line_that_installs_it(
    no_gpu: mock.Mock, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    finding = found(name)
    assert (finding.found, finding.usable) == ("not installed", False)
    assert finding.remedy == f"pip install 'prox24-deploy[{name.replace('_', '-')}]'"


def test_an_engine_library_without_what_drives_it_is_not_usable(
    one_gpu: mock.Mock, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(site, "tensorrt-cu13", "10.16.1")
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    finding = found("tensorrt")
    assert finding.found.endswith(", without polygraphy")
    assert not finding.usable
    assert finding.remedy.startswith("pip install 'prox24-deploy[tensorrt]'")


def test_an_engine_library_from_another_distribution_is_usable(
    one_gpu: mock.Mock, site: Path
) -> None:
    """`pip install tensorrt-cu13`, the remedy itself, installs no distribution `tensorrt`."""
    install(site, "tensorrt-cu13", "10.16.1")
    for name in ("tensorrt", "tensorrt_rtx"):
        assert found(name).usable
        assert found(name).found
