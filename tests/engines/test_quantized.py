"""Layers that multiply 8-bit numbers: what can be known of them without a GPU."""

from dataclasses import replace

import fake_cuda
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantized_layers import formula, stored_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prox24_deploy.core.errors import EngineError
from prox24_deploy.engines.cusparselt.formats import (
    OPERANDS,
    WIDE,
    format_of,
    gpu_obstacle,
    padded,
    result_dtype,
    sparse_shape,
)
from prox24_deploy.engines.cusparselt.inductor import CompiledModule
from prox24_deploy.engines.cusparselt.linear import shape_obstacle
from prox24_deploy.engines.cusparselt.profile import GemmFormat, GemmShape
from prox24_deploy.engines.cusparselt.quantized import (
    QuantizedLinear,
    SparseQuantizedLinear,
    dense_obstacle,
    linear_8,
    replace_quantized,
)
from prox24_deploy.quantization.formats import to_numbers
from prox24_deploy.quantization.tensors import QuantizedLayer

EIGHT: tuple[GemmFormat, ...] = ("fp8", "int8")


def test_numbers_are_the_nearest_ties_to_even_and_saturate() -> None:
    values = torch.tensor([0.0, 0.24, 0.25, 0.74, 0.75, -0.25, -0.75, 63.4, 70.0, -64.0, -70.0])
    found = to_numbers(values, 0.5, torch.int8)
    assert found.tolist() == [0, 0, 0, 1, 2, 0, -2, 127, 127, -128, -128]
    # Between 16 and 32, numbers of FP8 are 2 apart.
    values = torch.tensor([17.0, 19.0, 16.9, -21.0, 448.0, 1e6, -1e6])
    found = to_numbers(values, 1.0, torch.float8_e4m3fn)
    assert found.float().tolist() == [16.0, 20.0, 16.0, -20.0, 448.0, 448.0, -448.0]
    assert bool(to_numbers(torch.tensor([torch.nan]), 1.0, torch.float8_e4m3fn).isnan())


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20),
    st.floats(1e-3, 1e3),
    st.sampled_from(EIGHT),
)
def test_no_other_number_is_nearer(values: list[float], scale: float, format: GemmFormat) -> None:
    """The definition, against all numbers of the format."""
    kind = OPERANDS[format].dtype
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(kind).double()
    every = every[every.isfinite()]
    given_values = torch.tensor(values)
    found = to_numbers(given_values, scale, kind).double()
    exact = given_values.double() / scale
    least = (every[None] - exact[:, None]).abs().min(1).values
    slack = 1e-6 * (1 + exact.abs())
    assert bool(((found - exact).abs() <= least + slack).all())


@pytest.mark.parametrize("format", EIGHT)
def test_zeros_stay_zeros(format: GemmFormat) -> None:
    assert not to_numbers(torch.zeros(8), 0.1, OPERANDS[format].dtype).float().any()


def test_every_format_has_its_rules() -> None:
    assert shape_obstacle(48, 64) == ""
    assert shape_obstacle(48, 64, "int8") == "shape rule: N = 48 is not a multiple of 32"
    assert shape_obstacle(64, 48, "fp8") == "shape rule: K = 48 is not a multiple of 32"
    assert dense_obstacle(48, 64) == ""
    assert dense_obstacle(64, 40) == "shape rule: K = 40 is not a multiple of 16"
    assert sparse_shape(GemmShape(n=64, k=64, m=17), "float16").m == 24
    assert sparse_shape(GemmShape(n=64, k=64, m=17), "int8").m == 32
    assert gpu_obstacle("fp8", (8, 9)) == ""
    assert gpu_obstacle("fp8", (8, 0)) == "fp8 needs compute capability 8.9, and this GPU has 8.0"
    assert gpu_obstacle("int8", (8, 0)) == ""
    assert [result_dtype(OPERANDS[f].dtype) for f in ("float16", "bfloat16", *EIGHT)] == [
        torch.float16, torch.bfloat16, WIDE, WIDE,
    ]  # fmt: skip
    assert format_of(torch.int8) == "int8"


