"""The configuration for Triton, read back with Triton's own definition of it."""

from pathlib import Path

import pytest
from google.protobuf import text_format
from triton_definition import data_type_name, parse_config

from prox24_deploy.bundle.manifest import FileEntry, hash_file
from prox24_deploy.config.recipe import GraphTensor
from prox24_deploy.core.errors import BundleError, UsageError
from prox24_deploy.packaging.triton import (
    MODEL_FILES,
    ServingBackend,
    batches,
    model_config,
    model_name,
    write_repository,
)

IDS = GraphTensor("input_ids", "INT64", ("batch", "sequence"))
PAST = GraphTensor("past_key_values.0.key", "FLOAT16", ("batch", 2, "past", 8))
LOGITS = GraphTensor("logits", "FLOAT16", ("batch", "sequence", 260))


def config_of(
    *outputs: GraphTensor,
    backend: ServingBackend = "onnxruntime",
    name: str = "model",
    max_batch: int = 8,
    instances: int | None = None,
    comments: tuple[str, ...] = (),
) -> str:
    return model_config(
        name, backend, (IDS, PAST), outputs or (LOGITS,), max_batch=max_batch,
        instances=instances, comments=comments,
    )  # fmt: skip


def test_the_batch_axis_is_tritons_and_a_cache_is_of_any_length() -> None:
    parsed = parse_config(config_of())
    assert (parsed.name, parsed.backend, parsed.max_batch_size) == ("model", "onnxruntime", 8)
    assert [(t.name, data_type_name(t.data_type), list(t.dims)) for t in parsed.input] == [
        ("input_ids", "TYPE_INT64", [-1]),
        ("past_key_values.0.key", "TYPE_FP16", [2, -1, 8]),
    ]
    assert [(t.name, list(t.dims)) for t in parsed.output] == [("logits", [-1, 260])]
    assert parsed.HasField("dynamic_batching")
    assert parsed.version_policy.latest.num_versions == 1
    assert not parsed.instance_group


def test_without_batching_every_axis_is_the_clients() -> None:
    parsed = parse_config(config_of(max_batch=0))
    assert parsed.max_batch_size == 0
    assert [list(tensor.dims) for tensor in parsed.input] == [[-1, -1], [-1, 2, -1, 8]]
    assert [list(tensor.dims) for tensor in parsed.output] == [[-1, -1, 260]]
    assert not parsed.HasField("dynamic_batching")


def test_single_requests_are_not_joined() -> None:
    parsed = parse_config(config_of(max_batch=1))
    assert parsed.max_batch_size == 1
    assert not parsed.HasField("dynamic_batching")


def test_a_tensor_with_no_axis_but_the_batch_is_reshaped() -> None:
    score = GraphTensor("score", "FLOAT", ("batch",))
    parsed = parse_config(config_of(score)).output[0]
    assert list(parsed.dims) == [1]
    assert parsed.HasField("reshape")
    assert list(parsed.reshape.shape) == []
    plain = parse_config(config_of(score, max_batch=0)).output[0]
    assert list(plain.dims) == [-1]
    assert not plain.HasField("reshape")


def test_instances_and_the_file_of_each_backend_are_named() -> None:
    parsed = parse_config(config_of(backend="tensorrt", instances=2))
    assert parsed.default_model_filename == "model.plan"
    assert [group.count for group in parsed.instance_group] == [2]
    assert parse_config(config_of()).default_model_filename == "model.onnx"


@pytest.mark.parametrize("name", ['a"b', "back\\slash", "größe", "tab\tand\nline", "\x00\x7f"])
def test_any_name_of_a_tensor_survives(name: str) -> None:
    text = config_of(GraphTensor(name, "FLOAT", ("batch", 3)))
    assert parse_config(text).output[0].name == name


def test_a_comment_stays_on_its_line() -> None:
    text = config_of(comments=('one\nname: "other"', "two"))
    assert text.splitlines()[:2] == ['# one name: "other"', "# two"]
    assert parse_config(text).name == "model"


def test_the_definition_refuses_what_is_no_configuration() -> None:
    with pytest.raises(text_format.ParseError):
        parse_config(config_of() + 'flavour: "vanilla"\n')


def test_a_tensor_without_the_batch_first_needs_max_batch_0() -> None:
    odd = GraphTensor("states", "FLOAT", ("sequence", "batch", 4))
    assert batches((IDS, PAST))
    assert not batches((IDS, odd))
    assert not batches((GraphTensor("scalar", "FLOAT", ()),))
    with pytest.raises(UsageError, match=r"'states' has axes .* pass --max-batch 0"):
        config_of(odd)
    assert list(parse_config(config_of(odd, max_batch=0)).output[0].dims) == [-1, -1, 4]


def test_bfloat16_is_served_by_tensorrt_alone() -> None:
    half = GraphTensor("logits", "BFLOAT16", ("batch", 3))
    parsed = parse_config(config_of(half, backend="tensorrt"))
    assert data_type_name(parsed.output[0].data_type) == "TYPE_BF16"
    with pytest.raises(UsageError, match="BFLOAT16, which Triton's backend onnxruntime does not"):
        config_of(half)
    with pytest.raises(UsageError, match="COMPLEX64, which Triton's backend tensorrt does not"):
        config_of(GraphTensor("x", "COMPLEX64", ("batch",)), backend="tensorrt")


@pytest.mark.parametrize(
    ("wanted", "path", "name"),
    [
        (None, "/models/all MiniLM", "all-MiniLM"),
        ("bert.v2", "x", "bert.v2"),
        ("_a-1", "x", "_a-1"),
    ],
)
def test_a_model_is_named_after_its_source(wanted: str | None, path: str, name: str) -> None:
    assert model_name(wanted, path) == name


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "-x", "a b"])
def test_a_name_that_is_no_folder_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"cannot be used, .* pass another --name"):
        model_name(name, "x")


def test_a_repository_appears_at_once_or_not_at_all(tmp_path: Path) -> None:
    source = tmp_path / "graph"
    source.write_bytes(b"graph")
    out = tmp_path / "models"
    wrong = FileEntry(sha256="0" * 64, size=5)
    with pytest.raises(BundleError, match="changed while it was copied"):
        write_repository(out, "bert", "", {MODEL_FILES["onnxruntime"]: (source, wrong)})
    assert list(out.iterdir()) == []
    good = {MODEL_FILES["onnxruntime"]: (source, hash_file(source))}
    made = write_repository(out, "bert", "text", good)
    assert made == out / "bert"
    assert (made / "1" / "model.onnx").read_bytes() == b"graph"
    assert (made / "config.pbtxt").read_text(encoding="utf-8") == "text"
    with pytest.raises(BundleError, match="exists already; remove it, or pass another --name"):
        write_repository(out, "bert", "text", good)
    assert [path.name for path in out.iterdir()] == ["bert"]
