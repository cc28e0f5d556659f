"""Find the repeated blocks of a model and run them one at a time."""

import inspect
import logging
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.documents import reason_of
from prox24_deploy.core.errors import ModelDirError, Prox24Error, RecipeError
from prox24_deploy.core.tasks import TASKS
from prox24_deploy.model.batch import Batch
from prox24_deploy.model.experts import Experts
from prox24_deploy.model.layers import Layer, input_rows, is_layer, same_rows
from prox24_deploy.model.offload import device_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BlockCall:
    """What a model passes to one block beside the hidden states, for one batch.

    Blocks of one batch share most of these tensors (attention mask, position embeddings), so
    keeping one call per block and batch holds references, not copies.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _StopForwardError(Exception):
    """Ends a forward pass once what it was run for has been seen."""


@contextmanager
def _stopping(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """A forward pass that one of these hooks ends; they are removed behind it."""
    try:
        yield
    except _StopForwardError as error:
        # Where its frames are part of a cycle, they and their callers would keep all that they
        # know, Gram matrices too, until the next collection.
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
    finally:
        for handle in handles:
            handle.remove()


def find_blocks(model: nn.Module, recipe: Recipe) -> nn.ModuleList:
    """Return the list of blocks that `recipe.blocks` names.

    Raises:
        RecipeError: there is no such list in this model.
    """
    try:
        blocks = model.get_submodule(recipe.blocks)
    except AttributeError as error:
        raise RecipeError(
            f"Recipe {recipe.family} places the blocks at {recipe.blocks!r}, which "
            f"{type(model).__name__} does not have; correct `blocks`."
        ) from error
    if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
        raise RecipeError(
            f"Recipe {recipe.family} places the blocks at {recipe.blocks!r}, which is a "
            f"{type(blocks).__name__}, expected a ModuleList that is not empty."
        )
    return blocks


def target_layers(block: nn.Module, recipe: Recipe) -> dict[str, Layer]:
    """The layers of one block that the recipe asks to prune, by path inside the block.

    Raises:
        RecipeError: a target pattern matches no layer of a kind that can be pruned.
    """
    known = {name: m for name, m in block.named_modules() if is_layer(m)}
    for pattern in recipe.targets:
        if not any(fnmatch(name, pattern) for name in known):
            raise RecipeError(
                f"Recipe {recipe.family} target {pattern!r} matches no linear layer or convolution "
                f"of a {type(block).__name__}; its layers are {', '.join(known)}."
            )
    return {
        name: module
        for name, module in known.items()
        if any(fnmatch(name, pattern) for pattern in recipe.targets)
        and not any(fnmatch(name, pattern) for pattern in recipe.ignore)
    }


def require_one_run(model: nn.Module, blocks: nn.ModuleList, batch: Batch, recipe: Recipe) -> None:
    """Refuse a model that does not run each of its blocks once, in their order, in a forward pass.

    What a layer reads in its first run says nothing about the others, and pruned for one run it
    is pruned for all.

    Raises:
        RecipeError: names the block and how often it runs.
    """
    order: list[int] = []

    def note(_: nn.Module, __: object, *, index: int) -> None:
        order.append(index)

    handles = [b.register_forward_pre_hook(partial(note, index=i)) for i, b in enumerate(blocks)]
    try:
        run_model(model, batch, recipe.task)
    finally:
        for handle in handles:
            handle.remove()
    if order == list(range(len(blocks))):
        return
    runs = [order.count(index) for index in range(len(blocks))]
    odd = next((index for index, count in enumerate(runs) if count != 1), None)
    told = (
        f"in the order {', '.join(map(str, order[:8]))}"
        if odd is None
        else f"block {recipe.blocks}.{odd} {runs[odd]} times"
    )
    raise RecipeError(
        f"{type(model).__name__} runs {told} in one forward pass, expected every block once and in "
        "order; blocks that share their weights cannot be pruned yet, pass a model without them."
    )


def record_calls(
    model: nn.Module, blocks: nn.ModuleList, batch: Batch, task: str
) -> tuple[Tensor, list[BlockCall]]:
    """Run one batch up to the last block; return the first block's input and all calls."""
    calls: list[BlockCall] = []
    first: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, rest, named = _take_hidden(args, kwargs)
        if not first:
            first.append(hidden)
        calls.append(BlockCall(rest, named))
        if module is blocks[-1]:
            raise _StopForwardError

    handles = [b.register_forward_pre_hook(record, with_kwargs=True) for b in blocks]
    with _stopping(handles):
        run_model(model, batch, task)
    return first[0], calls


