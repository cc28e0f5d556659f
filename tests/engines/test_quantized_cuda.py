"""Layers that multiply 8-bit numbers on a GPU, against the formula in float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from quantized_layers import formula, stored_weight
from torch import Tensor, nn

from prox24_deploy.engines.cusparselt.cuda_graph import capture
from prox24_deploy.engines.cusparselt.formats import OPERANDS, gpu_obstacle
from prox24_deploy.engines.cusparselt.gemm import gpu_profile, measure_gemms
from prox24_deploy.engines.cusparselt.inductor import CompiledModule
from prox24_deploy.engines.cusparselt.kernels import kernels_by_layer, sparse_kernels
from prox24_deploy.engines.cusparselt.profile import GemmFormat, GemmShape
from prox24_deploy.engines.cusparselt.quantized import (
    QuantizedLinear,
    SparseQuantizedLinear,
    replace_quantized,
)
from prox24_deploy.quantization.formats import to_numbers
from prox24_deploy.quantization.tensors import QuantizedLayer

pytestmark = pytest.mark.gpu
FORMATS: tuple[GemmFormat, ...] = ("fp8", "int8")


@pytest.fixture(autouse=True)
def able(request: pytest.FixtureRequest) -> None:
    format = request.node.callspec.params["format"]
    if why := gpu_obstacle(format, torch.cuda.get_device_capability()):
        pytest.skip(why)


@dataclass(frozen=True)
class Case:
    layer: QuantizedLinear | SparseQuantizedLinear
    stored: QuantizedLayer
    bias: Tensor | None


def made(stored: QuantizedLayer, dtype: torch.dtype, *, sparse: bool) -> Case:
    n, k = stored.weight.shape
    linear = nn.Linear(k, n, device="cuda", dtype=dtype)
    model = nn.Sequential(linear).requires_grad_(requires_grad=False)
    # Algorithm 0 is there for any GEMM.
    replace_quantized(model, {"0": stored}, {"0": {}} if sparse else {})
    layer = model[0]
    assert isinstance(layer, SparseQuantizedLinear if sparse else QuantizedLinear)
    return Case(layer, stored, linear.bias)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 16, 33, 512])
@pytest.mark.parametrize(("n", "k"), [(64, 96), (4096, 1024)])
@torch.inference_mode()
def test_a_layer_gives_what_the_formula_gives(
    format: GemmFormat, n: int, k: int, rows: int, dtype: torch.dtype, *, sparse: bool
) -> None:
    case = made(stored_weight(format, n, k, device="cuda", sparse=sparse), dtype, sparse=sparse)
    hidden = torch.randn(rows, k, device="cuda", dtype=dtype)
    found = case.layer(hidden)
    expected = formula(case.stored, hidden, case.bias)
    assert found.dtype == dtype
    assert found.shape == (rows, n)
    # Sums are rounded to bfloat16; those of FP8 are added in some 14 bits (fast accumulation).
    assert float((found.double() - expected).norm() / expected.norm()) < 4e-3


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("sparse", [False, True])
@torch.inference_mode()
def test_values_beyond_float16_in_the_sums_do_no_harm(format: GemmFormat, *, sparse: bool) -> None:
    greatest = 127.0 if format == "int8" else 448.0
    random = stored_weight(format, 64, 1024, device="cuda", sparse=sparse)
    numbers = (random.weight.float() != 0) * greatest
    stored = replace(random, weight=numbers.to(random.weight.dtype))
    case = made(stored, torch.float16, sparse=sparse)
    hidden = torch.full((32, 1024), 2 * stored.input_scale * greatest, device="cuda").half()
    expected = formula(stored, hidden, case.bias)
    assert float(expected.abs().max() / case.layer.factor.min()) > 65504
    # Fast accumulation cuts sums off, and here all of them on the same side.
    torch.testing.assert_close(case.layer(hidden).double(), expected, rtol=3e-2, atol=0.1)


@pytest.mark.parametrize("format", FORMATS)
def test_numbers_on_a_gpu_are_those_of_a_cpu(format: GemmFormat) -> None:
    kind = OPERANDS[format].dtype
    values = torch.randn(4096, generator=torch.Generator().manual_seed(3)) * 100
    on_cpu = to_numbers(values, 0.37, kind).float()
    on_gpu = to_numbers(values.cuda(), 0.37, kind).cpu().float()
    # The quotient of a GPU may be one unit in the last place off, which matters at a tie.
    assert float((on_cpu != on_gpu).float().mean()) < 1e-3


class Block(nn.Module):
    """Two layers that share an input, and one that reads what is made of both."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(1024)
        self.gate, self.up = nn.Linear(1024, 2048), nn.Linear(1024, 2048)
        self.down = nn.Linear(2048, 1024, bias=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor]:
        normed = self.norm(hidden)
        inner = nn.functional.silu(self.gate(normed)) * self.up(normed)
        return (hidden + self.down(inner),)


@pytest.mark.parametrize("format", FORMATS)
@torch.inference_mode()
def test_compiled_layers_give_the_same_and_the_profiler_sees_sparse_kernels(
    format: GemmFormat,
) -> None:
    block = Block().to("cuda", torch.float16).requires_grad_(requires_grad=False)
    stored = {
        name: stored_weight(format, *getattr(block, name).weight.shape, device="cuda", sparse=True)
        for name in ("gate", "up", "down")
    }
    replace_quantized(block, stored, {"gate": {}, "up": {}})
    hidden = torch.randn(2, 64, 1024, device="cuda", dtype=torch.float16)
    expected = block(hidden)[0]
    compiled = CompiledModule(block, [(hidden.shape,)])
    try:
        captured = capture(lambda: compiled(hidden))
        captured.replay()
        torch.cuda.synchronize()
        distance = (captured.outputs[0].double() - expected.double()).norm()
        # Between the layers it keeps float32, so that some inputs round to the next number.
        assert float(distance / expected.double().norm()) < 3e-2
        seen = kernels_by_layer(_call(compiled, hidden))
    finally:
        compiled.close()
    assert set(seen) == {"gate", "up"}
    assert all(sparse_kernels(kernels) for kernels in seen.values())


def _call(module: Callable[..., object], hidden: Tensor) -> Callable[[], object]:
    return lambda: module(hidden)


@pytest.mark.parametrize("format", FORMATS)
def test_a_gemm_is_timed_dense_and_sparse(format: GemmFormat) -> None:
    shape = GemmShape(n=8192, k=8192, m=4096)
    profile = measure_gemms(gpu_profile(), [shape], format, lambda *_: None)
    timing = profile.known(shape, format)
    assert timing is not None
    assert timing.speedup > 1.1
    assert profile.formats == (format,)
