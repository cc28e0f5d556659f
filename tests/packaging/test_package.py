"""What `package` makes of a finished bundle, read with the tools of those who receive it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import transformers
from command_line import ANY_CLASS, ANY_EMBEDDING, ANY_TEXT, run_cli, snapshot
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from huggingface_hub import ModelCard
from PIL import Image
from tiny_models import write_tiny_bert
from triton_definition import data_type_name, parse_config

from prox24_deploy.bundle.manifest import hash_file, read_manifest, write_manifest
from prox24_deploy.report.formats import estimate
from prox24_deploy.report.schema import load_report

FAST = ("--preset", "fast", "--calibration-tokens", "4096", "--evaluation-tokens", "2048")
SOURCE_CARD = """---
license: mit
language:
- en
tags:
- dense
datasets:
- private/set
---
# Tiny BERT

It is tiny.
"""
TYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.INT64: "TYPE_INT64",
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, prose: Path) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    model = write_tiny_bert(folder / "tiny-bert")
    (model / "README.md").write_text(SOURCE_CARD, encoding="utf-8")
    shapes = ("--shapes", "batch=1,4", "sequence=16")
    run = run_cli(
        "build", model, "-o", folder / "out", "--calibration", prose, *FAST, *shapes, *ANY_EMBEDDING
    )
    assert run.code == 0, run.err
    return folder / "out"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, prose: Path) -> Path:
    out = tmp_path_factory.mktemp("decoder") / "out"
    run = run_cli(
        "build", tiny_llama, "-o", out, "--calibration", prose, "--dtype", "float16", *FAST[2:],
        "--method", "magnitude", "--shapes", "batch=2", "sequence=16", *ANY_TEXT,
    )  # fmt: skip
    assert run.code == 0, run.err
    return out


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(folder / "vit")
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(folder / "vit")
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    for i in range(32):
        pixels = random.integers(0, 256, (32, 32, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    run = run_cli(
        "build", folder / "vit", "-o", folder / "out", "--calibration", folder / "images",
        "--method", "magnitude", "--shapes", "batch=2", *ANY_CLASS,
    )  # fmt: skip
    assert run.code == 0, run.err
    return folder / "out"


@pytest.fixture
def copy(encoder: Path, tmp_path: Path) -> Path:
    """The encoder's bundle, to be changed."""
    return Path(shutil.copytree(encoder, tmp_path / "bundle"))


def reseal(bundle: Path, *changed: str, **fields: Any) -> None:
    """Enter files and fields in the manifest, as if a build had written them."""
    manifest = read_manifest(bundle)
    manifest.files.update({name: hash_file(bundle / name) for name in changed})
    write_manifest(bundle, manifest.model_copy(update=fields))


def served_dims(value: onnx.ValueInfoProto, *, batched: bool) -> list[int]:
    """Axes of a tensor as Triton writes them, from the protobuf of the file itself."""
    dims = [
        dim.dim_value if dim.HasField("dim_value") else -1
        for dim in value.type.tensor_type.shape.dim
    ]
    assert not batched or dims[0] == -1
    return dims[batched:]


