"""The metrics of the models, from the outputs of their engines."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.accuracy import EngineAccuracy, ParityCheck, RowsCheck
from prox24_deploy.core.errors import EngineError, ModelDirError
from prox24_deploy.core.records import Engine, Metric
from prox24_deploy.core.types import TWINS, DType, Progress, Twin
from prox24_deploy.engines.base import Backend
from prox24_deploy.engines.engine_model import EngineModel, Graph, TorchGraph
from prox24_deploy.evaluation.equal_rows import equal_rows
from prox24_deploy.evaluation.evaluate import evaluate_models
from prox24_deploy.evaluation.language import evaluate_text_generation
from prox24_deploy.evaluation.parity import parity_of
from prox24_deploy.evaluation.subset import EngineShapes, take
from prox24_deploy.graph.export.module import RecipeModule
from prox24_deploy.graph.export.signature import read_inputs
from prox24_deploy.model.batch import Batch, Samples

# Of equal ones, on an engine that takes any number.
_EQUAL_ROWS = 4
# From two models, and the number of the comparison for the bar, to the metrics between them.
_Ask = Callable[[nn.Module, nn.Module, int], tuple[Metric, ...]]


@dataclass(frozen=True, slots=True)
class EvaluationRequest:
    """What is asked of engines: a recipe's task on samples, as the PyTorch models were asked it.

    `load` opens a PyTorch twin in float32, one at a time to spare memory, and `directory` says how
    embeddings are pooled.
    `tokens` bounds how much is run, and `shapes` are those that engines on a GPU were compiled for.
    """

    recipe: Recipe
    load: Callable[[Twin], nn.Module]
    directory: Path
    held_out: Samples
    tokens: int
    shapes: EngineShapes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Again:
    """A sample that fills a batch of so many rows, and the dtype of the engine that is asked."""

    batch: Batch
    rows: int
    dtype: DType

    def check(self, model: nn.Module, twin: Twin) -> list[RowsCheck]:
        """Nothing, for an engine that takes one row."""
        if self.rows < 2:
            return []
        return [equal_rows(model, self.batch, rows=self.rows, dtype=self.dtype, twin=twin)]


def measure_accuracy(
    backend: Backend,
    bundle: Path,
    engines: Sequence[Engine],
    request: EvaluationRequest,
    least_rows: int,
    progress: Progress,
) -> EngineAccuracy:
    """Run the sparse and the dense engine of one backend, and PyTorch, on the same samples.

    An engine that is not on a GPU takes any shape, so its samples are as long as the model's own.

    Args:
        backend: opens the engines.
        bundle: the folder that they lie in.
        engines: of this backend; a twin is one graph, or encoder and decoder.
        request: what to ask.
        least_rows: of a batch, that an engine on a GPU takes.
        progress: told of each of the three comparisons.

    Raises:
        BackendMissingError: an engine cannot run on this machine.
        EngineError: an engine does not run, lacks an input, or gives what is not finite.
    """
    began = time.perf_counter()
    shapes = request.shapes if backend.on_gpu else None
    samples, cut = take(request.held_out, request.tokens, shapes)
    rows = least_rows if backend.on_gpu else 1
    ask = _evaluator(request, samples, progress)
    again = _again(backend, request, samples, engines[0].dtype)
    with ExitStack() as until:

        def opened(twin: Twin) -> list[Graph]:
            own = (engine for engine in engines if engine.twin == twin)
            return [_opened(backend, bundle, engine, rows, until) for engine in own]

        metrics, parity, checked = _answers(request, opened, ask, again)
    return EngineAccuracy(
        backend=backend.name,
        device=engines[0].device,
        dtype=engines[0].dtype,
        samples=samples.source.samples,
        tokens=samples.source.tokens,
        available=request.held_out.source.samples,
        longest=request.shapes.longest if cut else None,
        metrics=metrics,
        parity=parity,
        seconds=time.perf_counter() - began,
        equal_rows=checked,
    )


def _again(backend: Backend, request: EvaluationRequest, samples: Samples, dtype: DType) -> _Again:
    rows = request.shapes.rows if backend.on_gpu else _EQUAL_ROWS
    # The longest, which are nearest to what kernels were chosen for.
    return _Again(batch=samples.batches[-1], rows=rows, dtype=dtype)


def _answers(
    request: EvaluationRequest,
    opened: Callable[[Twin], list[Graph]],
    ask: _Ask,
    again: _Again,
) -> tuple[tuple[Metric, ...], tuple[ParityCheck, ...], tuple[RowsCheck, ...]]:
    """The engines against each other, and each against PyTorch, which is open for one at a time.

    And each against itself, asked the same `again` in one batch.
    """
    models: dict[Twin, EngineModel] = {}
    parity: list[ParityCheck] = []
    rows: list[RowsCheck] = []
    for i, twin in enumerate(TWINS):
        graphs = opened(twin)
        # After the engines, of which the first to be missing saves the loading.
        model = request.load(twin)
        models[twin] = EngineModel(graphs, model.config)
        rows += again.check(models[twin], twin)
        reference = _reference(model, request.recipe, twin)
        metrics = ask(reference, models[twin], i)
        parity += [parity_of(twin, metric, again.dtype) for metric in metrics]
        del model, reference
    return ask(models["dense"], models["sparse"], len(TWINS)), tuple(parity), tuple(rows)


def _opened(backend: Backend, bundle: Path, engine: Engine, rows: int, until: ExitStack) -> Graph:
    """An engine that stays open `until` that stack is left."""
    session = until.enter_context(backend.open(bundle, engine))
    return Graph(
        runs=session,
        inputs=read_inputs(bundle / engine.onnx),
        dtype=engine.dtype,
        source=engine.path,
        rows=rows,
    )


def _reference(model: nn.Module, recipe: Recipe, twin: Twin) -> EngineModel:
    """PyTorch's own answer, through the same graph inputs and outputs."""
    modules = [RecipeModule(model, part).eval() for part in recipe.parts]
    graphs = [
        Graph(
            runs=TorchGraph(module),
            inputs=module.signature.inputs,
            dtype="float32",
            source=f"the {twin} model",
        )
        for module in modules
    ]
    return EngineModel(graphs, model.config)


def _evaluator(request: EvaluationRequest, samples: Samples, progress: Progress) -> _Ask:
    """From two models to the metrics between them, the number of the comparison for the bar."""
    recipe = request.recipe
    steps = len(samples.batches)

    def ask(dense: nn.Module, sparse: nn.Module, number: int) -> tuple[Metric, ...]:
        def advance(_: str, done: int, total: int) -> None:
            progress("accuracy", number * steps + done, 3 * total)

        try:
            if recipe.decoder is not None:
                # Forced along its targets whatever its task is, for engines write nothing freely.
                return evaluate_text_generation(dense, sparse, samples.batches, advance)
            found = evaluate_models(dense, sparse, recipe.task, samples, request.directory, advance)
        except ModelDirError as error:
            # PyTorch has been through the same samples before, so an engine is what differs.
            raise EngineError(f"Its engines give no usable output: {error}") from error
        return found.metrics

    return ask
