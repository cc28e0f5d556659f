"""Clock and throttling of the GPU while something is timed on it."""

from contextlib import suppress
from types import TracebackType
from typing import Any

import pynvml

from prox24_deploy.core.host import first_gpu
from prox24_deploy.core.records import Clocks

# Why a clock is not higher, in NVML's order of bits.
_REASONS = {
    "idle": pynvml.nvmlClocksThrottleReasonGpuIdle,
    "application clocks": pynvml.nvmlClocksThrottleReasonApplicationsClocksSetting,
    "power cap": pynvml.nvmlClocksThrottleReasonSwPowerCap,
    "hardware slowdown": pynvml.nvmlClocksThrottleReasonHwSlowdown,
    "sync boost": pynvml.nvmlClocksThrottleReasonSyncBoost,
    "software thermal": pynvml.nvmlClocksThrottleReasonSwThermalSlowdown,
    "hardware thermal": pynvml.nvmlClocksThrottleReasonHwThermalSlowdown,
    "power brake": pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
    "display clocks": pynvml.nvmlClocksThrottleReasonDisplayClockSetting,
}
# An idle GPU and clocks set by the user are no throttling.
_THROTTLING = (
    "power cap",
    "hardware slowdown",
    "software thermal",
    "hardware thermal",
    "power brake",
)


def throttle_reasons(bits: int) -> tuple[str, ...]:
    """Every reason that NVML's bits name, throttling or not."""
    return tuple(name for name, bit in _REASONS.items() if bits & bit)


class ClockWatch:
    """Samples the GPU in use between timed runs; sees nothing where there is none."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._clocks: list[int] = []
        self._bits = 0

    def __enter__(self) -> "ClockWatch":
        """Open the driver's interface, if there is one."""
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return self
        with suppress(pynvml.NVMLError):
            self._handle = first_gpu()
        if self._handle is None:
            pynvml.nvmlShutdown()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        if self._handle is not None:
            self._handle = None
            pynvml.nvmlShutdown()

    def sample(self) -> None:
        """Note the clock of the multiprocessors and why it is not higher."""
        if self._handle is None:
            return
        try:
            self._clocks.append(
                int(pynvml.nvmlDeviceGetClockInfo(self._handle, pynvml.NVML_CLOCK_SM))
            )
            self._bits |= int(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle))
        except pynvml.NVMLError:
            # A card that does not answer once never does; the record then says nothing.
            self._clocks.clear()
            self._handle = None
            pynvml.nvmlShutdown()

    def take(self) -> Clocks | None:
        """What was seen since the last call; None without a GPU that tells."""
        if not self._clocks:
            return None
        throttling = tuple(r for r in throttle_reasons(self._bits) if r in _THROTTLING)
        found = Clocks(
            sm_mhz_low=min(self._clocks), sm_mhz_high=max(self._clocks), slowed_by=throttling
        )
        self._clocks, self._bits = [], 0
        return found
