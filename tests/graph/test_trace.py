"""What is traced once serves models that differ in their weights alone, and no others."""

import gc
import shutil
import warnings
import weakref
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from graph_models import Toy, shipped_recipe, tiny_bert, toy_recipe
from shared_traces import SharedTraces
from torch import nn
from transformers import BertConfig

from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.types import DType
from prox24_deploy.graph.export.export import export_onnx
from prox24_deploy.graph.export.module import RecipeModule
from prox24_deploy.graph.export.trace import Traces

pytestmark = pytest.mark.usefixtures("traced_anew")


class Odd:
    """What no one can compare with another one."""


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every module that torch's exporter is given, in order."""
    seen: list[object] = []
    export = torch.onnx.export

    def count(module: nn.Module, *arguments: Any, **options: Any) -> Any:
        seen.append(module)
        return export(module, *arguments, **options)

    monkeypatch.setattr(torch.onnx, "export", count)
    return seen


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The same where the graph does not matter; it is empty."""
    seen: list[object] = []

    def count(module: object, *arguments: Any, **options: Any) -> torch.onnx.ONNXProgram:
        seen.append(module)
        graph = ir.Graph([], [], nodes=[], opset_imports={"": options["opset_version"]})
        return torch.onnx.ONNXProgram(ir.Model(graph, ir_version=10), None)

    monkeypatch.setattr(torch.onnx, "export", count)
    return seen


def files(path: Path) -> list[bytes]:
    """The bytes of an exported graph and its data."""
    return [file.read_bytes() for file in sorted(path.parent.iterdir())]


def halved(model: nn.Module) -> nn.Module:
    """A copy with other values in every tensor that a checkpoint has."""
    copy = deepcopy(model)
    for tensor in copy.state_dict().values():
        tensor.mul_(0.5)
    return copy


def test_a_twin_is_not_traced_and_has_the_bytes_of_its_own_export(
    tmp_path: Path, traced: list[object]
) -> None:
    dense, recipe, traces = tiny_bert(), shipped_recipe("bert"), Traces()
    sparse = halved(dense)
    first = export_onnx(dense, recipe, tmp_path / "dense", dtype="float16", traces=traces)
    shared = export_onnx(sparse, recipe, tmp_path / "shared", dtype="float16", traces=traces)
    assert (len(traced), len(traces)) == (1, 1)
    alone = export_onnx(sparse, recipe, tmp_path / "alone", dtype="float16")
    assert len(traced) == 2
    assert files(shared) == files(alone)
    assert files(first)[1] != files(shared)[1]
    # The first one is as it was, and comes again.
    again = export_onnx(dense, recipe, tmp_path / "again", dtype="float16", traces=traces)
    assert len(traced) == 2
    assert files(again) == files(first)


def test_what_another_process_traced_gives_the_same_bytes(
    tmp_path: Path, traced: list[object]
) -> None:
    """As the workers of these tests and the forks of `faults.py` share it."""
    folder = tmp_path / "traces"
    folder.mkdir()

    def exported(name: str, known: SharedTraces) -> list[bytes]:
        out, traces = tmp_path / name, known.given()
        return files(export_onnx(Toy(), toy_recipe(), out, dtype="float16", traces=traces))

    first = exported("first", SharedTraces(folder))
    assert exported("looks", SharedTraces(folder)) == first
    settled = SharedTraces(folder)
    settled.settle()
    shutil.rmtree(folder)
    assert exported("settled", settled) == first
    assert len(traced) == 1


class Scaled(Toy):
    """A toy with a number that tracing writes into the graph."""

    def __init__(self, scale: object = 2.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x * self.scale if isinstance(self.scale, float) else x)


def changed(change: Callable[[Scaled], None]) -> Scaled:
    """A toy that `change` was done to."""
    change(model := Scaled())
    return model


def _given_twice(model: Scaled) -> None:
    model.second.bias = nn.Parameter(torch.ones(4))
    model.first.register_parameter("more", model.second.bias)


def _given_once(model: Scaled) -> None:
    model.first.register_parameter("more", nn.Parameter(torch.ones(4)))


def _hooked(model: Scaled) -> None:
    model.first.register_forward_hook(lambda module, inputs, output: output * 2)


def _graph(
    traces: Traces, model: nn.Module, recipe: Recipe | None = None, dtype: DType = "float32"
) -> None:
    recipe = recipe or toy_recipe()
    traces.graph_of(RecipeModule(model, recipe).eval(), recipe, dtype)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Scaled(), Scaled(3.0)),
        (Scaled(), Scaled({3: torch.ones(1), "a": {torch.float32}})),
        (Scaled(torch.ones(1)), Scaled(torch.zeros(1))),
        (Scaled(BertConfig()), Scaled(BertConfig(hidden_act="relu"))),
        (Scaled(), changed(lambda model: setattr(model, "first", nn.Linear(8, 16)))),
        (Scaled(), changed(lambda model: setattr(model, "first", nn.Sequential(model.first)))),
        (
            Scaled(),
            changed(
                lambda model: setattr(model.first, "weight", nn.Parameter(torch.ones(8, 16).T))
            ),
        ),
        (Scaled(), Scaled().half()),
        (changed(_given_once), changed(_given_twice)),
    ],
)
def test_a_model_that_differs_in_more_is_traced(
    before: nn.Module, after: nn.Module, asked: list[object]
) -> None:
    traces = Traces()
    _graph(traces, before)
    _graph(traces, after)
    assert len(asked) == len(traces) == 2
    _graph(traces, deepcopy(before))
    _graph(traces, halved(after))
    assert len(asked) == 2


def test_another_recipe_or_dtype_is_traced(asked: list[object]) -> None:
    traces = Traces()
    _graph(traces, Scaled())
    _graph(traces, Scaled(), toy_recipe().model_copy(update={"opset": 21}))
    _graph(traces, Scaled(), dtype="float16")
    assert len(traces) == len(asked) == 3
    _graph(traces, Scaled())
    assert len(asked) == 3


@pytest.mark.parametrize(
    "model", [changed(_hooked), Scaled(Odd()), Scaled(lambda: 3), Scaled([Odd()])]
)
def test_what_cannot_be_compared_is_traced_each_time(model: nn.Module, asked: list[object]) -> None:
    traces = Traces()
    for _ in range(2):
        _graph(traces, model)
    assert (len(asked), len(traces)) == (2, 0)


def test_a_trace_keeps_no_weights_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # The rules of the optimiser keep the last graph that they saw, whoever called it.
    monkeypatch.setattr(torch.onnx.ONNXProgram, "optimize", lambda program: None)
    traces, model = Traces(), Toy()
    weights = [weakref.ref(weight) for weight in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _graph(traces, model)
    del model
    gc.collect()
    assert len(traces) == 1
    assert [weight() for weight in weights] == [None] * 3
