"""Find a tensor inside a float16 graph that float16 cannot hold, where no module shows it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from prox24_deploy.core.errors import ExportError
from prox24_deploy.graph.check.model_file import load_onnx
from prox24_deploy.graph.check.modules import module_of
from prox24_deploy.graph.parity.bisect import run_for
from prox24_deploy.sparsity.groups import Array


def require_finite(path: Path, feeds: Mapping[str, Array]) -> None:
    """Refuse a float16 file one of whose nodes gives +inf or NaN, attention scores among them.

    ONNX Runtime on the CPU computes float16 in float32 between nodes that it fuses, so its outputs
    may be right where a GPU overflows; asked for every tensor, it rounds each to float16. -inf is
    what masks are made of and may pass.

    Args:
        path: of the file; nothing is written beside it.
        feeds: one value per graph input, none of them padded: a row without a single token gives
            NaN in exact arithmetic too.

    Raises:
        ExportError: names the first such tensor and its module.
    """
    model = load_onnx(path)
    values = [
        value
        for node in model.graph
        if node.op_type != "Constant"
        for value in node.outputs
        if value.name and value.dtype in (ir.DataType.FLOAT16, ir.DataType.FLOAT)
    ]
    for value, array in zip(values, run_for(model, path, values, feeds), strict=True):
        if np.isposinf(array).any() or np.isnan(array).any():
            node = value.producer()
            module = (module_of(node) if node else "") or "the model itself"
            raise ExportError(
                f"Tensor {value.name} of {path}, inside {module}, overflows float16, whose limit "
                "is 65504; export with --dtype bfloat16 or float32."
            )
