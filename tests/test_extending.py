"""One row adds one: a metric, a backend, a modality or a family, seen wherever it must be."""

import ast
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
from builders import make_records, with_metrics
from command_line import run_cli

from prox24_deploy.config.limits import dense_defaults
from prox24_deploy.config.options import EngineOptions, TextOptions
from prox24_deploy.config.recipe import parse_recipe, shipped_recipes
from prox24_deploy.core.backends import BACKENDS, BackendKind
from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.metrics import METRICS, MetricKind, metrics_of
from prox24_deploy.core.modalities import IMAGES, MODALITIES
from prox24_deploy.core.records import PairedMetric, TextSource
from prox24_deploy.core.tasks import TASKS
from prox24_deploy.data import modality
from prox24_deploy.data.modality import Modality, Wanted, fitted_sizes, read_samples
from prox24_deploy.engines import Origin, backend_by_name
from prox24_deploy.evaluation.estimate import paired
from prox24_deploy.evaluation.parity import parity_of
from prox24_deploy.model.batch import Batch, Samples

PACKAGE = Path(__file__).parents[1] / "prox24_deploy"
BERT = parse_recipe(shipped_recipes()["bert"], "bert")
# A metric that is not in the catalogue.
CALIBRATION_ERROR = MetricKind(
    name="calibration error",
    judged_by=frozenset({"classes"}),
    higher_is_better=False,
    bounded=True,
    against_dense={"max-degradation": 0.1},
    deviation=abs,
)
# A backend that is not in the table; its library is one that is everywhere.
TOY = BackendKind(
    name="toy",
    module="toy_backend",
    title="Toy",
    library="numpy",
    install="pip install toy",
    versions=("toy",),
    needs_gpu="runs on an NVIDIA GPU, and there is none",
)
POINTS = replace(IMAGES, name="points", input="points")


@pytest.fixture
def added_metric(monkeypatch: pytest.MonkeyPatch) -> MetricKind:
    monkeypatch.setitem(METRICS, CALIBRATION_ERROR.name, CALIBRATION_ERROR)
    return CALIBRATION_ERROR


def measured(kind: MetricKind, gap: float) -> PairedMetric:
    """Sixty-four samples, all `gap` worse in the sparse model."""
    dense = torch.linspace(0.1, 0.3, 64, dtype=torch.float64)
    return paired(kind, dense, dense + gap)


def test_a_metric_is_one_row_and_the_evaluation_that_measures_it(added_metric: MetricKind) -> None:
    task = "image-classification"
    assert added_metric.name in metrics_of(task, labelled=False)
    assert added_metric.name not in metrics_of("text-generation", labelled=False)
    assert dense_defaults(task, [])[added_metric.name].max_degradation == 0.1
    for gap, verdict in ((0.01, "pass"), (0.2, "fail")):
        records = with_metrics(make_records(blocks=1), task, measured(added_metric, gap))
        (check,) = [c for c in records.report().checks if c.kind == "accuracy"]
        assert (check.name, check.verdict) == (added_metric.name, verdict)
        assert "points" in check.message, "shares are told in points"


def test_a_row_says_how_far_an_engine_may_be_from_pytorch(added_metric: MetricKind) -> None:
    near, far = (parity_of("sparse", measured(added_metric, gap), "float16") for gap in (1e-3, 0.2))
    assert (near.passed, far.passed) == (True, False)
    plain = replace(added_metric, deviation=None)
    METRICS[plain.name] = plain
    assert parity_of("sparse", measured(plain, 0.2), "float16").passed is None


@pytest.fixture
def added_backend(monkeypatch: pytest.MonkeyPatch) -> BackendKind:
    module = ModuleType(TOY.module)
    module.__dict__["open_backend"] = lambda kind, options, origin: SimpleNamespace(
        name=kind.name, options=options, origin=origin
    )
    monkeypatch.setitem(sys.modules, TOY.module, module)
    monkeypatch.setitem(BACKENDS, TOY.name, TOY)
    return TOY


def test_a_backend_is_one_row_and_its_module(added_backend: BackendKind) -> None:
    options, origin = (
        EngineOptions(),
        Origin(
            dense=Path("x"),
            dense_sha256="",
            pruned="pruned",
            quantized="quantized.safetensors",
            recipe=BERT,
        ),
    )
    backend = backend_by_name(added_backend.name, options, origin)
    assert backend.name == added_backend.name
    with pytest.raises(UsageError, match=r"pass one of auto, .*, cusparselt, toy\."):
        backend_by_name("toyy", options, origin)


def test_the_doctor_looks_for_what_a_backend_needs(added_backend: BackendKind) -> None:
    findings = json.loads(run_cli("doctor", "--json").out)["findings"]
    assert added_backend.title in [finding["name"] for finding in findings]
    missing = replace(added_backend, library="no_such_library")
    BACKENDS[added_backend.name] = missing
    findings = json.loads(run_cli("doctor", "--json").out)["findings"]
    (finding,) = [f for f in findings if f["name"] == added_backend.title]
    assert (finding["usable"], finding["remedy"]) == (False, missing.install)


@pytest.mark.parametrize("kind", BACKENDS.values(), ids=BACKENDS.keys())
def test_every_row_of_a_backend_has_its_module(kind: BackendKind) -> None:
    path = PACKAGE.parent.joinpath(*kind.module.split(".")).with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert "open_backend" in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}


def test_a_modality_is_one_row_of_what_is_known_and_one_of_how_it_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    points = {POINTS.input: torch.zeros(2, 1024, 3)}
    batches = (Batch(points, torch.ones(2, dtype=torch.bool)),)
    source = TextSource(kind="file", paths=(), sha256="", samples=2, tokens=2, unit=POINTS.unit)
    made = Samples(batches=batches, source=source), Samples(batches=batches, source=source)
    row = Modality(kind=POINTS, sizes=lambda _: {"points": 1024}, read=lambda _: made)
    monkeypatch.setitem(MODALITIES, POINTS.name, POINTS)
    monkeypatch.setitem(modality.MODALITIES, POINTS.name, row)
    (spec, *_) = BERT.inputs
    axes = spec.model_copy(update={"name": POINTS.input, "axes": ["batch", "points", 3]})
    recipe = BERT.model_copy(update={"inputs": [axes]})
    assert recipe.modality is POINTS
    assert fitted_sizes(recipe, tmp_path).inputs[0].axes == ["batch", 1024, 3]
    wanted = Wanted(
        directory=mock.Mock(),
        recipe=recipe,
        options=TextOptions(),
        device=lambda: torch.device("cpu"),
        progress=lambda *_: None,
    )
    calibration, held_out = read_samples(wanted)
    assert calibration is made[0]
    assert held_out.batches is batches
    assert held_out.source == replace(source, shared=2)


def test_both_tables_of_modalities_have_the_same_rows() -> None:
    assert modality.MODALITIES.keys() == MODALITIES.keys()
    for name, row in modality.MODALITIES.items():
        assert row.kind is MODALITIES[name]


def test_a_family_is_its_recipe_alone() -> None:
    """No module of the package names a family, but for one that reads files of others."""
    recipes = [parse_recipe(text, name) for name, text in shipped_recipes().items()]
    names = {name for recipe in recipes for name in (recipe.family, *recipe.model_types)}
    named = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in names
    }
    # What sentence-transformers calls a file after, and the middle shape of trtexec.
    assert named == {"model/sentence.py", "engines/tensorrt/reproduce.py"}


def test_every_task_has_a_metric_that_holds_it() -> None:
    for name, kind in TASKS.items():
        assert any(metric.limits_in(kind.judged_by) for metric in METRICS.values()), name
