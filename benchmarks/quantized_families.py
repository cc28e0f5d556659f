"""Every model family in an 8-bit format, as `families.py --quantize` shows it.

The tiny models of `families.py`, 2:4 by magnitude, are quantised by the stage itself on one batch,
exported in float16, proven and compared with PyTorch, and built by TensorRT-RTX for the GPUs that
have the format.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from families import (
    NO_ROUTES,
    NO_ROUTES_ERROR,
    aligned,
    build_plans,
    prepare,
    write_pruned,
)
from family_batches import batch
from tiny_families import VOCABULARY

from prox24_deploy.core.errors import EngineError, RecipeError
from prox24_deploy.core.types import DType, QuantizedFormat
from prox24_deploy.graph.check.check import check_path, require_24
from prox24_deploy.graph.export.export import export_graphs
from prox24_deploy.graph.parity.numerics import compare_with_torch
from prox24_deploy.model.directory import load_model
from prox24_deploy.quantization.formats import FORMATS
from prox24_deploy.quantization.quantize import quantize_model
from prox24_deploy.quantization.tensors import apply_weights

# The GPUs that TensorRT-RTX builds for and that have the format.
CAPABILITIES: dict[QuantizedFormat, tuple[str, ...]] = {
    "int8": ("SM86",),
    "fp8": ("SM89", "SM120"),
}
DTYPE: DType = "float16"
# ONNX Runtime's largest difference in float16, as for models that are not quantised.
TOLERANCE = 2e-2


@dataclass(frozen=True)
class QuantizedRow:
    """What one model did in one format; the two graphs of an encoder-decoder count together.

    `proven` counts quantised initialisers that are 2:4, `left` says why layers stay in 16 bits, and
    `difference` is ONNX Runtime's largest from the fake-quantised module, which follows its
    roundings, relative to the largest magnitude of each output. `plan` is the size of what
    TensorRT-RTX made, or why it made nothing.
    """

    family: str
    format: QuantizedFormat
    pruned: int
    quantized: int
    proven: int
    left: dict[str, int]
    difference: float
    plan: str
    seconds: float


def measure_quantized(family: str, form: QuantizedFormat) -> QuantizedRow:
    """Take one model through everything; what fails but TensorRT-RTX is raised."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        directory, recipe, names = write_pruned(root / "model", family, DTYPE)
        trial = load_model(directory, recipe, torch.device("cpu"))
        made, records, _ = quantize_model(
            trial, recipe, [batch(recipe)], form, sparse=names, progress=lambda *_: None
        )
        model = load_model(directory, recipe, torch.device("cpu"))
        apply_weights(model, made)
        paths = export_graphs(
            model, recipe, root / "onnx", dtype=DTYPE, sparse=names, quantized=made
        )
        require_24(report := check_path(root / "onnx"))
        checks = [
            check
            for part, path in zip(recipe.parts, paths, strict=True)
            for check in compare_with_torch(
                model, path, part, dtype=DTYPE, twin="sparse", vocabulary=VOCABULARY, quantized=made
            )
        ]
        reasons = [record.reason for record in records if record.reason]
        stored = str(FORMATS[form].dtype).removeprefix("torch.")
        return QuantizedRow(
            family=family,
            format=form,
            pruned=len(names),
            quantized=len(made.layers),
            proven=sum(c.expected and c.is_24 and c.dtype == stored for c in report.tensors),
            left={reason: reasons.count(reason) for reason in reasons},
            difference=max(TOLERANCE * c.max_abs_difference / c.tolerance for c in checks),
            plan=_plan(paths, form),
            seconds=time.perf_counter() - began,
        )


def attempt(family: str, form: QuantizedFormat) -> QuantizedRow | str:
    """The row of a family, or why it has none."""
    try:
        return measure_quantized(family, form)
    except RecipeError as error:
        return str(error)


def _plan(paths: Sequence[Path], form: QuantizedFormat) -> str:
    try:
        plans = build_plans(paths, DTYPE, CAPABILITIES[form])
    except EngineError as error:
        return NO_ROUTES if NO_ROUTES_ERROR in str(error) else str(error)
    return next(iter(plans.values()))


def show(rows: dict[str, QuantizedRow | str], form: QuantizedFormat, seconds: float) -> None:
    """Print the table, what is left of it with reasons, and all of it as JSON."""
    known = [row for row in rows.values() if isinstance(row, QuantizedRow)]
    head = ["family", "format", "quantised", "2:4", "ONNX Runtime", "TensorRT-RTX", "s"]
    cells = [
        [
            row.family,
            row.format,
            f"{row.quantized}/{row.pruned}",
            f"{row.proven}/{row.quantized}",
            f"{row.difference:.1e}",
            f"{'+'.join(CAPABILITIES[row.format])}: {row.plan}",
            f"{row.seconds:.1f}",
        ]
        for row in known
    ]
    print(aligned(head, cells))
    print("\nIn 16 bits:")
    for row in known:
        for reason, count in row.left.items():
            print(f"{row.family}, {row.format}: {count}, because {reason}")
    for family, found in rows.items():
        if isinstance(found, str):
            print(f"{family}, {form}: {found}")
    print(json.dumps({"quantized": [asdict(row) for row in known], "seconds": round(seconds, 1)}))


def require_quantized(row: QuantizedRow | str) -> None:
    """Assert what every row must reach."""
    assert isinstance(row, QuantizedRow), row
    assert row.quantized == row.proven > 0, row
    assert row.quantized + sum(row.left.values()) == row.pruned, row
    assert row.difference <= TOLERANCE, row


def main(families: Sequence[str], form: QuantizedFormat, jobs: int) -> None:
    """Show the table of one format, and fail on any row that falls short."""
    began = time.perf_counter()
    with ProcessPoolExecutor(jobs, get_context("spawn"), prepare) as pool:
        found = list(pool.map(attempt, families, [form] * len(families)))
    show(dict(zip(families, found, strict=True)), form, time.perf_counter() - began)
    for row in found:
        require_quantized(row)
