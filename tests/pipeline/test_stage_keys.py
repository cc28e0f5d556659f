"""Nothing that a stage can see is outside of its key, and nothing else is in it."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import singledispatch
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import Tensor

from prox24_deploy.bundle.bundle import Bundle
from prox24_deploy.bundle.manifest import read_manifest
from prox24_deploy.bundle.stage import Artifact, Stage, stage_key
from prox24_deploy.config.options import (
    BuildOptions,
    EngineOptions,
    HarnessOptions,
    PruneOptions,
    RecoverOptions,
    TensorRtOptions,
    TextOptions,
)
from prox24_deploy.config.recipe import Recipe, shipped_recipes
from prox24_deploy.core.fingerprint import (
    Fingerprinted,
    fields_of,
    fingerprint,
    is_unkeyed,
    unkeyed,
)
from prox24_deploy.core.records import TextSource
from prox24_deploy.core.snapshot import FileState, Snapshot
from prox24_deploy.engines.cusparselt.backend import CuSparseLt
from prox24_deploy.engines.cusparselt.profile import GemmShape, GemmTiming, GpuProfile
from prox24_deploy.engines.tensorrt.backend import TensorRt
from prox24_deploy.model.batch import Batch, Samples
from prox24_deploy.model.directory import ModelDir
from prox24_deploy.pipeline import run as pipeline
from prox24_deploy.pipeline import stages
from prox24_deploy.pipeline.stages.tasks import TaskData

# Every field that no key has, with what its reason must speak of.
UNKEYED = {
    ("TextSource", "paths"): "sha256",
    ("PruneOptions", "mask"): "its content counts",
    ("EngineOptions", "plan"): "counts where it is used",
    ("TensorRtOptions", "timing_cache"): "where timings are kept",
    ("CuSparseLt", "dense"): "hash says",
    ("CuSparseLt", "pruned"): "the stage hashes what lies there",
    ("CuSparseLt", "quantized"): "the stage hashes what lies there",
    ("BenchInputs", "max_slowdown"): "judged again",
    ("PruneInputs", "memory_limit"): "where weights are kept",
    ("PruneInputs", "ranks"): "who takes part",
    ("PruneInputs", "text"): "the samples are what comes of it",
    ("WriteInputs", "memory_limit"): "whether there is room",
    ("QuantizeInputs", "memory_limit"): "where weights are kept",
    ("ExportInputs", "memory_limit"): "where weights are kept",
    ("EvaluateInputs", "memory_limit"): "where weights are kept",
    ("EngineAccuracyInputs", "memory_limit"): "where weights are kept",
    ("TaskInputs", "memory_limit"): "where weights are kept",
    ("RecoverOptions", "processes"): "steps are the same",
}
OPTIONS = BuildOptions(
    text=TextOptions(calibration_tokens=2048, evaluation_tokens=1024),
    prune=PruneOptions(method="magnitude"),
    recover=RecoverOptions(steps=3, step_tokens=256),
    quantize="int8",
    device="cpu",
    engine=EngineOptions(batches=(1,), sequences=(8,)),
    memory_limit_gib=1.5,
)


def silent(*_: object) -> None:
    """Progress that nobody sees."""


@dataclass(frozen=True)
class Taken:
    """What a build handed to its stages."""

    inputs: dict[str, Any]

    @property
    def keys(self) -> dict[str, str]:
        return {name: stage_key(name, fields_of(found)) for name, found in self.inputs.items()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, prose: Path) -> Path:
    """One real build, whose results stand in for those of the builds below."""
    out = tmp_path_factory.mktemp("keys") / "bundle"
    text = replace(OPTIONS.text, calibration=(prose,))
    pipeline.build(tiny_bert, out, replace(OPTIONS, text=text), fresh=False, progress=silent)
    return out


@pytest.fixture(scope="module")
def take(built: Path, tiny_bert: Path, prose: Path) -> Callable[..., Taken]:
    """Build with other options, model or text, up to what each stage is handed."""

    def taken(options: BuildOptions = OPTIONS, model: Path = tiny_bert) -> Taken:
        inputs: dict[str, Any] = {}

        def record(
            bundle: Bundle, stage: Stage[Any, Any], given: Any, _: object, *, anew: bool = False
        ) -> Any:
            inputs[stage.name] = given
            return bundle.load(stage)

        text = (
            options.text
            if options.text.calibration
            else replace(options.text, calibration=(prose,))
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Bundle, "run", record)
            patch.setattr(stages.prune, "_describe", silent)
            patch.setattr(stages.report, "run", silent)
            # This model gives no logits; options that compare them are looked at all the same.
            patch.setattr(stages.recover, "_require_logits", silent)
            pipeline.build(model, built, replace(options, text=text), fresh=False, progress=silent)
        return Taken(inputs)

    return taken


@pytest.fixture(scope="module")
def plainly(take: Callable[..., Taken]) -> Taken:
    """What the options of all tests here hand to the stages."""
    return take()


def samples() -> Samples:
    """Samples with everything that samples can have."""
    batch = Batch(
        {"pixel_values": torch.ones(2, 3)}, torch.ones(2, dtype=torch.bool), torch.ones(2)
    )
    source = TextSource(kind="file", paths=("a",), sha256="0" * 64, samples=2, tokens=2, targets=1)
    return Samples(
        batches=(batch,),
        source=source,
        labels=torch.zeros(2, dtype=torch.int64),
        transcripts=("said", None),
    )


def backends(recipe: Recipe) -> tuple[Any, ...]:
    """One of each kind, with every option given."""
    tensorrt = TensorRtOptions(
        workspace_gib=1.0,
        builder_level=3,
        compatibility="version",
        refit=True,
        strip_weights=True,
        timing_cache=Path("cache"),
        capabilities=("SM86",),
    )
    options = EngineOptions(
        backends=("x",),
        batches=(1, 2),
        sequences=(8,),
        pasts=(4,),
        plan=Path("plan.json"),
        tensorrt=tensorrt,
    )
    timing = GemmTiming(shape=GemmShape(n=4, k=8, m=16), dense_us=1.0, sparse_us=2.0)
    profile = GpuProfile(gpu="card", driver="driver", versions={"torch": "2"}, gemms=(timing,))
    return (
        TensorRt(
            library="tensorrt",
            version="10",
            polygraphy="0.53.6",
            card=("card",),
            options=options,
        ),
        CuSparseLt(
            dense=Path("dense"),
            dense_sha256="hash",
            pruned="pruned",
            quantized="quantized.safetensors",
            recipe=recipe,
            options=options,
            known=profile,
        ),
    )


Change = tuple[str, Any, bool]


@singledispatch
def changed(value: Any) -> Iterator[Change]:
    """Each way to change one part of a value: its path, the whole changed, whether it counts."""
    for field in fields(value):
        for path, other, counts in changed(getattr(value, field.name)):
            whole = replace(value, **{field.name: other})
            yield f"{field.name}.{path}", whole, counts and not is_unkeyed(field)


@changed.register(bool)
def _(value: object) -> Iterator[Change]:
    yield "", not value, True


@changed.register(int | float)
def _(value: float) -> Iterator[Change]:
    yield "", value + 1, True


@changed.register(str)
def _(value: str) -> Iterator[Change]:
    yield "", value + "x", True


@changed.register(Path)
def _(value: Path) -> Iterator[Change]:
    yield "", value / "x", True


@changed.register(type(None))
def _(_: None) -> Iterator[Change]:
    yield "", "x", True


@changed.register(Tensor)
def _(value: Tensor) -> Iterator[Change]:
    other = value.clone()
    other.view(-1)[-1] = ~other.view(-1)[-1] if other.dtype == torch.bool else 9
    yield "values", other, True
    yield "shape", value[None], True
    yield "dtype", value.to(torch.float64), True


@changed.register(Batch | Samples)
def _(value: Any) -> Iterator[Change]:
    for field in fields(value):
        part = getattr(value, field.name)
        for path, other, counts in [("", torch.ones(1), True)] if part is None else changed(part):
            yield f"{field.name}.{path}", replace(value, **{field.name: other}), counts


@changed.register(ModelDir | Artifact | TaskData)
def _(value: Any) -> Iterator[Change]:
    for path, other, counts in changed_files(value.snapshot):
        yield f"snapshot.{path}", replace(value, snapshot=other), counts


@changed.register(BaseModel)
def _(value: BaseModel) -> Iterator[Change]:
    for name in type(value).model_fields:
        for path, other, counts in changed(getattr(value, name)):
            yield (
                f"{name}.{path}",
                value.model_copy(update={name: other}),
                counts and name != "limits",
            )


@changed.register(Mapping)
def _(value: Mapping[str, Any]) -> Iterator[Change]:
    yield "new", {**value, "new": next(iter(value.values()), "x")}, True
    for name in value:
        for path, other, counts in changed(value[name]):
            yield f"{name}.{path}", {**value, name: other}, counts


@changed.register(list | tuple)
def _(value: Any) -> Iterator[Change]:
    kind = type(value)
    yield "longer", kind([*value, value[-1] if value else "x"]), True
    # Of many alike, such as batches, one tells as much as all.
    for i, part in enumerate(value[:1] if len(value) > 4 else value):
        for path, other, counts in changed(part):
            yield f"{i}.{path}", kind([*value[:i], other, *value[i + 1 :]]), counts


def changed_files(value: Snapshot) -> Iterator[tuple[str, Snapshot, bool]]:
    late = {"README.md", "recipe.toml"}
    state = FileState(sha256="0" * 64, stamp=(0,) * 5)
    yield "root", replace(value, root=Path("elsewhere")), False
    yield "new", replace(value, files={**value.files, "new": state}), True
    for name, known in value.files.items():
        counts = name not in late
        yield f"{name} content", _with(value, name, replace(known, sha256="0" * 64)), counts
        yield f"{name} stamp", _with(value, name, replace(known, stamp=(0,) * 5)), False
        files = {n: s for n, s in value.files.items() if n != name}
        yield f"{name} gone", replace(value, files=files), counts


def _with(value: Snapshot, name: str, state: FileState) -> Snapshot:
    return replace(value, files={**value.files, name: state})


def require_every_field_counts(inputs: Any) -> set[str]:
    """Change each part of the inputs of a stage; returns the names of their fields."""
    before = stage_key("a stage", fields_of(inputs))
    seen = set()
    for path, other, counts in changed(inputs):
        seen.add(path.partition(".")[0])
        moved = stage_key("a stage", fields_of(other)) != before
        assert moved == counts, f"{type(inputs).__name__}.{path}"
    return seen


# A recipe is also given values of kinds that it cannot have.
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_every_part_of_the_inputs_of_every_stage_is_in_its_key(take: Callable[..., Taken]) -> None:
    """The names are written out, so that a field that comes or goes is looked at here."""
    inputs = take().inputs
    inputs["tasks"] = tasks_of(inputs["evaluate"])
    inputs["write"] = write_of(inputs["evaluate"])
    covered = {name: require_every_field_counts(found) for name, found in inputs.items()}
    assert covered == {
        "prune": {
            "source", "recipe", "calibration", "held_out", "options", "masks", "device", "versions",
            "memory_limit", "ranks", "text",
        },
        "recover": {
            "source", "pruned", "recipe", "calibration", "options", "seed", "device", "versions",
        },
        "quantize": {
            "pruned", "layers", "recipe", "calibration", "format", "device", "versions",
            "training", "source", "seed", "memory_limit",
        },
        "export": {
            "source", "pruned", "quantized", "layers", "recipe", "dtype", "seed", "versions",
            "memory_limit",
        },
        "compile": {
            "dense", "sparse", "sparsity", "onnx", "pruned", "quantized", "blocks", "backends",
            "devices", "versions",
        },
        "bench": {
            "engines", "compiled", "onnx", "pruned", "quantized", "backends", "batches",
            "sequences", "pasts", "images", "cached", "vocabulary", "max_slowdown", "machine",
            "versions", "measure",
        },
        "evaluate": {
            "source", "pruned", "before", "quantized", "held_out", "recipe", "device", "versions",
            "memory_limit",
        },
        "accuracy": {
            "source", "pruned", "quantized", "onnx", "compiled", "engines", "backends", "held_out",
            "recipe", "tokens", "batches", "sequences", "decodes", "device", "machine", "versions",
            "memory_limit",
        },
        "tasks": {
            "source", "pruned", "quantized", "tasks", "data", "limit", "recipe", "device",
            "harness", "versions", "memory_limit",
        },
        "write": {
            "source", "recipe", "tokens", "length", "seed", "device", "versions", "memory_limit",
        },
    }  # fmt: skip
    assert {stage.name for stage in all_stages()} == set(covered)
    for found in inputs.values():
        assert {field.name for field in fields(found)} == covered[name_of(found, inputs)]


def name_of(found: Any, inputs: Mapping[str, Any]) -> str:
    return next(name for name, other in inputs.items() if other is found)


def all_stages() -> list[Stage[Any, Any]]:
    modules = [getattr(stages, name) for name in stages.__all__]
    return [module.STAGE for module in modules if hasattr(module, "STAGE")]


def tasks_of(evaluated: stages.evaluate.EvaluateInputs) -> stages.tasks.TaskInputs:
    state = FileState(sha256="1" * 64, stamp=(1,) * 5)
    data = Snapshot(root=Path("data"), listing=lambda _: (), files={"a/b.jsonl": state})
    return stages.tasks.TaskInputs(
        source=evaluated.source,
        pruned=evaluated.pruned,
        quantized=evaluated.quantized,
        tasks=("hellaswag",),
        data=TaskData(data),
        limit=None,
        recipe=evaluated.recipe,
        device="cpu",
        harness="0.4",
        versions={"torch": "2"},
        memory_limit=2**40,
    )


def write_of(evaluated: stages.evaluate.EvaluateInputs) -> stages.write.WriteInputs:
    return stages.write.WriteInputs(
        source=evaluated.source,
        recipe=evaluated.recipe,
        tokens=2048,
        length=64,
        seed=0,
        device="cpu",
        versions={"torch": "2"},
        memory_limit=2**40,
    )


def test_labels_transcripts_and_targets_are_in_the_key_of_samples() -> None:
    before = fingerprint(samples())
    paths = set()
    for path, other, counts in changed(samples()):
        paths.add(path)
        assert (fingerprint(other) != before) == counts, path
    assert {
        "labels.values",
        "transcripts.0.",
        "source.paths.0.",
        "batches.0.targets.values",
    } <= paths


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_every_option_of_a_backend_is_in_its_key(take: Callable[..., Taken]) -> None:
    for backend in backends(take().inputs["prune"].recipe):
        before = fingerprint(backend)
        for path, other, counts in changed(backend):
            assert (fingerprint(other) != before) == counts, path


def test_two_kinds_of_backend_with_the_same_fields_have_different_keys() -> None:
    kinds = [dataclasses.make_dataclass(name, ["threads"], frozen=True) for name in ("A", "B")]
    assert len({str(fingerprint(kind(1))) for kind in kinds}) == 2


def test_what_no_key_has_is_listed_with_its_reason(take: Callable[..., Taken]) -> None:
    inputs, found = take().inputs, {}
    others = [make(inputs["evaluate"]) for make in (write_of, tasks_of)]
    for value in (*inputs.values(), *others, samples(), *backends(inputs["prune"].recipe)):
        for kind in dataclasses_in(value):
            for field in fields(kind):
                if is_unkeyed(field):
                    found[kind.__name__, field.name] = field.metadata["unkeyed"]
    assert found.keys() == UNKEYED.keys()
    for name, reason in found.items():
        assert UNKEYED[name] in reason


def dataclasses_in(value: object) -> Iterator[Any]:
    """The types of all dataclasses within a value that say nothing of themselves."""
    if is_dataclass(value):
        yield type(value)
        for field in fields(value):
            yield from dataclasses_in(getattr(value, field.name))
    elif isinstance(value, Mapping):
        yield from (kind for part in value.values() for kind in dataclasses_in(part))
    elif isinstance(value, list | tuple):
        yield from (kind for part in value for kind in dataclasses_in(part))


def test_a_value_that_tells_nothing_of_its_content_has_no_fingerprint() -> None:
    for value in (Path("model"), object(), b"bytes", {1: "x"}):
        with pytest.raises(TypeError, match="has no fingerprint"):
            fingerprint(value)
    with pytest.raises(TypeError, match="has no fields"):
        fields_of(3)
    assert fingerprint({"a", "b"}) == ["a", "b"]
    assert unkeyed("why") == {"unkeyed": "why"}
    assert isinstance(samples(), Fingerprinted)


# Each option with another value, and the stages that see it first.
OTHER_OPTIONS: dict[str, tuple[Any, set[str]]] = {
    "text.calibration_tokens": (1536, {"prune", "recover", "quantize"}),
    "text.evaluation_tokens": (1536, {"prune", "evaluate", "accuracy"}),
    # A seed orders images, recordings, the built-in text and what is trained on, and draws inputs
    # of the export.
    "text.seed": (1, {"recover"}),
    "text.images": (5, set()),
    "text.recordings": (5, set()),
    "prune.method": ("wanda", {"prune"}),
    "prune.preset": ("best", {"prune"}),
    "prune.target": ("symmetric", {"prune"}),
    "prune.refinement": ("none", {"prune"}),
    "prune.reconstruct": (True, {"prune"}),
    "prune.include": (("*query",), {"prune"}),
    "prune.exclude": (("*query",), {"prune"}),
    "prune.max_loss": (1.0, {"prune"}),
    "prune.max_layers": (3, {"prune"}),
    "prune.planned_dense": ((("encoder.layer.0.output.dense", "why"),), {"prune"}),
    "prune.permute": ("none", {"prune"}),
    "recover.steps": (4, {"recover"}),
    "recover.learning_rate": (0.02, {"recover"}),
    "recover.step_tokens": (512, {"recover"}),
    "recover.temperature": (2.0, {"recover"}),
    "recover.top_k": (8, {"recover"}),
    "recover.write": (False, {"recover"}),
    "recover.checkpointing": (True, {"recover"}),
    "recover.optimizer": ("adafactor", {"recover"}),
    "recover.embeddings": (True, {"recover"}),
    "recover.processes": (2, set()),
    "recover.quantized": (2, {"quantize"}),
    "quantize": ("fp8", {"quantize"}),
    "dtype": ("float16", {"export"}),
    "engine.batches": ((1, 2), {"bench", "accuracy"}),
    "engine.sequences": ((8, 16), {"bench", "accuracy"}),
    "engine.tensorrt": (TensorRtOptions(builder_level=3), set()),
    "engine.backends": (("onnxruntime",), set()),
    "engine.eager": (True, set()),
    "engine_tokens": (512, {"accuracy"}),
    "memory_limit_gib": (1.25, set()),
    "harness.tasks": ((), set()),
    "harness.limit": (None, set()),
}
# The stages that read the recipe as a whole.
READERS = {"prune", "recover", "quantize", "export", "evaluate", "accuracy"}
# What is not there to be seen by a stage, and who sees it.
READ_BEFORE = {
    "recipe": "its meaning counts, below",
    "recover.minutes": "it counts in the place of steps, as they do",
    "text.calibration": "its content counts, below",
    "text.evaluation": "its content counts, below",
    "text.column": "what is read there counts, as the content of a file does",
    "text.target_column": "the same",
    "prune.mask": "its content counts: PruneInputs.masks",
    "name": "the record of the model holds it, below",
    "device": "this machine has one",
    "engine.plan": "what is in it counts: PruneOptions.planned_dense and CuSparseLt.known",
    "harness.data": "the harness is an extra; its files count, above",
    "baseline": "the report is held against it, whenever it is made",
    "limits_file": "the same",
    "gpus": "it says who takes part: PruneInputs.ranks",
    "accept_loss": "the same",
    "allow": "the same",
    "engine.pasts": "this model keeps no cache: BenchInputs.pasts, EngineAccuracyInputs.decodes",
}


def leaves(kind: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all options, TensorRT's as one."""
    nested = {"text": TextOptions, "prune": PruneOptions, "recover": RecoverOptions,
              "engine": EngineOptions, "harness": HarnessOptions}  # fmt: skip
    for field in fields(kind):
        if not prefix and field.name in nested:
            yield from leaves(nested[field.name], f"{field.name}.")
        else:
            yield prefix + field.name


