"""Measured times of GEMMs on one GPU, in a file, so that a machine without that GPU can plan."""

import importlib.resources
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, PositiveInt, TypeAdapter

from prox24_deploy.core.atomic import write_atomic
from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.types import DType
from prox24_deploy.engines.cusparselt.plan_file import read_record

SCHEMA_VERSION = 3
_NEIGHBOURS = 4
# Bytes that no cache holds; published times are of operands that may lie in one.
_LARGE = 100_000_000
# Bytes moved to round a 16-bit value to 8 bits.
ROUNDED_BYTES = 3

# In what the operands of a GEMM are held.
GemmFormat = Literal["float16", "bfloat16", "fp8", "int8"]
GEMM_FORMATS: tuple[GemmFormat, ...] = get_args(GemmFormat)


def half_format(dtype: DType) -> GemmFormat:
    """The format of the GEMMs of a model as it is.

    Raises:
        UsageError: the model is float32, for which there are no sparse kernels.
    """
    if dtype == "float32":
        raise UsageError(
            "cuSPARSELt has no float32 kernels; plan for --dtype float16 or --dtype bfloat16."
        )
    return dtype


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class GemmShape:
    """Y (m, n) = X (m, k) Wᵀ: n outputs, k inputs of a linear layer, m rows of activations."""

    n: PositiveInt
    k: PositiveInt
    m: PositiveInt


# Text such as "1e999" is taken for a number, and for an infinite one.
_Microseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmTiming:
    """Microseconds of one GEMM: cuBLAS on the dense weight, cuSPARSELt on the 2:4 one.

    `format` is that of both operands; 8-bit ones give a 16-bit result. `sparse_us` is that of the
    fastest `algorithm`, by its number in cuSPARSELt. `measured` is False for an estimate from
    measurements of other shapes.
    """

    shape: GemmShape
    format: GemmFormat = "float16"
    dense_us: _Microseconds
    sparse_us: _Microseconds
    algorithm: int = 0
    measured: bool = True

    @property
    def speedup(self) -> float:
        """Dense over sparse time."""
        return self.dense_us / self.sparse_us


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProfile:
    """GEMM timings of one GPU, driver and set of library versions, in some formats.

    `published` says whose measurements these are, where they are not of this tool, and how they
    differ from its own; "" where they are. `copy_rate` is how fast a large tensor was copied, in
    bytes read and written per microsecond, None where nobody measured it.
    """

    gpu: str
    driver: str
    versions: dict[str, str]
    gemms: tuple[GemmTiming, ...]
    published: str = ""
    copy_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def formats(self) -> tuple[GemmFormat, ...]:
        """Those in which something was measured."""
        known = {timing.format for timing in self.gemms}
        return tuple(format for format in GEMM_FORMATS if format in known)

    @property
    def memory_rate(self) -> float:
        """Bytes per microsecond of the memory: as copied, else the most that any GEMM reached.

        The latter is a lower bound, by what has to be read and written at least. Where there are
        GEMMs that no cache holds, the smaller ones do not count.
        """
        large = [timing for timing in self.gemms if _least_bytes(timing) > _LARGE]
        return self.copy_rate or max(_least_bytes(t) / t.dense_us for t in large or self.gemms)

    def with_rounding(self, timing: GemmTiming) -> GemmTiming:
        """An 8-bit GEMM with the rounding of what it reads, an estimate: one pass over memory.

        Two bytes of each value are read and one is written. The scaling of sums counts nothing: a
        compiler fuses it into what reads them.
        """
        shape = timing.shape
        extra = ROUNDED_BYTES * shape.m * shape.k / self.memory_rate
        return replace(timing, dense_us=timing.dense_us + extra, sparse_us=timing.sparse_us + extra)

    def timing(self, shape: GemmShape, format: GemmFormat = "float16") -> GemmTiming:
        """What was measured for a shape in a format, else an estimate from the nearest shapes.

        Estimated are the rates, dense and sparse, as means over the four nearest shapes in
        log-coordinates, each weighted by one over its squared distance.

        Raises:
            UsageError: the profile has nothing in that format.
        """
        alike = [timing for timing in self.gemms if timing.format == format]
        if not alike:
            raise UsageError(
                f"The profile of {self.gpu} holds no measurement in {format}, only in "
                f"{', '.join(self.formats) or 'no format at all'}; plan for another --dtype, or "
                "measure one on that GPU with plan --save-profile."
            )
        known = [(_distance(shape, timing.shape), timing) for timing in alike]
        nearest = sorted(known, key=lambda pair: (pair[0], pair[1].shape))[:_NEIGHBOURS]
        if nearest[0][0] == 0:
            return nearest[0][1]
        weights = [1 / distance for distance, _ in nearest]

        def time_us(times: Iterable[tuple[GemmShape, float]]) -> float:
            rates = [math.log(_work(other) / us) for other, us in times]
            mean = math.fsum(w * r for w, r in zip(weights, rates, strict=True)) / sum(weights)
            return _work(shape) / math.exp(mean)

        return GemmTiming(
            shape=shape,
            format=format,
            dense_us=time_us((timing.shape, timing.dense_us) for _, timing in nearest),
            sparse_us=time_us((timing.shape, timing.sparse_us) for _, timing in nearest),
            measured=False,
        )

    def stretch(self, shape: GemmShape, format: GemmFormat) -> float:
        """How many times larger or smaller in a size the nearest measured shape is, at least 1."""
        alike = [timing.shape for timing in self.gemms if timing.format == format]
        nearest = min(alike, key=lambda other: (_distance(shape, other), other))
        pairs = ((shape.n, nearest.n), (shape.k, nearest.k), (shape.m, nearest.m))
        return max(max(a / b, b / a) for a, b in pairs)

    def known(self, shape: GemmShape, format: GemmFormat = "float16") -> GemmTiming | None:
        """What was measured for exactly this shape in this format."""
        alike = (t for t in self.gemms if (t.shape, t.format) == (shape, format))
        return next(alike, None)

    def with_timings(self, found: Iterable[GemmTiming]) -> "GpuProfile":
        """The same profile with further measurements; a shape known already is replaced."""
        merged = {(timing.format, timing.shape): timing for timing in (*self.gemms, *found)}
        return replace(self, gemms=tuple(merged[key] for key in sorted(merged)))

    def fits(self, other: "GpuProfile") -> bool:
        """Whether timings of both can be mixed: same GPU, driver and versions."""
        mine, others = (replace(each, gemms=(), copy_rate=None) for each in (self, other))
        return mine == others


