"""What layers read on calibration samples: a sample of rows, and figures over all of them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.pruning.activations import Activations, BlockPair, input_pairs

# Rows by which ranges are found and chosen; the figures are over all.
_MOST_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What some layers read, in the model as it was and in the one that is being quantised.

    Attributes:
        before: rows of a sample, (tokens, d), of the model as it was.
        now: the same tokens in the model as it is.
        channels: (d,), the largest magnitude of each channel over all tokens, now.
        mean_squares: (d,), over all tokens, now.
    """

    before: Tensor
    now: Tensor
    channels: Tensor
    mean_squares: Tensor

    @property
    def largest(self) -> float:
        """Magnitude over everything."""
        return float(self.channels.amax())

    def divided(self, factors: Tensor) -> "Inputs":
        """The same once channels are smaller by these factors, (d,), now."""
        return replace(
            self,
            now=self.now / factors,
            channels=self.channels / factors,
            mean_squares=self.mean_squares / factors.square(),
        )


def read_inputs(twin: BlockPair, name: str, activations: Activations) -> Inputs:
    """Go through all batches once; the sample takes as many rows of each.

    Raises:
        ModelDirError: they are NaN or infinite.
    """
    share = -(-_MOST_ROWS // len(activations.batches))
    before, now, largest, squares = [], [], [], []
    tokens = 0
    for dense, pruned in input_pairs(twin, name, activations):
        step = max(1, -(-len(pruned) // share))
        before.append(dense[::step].float())
        now.append(pruned[::step].float())
        largest.append(pruned.abs().amax(0).float())
        squares.append(pruned.double().square().sum(0))
        tokens += len(pruned)
    channels = torch.stack(largest).amax(0)
    if not bool(torch.isfinite(channels).all()):
        raise ModelDirError(
            f"Layer {twin.prefix}.{name} reads NaN or infinity on calibration samples, which have "
            "no range; its activations overflow or the checkpoint is damaged."
        )
    return Inputs(
        before=torch.cat(before),
        now=torch.cat(now),
        channels=channels,
        mean_squares=(torch.stack(squares).sum(0) / tokens).float(),
    )