def test_every_option_is_in_one_of_the_two_tables() -> None:
    names = set(leaves(BuildOptions))
    assert names == OTHER_OPTIONS.keys() | READ_BEFORE.keys()
    assert not OTHER_OPTIONS.keys() & READ_BEFORE.keys()


@pytest.mark.parametrize("name", OTHER_OPTIONS)
def test_an_option_moves_the_keys_of_the_stages_that_see_it(
    name: str, take: Callable[..., Taken], plainly: Taken
) -> None:
    value, expected = OTHER_OPTIONS[name]
    first, _, last = name.partition(".")
    part = replace(getattr(OPTIONS, first), **{last: value}) if last else value
    assert moved(plainly, take(replace(OPTIONS, **{first: part}))) == expected


def moved(before: Taken, after: Taken) -> set[str]:
    return {name for name, key in after.keys.items() if before.keys[name] != key}


def test_the_meaning_of_a_recipe_counts_and_its_text_does_not(
    take: Callable[..., Taken], tmp_path: Path
) -> None:
    """Pooling changes what accuracy is measured; a limit, a comment or a path does not."""
    text = shipped_recipes()["bert"]
    before = take()
    path = tmp_path / "recipe.toml"

    def with_text(changed_text: str) -> set[str]:
        path.write_text(changed_text, encoding="utf-8")
        return moved(before, take(replace(OPTIONS, recipe=path)))

    assert with_text(text) == set()
    assert with_text(f"# seen\n{text}") == set()
    limits = 'max_slowdown = 0.5\n[limits.metrics]\n"*" = { max-degradation = 1 }\n'
    assert with_text(text.split("[limits]", 1)[0] + f"[limits]\n{limits}") == set()
    assert with_text(text.replace("opset = 20", "opset = 19")) == READERS
    with_text(pooled(text, "mean"))
    before = take(replace(OPTIONS, recipe=path))
    assert with_text(pooled(text, "cls")) == READERS


