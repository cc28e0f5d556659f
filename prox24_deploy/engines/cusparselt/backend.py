"""cuSPARSELt through PyTorch: the pruned model itself, its winning layers held compressed.

The engine that can be shown to use sparse tensor cores wherever PyTorch has cuSPARSELt. The dense
twin is the dense model on cuBLAS. Both go through torch.compile and run in half precision as CUDA
graphs, so that the dense one is the fastest that PyTorch makes of the model.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import TypeAdapter, ValidationError

from prox24_deploy.config.options import EngineOptions
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.atomic import make_folder, write_atomic
from prox24_deploy.core.backends import BackendKind
from prox24_deploy.core.documents import Document, read_document
from prox24_deploy.core.errors import EngineError, ModelDirError
from prox24_deploy.core.fingerprint import unkeyed
from prox24_deploy.core.records import (
    Compilation,
    Engine,
    EngineEvidence,
    LayerEvidence,
    OnnxModel,
    TensorCheck,
)
from prox24_deploy.core.shapes import Shape
from prox24_deploy.core.snapshot import sha256_of
from prox24_deploy.core.types import DType, QuantizedFormat, Twin, silent
from prox24_deploy.engines.base import Origin, require_fixed_work
from prox24_deploy.engines.cusparselt import torch_model
from prox24_deploy.engines.cusparselt.choice import LayerChoice
from prox24_deploy.engines.cusparselt.cuda_graph import GraphSession
from prox24_deploy.engines.cusparselt.formats import gpu_obstacle
from prox24_deploy.engines.cusparselt.gemm import choose_measured, gpu_profile
from prox24_deploy.engines.cusparselt.kernels import kernels_by_layer, sparse_kernels
from prox24_deploy.engines.cusparselt.linear import two_four_layers
from prox24_deploy.engines.cusparselt.merge import Groups, members, merged_numbers
from prox24_deploy.engines.cusparselt.prepare import Prepared, prepare
from prox24_deploy.engines.cusparselt.profile import GemmFormat, GpuProfile, write_profile
from prox24_deploy.engines.cusparselt.quantized import multiplied, multiply_as
from prox24_deploy.engines.cusparselt.timings import remember, remembered
from prox24_deploy.engines.cusparselt.torch_model import (
    TorchModel,
    open_torch_model,
)
from prox24_deploy.model.directory import ModelDir, open_model_dir
from prox24_deploy.quantization.tensors import (
    QuantizedModel,
    apply_inputs,
    apply_outputs,
    apply_weights,
    read_quantized,
)

logger = logging.getLogger(__name__)

NAME = "cusparselt"
ENGINE_FILE, EVIDENCE_FILE, GEMMS_FILE = "engine.json", "evidence.json", "gemms.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFile:
    """How to open an engine: hash of the model and, by layer, the algorithm for each m.

    `compiled` says whether it is run by torch.compile, `quantized_sha256` what its layers multiply
    in 8 bits, "" for none. Layers in `merged` are one product for each group.
    """

    model_sha256: str
    onnx_sha256: str
    dtype: DType
    layers: dict[str, dict[int, int]]
    compiled: bool
    quantized_sha256: str = ""
    merged: Groups = ()


T = TypeVar("T")
_ENGINE, _EVIDENCE = TypeAdapter(EngineFile), TypeAdapter(EngineEvidence)


@dataclass(frozen=True, slots=True, kw_only=True)
class CuSparseLt:
    """Runs model directories in PyTorch on the GPU at hand.

    Attributes:
        dense: the dense model directory.
        dense_sha256: its hash, by which it is known wherever it lies.
        pruned: the folder of the pruned model within a bundle.
        recipe: of both twins, fitted to the model.
        options: layers are chosen for its shapes.
        quantized: the file of a bundle with the numbers of a quantised model, if there is one.
        known: GEMM timings of an earlier run, used if they fit this GPU and these versions.
    """

    dense: Path = field(metadata=unkeyed("its hash says what is read there"))
    dense_sha256: str
    pruned: str = field(metadata=unkeyed("the stage hashes what lies there"))
    quantized: str = field(metadata=unkeyed("the stage hashes what lies there"))
    recipe: Recipe
    options: EngineOptions
    known: GpuProfile | None = None

    @property
    def shapes(self) -> list[Shape]:
        """Those that layers are chosen for."""
        recipe = self.recipe
        return self.options.shapes(images=not recipe.modality.has_length, cached=recipe.cache)

    @property
    def name(self) -> str:
        """Name on the command line and folder under `engines/`."""
        return NAME

    @property
    def sparse_kernels(self) -> bool:
        """True: they are what it is for."""
        return True

    @property
    def on_gpu(self) -> bool:
        """True."""
        return True

    def device(self) -> str:
        """The GPU by name."""
        return str(torch.cuda.get_device_name())

    def quantize_obstacle(self, format: QuantizedFormat) -> str:
        """Why this GPU cannot multiply in a format, "" where it can."""
        return gpu_obstacle(format, torch.cuda.get_device_capability())

    def build(self, bundle: Path, model: OnnxModel, out: Path, *, twin: Twin) -> Engine:
        """Write `engine.json`; for the sparse twin choose layers, prove outputs and kernels first.

        The weights stay in the model directory, for compressing them takes less time than reading
        them, and what torch.compile made of the model stays in its own cache. The timings of the
        GEMMs and the evidence lie beside the sparse engine.

        Raises:
            EngineError: the model is float32, or the sparse outputs differ from the dense ones.
            ModelDirError: the dense model is not the one that the bundle was made from.
        """
        source = self._source(bundle, twin)
        opened, quantized = self._open(bundle, source, twin, model.dtype)
        folder = bundle / out
        make_folder(folder)
        choices: Sequence[LayerChoice] = ()
        if twin == "sparse":
            choices, profile = self._choose(opened, quantized)
            write_profile(profile, folder / GEMMS_FILE)
        eager = self.options.eager
        with prepare(opened, self.shapes, choices, eager=eager, quantized=quantized) as ready:
            if twin == "sparse":
                evidence = collect_evidence(ready, choices, quantized)
                data = _EVIDENCE.dump_json(evidence, indent=1) + b"\n"
                write_atomic(folder / EVIDENCE_FILE, data)
        source.require_unchanged()
        record = EngineFile(
            model_sha256=source.sha256,
            onnx_sha256=model.sha256,
            dtype=model.dtype,
            layers={choice.name: choice.algorithms for choice in choices if choice.chosen},
            compiled=not ready.compilation.reason,
            quantized_sha256=sha256_of(bundle / self.quantized) if quantized else "",
            merged=opened.merged,
        )
        write_atomic(folder / ENGINE_FILE, _ENGINE.dump_json(record, indent=1) + b"\n")
        return Engine(
            path=(out / ENGINE_FILE).as_posix(),
            backend=NAME,
            twin=twin,
            onnx=model.path,
            onnx_sha256=model.sha256,
            device=self.device(),
            dtype=model.dtype,
            versions=gpu_profile().versions,
            size_bytes=opened.held_bytes(),
            compilation=ready.compilation,
        )

    def evidence(self, bundle: Path, engine: Engine, _: tuple[TensorCheck, ...]) -> EngineEvidence:
        """What the profiler saw when the sparse engine was built.

        Raises:
            EngineError: the file beside the engine is missing or damaged.
        """
        return _read(_EVIDENCE, (bundle / engine.path).with_name(EVIDENCE_FILE))

    @contextmanager
    def open(self, bundle: Path, engine: Engine) -> Iterator[GraphSession]:
        """Load the model directory and compress the layers that `engine.json` names.

        Raises:
            EngineError: the engine file is damaged, or was compiled from another model.
            ModelDirError: the dense model is not the one that the bundle was made from.
        """
        record = _read(_ENGINE, bundle / engine.path)
        source = self._source(bundle, engine.twin)
        if source.sha256 != record.model_sha256:
            raise EngineError(
                f"Model directory {source.path} has changed since {bundle / engine.path} was "
                "compiled; compile again."
            )
        opened, quantized = self._open(bundle, source, engine.twin, record.dtype, record.merged)
        if (sha256_of(bundle / self.quantized) if quantized else "") != record.quantized_sha256:
            raise EngineError(
                f"File {bundle / self.quantized} has changed since {bundle / engine.path} was "
                "compiled; compile again."
            )
        if quantized:
            apply_inputs(opened.wrapped, quantized)
        multiply_as(opened.wrapped, record.layers, quantized)
        with ExitStack() as until:
            compiled = opened.compiled(self.shapes) if record.compiled else None
            if compiled:
                until.callback(compiled.close)
            session = opened.session(f"the {engine.twin} model in {source.path}", compiled)
            until.callback(session.close)
            yield session

    def _source(self, bundle: Path, twin: Twin) -> ModelDir:
        """The directory of one twin; the dense one must be that which the bundle was made from."""
        source = open_model_dir(self.dense if twin == "dense" else bundle / self.pruned)
        if twin == "dense" and source.sha256 != self.dense_sha256:
            raise ModelDirError(
                f"Model directory {source.path} is not the model that {bundle} was made from; "
                "restore it, or build again."
            )
        return source

    def _open(
        self, bundle: Path, source: ModelDir, twin: Twin, dtype: DType, merged: Groups | None = None
    ) -> tuple[TorchModel, QuantizedModel | None]:
        """A twin, and what its layers multiply in 8 bits; the dense one stays in 16.

        Layers are merged as they were when the engine was built, or else where they can be.
        """
        opened, path = open_torch_model(source, self.recipe, dtype), bundle / self.quantized
        quantized = read_quantized(path) if twin == "sparse" and path.is_file() else None
        if quantized:
            apply_weights(opened.wrapped, quantized)
        groups = opened.groups(self.shapes[0], quantized) if merged is None else merged
        opened = opened.merge(groups)
        if not quantized:
            return opened, None
        # Of a product each layer has outputs of its own.
        apply_outputs(opened.wrapped, quantized)
        return opened, merged_numbers(quantized, groups)

    def _choose(
        self, opened: TorchModel, quantized: QuantizedModel | None
    ) -> tuple[tuple[LayerChoice, ...], GpuProfile]:
        """Time the GEMMs of every layer at every shape, dense and sparse, and decide.

        A layer that multiplies 8-bit numbers is held against itself dense in 8 bits.

        Returns:
            The choices, and the timings of the GEMMs of this model.
        """
        here = gpu_profile()
        known = remembered(here)
        if self.known is not None and self.known.fits(here):
            known = known.with_timings(self.known.gemms)
        pruned = two_four_layers(opened.wrapped)
        eight: dict[str, GemmFormat] = {}
        if quantized:
            eight = dict.fromkeys(multiplied(opened.wrapped, quantized), quantized.format)
        choices, profile = choose_measured(opened, self.shapes, pruned, known, silent, eight)
        remember(profile)
        own = [timing for choice in choices for timing in choice.timings]
        return choices, here.with_timings(own)


def collect_evidence(
    ready: Prepared, choices: Sequence[LayerChoice], quantized: QuantizedModel | None = None
) -> EngineEvidence:
    """Look at what a sparse twin that is ready does.

    Returns:
        Per layer the kernels that the profiler saw at the last of its shapes, and its outputs
        against those of the same weights multiplied dense.
    """
    evidence = explain(choices, kernels_by_layer(ready.run_last))
    eligible = sum(layer.eligible is True for layer in evidence)
    running = sum(layer.chosen is True for layer in evidence)
    eight = f"; {_in_eight_bits(quantized, choices)}" if quantized else ""
    return EngineEvidence(
        backend=NAME,
        device=str(torch.cuda.get_device_name()),
        eligible=eligible,
        chosen=running,
        summary=f"the profiler saw sparse kernels in {running} of {len(evidence)} layers, "
        f"{eligible} of them eligible{eight}; {in_words(ready.compilation)}",
        layers=evidence,
        numerics=ready.numerics,
    )


def _in_eight_bits(quantized: QuantizedModel, choices: Sequence[LayerChoice]) -> str:
    """How many layers are quantised, as part of a sentence."""
    own, every = (
        sum(len(members(name)) for name in names)
        for names in (quantized.layers, [choice.name for choice in choices])
    )
    return f"{own} of {every} layers in {quantized.format}"


def in_words(compilation: Compilation) -> str:
    """How a twin was compiled, as part of a sentence."""
    if compilation.reason:
        return f"run without torch.compile ({compilation.reason})"
    cached = f", {compilation.cached} of {compilation.graphs} graphs from its cache"
    return f"compiled by torch.compile in {compilation.seconds:.1f} s" + (
        cached if compilation.graphs else ""
    )


def explain(
    choices: Sequence[LayerChoice], kernels: Mapping[str, Sequence[str]]
) -> tuple[LayerEvidence, ...]:
    """Say of each layer what the profiler saw, and where that is not what was chosen.

    Args:
        choices: one for each layer.
        kernels: by layer that multiplied sparse, the names of the GPU kernels that it launched.
    """
    layers = []
    for choice in choices:
        seen = kernels.get(choice.name, ())
        sparse = sparse_kernels(seen)
        for name, others in _members(choice.name):
            reason = f"{choice.reason}{others}"
            if sparse:
                reason = f"{reason}; kernel {sparse[0]}"
            if bool(sparse) != choice.chosen:
                what = "a sparse kernel" if sparse else f"only {', '.join(seen) or 'dense kernels'}"
                reason = f"unexpected: {reason}, but the profiler saw {what}"
            layers.append(
                LayerEvidence(
                    module=name, eligible=choice.eligible, chosen=bool(sparse), reason=reason
                )
            )
    return tuple(layers)


def _members(name: str) -> list[tuple[str, str]]:
    """Paths of the layers of a product, and what else is to be said of each."""
    parts = members(name)
    own = [part.rpartition(".")[2] for part in parts]
    others = (", ".join(one for one in own if one != each) for each in own)
    return [(p, f"; one product with {o}" if o else "") for p, o in zip(parts, others, strict=True)]


def _read(adapter: TypeAdapter[T], path: Path) -> T:
    document = Document(str(path), EngineError, "compile the model again")
    try:
        return adapter.validate_json(read_document(path, document))
    except ValidationError as error:
        raise document.refused("cannot be read") from error


def open_backend(_: BackendKind, options: EngineOptions, origin: Origin) -> CuSparseLt:
    """The backend on the GPU at hand.

    Raises:
        BackendMissingError: this machine lacks what it needs.
        UsageError: the model has two graphs.
    """
    require_fixed_work(origin.recipe, "Backend 'cusparselt'")
    torch_model.require_gpu("Backend 'cusparselt'", "--backend onnxruntime")
    return CuSparseLt(
        dense=origin.dense,
        dense_sha256=origin.dense_sha256,
        pruned=origin.pruned,
        quantized=origin.quantized,
        recipe=origin.recipe,
        options=options,
        known=origin.gemms,
    )
