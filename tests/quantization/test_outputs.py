"""Which INT8 layers round what they give: what reads an output, what rounding it costs, by name."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.core.types import QuantizedFormat
from prox24_deploy.model.batch import Batch
from prox24_deploy.model.blocks import BlockCall
from prox24_deploy.model.layers import layer_at
from prox24_deploy.pruning.activations import Activations, BlockPair
from prox24_deploy.quantization import layer_group, outputs
from prox24_deploy.quantization.formats import FORMATS
from prox24_deploy.quantization.layer_group import quantize_group
from prox24_deploy.quantization.outputs import BLOCK_OUTPUT, OutputChoice, choose_outputs
from prox24_deploy.quantization.tensors import (
    QuantizedLayer,
    QuantizedModel,
    RoundedOutput,
    apply_rounding,
    dequantized,
)

WIDTH = 16


@pytest.fixture(autouse=True)
def every_layer_is_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever that costs in a block as small as this."""
    monkeypatch.setattr(layer_group, "_MOST_ADDED", 1.0)


class Block(nn.Module):
    """Layers whose outputs are read in every way; (batch, positions, 16) to the same."""

    NAMES = ("gate", "up", "down", "last")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """`up` is read behind what TensorRT fuses, `gate` and `down` by others, `last` by none."""
        passed = functional.gelu(self.up(x)).transpose(1, 2).reshape(x.shape[0], WIDTH, -1)
        inner = self.down(passed.transpose(1, 2)) * self.gate(x).sigmoid()
        y: Tensor = self.last(inner)
        return y


def activations(block: Block, seed: int) -> Activations:
    x = torch.randn(4, 8, WIDTH, generator=torch.Generator().manual_seed(seed))
    real = torch.ones(4, 8, dtype=torch.bool)
    calls = [[BlockCall((), {})]]
    return Activations((Batch({}, real),), [real], calls, calls, [x], [x])


def made(
    form: QuantizedFormat, change: Callable[[Block], None] = lambda _: None
) -> tuple[BlockPair, dict[str, QuantizedLayer], list[Activations]]:
    """A block whose layers are all quantised and round what they read."""
    block = Block()
    with torch.no_grad():
        change(block)
        twin = BlockPair(index=0, prefix="h.0", dense=deepcopy(block), pruned=block)
        sets = [activations(block, seed) for seed in (1, 2)]
        layers: dict[str, QuantizedLayer] = {}
        for group in (["gate", "up"], ["down"], ["last"]):
            new = quantize_group(twin, group, sets, FORMATS[form]).layers
            for name, stored in new.items():
                layer = layer_at(block, name)
                layer.weight.copy_(dequantized(layer, stored, form))
            apply_rounding(block, QuantizedModel(format=form, layers=new))
            layers |= new
    assert layers.keys() == set(Block.NAMES)
    return twin, layers, sets


def chosen(
    form: QuantizedFormat, change: Callable[[Block], None] = lambda _: None
) -> dict[str, OutputChoice]:
    twin, layers, sets = made(form, change)
    return choose_outputs(twin, layers, sets, FORMATS[form])


def test_an_output_is_followed_to_what_reads_it() -> None:
    twin, layers, sets = made("int8")
    found = outputs.output_readers(twin, layers, sets[0])
    assert found == {
        "gate": {"sigmoid"}, "up": {"down"}, "down": {"mul"}, "last": {BLOCK_OUTPUT},
    }  # fmt: skip


def test_an_output_that_a_reader_rounds_gets_no_scale_and_the_others_do() -> None:
    found = chosen("int8")
    assert found["up"] == OutputChoice(reason="down rounds it")
    for name in ("gate", "down"):
        assert found[name].reason == ""
        assert found[name].scale is not None
        assert found[name].limit == 127 * (found[name].scale or 0) > 0
        assert found[name].chosen_by
    # Where a reader stays in 16 bits, nothing rounds it.
    twin, layers, sets = made("int8")
    found = choose_outputs(twin, {"up": layers["up"]}, sets, FORMATS["int8"])
    assert not found["up"].reason.endswith("rounds it")


def test_the_error_of_a_block_stays_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    twin, layers, sets = made("int8")

    def error() -> float:
        with torch.no_grad():
            x = sets[1].pruned[0]
            return float((twin.pruned(x) - twin.dense(x)).square().sum())

    plain = error()
    found = choose_outputs(twin, layers, sets, FORMATS["int8"])
    assert error() == plain
    for name, choice in found.items():
        if choice.scale:
            hook = RoundedOutput("int8", choice.scale)
            layer_at(twin.pruned, name).register_forward_hook(hook)
    assert plain < error() <= (1 + outputs.MOST_ADDED) * plain
    twin, layers, sets = made("int8")
    monkeypatch.setattr(outputs, "MOST_ADDED", 0.0)
    tight = choose_outputs(twin, layers, sets, FORMATS["int8"])
    assert sum(choice.scale is not None for choice in tight.values()) < sum(
        choice.scale is not None for choice in found.values()
    )


def test_an_output_that_costs_too_much_is_left_with_the_factor() -> None:
    def one_large_channel(block: Block) -> None:
        block.gate.bias[0] = 1e4

    choice = chosen("int8", one_large_channel)["gate"]
    assert choice.scale is None
    assert choice.reason.startswith("rounding it besides would make the error of its block ")
    assert float(choice.reason.split()[-4]) > 10


def test_nothing_is_rounded_for_its_own_sake_in_fp8_nor_behind_zeros() -> None:
    assert {choice.reason for choice in chosen("fp8").values()} == {
        "sparse kernels of fp8 give 16 bits"
    }

    def silent(block: Block) -> None:
        for parameter in block.gate.parameters():
            parameter.zero_()

    assert chosen("int8", silent)["gate"].reason == "it is all zero on calibration samples"


def test_an_output_without_a_range_is_refused_by_name() -> None:
    twin, layers, sets = made("int8")
    with torch.no_grad():
        layer_at(twin.pruned, "down").weight[0] = torch.inf
    with pytest.raises(ModelDirError, match=r"Layer h\.0\.down gives NaN or infinity .* no range"):
        choose_outputs(twin, layers, sets, FORMATS["int8"])
