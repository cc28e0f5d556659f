"""What all variants of pruning share: a dense model, its texts, and how it is pruned."""

import tempfile
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from prox24_deploy.config.options import PruneOptions
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.types import silent
from prox24_deploy.data.text import thin
from prox24_deploy.evaluation.losses import Loss
from prox24_deploy.model.batch import Batch, Samples
from prox24_deploy.model.checkpoint import BlockStore, stored_dtype
from prox24_deploy.pipeline.context import RunContext
from prox24_deploy.pruning.permutation import OrderStore, permute_channels
from prox24_deploy.pruning.prune import prune_model
from prox24_deploy.pruning.selection import left_dense, target_paths
from prox24_deploy.pruning.solvers.products import tensor_cores

Figures = dict[str, float | int | str]
# Text that tells how large inputs are.
_ORDER_TOKENS = 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """What each variant begins with.

    Attributes:
        context: model directory, recipe and texts.
        device: where it runs.
        dense: the dense model, float32; no variant changes it.
        loss: of a model against the dense one, on evaluation text.
        options: how to prune.
        lessons: text to train on.
        steps: of training.
        turns: steps of the search for rotations.
        made: models of variants that others go on from, by name.
    """

    context: RunContext
    device: torch.device
    dense: nn.Module
    loss: Loss
    options: PruneOptions
    lessons: Samples
    steps: int
    turns: int
    made: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """That of the model."""
        return self.context.recipe

    @property
    def calibration(self) -> tuple[Batch, ...]:
        """Batches to prune on."""
        return self.context.calibration.batches

    @property
    def targets(self) -> list[str]:
        """Paths of the layers to prune."""
        left = left_dense(self.recipe, self.dense, self.options)
        return [path for path in target_paths(self.recipe, self.dense) if path not in left]

    def prune(
        self, model: nn.Module | None = None, dense: Mapping[str, str] = MappingProxyType({})
    ) -> nn.Module:
        """A pruned copy of the dense model, or of another that computes the same.

        Nothing is written but to a temporary folder, and nothing has to be 2:4 in the end.

        Args:
            model: what to prune; it stays as it is.
            dense: paths of layers to leave dense, with the reason.
        """
        copy = deepcopy(self.dense if model is None else model)
        with tempfile.TemporaryDirectory() as folder, tensor_cores(self.device):
            prune_model(
                copy,
                self.recipe,
                self.calibration,
                (),
                self.options,
                stored_dtype=lambda name: stored_dtype(self.context.source, name),
                store=BlockStore(Path(folder)),
                progress=silent,
                dense={**left_dense(self.recipe, copy, self.options), **dense},
            )
        return copy

    @property
    def pruned(self) -> nn.Module:
        """The model as the default prunes it, once."""
        if "default" not in self.made:
            self.made["default"] = self.prune()
        return self.made["default"]

    @torch.no_grad()
    def losses(self, model: nn.Module) -> Tensor:
        """Loss of a model on each evaluation sample, on the CPU."""
        return self.loss.of(model).cpu()


def order_channels(lab: Lab, model: nn.Module) -> None:
    """Put the channels within blocks into a better order, in place, as the tool does."""
    with tempfile.TemporaryDirectory() as folder:
        permute_channels(
            model,
            lab.recipe,
            thin(lab.context.calibration, _ORDER_TOKENS),
            left_dense(lab.recipe, model, lab.options),
            has_tensor=lambda _: True,
            store=OrderStore(Path(folder), lambda: None),
            progress=silent,
        )
