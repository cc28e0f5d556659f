"""The seam between the pipeline and anything that compiles and runs an ONNX file."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.records import Engine, EngineEvidence, OnnxModel, TensorCheck
from prox24_deploy.core.types import QuantizedFormat, Twin

if TYPE_CHECKING:
    from prox24_deploy.engines.cusparselt.profile import GpuProfile

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]


class Session(Protocol):
    """An opened engine."""

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        """Run once; inputs and outputs by graph name."""
        ...

    def latencies_ms(self, feeds: Feeds, *, runs: int, warmup: int) -> npt.NDArray[np.float64]:
        """Run `warmup` + `runs` times; shape (runs,), milliseconds of each timed run."""
        ...


class Backend(Protocol):
    """Compiles an ONNX file and opens what it compiled. Implementations are frozen dataclasses."""

    @property
    def name(self) -> str:
        """Name on the command line and folder under `engines/`."""
        ...

    @property
    def sparse_kernels(self) -> bool:
        """Whether this backend can run 2:4 weights faster at all; if not, latency never gates."""
        ...

    @property
    def on_gpu(self) -> bool:
        """Whether its engines run on an NVIDIA GPU, whose clocks are then watched."""
        ...

    def device(self) -> str:
        """The device that engines of this backend run on, in words."""
        ...

    def build(self, bundle: Path, model: OnnxModel, out: Path, *, twin: Twin) -> Engine:
        """Compile `bundle / model.path` into the folder `bundle / out`.

        Raises:
            BackendMissingError: a library or device is missing.
            EngineError: the file does not compile.
        """
        ...

    def evidence(
        self, bundle: Path, engine: Engine, sparsity: tuple[TensorCheck, ...]
    ) -> EngineEvidence:
        """Say which layers of the sparse engine run on sparse kernels, and why the others do not.

        Args:
            bundle: the folder that `engine` lies in.
            engine: the sparse one.
            sparsity: the proof on the ONNX file.
        """
        ...

    def open(self, bundle: Path, engine: Engine) -> AbstractContextManager[Session]:
        """Load an engine; releases it on exit."""
        ...


@runtime_checkable
class Reproducible(Protocol):
    """A backend whose builds can be made again by tools of those who made its library."""

    def reproduction(self, bundle: Path, engines: Sequence[Engine], script: str) -> str:
        """A shell script that builds and times engines of this backend, all that it built.

        Args:
            bundle: the folder that they lie in.
            engines: of this backend.
            script: path within the bundle that the script will have.
        """
        ...


@runtime_checkable
class Quantizing(Protocol):
    """A backend that runs quantised models on some GPUs and not on others."""

    def quantize_obstacle(self, format: QuantizedFormat) -> str:
        """Why the GPUs that it builds for cannot run a format, "" where they can."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where the twins come from, for a backend that runs the model itself and not its ONNX file.

    `dense` is the dense model directory with its hash, `pruned` the folder of the pruned one within
    a bundle, `quantized` the file there with its numbers if it is quantised, `recipe` fits both,
    `gemms` are timings known already.
    """

    dense: Path
    dense_sha256: str
    pruned: str
    quantized: str
    recipe: Recipe
    gemms: "GpuProfile | None" = None


def require_fixed_work(recipe: Recipe, asker: str) -> None:
    """Refuse an encoder-decoder, and experts, where each layer must read rows of a known number.

    Raises:
        UsageError: the recipe has a decoder, or experts.
    """
    if recipe.experts is not None:
        raise UsageError(
            f"{asker} times each layer on a number of rows that is known beforehand, and how many "
            f"tokens an expert of recipe {recipe.family} reads depends on the text; leave it out "
            "and pass --backend onnxruntime or tensorrt."
        )
    if recipe.decoder is not None:
        raise UsageError(
            f"{asker} runs models of one graph, and those of recipe {recipe.family} have an "
            "encoder and a decoder; pass --backend onnxruntime or tensorrt."
        )
