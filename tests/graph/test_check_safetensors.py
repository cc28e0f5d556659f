"""Verdicts over safetensors files and folders; `test_tensor_files.py` has what is refused."""

import json
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from graph_models import DTYPES, Array, array_24, spoil
from graph_models import write_safetensors as write_tensors

from prox24_deploy.core.errors import SparsityLostError, SparsityUnprovenError, UsageError
from prox24_deploy.core.records import TensorCheck
from prox24_deploy.graph.check.check import check_path, check_safetensors, require_24

# 2:4 along both axes.
BOTH = np.tile([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]], (2, 2))


def only(checks: tuple[TensorCheck, ...]) -> TensorCheck:
    assert len(checks) == 1
    return checks[0]


def configured(folder: Path, **config: object) -> Path:
    """A folder whose config.json is that of a model."""
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


def verdicts(checks: Sequence[TensorCheck]) -> dict[str, bool | None]:
    """By tensor: 2:4, not 2:4, or None where neither is proven."""
    return {check.tensor: None if check.unproven else check.is_24 for check in checks}


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_linear_layers_are_checked_along_axis_one(tmp_path: Path, dtype: str) -> None:
    tensors = {
        "a.weight": array_24((6, 8), 1, dtype),
        "b.weight": spoil(array_24((6, 8), 1, dtype), (2, 4), 1),
        "norm.weight": np.ones(8, DTYPES[dtype]),
        "a.bias": np.ones((8, 8), DTYPES[dtype]),
    }
    path = write_tensors(configured(tmp_path) / "m.safetensors", tensors)
    found = check_safetensors(path)
    assert [(c.tensor, c.module, c.is_24, c.expected, c.first_violation) for c in found] == [
        ("a.bias", "a.bias", False, False, None),
        ("a.weight", "a", True, True, None),
        ("b.weight", "b", False, True, (2, 4)),
    ]
    assert {(c.dtype, c.shape, c.axis) for c in found[1:]} == {(dtype, (6, 8), 1)}
    assert found[0].reason == "it is a bias, which is added"


def test_a_bare_file_does_not_tell_its_layout(tmp_path: Path) -> None:
    tensors = {
        "a.weight": array_24((8, 8), 1),
        "b.weight": array_24((8, 8), 0),
        "both.weight": BOTH.astype(np.float32),
        "dense.weight": np.ones((8, 8), np.float32),
        "table": np.ones((8, 8), np.float32),
    }
    path = write_tensors(tmp_path / "m.safetensors", tensors)
    found = verdicts(check_safetensors(path))
    assert found == {
        "a.weight": None, "b.weight": None, "both.weight": True, "dense.weight": False,
        "table": None,
    }  # fmt: skip
    report = check_path(path, ignore=["dense*", "table"])
    message = (
        r"'a\.weight' of module 'a' is not proven 2:4: it is 2:4 along axis 1 only, and along "
        r"which axis it is summed is unknown \(1 other weight too\); put the config\.json of the "
    )
    with pytest.raises(SparsityUnprovenError, match=message):
        require_24(report)
    with pytest.raises(SparsityLostError, match=r"'dense\.weight' of module 'dense' is not 2:4"):
        require_24(check_path(path))
    # Whoever knows the layout can tell it.
    told = check_path(path, ignore=["dense*", "table"], axes={"b.*": 0, "*": 1})
    require_24(told)
    assert {c.tensor: c.axis for c in told.proven} == {
        "a.weight": 1,
        "b.weight": 0,
        "both.weight": 1,
    }


def test_a_told_axis_outside_of_the_tensor_is_refused(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m.safetensors", {"a.weight": array_24((8, 8), 1)})
    with pytest.raises(UsageError, match=r"--axis tells axis 2 for tensor 'a\.weight' of sha"):
        check_path(path, axes={"*": 2})


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "no-such-model"},
        {"model_type": ["llama"]},
        {"auto_map": {"AutoModel": "modeling.Own"}},
        {"text_config": {"model_type": "no-such-model"}},
    ],
)
def test_an_architecture_that_is_not_known_tells_no_layout(
    tmp_path: Path, config: dict[str, object]
) -> None:
    tensors = {"a.weight": array_24((8, 8), 1)}
    path = write_tensors(configured(tmp_path, **config) / "m.safetensors", tensors)
    assert verdicts(check_safetensors(path)) == {"a.weight": None}


@pytest.mark.parametrize("text", ["[]", "{", '"llama"', "{" * 50_000, "\ud800"])
def test_a_damaged_config_is_refused(tmp_path: Path, text: str) -> None:
    path = write_tensors(tmp_path / "m.safetensors", {"a.weight": array_24((8, 8), 1)})
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogatepass"))
    message = r"config\.json is (no JSON object|not readable JSON .+); copy it again or remove it"
    with pytest.raises(UsageError, match=message):
        check_path(path)


