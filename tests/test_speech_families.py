"""A model of speech from a directory and a folder of recordings to a proven bundle."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from command_line import run_cli
from tiny_models import write_recordings, write_tiny_whisper
from transformers import AutoModelForSpeechSeq2Seq

from prox24_deploy.report.schema import load_report

START, POSITIONS = 2, 24


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a model of speech, calibrated on recordings with transcripts."""
    folder = tmp_path_factory.mktemp("speech")
    model_dir = write_tiny_whisper(folder / "model")
    out, speech = folder / "out", write_recordings(folder / "in", 10)
    (speech / "list.jsonl").write_text(
        "\n".join(json.dumps({"audio": f"{i}.wav", "text": f"number {i}"}) for i in range(10))
    )
    done = run_cli(
        "build", model_dir, "-o", out, "--calibration", speech, "--method", "magnitude",
        "--shapes", "batch=1", "sequence=8,16",
    )  # fmt: skip
    # Two recordings are held out, and fewer than three decide nothing.
    assert done.code == 5, done.err
    return out


def test_a_model_of_speech_is_built_as_two_graphs_and_judged_by_its_words(out: Path) -> None:
    report = load_report(out / "report.json")
    proven = [tensor for tensor in report.sparsity.tensors if tensor.expected and tensor.is_24]
    assert len(proven) == report.pruning.totals.pruned == 16
    calibration = report.pruning.calibration
    assert (calibration.unit, calibration.samples, calibration.targets) == ("recording", 8, 8)
    names = [metric.name for metric in report.accuracy.metrics]
    assert names[:3] == ["word error rate", "word error rate to dense", "perplexity"]
    assert [metric.samples for metric in report.accuracy.metrics] == [2] * 6
    assert report.sentence.startswith("Inconclusive on accuracy: word error rate ")
    assert ", 2 samples, too few to tell" in report.sentence
    assert report.parts.export.verdict == report.parts.sparsity.verdict == "pass"
    # Engines are forced along the targets, and write no words of their own.
    (engine,) = report.accuracy.engines
    assert [metric.name for metric in engine.metrics] == names[2:]
    assert all(one.passed is not False for one in engine.parity)
    assert any("word error rate" in one and "engine" in one for one in report.warnings)
    # The encoder has no axis for a sequence.
    rows = [(row.graph, row.sequence) for row in report.latency]
    assert rows == [("encoder", 0), ("decoder", 8), ("decoder", 16)]
    inputs = onnx.load(out / "onnx" / "sparse" / "encoder.onnx").graph.input
    shapes = [[d.dim_value for d in one.type.tensor_type.shape.dim] for one in inputs]
    assert shapes == [[0, 8, 20]]
    assert run_cli("check", out / "pruned").code == 0
    assert (out / "pruned" / "preprocessor_config.json").is_file()
    AutoModelForSpeechSeq2Seq.from_pretrained(out / "pruned")
    card = (out / "pruned" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: automatic-speech-recognition" in card
    assert "8 recordings given by its maker" in card


def test_recordings_are_written_down_with_the_cache_as_transformers_does(out: Path) -> None:
    model = AutoModelForSpeechSeq2Seq.from_pretrained(out / "pruned").eval()
    encoder, decoder = (
        ort.InferenceSession(
            out / "onnx" / "sparse" / f"{graph}.onnx", providers=["CPUExecutionProvider"]
        )
        for graph in ("encoder", "decoder")
    )
    features = np.random.default_rng(0).standard_normal((3, 8, 20), dtype=np.float32)
    # The end token would be written here and there.
    model.generation_config.eos_token_id = None
    expected = model.generate(
        torch.from_numpy(features), do_sample=False, max_new_tokens=POSITIONS - 1,
        force_unique_generate_call=True,
    )  # fmt: skip
    (states,) = encoder.run(None, {"input_features": features})
    names = [one.name for one in decoder.get_inputs() if one.name.startswith("past_key_values.")]
    assert len(names) == 2
    cache = {name: np.zeros((3, 2, 0, 16), np.float32) for name in names}
    written = np.full((3, 1), START)
    for _ in range(POSITIONS - 1):
        feeds = {"input_ids": written[:, -1:], "encoder_hidden_states": states, **cache}
        logits, *present = decoder.run(None, feeds)
        cache = dict(zip(names, present, strict=True))
        written = np.concatenate([written, logits[:, -1].argmax(-1)[:, None]], axis=1)
    assert len(np.unique(written)) > 8
    assert len(np.unique(written, axis=0)) == 3
    assert written.tolist() == expected.tolist()


def test_a_model_of_speech_without_recordings_or_extractor_is_refused(tmp_path: Path) -> None:
    model_dir = write_tiny_whisper(tmp_path / "model")
    refused = run_cli("build", model_dir, "-o", tmp_path / "out")
    assert refused.code == 2
    assert "Speech models have no built-in calibration data; pass --calibration" in refused.err
    speech = write_recordings(tmp_path / "in", 8)
    (model_dir / "preprocessor_config.json").unlink()
    refused = run_cli("build", model_dir, "-o", tmp_path / "out", "--calibration", speech)
    assert refused.code == 2
    assert "has no feature extractor that opens" in refused.err
    assert not (tmp_path / "out").exists()
