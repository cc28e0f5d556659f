"""Weights that lie in files mapped into memory: what they take there, the kernel can take back.

A model whose weights do so is a model like any other, and computes the same bits. A file is
deleted once it is mapped, so that it goes with the tensor, or with the process.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkstemp

import torch
from torch import Tensor, nn

from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.atomic import make_folder, writing
from prox24_deploy.model.batch import Batch
from prox24_deploy.model.directory import ModelDir, load_model, load_with_rest, structure_of
from prox24_deploy.model.offload import fits, keep_by

_CPU = torch.device("cpu")
# Smaller tensors stay in memory: a file takes whole pages.
_LEAST_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class MappedFiles:
    """Room for tensors on disk, in a folder that is there."""

    folder: Path

    def keep(self, tensor: Tensor) -> Tensor:
        """The same values, shape and dtype on the CPU, in a file of its own.

        What is written to the result goes to that file, never to what was given. Small tensors are
        given back as they are.

        Raises:
            OSError: there is no room on the disk.
        """
        size = tensor.numel() * tensor.element_size()
        if size < _LEAST_BYTES:
            return tensor
        number, name = mkstemp(dir=self.folder, suffix=".tensor")
        path = Path(name)
        try:
            with writing(path):
                # A page that the disk has no room for would end the process when it is written.
                os.posix_fallocate(number, 0, size)
            kept = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        finally:
            os.close(number)
            path.unlink()
        return kept.view(tensor.shape).copy_(tensor.detach())


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a stage may take to hold models, and where it keeps what does not fit.

    Attributes:
        folder: on a disk; made when it is needed.
        limit: bytes that may be taken where models run; None for all that are free.
        models: that would be held at once in float32, those that are not PyTorch's too.
        samples: batches, of which each model has one at a time.
    """

    folder: Path
    limit: int | None
    models: float
    samples: Sequence[Batch] = ()
    # By directory; to build one takes longer than to look at it.
    _structures: dict[Path, nn.Module] = field(default_factory=dict, compare=False, repr=False)

    def suffices(self, directory: ModelDir, recipe: Recipe, device: torch.device) -> bool:
        """Whether models of a directory fit into memory as a whole."""
        structure = self._structure(directory, recipe)
        return fits(structure, self.models, device, self.limit, samples=self.samples)

    def load(
        self, directory: ModelDir, recipe: Recipe, device: torch.device, *, changes: bool = False
    ) -> nn.Module:
        """As `load_model`, but where too little memory is there: in files, or block by block.

        On a CPU the weights are then in mapped files; elsewhere blocks are read each time that they
        run, unless the model `changes`, which needs it whole.
        """
        if self.suffices(directory, recipe, device):
            return load_model(directory, recipe, device)
        if device.type == "cpu":
            structure = self._structure(directory, recipe)
            return load_mapped(directory, recipe, self.folder, structure=structure)
        make_folder(self.folder)
        return load_model(directory, recipe, device, offload=None if changes else self.folder)

    def keep(self, directory: ModelDir, recipe: Recipe) -> Callable[[Tensor], Tensor] | None:
        """Where to have what is made of the weights on the CPU; None for memory."""
        if self.suffices(directory, recipe, _CPU):
            return None
        make_folder(self.folder)
        return MappedFiles(self.folder).keep

    def _structure(self, directory: ModelDir, recipe: Recipe) -> nn.Module:
        if directory.path not in self._structures:
            self._structures[directory.path] = structure_of(directory, recipe)
        return self._structures[directory.path]


def load_mapped(
    directory: ModelDir, recipe: Recipe, folder: Path, *, structure: nn.Module | None = None
) -> nn.Module:
    """As `load_model` on the CPU, with its weights in files in `folder`, made if it is not there.

    No more than a block is in other memory on the way, and what lies outside of the blocks. A
    `structure_of` the model that is there already is not built again.

    Raises:
        ModelDirError: what `load_model` raises.
        OSError: there is no room on the disk.
    """
    make_folder(folder)
    model, _ = load_with_rest(directory, recipe, _CPU, offload=folder, structure=structure)
    map_weights(model, folder)
    return model


def map_weights(model: nn.Module, folder: Path) -> None:
    """Put the weights of a model on the CPU whose blocks are in its checkpoint into mapped files.

    It is then a whole one, which may change.

    Raises:
        OSError: there is no room on the disk.
    """
    files = MappedFiles(folder)
    keep_by(model, lambda _, tensor: files.keep(tensor))
