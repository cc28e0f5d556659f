"""Records of quantisation: what was done to each layer, and what it costs.

Like those of `records`, they are handed from stage to stage as JSON.
"""

from dataclasses import dataclass
from typing import Literal

from prox24_deploy.core.records import TextSource
from prox24_deploy.core.types import QuantizedFormat

# How a weight came to its numbers: to the nearest, or with the errors of earlier columns going into
# later ones, from the weight as it was or from one fitted anew to what the layer then reads.
Rounding = Literal["nearest", "corrected", "refitted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerQuantization:
    """What quantisation made of one layer, and on withheld calibration samples what that costs.

    Attributes:
        name: module path.
        shape: of its matrix, (out_features, in_features).
        reason: why it stays in 16 bits; "" where it is quantised.
        largest: magnitude of its inputs on calibration samples.
        limit: magnitude from which inputs are clipped.
        chosen_by: how the limit was found, such as "maximum" or "99.99 percentile".
        clipped: share of the inputs that are.
        moved_into: the parameter that took up the scales of the input channels, "" for none.
        rounding: of the weight.
        error: ‖Y - Y'‖² / ‖Y‖², Y the output of the layer in the model as it was and Y' in the
            quantised one, bias excluded; None for a layer that was not tried.
        nearest_error: the same with the weight rounded to the nearest numbers.
        output_limit: magnitude from which its outputs are clipped, 0 where they are not rounded.
        output_chosen_by: how that limit was found.
        output_reason: why outputs are not rounded for their own sake; "" where they are, and for a
            layer that stays in 16 bits.
    """

    name: str
    shape: tuple[int, int]
    reason: str = ""
    largest: float = 0.0
    limit: float = 0.0
    chosen_by: str = ""
    clipped: float = 0.0
    moved_into: str = ""
    rounding: Rounding = "nearest"
    error: float | None = None
    nearest_error: float | None = None
    output_limit: float = 0.0
    output_chosen_by: str = ""
    output_reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StraightThrough:
    """How numbers were trained through the rounding, against the dense model.

    `loss` names what was minimised; `before` and `after` are that on withheld samples, of the
    numbers as they were rounded and of those that are kept, by the step `kept` of `taken`; 0 is the
    first. `warning` says why these had to be kept.
    """

    loss: str
    steps: int
    taken: int
    kept: int
    before: float | None
    after: float | None
    warning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeResult:
    """Result of the stage that quantises.

    `calibration` says what ranges were found on, `withheld` how many of its samples they were
    chosen by; `state_sha256` hashes the tensors. `training` is there where the numbers were trained
    after they were rounded; the errors of layers are those before.
    """

    format: QuantizedFormat
    layers: tuple[LayerQuantization, ...]
    calibration: TextSource
    withheld: int
    state_sha256: str
    seconds: float
    training: StraightThrough | None = None
