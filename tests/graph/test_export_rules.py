"""What export refuses, replaces and leaves behind, on a model of two layers."""

import errno
import hashlib
import logging
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
from graph_models import TOY_RECIPE, Toy, pruned, toy_recipe
from torch import nn

from prox24_deploy.core.errors import BundleError, ExportError, SparsityLostError
from prox24_deploy.graph.check.check import check_onnx, check_path, require_24
from prox24_deploy.graph.export.export import export_onnx, hash_onnx
from prox24_deploy.graph.export.module import copy_with, rounded_to, to_dtype


class Branching(Toy):
    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return super().forward(x + 1 if x.sum().item() > 0 else x)


class FixedBatch(Toy):
    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return super().forward(x.reshape(2, 8))


class Twice(nn.Module):
    """`first` is applied twice and `second` holds the same values."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 4, bias=False)
        self.second.weight.data = self.first.weight.data.clone()
        self.eval()

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        hidden = self.second(self.first(self.first(x).relu()).relu())
        return SimpleNamespace(last_hidden_state=self.head(hidden.relu()))


class Tables(nn.Module):
    """Tied parameters, an integer parameter, and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.index = nn.Parameter(torch.arange(4), requires_grad=False)
        self.stored: torch.Tensor
        self.table: torch.Tensor
        self.register_buffer("stored", torch.ones(4))
        self.register_buffer("table", torch.full((4,), 0.1), persistent=False)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "onnx"
    return export_onnx(pruned(Toy()), toy_recipe(), out, dtype="float32", sparse=["second"])


def test_weights_that_are_not_transposed_keep_their_names(toy: Path) -> None:
    found = {check.tensor: (check.op_type, check.axis) for check in check_onnx(toy)}
    assert found == {"first.weight": ("Gemm", 1), "second.weight": ("Gemm", 1)}


def test_only_the_modules_asked_for_are_declared(toy: Path) -> None:
    model = onnx.load(toy)
    declared = {entry.key: entry.value for entry in model.metadata_props}
    assert declared == {"prox24.sparse_weights": '["second"]'}
    assert [check.expected for check in check_path(toy).tensors] == [False, True]


def test_hash_covers_graph_and_data(toy: Path) -> None:
    data = toy.read_bytes() + (toy.parent / "model.onnx.data").read_bytes()
    assert hash_onnx(toy) == (hashlib.sha256(data).hexdigest(), len(data))


def test_model_too_small_for_external_data_is_hashed_by_its_graph_alone(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"graph")
    assert hash_onnx(tmp_path / "model.onnx") == (hashlib.sha256(b"graph").hexdigest(), 5)


def test_dense_export_declares_nothing(tmp_path: Path) -> None:
    path = export_onnx(Toy(), toy_recipe(), tmp_path / "onnx", dtype="float32")
    assert not onnx.load(path).metadata_props
    report = check_path(path)
    assert (report.declared, len(report.violations)) == (False, 2)


def test_lost_pattern_fails_the_export_and_publishes_nothing(tmp_path: Path) -> None:
    model = pruned(Toy())
    model.get_submodule("second").get_parameter("weight").data[1, 4:8] = 1.0
    message = (
        r"onnx/model\.onnx, tensor 'second\.weight' of module 'second' is not 2:4 along axis 1: "
        r"4 non-zeros in group \[1, 4:8\] \(1 of 16 groups is not 2:4\); write the file again"
    )
    with pytest.raises(SparsityLostError, match=message):
        export_onnx(
            model, toy_recipe(), tmp_path / "onnx", dtype="float32", sparse=["first", "second"]
        )
    assert not list(tmp_path.iterdir())


def test_equal_weights_share_a_tensor_and_each_module_counts_as_found(tmp_path: Path) -> None:
    model = pruned(Twice())
    path = export_onnx(
        model, toy_recipe(), tmp_path / "onnx", dtype="float32", sparse=["first", "second", "head"]
    )
    report = check_path(path)
    require_24(report)
    assert [check.module for check in report.tensors if check.expected] == ["first", "head"]


def test_bfloat16_keeps_every_zero(tmp_path: Path) -> None:
    path = export_onnx(
        pruned(Toy()),
        toy_recipe(),
        tmp_path / "onnx",
        dtype="bfloat16",
        sparse=["first", "second"],
    )
    assert {(c.dtype, c.density) for c in check_path(path).tensors} == {("bfloat16", 0.5)}


def test_overflow_in_float16_names_the_weight(tmp_path: Path) -> None:
    model = Toy()
    model.first.weight.data[3, 1] = -7e4
    message = r"Weight first\.weight does not fit float16: its largest magnitude is 70000, the lim"
    with pytest.raises(ExportError, match=message):
        export_onnx(model, toy_recipe(), tmp_path / "onnx", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_unknown_sparse_module_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"has no module 'third', whose weight should be 2:4"):
        export_onnx(Toy(), toy_recipe(), tmp_path / "o", dtype="float32", sparse=["third"])


