"""Compare an exported file in ONNX Runtime with the module it was exported from."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch import nn

from prox24_deploy.config.recipe import Recipe, TensorSpec, dynamic_names, shape_of
from prox24_deploy.core.errors import ExportError
from prox24_deploy.core.records import NumericsCheck
from prox24_deploy.core.types import DType, Twin
from prox24_deploy.graph.check.model_file import load_onnx
from prox24_deploy.graph.export.module import Keep, RecipeModule, copy_with, kept_by, rounded_to
from prox24_deploy.graph.export.signature import Signature
from prox24_deploy.graph.parity.activations import range_guard, watched
from prox24_deploy.graph.parity.bisect import first_difference, session_for, session_options
from prox24_deploy.graph.parity.overflow import require_finite
from prox24_deploy.graph.parity.rounded import Place, Read, Rounding, following, rounded_values
from prox24_deploy.quantization.tensors import QuantizedModel
from prox24_deploy.sparsity.groups import Array

log = logging.getLogger(__name__)

# Sizes of the first dynamic axes: batch and sequence of text models.
_SIZES = ((1, 8), (2, 17), (3, 5))
# The same and past: prefill, also of a padded batch, a second chunk, and one step of decoding.
# Any further axis, such as the length of the text that an encoder has read, has `_FURTHER_SIZE`.
_CACHED_SIZES = ((1, 8, 0), (2, 6, 0), (2, 5, 9), (3, 1, 7))
_FURTHER_SIZE = 4

# Of the largest magnitude of the output. Float16 rounds activations at every operator.
_RELATIVE: dict[DType, float] = {"float32": 1e-4, "float16": 2e-2}
# Two programs that round in float32 may be so many times as far apart as PyTorch is from float64,
# which in a deep model is more than the above; and never further than this.
_NOISES, _MOST_NOISE = 4.0, 1e-3
_PROVIDER = "CPUExecutionProvider"


def compare_with_torch(
    model: nn.Module,
    path: Path,
    recipe: Recipe,
    *,
    dtype: DType,
    twin: Twin,
    vocabulary: int,
    seed: int = 0,
    quantized: QuantizedModel | None = None,
    keep: Keep | None = None,
) -> tuple[NumericsCheck, ...]:
    """Run the file in ONNX Runtime on CPU and the module in PyTorch on the same random inputs.

    The reference is always computed in float32; for float16, from weights rounded to float16.
    The largest absolute difference over three shapes may be 1e-4 (float32) or 2e-2 (float16) of
    the largest magnitude of the output; in float32 also four times the distance of PyTorch from the
    same module in float64, up to 1e-3, for the rounding of deep models adds up. A graph with a
    cache is run over prefill from an empty past, over a second chunk and over one decoded token, on
    random keys and values. Rows with a batch index of 1 and above are padded on the right, with a
    cache on the left, and positions that the attention mask excludes are not compared. Where layers
    are quantised, each rounding is compared, on inputs without padding, and then followed
    (`graph.parity.rounded`).

    Args:
        model: the float32 module that was exported; it is not changed.
        path: the exported `model.onnx`.
        recipe: the recipe it was exported with.
        dtype: of the file. ONNX Runtime has no bfloat16 kernels on CPU, so nothing can be compared
            then and the result is empty; the caller must report that.
        twin: which of the two files this is.
        vocabulary: token ids are drawn from [0, vocabulary).
        seed: of the random inputs.
        quantized: what of `model` is quantised, as for `export_graphs`.
        keep: where to have weights that are converted for the comparison; None for memory.

    Returns:
        One passed check per output, or nothing for bfloat16.

    Raises:
        ExportError: the file does not load, an activation or a tensor inside the graph does not
            fit `dtype`, or a rounding or an output differs by more than the tolerance; names the
            tensor, or the module where the difference begins.
    """
    if dtype == "bfloat16":
        return ()
    reference = RecipeModule(copy_with(model, kept_by(keep, rounded_to(dtype))), recipe).eval()
    feeds = _all_feeds(reference.signature, vocabulary, seed)
    opened = _opened(path, reference.signature, dtype, quantized)
    return _compared(opened, reference, feeds, twin, keep)


def _compared(
    opened: "_Opened",
    reference: RecipeModule,
    feeds: Sequence[dict[str, Array]],
    twin: Twin,
    keep: Keep | None,
) -> tuple[NumericsCheck, ...]:
    """Hold the file against the module on all of the inputs, output by output."""
    path, dtype, signature = opened.path, opened.dtype, reference.signature
    for each in feeds if opened.quantized else ():
        opened.require_rounding(reference, _unpadded(signature, each, dtype))
    runs = [_differences(opened, reference, each) for each in feeds]
    # What follows opens sessions of its own.
    opened.close()

    def culprit(run: int) -> str:
        row = _unpadded(signature, feeds[run], dtype)
        with opened.followed(reference, opened.run(row)[1]):
            return first_difference(reference, path, row, _RELATIVE[dtype])

    if dtype == "float16":
        require_finite(path, _unpadded(signature, feeds[0], dtype))

    noise = _Noise(reference, feeds, keep) if dtype == "float32" and not opened.quantized else None
    return tuple(
        _judge([run[i] for run in runs], spec.name, path, _RELATIVE[dtype], twin, culprit, noise)
        for i, spec in enumerate(signature.outputs)
    )


class _Noise:
    """How far float32 takes the outputs of a module from those in float64, on the same inputs."""

    def __init__(
        self,
        reference: RecipeModule,
        feeds: Sequence[dict[str, Array]],
        keep: Keep | None,
    ) -> None:
        self._reference, self._feeds, self._keep = reference, feeds, keep
        self._known: dict[str, float] | None = None

    def of(self, output: str) -> float:
        """The largest distance over all inputs, relative to the largest magnitude there.

        0 for a module that does not run in float64, which is then held to what is always allowed.
        """
        if self._known is None:
            try:
                self._known = self._measured()
            except Exception:
                log.debug("the module does not run in float64", exc_info=True)
                self._known = {}
        return self._known.get(output, 0.0)

    def _measured(self) -> dict[str, float]:
        signature = self._reference.signature
        exact = self._reference.with_weights(kept_by(self._keep, _doubled))
        found: dict[str, float] = {}
        for feeds in self._feeds:
            inputs = [torch.from_numpy(feed) for feed in feeds.values()]
            rounded = _torch_outputs(self._reference, inputs)
            wide = _torch_outputs(exact, [each.double() if each.is_floating_point() else each
                                          for each in inputs])  # fmt: skip
            for spec, mine, theirs in zip(signature.outputs, rounded, wide, strict=True):
                gap = _difference(spec, mine, theirs, signature, feeds)
                relative = gap.largest / gap.scale if gap.scale else 0.0
                found[spec.name] = max(found.get(spec.name, 0.0), relative)
        return found


def _doubled(_name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double()


@dataclass(frozen=True, slots=True)
class _Difference:
    """One output at one shape; `scale` is the largest magnitude of the reference."""

    shape: tuple[int, ...]
    largest: float
    scale: float


@dataclass(slots=True, kw_only=True)
class _Opened:
    """A file in ONNX Runtime, in a session that is opened when it is needed.

    `read` names what is rounded at quantised layers, and what becomes of it.
    """

    path: Path
    dtype: DType
    open: Callable[[], ort.InferenceSession]
    outputs: tuple[str, ...]
    quantized: QuantizedModel | None
    read: Mapping[Place, Sequence[tuple[str, str]]]
    _session: ort.InferenceSession | None = None

    def close(self) -> None:
        """Give up the memory of the session."""
        self._session = None

    def run(self, given: Mapping[str, Array]) -> tuple[list[Array], dict[Place, list[Read]]]:
        """The outputs, and what is rounded at quantised layers."""
        pairs = [pair for each in self.read.values() for pair in each]
        inner = list(dict.fromkeys(name for pair in pairs for name in pair))
        self._session = self._session or self.open()
        found = self._session.run([*self.outputs, *inner], dict(given))
        known = dict(zip(inner, found[len(self.outputs) :], strict=True))
        read = {
            place: [(known[raw], known[rounded]) for raw, rounded in each]
            for place, each in self.read.items()
        }
        return found[: len(self.outputs)], read

    def followed(
        self,
        reference: RecipeModule,
        read: Mapping[Place, Sequence[Read]],
        relative: float | None = None,
    ) -> AbstractContextManager[None]:
        """Within it, `reference` rounds as the file did; `relative` as in `Rounding`."""
        if self.quantized is None:
            return nullcontext()
        rounding = Rounding(
            path=self.path, quantized=self.quantized, dtype=self.dtype, relative=relative
        )
        return following(reference.wrapped, read, rounding)

    def require_rounding(self, reference: RecipeModule, given: Mapping[str, Array]) -> None:
        """Hold every rounding of the file on inputs without padding against PyTorch."""
        with self.followed(reference, self.run(given)[1], _RELATIVE[self.dtype]):
            _torch_outputs(reference, [_reference_input(feed) for feed in given.values()])


def _opened(
    path: Path, signature: Signature, dtype: DType, quantized: QuantizedModel | None
) -> _Opened:
    read: dict[Place, list[tuple[str, str]]] = {}
    make = partial(ort.InferenceSession, path, session_options(), providers=[_PROVIDER])
    if quantized is not None:
        model = load_onnx(path)
        values = rounded_values(model)
        read = {
            place: [(raw.name or "", rounded.name or "") for raw, rounded in each]
            for place, each in values.items()
        }
        pairs = [pair for each in values.values() for pair in each]
        make = partial(session_for, model, path, [value for pair in pairs for value in pair])
    return _Opened(
        path=path,
        dtype=dtype,
        open=partial(_open, path, make),
        outputs=tuple(spec.name for spec in signature.outputs),
        quantized=quantized,
        read=read,
    )


def _open(path: Path, make: Callable[[], ort.InferenceSession]) -> ort.InferenceSession:
    try:
        session = make()
    except Exception as error:  # ONNX Runtime's own types derive from nothing in common
        lines = str(error).splitlines() or [type(error).__name__]
        raise ExportError(
            f"ONNX Runtime cannot load {path} ({lines[0]}); export it again or try another opset."
        ) from error
    if session.get_providers() != [_PROVIDER]:
        raise ExportError(
            f"ONNX Runtime opened {path} on {session.get_providers()}, expected {_PROVIDER} alone."
        )
    return session


def _all_feeds(signature: Signature, vocabulary: int, seed: int) -> list[dict[str, Array]]:
    generator = np.random.default_rng(seed)
    return [_feeds(signature, each, vocabulary, generator) for each in _sizes(signature)]


def _sizes(signature: Signature) -> list[dict[str, int]]:
    names = dynamic_names(signature.inputs)
    cached = "past" in names
    table: Sequence[tuple[int, ...]] = _CACHED_SIZES if cached else _SIZES
    others = [name for name in names if name != "past"]
    first = [*others[:2], "past"] if cached else others[:2]
    further = dict.fromkeys(others[2:], _FURTHER_SIZE)
    return [dict(zip(first, sizes, strict=False)) | further for sizes in table]


def _feeds(
    signature: Signature, sizes: dict[str, int], vocabulary: int, generator: np.random.Generator
) -> dict[str, Array]:
    """Random tokens, a padded mask, zeros for other integers, normal floats (float32)."""
    feeds: dict[str, Array] = {}
    for spec in signature.inputs:
        shape = shape_of(spec, sizes)
        if spec.dtype == "float":
            feeds[spec.name] = generator.standard_normal(shape, dtype=np.float32)
        elif spec.name.endswith("input_ids"):
            feeds[spec.name] = generator.integers(vocabulary, size=shape)
        elif _is_mask(spec):
            feeds[spec.name] = _padded(shape, left="past" in sizes)
        elif spec.name == "position_ids":
            counted = np.maximum(feeds["attention_mask"].cumsum(1) - 1, 0)
            feeds[spec.name] = counted[:, -shape[1] :]
        else:
            feeds[spec.name] = np.zeros(shape, np.int64)
    return feeds


def _is_mask(spec: TensorSpec) -> bool:
    return spec.name.endswith("attention_mask") and len(spec.axes) == 2


def _padded(shape: tuple[int, ...], *, left: bool) -> npt.NDArray[np.int64]:
    """Row i of a (batch, positions) mask has i zeros at one end, and at least a single one."""
    batch, positions = shape
    kept = np.maximum(1, positions - np.arange(batch))
    mask = (np.arange(positions) < kept[:, None]).astype(np.int64)
    return mask[:, ::-1].copy() if left else mask


def _differences(
    opened: _Opened, reference: RecipeModule, feeds: dict[str, Array]
) -> list[_Difference]:
    signature, dtype = reference.signature, opened.dtype
    given = _as_given(feeds, dtype)
    found, read = opened.run(given)
    # The reference sees the inputs as rounded for the file.
    inputs = [_reference_input(feed) for feed in given.values()]
    with (
        opened.followed(reference, read),
        watched(reference.wrapped, range_guard(dtype)),
    ):
        expected = _torch_outputs(reference, inputs)
    return [
        _difference(spec, mine, theirs, signature, feeds)
        for spec, mine, theirs in zip(signature.outputs, found, expected, strict=True)
    ]


def _as_given(feeds: dict[str, Array], dtype: DType) -> dict[str, Array]:
    """Feeds whose floats have the dtype of the file."""
    return {
        name: feed.astype(np.dtype(dtype)) if feed.dtype == np.float32 else feed
        for name, feed in feeds.items()
    }


def _unpadded(signature: Signature, feeds: dict[str, Array], dtype: DType) -> dict[str, Array]:
    """The first row of a batch, which is never padded."""
    row = {spec.name: _first_row(spec, feeds[spec.name]) for spec in signature.inputs}
    return _as_given(row, dtype)


def _first_row(spec: TensorSpec, feed: Array) -> Array:
    return feed[:1] if spec.axes[:1] == ["batch"] else feed


def _reference_input(feed: Array) -> torch.Tensor:
    tensor = torch.from_numpy(feed)
    return tensor.float() if tensor.is_floating_point() else tensor


def _torch_outputs(reference: RecipeModule, inputs: list[torch.Tensor]) -> list[Array]:
    device = next(reference.parameters()).device
    with torch.inference_mode():
        outputs = reference(*(tensor.to(device) for tensor in inputs))
    return [output.cpu().numpy() for output in outputs]


def _difference(
    spec: TensorSpec, found: Array, expected: Array, signature: Signature, feeds: dict[str, Array]
) -> _Difference:
    """Largest difference at the positions that no mask excludes."""
    if found.shape != expected.shape:
        raise ExportError(
            f"Output {spec.name!r} of the exported file has shape {found.shape} where PyTorch "
            f"gives {expected.shape}; correct the axes of the recipe, or export the file again."
        )
    kept = np.ones(expected.shape, np.bool_)
    for mask in filter(_is_mask, signature.inputs):
        kept &= _unmasked(spec, expected.shape, mask, feeds[mask.name])
    gap = np.abs(found.astype(np.float64) - expected)[kept]
    return _Difference(
        expected.shape, float(gap.max(initial=0.0)), float(np.abs(expected[kept]).max(initial=0.0))
    )


def _unmasked(
    spec: TensorSpec, shape: tuple[int, ...], mask_spec: TensorSpec, mask: Array
) -> npt.NDArray[np.bool_]:
    """Which elements lie at positions that the mask keeps, broadcastable to `shape`.

    A mask over "past + sequence" speaks, with its last columns, of a tensor over "sequence" too.
    """
    batch, positions = mask_spec.axes
    named = [name for name in (positions, str(positions).split(" + ")[-1]) if name in spec.axes]
    if spec.axes[0] != batch or not named:
        return np.ones([1] * len(shape), np.bool_)
    place = spec.axes.index(named[0])
    view = [shape[i] if i in (0, place) else 1 for i in range(len(shape))]
    return mask[:, mask.shape[1] - shape[place] :].astype(np.bool_).reshape(view)


def _judge(
    differences: list[_Difference],
    output: str,
    path: Path,
    relative: float,
    twin: Twin,
    culprit: Callable[[int], str],
    noise: _Noise | None,
) -> NumericsCheck:
    # A NaN counts as the worst: max() alone would let it pass or not by its place in the list.
    worst = max(differences, key=lambda each: (math.isnan(each.largest), each.largest))
    tolerance = relative * max(each.scale for each in differences)
    passed = worst.largest <= tolerance
    if noise is not None and not passed and math.isfinite(worst.largest):
        relative = max(relative, min(_NOISES * noise.of(output), _MOST_NOISE))
        tolerance = relative * max(each.scale for each in differences)
        passed = worst.largest <= tolerance
    if not passed:
        module = culprit(differences.index(worst))
        begins = f"at module {module}" if module else "outside the modules that can be compared"
        raise ExportError(
            f"Output {output!r} of {path} at shape {worst.shape} differs from PyTorch by "
            f"{worst.largest:.3g}, more than the tolerance {tolerance:.3g} ({relative:g} of its "
            f"largest magnitude), and the difference begins {begins}; the file must not be used, "
            "try another opset or dtype."
        )
    shapes = tuple(each.shape for each in differences)
    return NumericsCheck(
        twin=twin,
        output=output,
        shapes=shapes,
        max_abs_difference=worst.largest,
        tolerance=tolerance,
        passed=passed,
    )
