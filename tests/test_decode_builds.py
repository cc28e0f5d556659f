"""Decoders are timed and scored in prefill and in decoding, by every backend that is here."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import run_cli
from fake_cuda import RUN_MS, install
from tiny_models import write_tiny_bart

from prox24_deploy.report.schema import load_report

SMALL = (
    "--calibration-tokens", "2048", "--evaluation-tokens", "1024", "--engine-tokens", "1024",
    "--method", "magnitude",
)  # fmt: skip
DECODE = ("--shapes", "batch=1,2", "sequence=16", "past=24")
PASSED = {0, 3, 5}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, prose: Path) -> Path:
    """A decoder through ONNX Runtime, in prefill and in decoding."""
    out = tmp_path_factory.mktemp("decode") / "bundle"
    run = run_cli(
        "build", tiny_llama, "-o", out, "--calibration", prose, "--dtype", "float32", "--device",
        "cpu", "--backend", "onnxruntime", *SMALL, *DECODE,
    )  # fmt: skip
    assert run.code in PASSED, run.err
    return out


def rows_of(report: dict[str, Any]) -> list[tuple[int, int, int]]:
    return [(row["batch"], row["sequence"], row["past"]) for row in report["latency"]]


def test_prefill_and_decoding_are_rows_of_their_own(bundle: Path) -> None:
    report = json.loads((bundle / "report.json").read_text())
    assert rows_of(report) == [(1, 16, 0), (2, 16, 0), (1, 1, 24), (2, 1, 24)]
    names = [one["name"] for one in json.loads((bundle / "benchmark.json").read_text())]
    row = "onnxruntime, batch 2, sequence 1, past 24, sparse"
    assert {f"{row} median", f"{row} per token"} <= {*names}
    assert "tokens/s" in (bundle / "summary.md").read_text().lower()
    page = (bundle / "report.html").read_text()
    assert "Tokens/s, sparse" in page
    assert "batch 1, sequence 1, past 24: " in page.partition('class="note">onnxruntime')[2]


def test_time_per_token_and_pace_follow_from_the_median(bundle: Path) -> None:
    for row in load_report(bundle / "report.json").latency:
        each = row.ms_per_token(row.sparse)
        assert each == pytest.approx(row.sparse.median_ms / row.sequence)
        pace = row.tokens_per_second(row.sparse)
        assert pace == pytest.approx(1e3 * row.batch * row.sequence / row.sparse.median_ms)


def test_a_decoder_is_scored_token_by_token_behind_its_own_cache(bundle: Path) -> None:
    report = json.loads((bundle / "report.json").read_text())
    (engine,) = report["accuracy"]["engines"]
    decode = engine["decode"]
    assert decode["tokens"] == 16 * decode["samples"]
    assert decode["past"] > 16
    figures = {(one["twin"], one["metric"]): one for one in decode["parity"]}
    for twin in ("dense", "sparse"):
        assert figures[twin, "KL divergence"]["passed"]
        assert figures[twin, "KL divergence"]["agreement"]["value"] < 1e-6
        assert figures[twin, "log-perplexity"]["passed"]
    checks = {check["name"]: check["verdict"] for check in report["checks"]}
    assert checks["onnxruntime sparse log-perplexity, decoding"] == "pass"
    assert "<h4>Decoding</h4>" in (bundle / "report.html").read_text()
    assert "through onnxruntime, decoding (" in (bundle / "summary.md").read_text()


def test_a_report_without_pasts_is_read_as_before(bundle: Path, tmp_path: Path) -> None:
    report = json.loads((bundle / "report.json").read_text())
    for row in report["latency"]:
        del row["past"]
    for engine in report["accuracy"]["engines"]:
        del engine["decode"]
    (tmp_path / "report.json").write_text(json.dumps(report))
    found = load_report(tmp_path / "report.json")
    assert {row.past for row in found.latency} == {0}
    assert found.accuracy.engines[0].decode is None


def test_another_past_is_another_figure(bundle: Path, tmp_path: Path) -> None:
    report = json.loads((bundle / "report.json").read_text())
    report["latency"][-1]["past"] = 25
    (tmp_path / "report.json").write_text(json.dumps(report))
    run = run_cli("compare", bundle, tmp_path / "report.json")
    assert run.code == 2
    assert "onnxruntime/batch=2,sequence=1,past=25" in " ".join(run.err.split())


@pytest.mark.large
def test_the_decoder_of_two_graphs_decodes_and_its_encoder_does_not(
    tmp_path: Path, prose: Path
) -> None:
    run = run_cli(
        "build", write_tiny_bart(tmp_path / "bart"), "-o", tmp_path / "out", "--calibration", prose,
        "--device", "cpu", "--backend", "onnxruntime", *SMALL, *DECODE,
    )  # fmt: skip
    assert run.code in PASSED, run.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    decoded = {row["graph"] for row in report["latency"] if row["past"]}
    assert decoded == {"decoder"}
    decode = report["accuracy"]["engines"][0]["decode"]
    assert decode["past"] == 1
    assert all(one["passed"] is not False for one in decode["parity"])


@pytest.mark.large
def test_cusparselt_decodes_with_layers_chosen_for_it(
    tmp_path: Path, tiny_llama: Path, prose: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a stand-in for the GPU: what runs there is for tests/test_cuda.py to show."""
    install(monkeypatch)
    run = run_cli(
        "build", tiny_llama, "-o", tmp_path / "out", "--calibration", prose, "--dtype", "bfloat16",
        "--device", "cpu", "--backend", "cusparselt", *SMALL, *DECODE,
    )  # fmt: skip
    assert run.code in PASSED, run.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert rows_of(report) == [(1, 16, 0), (2, 16, 0), (1, 1, 24), (2, 1, 24)]
    (evidence,) = report["sparsity"]["engines"]
    running = [layer for layer in evidence["layers"] if layer["chosen"]]
    assert len(running) == 14
    # Rows of a step are those of the batch.
    assert "at 1 rows" in running[0]["reason"]
    assert "at 2 rows" in running[0]["reason"]
    assert all(check["passed"] for check in evidence["numerics"])
    names = {check["output"] for check in evidence["numerics"]}
    assert {"logits", "present.0.key", "present.1.value"} <= names
    for row in report["latency"]:
        assert row["dense"]["median_ms"] == RUN_MS
        assert row["sparse"]["median_ms"] == pytest.approx(RUN_MS - 14 * 0.6)
    decode = report["accuracy"]["engines"][0]["decode"]
    assert all(one["passed"] is not False for one in decode["parity"])