@pytest.mark.parametrize(
    ("model", "recipe", "message"),
    [
        (Branching(), TOY_RECIPE, r"failed for family 'toy' at opset 20 \(Guard\w+: Could not gu"),
        (
            Toy(),
            TOY_RECIPE.replace('"x"', '"y"'),
            r"\(TypeError: .*forward\(\) got an unexpected keyword argument 'y'\); check the inp",
        ),
        (
            Toy(),
            TOY_RECIPE.replace("last_hidden_state", "logits"),
            r"^The model has no output tensor 'logits' \(SimpleNamespace\); correct the outputs",
        ),
        (
            FixedBatch(),
            TOY_RECIPE,
            r"has 'x' with axes \[2, 8\] where the recipe says 'x' with axes \['batch', 8\]",
        ),
        (
            Toy(),
            TOY_RECIPE.replace('["batch", 4]', '["batch", 5]'),
            r"has 'last_hidden_state' with axes \['batch', 4\] where the recipe says",
        ),
        (
            Toy(),
            TOY_RECIPE.replace('["batch", 4]', '["batch"]'),
            r"where the recipe says 'last_hidden_state' with axes \['batch'\]; correct the recipe",
        ),
    ],
    ids=["branching", "input", "output", "fixed-batch", "width", "rank"],
)
def test_export_that_cannot_be_is_one_sentence_and_silent(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    model: nn.Module,
    recipe: str,
    message: str,
) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        export_onnx(model, toy_recipe(recipe), tmp_path / "onnx", dtype="float32")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("traced_anew")
def test_full_disk_while_tracing_stays_an_oserror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*arguments: Any, **options: Any) -> None:
        raise full

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        export_onnx(Toy(), toy_recipe(), tmp_path / "onnx", dtype="float32")
    assert caught.value is full


@pytest.mark.usefixtures("traced_anew")
def test_exporter_that_returns_nothing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *arguments, **options: None)
    with pytest.raises(ExportError, match=r"export returned nothing for family 'toy'; try "):
        export_onnx(Toy(), toy_recipe(), tmp_path / "onnx", dtype="float32")


@pytest.mark.usefixtures("traced_anew")
def test_export_is_silent_and_leaves_logging_and_warnings_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    level = logging.getLogger("torch.onnx").level
    filters = list(warnings.filters)
    export_onnx(Toy(), toy_recipe(), tmp_path / "onnx", dtype="float32")
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("torch.onnx").level == level
    assert list(warnings.filters) == filters


def test_earlier_export_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "onnx"
    first = hash_onnx(export_onnx(Toy(), toy_recipe(), out, dtype="float32"))
    second = hash_onnx(export_onnx(pruned(Toy()), toy_recipe(), out, dtype="float32"))
    assert first != second
    assert [path.name for path in out.parent.iterdir()] == ["onnx"]


def test_folder_with_anything_else_is_not_touched(tmp_path: Path) -> None:
    out = tmp_path / "onnx"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"onnx holds 'notes\.txt', which no export wrote"):
        export_onnx(Toy(), toy_recipe(), out, dtype="float32")
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(BundleError, match=r"notes\.txt holds 'notes\.txt', which no export"):
        export_onnx(Toy(), toy_recipe(), out / "notes.txt", dtype="float32")


def test_leftover_of_a_killed_export_is_cleared(tmp_path: Path) -> None:
    partial = tmp_path / ".onnx.partial"
    partial.mkdir()
    (partial / "model.onnx.data").write_bytes(b"half")
    path = export_onnx(Toy(), toy_recipe(), tmp_path / "onnx", dtype="float32")
    assert len(check_onnx(path)) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["onnx"]


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_interrupted_write_keeps_the_earlier_export_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    out = tmp_path / "onnx"
    export_onnx(Toy(), toy_recipe(), out, dtype="float32")
    before = hash_onnx(out / "model.onnx")

    def half_written(model: onnx_ir.Model, path: Path, **options: Any) -> None:
        path.write_bytes(b"half")
        assert hash_onnx(out / "model.onnx") == before
        raise failure

    monkeypatch.setattr(onnx_ir, "save", half_written)
    with pytest.raises(type(failure)) as caught:
        export_onnx(pruned(Toy()), toy_recipe(), out, dtype="float32")
    assert caught.value is failure
    assert hash_onnx(out / "model.onnx") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["onnx"]


def test_float32_copy_shares_every_tensor() -> None:
    model = Tables().train()
    copy = copy_with(model, to_dtype("float32"))
    assert not copy.training
    assert model.training
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert dict([*copy.named_parameters(), *copy.named_buffers()])[name] is tensor


def test_converted_copy_keeps_ties_integers_and_computed_tables() -> None:
    model = Tables()
    copy = copy_with(model, to_dtype("float16"))
    first, second = copy.get_submodule("first"), copy.get_submodule("second")
    assert first.get_parameter("weight") is second.get_parameter("weight")
    found = {name: each.dtype for name, each in [*copy.named_parameters(), *copy.named_buffers()]}
    assert found == {
        "first.weight": torch.float16,
        "first.bias": torch.float16,
        "second.bias": torch.float16,
        "index": torch.int64,
        "stored": torch.float16,
        "table": torch.float32,
    }
    assert model.first.weight.dtype == torch.float32


def test_rounded_copy_holds_only_what_rounding_changes() -> None:
    model = Tables()
    model.first.bias.data.fill_(0.5)
    model.second.bias.data.fill_(0.1)
    copy = copy_with(model, rounded_to("float16"))
    assert copy.get_parameter("first.bias") is model.first.bias
    rounded = copy.get_parameter("second.bias")
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, torch.full((4,), 0.1).half().float())
