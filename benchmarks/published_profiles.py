"""Make profiles for `plan --gpu-profile` of GEMM times that others published.

    python benchmarks/published_profiles.py GEMM_TIMES_CSV [OUT_FOLDER]

The CSV has the columns gpu, dtype, n, k, m, dense_us and sparse_us. Ours comes from
https://github.com/bcacdwk/vllmbench at 92a8ca4 (Apache-2.0), the results of
slidesparse/benchmark_kernel: for each GEMM the best algorithm of cuBLASLt and the best of
cuSPARSELt on a 2:4 weight. FP4 is left out: its sparse kernels want pairs of weights (4:8). So is
FP16 on the H100 PCIe, for the search of its algorithms broke off: the raw file holds a time of 0.
"""

import argparse
import csv
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from prox24_deploy.engines.cusparselt.profile import (
    GemmFormat,
    GemmShape,
    GemmTiming,
    GpuProfile,
    read_profile,
)

# Name in the CSV: file and name of the card, as its driver gives it.
GPUS = {
    "H100": ("h100-pcie.json", "NVIDIA H100 PCIe"),
    "A100": ("a100.json", "NVIDIA A100 80GB PCIe"),
    "B200": ("b200.json", "NVIDIA B200"),
    "RTX4090": ("rtx4090.json", "NVIDIA GeForce RTX 4090"),
    "RTX5080": ("rtx5080.json", "NVIDIA GeForce RTX 5080"),
    "GB10": ("gb10.json", "NVIDIA GB10"),
}
FORMATS: dict[str, GemmFormat] = {
    "FP16": "float16", "BF16": "bfloat16", "FP8": "fp8", "INT8": "int8",
}  # fmt: skip
BROKEN = {("H100", "FP16")}
PUBLISHED = (
    "These times were not measured by prox24-deploy: bcacdwk/vllmbench at 92a8ca4 (Apache-2.0) "
    "published them, the best algorithm of cuBLASLt against the best of cuSPARSELt on a 2:4 "
    "weight. Each is the mean of 50 calls in a row on the same operands, so that a weight that "
    "fits the L2 cache is read from there; in a model it comes from memory. At few rows dense "
    "layers are slower in a model than these times say, up to 1.9 times where the weight fits the "
    "cache, and 2:4 gains more."
)
FOLDER = Path(__file__).parents[1] / "prox24_deploy" / "engines" / "cusparselt" / "profiles"


def profile_of(name: str, rows: Iterable[dict[str, str]]) -> GpuProfile:
    """The profile of one GPU of the CSV."""
    timings = [
        GemmTiming(
            shape=GemmShape(n=int(row["n"]), k=int(row["k"]), m=int(row["m"])),
            format=FORMATS[row["dtype"]],
            dense_us=float(row["dense_us"]),
            sparse_us=float(row["sparse_us"]),
        )
        for row in rows
        if row["gpu"] == name and row["dtype"] in FORMATS and (name, row["dtype"]) not in BROKEN
    ]
    # Formats are compared shape by shape, so an estimate in one must not meet a time in another.
    known = Counter(timing.shape for timing in timings)
    formats = len({timing.format for timing in timings})
    timings = [timing for timing in timings if known[timing.shape] == formats]
    versions = {"torch": "2.9.0+cu129", "cuda": "12.9"}
    empty = GpuProfile(
        gpu=GPUS[name][1], driver="not told", versions=versions, gemms=(), published=PUBLISHED
    )
    return empty.with_timings(timings)


def as_lines(profile: GpuProfile) -> str:
    """JSON with a GEMM a line: these profiles have hundreds."""
    record = asdict(profile)
    gemms = [json.dumps(gemm, separators=(",", ":")) for gemm in record.pop("gemms")]
    head = json.dumps(record, indent=1).removesuffix("\n}")
    return f'{head},\n "gemms": [\n' + ",\n".join(gemms) + "\n ]\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=FOLDER)
    arguments = parser.parse_args()
    with arguments.csv.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for name, (file_name, _) in GPUS.items():
        profile = profile_of(name, rows)
        path = arguments.out / file_name
        path.write_text(as_lines(profile), encoding="utf-8")
        assert read_profile(path) == profile
        print(f"{path}: {profile.gpu}, {len(profile.gemms)} GEMMs in {', '.join(profile.formats)}")


if __name__ == "__main__":
    main()