def calls_do_without_blocks(
    model: nn.Module,
    blocks: nn.ModuleList,
    batch: Batch,
    task: str,
    recorded: tuple[Tensor, list[BlockCall]],
) -> bool:
    """Whether a model passes its blocks the same things when none of them computes anything.

    Where that holds for one batch, of which `recorded` is what `record_calls` gave, that needs to
    run no block for the others, within `skipping`. It does not where a block hands on more than
    hidden states, or these in another shape.
    """
    try:
        with skipping(blocks):
            again = record_calls(model, blocks, batch, task)
    except Exception:
        # Hidden states of one block may not fit the next, with whatever error that gives.
        log.debug("%s does not run without its blocks", type(model).__name__, exc_info=True)
        return False
    return _equal(recorded, again)


@contextmanager
def skipping(blocks: nn.ModuleList) -> Iterator[None]:
    """Let blocks hand on their hidden states as they came, and nothing else."""
    # A block may have a forward of its own beside that of its class, such as a hook of accelerate.
    own = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = _handed_on
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _handed_on(*args: Any, **kwargs: Any) -> Tensor:
    return _take_hidden(args, kwargs)[0]


def _equal(one: object, other: object) -> bool:
    """Whether two values are built alike and hold equal tensors; what is not known is not equal."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, BlockCall) and isinstance(other, BlockCall):
        return _equal((one.args, one.kwargs), (other.args, other.kwargs))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    known = (bool, int, float, str, torch.Size, torch.dtype, torch.device, type(None))
    return isinstance(one, known) and type(one) is type(other) and one == other


def run_model(model: nn.Module, batch: Batch, task: str) -> Any:
    """Forward one batch, without a cache, which blocks that are run again would fill further."""
    device = device_of(model)
    inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
    # A decoder that embeds text has one too.
    if TASKS[task].writes_text or "use_cache" in inspect.signature(model.forward).parameters:
        return model(**inputs, use_cache=False)
    return model(**inputs)


@torch.no_grad()
def require_runs(model: nn.Module, batch: Batch, task: str, path: Path) -> None:
    """Forward one batch of a model just opened, before any work rests on it.

    Raises:
        ModelDirError: the model of the directory `path` does not take it.
    """
    try:
        run_model(model, batch, task)
    except (Prox24Error, MemoryError):
        raise
    except Exception as error:
        # Sizes that do not fit each other surface as whatever the model's own code runs into.
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in batch.inputs.items())
        raise ModelDirError(
            f"Model directory {path} opens but does not run on its samples, {shapes} "
            f"({reason_of(error)}); restore config.json and the configuration of its processor."
        ) from error


def run_block(block: nn.Module, call: BlockCall, hidden: Tensor) -> Tensor:
    """Output hidden states of one block."""
    result = block(hidden, *call.args, **call.kwargs)
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


def layer_input(block: nn.Module, call: BlockCall, hidden: Tensor, layer: Layer) -> Tensor:
    """Run a block only as far as `layer` and return the rows of its input, (batch, ..., d)."""
    return _watched(block, call, hidden, layer, stop=True)[0]


def layer_input_and_output(
    block: nn.Module, call: BlockCall, hidden: Tensor, layer: Layer
) -> tuple[Tensor, Tensor]:
    """Rows of the input of a layer, (batch, ..., d), and the output of the whole block."""
    rows, output = _watched(block, call, hidden, layer, stop=False)
    assert output is not None, "the block ran to its end"
    return rows, output


def _watched(
    block: nn.Module, call: BlockCall, hidden: Tensor, layer: Layer, *, stop: bool
) -> tuple[Tensor, Tensor | None]:
    seen: list[Tensor] = []

    def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        if stop:
            raise _StopForwardError

    output = None
    with _stopping([layer.register_forward_pre_hook(record)]):
        output = run_block(block, call, hidden)
    return input_rows(layer, seen[0]), output


def expert_inputs(
    block: nn.Module,
    call: BlockCall,
    hidden: Tensor,
    experts: Experts,
    layers: Sequence[Layer],
    route: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Run a block as far as layers of its experts; return what each reads and the route of tokens.

    Args:
        block: with the experts.
        call: what its model passes to it.
        hidden: hidden states in front of it.
        experts: all of its experts.
        layers: of some of them.
        route: (tokens, k), where tokens go instead of where the block sends them.

    Returns:
        For each layer the rows (tokens, d) of the tokens that are routed to its expert, in their
        order, and the route, (tokens, k).
    """
    seen: dict[nn.Module, Tensor] = {}

    def record(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[layer] = args[0]
        if len(seen) == len(layers):
            raise _StopForwardError

    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    with experts.routed(route) as routes, _stopping(handles):
        run_block(block, call, hidden)
    return [seen[layer] for layer in layers], routes[0]


def shared_inputs(
    block: nn.Module, layers: Mapping[str, Layer], call: BlockCall, hidden: Tensor
) -> list[list[str]]:
    """Group layers that are fed the same rows, in the order in which a forward reaches them.

    A layer that the block runs on several tensors has no rows of its own and is in no group.
    """
    seen: list[tuple[Tensor, list[str]]] = []
    with _recorded_inputs(layers) as events:
        run_block(block, call, hidden)
    runs = _runs(events)
    for name, tensor in events:
        if runs[name] > 1:
            continue
        group = next(
            (
                names
                for known, names in seen
                if known is tensor and same_rows(layers[names[0]], layers[name])
            ),
            None,
        )
        if group is None:
            seen.append((tensor, [name]))
        elif name not in group:
            group.append(name)
    return [names for _, names in seen]


def layer_runs(
    block: nn.Module, layers: Mapping[str, Layer], call: BlockCall, hidden: Tensor
) -> Counter[str]:
    """On how many different tensors a forward pass of a block runs each layer."""
    with _recorded_inputs(layers) as events:
        run_block(block, call, hidden)
    return _runs(events)


def _runs(events: Sequence[tuple[str, Tensor]]) -> Counter[str]:
    # The events hold the tensors, so that no two of them have had the same address.
    return Counter(name for name, _ in {(name, id(tensor)) for name, tensor in events})


@contextmanager
def _recorded_inputs(layers: Mapping[str, Layer]) -> Iterator[list[tuple[str, Tensor]]]:
    """Record (name, input tensor) of every call; holding the tensors keeps identity meaningful."""
    events: list[tuple[str, Tensor]] = []
    handles = []
    for name, layer in layers.items():

        def record(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            events.append((name, args[0]))

        handles.append(layer.register_forward_pre_hook(record))
    try:
        yield events
    finally:
        for handle in handles:
            handle.remove()


def is_handed(tensor: Tensor, call: BlockCall) -> bool:
    """Whether a tensor is what a block is passed, such as the states of an encoder, itself."""
    return any(tensor is value for value in (*call.args, *call.kwargs.values()))


def real_rows(tensor: Tensor, real: Tensor) -> Tensor:
    """Rows (tokens, d) that are not padding.

    Args:
        tensor: (batch, positions, d), or (batch · positions, d), in any order, where nothing is
            padding; of samples that are never padded any shape (..., d), since a model may cut
            them into windows.
        real: (batch, positions) bool, or (batch,) for samples that are never padded.

    Raises:
        RecipeError: the tensor does not have one row per position.
    """
    if real.ndim == 1:
        return tensor.reshape(-1, tensor.shape[-1])
    if tensor.shape[:-1] == (real.numel(),) and bool(real.all()):
        return tensor
    if tensor.shape[:-1] != real.shape:
        raise RecipeError(
            f"A target layer receives inputs of shape {tuple(tensor.shape)}, expected "
            f"{tuple(real.shape)} positions; list it under `ignore`."
        )
    return tensor[real.to(tensor.device)]


def real_tokens(route: Tensor, expert: int, real: Tensor) -> Tensor:
    """Which of the tokens that are routed to an expert are not padding, (tokens,) bool.

    Args:
        route: (batch · positions, k), the experts of each token.
        expert: number of one.
        real: (batch, positions) bool, or (batch,) for samples that are never padded.

    Raises:
        RecipeError: the experts do not read one row per position.
    """
    tokens = torch.where(route == expert)[0]
    if real.ndim == 1:
        return torch.ones_like(tokens, dtype=torch.bool)
    if len(route) != real.numel():
        raise RecipeError(
            f"The experts of a block read {len(route)} rows, expected {tuple(real.shape)} "
            "positions; list them under `ignore`."
        )
    return real.flatten().to(tokens.device)[tokens]


def _take_hidden(
    args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Split the hidden states off the arguments of a block."""
    if args and isinstance(args[0], torch.Tensor):
        return args[0], tuple(args[1:]), dict(kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), tuple(args), rest
