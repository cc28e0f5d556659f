"""What the host machine is, in words."""

import platform
from pathlib import Path

import pynvml

CPUINFO = Path("/proc/cpuinfo")


def cpu_model(cpuinfo: Path = CPUINFO) -> str:
    """Marketing name of the processor, or its architecture where the system does not tell."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine() or "unknown processor"


def gpu() -> dict[str, str]:
    """Name, compute capability and driver of the first NVIDIA GPU; says so if there is none."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {"gpu": "none"}
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        return {
            "gpu": str(pynvml.nvmlDeviceGetName(handle)),
            "compute capability": f"{major}.{minor}",
            "driver": str(pynvml.nvmlSystemGetDriverVersion()),
        }
    except pynvml.NVMLError as error:
        return {"gpu": f"not readable ({error})"}
    finally:
        pynvml.nvmlShutdown()
