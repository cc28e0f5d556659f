"""What `doctor` finds; NVML is replaced where it meets the driver, which CI does not have."""

from types import SimpleNamespace

import pynvml
import pytest

from prox24_deploy.release.environment import diagnose, gpu, machine, versions


def fake_nvml(monkeypatch: pytest.MonkeyPatch, **functions: object) -> None:
    for name, function in functions.items():
        monkeypatch.setattr(pynvml, name, function)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)


def no_driver() -> None:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


def test_versions_name_everything_that_shapes_a_result() -> None:
    found = versions()
    assert {"prox24-deploy", "python", "torch", "transformers", "onnx", "onnxruntime"} <= set(found)
    assert "not installed" not in found.values()


def test_no_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(monkeypatch, nvmlInit=no_driver)
    assert gpu() == {"gpu": "none"}
    assert machine()["gpu"] == "none"


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(
        monkeypatch,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda _: SimpleNamespace(),
        nvmlDeviceGetCudaComputeCapability=lambda _: (9, 0),
        nvmlDeviceGetName=lambda _: "NVIDIA H200",
        nvmlSystemGetDriverVersion=lambda: "580.1",
    )
    assert gpu() == {"gpu": "NVIDIA H200", "compute capability": "9.0", "driver": "580.1"}
    remedies = {finding.name: finding for finding in diagnose()}
    assert remedies["GPU"].usable


def test_a_gpu_that_does_not_answer_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: int) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    fake_nvml(monkeypatch, nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=lost)
    assert gpu()["gpu"].startswith("not readable (")


def test_whatever_is_missing_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(monkeypatch, nvmlInit=no_driver)
    findings = diagnose()
    names = [finding.name for finding in findings]
    assert len(names) == len(set(names))
    assert {"GPU", "torch CUDA", "cuSPARSELt", "ONNX Runtime providers", "tensorrt"} <= set(names)
    for finding in findings:
        assert finding.found
        assert finding.usable or finding.remedy, finding.name


def test_a_package_that_is_not_there_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from prox24_deploy.release import environment

    monkeypatch.setattr(environment, "_PACKAGES", ("torch", "no-such-package"))
    assert versions()["no-such-package"] == "not installed"
