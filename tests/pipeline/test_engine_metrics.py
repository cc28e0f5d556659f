"""Engines called as the model, and held against PyTorch."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import torch
from tiny_models import write_tiny_bart, write_tiny_classifier
from torch import nn

from prox24_deploy.config.recipe import Recipe, TensorSpec, select_recipe
from prox24_deploy.core.errors import EngineError, ModelDirError
from prox24_deploy.core.intervals import NORMAL_95
from prox24_deploy.core.records import DirectMetric, Engine, Estimate, Metric, PairedMetric
from prox24_deploy.data.pairs import make_pairs, start_token
from prox24_deploy.data.text import make_samples, read_texts
from prox24_deploy.engines.base import Array, Feeds
from prox24_deploy.engines.engine_model import EngineModel, Graph, TorchGraph
from prox24_deploy.evaluation.language import next_logits, window_nll
from prox24_deploy.evaluation.parity import METRIC_TOLERANCES, parity_of
from prox24_deploy.evaluation.subset import EngineShapes
from prox24_deploy.graph.export.module import RecipeModule
from prox24_deploy.model.batch import Samples
from prox24_deploy.model.blocks import run_model
from prox24_deploy.model.directory import ModelDir, load_model, open_model_dir
from prox24_deploy.model.processors import load_tokenizer
from prox24_deploy.pipeline.stages import engine_metrics
from prox24_deploy.pipeline.stages.engine_metrics import EvaluationRequest, measure_accuracy

CPU = torch.device("cpu")


def quiet(*_: object) -> None:
    """No progress."""


def opened(path: Path, prose: Path, tokens: int = 3000) -> tuple[ModelDir, Recipe, Samples]:
    directory = open_model_dir(path)
    recipe = select_recipe(path, directory.model_type, None)[0]
    recipe = recipe.for_architecture(directory.architecture)
    texts, _ = read_texts([prose], [prose], 0)
    tokenizer = load_tokenizer(directory)
    if recipe.decoder is None:
        return directory, recipe, make_samples(
            texts, tokenizer, recipe, tokens=tokens, max_length=48
        )  # fmt: skip
    start = start_token(directory)
    return directory, recipe, make_pairs(
        texts, tokenizer, recipe, tokens=tokens, max_length=48, start=start
    )  # fmt: skip


def as_engine(model: nn.Module, recipe: Recipe) -> EngineModel:
    modules = [RecipeModule(model, part).eval() for part in recipe.parts]
    graphs = [
        Graph(runs=TorchGraph(m), inputs=m.signature.inputs, dtype="float32", source="the model")
        for m in modules
    ]
    return EngineModel(graphs, model.config)


@torch.no_grad()
def test_encoder_and_decoder_graphs_predict_what_the_whole_model_does(
    tmp_path: Path, prose: Path
) -> None:
    directory, recipe, samples = opened(write_tiny_bart(tmp_path / "bart"), prose)
    model = load_model(directory, recipe, CPU)
    engine = as_engine(model, recipe)
    for batch in samples.batches:
        expected, found = (next_logits(one, batch) for one in (model, engine))
        assert torch.allclose(found, expected, atol=1e-5)
        torch.testing.assert_close(window_nll(found, batch), window_nll(expected, batch))


@torch.no_grad()
def test_a_decoder_reads_its_text_behind_an_empty_past(tiny_gpt2: Path, prose: Path) -> None:
    """GPT-2 has position_ids too, which samples do not have and the shape tells."""
    directory, recipe, samples = opened(tiny_gpt2, prose)
    model = load_model(directory, recipe, CPU)
    batch = samples.batches[0]
    found = next_logits(as_engine(model, recipe), batch)
    assert torch.allclose(found, next_logits(model, batch), atol=1e-5)


@dataclass
class Echo:
    """Gives the rows it was fed as embeddings, and remembers their shape."""

    value: float = 1.0
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        self.shapes.append(feeds["pixel_values"].shape)
        return {"image_embeds": feeds["pixel_values"].reshape(-1, 2) * np.float16(self.value)}


PIXELS = TensorSpec(name="pixel_values", dtype="float", axes=["batch", 1, 1, 2])


def test_a_small_batch_is_filled_up_for_an_engine_that_takes_no_fewer() -> None:
    echo = Echo()
    model = EngineModel(
        [Graph(runs=echo, inputs=(PIXELS,), dtype="float16", source="e", rows=4)], None
    )
    pixels = torch.arange(4.0).view(2, 1, 1, 2)
    outputs = model(pixel_values=pixels)
    assert echo.shapes == [(4, 1, 1, 2)]
    assert outputs.image_embeds.tolist() == [[0, 1], [2, 3]]
    assert outputs.image_embeds.dtype == torch.float32


def test_what_is_not_finite_or_not_there_is_refused_by_name() -> None:
    pixels = torch.ones(1, 1, 1, 2)
    broken = EngineModel(
        [Graph(runs=Echo(math.inf), inputs=(PIXELS,), dtype="float16", source="engine.plan")], None
    )
    with pytest.raises(EngineError, match=r"'image_embeds' of engine.plan is NaN or infinite"):
        broken(pixel_values=pixels)
    boxes = TensorSpec(name="boxes", dtype="float", axes=["batch", 4])
    other = EngineModel(
        [Graph(runs=Echo(), inputs=(PIXELS, boxes), dtype="float16", source="engine.plan")], None
    )
    with pytest.raises(EngineError, match=r"takes the input 'boxes', .* they have pixel_values"):
        other(pixel_values=pixels)


@dataclass(frozen=True)
class TorchBackend:
    """Runs modules as if they were engines of a GPU; adds `error` to what the sparse twin says."""

    modules: dict[str, RecipeModule]
    error: float
    seen: list[dict[str, tuple[int, ...]]]
    name: str = "pretend"
    sparse_kernels: bool = True
    on_gpu: bool = True

    def device(self) -> str:
        return "a pretended GPU"

    def build(self, *_: Any, **__: Any) -> Engine:
        raise NotImplementedError

    def evidence(self, *_: Any) -> Any:
        raise NotImplementedError

    @contextmanager
    def open(self, _: Path, engine: Engine) -> Iterator[Any]:
        yield self.Session(self, engine.twin)

    @dataclass(frozen=True)
    class Session:
        backend: Any
        twin: str

        def infer(self, feeds: Feeds) -> dict[str, Array]:
            self.backend.seen.append({name: array.shape for name, array in feeds.items()})
            found = TorchGraph(self.backend.modules[self.twin]).infer(feeds)
            if self.twin == "dense":
                return found
            noise = np.random.default_rng(0)
            return {
                name: array + self.backend.error * noise.standard_normal(array.shape)
                for name, array in found.items()
            }


def write_graph(bundle: Path, inputs: Sequence[TensorSpec]) -> None:
    """A file that says which inputs a graph has, and nothing else."""
    infos = [
        onnx.helper.make_tensor_value_info(spec.name, onnx.TensorProto.INT64, spec.axes)
        for spec in inputs
    ]
    node = onnx.helper.make_node("Identity", [inputs[0].name], ["out"])
    out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.INT64, None)
    graph = onnx.helper.make_graph([node], "main", infos, [out])
    for twin in ("dense", "sparse"):
        onnx.save(onnx.helper.make_model(graph), bundle / f"{twin}.onnx")


def measured(
    path: Path,
    prose: Path,
    bundle: Path,
    error: float,
    shapes: EngineShapes,
    dtype: Any = "float32",
) -> tuple[Any, list[dict[str, tuple[int, ...]]]]:
    directory, recipe, samples = opened(path, prose)
    dense, sparse = (load_model(directory, recipe, CPU) for _ in range(2))
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.mul_(1.02)
    modules = {"dense": RecipeModule(dense, recipe), "sparse": RecipeModule(sparse, recipe)}
    write_graph(bundle, modules["dense"].signature.inputs)
    twins: tuple[Literal["dense", "sparse"], ...] = ("dense", "sparse")
    engines = [
        Engine(
            path=f"{t}.plan",
            backend="pretend",
            twin=t,
            onnx=f"{t}.onnx",
            onnx_sha256="0",
            device="a pretended GPU",
            dtype=dtype,
            versions={},
            size_bytes=1,
        )
        for t in twins
    ]
    seen: list[dict[str, tuple[int, ...]]] = []
    load = {"dense": dense, "sparse": sparse}.__getitem__
    request = EvaluationRequest(recipe, load, directory.path, samples, 1500, shapes)
    backend = TorchBackend(modules, error, seen)
    return measure_accuracy(backend, bundle, engines, request, 2, quiet), seen


def test_the_engine_is_asked_in_shapes_it_was_compiled_for_and_agrees(
    tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    found, seen = measured(
        tiny_bert, prose, tmp_path, 0.0, EngineShapes(rows=4, least=32, longest=40)
    )
    assert {shape["input_ids"][0] for shape in seen} <= {2, 3, 4}
    assert {shape["input_ids"][1] for shape in seen} <= set(range(32, 41))
    assert all(len(set(shape.values())) == 1 for shape in seen)
    assert 0 < found.samples < found.available
    assert found.longest == 40
    assert found.tokens <= 40 * found.samples
    assert found.metrics[0].name == "embedding cosine"
    assert [(one.twin, one.rows, one.passed) for one in found.equal_rows] == [
        ("dense", 4, True), ("sparse", 4, True),
    ]  # fmt: skip
    assert {metric.samples for metric in found.metrics} == {found.samples}
    assert all(one.passed is not False for one in found.parity)
    assert {(one.twin, one.metric) for one in found.parity if one.tolerance} == {
        ("dense", "embedding cosine"), ("sparse", "embedding cosine"),
    }  # fmt: skip
    cosines = [one.agreement for one in found.parity if one.metric == "embedding cosine"]
    assert all(cosine == pytest.approx(1, abs=1e-6) for cosine in [c.value for c in cosines if c])


def test_an_engine_that_takes_one_row_is_not_asked_for_equal_ones(
    tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    shapes = EngineShapes(rows=1, least=32, longest=40)
    assert measured(tiny_bert, prose, tmp_path, 0.0, shapes)[0].equal_rows == ()


@pytest.mark.parametrize("kind", ["classifier", "decoder", "encoder"])
def test_an_engine_that_says_something_else_is_found(
    kind: str, tiny_llama: Path, tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    path = {"decoder": tiny_llama, "encoder": tiny_bert}.get(kind) or write_tiny_classifier(
        tmp_path / "model"
    )
    found, _ = measured(path, prose, tmp_path, 3.0, EngineShapes(rows=8, least=1, longest=48))
    # Its noise is of its own in each row.
    assert [one.passed for one in found.equal_rows] == [True, False]
    wrong = {(one.twin, one.metric) for one in found.parity if one.passed is False}
    assert {twin for twin, _ in wrong} == {"sparse"}
    telling = {"classifier": "KL divergence", "decoder": "KL divergence"}
    assert ("sparse", telling.get(kind, "embedding cosine")) in wrong


def metric(name: str, difference: Estimate | None, agreement: Estimate | None = None) -> Metric:
    if agreement is not None:
        return DirectMetric(name=name, higher_is_better=False, samples=8, agreement=agreement)
    both = None if difference is None else Estimate(value=1.0, standard_error=0.1)
    return PairedMetric(
        name=name,
        higher_is_better=False,
        samples=8,
        dense=both,
        sparse=both,
        difference=difference,
    )


@pytest.mark.parametrize(
    ("name", "difference", "agreement", "deviation", "passed"),
    [
        (
            "log-perplexity",
            Estimate(value=-0.03, standard_error=0.01),
            None,
            0.03 - NORMAL_95 * 0.01,
            False,
        ),
        (
            "log-perplexity",
            Estimate(value=0.012, standard_error=0.002),
            None,
            0.012 - NORMAL_95 * 0.002,
            True,
        ),
        ("accuracy", Estimate(value=0.25, standard_error=0.16), None, 0.0, True),
        ("accuracy", Estimate(value=-0.5, standard_error=0.1), None, 0.5 - NORMAL_95 * 0.1, False),
        ("KL divergence", None, Estimate(value=0.009, standard_error=0.1), 0.009, True),
        ("KL divergence", None, Estimate(value=0.011, standard_error=0.1), 0.011, False),
        ("score change", None, Estimate(value=0.5, standard_error=0.1), 0.5, False),
        ("embedding cosine", None, Estimate(value=0.98, standard_error=0.1), 0.02, False),
        ("embedding cosine", None, Estimate(value=0.999, standard_error=0.1), 0.001, True),
        ("top-1 agreement", None, Estimate(value=0.2, standard_error=0.1), None, None),
        ("KL divergence", None, Estimate(value=math.nan, standard_error=0.1), None, False),
        ("log-perplexity", Estimate(value=0.0, standard_error=math.inf), None, None, False),
    ],
)
def test_what_counts_as_a_departure(
    name: str,
    difference: Estimate | None,
    agreement: Estimate | None,
    deviation: float | None,
    *,
    passed: bool | None,
) -> None:
    found = parity_of("sparse", metric(name, difference, agreement), "float16")
    assert found.deviation == (None if deviation is None else pytest.approx(deviation))
    assert found.passed is passed
    assert found.tolerance == (None if name == "top-1 agreement" else METRIC_TOLERANCES["float16"])


def test_a_model_error_behind_an_engine_is_told_as_the_engines(
    tiny_llama: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch has scored the same text before, so the checkpoint is not to blame."""

    def refuses(*_: object, **__: object) -> Any:
        raise ModelDirError("The pruned model has a log-perplexity of 800.")

    monkeypatch.setattr(engine_metrics, "evaluate_models", refuses)
    with pytest.raises(EngineError, match="engines give no usable output: The pruned model has"):
        measured(tiny_llama, prose, tmp_path, 0.0, EngineShapes(rows=8, least=1, longest=48))


def test_outputs_reach_the_metrics_as_float32(tiny_bert: Path, prose: Path) -> None:
    directory, recipe, samples = opened(tiny_bert, prose)
    model = as_engine(load_model(directory, recipe, CPU), recipe)
    result = run_model(model, samples.batches[0], recipe.task)
    assert result.last_hidden_state.dtype == torch.float32
