"""Every shipped family: each in float16 to a proven file, some to a whole bundle."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from command_line import ANY_CLASS, ANY_EMBEDDING, ANY_TEXT, run_cli
from families import CAPABILITIES, NO_KERNELS, NO_ROUTES, Row, build_plans, require, table
from family_batches import recipe_of
from safetensors import safe_open
from tiny_families import FAMILIES, REFUSED_DTYPES, VOCABULARY, tiny_model
from tiny_models import write_tiny_bart, write_tiny_classifier
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from prox24_deploy.config.recipe import parse_recipe, shipped_recipes
from prox24_deploy.graph.export.export import export_graphs
from prox24_deploy.graph.parity.numerics import compare_with_torch
from prox24_deploy.model.experts import Experts
from prox24_deploy.report.schema import load_report

# Families whose graphs have nothing that is not in one of another family; of Gemma 3, only casts
# stand behind other operators than in those shown. With every family, what its recipe names is
# pruned (tests/pruning/test_family_pruning.py); `make bench` exports all, with their heads and
# variants, in all three dtypes.
ALIKE = {
    "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma3_text", "opt", "roberta",
    "xlm-roberta", "distilbert", "bart", "deit", "convnext",
}  # fmt: skip
# Families that other files export, prove and compare with PyTorch: graph/test_export.py, the builds
# of this file, graph/test_decoding.py, test_image_families.py and test_speech_families.py.
ELSEWHERE = {"bert", "llama", "gpt2", "phi3", "vit", "whisper"}
# Of which experts are exported on the tokens that are routed to them.
ROUTED = {"mixtral"}
# One row of each family.
FIRST = {name.partition(",")[0]: name for name in reversed(FAMILIES)}
SHOWN = [name for family, name in FIRST.items() if family not in ALIKE | ELSEWHERE]
HALVES = [name for name in FAMILIES if name in SHOWN and (name, "float16") not in REFUSED_DTYPES]
AXES = {"tiny_gpt2": 0, "tiny_qwen3": 1}
TARGETS = {"tiny_gpt2": 8, "tiny_qwen3": 14}


# The layout of Llama is built whole in test_build.py.
@pytest.mark.parametrize(
    "family", ["tiny_gpt2", pytest.param("tiny_qwen3", marks=pytest.mark.large)]
)
def test_a_family_is_built_and_proven(
    family: str, prose: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model_dir: Path = request.getfixturevalue(family)
    out = tmp_path / "out"
    done = run_cli(
        "build", model_dir, "-o", out, "--calibration", prose,
        "--calibration-tokens", "4096", "--evaluation-tokens", "1024",
        "--shapes", "batch=1", "sequence=8", *ANY_TEXT,
    )  # fmt: skip
    assert done.code == 0, done.err
    report = load_report(out / "report.json")
    proven = [tensor for tensor in report.sparsity.tensors if tensor.expected and tensor.is_24]
    assert len(proven) == report.pruning.totals.pruned == TARGETS[family]
    with safe_open(out / "pruned" / "model.safetensors", framework="pt") as handle:
        declared = handle.metadata()["prox24.sparse_weights"]
    assert declared.count(f": {AXES[family]}") == TARGETS[family]
    assert run_cli("check", out / "pruned").code == 0
    model = AutoModelForCausalLM.from_pretrained(out / "pruned")
    with torch.no_grad():
        assert bool(model(input_ids=torch.arange(8)[None]).logits.isfinite().all())


SMALL = (
    "--calibration-tokens", "4096", "--evaluation-tokens", "1024", "--method", "magnitude",
    "--shapes", "batch=1", "sequence=8",
)  # fmt: skip


def test_a_classifier_is_built_with_its_head_and_judged_by_its_classes(
    prose: Path, tmp_path: Path
) -> None:
    model_dir = write_tiny_classifier(tmp_path / "model")
    out = tmp_path / "out"
    done = run_cli("build", model_dir, "-o", out, "--calibration", prose, *SMALL, *ANY_CLASS)
    assert done.code == 0, done.err
    report = load_report(out / "report.json")
    assert report.model.task == "text-classification"
    assert report.accuracy.metric == "top-1 agreement"
    (output,) = onnx.load(out / "onnx" / "sparse" / "model.onnx").graph.output
    assert [dim.dim_value for dim in output.type.tensor_type.shape.dim][1:] == [3]
    assert AutoModelForSequenceClassification.from_pretrained(out / "pruned").num_labels == 3


def test_an_embedder_is_built_with_its_pooling_in_the_graph(
    tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "embedder.toml"
    shipped = shipped_recipes()["bert"]
    start, end = shipped.index("outputs ="), shipped.index("[[heads]]")
    recipe.write_text(
        shipped[:start]
        + """