@pytest.mark.parametrize("max_batch", [None, 0])
@pytest.mark.parametrize(
    ("kind", "batch", "inputs"),
    [("encoder", 4, 3), ("decoder", 2, 2 + 4), ("vision", 2, 1)],
)
def test_the_configuration_is_that_of_the_file(
    kind: str,
    batch: int,
    inputs: int,
    max_batch: int | None,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    bundle: Path = request.getfixturevalue(kind)
    before = snapshot(bundle)
    asked = () if max_batch is None else ("--max-batch", str(max_batch))
    run = run_cli("package", bundle, "--triton", tmp_path, "--name", kind, *asked)
    assert run.code == 0, run.err
    assert "ONNX Runtime has no sparse kernels" in run.out
    assert snapshot(bundle) == before
    config = parse_config((tmp_path / kind / "config.pbtxt").read_text(encoding="utf-8"))
    assert (config.name, config.backend) == (kind, "onnxruntime")
    assert config.max_batch_size == (batch if max_batch is None else max_batch)
    assert config.HasField("dynamic_batching") == (max_batch is None)
    graph = onnx.load(tmp_path / kind / "1" / "model.onnx", load_external_data=False).graph
    assert len(graph.input) == inputs
    batched = max_batch is None
    for told, found in ((config.input, graph.input), (config.output, graph.output)):
        assert [(t.name, data_type_name(t.data_type), list(t.dims)) for t in told] == [
            (v.name, TYPES[v.type.tensor_type.elem_type], served_dims(v, batched=batched))
            for v in found
        ]
    if kind == "decoder":
        cache = {t.name: list(t.dims) for t in (*config.input, *config.output)}
        assert cache["past_key_values.0.key"] == [-1] * (not batched) + [2, -1, 8]
        assert cache["present.1.value"] == [-1] * (not batched) + [2, -1, 8]


def test_the_served_files_run_where_they_lie(decoder: Path, tmp_path: Path) -> None:
    """The graph finds its weights under the names it refers to, with an empty and a full cache."""
    assert run_cli("package", decoder, "--triton", tmp_path, "--name", "llama").code == 0
    version = tmp_path / "llama" / "1"
    assert {path.name for path in version.iterdir()} == {"model.onnx", "model.onnx.data"}
    session = onnxruntime.InferenceSession(version / "model.onnx")
    config = parse_config((tmp_path / "llama" / "config.pbtxt").read_text(encoding="utf-8"))
    for past in (0, 3):
        feeds = {}
        for tensor in config.input:
            integers = data_type_name(tensor.data_type) == "TYPE_INT64"
            free = {"input_ids": 5, "attention_mask": past + 5}.get(tensor.name, past)
            shape = [config.max_batch_size, *(free if dim < 0 else dim for dim in tensor.dims)]
            feeds[tensor.name] = np.ones(shape, np.int64 if integers else np.float16)
        results = session.run([tensor.name for tensor in config.output], feeds)
        for tensor, value in zip(config.output, results, strict=True):
            assert isinstance(value, np.ndarray)
            free = 5 if tensor.name == "logits" else past + 5
            assert value.shape == (2, *(free if dim < 0 else dim for dim in tensor.dims))


def test_a_name_a_twin_and_instances_are_taken(encoder: Path, tmp_path: Path) -> None:
    run = run_cli("package", encoder, "--triton", tmp_path, "--twin", "dense", "--instances", "2",
                  "--json")  # fmt: skip
    assert run.code == 0, run.err
    made = tmp_path / "tiny-bert"
    assert json.loads(run.out) == {"written": {"triton": str(made)}, "notes": []}
    assert (made / "1" / "model.onnx.data").read_bytes() == (
        encoder / "onnx" / "dense" / "model.onnx.data"
    ).read_bytes()
    text = (made / "config.pbtxt").read_text(encoding="utf-8")
    assert "dense twin, verdict pass" in text.splitlines()[0]
    assert read_manifest(encoder).self_sha256 in text.splitlines()[0]
    assert [group.count for group in parse_config(text).instance_group] == [2]
    again = run_cli("package", encoder, "--triton", tmp_path)
    assert again.code == 2
    assert "exists already; remove it, or pass another --name" in again.err


def test_a_bundle_that_does_not_verify_is_refused_even_with_force(
    copy: Path, tmp_path: Path
) -> None:
    (copy / "onnx" / "sparse" / "model.onnx.data").write_bytes(b"other weights")
    for force in ((), ("--force",)):
        run = run_cli("package", copy, "--triton", tmp_path / "out", *force)
        assert run.code == 2
        assert "does not verify and is not handed over: onnx/sparse/model.onnx.data" in run.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verdict", ["fail", "inconclusive"])
def test_a_release_that_did_not_pass_needs_force(verdict: str, copy: Path, tmp_path: Path) -> None:
    said = f"{verdict} on accuracy: perplexity +187 %"
    report = json.loads((copy / "report.json").read_bytes()) | {"sentence": said}
    (copy / "report.json").write_text(json.dumps(report), encoding="utf-8")
    reseal(copy, "report.json", verdict=verdict)
    run = run_cli("package", copy, "--triton", tmp_path / "out")
    assert run.code == 2
    assert f"did not pass and is not handed over. {said}. See {copy / 'report.html'}" in run.err
    assert not (tmp_path / "out").exists()
    forced = run_cli("package", copy, "--triton", tmp_path / "out", "--force")
    assert forced.code == 0
    assert f"Note: Handed over although it did not pass. {said}." in forced.out
    text = (tmp_path / "out" / "tiny-bert" / "config.pbtxt").read_text(encoding="utf-8")
    assert f"verdict {verdict}" in text.splitlines()[0]


def test_nothing_to_write_and_a_place_inside_the_bundle_are_refused(encoder: Path) -> None:
    nothing = run_cli("package", encoder)
    assert nothing.code == 2
    assert "Nothing to write: pass" in nothing.err
    inside = run_cli("package", encoder, "--triton", encoder / "models")
    assert inside.code == 2
    assert "lies in the bundle" in inside.err
    assert not (encoder / "models").exists()


def test_weights_outside_of_their_folder_are_refused(copy: Path, tmp_path: Path) -> None:
    path = copy / "onnx" / "sparse" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../model.onnx.data"
    path.write_bytes(model.SerializeToString())
    reseal(copy, "onnx/sparse/model.onnx")
    run = run_cli("package", copy, "--triton", tmp_path / "out")
    assert run.code == 2
    assert "keeps weights in '../model.onnx.data', expected a file beside it" in run.err


def add_tensorrt_engine(bundle: Path, flags: list[str], least: int) -> None:
    """Stand in for TensorRT, which is not here: a plan, its record and its entry."""
    folder = bundle / "engines" / "tensorrt" / "sparse"
    folder.mkdir(parents=True)
    (folder / "engine.plan").write_bytes(b"plan")
    path = bundle / "stages" / "compile.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    sparse = next(engine for engine in stored["engines"] if engine["twin"] == "sparse")
    plan = "engines/tensorrt/sparse/engine.plan"
    stored["engines"].append(
        sparse | {"backend": "tensorrt", "path": plan, "device": "NVIDIA H200"}
    )
    path.write_text(json.dumps(stored), encoding="utf-8")
    names = ("input_ids", "attention_mask", "token_type_ids")
    record = {
        "flags": flags,
        "onnx_sha256": sparse["onnx_sha256"],
        "profile": {name: [[least, 16], [4, 16], [4, 16]] for name in names},
    }
    (folder / "engine.json").write_text(json.dumps(record), encoding="utf-8")
    reseal(bundle, "stages/compile.json", plan, "engines/tensorrt/sparse/engine.json")


def test_a_tensorrt_engine_is_served_as_its_plan(copy: Path, tmp_path: Path) -> None:
    line = ("package", copy, "--triton", tmp_path / "out", "--backend", "tensorrt")
    none = run_cli(*line)
    assert none.code == 2
    assert "has no TensorRT engine, it was built for onnxruntime" in none.err
    add_tensorrt_engine(copy, ["SPARSE_WEIGHTS", "VERSION_COMPATIBLE"], least=2)
    run = run_cli(*line)
    assert run.code == 0, run.err
    assert "version-compatible=true" in run.out
    assert "takes no batch below 2" in run.out
    made = tmp_path / "out" / "tiny-bert"
    assert (made / "1" / "model.plan").read_bytes() == b"plan"
    config = parse_config((made / "config.pbtxt").read_text(encoding="utf-8"))
    assert (config.backend, config.max_batch_size) == ("tensorrt", 4)
    assert config.default_model_filename == "model.plan"
    more = run_cli(*line, "--name", "more", "--max-batch", "5")
    assert more.code == 2
    assert "--max-batch 5 is more than the 4 that the TensorRT engine" in more.err


def test_an_engine_of_unknown_shapes_is_not_served(copy: Path, tmp_path: Path) -> None:
    add_tensorrt_engine(copy, ["SPARSE_WEIGHTS"], least=1)
    name = "engines/tensorrt/sparse/engine.json"
    record = json.loads((copy / name).read_text(encoding="utf-8"))
    (copy / name).write_text(json.dumps(record | {"profile": {}}), encoding="utf-8")
    reseal(copy, name)
    run = run_cli("package", copy, "--triton", tmp_path / "out", "--backend", "tensorrt")
    assert run.code == 2
    assert "has no record of its shapes; build it again" in run.err


def test_an_engine_without_weights_is_not_served(copy: Path, tmp_path: Path) -> None:
    add_tensorrt_engine(copy, ["STRIP_PLAN"], least=1)
    run = run_cli("package", copy, "--triton", tmp_path / "out", "--backend", "tensorrt")
    assert run.code == 2
    assert "holds no weights, and Triton cannot refit it" in run.err


def test_the_checksums_satisfy_sha256sum(copy: Path, tmp_path: Path) -> None:
    listed = tmp_path / "release.sha256"
    assert run_cli("package", copy, "--checksums", listed).code == 0
    check = ["sha256sum", "--check", "--strict", "--quiet", str(listed)]
    assert subprocess.run(check, cwd=copy, capture_output=True, check=False).returncode == 0
    names = [line.split("  ", 1)[1] for line in listed.read_text(encoding="utf-8").splitlines()]
    assert sorted(names) == sorted([*read_manifest(copy).files, "manifest.json"])
    (copy / "summary.md").write_bytes((copy / "summary.md").read_bytes() + b"\n")
    ran = subprocess.run(check, cwd=copy, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "summary.md: FAILED" in ran.stdout


def test_the_sbom_lists_model_tool_libraries_and_files(encoder: Path, tmp_path: Path) -> None:
    file = tmp_path / "release.cdx.json"
    run = run_cli("package", encoder, "--sbom", file)
    assert run.code == 0, run.err
    text = file.read_text(encoding="utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bom = json.loads(text)
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.6")
    manifest = read_manifest(encoder)
    parts = {part["bom-ref"]: part for part in bom["components"]}
    hashes = {part["name"]: part["hashes"][0] for ref, part in parts.items() if "file:" in ref}
    assert hashes == {
        name: {"alg": "SHA-256", "content": entry.sha256} for name, entry in manifest.files.items()
    }
    assert parts["library:torch"]["purl"].startswith("pkg:pypi/torch@2.")
    assert parts["tool"]["version"] == manifest.tool_version
    assert manifest.model is not None
    source = parts["source-model"]
    assert source["type"] == "machine-learning-model"
    assert source["hashes"] == [{"alg": "SHA-256", "content": manifest.model.sha256}]
    main = bom["metadata"]["component"]
    pruned = json.loads((encoder / "stages" / "prune.json").read_text(encoding="utf-8"))
    assert main["hashes"] == [{"alg": "SHA-256", "content": pruned["state_sha256"]}]
    assert [part["bom-ref"] for part in main["pedigree"]["ancestors"]] == ["source-model"]
    assert {"name": "prox24:verdict", "value": "pass"} in main["properties"]
    needs = {entry["ref"]: set(entry.get("dependsOn", ())) for entry in bom["dependencies"]}
    assert "library:onnxruntime" in needs["tool"]
    assert {"source-model", "tool", "file:onnx/sparse/model.onnx"} <= needs["pruned-model"]
    second = tmp_path / "second.json"
    assert run_cli("package", encoder, "--sbom", second).code == 0
    again = json.loads(second.read_text(encoding="utf-8"))
    bom["metadata"].pop("timestamp")
    again["metadata"].pop("timestamp")
    assert again == bom


@pytest.mark.parametrize("module", ["cyclonedx", "jsonschema"])
def test_without_its_library_an_sbom_exits_with_5(
    module: str, encoder: Path, tmp_path: Path
) -> None:
    """In a process of its own, where the library cannot be imported."""
    file = tmp_path / "out.json"
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        f"sys.argv = ['prox24-deploy', 'package', {str(encoder)!r}, '--sbom', {str(file)!r}]\n"
        "from prox24_deploy.cli import main; main()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 5, ran.stderr
    assert "An SBOM needs cyclonedx-python-lib with its validator" in ran.stderr
    assert "pip install 'prox24-deploy[sbom]'." in ran.stderr
    assert not file.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("--checksums", "F", "--twin", "dense"), "have no effect without --triton"),
        (("--sbom", "D"), "is a folder, expected a file"),
        (("--checksums", "D"), "is a folder, expected a file"),
        (("--triton", "F"), "is a file, expected a folder for models"),
    ],
)
def test_an_output_of_the_wrong_kind_is_refused(
    line: tuple[str, ...], message: str, encoder: Path, tmp_path: Path
) -> None:
    (tmp_path / "D").mkdir()
    (tmp_path / "F").write_bytes(b"kept")
    run = run_cli("package", encoder, *(tmp_path / w if w in "DF" else w for w in line))
    assert run.code == 2
    assert message in run.err
    assert snapshot(tmp_path / "D") == {}
    assert (tmp_path / "F").read_bytes() == b"kept"


