"""Export of tiny transformers; each is exported once and looked at by many tests."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from graph_models import (
    VOCABULARY,
    block_linears,
    shipped_recipe,
    tiny_bert,
    tiny_llama,
)
from onnx import numpy_helper
from torch import nn

from prox24_deploy.config.recipe import Recipe, shape_of
from prox24_deploy.core.types import DType
from prox24_deploy.graph.check.check import check_path, require_24
from prox24_deploy.graph.export.export import export_onnx, hash_onnx
from prox24_deploy.graph.export.signature import signature_of
from prox24_deploy.graph.parity.numerics import compare_with_torch

MODELS = {"bert": tiny_bert, "llama": tiny_llama}
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Export:
    family: str
    dtype: DType
    model: nn.Module
    recipe: Recipe
    path: Path

    @property
    def sparse(self) -> list[str]:
        return block_linears(self.model)

    def graph(self) -> onnx.GraphProto:
        return onnx.load(self.path).graph


@pytest.fixture(
    scope="module",
    # Either family in either dtype would be traced twice more for the same code; other dtypes of
    # these two are in test_bisect.py, and in the builds of test_build.py.
    params=[("bert", "float16"), ("llama", "float32")],
    ids=lambda param: "-".join(param),
)
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Export:
    family, dtype = request.param
    model = MODELS[family]()
    recipe = shipped_recipe(family)
    out = tmp_path_factory.mktemp(family) / "onnx"
    path = export_onnx(model, recipe, out, dtype=dtype, sparse=block_linears(model))
    return Export(family, dtype, model, recipe, path)


def test_every_pruned_weight_is_proven_on_the_file_under_its_module(export: Export) -> None:
    report = check_path(export.path)
    require_24(report)
    assert report.declared
    expected = {check.module for check in report.tensors if check.expected}
    assert expected == set(export.sparse)
    assert {check.axis for check in report.tensors} == {0}
    assert {check.dtype for check in report.tensors} == {export.dtype}


def test_dense_head_is_reported_and_not_expected(export: Export) -> None:
    dense = [check.module for check in check_path(export.path).tensors if not check.is_24]
    assert dense == (["lm_head"] if export.family == "llama" else [])


def test_folded_weights_get_a_name_from_their_module(export: Export) -> None:
    for check in check_path(export.path).tensors:
        assert check.tensor == f"{check.module}.weight_t"


def test_weights_are_bit_identical_to_the_module(export: Export) -> None:
    stored = {each.name: numpy_helper.to_array(each) for each in export.graph().initializer}
    for name in export.sparse:
        weight = export.model.get_submodule(name).get_parameter("weight").detach().numpy()
        expected = np.ascontiguousarray(weight.T.astype(NUMPY[export.dtype]))
        assert stored[f"{name}.weight_t"].tobytes() == expected.tobytes()


def test_initializers_have_the_names_of_the_checkpoint(export: Export) -> None:
    names = {each.name for each in export.graph().initializer}
    kept = {"bert": "embeddings.LayerNorm.weight", "llama": "model.layers.0.input_layernorm.weight"}
    assert kept[export.family] in names
    assert not [name for name in names if name.startswith("wrapped")]


def axes(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_inputs_and_outputs_are_those_of_the_recipe(export: Export) -> None:
    graph = export.graph()
    signature = signature_of(export.recipe, export.model)
    for spec, value in zip(signature.inputs, graph.input, strict=True):
        assert (value.name, axes(value)) == (spec.name, spec.axes)
    (main, *cached), (value, *present) = signature.outputs, graph.output
    width = VOCABULARY if export.family == "llama" else 32
    assert (value.name, axes(value)) == (main.name, [*main.axes[:2], width])
    for spec, value in zip(cached, present, strict=True):
        assert (value.name, axes(value)) == (spec.name, spec.axes)


def test_a_decoder_takes_and_gives_keys_and_values_of_each_layer(export: Export) -> None:
    names = [f"{layer}.{part}" for layer in (0, 1) for part in ("key", "value")]
    expected = names if export.family == "llama" else []
    graph = export.graph()
    past = {value.name: axes(value) for value in graph.input if "past" in value.name}
    assert past == {f"past_key_values.{n}": ["batch", 2, "past", 8] for n in expected}
    present = {value.name: axes(value) for value in graph.output[1:]}
    assert present == {f"present.{n}": ["batch", 2, "past + sequence", 8] for n in expected}


def test_file_has_the_opset_of_the_recipe_and_external_data(export: Export) -> None:
    model = onnx.load(export.path, load_external_data=False)
    assert [each.version for each in model.opset_import if not each.domain] == [export.recipe.opset]
    large = [each for each in model.graph.initializer if np.prod(each.dims) >= 1024]
    assert large
    for tensor in large:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert entries["location"] == "model.onnx.data"
    assert sorted(path.name for path in export.path.parent.iterdir()) == [
        "model.onnx",
        "model.onnx.data",
    ]


def test_nodes_carry_modules_of_the_model_and_nothing_else(export: Export) -> None:
    modules = {name for name, _ in export.model.named_modules()}
    graph = export.graph()
    found = [(entry.key, entry.value) for node in graph.node for entry in node.metadata_props]
    assert {key for key, _ in found} == {"prox24.module"}
    assert {value for _, value in found} <= modules - {""}
    assert set(export.sparse) <= {value for _, value in found}
    assert not any(node.doc_string for node in graph.node)


def test_file_tells_nothing_of_the_machine_it_was_made_on(export: Export) -> None:
    content = export.path.read_bytes()
    for trace in (b".py", b"site-packages", b"stack_trace", str(Path.cwd()).encode(), b"wrapped"):
        assert trace not in content


def test_export_leaves_the_model_as_it_was(export: Export) -> None:
    fresh = MODELS[export.family]()
    for name, parameter in export.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.requires_grad
        assert torch.equal(parameter, fresh.get_parameter(name))


@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (5, 2)])
def test_any_batch_and_sequence_can_be_run(export: Export, shape: tuple[int, int]) -> None:
    session = ort.InferenceSession(export.path, providers=["CPUExecutionProvider"])
    floats = NUMPY[export.dtype]
    sizes = {"batch": shape[0], "sequence": shape[1], "past": 0}
    feeds = {
        spec.name: np.ones(shape_of(spec, sizes), {"int64": np.int64}.get(spec.dtype, floats))
        for spec in signature_of(export.recipe, export.model).inputs
    }
    output = session.run(None, feeds)[0]
    assert output.shape[:2] == shape
    assert output.dtype == NUMPY[export.dtype]
    assert np.isfinite(output).all()


def test_file_computes_what_the_module_computes(export: Export) -> None:
    check, *cached = compare_with_torch(
        export.model,
        export.path,
        export.recipe,
        dtype=export.dtype,
        twin="sparse",
        vocabulary=VOCABULARY,
    )
    assert (check.output, check.passed) == (export.recipe.outputs[0].name, True)
    shapes = {
        "bert": [(1, 8), (2, 17), (3, 5)],
        "llama": [(1, 8), (2, 6), (2, 5), (3, 1)],
    }
    assert [shape[:2] for shape in check.shapes] == shapes[export.family]
    assert 0 < check.max_abs_difference <= check.tolerance
    assert len(cached) == {"bert": 0, "llama": 4}[export.family]
    for check in cached:
        # Prefill from an empty past, of one row and of a padded batch; a second chunk; one token.
        assert check.shapes == ((1, 2, 8, 8), (2, 2, 6, 8), (2, 2, 14, 8), (3, 2, 8, 8))
        assert 0 < check.max_abs_difference <= check.tolerance


AGAIN = """
import sys
from pathlib import Path
import torch
from graph_models import block_linears, shipped_recipe, tiny_bert, tiny_llama
from prox24_deploy.graph.export.export import export_onnx, hash_onnx
torch.set_num_threads(1)
family, dtype, out = sys.argv[1:]
model = {"bert": tiny_bert, "llama": tiny_llama}[family]()
export_onnx(
    model, shipped_recipe(family), Path(out), dtype=dtype, sparse=block_linears(model)
)
print(hash_onnx(Path(out) / "model.onnx")[0])
"""


# A whole build in another process is in test_build.py, for BERT in float32.
@pytest.mark.large
@pytest.mark.parametrize(
    "export", [("bert", "float16"), ("llama", "float16")], indirect=True, ids="-".join
)
def test_another_process_writes_the_same_bytes(export: Export, tmp_path: Path) -> None:
    here, again = str(Path(__file__).parent), str(tmp_path / "again")
    environment = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": here}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", AGAIN, export.family, export.dtype, again],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == hash_onnx(export.path)[0]
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "again" / name).read_bytes() == (export.path.parent / name).read_bytes()
