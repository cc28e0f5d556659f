"""Candidates for the range of inputs."""

import pytest
import torch

from prox24_deploy.core.types import QuantizedFormat
from prox24_deploy.quantization.formats import FORMATS
from prox24_deploy.quantization.ranges import input_ranges, scale_for


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_candidates_are_narrower_one_after_the_other_and_the_first_clips_nothing(
    name: QuantizedFormat,
) -> None:
    rows = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    rows[3, 5] = 40
    found = input_ranges(rows, 40.0, FORMATS[name])
    scales = [each.scale for each in found]
    assert found[0].chosen_by == "maximum"
    assert scales == sorted(set(scales), reverse=True)
    assert all(torch.tensor(s).half().float() == s for s in scales)
    assert scales[0] * FORMATS[name].largest == pytest.approx(40, rel=4e-3)


def test_the_least_squared_error_clips_a_lone_outlier_in_int8() -> None:
    rows = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    rows[3, 5] = 400
    found = {each.chosen_by: each.scale for each in input_ranges(rows, 400.0, FORMATS["int8"])}
    # Against numbers spaced 400/127, one clipped value weighs little among a quarter million.
    assert found["least squared error"] < found["maximum"] / 2


def test_a_scale_too_small_for_half_precision_is_its_smallest_number() -> None:
    assert scale_for(1e-20, FORMATS["fp8"]) == 2**-24
