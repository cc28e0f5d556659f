"""Numbers, sizes, times and names as every view of a report shows them."""

import math
import re
from pathlib import PurePosixPath

from prox24_deploy.core.intervals import NO_ERROR
from prox24_deploy.core.records import Estimate, Interval

# A departure below this that is within its tolerance is told from none, and no more.
TINY = 1e-3
_ABSOLUTE = re.compile(r"~?/")


def number(value: float | None) -> str:
    """Four significant digits; a dash for what is not known."""
    return "–" if value is None else f"{value:.4g}".replace("-", "−")


def estimate(value: Estimate | None) -> str:
    """Value and standard error, rounded to two digits of the error; one that small is left out."""
    if value is None:
        return "–"
    error = value.standard_error
    if error < NO_ERROR:
        return number(value.value)
    digits = max(1 - math.floor(math.log10(error)), 0)
    return f"{value.value:.{digits}f} ± {error:.{digits}f}".replace("-", "−")


def departure(value: Estimate | None, *, within: bool) -> str:
    """How far an engine is from PyTorch; what is `within` its tolerance and tiny has no digits."""
    if value is not None and within and 0 < abs(value.value) < TINY:
        return f"< {TINY:g}"
    return estimate(value)


def ratio(value: Interval) -> str:
    """Speed-up with its interval."""
    return f"{value.value:.3f}× ({value.low:.3f} to {value.high:.3f})"


def size(value: float) -> str:
    """Bytes in units of 1024."""
    for unit in ("bytes", "KiB", "MiB"):
        # What rounds to 1024 is one of the next unit.
        if value < 1023.5:
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} GiB" if value < 1000 else f"{value:,.0f} GiB"


def amount(value: float | None, unit: str) -> str:
    """A figure of a comparison with its unit: bytes as a size, anything else as a number."""
    if value is None:
        return number(value)
    return size(value) if unit == "bytes" else with_unit(number(value), unit)


def with_unit(number: str, unit: str) -> str:
    """A number as text in front of its unit, "" for none."""
    return f"{number}{unit}" if unit in {"", "×"} else f"{number} {unit}"


def count(value: float) -> str:
    """A number with its thousands apart."""
    return f"{value:,}"


def pace(value: float | None) -> str:
    """Tokens by the second; a dash for a graph that reads none."""
    return "–" if value is None else f"{value:,.0f}"


def seconds(value: float) -> str:
    """A duration in the unit that suits it."""
    if value < 120:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"


def percent(value: float | None) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{100 * value:.1f} %"


def shape(value: tuple[int, ...]) -> str:
    """Extents with times signs."""
    return " × ".join(str(extent) for extent in value)


def known(value: object) -> str:
    """Yes, no or, for None, unknown."""
    return "unknown" if value is None else "yes" if value else "no"


def place(text: str) -> str:
    """A path as others may see it: of one of this machine, what the folders of no user are in."""
    return PurePosixPath(text).name if _ABSOLUTE.match(text) else text
