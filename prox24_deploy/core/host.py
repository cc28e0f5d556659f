"""What the host machine is, in words."""

import math
import os
import platform
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pynvml

CPUINFO = Path("/proc/cpuinfo")
CGROUP = Path("/sys/fs/cgroup")
GIB = 2**30


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
    """Name, compute capability and driver of `first_gpu`; says so if there is none."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {"gpu": "none"}
    try:
        handle = first_gpu()
        if handle is None:
            return {"gpu": "none"}
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


def first_gpu() -> Any:
    """NVML's handle of the first GPU that CUDA shows this process, None if it is shown none.

    NVML, which must be open, knows all GPUs of the machine. CUDA_VISIBLE_DEVICES names those that
    are shown, by number or by the beginning of a UUID, up to the first that is neither; of a part
    of a GPU it is the whole. Numbers are NVML's if all cards are of a kind, or with
    CUDA_DEVICE_ORDER=PCI_BUS_ID.

    Raises:
        pynvml.NVMLError: it does not answer.
    """
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if shown.isdecimal():
        number = int(shown)
        there = number < pynvml.nvmlDeviceGetCount()
        return pynvml.nvmlDeviceGetHandleByIndex(number) if there else None
    if shown.startswith("MIG-"):
        part = pynvml.nvmlDeviceGetHandleByUUID(shown)
        return pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(part)
    if not shown.startswith("GPU-"):
        return None
    for number in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(number)
        if pynvml.nvmlDeviceGetUUID(handle).startswith(shown):
            return handle
    return None


def gib(size: float) -> str:
    """A number of bytes as people say it."""
    return f"{size / GIB:.1f} GiB"


def gib_needed(size: float) -> str:
    """A number of bytes that will do, rounded up to a hundredth."""
    return f"{math.ceil(100 * size / GIB) / 100:.2f} GiB"


def gib_free(size: float) -> str:
    """A number of bytes that are there, rounded down to a hundredth."""
    # A hundredth itself is less than one, by what is left out of a whole number of bytes.
    return f"{math.floor(100 * (size + 1) / GIB) / 100:.2f} GiB"


def gib_of(parts: Mapping[str, int]) -> str:
    """What some numbers of bytes come to, and each of them that is not 0, by name."""
    told = ", ".join(f"{name} {size / GIB:.3g}" for name, size in parts.items() if size)
    return f"{sum(parts.values()) / GIB:.3g} GiB ({told})"


def room_in(folder: Path) -> float:
    """Bytes that may be written into a folder, which need not be there yet.

    What it holds counts as room, for it is of an earlier run that goes on or is replaced. Infinite
    where the file system does not say how large it is.
    """
    path = folder.absolute()
    there = next(each for each in (path, *path.parents) if each.is_dir())
    disk = shutil.disk_usage(there)
    return disk.free + _held(folder) if disk.total else math.inf


def _held(folder: Path) -> int:
    """Bytes of the files in a folder, which another run may just remove."""
    held = 0
    for inner, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                held += (Path(inner) / name).lstat().st_size
    return held


def free_memory(cgroup: Path = CGROUP) -> int:
    """Bytes that a process on this host, or in this container, may still take."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    # Without a limit the file says "max".
    return min(free, max(int(limit) - used + _cached(cgroup), 0)) if limit.isdigit() else free


def _cached(cgroup: Path) -> int:
    """What the kernel keeps of files, which counts as used and is given up when it is needed."""
    try:
        lines = (cgroup / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