@pytest.mark.parametrize("format", ["float16", "bfloat16", "fp8", "int8"])
def test_missing_rows_are_zeros(format: GemmFormat) -> None:
    rows = torch.ones(3, 4).to(OPERANDS[format].dtype)
    found = padded(rows, 8)
    assert found.dtype == rows.dtype
    assert found.float().tolist() == [[1.0] * 4] * 3 + [[0.0] * 4] * 5
    assert padded(rows, 3) is rows


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_dense_integers_are_multiplied_exactly(rows: int) -> None:
    stored = stored_weight("int8", 64, 96, device="cpu", sparse=False)
    numbers = to_numbers(torch.randn(rows, 96), 0.01, torch.int8)
    found = linear_8(numbers, stored.weight, torch.ones(()))
    assert found.dtype == torch.int32
    assert torch.equal(found, numbers.int() @ stored.weight.int().T)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first: nn.Module = nn.Linear(96, 64)
        self.second: nn.Module = Conv1D(32, 64)
        self.patches = nn.Conv2d(4, 32, 2)

    def forward(self, hidden: Tensor) -> tuple[Tensor]:
        return (self.second(self.first(hidden)),)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().half().requires_grad_(requires_grad=False)


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found.double() - expected).norm() / expected.norm()) < 5e-3


def test_named_layers_multiply_numbers_dense_or_sparse(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cuda.install(monkeypatch)
    first = stored_weight("int8", 64, 96, device="cpu", sparse=True)
    second = stored_weight("int8", 32, 64, device="cpu", sparse=True)
    # Numbers of a Conv1D lie as its weight does.
    stored = {"first": first, "second": replace(second, weight=second.weight.T.contiguous())}
    biases = [model.get_parameter(f"{name}.bias").clone() for name in ("first", "second")]
    replace_quantized(model, stored, {"second": {8: 1}})
    assert isinstance(model.first, QuantizedLinear)
    assert isinstance(model.second, SparseQuantizedLinear)
    hidden = torch.randn(2, 3, 96).half()
    inner = formula(first, hidden.view(6, 96), biases[0])
    found = model.first(hidden)
    assert found.dtype == torch.float16
    assert found.shape == (2, 3, 64)
    assert close(found.view(6, 64), inner)
    outer = formula(second, found.view(6, 64), biases[1])
    assert close(model(hidden)[0].view(6, 32), outer)


def test_compiled_code_computes_the_same_and_knows_the_scale(model: Model) -> None:
    stored = {
        "first": stored_weight("int8", 64, 96, device="cpu", sparse=False),
        "second": stored_weight("int8", 32, 64, device="cpu", sparse=False),
    }
    stored["second"] = replace(stored["second"], weight=stored["second"].weight.T.contiguous())
    replace_quantized(model, stored, {})
    compiled = CompiledModule(model, [(torch.Size((2, 3, 96)),)])
    try:
        with torch.inference_mode():
            # The second runs by the graph with dynamic shapes.
            for hidden in (torch.randn(2, 3, 96).half(), torch.randn(3, 5, 96).half()):
                assert close(compiled(hidden)[0], model(hidden)[0].double())
    finally:
        compiled.close()


@pytest.mark.parametrize(
    ("name", "shape", "sparse", "message"),
    [
        ("patches", (32, 4, 2, 2), False, "Layer patches is a convolution"),
        (
            "first",
            (64, 40),
            False,
            "Layer first cannot be multiplied in 8 bits: shape rule: K = 40",
        ),
        (
            "first",
            (48, 96),
            True,
            "Layer first cannot be .*: shape rule: N = 48 is not a mult.* 32",
        ),
        ("first", (64, 96), True, "Layer first cannot be multiplied in 8 bits: it is not 2:4"),
    ],
)
def test_what_cannot_be_is_told_by_name(
    model: Model, name: str, shape: tuple[int, ...], message: str, *, sparse: bool
) -> None:
    stored = QuantizedLayer(
        weight=torch.ones(shape, dtype=torch.int8),
        weight_scale=torch.ones(shape[0]),
        input_scale=1.0,
    )
    with pytest.raises(EngineError, match=message):
        replace_quantized(model, {name: stored}, {name: {}} if sparse else {})


def test_only_a_quantised_layer_is_held_compressed(model: Model) -> None:
    with pytest.raises(EngineError, match="Layer second is to multiply sparse, but is not quant"):
        replace_quantized(model, {}, {"second": {}})
