"""A model directory opened in half precision on the GPU, with inputs and outputs by name."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.errors import BackendMissingError, EngineError
from prox24_deploy.core.shapes import Shape
from prox24_deploy.core.types import DType
from prox24_deploy.engines.base import Feeds
from prox24_deploy.engines.cusparselt import cuda_graph
from prox24_deploy.engines.cusparselt.attention import use_fast_attention
from prox24_deploy.engines.cusparselt.cuda_graph import GraphSession, Run, to_tensor
from prox24_deploy.engines.cusparselt.inductor import CompiledModule, with_another
from prox24_deploy.engines.cusparselt.merge import Groups, alike, merge_layers, shared_layers
from prox24_deploy.engines.cusparselt.numerics import OUTPUT_TOLERANCES
from prox24_deploy.engines.cusparselt.runner import EngineModule, padded
from prox24_deploy.engines.feeds import random_feeds
from prox24_deploy.graph.export.module import RecipeModule, copy_with, to_dtype
from prox24_deploy.model.directory import ModelDir, build_untrained, load_model
from prox24_deploy.quantization.tensors import QuantizedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """All that another process needs to build the same module, with weights of its own."""

    path: Path
    recipe: Recipe
    dtype: DType
    vocabulary: int


@dataclass(frozen=True, slots=True)
class TorchModel:
    """A module on the GPU that takes the inputs of its signature by position.

    `blueprint` is None for a module that was not opened from a directory. Layers in `merged` are
    computed as one product for each group.
    """

    module: RecipeModule
    dtype: DType
    vocabulary: int
    blueprint: Blueprint | None = None
    merged: Groups = ()

    @property
    def wrapped(self) -> nn.Module:
        """The model itself; its layers have the paths that the checkpoint gives them."""
        return self.module.wrapped

    @property
    def runner(self) -> EngineModule:
        """What an engine runs: takes `inputs`, without a mask or in static buffers where it can."""
        return EngineModule(self.module).eval()

    def groups(self, shape: Shape, quantized: QuantizedModel | None = None) -> Groups:
        """Layers that can be computed as one product, by a run at a shape."""
        shared = shared_layers(self.wrapped, partial(self.run, self.feeds(shape)))
        return alike(shared, self.wrapped, quantized)

    def merge(self, groups: Groups) -> Self:
        """The same with each group computed as one product; its model is changed in place."""
        merge_layers(self.wrapped, groups)
        return replace(self, merged=groups)

    def feeds(self, shape: Shape, seed: int = 0) -> Feeds:
        """Random inputs by name."""
        inputs = self.module.signature.inputs
        return random_feeds(inputs, self.dtype, self.vocabulary)(shape, seed)

    def trial_feeds(self, shapes: Sequence[Shape]) -> list[Feeds]:
        """Inputs for a graph of every kind: `with_another` of the shapes, then padded rows."""
        asked = with_another(shapes)
        feeds = [self.feeds(shape) for shape in asked]
        other = next(i for i in range(len(shapes), len(asked)) if not asked[i].past)
        rows = padded(feeds[other])
        return feeds if rows is None else [*feeds, rows]

    def inputs(self, feeds: Feeds) -> tuple[Tensor, ...]:
        """Inputs of `runner` on the GPU."""
        return self.runner.fit(self._tensors(feeds))

    def trim(self, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Outputs as the signature has them, from those of `runner`."""
        return self.runner.trim(inputs, outputs)

    @torch.inference_mode()
    def run(self, feeds: Feeds) -> tuple[Tensor, ...]:
        """Outputs in the order of the signature, kernel by kernel, with a cache that grows."""
        outputs: tuple[Tensor, ...] = self.module(*self._tensors(feeds))
        return outputs

    @torch.inference_mode()
    def run_as_engine(self, feeds: Feeds) -> tuple[Tensor, ...]:
        """The same outputs from `runner`, kernel by kernel."""
        inputs = self.inputs(feeds)
        return self.trim(inputs, self.runner(*inputs))

    def _tensors(self, feeds: Feeds) -> tuple[Tensor, ...]:
        return tuple(to_tensor(feeds[spec.name]) for spec in self.module.signature.inputs)

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs, in order."""
        return [spec.name for spec in self.module.signature.outputs]

    def compiled(self, shapes: Sequence[Shape]) -> CompiledModule:
        """The model for torch.compile, with a graph for each of the shapes."""
        runs = (self.inputs(self.feeds(shape)) for shape in shapes)
        sizes = [tuple(tensor.shape for tensor in inputs) for inputs in runs]
        return CompiledModule(self.runner, sizes)

    def session(self, source: str, run: Run | None = None) -> GraphSession:
        """The model, or what runs it, captured as CUDA graphs; `source` names it in messages."""
        inputs, runner = [spec.name for spec in self.module.signature.inputs], self.runner
        return GraphSession(
            run or runner, inputs, self.output_names, source, fit=runner.fit, trim=runner.trim
        )

    def held_bytes(self) -> int:
        """Bytes of all parameters and buffers on the GPU."""
        held = {t.data_ptr(): t for t in (*self.module.parameters(), *self.module.buffers())}
        return sum(tensor.numel() * tensor.element_size() for tensor in held.values())


def require_gpu(asker: str, instead: str) -> None:
    """Refuse a machine that cannot run cuSPARSELt.

    Args:
        asker: what needs it, for the message.
        instead: what to pass where there is none.

    Raises:
        BackendMissingError: says what is missing and what to do.
    """
    if not torch.cuda.is_available():
        raise BackendMissingError(
            f"{asker} needs an NVIDIA GPU (Ampere or newer) and a CUDA build of torch, but torch "
            f"{torch.__version__} finds no CUDA device; pass {instead}, or run on a machine with "
            "one."
        )
    if not torch.backends.cusparselt.is_available():
        raise BackendMissingError(
            f"{asker} needs a torch with cuSPARSELt, and torch {torch.__version__} has none; "
            "install the CUDA wheel of torch 2.11 or newer for Linux."
        )


def open_torch_model(source: ModelDir, recipe: Recipe, dtype: DType) -> TorchModel:
    """Load an opened model directory in `dtype` onto the GPU.

    Raises:
        EngineError: `dtype` is float32, which cuSPARSELt has no kernels for.
        ModelDirError: the directory does not load as the recipe says.
    """
    if dtype not in OUTPUT_TOLERANCES:
        raise EngineError(
            f"cuSPARSELt has no {dtype} kernels; export with --dtype float16 or --dtype bfloat16."
        )
    model = load_model(source, recipe, torch.device(cuda_graph.DEVICE))
    vocabulary = int(source.config.get("vocab_size", 1))
    blueprint = Blueprint(path=source.path, recipe=recipe, dtype=dtype, vocabulary=vocabulary)
    return _in_half(model, blueprint)


def build_torch_model(blueprint: Blueprint) -> TorchModel:
    """The same module with random weights on the GPU: what is compiled of it is the same."""
    device = torch.device(cuda_graph.DEVICE)
    return _in_half(build_untrained(blueprint.path, blueprint.recipe, device), blueprint)


def _in_half(model: nn.Module, blueprint: Blueprint) -> TorchModel:
    half = copy_with(model, to_dtype(blueprint.dtype))
    module = as_engine(half, blueprint.recipe)
    return TorchModel(module, blueprint.dtype, blueprint.vocabulary, blueprint)


def as_engine(model: nn.Module, recipe: Recipe) -> RecipeModule:
    """The graph of a recipe, of a model whose attention may be changed in place."""
    use_fast_attention(model)
    return RecipeModule(model, recipe).eval()


def median_ms(session: GraphSession, feeds: Sequence[Feeds], seconds: float) -> float:
    """Median GPU time of one run over rotated inputs, measured for about `seconds`."""
    for one in feeds:
        session.latencies_ms(one, runs=1, warmup=2)
    samples: list[float] = []
    began = time.perf_counter()
    while len(samples) < 20 or (time.perf_counter() - began < seconds and len(samples) < 1000):
        for one in feeds:
            samples.extend(session.latencies_ms(one, runs=1, warmup=0).tolist())
    return sorted(samples)[len(samples) // 2]
