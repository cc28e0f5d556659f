"""The path through Polygraphy to TensorRT: settings, profile, files, errors.

Polygraphy is real, TensorRT under it a stand-in, as it says. A child process that builds imports
the stand-in as `tensorrt` too, so that the log, the crash and the half-built engine are real ones
of a real process.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version as version_of
from pathlib import Path
from types import ModuleType

import fake_tensorrt
import pytest
from afresh import afresh_each_time
from fake_tensorrt import Version, library, said
from tensorrt_models import write_decoder, write_model

from prox24_deploy.config.options import Compatibility, EngineOptions, TensorRtOptions
from prox24_deploy.core.errors import BackendMissingError, EngineError, UsageError
from prox24_deploy.core.records import BuilderSparsity, Engine, Kernel, OnnxModel, TensorCheck
from prox24_deploy.engines.tensorrt import backend as tensorrt
from prox24_deploy.engines.tensorrt.backend import TensorRt, open_tensorrt
from prox24_deploy.engines.tensorrt.job import run_job
from prox24_deploy.engines.tensorrt.library import SWITCH, polygraphy_for, refused_by
from prox24_deploy.engines.tensorrt.shapes import profile_of

H200 = {"gpu": "NVIDIA H200", "compute capability": "9.0", "driver": "580.1"}
OUT = Path("engines/tensorrt/sparse")
SHAPES = EngineOptions(batches=(1, 8), sequences=(16, 128))
LOG = (
    "(Sparsity) Found 1 layer(s) eligible to use sparse tactics: node_linear\n"
    "(Sparsity) Chose 1 layer(s) using sparse tactics: node_linear\n"
)
TACTIC = "sm80_xmma_sparse_gemm_f16"
LAYERS = json.dumps({"Layers": [{"Name": "node_linear", "TacticName": TACTIC}]})


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from afresh_each_time(monkeypatch)


def install(version: Version, monkeypatch: pytest.MonkeyPatch, folder: Path) -> ModuleType:
    """The stand-in as a library of this process and of those that it starts."""
    module = library(version)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    site = folder / "site" / module.__name__
    site.mkdir(parents=True, exist_ok=True)
    (site / "__init__.py").write_text(
        f"import fake_tensorrt\nglobals().update(vars(fake_tensorrt.library({version!r})))\n"
    )
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", f"{site.parent}:{here}")
    return module


@pytest.fixture(params=["10", "11"])
def version(request: pytest.FixtureRequest) -> Version:
    found: Version = request.param
    return found


@pytest.fixture
def here(version: Version, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """A machine with an H200 and TensorRT, both pretended."""
    monkeypatch.setattr(tensorrt, "gpu", lambda: H200)
    return install(version, monkeypatch, tmp_path)


def opened(options: TensorRtOptions | None = None) -> TensorRt:
    return open_tensorrt("tensorrt", replace(SHAPES, tensorrt=options or TensorRtOptions()))


def run(backend: TensorRt, bundle: Path, twin: str = "sparse") -> None:
    """Run the job of a build in this process, where the stand-in records it."""
    model = bundle / "onnx" / "sparse" / "model.onnx"
    if not model.is_file():
        write_model(bundle)
    assert twin in ("dense", "sparse")
    run_job(backend._job(model, bundle, "sparse" if twin == "sparse" else "dense"))


@pytest.mark.usefixtures("here")
def test_a_network_is_strongly_typed_and_its_engine_told_in_detail(tmp_path: Path) -> None:
    run(opened(), tmp_path)
    assert said("Builder.create_network") == [(2,)]  # 1 << STRONGLY_TYPED
    assert said("IBuilderConfig.profiling_verbosity") == [
        (fake_tensorrt.ProfilingVerbosity.DETAILED,)
    ]
    assert said("OnnxParser.parse_from_file") == [(str(tmp_path / "onnx/sparse/model.onnx"),)]
    assert (tmp_path / "engine.plan").read_bytes() == b"plan"
    assert json.loads((tmp_path / "layers.json").read_text()) == {"Layers": []}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("twin", "options", "flags"),
    [
        ("dense", TensorRtOptions(), []),
        ("sparse", TensorRtOptions(), ["SPARSE_WEIGHTS"]),
        ("sparse", TensorRtOptions(refit=True), ["SPARSE_WEIGHTS", "REFIT"]),
        ("sparse", TensorRtOptions(strip_weights=True), ["SPARSE_WEIGHTS", "STRIP_PLAN"]),
        ("dense", TensorRtOptions(strip_weights=True, refit=True), ["STRIP_PLAN", "REFIT"]),
        ("dense", TensorRtOptions(compatibility="version"), ["VERSION_COMPATIBLE"]),
        ("dense", TensorRtOptions(compatibility="ampere+"), []),
    ],
)
def test_flags_follow_twin_and_options(
    twin: str, options: TensorRtOptions, flags: list[str], tmp_path: Path
) -> None:
    run(opened(options), tmp_path, twin)
    # TF32 as TensorRT and trtexec have it, where Polygraphy alone would turn it off.
    assert sorted(said("IBuilderConfig.set_flag")) == sorted((flag,) for flag in [*flags, "TF32"])
    everywhere = options.compatibility == "ampere+"
    assert said("IBuilderConfig.hardware_compatibility_level") == (
        [(fake_tensorrt.HardwareCompatibilityLevel.AMPERE_PLUS,)] if everywhere else []
    )


@pytest.mark.usefixtures("here")
def test_limits_are_set_only_where_they_are_asked_for(tmp_path: Path) -> None:
    run(opened(), tmp_path)
    assert said("IBuilderConfig.set_memory_pool_limit") == []
    assert said("IBuilderConfig.builder_optimization_level") == []
    run(opened(TensorRtOptions(workspace_gib=1.5, builder_level=5)), tmp_path)
    pool = fake_tensorrt.MemoryPoolType.WORKSPACE
    assert said("IBuilderConfig.set_memory_pool_limit") == [(pool, 3 * 2**29)]
    assert said("IBuilderConfig.builder_optimization_level") == [(5,)]


@pytest.mark.usefixtures("here")
def test_one_profile_covers_every_shape_asked_for(tmp_path: Path) -> None:
    run(opened(), tmp_path)
    assert said("IOptimizationProfile.set_shape") == [
        ("x", (1, 16, 64), (8, 128, 64), (8, 128, 64))
    ]


def test_a_graph_with_a_cache_decodes_from_an_empty_past(tmp_path: Path) -> None:
    profile = profile_of(write_decoder(tmp_path / "m.onnx"), SHAPES)
    assert profile == {
        "input_ids": ((1, 1), (8, 128), (8, 128)),
        "attention_mask": ((1, 1), (8, 256), (8, 256)),
        "past_key_values.0.key": ((1, 2, 0, 8), (8, 2, 128, 8), (8, 2, 128, 8)),
    }


def test_timings_outlive_a_build_and_never_meet_those_of_the_other_twin(
    here: ModuleType, version: Version, tmp_path: Path
) -> None:
    folder = tmp_path / "deep" / "timings"
    backend = opened(TensorRtOptions(timing_cache=folder))
    run(backend, tmp_path)
    key = f"tensorrt-{here.__version__}-NVIDIA_H200-SM90-580.1"
    sparse, dense = folder / f"{key}-sparse.cache", folder / f"{key}-dense.cache"
    assert sparse.read_bytes() == b"timed;"
    run(backend, tmp_path)
    run(backend, tmp_path, "dense")
    # As read before a build, and again by the one that adds its own; nothing but an empty one else.
    assert [data for (data,) in said("IBuilderConfig.create_timing_cache")] == [
        b"", b"timed;", b"timed;", b"",
    ]  # fmt: skip
    assert said("IBuilderConfig.set_timing_cache") == [(False,)] * 3
    assert (sparse.read_bytes(), dense.read_bytes()) == (b"timed;timed;", b"timed;")
    # Polygraphy leaves the locks under which it reads and writes.
    assert {path.name for path in folder.iterdir()} == {
        f"{path.name}{end}" for path in (sparse, dense) for end in ("", ".lock")
    }


def test_tensorrt_rtx_is_told_its_targets_and_cannot_be_inspected_without_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install("rtx", monkeypatch, tmp_path)
    monkeypatch.setattr(tensorrt, "gpu", lambda: H200)
    run(open_tensorrt("tensorrt_rtx", SHAPES), tmp_path)
    assert os.environ[SWITCH] == "1"
    assert said("IBuilderConfig.num_compute_capabilities") == [(3,)]
    assert said("IBuilderConfig.set_compute_capability") == [
        ("SM86", 0), ("SM89", 1), ("SM120", 2),
    ]  # fmt: skip
    # SM90 is none of them, so the plan does not load on this machine.
    assert not (tmp_path / "layers.json").exists()
    monkeypatch.setattr(tensorrt, "gpu", lambda: H200 | {"compute capability": "8.9"})
    run(open_tensorrt("tensorrt_rtx", SHAPES), tmp_path)
    assert (tmp_path / "layers.json").is_file()


@pytest.mark.usefixtures("here")
def test_what_does_not_parse_load_or_build_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = opened()._job(tmp_path / write_model(tmp_path).path, tmp_path, "dense")
    polygraphy = polygraphy_for("tensorrt")
    with (
        pytest.raises(EngineError, match="m: Could not parse ONNX correctly; export again"),
        refused_by("m", "export again"),
    ):
        run_job(replace(job, onnx="nowhere.onnx"))
    with (
        pytest.raises(EngineError, match=r"p: Could not deserialize engine.*; build again\.$"),
        refused_by("p", "build again"),
    ):
        polygraphy.EngineFromBytes(b"of another version")()
    monkeypatch.setenv("FAKE_TENSORRT_END", "none")
    with pytest.raises(EngineError, match="m: Invalid Engine"), refused_by("m", "try again"):
        run_job(job)


def test_a_name_is_taken_as_it_is_and_not_as_a_pattern(here: ModuleType, tmp_path: Path) -> None:
    """Polygraphy looks for inputs by patterns, in which brackets mean something."""
    model = write_model(tmp_path, name="x[0]*")
    run_job(opened()._job(tmp_path / model.path, tmp_path, "dense"))
    ((name, *_),) = said("IOptimizationProfile.set_shape")
    assert name == "x[0]*"


def test_polygraphy_drives_one_library_in_a_process(
    here: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    polygraphy_for("tensorrt")
    with pytest.raises(EngineError, match="other library than TensorRT-RTX in this process"):
        polygraphy_for("tensorrt_rtx")


# What follows builds in a process of its own.


@pytest.fixture
def built(
    here: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[TensorRt, Engine]:
    log = tmp_path / "said.txt"
    log.write_text(LOG, encoding="utf-8")
    monkeypatch.setenv("FAKE_TENSORRT_LOG", str(log))
    monkeypatch.setenv("FAKE_TENSORRT_LAYERS", LAYERS)
    backend = opened(TensorRtOptions(strip_weights=True))
    return backend, backend.build(tmp_path, write_model(tmp_path), OUT, twin="sparse")


def test_a_build_leaves_engine_log_layers_and_record(
    built: tuple[TensorRt, Engine], here: ModuleType, tmp_path: Path
) -> None:
    _, engine = built
    folder = tmp_path / OUT
    assert {path.name for path in folder.iterdir()} == {
        "engine.plan", "engine.json", "build.log", "layers.json",
    }  # fmt: skip
    assert [path.name for path in folder.parent.iterdir()] == ["sparse"]
    # Polygraphy puts a letter before each line; the builder's INFO is verbose to it.
    said_there = (folder / "build.log").read_text().splitlines()
    assert [f"[V] {line}" for line in LOG.splitlines()] == [
        line for line in said_there if "Sparsity" in line
    ]
    assert (folder / "layers.json").read_text() == LAYERS
    record = json.loads((folder / "engine.json").read_text())
    assert record["flags"] == ["SPARSE_WEIGHTS", "STRIP_PLAN"]
    assert record["version"] == here.__version__
    assert engine == Engine(
        path="engines/tensorrt/sparse/engine.plan",
        backend="tensorrt",
        twin="sparse",
        onnx="onnx/sparse/model.onnx",
        onnx_sha256="ab" * 32,
        device="NVIDIA H200",
        dtype="float16",
        versions={"tensorrt": here.__version__, "polygraphy": version_of("polygraphy")},
        size_bytes=4,
        said=BuilderSparsity(
            eligible=1,
            chosen=1,
            eligible_layers=("node_linear",),
            chosen_layers=("node_linear",),
            kernels=(Kernel(layer="node_linear", nodes="", tactic=TACTIC),),
        ),
    )


def test_the_evidence_is_what_the_builder_said(built: tuple[TensorRt, Engine]) -> None:
    backend, engine = built
    check = TensorCheck(
        tensor="w",
        module="layer.0",
        node="node_linear",
        op_type="MatMul",
        dtype="float16",
        shape=(64, 64),
        axis=0,
        density=0.5,
        is_24=True,
        expected=True,
        first_violation=None,
        reason="",
        part="",
        eligible=True,
        ineligible_reason="",
    )
    evidence = backend.evidence(Path(), engine, (check,))
    assert (evidence.eligible, evidence.chosen) == (1, 1)
    assert [layer.reason for layer in evidence.layers] == [f"kernel {TACTIC}"]
    silent = backend.evidence(
        Path(), replace(engine, said=BuilderSparsity(eligible=None, chosen=None)), (check,)
    )
    assert silent.summary.startswith("sparse kernels: unknown, the log of the builder does not say")
    assert backend.sparse_kernels


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("crash", r"ended by a signal \(Segmentation fault\), its last message was: .*FATAL"),
        ("none", "FATAL: out of memory"),
    ],
)
def test_a_failed_build_leaves_its_log_and_nothing_else(
    end: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = tmp_path / "said.txt"
    log.write_text("FATAL: out of memory\n", encoding="utf-8")
    monkeypatch.setenv("FAKE_TENSORRT_LOG", str(log))
    monkeypatch.setenv("FAKE_TENSORRT_END", end)
    model = write_model(tmp_path)
    kept = tmp_path / OUT / "build.log"
    with pytest.raises(EngineError, match=message) as caught:
        opened().build(tmp_path, model, OUT, twin="sparse")
    assert str(caught.value).endswith(f"; the whole log is {kept}.")
    assert "\n" not in str(caught.value)
    assert [path for path in (tmp_path / "engines").rglob("*") if path.is_file()] == [kept]
    assert "FATAL" in kept.read_text()
    # The next build does not stumble over what this one left.
    monkeypatch.delenv("FAKE_TENSORRT_END")
    opened().build(tmp_path, model, OUT, twin="sparse")
    assert (tmp_path / OUT / "engine.plan").is_file()


@pytest.mark.usefixtures("here")
def test_float32_is_warned_of_for_the_sparse_twin_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_model(tmp_path, dtype="float32")
    backend = opened()
    with caplog.at_level(logging.WARNING, logger="prox24_deploy"):
        backend.build(tmp_path, model, OUT, twin="dense")
        assert caplog.messages == []
        backend.build(tmp_path, model, OUT, twin="sparse")
    (message,) = caplog.messages
    assert "is float32, for which TensorRT has no sparse kernels" in message
    assert "--dtype float16" in message


def test_the_backend_is_missing_without_library_or_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(
        BackendMissingError, match=r"not installed here .*; pip install 'prox24-deploy\[tensorrt\]'"
    ):
        open_tensorrt("tensorrt", EngineOptions())
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(
        BackendMissingError, match=r"; pip install 'prox24-deploy\[tensorrt-rtx\]'\.$"
    ):
        open_tensorrt("tensorrt_rtx", EngineOptions())
    install("11", monkeypatch, tmp_path)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "polygraphy", None)
        with pytest.raises(BackendMissingError, match=r"\(No module named 'polygraphy'\); pip ins"):
            open_tensorrt("tensorrt", EngineOptions())
    monkeypatch.setattr(tensorrt, "gpu", lambda: {"gpu": "none"})
    with pytest.raises(BackendMissingError, match="no NVIDIA GPU; run on one that has, or build"):
        open_tensorrt("tensorrt", EngineOptions())


def test_a_capability_that_is_not_known_is_bad_usage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install("rtx", monkeypatch, tmp_path)
    options = EngineOptions(tensorrt=TensorRtOptions(capabilities=("SM90",)))
    with pytest.raises(UsageError, match=r"does not compile for SM90; pass .* one of .*SM86"):
        open_tensorrt("tensorrt_rtx", options)


@pytest.mark.usefixtures("here")
def test_every_option_is_in_what_a_stage_depends_on() -> None:
    """The compile stage is keyed by the text of the backend."""
    level: Compatibility = "version"
    texts = {
        repr(opened(options))
        for options in (
            TensorRtOptions(), TensorRtOptions(workspace_gib=1), TensorRtOptions(builder_level=1),
            TensorRtOptions(compatibility=level), TensorRtOptions(refit=True),
            TensorRtOptions(strip_weights=True), TensorRtOptions(timing_cache=Path("t")),
            TensorRtOptions(capabilities=("SM86",)),
        )
    }  # fmt: skip
    assert len(texts) == 8


def engine_of(model: OnnxModel) -> Engine:
    return Engine(
        path=f"{OUT}/engine.plan",
        backend="tensorrt",
        twin="sparse",
        onnx=model.path,
        onnx_sha256=model.sha256,
        device="NVIDIA H200",
        dtype="float16",
        versions={},
        size_bytes=4,
    )
