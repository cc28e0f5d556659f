"""Time dense against 2:4 GEMMs of the layer sizes that people ship, on the GPU at hand.

    python benchmarks/gemm_profile.py OUT [--dtype float16] [--layers 15]

Writes a profile for `plan --gpu-profile OUT` and prints it as a table of speed-ups.
"""

import argparse
import json
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from prox24_deploy.engines.cusparselt.gemm import gpu_profile, measure_gemms
from prox24_deploy.engines.cusparselt.profile import GemmShape, write_profile

ROWS = (16, 128, 512, 1024, 4096, 16384)
# (N, K) of the layers of encoders of width 768 and 1024, and of decoders from 1 to 70 billion.
LAYERS = (
    (4096, 4096), (14336, 4096), (4096, 14336), (768, 768), (3072, 768), (768, 3072), (1024, 4096),
    (8192, 8192), (2048, 2048), (8192, 2048), (2048, 8192), (1024, 1024), (4096, 1024),
    (28672, 8192), (8192, 28672),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--layers", type=int, default=len(LAYERS), help="the first of the list")
    arguments = parser.parse_args()
    began = time.perf_counter()
    layers = LAYERS[: arguments.layers]
    shapes = [GemmShape(n=n, k=k, m=m) for n, k in layers for m in ROWS]
    empty = gpu_profile(arguments.dtype)
    profile = measure_gemms(empty, shapes, arguments.dtype, lambda *_: None)
    write_profile(profile, arguments.out)
    table = Table("N×K", *(f"M {m}" for m in ROWS), box=None)
    for n, k in layers:
        speedups = [profile.timing(GemmShape(n=n, k=k, m=m)).speedup for m in ROWS]
        table.add_row(f"{n}×{k}", *(f"{speedup:.2f}×" for speedup in speedups))
    Console(width=100).print(table)
    seconds = time.perf_counter() - began
    found = {"gpu": profile.gpu, "gemms": len(profile.gemms), "seconds": seconds}
    print(json.dumps({"benchmark": "gemm_profile", **found}))


if __name__ == "__main__":
    main()
