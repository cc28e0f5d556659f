"""Quantised layers in ONNX: what the file holds, what ONNX Runtime makes of it, planted faults."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from families import build_plans
from family_batches import batch, recipe_of
from graph_models import Array, toy_recipe
from onnx import numpy_helper
from quantised_models import MIXED_RECIPE, Mixed, images, quantised
from quantized_families import CAPABILITIES
from tiny_families import tiny_model
from torch import nn

from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.errors import ExportError
from prox24_deploy.core.records import NumericsCheck
from prox24_deploy.core.types import DType, QuantizedFormat
from prox24_deploy.graph.check.check import check_path, require_24
from prox24_deploy.graph.export.export import export_graphs, export_onnx
from prox24_deploy.graph.export.stored import require_stored
from prox24_deploy.graph.parity.numerics import compare_with_torch
from prox24_deploy.quantization.tensors import QuantizedModel, apply_rounding, write_quantized

STORED = {"int8": "int8", "fp8": "float8_e4m3fn"}


@dataclass(frozen=True)
class Export:
    model: nn.Module
    made: QuantizedModel
    dtype: DType
    path: Path

    def compare(self, path: Path | None = None) -> NumericsCheck:
        (check,) = compare_with_torch(
            self.model, path or self.path, recipe(), dtype=self.dtype, twin="sparse",
            vocabulary=2, quantized=self.made,
        )  # fmt: skip
        return check

    def prove(self, path: Path) -> None:
        require_stored(path, self.model, self.made, Mixed.LAYERS)


def recipe() -> Recipe:
    return toy_recipe(MIXED_RECIPE)


def exported(out: Path, form: QuantizedFormat, dtype: DType, outputs: Sequence[str] = ()) -> Export:
    model = Mixed()
    made = quantised(model, Mixed.LAYERS, form, lambda: model(images()), outputs)
    path = export_onnx(model, recipe(), out, dtype=dtype, sparse=Mixed.LAYERS, quantized=made)
    return Export(model, made, dtype, path)


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Export:
    return exported(tmp_path_factory.mktemp("int8") / "onnx", "int8", "float32")


@pytest.mark.parametrize(
    ("form", "dtype"), [("int8", "float16"), ("fp8", "float32"), ("fp8", "float16")]
)
def test_every_form_of_layer_is_stored_as_proven_numbers_and_computes_the_same(
    tmp_path: Path, form: QuantizedFormat, dtype: DType
) -> None:
    made = exported(tmp_path / "onnx", form, dtype)
    require_24(report := check_path(made.path))
    found = {check.module: check.dtype for check in report.tensors if check.expected}
    assert found == dict.fromkeys(Mixed.LAYERS, STORED[form])
    assert made.compare().passed


def test_the_graph_has_numbers_behind_one_scale_a_channel_and_shares_the_pair_of_an_input(
    int8: Export,
) -> None:
    graph = onnx.load(int8.path).graph
    counts = {op: sum(node.op_type == op for node in graph.node) for op in ("QuantizeLinear",)}
    # `left` and `right` read one tensor with one scale.
    assert counts == {"QuantizeLinear": len(Mixed.LAYERS) - 1}
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    dequantisers = {node.output[0]: node for node in graph.node if node.op_type[0] == "D"}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    forms = []
    for node in products:
        if node.input[1] not in dequantisers:
            continue
        weight, given = dequantisers[node.input[1]], dequantisers[node.input[0]]
        assert arrays[weight.input[0]].dtype == np.int8
        assert arrays[weight.input[1]].shape == (16,)
        assert arrays[given.input[1]].shape == arrays[given.input[2]].shape == ()
        forms.append((node.op_type, weight.attribute[0].i))
    assert sorted(forms) == [("Conv", 0), ("Gemm", 0), ("Gemm", 1), ("MatMul", 1), ("MatMul", 1)]


def test_a_weight_that_another_layer_shares_stays_for_it_as_it_is(int8: Export) -> None:
    rows = {check.module: check for check in check_path(int8.path).tensors}
    assert rows["tied"].dtype == "float32"
    assert rows["left"].dtype == "int8"
    assert int8.compare().passed


def test_what_the_file_computes_is_what_the_fake_quantised_module_does(int8: Export) -> None:
    # Not following the file: a step that falls the other way may show, by no more than that.
    module = copy.deepcopy(int8.model)
    apply_rounding(module, int8.made)
    opened = onnx.reference.ReferenceEvaluator(str(int8.path))
    (found,) = opened.run(None, {"x": images().numpy()})
    with torch.no_grad():
        expected = module(images()).last_hidden_state.numpy()
    assert np.abs(found - expected).max() <= 2e-2 * np.abs(expected).max()
    assert np.median(np.abs(found - expected)) <= 1e-5 * np.abs(expected).max()


Fault = Callable[[dict[str, Array], onnx.GraphProto], None]


def _scaled(suffix: str) -> Fault:
    def plant(arrays: dict[str, Array], _: onnx.GraphProto) -> None:
        name = next(name for name in arrays if name.endswith(suffix))
        arrays[name] = (arrays[name] * 1.1).astype(arrays[name].dtype)

    return plant


def _one_scale_of_the_dequantiser(arrays: dict[str, Array], graph: onnx.GraphProto) -> None:
    node = next(n for n in graph.node if n.name == "flat.input.dequantize")
    arrays["other"] = (arrays[node.input[1]] * 1.1).astype(np.float32)
    node.input[1] = "other"


def _zero_point_of_a_weight(arrays: dict[str, Array], graph: onnx.GraphProto) -> None:
    node = next(n for n in graph.node if n.name.startswith("flat.weight"))
    arrays["other"] = np.ones(16, np.int8)
    node.input[2] = "other"


def _zero_point_of_an_input(arrays: dict[str, Array], _: onnx.GraphProto) -> None:
    arrays["zero_point"] = np.array(1, np.int8)


def _number(arrays: dict[str, Array], _: onnx.GraphProto) -> None:
    name = next(name for name in arrays if name == "right.weight_t.numbers")
    changed = arrays[name].copy()
    changed[np.unravel_index(np.abs(changed).argmax(), changed.shape)] -= 1
    arrays[name] = changed


def _axis(_: dict[str, Array], graph: onnx.GraphProto) -> None:
    node = next(n for n in graph.node if n.name.startswith("flat.weight"))
    node.attribute[0].i = 1 - node.attribute[0].i


FAULTS: dict[str, tuple[Fault, str]] = {
    "a scale of an input": (_scaled("flat.input_scale"), "an input scale of "),
    "a scale of a dequantiser": (_one_scale_of_the_dequantiser, "an input scale of "),
    "a zero point of a weight": (_zero_point_of_a_weight, "a zero point of its weight "),
    "a zero point of inputs": (_zero_point_of_an_input, "a zero point of its input of 1"),
    "a number": (_number, "other numbers in its weight"),
    "an axis": (_axis, "scales of its weight along axis 1, over which it is summed"),
}
# Twice the same shift is none, but where it saturates: only the proof on the file sees it.
SEEN_ON_THE_FILE_ALONE = {"a zero point of inputs"}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_on_the_file_and_in_its_numbers(
    int8: Export, tmp_path: Path, name: str
) -> None:
    plant, said = FAULTS[name]
    model = onnx.load(int8.path)
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    plant(arrays, model.graph)
    del model.graph.initializer[:]
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())
    onnx.save(model, path := tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=f"has {said}"):
        int8.prove(path)
    if name not in SEEN_ON_THE_FILE_ALONE:
        with pytest.raises(
            ExportError, match=r"no number of int8|where PyTorch has|differs from P"
        ):
            int8.compare(path)


def test_another_scale_in_float16_is_found_though_the_tolerance_is_wide(tmp_path: Path) -> None:
    made = exported(tmp_path / "onnx", "fp8", "float16")
    layer = made.made.layers["flat"]
    larger = replace(layer, input_scale=layer.input_scale * 1.1)
    other = replace(made, made=replace(made.made, layers={**made.made.layers, "flat": larger}))
    with pytest.raises(
        ExportError, match=r"layer flat of .* has inputs such as .*no number of fp8"
    ):
        other.compare()


def test_a_layer_that_the_graph_does_not_have_is_named(tmp_path: Path) -> None:
    model = Mixed()
    names = [*Mixed.LAYERS, "unused"]
    made = quantised(model, names, "int8", lambda: (model(images()), model.unused(torch.ones(16))))
    with pytest.raises(ExportError, match=r"Layer unused was quantised, but the exporter has made"):
        export_onnx(model, recipe(), tmp_path / "onnx", dtype="float32", quantized=made)


def test_weights_that_are_not_what_the_numbers_stand_for_are_refused(tmp_path: Path) -> None:
    model = Mixed()
    made = quantised(model, Mixed.LAYERS, "int8", lambda: model(images()))
    model.flat.weight.data.add_(0.01)
    with pytest.raises(ExportError, match=r"Layer flat was quantised, but the weight that the g"):
        export_onnx(model, recipe(), tmp_path / "onnx", dtype="float32", quantized=made)


def test_a_module_that_rounds_itself_is_refused_before_it_is_rounded_twice(tmp_path: Path) -> None:
    model = Mixed()
    made = quantised(model, Mixed.LAYERS, "int8", lambda: model(images()))
    apply_rounding(model, made)
    with pytest.raises(ExportError, match=r"Module 'conv' rounds its inputs already"):
        export_onnx(model, recipe(), tmp_path / "onnx", dtype="float32", quantized=made)


@pytest.mark.large
def test_both_halves_of_an_encoder_decoder_hold_their_own_layers(tmp_path: Path) -> None:
    model = tiny_model("bart", encoder_layers=1, decoder_layers=1)
    known = recipe_of(model)
    names = [
        "model.encoder.layers.0.fc1",
        "model.decoder.layers.0.encoder_attn.k_proj",
        "model.decoder.layers.0.fc2",
    ]
    made = quantised(model, names, "int8", lambda: model(**batch(known).inputs))
    paths = export_graphs(model, known, tmp_path / "onnx", dtype="float32", quantized=made)
    for part, path, count in zip(known.parts, paths, (1, 2), strict=True):
        rows = check_path(path).tensors
        assert sorted(row.module for row in rows if row.dtype == "int8") == sorted(
            names[:1] if count == 1 else names[1:]
        )
        assert compare_with_torch(
            model, path, part, dtype="float32", twin="sparse", vocabulary=96, quantized=made
        )


def test_int8_is_eligible_where_its_output_is_int8_too(int8: Export) -> None:
    rows = {check.module: check for check in check_path(int8.path).tensors}
    assert rows["flat"].eligible
    assert rows["turned"].ineligible_reason.endswith("and it is an output of the graph")
    assert "(Mul) reads it as it is" in rows["left"].ineligible_reason


# Of these the first adds a bias of its own and is multiplied, the second is what the graph gives,
# and what reads the third rounds it again.
ROUNDED = ("left", "turned", "flat")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Export:
    return exported(tmp_path_factory.mktemp("narrow") / "onnx", "int8", "float32", ROUNDED)


def test_a_rounded_output_is_int8_to_all_that_reads_it_and_makes_its_layer_eligible(
    narrow: Export,
) -> None:
    rows = {check.module: check for check in check_path(narrow.path).tensors}
    assert all(rows[name].eligible for name in ROUNDED)
    assert not rows["right"].eligible
    graph = onnx.load(narrow.path).graph
    made = {node.output[0]: node for node in graph.node}
    assert made[graph.output[0].name].op_type == "DequantizeLinear"
    sums = [node for node in graph.node if node.op_type == "Add"]
    (bias,) = (n for n in sums if made[n.input[0]].op_type == "MatMul" and "left" in str(n))
    (reader,) = (node for node in graph.node if bias.output[0] in node.input)
    assert reader.op_type == "QuantizeLinear"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_module_that_rounds_its_outputs_is_what_the_file_computes(
    narrow: Export, tmp_path: Path, dtype: DType
) -> None:
    made = narrow if dtype == "float32" else exported(tmp_path, "int8", dtype, ROUNDED)
    made.prove(made.path)
    assert made.compare().passed
    module = copy.deepcopy(made.model)
    apply_rounding(module, made.made)
    found = module(images()).last_hidden_state / (made.made.layers["turned"].output_scale or 0)
    assert torch.allclose(found, found.round(), atol=1e-3)


def test_an_output_that_was_rounded_otherwise_is_found(narrow: Export) -> None:
    layers = dict(narrow.made.layers)
    layer = layers["left"]
    layers["left"] = replace(layer, output_scale=1.1 * (layer.output_scale or 0))
    other = replace(narrow, made=replace(narrow.made, layers=layers))
    with pytest.raises(ExportError, match=r"layer left in .* has an output scale of "):
        other.prove(narrow.path)
    with pytest.raises(ExportError, match=r"layer left of .* has outputs such as .*no number of i"):
        other.compare()
    layers["left"] = replace(layer, output_scale=None)
    other = replace(narrow, made=replace(narrow.made, layers=layers))
    with pytest.raises(ExportError, match=r"layer left in .* has an output that is rounded"):
        other.prove(narrow.path)
    with pytest.raises(ExportError, match=r"layer left of .* rounded without a scale"):
        other.compare()
    layers["left"], layers["right"] = layer, replace(layers["right"], output_scale=0.5)
    other = replace(narrow, made=replace(narrow.made, layers=layers))
    with pytest.raises(ExportError, match=r"layer right in .* has an output that is not rounded"):
        other.prove(narrow.path)


@pytest.mark.parametrize("form", STORED)
def test_the_file_of_a_quantised_model_is_proven_too(tmp_path: Path, form: QuantizedFormat) -> None:
    model = Mixed()
    made = quantised(model, Mixed.LAYERS, form, lambda: model(images()))
    axes = {name: 0 if name == "turned" else 1 for name in Mixed.LAYERS}
    path = tmp_path / "quantization.safetensors"
    write_quantized(replace(made, axes=axes), path)
    require_24(report := check_path(path))
    found = {check.tensor: check.dtype for check in report.tensors if check.expected}
    assert found == {f"{name}.weight": STORED[form] for name in Mixed.LAYERS}
    numbers = made.layers["flat"].weight.float()
    numbers[0, :4] = 1
    kind = made.layers["flat"].weight.dtype
    broken = replace(made.layers["flat"], weight=numbers.to(kind))
    write_quantized(replace(made, layers={**made.layers, "flat": broken}, axes=axes), path)
    assert [check.tensor for check in check_path(path).violations] == ["flat.weight"]


@pytest.mark.tensorrt_rtx
@pytest.mark.parametrize("form", STORED)
def test_tensorrt_rtx_builds_it_for_gpus_that_have_the_format(
    tmp_path: Path, form: QuantizedFormat
) -> None:
    pytest.importorskip("tensorrt_rtx")
    made = exported(tmp_path / "onnx", form, "float16", ROUNDED if form == "int8" else ())
    plans = build_plans([made.path], "float16", CAPABILITIES[form])
    assert list(plans) == (["SM86"] if form == "int8" else ["SM89", "SM120"])
    assert all(int(plan.removesuffix(" B")) > 0 for plan in plans.values())
