"""Round what INT8 layers give, where nothing behind them does, and where that is harmless.

TensorRT has sparse INT8 kernels for INT8 outputs only. What reads an output is followed through one
forward pass of the block: where that are quantised layers alone, their rounding is the output's
own. Elsewhere an output may get a scale. All outputs of a block together may make the error of the
block, quantised beside not, on equal inputs and on samples that nothing was calibrated on, larger
by a bounded share; those that cost least come first.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.model.blocks import is_handed, real_rows, run_block
from prox24_deploy.model.layers import Layer, layer_at
from prox24_deploy.pruning.activations import Activations, BlockPair
from prox24_deploy.quantization.formats import NumberFormat
from prox24_deploy.quantization.ranges import InputRange, input_ranges
from prox24_deploy.quantization.tensors import QuantizedLayer, RoundedOutput

# By which share of itself rounded outputs may increase the squared error of a block.
MOST_ADDED = 0.5
# Rows by which a range is found.
_MOST_ROWS = 1024
# Functions through which the output of a kernel stays its output: TensorRT fuses the first, and the
# others only renumber elements, as in `graph.check.eligibility`.
_FUSED = ("relu", "relu_", "gelu", "leaky_relu", "leaky_relu_", "clamp", "hardtanh", "hardtanh_")
_RENUMBERED = ("view", "reshape", "transpose", "permute", "flatten", "unflatten", "squeeze")
_PASSED = (*_FUSED, *_RENUMBERED, "unsqueeze", "contiguous", "dropout")

BLOCK_OUTPUT = "the block"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputChoice:
    """What came of the output of one layer.

    Attributes:
        scale: by which it is rounded; None where it is not.
        limit: magnitude from which it is clipped, 0 without a scale.
        chosen_by: how that was found.
        reason: why it has no scale of its own.
    """

    scale: float | None = None
    limit: float = 0.0
    chosen_by: str = ""
    reason: str = ""


def choose_outputs(
    twin: BlockPair,
    layers: Mapping[str, QuantizedLayer],
    sets: Sequence[Activations],
    form: NumberFormat,
) -> dict[str, OutputChoice]:
    """Decide on the outputs of all quantised layers of a block, by path in it.

    Args:
        twin: the block as it was, and quantised, its layers rounding what they read.
        layers: that are quantised, by path in the block.
        sets: batches to find ranges on, and batches to choose by.
        form: to round to; only for INT8 there is something to gain.

    Raises:
        ModelDirError: an output is NaN or infinite.
    """
    found = _known_reasons(twin, layers, sets[0], form)
    names = [name for name in layers if name not in found]
    if not names:
        return found
    spans = _ranges(twin, names, sets, form)
    found |= {n: OutputChoice(reason="it is all zero on calibration samples") for n in names}
    return found | _bounded(twin, {n: spans[n] for n in names if n in spans}, sets[1], form)


def _known_reasons(
    twin: BlockPair,
    layers: Mapping[str, QuantizedLayer],
    calibration: Activations,
    form: NumberFormat,
) -> dict[str, OutputChoice]:
    """Layers whose output needs no trial."""
    if form.dtype.is_floating_point:
        reason = f"sparse kernels of {form.name} give 16 bits"
        return {name: OutputChoice(reason=reason) for name in layers}
    readers = output_readers(twin, layers, calibration)
    found = {}
    for name in layers:
        if isinstance(layer_at(twin.pruned, name), nn.Conv2d):
            reason = "an exporter may fold a norm into its convolution"
        elif readers[name] and readers[name] <= layers.keys():
            reason = f"{' and '.join(sorted(readers[name]))} rounds it"
        else:
            continue
        found[name] = OutputChoice(reason=reason)
    return found


@torch.no_grad()
def output_readers(
    twin: BlockPair, names: Mapping[str, object], activations: Activations
) -> dict[str, set[str]]:
    """What reads the output of each layer in the block as it was: layers by path, or functions."""
    weights = {id(layer_at(twin.dense, name).weight): name for name in names}
    call, hidden = activations.pruned_calls[0][twin.index], activations.pruned[0]
    with _Trail(weights) as trail:
        given = run_block(twin.dense, call, hidden)
    trail.note(given, BLOCK_OUTPUT)
    return {name: trail.readers.get(name, set()) for name in names}


class _Trail(TorchFunctionMode):
    """Follows outputs of layers, whose weights it knows by identity, to what reads them."""

    def __init__(self, weights: Mapping[int, str]) -> None:
        super().__init__()
        self.readers: dict[str, set[str]] = {}
        self._weights = weights
        self._origins: dict[int, set[str]] = {}
        # As long as these are held, no other tensor has their identity.
        self._held: list[Tensor] = []

    def note(self, tensor: Tensor, reader: str) -> None:
        """Something reads a tensor."""
        for name in self._origins.get(id(tensor), ()):
            self.readers.setdefault(name, set()).add(reader)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        """Call the function, and note what it reads and gives."""
        result = func(*args, **(kwargs or {}))
        made = _tensors(result)
        given = _tensors((args, kwargs or {}))
        if not made:
            return result
        layer = next((self._weights[id(t)] for t in given if id(t) in self._weights), None)
        called = getattr(func, "__name__", str(func))
        if layer is None and called in _PASSED:
            origins = {name for t in given for name in self._origins.get(id(t), ())}
        else:
            origins = set() if layer is None else {layer}
            for tensor in given:
                self.note(tensor, layer or called)
        for tensor in made if origins else ():
            self._origins[id(tensor)] = origins
            self._held.append(tensor)
        return result


def _tensors(found: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


@torch.no_grad()
def _ranges(
    twin: BlockPair, names: Sequence[str], sets: Sequence[Activations], form: NumberFormat
) -> dict[str, InputRange]:
    """The range of the least squared error on the second set, of those that the first suggests."""
    seen, largest = _read_outputs(twin, names, sets[0])
    withheld, _ = _read_outputs(twin, names, sets[1])
    found = {}
    for name in names:
        if largest[name] == 0:
            continue
        rows = withheld[name]

        def wrong(span: InputRange, rows: Tensor = rows) -> float:
            made = form.values(form.numbers(rows, span.scale), span.scale)
            return float((made - rows).square().double().sum())

        found[name] = min(input_ranges(seen[name], largest[name], form), key=wrong)
    return found


def _read_outputs(
    twin: BlockPair, names: Sequence[str], activations: Activations
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A sample of rows that layers of the quantised block give, and the largest magnitude."""
    share = -(-_MOST_ROWS // len(activations.batches))
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    largest = dict.fromkeys(names, 0.0)
    for i, batch in enumerate(activations.batches):
        call = activations.pruned_calls[i][twin.index]
        with _recorded(twin.pruned, names) as seen:
            run_block(twin.pruned, call, activations.pruned[i])
        for name, (given, made) in seen.items():
            real = batch.real if is_handed(given, call) else activations.real[i]
            found = real_rows(made, real)
            rows[name].append(found[:: max(1, -(-len(found) // share))].float())
            largest[name] = max(largest[name], _largest(twin, name, found))
    return {name: torch.cat(parts) for name, parts in rows.items()}, largest


def _largest(twin: BlockPair, name: str, found: Tensor) -> float:
    size = found.abs().amax() if found.numel() else found.new_zeros(())
    if not bool(torch.isfinite(size)):
        raise ModelDirError(
            f"Layer {twin.prefix}.{name} gives NaN or infinity on calibration samples, which have "
            "no range; its activations overflow or the checkpoint is damaged."
        )
    return float(size)


@contextmanager
def _recorded(block: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Within it, what layers are given and what they give."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    # In front of the rounding of inputs, which would hide what a block was handed.
    given: dict[str, Tensor] = {}
    handles = []
    for name in names:
        layer: Layer = layer_at(block, name)

        def before(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            given[name] = args[0]

        def after(_: nn.Module, __: object, made: Tensor, name: str = name) -> None:
            seen[name] = (given[name], made)

        handles.append(layer.register_forward_pre_hook(before, prepend=True))
        handles.append(layer.register_forward_hook(after))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _bounded(
    twin: BlockPair, spans: Mapping[str, InputRange], withheld: Activations, form: NumberFormat
) -> dict[str, OutputChoice]:
    """Round as many outputs, the least harmful first, as the error of the block allows."""
    expected = _block_outputs(twin, twin.dense, withheld)

    def error(names: Sequence[str]) -> float:
        with _rounding(twin.pruned, {name: spans[name] for name in names}, form):
            found = _block_outputs(twin, twin.pruned, withheld)
        pairs = zip(found, expected, strict=True)
        return sum(float((mine - theirs).square().double().sum()) for mine, theirs in pairs)

    plain = error([])
    harm = {name: error([name]) for name in spans}
    kept: list[str] = []
    choices = {}
    for name in sorted(spans, key=lambda each: harm[each]):
        with_it = error([*kept, name])
        if with_it <= (1 + MOST_ADDED) * plain:
            kept.append(name)
            choices[name] = _rounded(spans[name], form)
        else:
            times = with_it / plain if plain else float("inf")
            reason = (
                f"rounding it besides would make the error of its block {times:.2f} times as large"
            )
            choices[name] = OutputChoice(reason=reason)
    return choices


def _rounded(span: InputRange, form: NumberFormat) -> OutputChoice:
    return OutputChoice(scale=span.scale, limit=span.scale * form.largest, chosen_by=span.chosen_by)


def _block_outputs(twin: BlockPair, block: nn.Module, activations: Activations) -> list[Tensor]:
    """What a block gives, by batch, for the inputs that the quantised one reads; real rows."""
    return [
        real_rows(
            run_block(block, calls[twin.index], activations.pruned[i]), activations.real[i]
        ).float()
        for i, calls in enumerate(activations.pruned_calls)
    ]


@contextmanager
def _rounding(
    block: nn.Module, spans: Mapping[str, InputRange], form: NumberFormat
) -> Iterator[None]:
    """Within it, layers round what they give."""
    handles = [
        layer_at(block, name).register_forward_hook(RoundedOutput(form.name, span.scale))
        for name, span in spans.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def with_output(layer: QuantizedLayer, choice: OutputChoice) -> QuantizedLayer:
    """A layer that rounds what it gives as was decided."""
    return replace(layer, output_scale=choice.scale)
