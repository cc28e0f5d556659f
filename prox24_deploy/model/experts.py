"""Experts as modules of their own: each of their layers a Linear, as the checkpoint stores them.

transformers holds all experts of a block in two tensors, (experts, 2 · inner, hidden) for gate and
up and (experts, hidden, inner) for down, and merges the tensors of a checkpoint when it loads. Here
nothing is merged: while a model is built, each such module is replaced by one with a layer for each
tensor of the checkpoint, so that whatever knows how to treat a Linear knows how to treat an expert.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from prox24_deploy.config.recipe import ExpertLayers

# The parameters of a module of transformers that holds all experts.
_GATE_UP, _DOWN = FUSED = ("gate_up_proj", "down_proj")


class Expert(nn.Module):
    """One expert: down(act(gate(x)) · up(x)), without biases; the recipe names its layers."""

    def __init__(self, names: ExpertLayers, like: Tensor, act: Callable[[Tensor], Tensor]) -> None:
        """`like` is the down projection of all experts, (experts, hidden, inner)."""
        super().__init__()
        hidden, inner = like.shape[1:]
        self.names = names
        # The exporter of torch gives other names to all modules of a model that shares one.
        self.act_fn = deepcopy(act)
        sizes = {
            names.gate: (hidden, inner),
            names.up: (hidden, inner),
            names.down: (inner, hidden),
        }
        for name, (read, given) in sizes.items():
            layer = nn.Linear(read, given, bias=False, device=like.device, dtype=like.dtype)
            self.add_module(name, layer)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows (tokens, hidden) to as many; there may be none."""
        names = (self.names.gate, self.names.up, self.names.down)
        gate, up, down = map(self.get_submodule, names)
        result: Tensor = down(self.act_fn(gate(rows)) * up(rows))
        return result


class Experts(nn.ModuleList):
    """All experts of a block, each of which runs on the tokens that are routed to it, or on none.

    It stands for the module of transformers of the same inputs, and computes what the "eager"
    implementation of that does.
    """

    def __init__(self, experts: Iterator[Expert], *, exported: Literal["routed", "all"]) -> None:
        """`exported`: on which tokens each runs in a graph that is exported of them."""
        super().__init__(experts)
        self.exported = exported
        self._route: Tensor | None = None
        self._routes: list[Tensor] | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum what the experts of each token give, (tokens, hidden).

        Args:
            hidden_states: (tokens, hidden).
            top_k_index: (tokens, k), the experts that each token is routed to.
            top_k_weights: (tokens, k), what each of them counts for.
        """
        if self.exported == "all" and torch.compiler.is_exporting():
            return self._on_all(hidden_states, top_k_index, top_k_weights)
        index = top_k_index if self._route is None else self._route
        if self._routes is not None:
            self._routes.append(index)
        output = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            tokens, place = torch.where(index == number)
            rows = expert(hidden_states[tokens]) * top_k_weights[tokens, place, None]
            # No token is there twice, and no runtime on CPUs adds in float16 where it scatters.
            output[tokens] += rows.to(output.dtype)
        return output

    def _on_all(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The same sum in shapes that do not depend on the route."""
        output = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            here = index == number
            rows = expert(hidden) * (weights * here).sum(-1, keepdim=True)
            # What an expert makes of tokens that are not its own may be beyond float16.
            output = output + torch.where(here.any(-1, keepdim=True), rows, 0.0).to(output.dtype)
        return output

    @contextmanager
    def routed(self, index: Tensor | None = None) -> Iterator[list[Tensor]]:
        """Note where tokens go, (tokens, k) of each call; if `index` is given they go there.

        Only what single experts read is of use then, for the sum has the weights of other experts.
        """
        self._route, self._routes = index, []
        try:
            yield self._routes
        finally:
            self._route, self._routes = None, None


@dataclass(frozen=True, slots=True)
class Place:
    """A layer of an expert: the module with all experts, and the number of its own.

    `is_last` says that it reads what other layers of the expert give, not what the expert reads.
    """

    experts: Experts
    number: int
    is_last: bool


def place_of(block: nn.Module, name: str) -> Place | None:
    """Which layer of which expert is at a path inside a block; None for any other layer."""
    path, _, layer = name.rpartition(".")
    root, _, number = path.rpartition(".")
    experts = block.get_submodule(root) if number.isdigit() else None
    if not isinstance(experts, Experts):
        return None
    expert = experts[int(number)]
    assert isinstance(expert, Expert), "there is nothing else in it"
    return Place(experts, int(number), layer == expert.names.down)


def experts_of(block: nn.Module, names: Sequence[str]) -> tuple[Experts, list[int]]:
    """The module with all experts of a block, and the numbers of those that have some layers."""
    places = [place for name in names if (place := place_of(block, name)) is not None]
    return places[0].experts, [place.number for place in places]


def fused_parameters(module: nn.Module) -> Mapping[str, Tensor]:
    """The tensors with all experts that a module of transformers has itself, else nothing."""
    own = {name: each for name, each in module.named_parameters(recurse=False) if each.ndim == 3}
    return own if own.keys() == {*FUSED} else {}


@contextmanager
def experts_apart(names: ExpertLayers | None) -> Iterator[None]:
    """Within it every model is built with `Experts`, where the recipe says that it has experts."""
    if names is None:
        yield
        return

    def replaced(_: nn.Module, name: str, module: nn.Module | None) -> nn.Module | None:
        if name != names.path.rpartition(".")[2] or module is None:
            return None
        return _separated(module, names)

    # It may return a module, which its annotation does not say.
    handle = register_module_module_registration_hook(replaced)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _separated(module: nn.Module, names: ExpertLayers) -> Experts | None:
    """The same as `Experts` with weights of their own; None where it computes something else."""
    fused = fused_parameters(module)
    act: Any = getattr(module, "act_fn", None)
    if len(fused) != len([*module.parameters()]) or act is None:
        return None
    count, hidden, inner = fused[_DOWN].shape
    if fused[_GATE_UP].shape != (count, 2 * inner, hidden):
        return None
    experts = (Expert(names, fused[_DOWN], act) for _ in range(count))
    return Experts(experts, exported=names.exported)


@contextmanager
def loaded_apart(model_type: str, names: ExpertLayers | None) -> Iterator[None]:
    """Within it transformers loads each tensor of an expert as it is, and merges none."""
    from transformers import conversion_mapping as library

    known = library.get_checkpoint_conversion_mapping(model_type) if names else None
    if known is None:
        yield
        return
    users = set(library.USER_REGISTERED_MAPPINGS)
    kept = [each for each in known if not _merges(each)]
    library.register_checkpoint_conversion_mapping(model_type, kept, overwrite=True)
    try:
        yield
    finally:
        library.register_checkpoint_conversion_mapping(model_type, known, overwrite=True)
        library.USER_REGISTERED_MAPPINGS &= users


def _merges(conversion: Any) -> bool:
    """Whether a conversion of transformers makes one of the tensors with all experts."""
    return any(target.rpartition(".")[2] in FUSED for target in conversion.target_patterns)
