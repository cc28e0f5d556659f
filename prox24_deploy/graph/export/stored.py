"""Prove on a file that its quantised layers hold the numbers and scales that were decided."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from torch import nn

from prox24_deploy.core.errors import ExportError
from prox24_deploy.graph.check import attributes
from prox24_deploy.graph.check.model_file import load_onnx
from prox24_deploy.graph.check.quantised_nodes import QuantisedNode, quantised_nodes, stored_input
from prox24_deploy.quantization.formats import FORMATS
from prox24_deploy.quantization.tensors import QuantizedLayer, QuantizedModel, summed_axis
from prox24_deploy.sparsity.groups import Array


def require_stored(
    path: Path, source: nn.Module, quantized: QuantizedModel, names: Sequence[str]
) -> None:
    """Compare the quantised layers of a file with what they should be, number by number.

    A convolution may have other scales, and channels with the signs changed or all zero, since the
    norm behind it may be folded into it; those scales are for the comparison with PyTorch to judge.

    Args:
        path: of the file.
        source: the module that was exported.
        quantized: numbers and scales.
        names: the layers of it that the file should hold, and no others.

    Raises:
        ExportError: names the layer and what of it is different.
    """
    found: dict[str, list[QuantisedNode]] = {}
    for each in quantised_nodes(load_onnx(path)):
        found.setdefault(each.module, []).append(each)
    if odd := found.keys() ^ set(names):
        name = min(odd)
        verb = "is not" if name in names else "is"
        raise ExportError(
            f"Layer {name or 'without a module path'} {verb} quantised in {path}; export it again."
        )
    for name in names:
        layer = source.get_submodule(name)
        for each in found[name]:
            kind = _type_name(quantized)
            wrong = _wrong_rounding(each, kind, quantized.layers[name], path)
            wrong = wrong or _wrong_weight(each, layer, kind, quantized.layers[name], path)
            if wrong:
                raise ExportError(
                    f"Quantised layer {name} in {path} has {wrong}; the file must not be used, "
                    "export it again."
                )


def _wrong_rounding(each: QuantisedNode, kind: str, expected: QuantizedLayer, path: Path) -> str:
    pair = (each.quantiser, each.dequantiser)
    if wrong := _wrong_pair(pair, "input", kind, expected.input_scale, path):
        return wrong
    if (each.rounded is None) != (expected.output_scale is None):
        return f"an output that is {'not rounded' if each.rounded is None else 'rounded'}"
    if each.rounded is None or expected.output_scale is None:
        return ""
    return _wrong_pair(each.rounded, "output", kind, expected.output_scale, path)


def _wrong_pair(
    pair: tuple[ir.Node, ir.Node], side: str, kind: str, expected: float, path: Path
) -> str:
    for node in pair:
        scale = stored_input(node, 1, path)
        if scale is None or scale.shape or float(scale) != expected:
            found = "none" if scale is None else scale.tolist()
            return f"an {side} scale of {found} in place of {expected!r}"
        zero = stored_input(node, 2, path)
        if zero is None or zero.any() or zero.dtype.name != kind:
            found = "none" if zero is None else f"{zero.tolist()} ({zero.dtype.name})"
            return f"a zero point of its {side} of {found} in place of 0 ({kind})"
    return ""


def _wrong_weight(
    each: QuantisedNode, layer: nn.Module, kind: str, expected: QuantizedLayer, path: Path
) -> str:
    numbers, scales, zeros = (stored_input(each.weight, place, path) for place in range(3))
    if numbers is None or scales is None or numbers.dtype.name != kind:
        return f"a weight that is not stored in {kind}"
    if zeros is not None and zeros.any():
        return "a zero point of its weight that is not 0"
    if (axis := attributes.integer(each.weight, "axis", 1) % numbers.ndim) == each.summed:
        return f"scales of its weight along axis {axis}, over which it is summed"
    if numbers.ndim == 2 and each.summed != summed_axis(layer):
        numbers = numbers.T
    decided = expected.weight_scale.cpu().numpy()
    folds = isinstance(layer, nn.Conv2d)
    if scales.shape != decided.shape or not (
        (scales > 0).all() if folds else np.array_equal(scales.astype(np.float32), decided)
    ):
        return "other scales of its weight"
    wanted = expected.weight.float().cpu().numpy()
    same = _same_numbers(numbers.astype(np.float32), wanted, signed=folds)
    return "" if same else "other numbers in its weight"


def _type_name(quantized: QuantizedModel) -> str:
    return str(FORMATS[quantized.format].dtype).removeprefix("torch.")


def _same_numbers(mine: Array, theirs: Array, *, signed: bool) -> bool:
    if mine.shape != theirs.shape or not signed:
        return np.array_equal(mine, theirs)
    rows = [array.reshape(len(array), -1) for array in (mine, theirs)]
    kept = (rows[0] == rows[1]).all(1) | (rows[0] == -rows[1]).all(1) | (rows[0] == 0).all(1)
    return bool(kept.all())
