"""How much memory a recovery needs, from the headers of a checkpoint alone, and what is there.

What is counted is certain: the values of both models, the gradients, the state of the optimiser,
the masks, and the copies to go back to. Activations come on top; they depend on tokens at once.
"""

from dataclasses import dataclass
from math import prod

import torch
from safetensors import safe_open

from prox24_deploy.config.options import RecoverOptions
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.host import GIB, gib_of
from prox24_deploy.core.types import RecoverOptimizer
from prox24_deploy.model.config_file import whole_number
from prox24_deploy.model.directory import ModelDir
from prox24_deploy.model.dtypes import settled_dtype
from prox24_deploy.model.offload import free_on
from prox24_deploy.recovery.optimizer import state_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Values of a checkpoint: of all, and of matrices and vectors that are trained."""

    all: int
    matrices: int
    vectors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes that a recovery needs where it runs, activations excluded."""

    models: int
    gradients: int
    optimizer: int
    masks: int
    copies: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.models + self.gradients + self.optimizer + self.masks + self.copies

    def __str__(self) -> str:
        return gib_of(
            {
                "both models": self.models,
                "gradients": self.gradients,
                "optimiser": self.optimizer,
                "masks": self.masks,
                "copies": self.copies,
            }
        )


def sizes_of(directory: ModelDir, *, embeddings: bool) -> Sizes:
    """Count values by the shapes in the headers.

    A matrix with a row for each token is an embedding; every other one counts as trained, which is
    a little too much where a layer stays dense.
    """
    vocabulary = whole_number(directory.config, "vocab_size", 0)
    whole = matrices = vectors = 0
    for shard in directory.shards:
        with safe_open(shard, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                shape = handle.get_slice(name).get_shape()
                whole += prod(shape)
                if len(shape) < 2:
                    vectors += prod(shape)
                elif embeddings or shape[0] != vocabulary:
                    matrices += prod(shape)
    return Sizes(all=whole, matrices=matrices, vectors=vectors)


def need_of(
    sizes: Sizes, optimizer: RecoverOptimizer, *, teacher_bytes: int, stored_bytes: int, host: bool
) -> Need:
    """Bytes of a recovery.

    Args:
        sizes: of the model.
        optimizer: its kind.
        teacher_bytes: of one value of the dense model, 4 for float32.
        stored_bytes: of one value as the checkpoint stores it.
        host: whether it runs on the CPU, in whose memory the copies are.
    """
    trained = sizes.matrices + sizes.vectors
    return Need(
        models=(4 + teacher_bytes) * sizes.all,
        gradients=4 * trained,
        optimizer=state_bytes(optimizer, sizes.matrices, sizes.vectors),
        masks=sizes.matrices,
        # The first and the best weights as they are stored, and those of now.
        copies=(2 * stored_bytes + 4) * trained if host else 0,
    )


def require_memory(
    directory: ModelDir,
    recipe: Recipe,
    options: RecoverOptions,
    device: torch.device,
    limit: int | None = None,
) -> Need:
    """Refuse a recovery for which the memory of a device, or `limit` bytes of it, do not do.

    Each process on a GPU has one of its own; those on a CPU share its memory.

    Raises:
        UsageError: says what is needed, what is free, and which option needs less.
    """
    needs, host = needs_of(directory, recipe, options, device.type), device.type != "cuda"
    found, free = needs[options.optimizer], free_on(device, limit)
    times = options.processes if host else 1
    if times * found.total <= free:
        return found
    where = "this machine" if host else "the GPU"
    raise UsageError(
        f"Recovery of {directory.path} needs {found} before activations"
        f"{f' in each of {times} processes' if times > 1 else ''}, and {where} has "
        f"{free / GIB:.3g} GiB {'free' if limit is None else 'allowed by --memory-limit'}; "
        f"{_remedy(options, times, needs, free)}."
    )


def needs_of(
    directory: ModelDir, recipe: Recipe, options: RecoverOptions, device: str
) -> dict[RecoverOptimizer, Need]:
    """Bytes of a recovery on a kind of device, by each optimiser."""
    sizes = sizes_of(directory, embeddings=options.embeddings)
    stored = max((t.dtype.itemsize for t in directory.tensors.values()), default=4)
    host = device != "cuda"
    teacher = 4
    if not host and recipe.kind.writes_text:
        teacher = getattr(torch, settled_dtype(directory, recipe, None)).itemsize
    return {
        name: need_of(sizes, name, teacher_bytes=teacher, stored_bytes=stored, host=host)
        for name in _KINDS
    }


def estimated(directory: ModelDir, recipe: Recipe, options: RecoverOptions, device: str) -> int:
    """Bytes of a recovery with the optimiser that was asked for."""
    return needs_of(directory, recipe, options, device)[options.optimizer].total


_KINDS: tuple[RecoverOptimizer, ...] = ("adamw", "adafactor")


def _remedy(
    options: RecoverOptions, times: int, needs: dict[RecoverOptimizer, Need], free: int
) -> str:
    lean = needs["adafactor"].total
    if options.optimizer != "adafactor" and times * lean <= free:
        return f"pass --recover-optimizer adafactor, which needs {lean / GIB:.3g} GiB"
    if times > 1 and lean <= free:
        return "pass a smaller --recover-processes"
    return "use a device with more memory, or leave recovery out"