@pytest.mark.parametrize("option", ["--sbom", "--checksums"])
def test_no_file_is_written_into_the_bundle(option: str, encoder: Path) -> None:
    run = run_cli("package", encoder, option, encoder / "extra")
    assert run.code == 2
    assert "lies in the bundle" in run.err
    assert not (encoder / "extra").exists()


def rebuild(encoder: Path, copy: Path, prose: Path) -> None:
    shapes = ("--shapes", "batch=1,4", "sequence=16")
    model = encoder.parent / "tiny-bert"
    run = run_cli(
        "build", model, "-o", copy, "--calibration", prose, *FAST, *shapes, *ANY_EMBEDDING
    )
    assert run.code == 0, run.err
    assert run_cli("verify", copy).code == 0


def test_the_pruned_directory_carries_a_card_with_the_measured_figures(encoder: Path) -> None:
    path = encoder / "pruned" / "README.md"
    card = ModelCard.load(path)
    assert card.data.license == "mit"
    assert card.data.language == ["en"]
    assert card.data.datasets is None
    assert {"2:4-sparsity", "semi-structured"} <= set(card.data.tags or ())
    assert "dense" not in (card.data.tags or ())
    assert (card.data.library_name, card.data.pipeline_tag) == (
        "transformers",
        "feature-extraction",
    )
    report = load_report(encoder / "report.json")
    for metric in report.accuracy.metrics:
        assert f"| {metric.name} |" in card.text
        assert metric.agreement is not None
        assert f"| {estimate(metric.agreement)} |" in card.text
    assert card.text.rstrip().endswith("# Tiny BERT\n\nIt is tiny.")
    assert str(encoder.parent) not in card.text
    assert read_manifest(encoder).files["pruned/README.md"] == hash_file(path)


@pytest.mark.parametrize("left", ["a card that was not sealed", None])
def test_a_card_that_a_kill_left_does_not_prune_again(
    left: str | None, encoder: Path, copy: Path, prose: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the card and the seal the manifest knows another card, or none."""
    card = copy / "pruned" / "README.md"
    sound = card.read_bytes()
    if left is None:
        card.unlink()
        manifest = read_manifest(copy)
        del manifest.files["pruned/README.md"]
        write_manifest(copy, manifest.model_copy(update={"complete": False}))
    else:
        card.write_text(left, encoding="utf-8")
    assert run_cli("verify", copy).code == 2

    def pruned_again(*_: object, **__: object) -> None:
        raise AssertionError("the stage ran again")

    monkeypatch.setattr("prox24_deploy.pruning.directory.prune_directory", pruned_again)
    rebuild(encoder, copy, prose)
    assert card.read_bytes() == sound
    (copy / "pruned" / "config.json").write_bytes(b"{}")
    model = encoder.parent / "tiny-bert"
    run = run_cli("build", model, "-o", copy, "--calibration", prose, *FAST)
    assert run.code == 1
    assert "the stage ran again" in run.err
