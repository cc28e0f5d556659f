"""Time dense against 2:4 GEMMs of the layer sizes that people ship, on the GPU at hand.

    python benchmarks/gemm_profile.py OUT [--formats float16,bfloat16,fp8,int8] [--layers 17]
        [--rows 16,128,512,1024,4096,16384] [--algorithms 5,6,22]

Writes a profile for `plan --gpu-profile OUT`, after each layer what is known so far, with the rate
of a copy, and prints a table of speed-ups for each format. What OUT holds already, of the same GPU
and versions, is not timed again. `--algorithms` times these alone, where all others are known to be
worse.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from prox24_deploy.engines.cusparselt.gemm import copy_rate, gpu_profile, measure_gemms
from prox24_deploy.engines.cusparselt.profile import (
    GEMM_FORMATS,
    GemmFormat,
    GemmShape,
    GpuProfile,
    read_profile,
    write_profile,
)

ROWS = (16, 128, 512, 1024, 4096, 16384)
# (N, K) of the layers of encoders of width 768 and 1024, and of decoders from 1 to 70 billion. The
# fourth is q, k and v of a decoder of 8 billion, the fifth its gate and up, as the engine merges
# them.
LAYERS = (
    (4096, 4096), (14336, 4096), (4096, 14336), (6144, 4096), (28672, 4096), (1024, 4096),
    (768, 768), (3072, 768), (768, 3072), (8192, 8192), (2048, 2048), (8192, 2048),
    (2048, 8192), (1024, 1024), (4096, 1024), (28672, 8192), (8192, 28672),
)  # fmt: skip


def known_at(path: Path) -> GpuProfile:
    """What a file holds of this GPU; an empty profile where it holds nothing."""
    here = gpu_profile()
    if not path.exists():
        return here
    known = read_profile(path)
    return known if known.fits(here) else here


def show(console: Console, profile: GpuProfile, format: GemmFormat, rows: list[int]) -> None:
    table = Table("N×K", *(f"M {m}" for m in rows), box=None, title=format)
    for n, k in LAYERS:
        found = [profile.known(GemmShape(n=n, k=k, m=m), format) for m in rows]
        if any(found):
            table.add_row(f"{n}×{k}", *(f"{t.speedup:.2f}×" if t else "–" for t in found))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--formats", default=",".join(GEMM_FORMATS))
    parser.add_argument("--layers", type=int, default=len(LAYERS), help="the first of the list")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--algorithms", help="numbers of those to time; default: all")
    arguments = parser.parse_args()
    began = time.perf_counter()
    tried = arguments.algorithms and {int(number) for number in arguments.algorithms.split(",")}
    asked = arguments.formats.split(",")
    formats = [format for format in GEMM_FORMATS if format in asked]
    rows = [int(m) for m in arguments.rows.split(",")]
    profile = known_at(arguments.out)
    profile = replace(profile, copy_rate=profile.copy_rate or copy_rate())
    console = Console(width=100)
    for n, k in LAYERS[: arguments.layers]:
        for format in formats:
            shapes = [GemmShape(n=n, k=k, m=m) for m in rows]
            profile = measure_gemms(profile, shapes, format, lambda *_: None, tried)
            write_profile(profile, arguments.out)
    for format in formats:
        show(console, profile, format, rows)
    seconds = time.perf_counter() - began
    found = {"gpu": profile.gpu, "gemms": len(profile.gemms), "seconds": seconds}
    print(json.dumps({"benchmark": "gemm_profile", **found}))


if __name__ == "__main__":
    main()