def pooled(recipe: str, pooling: str) -> str:
    """The recipe of an encoder with embeddings as its output."""
    before, _, after = recipe.partition("outputs = [")
    output = '{ name = "sentence_embedding", dtype = "float", axes = ["batch", "hidden"] }'
    table = f'[embedding]\npooling = "{pooling}"\nnormalize = true\n\n'
    return f"{before}outputs = [{output}]\n\n{table}" + after.partition("\n\n")[2]


def test_text_counts_by_its_content_and_not_by_its_place(
    take: Callable[..., Taken], prose: Path, tmp_path: Path
) -> None:
    before = take()
    moved_text = tmp_path / "elsewhere.txt"
    moved_text.write_bytes(prose.read_bytes())

    def with_text(*calibration: Path, evaluation: tuple[Path, ...] = ()) -> set[str]:
        text = replace(OPTIONS.text, calibration=calibration, evaluation=evaluation)
        return moved(before, take(replace(OPTIONS, text=text)))

    assert with_text(moved_text) == set()
    other = tmp_path / "other.txt"
    other.write_text(prose.read_text(encoding="utf-8").replace("a", "e"), encoding="utf-8")
    assert with_text(prose, evaluation=(other,)) == {"prune", "evaluate", "accuracy"}


def test_a_model_counts_by_its_files_and_not_by_its_place(
    take: Callable[..., Taken], tiny_bert: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_bert, tmp_path / "copy"))
    assert moved(take(), take(model=copy)) == set()
    (copy / "README.md").write_text("# A card", encoding="utf-8")
    assert moved(take(), take(model=copy)) == set()
    (copy / "LICENSE.md").write_text("Mine.", encoding="utf-8")
    # The quantiser sees the pruned model, which is not made anew here.
    assert moved(take(), take(model=copy)) == READERS - {"quantize"}


def test_a_record_says_what_its_key_was_made_of(built: Path) -> None:
    entry = read_manifest(built).stages["evaluate"]
    assert entry.key == stage_key("evaluate", entry.inputs)
    assert entry.reads == ["recovered", "pruned", "quantized"]
    assert "recovered/model.safetensors" in entry.inputs["pruned"]
    assert not {"recovered/README.md", "recovered/recipe.toml"} & entry.inputs["pruned"].keys()
