"""The whole path on small models: what a user may rely on after `build` has ended."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fake_harness
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from command_line import ANY_EMBEDDING, run_cli, snapshot
from onnx import numpy_helper
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prox24_deploy.cli import build as building
from prox24_deploy.engines.base import Array, Feeds
from prox24_deploy.engines.onnxruntime import OrtSession
from prox24_deploy.report.schema import Report
from prox24_deploy.sparsity.pattern import is_24

ENCODER_LAYERS = 12
DECODER_LAYERS = 14
SMALL = (
    "--calibration-tokens", "4096", "--evaluation-tokens", "2048", "--shapes", "batch=1,2",
    "sequence=16",
)  # fmt: skip


# Where a program might leave something.
PLACES = ("home", "tmp", "cwd")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, prose: Path) -> Path:
    out = tmp_path_factory.mktemp("encoder") / "bundle"
    run = run_cli("build", tiny_bert, "-o", out, "--calibration", prose, *SMALL, *ANY_EMBEDDING)
    assert run.code == 0, run.err
    return out


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, prose: Path) -> Path:
    out = tmp_path_factory.mktemp("decoder") / "bundle"
    run = run_cli(
        "build", tiny_llama, "-o", out, "--calibration", prose, "--evaluation", prose,
        "--dtype", "float16", *SMALL,
    )  # fmt: skip
    assert run.code == 0, run.err
    return out


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, prose: Path) -> Path:
    """A folder with `out`, the encoder built by a process whose places are all in that folder."""
    root = tmp_path_factory.mktemp("elsewhere")
    places = {name: root / name for name in PLACES}
    for place in places.values():
        place.mkdir()
    shutil.copytree(tiny_bert, root / "model")
    # The command itself has to switch these off.
    inherited = {k: v for k, v in os.environ.items() if k not in {"ORT_DISABLE_TELEMETRY", "CI"}}
    environment = inherited | {
        "HOME": str(places["home"]),
        "XDG_CACHE_HOME": str(places["home"] / ".cache"),
        "TMPDIR": str(places["tmp"]),
        # Sets and names in another order.
        "PYTHONHASHSEED": "12345",
    }
    command = [
        sys.executable, "-m", "prox24_deploy", "build", str(root / "model"), "-o",
        str(root / "out"), "--calibration", str(prose), *SMALL, *ANY_EMBEDDING,
    ]  # fmt: skip
    ran = subprocess.run(
        command, env=environment, cwd=places["cwd"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return root


@pytest.fixture
def copy(encoder: Path, tmp_path: Path) -> Iterator[Path]:
    """The encoder's bundle, to be damaged."""
    yield Path(shutil.copytree(encoder, tmp_path / "bundle"))
    shutil.rmtree(tmp_path / "bundle")


def read_report(bundle: Path) -> Report:
    return Report.model_validate_json((bundle / "report.json").read_bytes())


@pytest.mark.parametrize(("name", "layers"), [("encoder", 12), ("decoder", 14)])
def test_the_bundle_has_the_layout_of_the_contract(
    name: str, layers: int, request: pytest.FixtureRequest
) -> None:
    bundle: Path = request.getfixturevalue(name)
    top = {path.name for path in bundle.iterdir()}
    assert top == {
        "manifest.json", "report.json", "report.html", "summary.md", "junit.xml", "benchmark.json",
        "pruned", "onnx", "engines", "stages",
    }  # fmt: skip
    report = read_report(bundle)
    assert report.verdict == "pass"
    assert report.pruning.totals.pruned == layers
    assert sum(check.expected and check.is_24 for check in report.sparsity.tensors) == layers
    assert {row.batch for row in report.latency} == {1, 2}


def test_pruned_weights_are_24_and_all_others_untouched(decoder: Path, tiny_llama: Path) -> None:
    """But for the rows that are in another order since the layer behind them reads them so."""
    report = read_report(decoder)
    moved = {name for order in report.pruning.orders for name in order.tensors}
    assert moved
    pruned = {f"{layer.name}.weight" for layer in report.pruning.layers if layer.status == "pruned"}
    assert len(pruned) == DECODER_LAYERS
    seen = set()
    for shard in sorted(tiny_llama.glob("*.safetensors")):
        before, after = load_file(shard), load_file(decoder / "pruned" / shard.name)
        assert before.keys() == after.keys()
        for name in before:
            if name in pruned:
                seen.add(name)
                assert is_24(after[name])
                assert not torch.equal(before[name], after[name])
            else:
                assert name not in moved
                assert torch.equal(before[name], after[name]), name
    assert seen == pruned
    skipped = {layer.name: layer.reason for layer in report.pruning.layers} | {}
    assert "shares its weight with model.embed_tokens" in skipped["lm_head"]


