"""Graphs as other exporters lay them out: torch's TorchScript exporter, optimum, GenAI, ORT."""

import itertools
import tracemalloc
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from graph_models import Array, array_24, block_linears, node, spoil, tiny_bert, write_onnx
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional

from prox24_deploy.core.records import TensorCheck
from prox24_deploy.graph.check.check import check_onnx

MICROSOFT = "com.microsoft"


def by_module(path: Path) -> dict[str, TensorCheck]:
    checks = check_onnx(path)
    assert len({check.module for check in checks}) == len(checks)
    return {check.module: check for check in checks}


def loop_is_24(weight: Tensor) -> bool:
    """Groups of four inputs of a torch weight, one by one; inputs are axis 1."""
    array = weight.detach().movedim(1, -1).reshape(-1, weight.shape[1]).numpy()
    starts = range(0, array.shape[1] - 3, 4)
    return array.shape[1] % 4 == 0 and all(
        np.count_nonzero(row[start : start + 4]) <= 2
        for row, start in itertools.product(array, starts)
    )


class Layers(nn.Module):
    """A convolution and linear layers, one packed and used in three slices."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 16, 3, groups=2)
        self.up = nn.ConvTranspose2d(16, 8, 2)
        self.first = nn.Linear(8, 16, bias=False)
        self.second = nn.Linear(16, 12)
        self.packed = nn.Parameter(torch.randn(12, 12))
        with torch.no_grad():
            for weight in (self.conv.weight, self.first.weight, self.packed):
                moved = weight.movedim(1, -1).reshape(-1, 4).clone()
                moved.scatter_(-1, moved.abs().argsort(-1)[..., :2], 0.0)
                shape = weight.movedim(1, -1).shape
                weight.copy_(moved.reshape(shape).movedim(-1, 1))
            self.packed[5, 4:7] = 1.0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(self.conv(x)).mean(-1).movedim(1, -1)
        hidden = self.second(self.first(hidden).relu())
        parts = [functional.linear(hidden, self.packed[i : i + 4]) for i in (0, 4, 8)]
        return torch.cat(parts, -1)


def legacy_export(module: nn.Module, x: Tensor, path: Path, *, fold: bool) -> Path:
    pytest.importorskip("onnxscript", reason="torch's exporters import onnxscript")
    with warnings.catch_warnings():
        # The exporter warns of its own age, and tracing of every branch that it fixes.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (x,), str(path), dynamo=False, opset_version=18, do_constant_folding=fold
        )
    return path


@pytest.mark.parametrize("fold", [False, True])
def test_torchscript_export_of_every_kind_of_layer(tmp_path: Path, *, fold: bool) -> None:
    module = Layers()
    path = legacy_export(module, torch.rand(2, 8, 6, 6), tmp_path / "m.onnx", fold=fold)
    checks = check_onnx(path)
    named = {check.module: check for check in checks if check.module}
    assert set(named) == {"conv", "up", "first", "second"}
    for name in ("conv", "first", "second"):
        weight = module.get_submodule(name).get_parameter("weight")
        assert named[name].is_24 == loop_is_24(weight), name
    assert (named["up"].axis, named["up"].is_24) == (0, False)
    packed = [check for check in checks if not check.module]
    rows = [module.packed[i : i + 4] for i in (0, 4, 8)]
    assert [check.is_24 for check in packed] == [loop_is_24(part) for part in rows]
    assert [check.is_24 for check in packed] == [True, False, True]
    if not fold:
        assert [check.part for check in packed] == ["[0:4, :]", "[4:8, :]", "[8:12, :]"]
        assert packed[1].first_violation == (5, 4)


def test_torchscript_export_of_an_encoder_names_every_module(tmp_path: Path) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = tiny_bert()

        def forward(self, ids: Tensor) -> Tensor:
            output: Tensor = self.bert(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            return output

    ids = torch.ones(1, 8, dtype=torch.int64)
    model = Encoder().eval()
    found = by_module(legacy_export(model, ids, tmp_path / "m.onnx", fold=True))
    assert set(found) == {f"bert.{name}" for name in block_linears(model.bert)}
    assert all(check.is_24 and check.axis == 0 for check in found.values())
    assert {check.ineligible_reason.split(" ", 1)[0] for check in found.values()} == {"float32"}


def test_optimum_shares_a_transposed_table_between_embedding_and_head(tmp_path: Path) -> None:
    nodes = [
        node("Gather", ["shared", "x"], "/model/embed_tokens/Gather_output_0"),
        node("MatMul", ["/model/embed_tokens/Gather_output_0", "onnx::MatMul_302"], "h"),
        node("Transpose", ["shared"], "onnx::MatMul_303", perm=[1, 0]),
        node("MatMul", ["h", "onnx::MatMul_303"], "y"),
    ]
    nodes[1].name, nodes[3].name = "/model/layers.0/mlp/gate_proj/MatMul", "/lm_head/MatMul"
    weights = {"shared": np.ones((12, 8), np.float32), "onnx::MatMul_302": array_24((8, 8), 0)}
    found = by_module(write_onnx(tmp_path / "m.onnx", nodes, weights))
    assert {name: (c.tensor, c.axis, c.is_24) for name, c in found.items()} == {
        "model.layers.0.mlp.gate_proj": ("onnx::MatMul_302", 0, True),
        "lm_head": ("shared", 1, False),
    }


def genai_block(weights: Mapping[str, Array]) -> dict[str, Array]:
    """Constants of one decoder block: projections, rotary tables and the norms between."""
    tables = {name: np.ones((16, 4), np.float16) for name in ("cos_cache", "sin_cache")}
    return {**weights, **tables, "norm": np.ones(16, np.float16)}


def test_genai_packs_projections_and_keeps_tables_beside_them(tmp_path: Path) -> None:
    root = "/model/layers.0"
    attention = ["qkv", "", "", "past_k", "past_v", "len", "total", "cos_cache", "sin_cache"]
    nodes = [
        node("MatMul", ["x", "qkv.weight"], "qkv"),
        node("GroupQueryAttention", attention, "attn", domain=MICROSOFT, num_heads=4),
        node("MatMul", ["attn", "o.weight"], "o"),
        node("SkipSimplifiedLayerNormalization", ["x", "o", "norm"], "n", domain=MICROSOFT),
        node("MatMul", ["n", "up.weight"], "y"),
    ]
    for index, name in ((0, "attn/qkv_proj"), (2, "attn/o_proj"), (4, "mlp/up_proj")):
        nodes[index].name = f"{root}/{name}/MatMul"
    weights = genai_block(
        {
            "qkv.weight": spoil(array_24((16, 32), 0, "float16"), (4, 20), 0),
            "o.weight": array_24((16, 16), 0, "float16"),
            "up.weight": array_24((16, 32), 0, "float16"),
        }
    )
    found = by_module(write_onnx(tmp_path / "m.onnx", nodes, weights, opset=22))
    assert {name: (c.is_24, c.eligible, c.first_violation) for name, c in found.items()} == {
        "model.layers.0.attn.qkv_proj": (False, False, (4, 20)),
        "model.layers.0.attn.o_proj": (True, True, None),
        "model.layers.0.mlp.up_proj": (True, True, None),
    }


def test_genai_in_four_bits_is_listed_and_not_proven(tmp_path: Path) -> None:
    nodes = [node("MatMulNBits", ["x", "w_Q4", "scales"], "y", domain=MICROSOFT, K=64, N=8, bits=4)]
    nodes[0].name = "/model/layers.0/mlp/up_proj/MatMul_Q4"
    weights: dict[str, Array] = {
        "w_Q4": np.full((8, 2, 16), 0x88, np.uint8),
        "scales": np.ones((8, 2), np.float16),
    }
    found = by_module(write_onnx(tmp_path / "m.onnx", nodes, weights))
    check = found["model.layers.0.mlp.up_proj"]
    assert (check.tensor, check.dtype, check.is_24, check.axis) == ("w_Q4", "uint8", False, -1)


def test_onnx_runtime_fuses_transposes_and_activations(tmp_path: Path) -> None:
    nodes = [
        node("FusedMatMul", ["x", "a"], "f", domain=MICROSOFT, transB=1),
        node("FusedGemm", ["f", "b"], "g", domain=MICROSOFT, activation="Relu", transB=1),
        node("FusedConv", ["g", "c"], "y", domain=MICROSOFT, activation="Relu"),
    ]
    weights = {
        "a": array_24((8, 16), 1),
        "b": array_24((8, 16), 0),
        "c": array_24((8, 16, 3, 3), 1),
    }
    checks = check_onnx(write_onnx(tmp_path / "m.onnx", nodes, weights))
    assert [(c.tensor, c.axis, c.is_24) for c in checks] == [
        ("a", 1, True), ("b", 1, False), ("c", 1, True),
    ]  # fmt: skip


def test_quantiser_that_works_per_channel_keeps_the_pattern(tmp_path: Path) -> None:
    nodes = [
        node("DequantizeLinear", ["w", "scales", "zeros"], "d", axis=1),
        node("Cast", ["d"], "h", to=TensorProto.FLOAT16),
        node("MatMul", ["x", "h"], "y"),
    ]
    weights: dict[str, Array] = {
        "w": (array_24((16, 8), 0) != 0).astype(np.int8),
        "scales": np.ones(8, np.float32),
        "zeros": np.zeros(8, np.int8),
    }
    (check,) = check_onnx(write_onnx(tmp_path / "m.onnx", nodes, weights))
    assert (check.dtype, check.is_24, check.eligible) == ("int8", True, True)


def test_node_name_that_is_no_path_tells_no_module(tmp_path: Path) -> None:
    for name, module in (("MatMul_12", ""), ("dense/MatMul", ""), ("/MatMul", ""), ("/a/M", "a")):
        made = node("MatMul", ["x", "w"], "y")
        made.name = name
        path = write_onnx(tmp_path / "m.onnx", [made], {"w": array_24((8, 8), 0)})
        assert check_onnx(path)[0].module == module


@pytest.mark.parametrize("transposed", [False, True])
def test_a_large_weight_is_checked_without_a_copy_of_it(
    tmp_path: Path, *, transposed: bool
) -> None:
    weight = np.zeros((2048, 8192), np.float16)
    nodes = [node("Slice", ["w", "b", "e", "a"], "s"), node("Transpose", ["s"], "t")]
    nodes.append(helper.make_node("MatMul", ["x", "t" if transposed else "s"], ["y"]))
    weights = {"w": weight, **{n: np.array([v]) for n, v in {"b": 4, "e": 8188, "a": 1}.items()}}
    path = write_onnx(tmp_path / "m.onnx", nodes, weights, external=True)
    tracemalloc.start()
    (check,) = check_onnx(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (check.is_24, check.part) == (True, "[:, 4:8188]")
    assert peak < weight.nbytes // 8
