from pathlib import Path

import numpy as np
import onnx
import pytest
from graph_models import array_24, node, write_matmul, write_onnx

from prox24_deploy.core.errors import UsageError
from prox24_deploy.graph.check.check import check_onnx, check_path, check_safetensors, require_24


@pytest.mark.parametrize("content", [b"", b"no model at all\n", b"\x08\x0a\xff\xff"])
def test_file_that_is_no_onnx_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"m\.onnx is not an ONNX model, or is damaged; pass a"):
        check_path(path)


def test_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.onnx does not exist; pass an \.onnx or"):
        check_path(tmp_path / "nowhere.onnx")
    with pytest.raises(UsageError, match=r"cannot be read \(No such file or directory\)"):
        check_onnx(tmp_path / "nowhere.onnx")
    with pytest.raises(UsageError, match=r"cannot be read \(No such file or directory\)"):
        check_safetensors(tmp_path / "nowhere.safetensors")


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"")
    with pytest.raises(UsageError, match=r"has suffix '\.bin'; pass an \.onnx or \.safetensors"):
        check_path(path)


def test_nothing_to_check_is_refused_and_not_passed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no weight to check"):
        check_path(tmp_path)
    path = write_onnx(tmp_path / "m.onnx", [node("Relu", ["x"], "y")], {})
    with pytest.raises(UsageError, match="holds no weight to check"):
        check_path(path)


def test_folder_of_onnx_files_judges_each_by_its_own_declaration(tmp_path: Path) -> None:
    dense = np.ones((8, 8), np.float32)
    write_matmul(tmp_path / "a.onnx", array_24((8, 8), 0), declared=["layer.dense"])
    write_matmul(tmp_path / "b.onnx", dense, declared=[])
    require_24(check_path(tmp_path))
    write_matmul(tmp_path / "c.onnx", dense)
    assert len(check_path(tmp_path).violations) == 1


def test_missing_external_data_is_named(tmp_path: Path) -> None:
    path = write_matmul(tmp_path / "m.onnx", array_24((8, 8), 0), external=True)
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(
        UsageError, match=r"External data 'm\.onnx\.data' of .* is missing; copy it"
    ):
        check_path(path)


def test_truncated_external_data_is_named(tmp_path: Path) -> None:
    path = write_matmul(tmp_path / "m.onnx", array_24((8, 8), 0), external=True)
    data = tmp_path / "m.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(
        UsageError, match=r"truncated: tensor 'w' needs 256 bytes, the file has 255"
    ):
        check_path(path)


def move_data(path: Path, location: str) -> None:
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("kind", ["parent", "absolute", "link"])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = write_matmul(folder / "m.onnx", array_24((8, 8), 0), external=True)
    outside = tmp_path / "outside.data"
    (folder / "m.onnx.data").rename(outside)
    (folder / "link.data").symlink_to(outside)
    location = {"parent": "../outside.data", "absolute": str(outside), "link": "link.data"}[kind]
    move_data(path, location)
    with pytest.raises(UsageError, match=r"points to external data .* outside the model's folder"):
        check_path(path)


def test_inline_tensor_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    path = write_matmul(tmp_path / "m.onnx", array_24((8, 8), 0))
    model = onnx.load(path)
    model.graph.initializer[0].raw_data = b"\0" * 7
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UsageError, match=r"Tensor 'w' of .*m\.onnx cannot be read \("):
        check_path(path)


@pytest.mark.parametrize("text", ["{}", "[1]", "nonsense"])
def test_damaged_onnx_declaration_is_refused(tmp_path: Path, text: str) -> None:
    path = write_matmul(tmp_path / "m.onnx", array_24((8, 8), 0), declared=[])
    model = onnx.load(path)
    model.metadata_props[0].value = text
    path.write_bytes(model.SerializeToString())
    with pytest.raises(
        UsageError, match=r"prox24\.sparse_weights of .* must be a JSON list of mod"
    ):
        check_path(path)
