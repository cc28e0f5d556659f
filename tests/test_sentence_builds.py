"""Directories of sentence-transformers, built and held against what that library makes of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from command_line import ANY_EMBEDDING, run_cli
from sentence_models import write_tiny_embedder
from tiny_families import tiny_model
from tiny_models import write_tiny_bert
from tiny_sentences import HIDDEN, NORMALIZE, dense, pooling, write_json, write_modules
from transformers import AutoTokenizer

from prox24_deploy.config.recipe import EMBEDDING
from prox24_deploy.report.assemble import Report, load_report

SMALL = (
    "--calibration-tokens", "2048", "--method", "magnitude", "--shapes", "batch=1", "sequence=8",
)  # fmt: skip
# What a user might type: capitals, a text of one letter, one that is cut, and none at all.
TEXTS = ["Sparse WEIGHTS", "a", "kernel token " * 30, ""]


def build(model: Path, out: Path, prose: Path) -> Report:
    # Every paragraph counts, so that the library can be asked about the same texts.
    done = run_cli(
        "build", model, "-o", out, "--calibration", prose, "--evaluation", prose,
        "--evaluation-tokens", "100000", *SMALL, *ANY_EMBEDDING,
    )  # fmt: skip
    assert done.code == 0, done.err
    return load_report(out / "report.json")


def opened(path: Path) -> Any:
    library = pytest.importorskip("sentence_transformers")
    return library.SentenceTransformer(str(path), device="cpu", local_files_only=True)


def through_onnx(file: Path, model: Any, texts: list[str]) -> Any:
    """Embeddings of texts, read by the library as it would read them, through an ONNX file."""
    prompt = model.prompts.get(model.default_prompt_name) or ""
    features = model.preprocess([prompt + text for text in texts])
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    ids = features["input_ids"].numpy()
    known = {name: tensor.numpy() for name, tensor in features.items() if hasattr(tensor, "numpy")}
    feeds = {put.name: known.get(put.name, np.zeros_like(ids)) for put in session.get_inputs()}
    return session.run([EMBEDDING], feeds)[0]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that a directory can say of texts and embeddings at once."""
    path = write_tiny_embedder(
        tmp_path_factory.mktemp("models") / "embedder",
        pooling("mean", "max"), dense(2 * HIDDEN, 24), NORMALIZE,
        max_seq_length=24, do_lower_case=True,
    )  # fmt: skip
    prompts = {"prompts": {"query": "Query: "}, "default_prompt_name": "query"}
    write_json(path / "config_sentence_transformers.json", prompts)
    return path


@pytest.fixture(scope="module")
def built(
    embedder: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("bundles") / "out"
    return out, build(embedder, out, prose)


def test_the_onnx_file_gives_what_the_library_gives(built: tuple[Path, Report]) -> None:
    out, _ = built
    model = opened(out / "pruned")
    expected = model.encode(TEXTS)
    assert expected.shape == (len(TEXTS), 24)
    found = through_onnx(out / "onnx" / "sparse" / "model.onnx", model, TEXTS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_the_figures_are_those_of_the_library_s_embeddings(
    built: tuple[Path, Report], embedder: Path, prose: Path
) -> None:
    out, report = built
    texts = prose.read_text(encoding="utf-8").split("\n\n")
    assert report.accuracy.samples == len(texts)
    first, second = (opened(path).encode(texts) for path in (embedder, out / "pruned"))
    cosines = (first * second).sum(1)
    assert cosines.std() > 1e-3
    told = report.accuracy.agreement
    assert told is not None
    assert told.value == pytest.approx(float(cosines.mean()), abs=1e-5)
    (engine,) = report.accuracy.engines
    assert all(one.passed is not False for one in engine.parity)
    assert engine.metrics[0].agreement is not None
    assert engine.metrics[0].agreement.value == pytest.approx(told.value, abs=1e-5)


def test_a_bundle_has_the_modules_and_names_the_output(
    built: tuple[Path, Report], embedder: Path, tmp_path: Path
) -> None:
    out, report = built
    for name in ("modules.json", "2_Dense/model.safetensors", "1_Pooling/config.json"):
        assert (out / "pruned" / name).read_bytes() == (embedder / name).read_bytes()
    checked = {check.name for check in report.checks if check.kind == "numerics"}
    assert {f"sparse {EMBEDDING}", f"dense {EMBEDDING}"} <= checked
    reasons = {layer.name: layer.reason for layer in report.pruning.layers if layer.reason}
    name = "sentence_modules.steps.2_Dense.linear"
    assert reasons[name] == "part of the sentence embedding, which runs once a text and stays dense"
    assert any(name in warning for warning in report.warnings)
    card = (out / "pruned" / "README.md").read_text(encoding="utf-8")
    assert "SentenceTransformer(" in card
    assert f"`{EMBEDDING}`" in card
    packed = run_cli("package", out, "--triton", tmp_path / "models", "--force")
    assert packed.code == 0, packed.err
    (config,) = (tmp_path / "models").glob("*/config.pbtxt")
    assert f'name: "{EMBEDDING}"' in config.read_text(encoding="utf-8")


def test_a_decoder_that_embeds_is_built_without_its_cache(prose: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    tiny_model("qwen3, sentences", vocab_size=260).save_pretrained(path)  # type: ignore[operator]
    AutoTokenizer.from_pretrained(write_tiny_bert(tmp_path / "bert")).save_pretrained(path)
    write_modules(path, pooling("lasttoken"), NORMALIZE, max_seq_length=24)
    report = build(path, tmp_path / "out", prose)
    assert (report.model.task, report.model.family) == ("feature-extraction", "qwen3")
    model = opened(tmp_path / "out" / "pruned")
    found = through_onnx(tmp_path / "out" / "onnx" / "sparse" / "model.onnx", model, TEXTS[:3])
    np.testing.assert_allclose(found, model.encode(TEXTS[:3]), rtol=0, atol=1e-5)


def test_a_module_that_is_not_known_costs_no_work(
    embedder: Path, prose: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(embedder, tmp_path / "model"))
    listed = json.loads((path / "modules.json").read_bytes())
    listed[2]["type"] = "sentence_transformers.models.LSTM"
    write_json(path / "modules.json", listed)
    done = run_cli("build", path, "-o", tmp_path / "out", "--calibration", prose)
    assert done.code == 2
    assert "lists the module LSTM, expected Pooling, Dense, LayerNorm" in done.err
    assert not (tmp_path / "out").exists()
