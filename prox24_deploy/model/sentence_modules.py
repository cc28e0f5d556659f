"""The modules that make one embedding of the hidden states of a text.

They hang on the model itself, under the name `SENTENCE_MODULES`, so that whatever runs, copies,
converts or exports the model has them with it; the model's own forward pass does not know them.
As in sentence-transformers, sums, norms and quotients are taken in float32 at least.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from prox24_deploy.config.recipe import EMBEDDING, SENTENCE_MODULES, PoolingMode, Recipe
from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.model.sentence import WEIGHTS_FILE, SentenceModule, SentencePipeline, settled

_Pool = Callable[[Tensor, Tensor], Tensor]


class Pooling(nn.Module):
    """One vector for each text from its hidden states: (batch, n · hidden).

    Each of the n modes gives a vector, and these are joined. Padding, on either side, has no part
    in any of them.
    """

    def __init__(self, modes: Sequence[PoolingMode]) -> None:
        super().__init__()
        self.modes = tuple(modes)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Pool (batch, sequence, hidden); `mask`, (batch, sequence), is 0 on padding."""
        real = mask != 0
        return torch.cat([_POOLS[mode](hidden, real) for mode in self.modes], dim=-1)


class Dense(nn.Module):
    """A linear layer and its activation, to which `residual` of what is read may be added."""

    def __init__(
        self, linear: nn.Linear, activation: nn.Module, residual: nn.Module | None
    ) -> None:
        super().__init__()
        self.linear, self.activation, self.residual = linear, activation, residual

    def forward(self, embedding: Tensor) -> Tensor:
        """(batch, in) to (batch, out)."""
        made: Tensor = self.activation(self.linear(embedding))
        return made if self.residual is None else made + self.residual(embedding)


class Normalize(nn.Module):
    """Embeddings of unit length."""

    def forward(self, embedding: Tensor) -> Tensor:
        """(batch, width) to the same."""
        unit = nn.functional.normalize(_widened(embedding), dim=-1)
        return unit.to(embedding.dtype)