def test_the_pruned_directory_scores_the_reported_perplexity(decoder: Path, prose: Path) -> None:
    """Recomputed with transformers alone, from the text and the loss of the model itself."""
    model = AutoModelForCausalLM.from_pretrained(decoder / "pruned", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(decoder / "pruned")
    stream: list[int] = []
    for paragraph in prose.read_text(encoding="utf-8").split("\n\n"):
        stream += [tokenizer.bos_token_id, *tokenizer(paragraph)["input_ids"]]
    windows = torch.tensor(stream[:2048]).view(-1, 64)
    with torch.no_grad():
        losses = [float(model(row[None], labels=row[None]).loss) for row in windows]
    metric = read_report(decoder).accuracy.metrics[0]
    assert metric.name == "perplexity"
    assert metric.sparse is not None
    assert metric.dense is not None
    assert metric.sparse.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert metric.sparse.standard_error > 0
    assert metric.dense.standard_error > 0


def test_the_engine_scores_what_its_outputs_say(decoder: Path, prose: Path) -> None:
    """Perplexity and divergence of the float16 files, run and scored without any of our code."""
    tokenizer = AutoTokenizer.from_pretrained(decoder / "pruned")
    stream: list[int] = []
    for paragraph in prose.read_text(encoding="utf-8").split("\n\n"):
        stream += [tokenizer.bos_token_id, *tokenizer(paragraph)["input_ids"]]
    rows = np.array(stream[:2048], np.int64).reshape(-1, 64)
    logs = []
    for twin in ("dense", "sparse"):
        session = ort.InferenceSession(
            decoder / "onnx" / twin / "model.onnx", providers=["CPUExecutionProvider"]
        )
        feeds = {"input_ids": rows, "attention_mask": np.ones_like(rows)} | {
            entry.name: np.zeros((len(rows), entry.shape[1], 0, entry.shape[3]), np.float16)
            for entry in session.get_inputs()
            if entry.name.startswith("past")
        }
        logits = np.asarray(session.run(["logits"], feeds)[0])[:, :-1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        logs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    losses = [-np.take_along_axis(log, rows[:, 1:, None], -1)[..., 0].mean(1) for log in logs]
    divergence = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean(1)
    (engine,) = read_report(decoder).accuracy.engines
    assert (engine.backend, engine.dtype, engine.longest) == ("onnxruntime", "float16", None)
    assert engine.samples == engine.available == len(rows)
    found = {metric.name: metric for metric in engine.metrics}
    for estimate, loss in zip(
        (found["perplexity"].dense, found["perplexity"].sparse), losses, strict=True
    ):
        assert estimate is not None
        assert estimate.value == pytest.approx(math.exp(loss.mean()), rel=1e-5)
        error = math.exp(loss.mean()) * loss.std(ddof=1) / math.sqrt(len(rows))
        assert estimate.standard_error == pytest.approx(error, rel=1e-3)
    told = found["KL divergence"].agreement
    assert told is not None
    assert told.value == pytest.approx(divergence.mean(), rel=1e-3)
    assert all(one.passed is not False for one in engine.parity)
    near = [one.agreement for one in engine.parity if one.metric == "KL divergence"]
    assert all(each is not None and 0 < each.value < 1e-5 for each in near)


def test_an_engine_that_departs_from_pytorch_fails_the_build(
    copy: Path, tiny_bert: Path, prose: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted behind the seam; only the stages that depend on it run again."""
    infer = OrtSession.infer

    def wrong(self: OrtSession, feeds: Feeds) -> dict[str, Array]:
        noise = np.random.default_rng(0)
        found = infer(self, feeds)
        if "sparse" not in self._source:
            return found
        return {n: a + noise.standard_normal(a.shape, np.float32) for n, a in found.items()}

    monkeypatch.setattr(OrtSession, "infer", wrong)
    line = (
        "build", tiny_bert, "-o", copy, "--calibration", prose, *SMALL, *ANY_EMBEDDING,
        "--engine-tokens",
    )  # fmt: skip
    assert run_cli(*line, "1100").code == 3
    report = read_report(copy)
    # Noise also tells equal rows of a batch apart.
    failed, rows = report.regressions
    assert rows.name == "onnxruntime sparse equal rows"
    assert (failed.name, failed.part) == ("onnxruntime sparse embedding cosine", "export")
    assert "the engine does not do what PyTorch does" in failed.message
    assert report.sentence.startswith("Failed on export: onnxruntime sparse embedding cosine")
    assert "deviates from PyTorch" in (copy / "summary.md").read_text(encoding="utf-8")
    (engine,) = report.accuracy.engines
    assert 0 < engine.samples < engine.available
    for name, text in (("report.html", ">fail</td>"), ("junit.xml", "<failure")):
        assert text in (copy / name).read_text(encoding="utf-8")
    monkeypatch.setattr(OrtSession, "infer", lambda *_: {"last_hidden_state": np.full(1, np.nan)})
    assert run_cli(*line, "1200").code == 3
    (failed_engine,) = read_report(copy).accuracy.engines_failed
    assert "is NaN or infinite" in failed_engine.reason


def test_tasks_are_scored_on_the_same_documents_and_gated_by_a_baseline(
    decoder: Path, tiny_llama: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the tasks are run anew; a stand-in for the harness asks the real models."""
    out, data, shipped = tmp_path / "bundle", tmp_path / "data", tmp_path / "shipped"
    shutil.copytree(decoder, out)
    fake_harness.install(monkeypatch, shipped)
    for folder in (data / "known", shipped):
        folder.mkdir(parents=True)
    (shipped / "known.yaml").write_text("{task: known, dataset_path: hub, test_split: validation}")
    lines = prose.read_text(encoding="utf-8").split("\n\n")[:12]
    (data / "known" / "validation.jsonl").write_text("\n".join(lines), encoding="utf-8")
    line = (
        "build", tiny_llama, "-o", out, "--calibration", prose, "--evaluation", prose,
        "--dtype", "float16", *SMALL,
    )  # fmt: skip
    asked = (
        "--lm-eval", "known", "--lm-eval-data", data, "--accept-loss", "lm-eval/known/acc=1",
    )  # fmt: skip
    run = run_cli(*line, *asked)
    assert run.code == 0, run.err
    assert "already-initialized" not in run.err
    report = read_report(out)
    tasks = report.accuracy.tasks
    assert tasks is not None
    (metric,) = tasks.metrics
    assert (metric.name, metric.samples, tasks.limit) == ("known/acc", 12, None)
    assert tasks.left_out == ("known/odd",)
    assert any("are left out: known/odd" in warning for warning in report.warnings)
    assert metric.dense is not None
    assert metric.sparse is not None
    assert metric.difference is not None
    gap = metric.sparse.value - metric.dense.value
    assert gap != 0
    assert metric.difference.value == pytest.approx(gap)
    models = [
        fake_harness.HFLM(
            pretrained=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
            tokenizer=AutoTokenizer.from_pretrained(path), batch_size=1, backend="causal",
        )
        for path in (tiny_llama, out / "pruned")
    ]  # fmt: skip
    with torch.no_grad():
        scores = [[fake_harness.score(model, text) for text in lines] for model in models]
    assert metric.dense.value == pytest.approx(np.mean(scores[0]))
    assert metric.values == pytest.approx(scores[1])
    for view in ("report.html", "summary.md", "junit.xml", "pruned/README.md"):
        assert "known/acc" in (out / view).read_text(encoding="utf-8"), view
    kept = Path(shutil.copy(out / "report.json", tmp_path / "baseline.json"))
    before = snapshot(out)
    assert run_cli(*line, *asked).code == 0
    after = snapshot(out)
    assert {n for n in before if before[n] != after.get(n)} <= {"manifest.json"}
    run = run_cli(*line, *asked, "--lm-eval-limit", "8", "--baseline", kept)
    assert run.code in {0, 3, 5}, run.err
    again = read_report(out)
    assert any("on their first 8 documents alone" in warning for warning in again.warnings)
    assert again.baseline is not None
    change = next(c for c in again.baseline.changes if c.name == "lm-eval/known/acc")
    assert change.gated
    assert run_cli(*line).code == 0
    assert read_report(out).accuracy.tasks is None
    held = run_cli("compare", out, kept)
    assert held.code == 3
    assert "lm-eval/known/acc" in held.out


def test_tasks_that_cannot_be_run_are_refused_before_any_work(
    tiny_llama: Path, tiny_bert: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(model: Path, *options: str | Path) -> tuple[int, str]:
        run = run_cli("build", model, "-o", tmp_path / "out", "--calibration", prose, *options)
        assert not (tmp_path / "out" / "pruned").exists()
        return run.code, " ".join(run.err.split())

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, said = refused(tiny_llama, "--lm-eval", "hellaswag")
    assert code == 5
    assert "install the extra lm-eval with pip install 'prox24-deploy[lm-eval]'" in said
    monkeypatch.undo()
    fake_harness.install(monkeypatch, tmp_path / "shipped")
    code, said = refused(tiny_llama, "--lm-eval", "hellaswag")
    assert code == 2
    assert "--lm-eval hellaswag names no task of the harness" in said
    code, said = refused(tiny_bert, "--lm-eval", "hellaswag")
    assert code == 2
    assert "is for models of the task text-generation" in said
    code, said = refused(tiny_llama, "--lm-eval-limit", "5")
    assert code == 2
    assert "have no effect without a task; add --lm-eval TASK" in said


def test_check_names_every_pruned_module_of_the_sparse_twin(encoder: Path) -> None:
    run = run_cli("check", encoder / "onnx" / "sparse")
    assert run.code == 0
    for layer in read_report(encoder).pruning.layers:
        if layer.status == "pruned":
            assert f" {layer.name} " in run.out
    assert run_cli("check", encoder / "pruned").code == 0


def test_check_of_the_dense_twin_exits_with_4(encoder: Path) -> None:
    run = run_cli("check", encoder / "onnx" / "dense")
    assert run.code == 4
    assert "is not 2:4 along axis 0" in run.err


def test_one_zero_made_non_zero_in_the_onnx_file_is_found(copy: Path) -> None:
    path = copy / "onnx" / "sparse" / "model.onnx"
    model = onnx.load(path)
    target = next(t for t in model.graph.initializer if tuple(t.dims) == (32, 64))
    values = numpy_helper.to_array(target).copy()
    column = values[:, 7]
    kept = np.flatnonzero(column.reshape(-1, 4).astype(bool).sum(1) == 2)
    group = int(kept[3])
    empty = int(np.flatnonzero(column[4 * group : 4 * group + 4] == 0)[0])
    values[4 * group + empty, 7] = 0.5
    target.CopyFrom(numpy_helper.from_array(values, target.name))
    onnx.save(model, path)
    run = run_cli("check", copy / "onnx" / "sparse")
    assert run.code == 4
    assert repr(target.name) in run.err
    assert "axis 0" in run.err
    assert f"group [{4 * group}:{4 * group + 4}, 7]" in run.err
    verified = run_cli("verify", copy)
    assert verified.code == 2
    assert "onnx/sparse/model.onnx was changed" in verified.err


def test_one_flipped_byte_in_any_file_is_named_by_verify(copy: Path) -> None:
    assert run_cli("verify", copy).code == 0
    draw = random.Random(0)
    files = [path for path in copy.rglob("*") if path.is_file()]
    assert len(files) > 15
    for path in files:
        sound = path.read_bytes()
        position = draw.randrange(len(sound))
        path.write_bytes(
            sound[:position]
            + bytes([sound[position] ^ (1 << draw.randrange(8))])
            + sound[position + 1 :]
        )
        run = run_cli("verify", copy)
        path.write_bytes(sound)
        assert run.code == 2, path
        assert path.relative_to(copy).as_posix() in run.err
    assert run_cli("verify", copy).code == 0


def test_a_second_build_runs_no_stage_again(copy: Path, tiny_bert: Path, prose: Path) -> None:
    before = snapshot(copy)
    run = run_cli("build", tiny_bert, "-o", copy, "--calibration", prose, *SMALL, *ANY_EMBEDDING)
    assert run.code == 0
    after = snapshot(copy)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed <= {"manifest.json"}


def test_a_changed_stage_file_is_made_again(copy: Path, tiny_bert: Path, prose: Path) -> None:
    weights = copy / "onnx" / "sparse" / "model.onnx"
    sound = snapshot(copy)
    weights.write_bytes(b"rubbish")
    run = run_cli("build", tiny_bert, "-o", copy, "--calibration", prose, *SMALL, *ANY_EMBEDDING)
    assert run.code == 0, run.err
    assert snapshot(copy)["onnx/sparse/model.onnx"] == sound["onnx/sparse/model.onnx"]
    assert run_cli("verify", copy).code == 0


def test_the_same_seed_gives_the_same_bits(encoder: Path, elsewhere: Path) -> None:
    """A second run from nothing, in another process and place."""
    first, second = snapshot(encoder), snapshot(elsewhere / "out")
    compared = [
        name for name in second
        if name.startswith(("pruned/", "onnx/")) and name != "pruned/README.md"
    ]  # fmt: skip
    assert len([name for name in compared if second[name] != "folder"]) >= 6
    assert {n: second[n] for n in compared} == {n: first[n] for n in compared}


def test_another_seed_takes_other_builtin_text(tiny_bert: Path, tmp_path: Path) -> None:
    hashes = set()
    for seed in ("0", "1"):
        out = tmp_path / seed
        run = run_cli(
            "prune", tiny_bert, "-o", out, "--seed", seed, "--preset", "fast", "--json",
            "--calibration-tokens", "1024", "--evaluation-tokens", "1024",
        )  # fmt: skip
        assert run.code == 0, run.err
        result = json.loads(run.out)
        assert result["calibration"]["kind"] == "builtin"
        hashes.add(result["calibration"]["sha256"])
    assert len(hashes) == 2


def test_json_prints_one_object_and_nothing_else(encoder: Path) -> None:
    checked = json.loads(run_cli("check", encoder / "onnx" / "sparse", "--json").out)
    assert {t["is_24"] for t in checked["tensors"] if t["expected"]} == {True}
    assert json.loads(run_cli("verify", encoder, "--json").out)["sound"] is True
    doctor = json.loads(run_cli("doctor", "--json").out)
    assert any(finding["name"] == "torch" for finding in doctor["findings"])


def test_single_stages_go_on_from_each_other(copy: Path) -> None:
    compiled = run_cli("compile", copy, "--backend", "onnxruntime")
    assert compiled.code == 0
    assert "no sparse kernels" in compiled.out
    measured = run_cli("bench", copy, "--shapes", "batch=3", "sequence=8", "--json")
    assert measured.code == 0, measured.err
    rows = json.loads(measured.out)["latency"]
    assert [(row["batch"], row["sequence"]) for row in rows] == [(3, 8)]
    again = run_cli("bench", copy, "--shapes", "batch=3", "sequence=8")
    assert again.code == 0
    assert "onnxruntime" in again.out
    exported = run_cli("export", copy, "--dtype", "float16", "--json")
    assert exported.code == 0
    assert json.loads(exported.out)["sparse"][0]["dtype"] == "float16"


def test_export_refuses_a_model_that_changed_since(
    tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    out = tmp_path / "out"
    pruned = run_cli(
        "prune", model, "-o", out, "--calibration", prose, "--preset", "fast", *SMALL[:4]
    )
    assert pruned.code == 0
    assert f"{ENCODER_LAYERS} layers are 2:4" in pruned.out
    (model / "config.json").write_text(
        (model / "config.json").read_text(encoding="utf-8") + "\n", encoding="utf-8"
    )
    run = run_cli("export", out)
    assert run.code == 2
    assert "has changed since" in run.err


def test_the_exit_code_follows_verdict_and_sparsity(encoder: Path) -> None:
    report = read_report(encoder)
    assert building.exit_code(report) == 0
    assert building.exit_code(report.model_copy(update={"verdict": "fail"})) == 3
    assert building.exit_code(report.model_copy(update={"verdict": "inconclusive"})) == 5
    lost = tuple(
        check.model_copy(update={"verdict": "fail"}) if check.kind == "sparsity" else check
        for check in report.checks
    )
    assert building.exit_code(report.model_copy(update={"checks": lost, "verdict": "fail"})) == 4


def test_nothing_is_written_outside_the_output(elsewhere: Path, tiny_bert: Path) -> None:
    """Home, caches, temporary files and the working directory stay as they are."""
    assert {path.name for path in elsewhere.iterdir()} == {*PLACES, "model", "out"}
    assert all(snapshot(elsewhere / place) == {} for place in PLACES)
    assert snapshot(elsewhere / "model") == snapshot(tiny_bert)


def test_a_budget_prunes_the_least_harmful_layers_and_globs_narrow_the_rest(
    tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    line = (
        "build", tiny_bert, "-o", bundle, "--calibration", prose, "--layers", "3",
        "--exclude", "intermediate.dense", "--preset", "fast", *SMALL, *ANY_EMBEDDING,
    )  # fmt: skip
    run = run_cli(*line)
    assert run.code == 0, run.err
    report = read_report(bundle)
    budget = report.pruning.sensitivity
    assert budget is not None
    assert (budget.chosen, budget.max_layers, budget.max_loss) == (3, 3, None)
    pruned = {layer.name for layer in report.pruning.layers if layer.status == "pruned"}
    assert pruned == {layer.name for layer in budget.layers[:3]}
    assert len(budget.layers) == ENCODER_LAYERS - 2
    reasons = {layer.reason for layer in report.pruning.layers if layer.status == "skipped"}
    assert "excluded by --exclude intermediate.dense" in reasons
    assert any(reason.startswith("over the budget of --layers 3") for reason in reasons)
    proven = {c.module for c in report.sparsity.tensors if c.expected and c.is_24}
    assert proven == pruned
    refused = run_cli(*line[:4], "--calibration", prose, "--max-loss", "1e-9", *SMALL)
    assert refused.code == 2
    assert "more than --max-loss 1e-09; raise the limit." in refused.err
