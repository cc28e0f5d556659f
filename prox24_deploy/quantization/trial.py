"""Outputs of some layers on withheld samples, and how far quantised candidates are from them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from prox24_deploy.quantization.formats import NumberFormat
from prox24_deploy.quantization.inputs import Inputs
from prox24_deploy.quantization.ranges import InputRange, input_ranges
from prox24_deploy.quantization.rounding import weight_scales


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A weight (n, k) as numbers, with a scale for each row, (n,)."""

    numbers: Tensor
    scales: Tensor

    def values(self, form: NumberFormat) -> Tensor:
        """What the numbers stand for."""
        return form.values(self.numbers, self.scales[:, None])


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Some layers that share an input, stacked.

    Attributes:
        weight: (n, k) float32, the rows of all layers.
        expected: (tokens, n), what they gave in the model as it was, bias excluded.
        seen: what they read on samples to calibrate on.
        withheld: what they read on samples to choose by.
        rows: of each layer.
        form: to round to.
    """

    weight: Tensor
    expected: Tensor
    seen: Inputs
    withheld: Inputs
    rows: tuple[int, ...]
    form: NumberFormat

    def divided(self, factors: Tensor) -> "Trial":
        """The same with factors of input channels, (k,), moved into the weight."""
        return replace(
            self,
            weight=self.weight * factors,
            seen=self.seen.divided(factors),
            withheld=self.withheld.divided(factors),
        )

    def rounded(self, rows: Tensor, scale: float) -> Tensor:
        """Inputs as the layers will see them."""
        return self.form.values(self.form.numbers(rows, scale), scale)

    def errors(self, weight: Tensor, scale: float | None) -> list[float]:
        """Relative squared error of each layer; inputs as they are where there is no scale."""
        given = self.withheld.now
        found = (given if scale is None else self.rounded(given, scale)) @ weight.T
        wrong = self.split((found - self.expected).square().double().sum(0))
        whole = self.split(self.expected.square().double().sum(0))
        sums = [(float(w.sum()), float(v.sum())) for w, v in zip(wrong, whole, strict=True)]
        return [error / size if size else 0.0 for error, size in sums]

    def nearest(self) -> Candidate:
        """The weight rounded to the nearest numbers."""
        scales = weight_scales(self.weight, self.seen.mean_squares, self.form)
        return Candidate(numbers=self.form.weight_numbers(self.weight, scales), scales=scales)

    def best_range(self) -> tuple[InputRange, float]:
        """The range by which the nearest weights do best, and their errors, summed."""
        weight = self.nearest().values(self.form)
        ranges = input_ranges(self.seen.now, self.seen.largest, self.form)
        errors = [sum(self.errors(weight, each.scale)) for each in ranges]
        best = min(range(len(ranges)), key=errors.__getitem__)
        return ranges[best], errors[best]

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """The part of each layer, by rows."""
        parts: tuple[Tensor, ...] = tensor.split(list(self.rows))
        return parts