def test_the_layers_of_gpt2_are_stored_transposed(tmp_path: Path) -> None:
    tensors = {
        "h.0.attn.c_attn.weight": array_24((8, 24), 0),
        "h.0.mlp.c_fc.weight": array_24((8, 32), 1),
        "lm_head.weight": array_24((16, 8), 1),
    }
    for config in ({"model_type": "gpt2"}, {"decoder": {"model_type": "gpt2"}}):
        configured(tmp_path, **config)
        path = write_tensors(tmp_path / "m.safetensors", tensors)
        assert verdicts(check_safetensors(path)) == {
            "h.0.attn.c_attn.weight": True, "h.0.mlp.c_fc.weight": False, "lm_head.weight": True,
        }  # fmt: skip


def test_convolutions_are_checked_along_their_input_channels(tmp_path: Path) -> None:
    tensors = {
        "patch.projection.weight": array_24((8, 16, 2, 2), 1),
        "conv1.weight": array_24((8, 16, 3), 1),
        "input_linear.weight": array_24((4, 8, 16), 2),
    }
    configured(tmp_path, model_type="vit")
    path = write_tensors(tmp_path / "m.safetensors", tensors)
    assert verdicts(check_safetensors(path)) == {
        "patch.projection.weight": True, "conv1.weight": True, "input_linear.weight": None,
    }  # fmt: skip
    # Its transposed convolutions have the inputs first, and no name tells them apart.
    configured(tmp_path, model_type="sam")
    assert set(verdicts(check_safetensors(path)).values()) == {None}


def experts(gate: Sequence[int], down: Sequence[int], axis: int) -> dict[str, Array]:
    root = "layers.0.mlp.experts"
    return {
        f"{root}.gate_up_proj": array_24(gate, axis),
        f"{root}.down_proj": array_24(down, axis),
        f"{root}.down_proj_bias": np.ones((4, 8), np.float32),
    }


@pytest.mark.parametrize(
    ("gate", "down", "axis"),
    [
        ((4, 16, 64), (4, 32, 16), 1),
        ((4, 64, 16), (4, 16, 32), 2),
        # Where one is square, the other tells.
        ((4, 16, 32), (4, 16, 16), 1),
        ((4, 32, 16), (4, 16, 16), 2),
    ],
)
def test_fused_experts_are_checked_along_the_axis_of_their_inputs(
    tmp_path: Path, gate: Sequence[int], down: Sequence[int], axis: int
) -> None:
    configured(tmp_path, model_type="gpt_oss", hidden_size=16)
    tensors = experts(gate, down, axis)
    found = check_safetensors(write_tensors(tmp_path / "m.safetensors", tensors))
    assert [(c.axis, c.is_24, c.expected) for c in found] == [
        (axis, True, True), (-1, False, False), (axis, True, True),
    ]  # fmt: skip
    dense = {name: np.ones_like(array) for name, array in tensors.items()}
    with pytest.raises(SparsityLostError, match=r"experts\.down_proj' .* is not 2:4 along axis"):
        require_24(check_path(write_tensors(tmp_path / "m.safetensors", dense)))


def test_experts_whose_layout_no_size_tells_are_not_proven(tmp_path: Path) -> None:
    configured(tmp_path, model_type="gpt_oss", hidden_size=16)
    tensors = experts((4, 16, 16), (4, 16, 16), 1)
    found = verdicts(check_safetensors(write_tensors(tmp_path / "m.safetensors", tensors)))
    assert set(found.values()) == {None}


def test_every_tensor_of_rank_two_is_listed_and_one_of_no_known_use_is_not_proven(
    tmp_path: Path,
) -> None:
    tensors = {
        "a.weight": array_24((8, 8), 1),
        "pos_embed": np.ones((1, 4, 8), np.float32),
        "ids": np.ones((2, 4), np.int8),
        "scalar": np.ones((1,), np.float32),
    }
    path = write_tensors(configured(tmp_path) / "m.safetensors", tensors)
    report = check_path(path)
    assert verdicts(report.tensors) == {"a.weight": True, "ids": None, "pos_embed": None}
    with pytest.raises(SparsityUnprovenError, match=r"'ids' .*: it holds integers \(I8\): indic"):
        require_24(report)
    with pytest.raises(SparsityUnprovenError, match="whether it is a weight, and along which axis"):
        require_24(check_path(path, ignore=["ids"]))
    require_24(check_path(path, ignore=["ids", "pos_embed"]))


def test_nothing_is_proven_where_all_is_ignored_or_declared_elsewhere(tmp_path: Path) -> None:
    path = write_tensors(configured(tmp_path) / "m.safetensors", {"a.weight": array_24((8, 8), 1)})
    with pytest.raises(SparsityUnprovenError, match="proves nothing: all of its weights"):
        require_24(check_path(path, ignore=["*"]))
    write_tensors(path, {"a.weight": np.ones((8, 8), np.float32)}, {})
    with pytest.raises(SparsityUnprovenError, match="proves nothing: what it declares names no we"):
        require_24(check_path(path))


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


def test_declared_tensor_that_is_missing_is_not_proven(tmp_path: Path) -> None:
    tensors = {"a.weight": array_24((4, 8), 1)}
    path = write_tensors(tmp_path / "m.safetensors", tensors, {"a.weight": 1, "b.weight": 1})
    message = r"tensor 'b\.weight' of module 'b' is not proven 2:4: it is declared as 2:4 but th"
    with pytest.raises(SparsityUnprovenError, match=message):
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


