"""The formats, and the file of quantised tensors."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from prox24_deploy.quantization.formats import FORMATS, exact_scale
from prox24_deploy.quantization.tensors import (
    QuantizedLayer,
    QuantizedModel,
    apply_rounding,
    apply_weights,
    read_quantized,
    write_quantized,
)

VALUES = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30)
SCALES = st.floats(2**-10, 1024, width=32)


@given(values=VALUES, scale=SCALES)
def test_numbers_of_int8_are_those_of_numpy(values: list[float], scale: float) -> None:
    x, s = np.array(values, np.float32), np.float32(scale)
    expected = np.clip(np.rint(x / s), -128, 127).astype(np.int8)
    assert FORMATS["int8"].numbers(torch.tensor(x), float(s)).tolist() == expected.tolist()


@given(values=VALUES, scale=SCALES)
def test_numbers_of_fp8_are_those_of_ml_dtypes(values: list[float], scale: float) -> None:
    x, s = np.array(values, np.float32), np.float32(scale)
    expected = np.clip(x / s, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert FORMATS["fp8"].numbers(torch.tensor(x), float(s)).float().tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_a_zero_stays_a_zero_and_no_number_of_a_weight_is_beyond_the_symmetric_range(
    name: str,
) -> None:
    known = FORMATS[name]  # type: ignore[index]
    weight = torch.tensor([[0.0, -9.0, 9.0, 0.5]])
    numbers = known.weight_numbers(weight, torch.tensor([0.001])).float()
    assert numbers[0].tolist() == [0, -known.largest, known.largest, known.largest]


@given(scale=st.floats(1e-12, 1e9))
def test_an_exact_scale_is_the_same_in_either_half_precision(scale: float) -> None:
    exact = exact_scale(torch.tensor([scale]))
    assert torch.equal(exact.half().float(), exact)
    assert torch.equal(exact.bfloat16().float(), exact)
    assert float(exact) > 0


@pytest.mark.parametrize("output_scale", [None, 3.0])
def test_what_was_written_is_read_and_applied(tmp_path: Path, output_scale: float | None) -> None:
    norm, linear = nn.LayerNorm(4), nn.Linear(4, 2)
    model = nn.Sequential(norm, linear)
    stored = QuantizedLayer(
        weight=torch.tensor([[1, 0, 0, -2], [0, 3, 0, 4]], dtype=torch.int8),
        weight_scale=torch.tensor([0.5, 0.25]),
        input_scale=2.0,
        output_scale=output_scale,
    )
    made = QuantizedModel(
        format="int8",
        layers={"1": stored},
        folded={"0.weight": torch.full((4,), 3.0)},
        axes={"1": 1},
    )
    path = tmp_path / "quantization.safetensors"
    write_quantized(made, path)
    found = read_quantized(path)
    assert found.axes == {"1": 1}
    assert found.format == "int8"
    apply_weights(model, found)
    apply_rounding(model, found)
    assert linear.weight.tolist() == [[0.5, 0, 0, -1], [0, 0.75, 0, 1]]
    assert norm.weight.tolist() == [3, 3, 3, 3]
    given_rows = torch.tensor([[0.9, 1.1, 3.2, -999.0]])
    expected = torch.tensor([[0.0, 2.0, 4.0, -256.0]]) @ linear.weight.T + linear.bias
    if output_scale:
        expected = 3 * (expected / 3).round()
    assert torch.equal(linear(given_rows), expected)