class SentenceModules(nn.Module):
    """A Pooling and what follows it, in order, each under the name of its folder."""

    def __init__(self, pooling: Pooling, steps: dict[str, nn.Module]) -> None:
        super().__init__()
        self.pooling = pooling
        self.steps = nn.ModuleDict(steps)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Embeddings, (batch, width), of hidden states and the mask of their padding."""
        embedding: Tensor = self.pooling(hidden, mask)
        for step in self.steps.values():
            embedding = step(embedding)
        return embedding


def attach_sentence_modules(model: nn.Module, path: Path, recipe: Recipe) -> None:
    """Hang on a model the modules by which its directory, or a recipe, embeds texts, if any.

    Raises:
        ModelDirError, RecipeError: they cannot be read, or the two say different things.
    """
    pipeline = settled(path, recipe)
    if pipeline is not None:
        hidden = int(model.config.hidden_size)  # type: ignore[union-attr,arg-type]
        model.add_module(SENTENCE_MODULES, load_sentence_modules(path, pipeline, hidden))


def embedding_of(model: nn.Module, result: Any, mask: Tensor) -> Tensor:
    """Embeddings, (batch, width), of what a model gave: as it embeds texts, else by the mean."""
    for name in (EMBEDDING, "text_embeds"):
        if (given := getattr(result, name, None)) is not None:
            return torch.as_tensor(given)
    hidden: Tensor = result.last_hidden_state
    mask = mask.to(hidden.device)
    modules = getattr(model, SENTENCE_MODULES, None)
    embedding: Tensor = _mean(hidden, mask != 0) if modules is None else modules(hidden, mask)
    return embedding


def load_sentence_modules(path: Path, pipeline: SentencePipeline, hidden: int) -> SentenceModules:
    """Build the modules of a pipeline in float32, with the weights that a directory has for them.

    Args:
        path: the directory.
        pipeline: what was read from it, or from a recipe.
        hidden: width of the hidden states.

    Raises:
        ModelDirError: weights are missing, or of another shape than the options or the module
            before ask for.
    """
    width = len(pipeline.poolings) * hidden
    steps: dict[str, nn.Module] = {}
    for module in pipeline.steps:
        if module.kind in {"Dense", "LayerNorm"}:
            step, width = _weighted(path, module, width)
        elif module.kind == "Normalize":
            step = Normalize()
        else:
            continue
        # A dot would end the name of a module.
        steps[module.folder.replace(".", "_")] = step
    built = SentenceModules(Pooling(pipeline.poolings), steps)
    return built.eval().requires_grad_(requires_grad=False)


def _weighted(path: Path, module: SentenceModule, width: int) -> tuple[nn.Module, int]:
    """A module with weights that reads vectors of this width, and the width of what it makes."""
    file = path / module.folder / WEIGHTS_FILE
    weights = {name: tensor.float() for name, tensor in load_file(file).items()}
    shapes = _shapes(module, width)
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != shapes:
        raise ModelDirError(
            f"{file} holds {found}, expected {shapes} by its config.json and by the {width} "
            f"features that reach the module; restore {module.folder}."
        )
    if module.kind == "LayerNorm":
        norm = nn.LayerNorm(width)
        norm.load_state_dict({name.removeprefix("norm."): w for name, w in weights.items()})
        return norm, width
    activation = str(module.options.get("activation_function", "Tanh")).rpartition(".")[2]
    residual = _residual(module, weights)
    linear = _linear(weights["linear.weight"], weights.get("linear.bias"))
    return Dense(linear, getattr(nn, activation)(), residual), linear.out_features


def _shapes(module: SentenceModule, width: int) -> dict[str, tuple[int, ...]]:
    """What the weights of a module must be that reads vectors of this width."""
    options = module.options
    if module.kind == "LayerNorm":
        size = (options.get("dimension", width),)
        return {"norm.bias": size, "norm.weight": size} if size == (width,) else {}
    out = options.get("out_features", 0)
    if options.get("in_features", width) != width:
        return {}
    shapes: dict[str, tuple[int, ...]] = {"linear.weight": (out, width)}
    if options.get("bias", True):
        shapes["linear.bias"] = (out,)
    if options.get("use_residual") and out != width:
        shapes["residual.weight"] = (out, width)
    return shapes


def _residual(module: SentenceModule, weights: dict[str, Tensor]) -> nn.Module | None:
    if not module.options.get("use_residual"):
        return None
    weight = weights.get("residual.weight")
    return nn.Identity() if weight is None else _linear(weight, None)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    features, width = weight.shape
    linear = nn.Linear(width, features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias)
    return linear


def _widened(tensor: Tensor) -> Tensor:
    """In float32 where it is narrower, for sums and squares leave the range of float16 early."""
    return tensor.float() if tensor.dtype.itemsize < torch.float32.itemsize else tensor


def _weighted_sum(hidden: Tensor, weight: Tensor, divide: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum over positions of hidden · weight, (batch, sequence), over what `divide` makes of Σw."""
    wide = _widened(hidden)
    weight = weight[..., None].to(wide.dtype)
    total = weight.sum(1).clamp(min=1)
    return ((wide * weight).sum(1) / divide(total)).to(hidden.dtype)


def _itself(total: Tensor) -> Tensor:
    return total


def _mean(hidden: Tensor, real: Tensor) -> Tensor:
    return _weighted_sum(hidden, real, _itself)


def _mean_by_root(hidden: Tensor, real: Tensor) -> Tensor:
    return _weighted_sum(hidden, real, torch.sqrt)


def _mean_by_position(hidden: Tensor, real: Tensor) -> Tensor:
    """Later tokens count more: the first real one once, the second twice, and so on."""
    count = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
    return _weighted_sum(hidden, real * (count - _first_index(real)[:, None]), _itself)


def _largest(hidden: Tensor, real: Tensor) -> Tensor:
    return hidden.masked_fill(~real[..., None], torch.finfo(hidden.dtype).min).amax(1)


def _first(hidden: Tensor, real: Tensor) -> Tensor:
    return _at(hidden, _first_index(real))


def _last(hidden: Tensor, real: Tensor) -> Tensor:
    return _at(hidden, hidden.shape[1] - 1 - _first_index(real.flip(1)))


def _first_index(real: Tensor) -> Tensor:
    # ONNX Runtime has no ArgMax of booleans or of int64.
    return real.int().argmax(1)


def _at(hidden: Tensor, index: Tensor) -> Tensor:
    """The state at one position of each text."""
    place = index[:, None, None].expand(-1, 1, hidden.shape[-1])
    return hidden.gather(1, place).squeeze(1)


_POOLS: dict[PoolingMode, _Pool] = {
    "mean": _mean,
    "cls": _first,
    "max": _largest,
    "mean_sqrt_len_tokens": _mean_by_root,
    "weightedmean": _mean_by_position,
    "lasttoken": _last,
}
