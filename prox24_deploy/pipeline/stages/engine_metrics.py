"""The metrics of the models, from the outputs of their engines."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.accuracy import DecodeAccuracy, EngineAccuracy, ParityCheck, RowsCheck
from prox24_deploy.core.errors import EngineError, ModelDirError
from prox24_deploy.core.records import Engine, Metric
from prox24_deploy.core.types import TWINS, DType, Progress, Twin, silent
from prox24_deploy.engines.base import Backend
from prox24_deploy.engines.engine_model import EngineModel, Graph, TorchGraph
from prox24_deploy.engines.recorded import Recorded
from prox24_deploy.evaluation.equal_rows import equal_rows
from prox24_deploy.evaluation.evaluate import evaluate_models
from prox24_deploy.evaluation.language import evaluate_text_generation
from prox24_deploy.evaluation.parity import parity_of
from prox24_deploy.evaluation.subset import EngineShapes, behind_a_past, take
from prox24_deploy.graph.export.module import RecipeModule
from prox24_deploy.graph.export.signature import read_inputs
from prox24_deploy.model.batch import Batch, Samples

# Of equal ones, on an engine that takes any number.
_EQUAL_ROWS = 4
# Of the samples' tokens, the share that is read again to decode, and tokens decoded of each sample.
_DECODED_SHARE, _DECODED_TOKENS = 4, 16

# From two models, and the number of the comparison for the bar, to the metrics between them.
_Ask = Callable[[nn.Module, nn.Module, int], tuple[Metric, ...]]


@dataclass(frozen=True, slots=True)
class EvaluationRequest:
    """What is asked of engines: a recipe's task on samples, as the PyTorch models were asked it.

    `load` opens a PyTorch twin in float32, one at a time to spare memory, and `directory` says how
    embeddings are pooled.
    `tokens` bounds how much is run, and `shapes` are those that engines on a GPU were compiled for.
    With `decodes` the engines are asked to decode, too. In `scratch`, a folder, there is room for
    what the engines answer; None for that of the system.
    """

    recipe: Recipe
    load: Callable[[Twin], nn.Module]
    directory: Path
    held_out: Samples
    tokens: int
    shapes: EngineShapes
    decodes: bool = False
    scratch: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """Samples to ask engines about, which decode the last `steps` tokens of each."""

    samples: Samples
    ask: _Ask
    steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    metrics: tuple[Metric, ...]
    parity: tuple[ParityCheck, ...]


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
    """Run both engines of one backend, and PyTorch, on the same samples.

    Without a GPU they take any shape, so samples are as long as the model's own.

    Args:
        backend: opens the engines.
        bundle: where they lie.
        engines: a twin is one graph, or encoder and decoder.
        request: what to ask.
        least_rows: of a batch, that an engine on a GPU takes.
        progress: told of each comparison.

    Raises:
        BackendMissingError: one cannot run on this machine.
        EngineError: one does not run, lacks an input, or gives what is not finite.
    """
    began = time.perf_counter()
    shapes, rows = (request.shapes, least_rows) if backend.on_gpu else (None, 1)
    samples, cut = take(request.held_out, request.tokens, shapes)
    reading = _Question(samples=samples, ask=_evaluator(request, samples, progress))
    questions = [reading, *([_decoding(request, shapes)] if request.decodes else ())]
    again = _again(backend, request, samples, engines[0].dtype)

    def opened(twin: Twin, until: ExitStack) -> list[Graph]:
        return [_opened(backend, bundle, e, rows, until) for e in engines if e.twin == twin]

    with TemporaryDirectory(dir=request.scratch) as folder:
        (whole, *decoded), checked = _answers(request, opened, questions, again, Path(folder))
    return EngineAccuracy(
        backend=backend.name,
        device=engines[0].device,
        dtype=engines[0].dtype,
        samples=samples.source.samples,
        tokens=samples.source.tokens,
        available=request.held_out.source.samples,
        longest=request.shapes.longest if cut else None,
        metrics=whole.metrics,
        parity=whole.parity,
        seconds=time.perf_counter() - began,
        decode=_decode_accuracy(questions[1], decoded[0]) if decoded else None,
        equal_rows=checked,
    )


def _again(backend: Backend, request: EvaluationRequest, samples: Samples, dtype: DType) -> _Again:
    rows = request.shapes.rows if backend.on_gpu else _EQUAL_ROWS
    # The longest, which are nearest to what kernels were chosen for.
    return _Again(batch=samples.batches[-1], rows=rows, dtype=dtype)


def _answers(
    request: EvaluationRequest,
    opened: Callable[[Twin, ExitStack], list[Graph]],
    questions: Sequence[_Question],
    again: _Again,
    folder: Path,
) -> tuple[list[_Answer], tuple[RowsCheck, ...]]:
    """Each twin against PyTorch, one engine and one model at a time, and then the twins.

    And each against itself, asked the same `again` in one batch. What they answer is kept in the
    folder.
    """
    models: dict[Twin, list[Recorded]] = {}
    parity: list[list[ParityCheck]] = [[] for _ in questions]
    rows: list[RowsCheck] = []
    for i, twin in enumerate(TWINS):
        with ExitStack() as until:
            graphs = opened(twin, until)
            # After the engines, of which the first to be missing saves the loading.
            model = request.load(twin)
            engines = [EngineModel(graphs, model.config, one.steps) for one in questions]
            models[twin] = [
                Recorded(engine, folder / f"{twin}-{number}")
                for number, engine in enumerate(engines)
            ]
            rows += again.check(engines[0], twin)
            reference = _reference(model, request.recipe, twin)
            for question, engine, found in zip(questions, models[twin], parity, strict=True):
                compared = question.ask(reference, engine, i)
                found += [parity_of(twin, metric, again.dtype) for metric in compared]
            del model, reference, graphs, engines
    pairs = zip(questions, models["dense"], models["sparse"], parity, strict=True)
    answers = [
        _Answer(metrics=one.ask(dense, sparse, len(TWINS)), parity=tuple(found))
        for one, dense, sparse, found in pairs
    ]
    return answers, tuple(rows)


def _decoding(request: EvaluationRequest, shapes: EngineShapes | None) -> _Question:
    """To decode the last tokens of fewer samples, since every token is a run of its own."""
    few, _ = take(request.held_out, max(1, request.tokens // _DECODED_SHARE), shapes)
    whole = request.recipe.decoder is not None
    longest = max(
        (one.targets.shape[1] for one in few.batches if one.targets is not None), default=0
    )
    # Its last token is read and predicts nothing, unless targets say what.
    steps = longest if whole else _DECODED_TOKENS + 1
    samples = behind_a_past(few, _DECODED_TOKENS)

    def ask(dense: nn.Module, sparse: nn.Module, _: int) -> tuple[Metric, ...]:
        with _usable():
            return evaluate_text_generation(dense, sparse, samples.batches, silent)

    return _Question(samples=samples, ask=ask, steps=steps)


def _decode_accuracy(question: _Question, answer: _Answer) -> DecodeAccuracy:
    source = question.samples.source
    lengths = [
        batch.inputs.get("decoder_input_ids", batch.inputs.get("input_ids", batch.real)).shape[1]
        for batch in question.samples.batches
    ]
    return DecodeAccuracy(
        samples=source.samples,
        tokens=source.tokens,
        past=max(1, min(lengths) - question.steps),
        metrics=answer.metrics,
        parity=answer.parity,
    )


@contextmanager
def _usable() -> Iterator[None]:
    """Blame an engine for what is refused: PyTorch has been through the same samples before."""
    try:
        yield
    except ModelDirError as error:
        raise EngineError(f"Its engines give no usable output: {error}") from error


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

        with _usable():
            if recipe.decoder is not None:
                # Forced along its targets whatever its task is, for engines write nothing freely.
                return evaluate_text_generation(dense, sparse, samples.batches, advance)
            directory = request.directory
            return evaluate_models(dense, sparse, recipe.task, samples, directory, advance).metrics

    return ask
