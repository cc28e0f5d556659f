from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from graph_models import MASKED_RECIPE, TOY_RECIPE, Array, Masked, Toy, toy_recipe
from onnx import numpy_helper
from torch import nn

from prox24_deploy.core.errors import ExportError
from prox24_deploy.core.records import NumericsCheck
from prox24_deploy.core.types import DType
from prox24_deploy.graph.export.export import export_onnx
from prox24_deploy.graph.parity import numerics
from prox24_deploy.graph.parity.numerics import compare_with_torch


def compare(
    model: nn.Module, path: Path, recipe: str = TOY_RECIPE, dtype: DType = "float32", seed: int = 0
) -> tuple[NumericsCheck, ...]:
    return compare_with_torch(
        model, path, toy_recipe(recipe), dtype=dtype, twin="dense", vocabulary=16, seed=seed
    )


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "onnx"
    return export_onnx(Toy(), toy_recipe(), out, dtype="float32")


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("masked") / "onnx"
    return export_onnx(Masked(), toy_recipe(MASKED_RECIPE), out, dtype="float32")


def test_same_computation_passes_at_every_shape(toy: Path) -> None:
    (check,) = compare(Toy(), toy)
    assert (check.twin, check.output, check.passed) == ("dense", "last_hidden_state", True)
    assert check.shapes == ((1, 4), (2, 4), (3, 4))
    assert check.max_abs_difference <= check.tolerance


def test_seed_decides_the_inputs(toy: Path) -> None:
    assert compare(Toy(), toy) == compare(Toy(), toy)
    assert compare(Toy(), toy)[0].tolerance != compare(Toy(), toy, seed=1)[0].tolerance


def test_float16_reference_has_the_weights_rounded(tmp_path: Path) -> None:
    model = Toy()
    model.first.weight.data[1] = model.first.weight.data[0]
    model.second.weight.data.zero_()
    model.second.bias.data.zero_()
    # Rounded to float16 both are 1 in magnitude and cancel; unrounded they leave 0.0004 * hidden.
    model.second.weight.data[:, 0], model.second.weight.data[:, 1] = 1.0004, -1.0
    path = export_onnx(model, toy_recipe(), tmp_path / "onnx", dtype="float16")
    (check,) = compare(model, path, dtype="float16")
    assert (check.max_abs_difference, check.tolerance) == (0.0, 0.0)


def test_float16_rounding_of_activations_is_tolerated(tmp_path: Path) -> None:
    path = export_onnx(Toy(), toy_recipe(), tmp_path / "onnx", dtype="float16")
    (check,) = compare(Toy(), path, dtype="float16")
    assert 0 < check.max_abs_difference <= check.tolerance


def test_bfloat16_is_not_compared(toy: Path) -> None:
    assert compare(Toy(), toy, dtype="bfloat16") == ()


def test_different_weight_fails_with_output_shape_difference_and_tolerance(toy: Path) -> None:
    other = Toy()
    other.second.bias.data[2] += 0.5
    message = (
        r"Output 'last_hidden_state' of .*model\.onnx at shape \(\d, 4\) differs from PyTorch by "
        r"0\.5, more than the tolerance 0\.\d+ \(0\.0001 of its largest magnitude\)"
    )
    with pytest.raises(ExportError, match=message):
        compare(other, toy)


def test_float32_may_be_as_far_off_as_its_own_rounding_takes_it(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here by a limit that no rounding holds, as in a deep model the rounding holds no limit."""
    monkeypatch.setitem(numerics._RELATIVE, "float32", 1e-9)
    (check,) = compare(Deep(), exported_deep(toy.parent / "deep"))
    assert 0 < check.max_abs_difference <= check.tolerance
    other = Deep()
    other.second.bias.data[2] += 1e-3
    with pytest.raises(ExportError, match="differs from PyTorch"):
        compare(other, toy.parent / "deep" / "model.onnx")
    monkeypatch.setattr(numerics, "_MOST_NOISE", 0.0)
    with pytest.raises(ExportError, match=r"\(1e-09 of its largest magnitude\)"):
        compare(Deep(), toy.parent / "deep" / "model.onnx")


class Deep(Toy):
    """Sums of large numbers that cancel, in another order in each program."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.second.weight[:, ::2] += 100.0
            self.second.weight[:, 1::2] -= 100.0


def exported_deep(out: Path) -> Path:
    return export_onnx(Deep(), toy_recipe(), out, dtype="float32")


def test_difference_at_masked_positions_is_not_compared(masked: Path) -> None:
    (check,) = compare(Masked(at_masked=100.0), masked, MASKED_RECIPE)
    assert check.passed
    assert check.shapes == ((1, 8, 8), (2, 17, 8), (3, 5, 8))
    # 1e-4 of a magnitude below 50: masked values do not widen the tolerance either.
    assert check.tolerance < 5e-3


def test_some_positions_are_masked_and_others_are_not(masked: Path) -> None:
    unmasked = MASKED_RECIPE.replace('axes = ["batch", "sequence", "hidden"]', 'axes = ["b", 1, 2]')
    with pytest.raises(
        ExportError, match=r"at shape \(\d, \d+, 8\) differs from PyTorch by 1\d\d,"
    ):
        compare(Masked(at_masked=100.0), masked, unmasked)


def test_nan_in_the_file_fails(toy: Path, tmp_path: Path) -> None:
    model = onnx.load(toy)
    bias = next(each for each in model.graph.initializer if each.name == "second.bias")
    values: Array = numpy_helper.to_array(bias).copy()
    values[0] = float("nan")
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="differs from PyTorch by nan, more than"):
        compare(Toy(), tmp_path / "model.onnx")


def test_output_of_another_shape_fails(toy: Path) -> None:
    wide = Toy()
    wide.second = nn.Linear(16, 5)
    message = r"'last_hidden_state' .* has shape \(1, 4\) where PyTorch gives \(1, 5\); correct"
    with pytest.raises(ExportError, match=message):
        compare(wide, toy)


def test_file_that_does_not_load_fails(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"nothing")
    with pytest.raises(ExportError, match=r"ONNX Runtime cannot load .*model\.onnx \(.+\); export"):
        compare(Toy(), path)


def test_session_on_another_provider_is_refused(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort.InferenceSession, "get_providers", lambda self: ["OtherProvider"])
    with pytest.raises(ExportError, match=r"on \['OtherProvider'\], expected CPUExecutionProvider"):
        compare(Toy(), toy)


def test_model_is_not_changed(toy: Path) -> None:
    model = Toy()
    compare(model, toy, dtype="float32")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), Toy().parameters(), strict=True)
    )