outputs = [
    { name = "sentence_embedding", dtype = "float", axes = ["batch", "hidden"] },
]
[embedding]
pooling = "cls"
normalize = true
"""
        + shipped[end:],
        encoding="utf-8",
    )
    out = tmp_path / "out"
    done = run_cli(
        "build", tiny_bert, "-o", out, "--calibration", prose, "--recipe", recipe, *SMALL,
        *ANY_EMBEDDING,
    )  # fmt: skip
    assert done.code == 0, done.err
    (output,) = onnx.load(out / "onnx" / "sparse" / "model.onnx").graph.output
    assert output.name == "sentence_embedding"
    accuracy = load_report(out / "report.json").accuracy
    assert accuracy.metric == "embedding cosine"
    # The graph pools by [CLS], as the recipe says, and so does the reference.
    (engine,) = accuracy.engines
    assert all(one.passed is not False for one in engine.parity)
    assert accuracy.agreement is not None
    assert engine.metrics[0].agreement is not None
    assert engine.metrics[0].agreement.value == pytest.approx(accuracy.agreement.value, abs=1e-4)


def test_an_encoder_decoder_is_built_as_two_graphs(prose: Path, tmp_path: Path) -> None:
    model_dir, out, pairs = (
        write_tiny_bart(tmp_path / "model", layers=1),
        tmp_path / "out",
        tmp_path / "p.jsonl",
    )
    texts = prose.read_text(encoding="utf-8").split("\n\n")
    lines = [json.dumps({"text": text, "target": text[::-1]}) for text in texts]
    pairs.write_text("\n".join(lines), encoding="utf-8")
    done = run_cli("build", model_dir, "-o", out, "--calibration", pairs, *SMALL, *ANY_TEXT)
    assert done.code == 0, done.err
    report = load_report(out / "report.json")
    assert (report.model.task, report.accuracy.metric) == ("text-to-text", "perplexity")
    assert report.pruning.calibration.targets == report.pruning.calibration.samples > 0
    (engine,) = report.accuracy.engines
    assert engine.samples == engine.available
    assert all(one.passed is not False for one in engine.parity)
    for found, told in zip(engine.metrics, report.accuracy.metrics, strict=True):
        assert found.name == told.name
        for mine, theirs in ((found.sparse, told.sparse), (found.agreement, told.agreement)):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                assert mine.value == pytest.approx(theirs.value, rel=1e-3, abs=1e-5)
    assert not any("target" in warning for warning in report.warnings)
    proven = [tensor.module for tensor in report.sparsity.tensors if tensor.expected]
    assert len(set(proven)) == len(proven) == report.pruning.totals.pruned == 16
    assert report.sizes.weights == report.pruning.totals.parameters
    for twin in ("dense", "sparse"):
        for name in ("encoder", "decoder"):
            graph = out / "onnx" / twin / f"{name}.onnx"
            assert graph.with_suffix(".onnx.data").is_file()
            assert (out / "engines" / "onnxruntime" / twin / name / "engine.json").is_file()
    assert [(row.graph, row.sequence) for row in report.latency] == [("encoder", 8), ("decoder", 8)]
    latency = [check.name for check in report.checks if check.kind == "latency"]
    assert latency == [
        f"onnxruntime, {name}, batch 1, sequence 8" for name in ("encoder", "decoder")
    ]
    for view in ("report.html", "summary.md"):
        assert "onnxruntime, decoder" in (out / view).read_text(encoding="utf-8")
    numerics = {check.name for check in report.checks if check.kind == "numerics"}
    assert {"sparse last_hidden_state", "sparse logits", "sparse present.0.value"} <= numerics
    assert run_cli("verify", out).code == 0
    assert run_cli("check", out / "onnx" / "sparse").code == 0
    assert run_cli("check", out / "onnx" / "dense").code == 4
    assert run_cli("check", out / "pruned").code == 0
    exported = run_cli("export", out)
    assert (
        f"{out / 'onnx/sparse/encoder.onnx'} and {out / 'onnx/sparse/decoder.onnx'}" in exported.out
    )
    AutoModelForSeq2SeqLM.from_pretrained(out / "pruned")


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    """One dtype of the table, made by the command that prints all of it in all three."""
    command = Path(__file__).parents[1] / "benchmarks" / "families.py"
    line = [sys.executable, str(command), *HALVES, "--dtype", "float16", "--jobs", "1"]
    ran = subprocess.run(line, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = [Row(**row) for row in json.loads(ran.stdout.splitlines()[-1])["families"]]
    return {row.family: row for row in found}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", HALVES)
def test_a_family_is_exported_and_proven(family: str, rows: dict[str, Row]) -> None:
    row = rows[family]
    assert row.pruned == row.proven > 0
    assert row.same_bits == row.linear
    assert (row.linear > 0) == (family != "resnet, classes")
    assert isinstance(row.difference, float)
    assert 0 < row.difference <= 2e-2


@pytest.mark.slow
@pytest.mark.tensorrt_rtx
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", HALVES)
def test_a_family_builds_for_tensorrt_rtx(family: str, rows: dict[str, Row]) -> None:
    plans = rows[family].plans
    assert list(plans) == list(CAPABILITIES)
    if family in ROUTED:
        assert set(plans.values()) == {NO_ROUTES}
        return
    assert all(int(plan.removesuffix(" B")) > 0 for plan in plans.values())


@pytest.mark.slow
@pytest.mark.tensorrt_rtx
def test_experts_on_all_tokens_build_for_tensorrt_rtx(tmp_path: Path) -> None:
    model = tiny_model("mixtral").requires_grad_(requires_grad=False)
    recipe = recipe_of(model)
    assert recipe.experts is not None
    experts = recipe.experts.model_copy(update={"exported": "all"})
    recipe = recipe.model_copy(update={"experts": experts})
    for module in model.modules():
        if isinstance(module, Experts):
            module.exported = "all"
    (path,) = export_graphs(model, recipe, tmp_path / "onnx", dtype="float16")
    assert {"NonZero", "ScatterND"}.isdisjoint(
        node.op_type for node in onnx.load(path, load_external_data=False).graph.node
    )
    checks = compare_with_torch(
        model, path, recipe, dtype="float16", twin="dense", vocabulary=VOCABULARY
    )
    assert [check.passed for check in checks] == [True] * 3
    assert all(plan.endswith(" B") for plan in build_plans([path], "float16").values())


def test_every_model_type_and_head_of_a_recipe_has_a_row() -> None:
    models = [tiny_model(row) for row in FAMILIES]
    opened = {(model.config.model_type, type(model).__name__) for model in models}  # type: ignore[union-attr]
    for family, text in shipped_recipes().items():
        recipe = parse_recipe(text, family)
        known = [name for kind, name in opened if kind in recipe.model_types]
        tasks = {recipe.for_architecture(name).task for name in known}
        assert any(head.task in tasks for head in recipe.heads) or not recipe.heads, family
        assert recipe.task in tasks, family
        for kind in recipe.model_types:
            assert kind in {kind for kind, _ in opened}


SOUND = Row("x", "float32", 1, 3, 3, 3, 3, 1e-7, {"SM86": "9 B", "SM120": "9 B"}, 1.0)


@pytest.mark.parametrize(
    "spoiled",
    [
        replace(SOUND, proven=2),
        replace(SOUND, same_bits=2),
        replace(SOUND, pruned=0, proven=0, linear=0, same_bits=0),
        replace(SOUND, difference=NO_KERNELS),
        replace(SOUND, dtype="bfloat16"),
        replace(SOUND, plans={"SM86": "9 B", "SM120": "failed"}),
    ],
)
def test_a_row_that_falls_short_fails_the_table(spoiled: Row) -> None:
    require(SOUND)
    with pytest.raises(AssertionError):
        require(spoiled)
    assert "x" in table([spoiled]).splitlines()[2]
