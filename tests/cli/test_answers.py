"""Commands end in an answer: what was proven, what a machine can do, how to get what is missing."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import make_records
from command_line import run_cli
from safetensors.torch import load_file, save_file

from prox24_deploy.bundle.environment import abilities, diagnose
from prox24_deploy.cli import tables
from prox24_deploy.config.options import BenchOptions
from prox24_deploy.core.errors import UsageError
from prox24_deploy.latency.measure import DEFAULT_OPTIONS
from prox24_deploy.pipeline.stages.bench import measured_for

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def pruned(
    tiny_bert: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    """A bundle with its pruned model and both twins, and how many weights are 2:4."""
    out = tmp_path_factory.mktemp("answers") / "out"
    line = ("--calibration", prose, "--calibration-tokens", "2048", "--method", "magnitude")
    made = run_cli("prune", tiny_bert, *line, "-o", out)
    assert made.code == 0, made.err
    exported = run_cli("export", out)
    assert exported.code == 0, exported.err
    return out, int(exported.out.split()[0])


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def test_a_bundle_is_proven_in_one_sentence(pruned: tuple[Path, int]) -> None:
    out, weights = pruned
    run = run_cli("check", out)
    assert run.code == 0, run.err
    titles = [line for line in run.out.splitlines() if line.endswith(":")]
    assert titles == ["pruned/, the model in PyTorch:", "onnx/sparse/, its sparse twin in ONNX:"]
    both = f"{weights} weights of pruned and {weights} weights of onnx/sparse are 2:4"
    assert last_line(run.out).startswith(
        f"Proven: {both}, all that must be; of the dense twin 0 of "
    )
    found = json.loads(run_cli("check", out, "--json").out)
    assert found["parts"].keys() == {"pruned", "onnx/sparse"}
    assert found["dense"]["tensors"]


def test_a_bundle_is_no_better_than_its_worst_part(
    pruned: tuple[Path, int], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", pruned[0], copy], check=True)
    (shard,) = (copy / "pruned").glob("*.safetensors")
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("query.weight"))
    tensors[name] = torch.ones_like(tensors[name])
    from safetensors import safe_open

    with safe_open(shard, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, shard, metadata=metadata)
    run = run_cli("check", copy)
    assert run.code == 4
    assert "Proven" not in run.out
    assert "pruned" in last_line(run.err)
    assert "is not 2:4" in last_line(run.err)


@pytest.mark.parametrize("gone", ["onnx/sparse", "onnx/dense", "pruned"])
def test_a_bundle_that_lost_a_part_is_not_proven(
    pruned: tuple[Path, int], tmp_path: Path, gone: str
) -> None:
    copy = shutil.copytree(pruned[0], tmp_path / "copy")
    shutil.rmtree(copy / gone)
    run = run_cli("check", copy)
    assert (run.code, "Proven" in run.out) == (2, False)
    assert f"has lost {gone}/" in run.err


def test_weights_that_no_stage_made_are_not_those_of_a_bundle(
    pruned: tuple[Path, int], tmp_path: Path
) -> None:
    copy = shutil.copytree(pruned[0], tmp_path / "copy")
    shutil.copytree(copy / "pruned", copy / "recovered")
    run = run_cli("check", copy)
    assert (run.code, "recovered/, which no stage of it made" in run.err) == (2, True)
    (copy / "manifest.json").write_text("{}")
    assert run_cli("check", copy).code == 2


def test_a_file_is_proven_in_one_sentence(pruned: tuple[Path, int]) -> None:
    out, weights = pruned
    run = run_cli("check", out / "onnx" / "sparse")
    assert run.code == 0
    assert last_line(run.out).startswith(
        f"Proven: all {weights} weights that it declares to be 2:4"
    )


def test_a_bundle_without_a_pruned_model_is_refused(tmp_path: Path) -> None:
    from prox24_deploy.bundle.bundle import open_bundle

    with open_bundle(tmp_path / "empty"):
        pass
    run = run_cli("check", tmp_path / "empty")
    assert (run.code, run.err.endswith("holds no pruned/; run prune first.\n")) == (2, True)


def test_the_doctor_ends_in_what_the_machine_can_do() -> None:
    run = run_cli("doctor")
    assert "This machine can prune, evaluate, export and prove on the " in " ".join(run.out.split())
    assert json.loads(run_cli("doctor", "--json").out)["conclusion"] == abilities(diagnose())


def test_what_a_machine_lacks_is_said_and_what_a_gpu_adds() -> None:
    found = [f for f in diagnose() if f.name != "GPU"]
    gpu = replace(found[0], name="GPU", usable=True)
    sparse = replace(found[0], name="cuSPARSELt", usable=True)
    others = [f for f in found if f.name != "cuSPARSELt"]
    assert abilities([*others, replace(gpu, usable=False)]).endswith("a backend that has them.")
    assert "can be timed with cusparselt" in abilities([*others, gpu, sparse])
    torch_is_gone = [replace(f, usable=f.name != "torch") for f in found]
    assert abilities(torch_is_gone).startswith("This machine cannot build yet: torch missing")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty local cache of the Hub, and an empty folder to work in."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(cache))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return cache


def put_into(hub: Path, model: Path) -> None:
    """A model as the cache keeps `somebody/tiny`."""
    repository = hub / "models--somebody--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    subprocess.run(["cp", "-r", model, repository / "snapshots" / COMMIT], check=True)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("nobody/no-model", "nobody/no-model"),
        ("bert-base-none", "bert-base-none"),
        ("https://huggingface.co/nobody/no-model", "nobody/no-model"),
        ("https://huggingface.co/nobody/no-model/tree/main", "nobody/no-model"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_the_id_of_a_model_is_answered_with_how_to_fetch_it(given: str, name: str) -> None:
    for command in (
        ("build",), ("prune",), ("rotate",), ("check",), ("plan",), ("recover", "--teacher", "."),
        ("recover", ".", "--teacher"), ("evaluate", ".", "--model"), ("report", ".", "--model"),
    ):  # fmt: skip
        run = run_cli(*command, given)
        folder = name.rpartition("/")[2]
        assert run.code == 2
        assert run.err.startswith(f"Error: {name} does not exist here, and the local cache")
        assert f"hf download {name} --local-dir {folder}; then pass {folder}." in run.err


@pytest.mark.usefixtures("hub")
def test_what_is_no_id_is_not_looked_for_on_the_hub() -> None:
    for name in ("one/two/three", "no--name"):
        assert f"Model directory {name} does not exist" in run_cli("build", name).err
    assert "cache" not in run_cli("check", "none.onnx").err
    run = run_cli("build", "https://example.org/a/b")
    assert (run.code, run.err.partition(" is not ")[0]) == (2, "Error: https://example.org/a/b")


def test_an_id_in_the_local_cache_is_taken_with_its_revision(
    tiny_bert: Path, prose: Path, hub: Path
) -> None:
    put_into(hub, tiny_bert)
    told = f"model somebody/tiny, revision {COMMIT}, from the local cache of the Hub"
    line = ("--calibration", prose, "--calibration-tokens", "2048", "--method", "magnitude")
    run = run_cli("prune", "somebody/tiny", *line)
    assert run.code == 0, run.err
    assert told in run.err
    assert Path("tiny-prox24", "pruned").is_dir()
    assert told in run_cli("check", "https://huggingface.co/somebody/tiny").err
    again = ("tiny-prox24", "--teacher", "somebody/tiny", "--calibration", "none.txt")
    recovered = run_cli("recover", *again)
    assert told in recovered.err


def test_a_run_file_may_name_a_model_of_the_hub(tiny_bert: Path, hub: Path) -> None:
    Path("sub").mkdir()
    file = Path("sub", "run.toml")
    for name in ("somebody/tiny", "https://huggingface.co/somebody/tiny"):
        file.write_text(f'model = "{name}"\ncalibration = ["none.txt"]\n', encoding="utf-8")
        printed = run_cli("build", "--config", file, "--print-config").out
        assert '\nmodel = "somebody/tiny"\n' in printed
        assert "hf download somebody/tiny" in run_cli("build", "--config", file).err
    put_into(hub, tiny_bert)
    assert "from the local cache" in run_cli("build", "--config", file).err
    subprocess.run(["cp", "-r", tiny_bert, "sub/tiny"], check=True)
    file.write_text('model = "tiny"\n', encoding="utf-8")
    printed = run_cli("build", "--config", file, "--print-config").out
    assert '\nmodel = "sub/tiny"\n' in printed


def help_at(columns: int) -> str:
    code = "import sys; from prox24_deploy.cli import main; sys.argv = ['x', 'build', '-h']; main()"
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": str(columns)},
    ).stdout


@pytest.mark.parametrize("columns", [60, 120])
def test_help_has_groups_and_whole_names_at_any_width(columns: int) -> None:
    shown = help_at(columns)
    for name in ("--calibration-tokens N ", "--compute-capability TEXT", "--strip-weights "):
        assert f"  {name}" in shown
    for title in ("Data", "Pruning", "Files and engines", "TensorRT", "Limits and baseline"):
        assert f"\n{title}:\n" in shown
    assert "…" not in shown
    assert shown.startswith("Usage: prox24-deploy build [OPTIONS] MODEL_DIR\n")
    for value in ("--recipe PATH", "--max-loss X", "--preset fast|default|best", "--out PATH"):
        assert value in shown
    assert "<" not in shown.replace("<=", "")
    assert max(map(len, shown.splitlines())) <= min(columns, 100)


def test_help_of_evaluate_is_about_what_it_does() -> None:
    shown = " ".join(run_cli("evaluate", "--help").out.split())
    assert "Held-out text, images or recordings; repeatable. Default: as when pruned." in shown
    assert "calibration" not in shown
    assert "Where models run in PyTorch." in shown


def test_how_long_to_measure_is_said_once() -> None:
    assert measured_for(BenchOptions()) == DEFAULT_OPTIONS
    exact = measured_for(BenchOptions(rounds=7, warmup=0))
    assert (exact.min_rounds, exact.max_rounds, exact.warmup) == (7, 7, 0)
    assert measured_for(BenchOptions(seconds=9.0)).seconds == 9.0
    with pytest.raises(UsageError, match="--rounds 7 and --seconds 9 both say when to stop"):
        BenchOptions(rounds=7, seconds=9.0)


def test_bench_times_as_many_rounds_as_it_is_told(pruned: tuple[Path, int]) -> None:
    out, _ = pruned
    compiled = run_cli("compile", out, "--shapes", "batch=1", "sequence=8")
    assert compiled.code == 0, compiled.err
    line = ("bench", out, "--shapes", "batch=1", "sequence=8", "--rounds", "5", "--warmup", "1")
    timed = json.loads(run_cli(*line, "--json").out)
    assert [row["dense"]["runs"] for row in timed["latency"]] == [5]
    shown = run_cli(*line).out
    assert "sparse p99" in shown
    assert "tokens/s" in shown


def test_an_export_that_nothing_was_compared_with_says_so() -> None:
    export = make_records(2).export
    said = tables.export_line(export, Path("out"))
    assert "weights proven 2:4 in out/onnx/sparse/model.onnx; largest difference to PyTorch" in said
    models = tuple(replace(model, dtype="bfloat16") for model in export.sparse)
    half = replace(export, sparse=models, numerics=())
    assert tables.export_line(half, Path("out")).endswith(
        "; not compared with PyTorch, for nothing runs bfloat16 on a CPU."
    )
