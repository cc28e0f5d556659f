"""Throughput and memory of `check` on one core, in gigabytes of stored weights per second.

    python benchmarks/check_speed.py [--gigabytes 2]

Each layout is one ONNX file with external data: a MatMul weight that is stored as it is multiplied,
a Gemm weight that is stored transposed, and a 3×3 convolution. The file is read once before, so
that the disk is not what is measured, and time is that of the processor, so that other work on the
machine counts little. Then one float16 tensor of the given size is checked, and what is allocated
for it, which counts copies but not pages of the file, must stay far below the tensor. Prints a
table and one JSON line, and fails below the bar.
"""

import argparse
import json
import tempfile
import time
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table

from prox24_deploy.graph.check.check import check_onnx

ROUNDS = 5
BAR_GB_PER_S = 1.0
BAR_COPIES_MIB = 64
DTYPES = {
    "float32": (np.dtype(np.float32), TensorProto.FLOAT),
    "float16": (np.dtype(np.float16), TensorProto.FLOAT16),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), TensorProto.BFLOAT16),
}
LAYOUTS = {
    "MatMul": ((4096, 8192), 0),
    "Gemm": ((8192, 4096), 1),
    "Conv": ((2048, 1024, 3, 3), 1),
}


def write_file(path: Path, op_type: str, dtype: str, shape: tuple[int, ...], axis: int) -> int:
    """Write a 2:4 weight as external data, block by block; returns its bytes."""
    kind, code = DTYPES[dtype]
    pattern = np.zeros([4 if i == axis else n if i > axis else 1 for i, n in enumerate(shape)])
    pattern[(slice(None),) * axis + (slice(1, 3),)] = 0.5
    repeats = [n // m for n, m in zip(shape, pattern.shape, strict=True)]
    row = np.tile(pattern.astype(kind), [1, *repeats[1:]])
    data = path.with_suffix(".data")
    with data.open("wb") as stream:
        for _ in range(repeats[0]):
            row.tofile(stream)
    weight = onnx.TensorProto(
        name="w", data_type=code, dims=shape, data_location=TensorProto.EXTERNAL
    )
    weight.external_data.add(key="location", value=data.name)
    node = helper.make_node(op_type, ["x", "w"], ["y"], "node")
    if op_type == "Gemm":
        node.attribute.append(helper.make_attribute("transB", 1))
    values = [helper.make_tensor_value_info(name, code, None) for name in "xy"]
    graph = helper.make_graph([node], "graph", values[:1], values[1:], [weight])
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return data.stat().st_size


def throughput(path: Path, size: int) -> float:
    """Median gigabytes per second of one core; every round must prove the weight."""
    seconds = []
    for _ in range(ROUNDS + 1):
        began = time.process_time()
        checks = check_onnx(path)
        seconds.append(time.process_time() - began)
        assert [check.is_24 for check in checks] == [True]
    return size / float(np.median(seconds[1:])) / 1e9


def copies_mib(path: Path) -> float:
    """Memory, in MiB, that NumPy and Python allocate at most while a file is checked."""
    tracemalloc.start()
    check_onnx(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    rows = int(parser.parse_args().gigabytes * 1e9 / (2 * 8192)) // 4 * 4
    table = Table("weight", "type", "MB", "GB/s", "bar", box=None)
    speeds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for op_type, (shape, axis) in LAYOUTS.items():
            for dtype in DTYPES:
                path = Path(folder) / f"{op_type}.onnx"
                size = write_file(path, op_type, dtype, shape, axis)
                speed = speeds[f"{op_type} {dtype}"] = throughput(path, size)
                table.add_row(
                    op_type, dtype, f"{size / 1e6:.0f}", f"{speed:.2f}", f"{BAR_GB_PER_S}"
                )
        path = Path(folder) / "large.onnx"
        size = write_file(path, "MatMul", "float16", (rows, 8192), 0)
        copies = copies_mib(path)
    Console().print(table)
    print(f"A tensor of {size / 1e9:.2f} GB is checked with {copies:.1f} MiB of copies.")
    line = {"gb_per_s": speeds, "tensor_gb": size / 1e9, "copies_mib": copies}
    print(json.dumps({"benchmark": "check_speed", **line}))
    slow = {name: speed for name, speed in speeds.items() if speed < BAR_GB_PER_S}
    assert not slow, f"slower than {BAR_GB_PER_S} GB/s: {slow}"
    assert copies < BAR_COPIES_MIB, f"{copies:.0f} MiB of copies"


if __name__ == "__main__":
    main()
