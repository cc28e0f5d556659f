"""The record of a rotation."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RotateResult:
    """What rotating a model gave.

    Attributes:
        source_sha256: of the model that was rotated.
        channels: of its residual stream.
        dropped_before: mean share that 2:4 drops of what layers compute, by w² E[x²].
        dropped_after: the same in the new basis.
        difference: of the predictions in float32, the largest over the largest.
        rounded: the same as the weights are stored, read back from disk.
        agreement: share of positions whose most likely token is the same, as stored.
        gained: weights that the model has more, of an output layer that it shared.
        tokens: of the text that it was searched on.
        turns: steps of the search.
        device: of the search.
        seconds: of it all.
    """

    source_sha256: str
    channels: int
    dropped_before: float
    dropped_after: float
    difference: float
    rounded: float
    agreement: float
    gained: int
    tokens: int
    turns: int
    device: str
    seconds: float