def _least_bytes(timing: GemmTiming) -> int:
    """What a dense GEMM moves at least: operands read once, a 16-bit result written."""
    shape, operand = timing.shape, 1 if timing.format in {"fp8", "int8"} else 2
    return operand * shape.k * (shape.n + shape.m) + 2 * shape.m * shape.n


_RECORD = TypeAdapter(GpuProfile)


def shipped_profiles() -> dict[str, Traversable]:
    """File name -> profile, of the GPUs that came with this package."""
    folder = importlib.resources.files("prox24_deploy.engines.cusparselt") / "profiles"
    return {file.name: file for file in folder.iterdir() if file.name.endswith(".json")}


def read_profile(path: Path) -> GpuProfile:
    """Read a profile; where there is no such file, the shipped one of that bare name.

    Raises:
        UsageError: there is no such profile, or it is none of this version.
    """
    shipped = shipped_profiles()
    ours = not path.exists() and path == Path(path.name)
    return read_record(
        _RECORD,
        shipped.get(path.name, path) if ours else path,
        f"GPU profile {path}",
        SCHEMA_VERSION,
        missing="pass a file that plan --save-profile wrote on a machine with that GPU, or a "
        f"shipped one: {', '.join(sorted(shipped))}",
        again="plan --save-profile",
    )


def write_profile(profile: GpuProfile, path: Path) -> None:
    """Write a profile atomically."""
    write_atomic(path, _RECORD.dump_json(profile, indent=1) + b"\n")


def _distance(first: GemmShape, second: GemmShape) -> float:
    """Squared distance of the logarithms of the sizes."""
    pairs = ((first.n, second.n), (first.k, second.k), (first.m, second.m))
    return math.fsum(math.log2(a / b) ** 2 for a, b in pairs)


def _work(shape: GemmShape) -> float:
    return float(shape.n) * shape.k * shape.m