def test_an_index_and_its_shards_agree_on_every_name(tmp_path: Path) -> None:
    configured(tmp_path)
    write_tensors(tmp_path / "1.safetensors", {"a.weight": array_24((4, 8), 1)})
    write_tensors(tmp_path / "2.safetensors", {"b.weight": array_24((4, 8), 1)})
    index = tmp_path / "model.safetensors.index.json"
    names = {"a.weight": "1.safetensors", "b.weight": "2.safetensors"}
    index.write_text(json.dumps({"weight_map": names}))
    require_24(check_path(tmp_path))
    index.write_text(json.dumps({"weight_map": {**names, "b.weight": "1.safetensors"}}))
    with pytest.raises(UsageError, match=r"1\.safetensors of .* lacks tensor 'b\.weight', which"):
        check_path(tmp_path)
    for text in ("[" * 50_000, '{"weight_map": {"a": 1}}', '{"weight_map": []}'):
        index.write_text(text)
        message = r"index\.json is (damaged|not readable JSON \(it nests deep.+\)); copy it again"
        with pytest.raises(UsageError, match=message):
            check_path(tmp_path)


def test_a_tensor_in_two_files_of_a_folder_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "1.safetensors", {"a.weight": array_24((4, 8), 1)})
    write_tensors(tmp_path / "model.safetensors", {"a.weight": np.ones((4, 8), np.float32)})
    with pytest.raises(UsageError, match=r"'a\.weight' is in 1\.safetensors and in model\.safe"):
        check_path(tmp_path)


def test_scalars_and_empty_tensors_in_safetensors_do_no_harm(tmp_path: Path) -> None:
    tensors: dict[str, Array] = {
        "step": np.array(1, np.int8),
        "e.weight": np.zeros((0, 8), np.float32),
    }
    assert only(check_safetensors(write_tensors(tmp_path / "m.safetensors", tensors))).is_24


def test_declared_axis_outside_the_tensor_is_refused(tmp_path: Path) -> None:
    tensors = {"a.weight": array_24((4, 8), 1)}
    path = write_tensors(tmp_path / "m.safetensors", tensors, {"a.weight": 2})
    with pytest.raises(UsageError, match=r"declares axis 2 for .* with an axis from 0 to 1"):
        check_path(path)


def test_eight_bit_floats_are_read(tmp_path: Path) -> None:
    for kind in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        tensors = {
            "a.weight": array_24((8, 16), 1).astype(kind),
            "a.weight_scale": np.ones((8, 1), np.float32),
        }
        path = write_tensors(configured(tmp_path) / "m.safetensors", tensors)
        found = check_path(path)
        require_24(found)
        assert found.tensors[1].reason == "it holds the scales of 'a.weight'"
        # A matrix is no scale, whatever its name is.
        tensors["a.weight_scale"] = np.ones((8, 16), np.float32)
        assert check_path(write_tensors(path, tensors)).unproven


PACKED = {
    "compressed-tensors": ("weight_packed", "weight_zero_point"),
    "compressed-tensors, non-zeros with a bitmask": ("weight.compressed", "weight.bitmask"),
    "GPTQ or AWQ": ("qweight", "qzeros", "scales", "g_idx"),
    "ExLlama": ("q_weight", "q_scale"),
    "bitsandbytes": ("weight", "SCB"),
    "torchao": ("weight_qdata",),
    "MXFP4": ("gate_up_proj_blocks", "gate_up_proj_scales"),
    "HQQ": ("W_q",),
    "Quanto": ("weight._data", "weight._scale"),
    "AQLM": ("codes", "codebooks"),
    "QuIP": ("Qidxs",),
    "Marlin": ("B_24", "B_meta"),
}


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("known", [False, True])
def test_packed_tensors_are_named_and_not_read(tmp_path: Path, form: str, *, known: bool) -> None:
    """Also where what is stored looks like a matrix that is 2:4 along every axis."""
    tensors = {f"layer.proj.{end}": BOTH.astype(np.int8) for end in PACKED[form]}
    tensors["layer.other.weight"] = BOTH.astype(np.float32)
    path = write_tensors(tmp_path / "m.safetensors", tensors)
    if known:
        configured(tmp_path)
    report = check_path(path, axes={"*": 1})
    assert [c.tensor for c in report.proven] == ["layer.other.weight"]
    for check in report.unproven:
        assert check.reason == f"it is packed ({form}), and not read"
    with pytest.raises(SparsityUnprovenError, match="check the checkpoint from which it was"):
        require_24(report)


def test_a_name_alone_that_a_format_shares_with_others_is_not_packed(tmp_path: Path) -> None:
    tensors = {"a.scales": BOTH.astype(np.float32), "a.shape": BOTH.astype(np.float32)}
    found = verdicts(check_safetensors(write_tensors(tmp_path / "m.safetensors", tensors)))
    assert found == {"a.scales": True, "a.shape": True}
