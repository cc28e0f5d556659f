"""Recipes, token batches and loaded models that the tests of this room share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_models import SPECIAL, VOCABULARY
from torch import Tensor, nn

from prox24_deploy.config.recipe import Recipe, read_recipe
from prox24_deploy.core.snapshot import Snapshot
from prox24_deploy.model.batch import Batch
from prox24_deploy.model.directory import load_model, open_model_dir

_RECIPES = Path(__file__).parents[1] / "export"
BERT = read_recipe(_RECIPES / "bert.toml")
LLAMA = read_recipe(_RECIPES / "llama.toml")
RECIPES = {"bert": BERT, "llama": LLAMA}
CPU = torch.device("cpu")
# Of a model directory that exists only as a list of tensors.
NO_FILES = Snapshot(root=Path("x"), listing=lambda _: (), files={})
PADDING = SPECIAL.index("[PAD]")

BERT_TARGETS = (
    "attention.self.query", "attention.self.key", "attention.self.value",
    "attention.output.dense", "intermediate.dense", "output.dense",
)  # fmt: skip
LLAMA_TARGETS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


class Scaled(nn.Module):
    """A block that returns a tuple and has a layer that no forward pass reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.unused = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, hidden_states: Tensor, scale: float) -> tuple[Tensor, None]:
        # Both inputs are temporaries: once freed, the second may take the address of the first.
        return scale * self.one(hidden_states + 1) + self.two(hidden_states + 2), None


class Nest(nn.Module):
    """A model that calls its blocks with keywords only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 4)
        self.layers = nn.ModuleList([Scaled(), Scaled()])
        self.reached_the_end = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for i, layer in enumerate(self.layers):
            hidden = layer(hidden_states=hidden, scale=float(i + 2))[0]
        self.reached_the_end += 1
        return torch.as_tensor(hidden)


NEST = LLAMA.model_copy(
    update={"task": "feature-extraction", "blocks": "layers", "targets": ["one", "two"]}
)


def load(path: Path, recipe: Recipe) -> nn.Module:
    return load_model(open_model_dir(path), recipe, CPU)


def token_rows(lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Random rows of ordinary tokens, no special one among them."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(len(SPECIAL), VOCABULARY, (length,), generator=generator).tolist()
        for length in lengths
    ]


def padded_batch(recipe: Recipe, rows: Sequence[list[int]], extra: int = 0) -> Batch:
    """One batch of the rows, padded on the right to the longest row and `extra` columns more."""
    width = max(len(row) for row in rows) + extra
    ids = torch.tensor([row + [PADDING] * (width - len(row)) for row in rows])
    real = torch.tensor([[i < len(row) for i in range(width)] for row in rows])
    known = {
        "input_ids": ids,
        "attention_mask": real.long(),
        "token_type_ids": torch.zeros_like(ids),
    }
    return Batch({spec.name: known[spec.name] for spec in recipe.inputs}, real)


def random_batch(recipe: Recipe, lengths: Sequence[int], seed: int = 0, extra: int = 0) -> Batch:
    return padded_batch(recipe, token_rows(lengths, seed), extra)


def silent(label: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


def linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def hooks(model: nn.Module) -> int:
    """How many forward hooks of any kind are registered on a model."""
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def inputs_of(model: nn.Module, names: Sequence[str], batch: Batch) -> dict[str, Tensor]:
    """The input of each named layer in one ordinary forward pass of the whole model."""
    seen: dict[str, Tensor] = {}

    def recorder(name: str) -> Any:
        def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0].detach().clone()

        return record

    handles = [
        model.get_submodule(name).register_forward_pre_hook(recorder(name)) for name in names
    ]
    with torch.no_grad():
        model(**batch.inputs)
    for handle in handles:
        handle.remove()
    return seen
