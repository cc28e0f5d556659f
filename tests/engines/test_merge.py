"""Layers that read the same input become one product, and compute what they computed."""

import pytest
import torch
from family_batches import recipe_of
from tiny_families import FAMILIES, tiny_model
from torch import Tensor, nn

from prox24_deploy.core.shapes import Shape
from prox24_deploy.engines.cusparselt import cuda_graph
from prox24_deploy.engines.cusparselt.inductor import CompiledModule
from prox24_deploy.engines.cusparselt.linear import LayerUse, layer_uses
from prox24_deploy.engines.cusparselt.merge import (
    alike,
    by_member,
    members,
    merge_layers,
    merged_numbers,
    merged_uses,
    product_name,
    shared_layers,
)
from prox24_deploy.engines.cusparselt.profile import GemmShape, GemmTiming
from prox24_deploy.engines.cusparselt.sharing import ShareEqual
from prox24_deploy.engines.cusparselt.torch_model import TorchModel, as_engine
from prox24_deploy.model.layers import layer_at
from prox24_deploy.quantization.tensors import QuantizedLayer, QuantizedModel

QKV = ("block.q", "block.k", "block.v")


class Block(nn.Module):
    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, n, bias=bias) for n in (8, 4, 4))
        self.o = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        mixed = self.q(hidden) + torch.cat([self.k(hidden), self.v(hidden)], -1)
        out: Tensor = self.o(mixed)
        return out


class Model(nn.Module):
    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = Block(bias=bias)

    def forward(self, hidden: Tensor) -> tuple[Tensor]:
        return (self.block(hidden * 1.5),)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "DEVICE", "cpu")


def test_names_tell_what_a_product_stands_for() -> None:
    assert product_name(QKV) == "block.q+k+v"
    assert members("block.q+k+v") == QKV
    assert members("block.o") == ("block.o",)
    assert members("top") == ("top",)


@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_a_product_is_computed_once_in_a_run(*, bias: bool) -> None:
    model = Model(bias=bias).eval()
    hidden = torch.randn(2, 3, 8)
    groups = shared_layers(model, lambda: model(hidden))
    assert groups == (QKV,)
    expected = model(hidden)[0]
    merge_layers(model, groups)
    assert layer_at(model, "block.q+k+v").weight.shape == (16, 8)
    runs: list[Tensor] = []
    layer_at(model, "block.q+k+v").register_forward_hook(lambda *given: runs.append(given[2]))
    torch.testing.assert_close(model(hidden)[0], expected)
    assert len(runs) == 1
    # The same tensor with other values, as the buffer of a CUDA graph is.
    hidden += 1
    torch.testing.assert_close(model(hidden)[0], Model(bias=bias).eval()(hidden)[0])
    assert len(runs) == 2


@torch.inference_mode()
def test_a_tensor_read_again_is_not_taken_for_what_it_held() -> None:
    """Where layers read the input of the model itself, which replays write anew."""
    model = Model().eval()
    merge_layers(model, (QKV,))
    block, hidden = model.block, torch.randn(2, 3, 8)
    first = block(hidden)
    hidden.zero_()
    assert not torch.allclose(block(hidden), first)


@torch.inference_mode()
def test_compiled_code_has_one_product() -> None:
    model = Model().eval()
    hidden = torch.randn(2, 3, 8)
    expected = model(hidden)[0]
    merge_layers(model, (QKV,))
    products: list[int] = []

    class Counted(ShareEqual):
        def __call__(self, graph: torch.fx.Graph) -> None:
            super().__call__(graph)
            products.append(sum(node.target is PRODUCT for node in graph.nodes))

    with (
        pytest.MonkeyPatch.context() as patch,
        torch._inductor.config.patch(force_disable_caches=True),
    ):
        patch.setattr("prox24_deploy.engines.cusparselt.inductor._SHARING", Counted())
        compiled = CompiledModule(model, [(hidden.shape,)])
        torch.testing.assert_close(compiled(hidden)[0], expected)
        compiled.close()
    assert products == [2]


PRODUCT = torch.ops.aten.addmm.default


def test_only_layers_that_are_held_alike_are_merged() -> None:
    model = Model()
    with torch.no_grad():
        for name in QKV[1:]:
            layer_at(model, name).weight.view(-1, 2, 4)[..., 2:] = 0
    assert alike((QKV,), model) == (QKV[1:],)
    numbers = {
        name: QuantizedLayer(
            weight=torch.full((4, 8), row, dtype=torch.int8),
            weight_scale=torch.full((4,), float(row)),
            input_scale=scale,
        )
        for row, (name, scale) in enumerate(zip(QKV[1:], (0.5, 0.25), strict=True))
    }
    apart = QuantizedModel(format="int8", layers=numbers)
    assert alike((QKV,), model, apart) == ()
    same = {name: QuantizedLayer(
        weight=one.weight, weight_scale=one.weight_scale, input_scale=0.5
    ) for name, one in numbers.items()}  # fmt: skip
    together = QuantizedModel(format="int8", layers=same)
    assert alike((QKV,), model, together) == (QKV[1:],)
    whole = merged_numbers(together, (QKV[1:], ("other.a", "other.b")))
    assert set(whole.layers) == {"block.k+v"}
    assert whole.layers["block.k+v"].weight[:, 0].tolist() == [0] * 4 + [1] * 4
    assert whole.layers["block.k+v"].weight_scale.tolist() == [0] * 4 + [1] * 4


def test_times_of_a_product_are_shared_by_outputs() -> None:
    gemm = GemmShape(n=8, k=8, m=6)
    uses = [
        LayerUse(name=name, n=n, k=8, gemms=(GemmShape(n=n, k=8, m=6),))
        for name, n in (("block.q", 8), ("block.k", 4), ("block.v", 4), ("block.o", 8))
    ]
    merged = merged_uses(uses, (QKV,))
    assert [(use.name, use.n, use.gemms[0].n) for use in merged] == [
        ("block.q+k+v", 16, 16), ("block.o", 8, 8),
    ]  # fmt: skip
    timing = GemmTiming(shape=gemm, dense_us=16.0, sparse_us=8.0, algorithm=3)
    found = by_member("block.q+k+v", [timing], {use.name: use.n for use in uses})
    assert [(one.dense_us, one.sparse_us, one.algorithm) for (one,) in found.values()] == [
        (8.0, 4.0, 3), (4.0, 2.0, 3), (4.0, 2.0, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("row", FAMILIES)
@torch.inference_mode()
def test_a_family_computes_the_same(row: str) -> None:
    """Every model of one graph, and that its GEMMs are those of its products."""
    model = tiny_model(row).eval()
    recipe = recipe_of(model)
    if recipe.decoder is not None or not recipe.modality.has_length:
        pytest.skip("has two graphs, or no text")
    opened, shape = TorchModel(as_engine(model, recipe), "float32", 90), Shape(batch=2, sequence=5)
    feeds = opened.feeds(shape)
    expected = opened.run(feeds)
    groups = opened.groups(shape)
    single = layer_uses(model, [lambda: opened.run(feeds)])
    found = opened.merge(groups)
    assert found.merged == groups
    for one, now in zip(expected, found.run(feeds), strict=True):
        torch.testing.assert_close(now, one, atol=2e-5, rtol=1e-4)
    uses = {use.name: use for use in layer_uses(model, [lambda: found.run(feeds)])}
    assert uses == {use.name: use for use in merged_uses(single, groups)}
    assert len(uses) == len(single) - sum(len(group) - 1 for group in groups)
