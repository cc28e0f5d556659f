"""Recognise the tensors of quantised and compressed checkpoints by the names that they carry.

Such a checkpoint stores several weights in one integer, or the non-zeros alone, beside scales and
shapes. Nothing that is read from them as a matrix says anything about the weight.
"""

from collections.abc import Collection
from dataclasses import dataclass

from prox24_deploy.graph.check.tensor_files import TensorEntry

# Scales hold one number for several weights: for a block of 16, a channel or a tensor.
_WEIGHTS_PER_SCALE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Format:
    """Ends of names: of what holds the weight, of what makes it one, and of what goes with it."""

    name: str
    holders: tuple[str, ...]
    companions: tuple[str, ...]
    marks: tuple[str, ...] = ()


_FORMATS = (
    _Format(
        name="compressed-tensors",
        holders=(".weight_packed",),
        companions=(".weight_shape", ".weight_g_idx", ".weight_zero_point", ".weight_global_scale"),
    ),
    _Format(
        name="compressed-tensors, non-zeros with a bitmask",
        holders=(".compressed",),
        companions=(".bitmask", ".shape", ".row_offsets"),
    ),
    _Format(name="GPTQ or AWQ", holders=(".qweight",), companions=(".qzeros", ".scales", ".g_idx")),
    _Format(
        name="ExLlama",
        holders=(".q_weight",),
        companions=(".q_scale", ".q_groups", ".q_invperm", ".q_perm"),
    ),
    _Format(
        name="bitsandbytes",
        holders=(".weight",),
        companions=(
            ".weight.absmax",
            ".weight.quant_map",
            ".weight.nested_absmax",
            ".weight.nested_quant_map",
            ".SCB",
            ".weight_format",
        ),
        marks=(
            ".weight.absmax",
            ".SCB",
            ".weight.quant_state.bitsandbytes__nf4",
            ".weight.quant_state.bitsandbytes__fp4",
        ),
    ),
    _Format(
        name="torchao",
        holders=("_qdata", "_int_data", ".packed_weight", "_sparse_data"),
        companions=("_scale_and_zero", "_scales_and_zeros", "_zero_point"),
    ),
    _Format(name="MXFP4", holders=("_blocks",), companions=("_scales",)),
    _Format(name="HQQ", holders=(".W_q",), companions=(".meta",)),
    _Format(
        name="Quanto", holders=(".weight._data",), companions=(".weight._scale", ".weight._shift")
    ),
    _Format(name="AQLM", holders=(".codes",), companions=(".codebooks",)),
    _Format(name="QuIP", holders=(".Qidxs",), companions=(".SU", ".SV")),
    _Format(
        name="Marlin",
        holders=(".B", ".B_24", ".marlin_qweight"),
        companions=(".B_meta", ".workspace"),
    ),
)
_SCALES = (
    ".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".input_scale", ".output_scale",
    ".act_scale",
)  # fmt: skip


def packed_formats(entries: Collection[TensorEntry]) -> dict[str, str]:
    """Names of the tensors that belong to packed weights, with the format."""
    names = {entry.name for entry in entries}
    return {
        name: form.name
        for name in sorted(names)
        for form in _FORMATS
        if _belongs(name, form, names)
    }


def scaled_weight(entry: TensorEntry, entries: Collection[TensorEntry]) -> str:
    """Name of the weight whose scales a tensor holds, "" if it holds none.

    By its size too: a matrix as large as the weight is no scale, whatever its name is.
    """
    suffix = next((end for end in _SCALES if entry.name.endswith(end)), None)
    if suffix is None:
        return ""
    root = entry.name.removesuffix(suffix)
    for other in entries:
        large = other.size >= _WEIGHTS_PER_SCALE * entry.size
        if other.name in (f"{root}.weight", f"{root}.weight_packed") and large:
            return other.name
    return ""


def _belongs(name: str, form: _Format, names: Collection[str]) -> bool:
    if form.marks:
        root = next((name.removesuffix(end) for end in form.holders if name.endswith(end)), None)
        marked = root is not None and any(f"{root}{mark}" in names for mark in form.marks)
        return marked or name.endswith(form.companions)
    if name.endswith(form.holders):
        return True
    # A companion alone, as `.shape` or `_scales`, may be anything.
    root = next((name.removesuffix(end) for end in form.companions if name.endswith(end)), None)
    return root is not None and any(f"{root}{end}" in names for end in form.holders)
