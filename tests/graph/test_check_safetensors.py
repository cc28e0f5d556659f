import json
import struct
from pathlib import Path

import numpy as np
import pytest
from graph_models import DTYPES, Array, array_24, spoil
from graph_models import write_safetensors as write_tensors

from prox24_deploy.artifacts import TensorCheck
from prox24_deploy.errors import SparsityLostError, UsageError
from prox24_deploy.graph.check import check_path, check_safetensors, require_24


def only(checks: tuple[TensorCheck, ...]) -> TensorCheck:
    assert len(checks) == 1
    return checks[0]


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_safetensors_are_checked_along_axis_one(tmp_path: Path, dtype: str) -> None:
    tensors = {
        "a.weight": array_24((6, 8), 1, dtype),
        "b.weight": spoil(array_24((6, 8), 1, dtype), (2, 4), 1),
        "norm.weight": np.ones(8, DTYPES[dtype]),
        "a.bias": np.ones((8, 8), DTYPES[dtype]),
    }
    found = check_safetensors(write_tensors(tmp_path / "m.safetensors", tensors))
    assert [(c.tensor, c.module, c.is_24, c.expected, c.first_violation) for c in found] == [
        ("a.weight", "a", True, True, None),
        ("b.weight", "b", False, True, (2, 4)),
    ]
    assert {(c.dtype, c.shape, c.axis) for c in found} == {(dtype, (6, 8), 1)}


def test_declared_safetensors_are_checked_along_their_declared_axis(tmp_path: Path) -> None:
    tensors = {
        "a.weight": array_24((8, 6), 0),
        "b.weight": np.ones((8, 8), np.float32),
        "scales": array_24((8,), 0),
    }
    path = write_tensors(tmp_path / "m.safetensors", tensors, {"a.weight": 0, "scales": 0})
    found = {c.tensor: (c.axis, c.is_24, c.expected) for c in check_safetensors(path)}
    assert found == {
        "a.weight": (0, True, True),
        "b.weight": (1, False, False),
        "scales": (0, True, True),
    }


def test_declared_tensor_that_is_missing_violates(tmp_path: Path) -> None:
    tensors = {"a.weight": array_24((4, 8), 1)}
    path = write_tensors(tmp_path / "m.safetensors", tensors, {"a.weight": 1, "b.weight": 1})
    with pytest.raises(SparsityLostError, match=r"tensor 'b\.weight' of module 'b' is not 2:4: it"):
        require_24(check_path(path))


def test_shards_of_a_folder_declare_for_each_other(tmp_path: Path) -> None:
    axes = {"a.weight": 1, "b.weight": 1}
    write_tensors(tmp_path / "1.safetensors", {"a.weight": array_24((4, 8), 1)}, axes)
    write_tensors(tmp_path / "2.safetensors", {"b.weight": array_24((4, 8), 1)}, axes)
    write_tensors(tmp_path / "3.safetensors", {"embed.weight": np.ones((4, 8), np.float32)})
    report = check_path(tmp_path)
    require_24(report)
    assert [c.expected for c in report.tensors] == [True, True, False]


def test_shard_that_the_index_lists_must_be_there(tmp_path: Path) -> None:
    write_tensors(tmp_path / "1.safetensors", {"a.weight": array_24((4, 8), 1)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    with pytest.raises(UsageError, match=r"lacks 2\.safetensors, which model\.safetensors\.index"):
        check_path(tmp_path)
    index.write_text("[]")
    with pytest.raises(UsageError, match=r"index\.json is damaged; copy it again"):
        check_path(tmp_path)


def test_scalars_and_empty_tensors_in_safetensors_do_no_harm(tmp_path: Path) -> None:
    tensors: dict[str, Array] = {
        "step": np.array(1, np.int8),
        "e.weight": np.zeros((0, 8), np.float32),
    }
    assert only(check_safetensors(write_tensors(tmp_path / "m.safetensors", tensors))).is_24


def corrupt(path: Path, header: object, body: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (b"{", "its header is not JSON"),
        (b"\xff\xfe", "its header is not JSON"),
        (b"[" * 100_000, "its header is not JSON"),
        ([], "its header is not a JSON object"),
        ({"w": {"dtype": "F32", "shape": [1]}}, "entry of tensor 'w' is malformed"),
        ({"w": []}, "entry of tensor 'w' is malformed"),
        (
            {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
            r"tensor 'w' lies outside the file's \d+ bytes",
        ),
        (
            {"w": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}},
            r"tensor 'w' lies outside",
        ),
        (
            {"a.weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 4]}},
            "tensor 'a.weight' does not fit its bytes",
        ),
    ],
)
def test_damaged_safetensors_header_is_refused(
    tmp_path: Path, header: object, problem: str
) -> None:
    path = corrupt(tmp_path / "m.safetensors", header, b"\0\0\0\0")
    with pytest.raises(UsageError, match=rf"m\.safetensors is not .* or is damaged: .*{problem}"):
        check_safetensors(path)


def test_truncated_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m.safetensors", {"a.weight": array_24((4, 8), 1)})
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(UsageError, match=r"tensor 'a\.weight' lies outside the file's"):
        check_safetensors(path)
    path.write_bytes(data[:5])
    with pytest.raises(UsageError, match="its header is not JSON"):
        check_safetensors(path)


def test_unknown_safetensors_dtype_is_named(tmp_path: Path) -> None:
    entry = {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]}
    path = corrupt(tmp_path / "m.safetensors", {"a.weight": entry}, b"\0\0\0\0")
    with pytest.raises(UsageError, match=r"'a\.weight' of .* has dtype F4; the check reads F64"):
        check_safetensors(path)


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": "1"}', '{"a": true}'])
def test_damaged_safetensors_declaration_is_refused(tmp_path: Path, text: str) -> None:
    path = corrupt(tmp_path / "m.safetensors", {"__metadata__": {"prox24.sparse_weights": text}})
    with pytest.raises(UsageError, match=r"must be a JSON object from tensor name to axis, got"):
        check_safetensors(path)


def test_declared_axis_outside_the_tensor_is_refused(tmp_path: Path) -> None:
    tensors = {"a.weight": array_24((4, 8), 1)}
    path = write_tensors(tmp_path / "m.safetensors", tensors, {"a.weight": 2})
    with pytest.raises(UsageError, match=r"declares axis 2 for .* with an axis from 0 to 1"):
        check_safetensors(path)
