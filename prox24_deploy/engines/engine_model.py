"""Engines, or the PyTorch modules that they were made from, called as the model itself.

So the metrics of models apply to engines as they are, and both are fed the very same arrays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import ml_dtypes  # noqa: F401 - makes "bfloat16" a dtype that numpy knows
import numpy as np
import torch
from torch import Tensor, nn

from prox24_deploy.config.recipe import STATES, TensorSpec, shape_of
from prox24_deploy.core.errors import EngineError
from prox24_deploy.core.types import DType
from prox24_deploy.engines.base import Array, Feeds
from prox24_deploy.graph.export.module import RecipeModule
from prox24_deploy.model.offload import device_of

_PAST, _PRESENT = "past_key_values.", "present."
_DECODER = "decoder_"


class Runs(Protocol):
    """What of a session is needed here."""

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        """Run once; inputs and outputs by graph name."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """A graph that can be run: what it takes, in which float type, and what to call it.

    Batches of fewer than `rows` rows are filled up by repeating one, for an engine that takes no
    fewer.
    """

    runs: Runs
    inputs: tuple[TensorSpec, ...]
    dtype: DType
    source: str
    rows: int = 1


class TorchGraph:
    """The graph of a recipe in PyTorch, in float32, with the inputs and outputs of its engine."""

    def __init__(self, module: RecipeModule) -> None:
        self._module = module

    @torch.inference_mode()
    def infer(self, feeds: Feeds) -> dict[str, Array]:
        """Run once; inputs and outputs by graph name, without what the graph caches."""
        signature = self._module.signature
        device = device_of(self._module)
        inputs = (torch.from_numpy(feeds[spec.name]).to(device) for spec in signature.inputs)
        outputs = self._module(*inputs)
        return {
            spec.name: output.float().cpu().numpy()
            for spec, output in zip(signature.outputs, outputs, strict=True)
            if not spec.name.startswith(_PRESENT)
        }


class EngineModel(nn.Module):
    """One graph, or encoder and decoder, behind the calling convention of transformers.

    A decoder is fed an empty past: a whole text at once, as when a prompt is read. With `steps` it
    so reads all but that many tokens of a text, and then those one at a time, each behind the keys
    and values that the graph itself gave. `config` is that of the model. Outputs are float32 on the
    CPU.
    """

    def __init__(self, graphs: Sequence[Graph], config: Any, steps: int = 0) -> None:
        super().__init__()
        self._graphs, self._steps = tuple(graphs), steps
        self.config = config
        # Whoever runs a model asks its parameters where to send the inputs: to the CPU.
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, **inputs: Any) -> SimpleNamespace:
        """Outputs by name.

        Raises:
            EngineError: an input of a graph is not among `inputs`, or an output is not finite.
        """
        given = {name: value.numpy() for name, value in inputs.items() if name != "use_cache"}
        if len(self._graphs) == 1:
            return SimpleNamespace(**_run(self._graphs[0], given, self._steps))
        encoder, decoder = self._graphs
        read = {name: value for name, value in given.items() if not name.startswith(_DECODER)}
        states = _run(encoder, read)["last_hidden_state"]
        written = {n.removeprefix(_DECODER): v for n, v in given.items() if n.startswith(_DECODER)}
        written[STATES] = states.numpy()
        if "attention_mask" in read:
            written["encoder_attention_mask"] = read["attention_mask"]
        return SimpleNamespace(**_run(decoder, written, self._steps))


def _run(graph: Graph, given: Mapping[str, Array], steps: int = 0) -> dict[str, Tensor]:
    batch = len(next(iter(given.values())))
    missing = max(0, graph.rows - batch)
    filled = {name: np.concatenate([v, v[:1].repeat(missing, 0)]) for name, v in given.items()}
    outputs = _in_pieces(graph, filled, steps) if steps else _infer(graph, filled, 0)
    return {
        name: _checked(graph, name, array[:batch])
        for name, array in outputs.items()
        if not name.startswith(_PRESENT)
    }


def _in_pieces(graph: Graph, given: Mapping[str, Array], steps: int) -> dict[str, Array]:
    """Outputs of a prefill with those of a step for each of the last tokens behind them."""
    length = given["input_ids"].shape[1]
    first = max(1, length - steps)
    found = [_infer(graph, _columns(given, 0, first), 0)]
    for position in range(first, length):
        own = _columns(given, position, position + 1)
        # Of the outputs before, the last alone is needed as a past.
        past = {name: found[-1].pop(name) for name in list(found[-1]) if name.startswith(_PRESENT)}
        own |= {name.replace(_PRESENT, _PAST): array for name, array in past.items()}
        found.append(_infer(graph, own, position))
    names = [name for name in found[0] if not name.startswith(_PRESENT)]
    return {name: np.concatenate([one[name] for one in found], axis=1) for name in names}


def _columns(given: Mapping[str, Array], first: int, end: int) -> dict[str, Array]:
    """What is given of some tokens: their ids and positions, and the mask up to them."""
    spans = {"input_ids": first, "position_ids": first, "attention_mask": 0}
    return {
        name: array[:, spans[name] : end] if name in spans else array
        for name, array in given.items()
    }


def _infer(graph: Graph, given: Mapping[str, Array], past: int) -> dict[str, Array]:
    feeds = {spec.name: _feed(graph, spec, given, past) for spec in graph.inputs}
    return dict(graph.runs.infer(feeds))


def _feed(graph: Graph, spec: TensorSpec, given: Mapping[str, Array], past: int) -> Array:
    """The array for one input: what was given, or what follows from the shape of that."""
    first = given.get("input_ids", next(iter(given.values())))
    sizes = {"batch": len(first), "sequence": first.shape[1], "past": past}
    if spec.name in given:
        found = given[spec.name]
        return found.astype(np.dtype(graph.dtype)) if spec.dtype == "float" else found
    if spec.name.startswith(_PAST):
        return np.zeros(shape_of(spec, sizes), np.dtype(graph.dtype))
    shape = (sizes["batch"], sizes["sequence"])
    match spec.name:
        case "attention_mask":
            return np.ones((shape[0], past + shape[1]), np.int64)
        case "position_ids":
            return np.broadcast_to(past + np.arange(shape[1]), shape).copy()
        case _:
            raise EngineError(
                f"{graph.source} takes the input {spec.name!r}, which evaluation samples do not "
                f"have, they have {', '.join(given)}; give the recipe inputs that samples have."
            )


def _checked(graph: Graph, name: str, array: Array) -> Tensor:
    found = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if not bool(found.isfinite().all()):
        raise EngineError(
            f"Output {name!r} of {graph.source} is NaN or infinite on an evaluation sample, "
            "expected finite numbers; do not ship this engine, export with --dtype bfloat16 or "
            "float32."
        )
    return found
