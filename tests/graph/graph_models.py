"""Small files and models for the tests of the graph room."""

import itertools
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from prox24_deploy.config.recipe import Recipe, parse_recipe, read_recipe

Array = npt.NDArray[Any]

VOCABULARY = 64

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_SAFETENSORS_NAMES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip

TOY_RECIPE = """
family = "toy"
model_types = ["toy"]
task = "feature-extraction"
blocks = "layers"
targets = ["*"]

[[inputs]]
name = "x"
dtype = "float"
axes = ["batch", 8]

[[outputs]]
name = "last_hidden_state"
dtype = "float"
axes = ["batch", 4]
"""

MASKED_RECIPE = """
family = "masked"
model_types = ["masked"]
task = "feature-extraction"
blocks = "layers"
targets = ["*"]

[[inputs]]
name = "input_ids"
dtype = "int64"
axes = ["batch", "sequence"]

[[inputs]]
name = "attention_mask"
dtype = "int64"
axes = ["batch", "sequence"]

[[inputs]]
name = "token_type_ids"
dtype = "int64"
axes = ["batch", "sequence"]

[[outputs]]
name = "last_hidden_state"
dtype = "float"
axes = ["batch", "sequence", "hidden"]
"""


class Toy(nn.Module):
    """Two linear layers; (batch, 8) to (batch, 4)."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(8, 16, bias=False)
        self.second = nn.Linear(16, 4)
        for layer in (self.first, self.second):
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator)
        self.second.bias.data = torch.ones(4)
        self.eval()

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.second(self.first(x).relu()))


class Masked(nn.Module):
    """An embedding and a linear layer; `at_masked` is added where the mask is zero."""

    def __init__(self, at_masked: float = 0.0) -> None:
        super().__init__()
        self.at_masked = at_masked
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Embedding(16, 8)
        self.table.weight.data = torch.randn(16, 8, generator=generator)
        self.dense = nn.Linear(8, 8, bias=False)
        self.dense.weight.data = torch.randn(8, 8, generator=generator)
        self.eval()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor,
    ) -> SimpleNamespace:
        hidden = self.dense(self.table(input_ids)) * (1 + token_type_ids[..., None])
        masked = (1 - attention_mask[..., None]) * self.at_masked
        return SimpleNamespace(last_hidden_state=hidden + masked.to(hidden.dtype))


def tiny_bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    return pruned(BertModel(config, add_pooling_layer=False))


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return pruned(LlamaForCausalLM(config))


def shipped_recipe(family: str) -> Recipe:
    return read_recipe(Path(__file__).parents[2] / "export" / f"{family}.toml")


def block_linears(model: nn.Module) -> list[str]:
    """Every linear layer but the head, which shares its weight with the embedding."""
    return [
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and name != "lm_head"
    ]


def toy_recipe(text: str = TOY_RECIPE) -> Recipe:
    return parse_recipe(text, "the test")


def pruned(model: nn.Module) -> nn.Module:
    """Zero the two smallest of every four consecutive in_features of each linear layer."""
    for name in block_linears(model):
        weight = model.get_submodule(name).get_parameter("weight")
        groups = weight.data.view(weight.shape[0], -1, 4)
        groups.scatter_(-1, groups.abs().argsort(-1)[..., :2], 0.0)
    return model.eval()


def array_24(shape: Sequence[int], axis: int, dtype: str = "float32") -> Array:
    """Random values, two of every four zero along `axis`, the zeros at varying places."""
    generator = np.random.default_rng(7)
    values = 1.0 + generator.random(shape)
    moved = np.moveaxis(values, axis, -1)
    groups = moved.reshape(*moved.shape[:-1], -1, 4)
    groups = np.where(generator.random(groups.shape).argsort(-1) < 2, groups, 0.0)
    back = np.moveaxis(groups.reshape(moved.shape), -1, axis)
    return np.ascontiguousarray(back).astype(DTYPES[dtype])


def spoil(array: Array, index: tuple[int, ...], axis: int) -> Array:
    """Copy with all four elements non-zero in the group of which `index` is the first element."""
    group = list[int | slice](index)
    group[axis] = slice(index[axis], index[axis] + 4)
    copy = array.copy()
    copy[tuple(group)] = 3
    return copy


def node(
    op_type: str, inputs: Sequence[str], output: str, module: str = "", **attributes: Any
) -> onnx.NodeProto:
    made = helper.make_node(op_type, inputs, [output], name=f"node_{output}", **attributes)
    if module:
        made.metadata_props.add(key="prox24.module", value=module)
    return made


def write_onnx(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, Array],
    *,
    declared: Sequence[str] | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
    external: bool = False,
    opset: int = 20,
) -> Path:
    """Write a graph from input "x" to output "y"; nothing here infers or checks shapes."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    domains = {"": opset, "local": 1, "com.microsoft": 1}
    opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)
    if declared is not None:
        helper.set_model_props(model, {"prox24.sparse_weights": json.dumps(list(declared))})
    location = f"{path.name}.data" if external else None
    onnx.save(model, path, save_as_external_data=external, location=location, size_threshold=0)
    return path


def write_matmul(
    path: Path, weight: Array, *, declared: Sequence[str] | None = None, external: bool = False
) -> Path:
    nodes = [node("MatMul", ["x", "w"], "y", "layer.dense")]
    return write_onnx(path, nodes, {"w": weight}, declared=declared, external=external)


def write_safetensors(
    path: Path, tensors: Mapping[str, Array], declared: Mapping[str, int] | None = None
) -> Path:
    """Write a file by the format's definition, so that the reader is tested against that."""
    header: dict[str, Any] = {}
    if declared is not None:
        header["__metadata__"] = {"prox24.sparse_weights": json.dumps(dict(declared))}
    body = b""
    for name, value in tensors.items():
        data = value.tobytes()
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[value.dtype.name],
            "shape": list(value.shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def multiplied_matrix(path: Path, inputs: int) -> Array:
    """The matrix (inputs, outputs) that a graph multiplies its input by."""
    unit = np.eye(inputs, dtype=np.float32)
    outputs: Any = ReferenceEvaluator(onnx.load(path)).run(None, {"x": unit})
    return np.asarray(outputs[0])


def bad_groups(matrix: Array) -> int:
    """Groups of four along axis 0 with more than two non-zeros, counted one by one."""
    starts = range(0, len(matrix) - len(matrix) % 4, 4)
    columns = range(matrix.shape[1])
    return sum(
        sum(bool(matrix[start + i, column] != 0) for i in range(4)) > 2
        for start, column in itertools.product(starts, columns)
    )