def test_plan_knows_steps_of_decoding(
    tmp_path: Path, tiny_llama: Path, prose: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    arguments = ("plan", tiny_llama, "--calibration", prose, "--device", "cpu", "--no-sensitivity",
                 "--calibration-tokens", "2048", *DECODE)  # fmt: skip
    saved = tmp_path / "gpu.json"
    measured = run_cli(*arguments, "-o", tmp_path / "plan.json", "--save-profile", saved)
    assert measured.code == 0, measured.err
    plan = json.loads((tmp_path / "plan.json").read_text())
    shapes = [(one["batch"], one["sequence"], one["past"]) for one in plan["shapes"]]
    assert shapes == [(1, 16, 0), (2, 16, 0), (1, 1, 24), (2, 1, 24)]
    assert all(one["dense_ms"] == RUN_MS for one in plan["shapes"])
    rows = {gemm["shape"]["m"] for gemm in plan["profile"]["gemms"]}
    assert rows == {1, 2, 16, 32}
    elsewhere = run_cli(*arguments, "--gpu-profile", saved, "--json")
    assert elsewhere.code == 0, elsewhere.err
    found = json.loads(elsewhere.out)
    assert [one["past"] for one in found["shapes"]] == [0, 0, 24, 24]
    timings = found["layers"][0]["choice"]["timings"]
    assert [timing["shape"]["m"] for timing in timings] == [16, 32, 1, 2]


@pytest.mark.parametrize(
    ("model", "past", "message"),
    [
        (
            "tiny_llama",
            64,
            "--shapes past=64 leaves no position for a new token, the model has 64; pass past=63 "
            "or less.",
        ),
        (
            "tiny_bert",
            8,
            "--shapes past=8 asks for decoding with a cache, and models of recipe bert for "
            "feature-extraction keep none; leave past out.",
        ),
    ],
)
@pytest.mark.parametrize("command", ["build", "plan"])
def test_a_past_that_cannot_be_is_refused_before_any_work(
    command: str,
    model: str,
    past: int,
    message: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    prose: Path,
) -> None:
    path = request.getfixturevalue(model)
    run = run_cli(
        command, path, "-o", tmp_path / "out", "--calibration", prose, "--device", "cpu",
        "--shapes", "batch=1", f"past={past}",
    )  # fmt: skip
    assert run.code == 2
    assert message in " ".join(run.err.split())
    assert not (tmp_path / "out").exists()
