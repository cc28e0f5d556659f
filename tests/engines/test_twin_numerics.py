"""What a twin must compute, where a check must fail and where it must not."""

from collections.abc import Iterator

import pytest
import torch
from quantized_layers import stored_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prox24_deploy.core.types import QuantizedFormat
from prox24_deploy.engines.cusparselt.numerics import (
    LAYER_TOLERANCE,
    LayerNumbers,
    compare_outputs,
    nudged_inputs,
)
from prox24_deploy.engines.cusparselt.quantized import replace_quantized
from prox24_deploy.quantization.tensors import (
    QuantizedLayer,
    QuantizedModel,
    apply_inputs,
    apply_weights,
)

EIGHT: tuple[QuantizedFormat, ...] = ("fp8", "int8")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half()


def rounding(depth: int, width: int = 32) -> tuple[nn.Sequential, QuantizedModel]:
    """Layers in float16 that round what they read, with a bend between them, and their numbers."""
    layers = {}
    modules: list[nn.Module] = []
    for i in range(depth):
        values = 32 * draw(width, width, seed=10 + i).float()
        layers[str(2 * i)] = QuantizedLayer(
            weight=values.round().clamp(-127, 127).to(torch.int8),
            weight_scale=torch.full((width,), 5e-3),
            input_scale=0.03,
        )
        modules += [nn.Linear(width, width, bias=False), nn.Tanh()]
    model, quantized = nn.Sequential(*modules).half(), QuantizedModel(format="int8", layers=layers)
    apply_weights(model, quantized)
    apply_inputs(model, quantized)
    return model, quantized


def test_a_check_fails_beyond_the_tolerance_of_its_dtype() -> None:
    expected = [(torch.tensor([1.0, -2.0]),), (torch.tensor([4.0]),)]
    close = [(torch.tensor([1.0, -2.0]),), (torch.tensor([4.07]),)]
    far = [(torch.tensor([1.0, -2.0]),), (torch.tensor([4.09]),)]
    (found,) = compare_outputs(["out"], expected, close, "float16")
    assert found.passed
    assert found.tolerance == pytest.approx(0.08)
    assert found.shapes == ((2,), (1,))
    assert not compare_outputs(["out"], expected, far, "float16")[0].passed
    assert compare_outputs(["out"], expected, far, "bfloat16")[0].passed


def test_a_nan_in_any_run_is_no_agreement_and_the_same_infinity_is_one() -> None:
    expected = [(torch.tensor([1.0, -torch.inf]),), (torch.tensor([4.0, 1.0]),)]
    broken = [expected[0], (torch.tensor([4.0, torch.nan]),)]
    assert compare_outputs(["out"], expected, expected, "float16")[0].passed
    assert not compare_outputs(["out"], expected, broken, "float16")[0].passed
    lost = [(torch.tensor([1.0, 0.0]),), expected[1]]
    assert not compare_outputs(["out"], expected, lost, "float16")[0].passed


def test_what_is_off_in_its_last_bit_is_so_for_a_while_and_the_same_each_time() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).half()
    model.get_parameter("0.weight").copy_(torch.eye(64))
    stored = stored_weight("int8", 64, 64, device="cpu", sparse=False)
    quantized, read, found = QuantizedModel(format="int8", layers={"0": stored}), draw(50, 64), []
    for _ in range(2):
        with nudged_inputs(model, quantized):
            found.append(model(read))
    assert torch.equal(found[0], found[1])
    share = (found[0].double() - read.double()) / read.double()
    assert 0.4 < float((share > 0).double().mean()) < 0.6
    assert float(share.abs().min()) >= 2**-11
    assert float(share.abs().max()) <= 2**-9
    assert torch.equal(model(read), read)


def test_a_value_that_falls_the_other_way_is_no_fault_and_a_wrong_layer_is_one() -> None:
    model, quantized = rounding(10)
    read = 2 * draw(400, 32, seed=1)
    expected = [(model(read),)]
    with nudged_inputs(model, quantized):
        nudged = [(model(read),)]
    replace_quantized(model, quantized.layers, {})
    found = [(model(read),)]
    assert not compare_outputs(["out"], expected, found, "bfloat16")[0].passed
    assert compare_outputs(["out"], expected, found, "bfloat16", nudged)[0].passed
    weight = model.get_submodule("18").get_buffer("weight")
    weight.copy_(weight.roll(1, 0))
    wrong = [(model(read),)]
    assert not compare_outputs(["out"], expected, wrong, "bfloat16", nudged)[0].passed


def test_no_tolerance_lets_everything_pass() -> None:
    expected, far = [(torch.tensor([1.0]),)], [(torch.tensor([1.6]),)]
    for moved in (torch.inf, 2.0):
        nudged = [(torch.tensor([moved]),)]
        assert not compare_outputs(["out"], expected, far, "bfloat16", nudged)[0].passed


@pytest.mark.parametrize("format", EIGHT)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_each_layer_is_held_to_its_numbers_on_what_it_reads(
    format: QuantizedFormat, kind: type[nn.Module]
) -> None:
    model = nn.Sequential(kind(64, 64), nn.Tanh(), kind(64, 64)).half()
    stored = {
        name: stored_weight(format, 64, 64, device="cpu", sparse=False) for name in ("0", "2")
    }
    quantized = QuantizedModel(format=format, layers=stored)
    numbers = LayerNumbers(model, quantized)
    # A layer that rounds what it reads and multiplies in 16 bits does the same.
    apply_weights(model, quantized)
    apply_inputs(model, quantized)
    with numbers.watch(model) as off:
        model(draw(100, 64))
    assert off.keys() == {"0", "2"}
    assert max(off.values()) <= LAYER_TOLERANCE
    weight = model.get_parameter("2.weight")
    held = weight.clone()
    for factor in (1.05, torch.nan):
        weight.mul_(factor)
        with numbers.watch(model) as off:
            model(draw(100, 64))
        assert off["0"] <= LAYER_TOLERANCE
        assert not off["2"] <= LAYER_TOLERANCE
        weight.copy_(held)
    # A fault is remembered, whatever runs behind it.
    with numbers.watch(model) as off:
        for factor in (1.05, 1.0):
            weight.copy_(held * factor)
            model(draw(100, 64))
    assert off["2"] > LAYER_TOLERANCE


def test_a_layer_that_reads_nothing_is_right() -> None:
    model, quantized = rounding(1)
    with LayerNumbers(model, quantized).watch(model) as off:
        model(draw(0, 32))
    assert off == {"0": 0.0}
