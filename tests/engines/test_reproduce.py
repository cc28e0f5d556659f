"""The script that makes the engines again: what it runs, and that it makes the same.

`trtexec` and `tensorrt_rtx` come with no package and were not run; in their place stands a program
that writes down how it was called. Polygraphy is real; below it lies TensorRT-RTX, or a stand-in
for TensorRT.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import fake_tensorrt
import pytest
from afresh import afresh_each_time
from fake_tensorrt import Version, library
from tensorrt_models import write_model

from prox24_deploy.config.options import EngineOptions, TensorRtOptions
from prox24_deploy.core.records import Engine
from prox24_deploy.engines.base import Reproducible
from prox24_deploy.engines.tensorrt import backend as tensorrt
from prox24_deploy.engines.tensorrt.backend import TensorRt, open_tensorrt
from prox24_deploy.engines.tensorrt.job import Job, run_job
from prox24_deploy.engines.tensorrt.reproduce import Build, reproduction

SCRIPT = "engines/tensorrt/reproduce.sh"
H200 = {"gpu": "NVIDIA H200", "compute capability": "9.0", "driver": "580.1"}
NOTER = """#!{python}
import json, os, sys
with open(os.environ["NOTES"], "a") as notes:
    notes.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
if "{fails}" in sys.argv:
    sys.exit("no such engine")
print("GPU Compute Time: min = 1 ms")
"""
# Names of `trtexec --help` of TensorRT 10 that are used, and of its successor what replaces one.
TRTEXEC = {
    "--onnx", "--skipInference", "--stronglyTyped", "--profilingVerbosity", "--verbose",
    "--sparsity", "--versionCompatible", "--refit", "--memPoolSize", "--builderOptimizationLevel",
    "--hardwareCompatibilityLevel", "--minShapes", "--optShapes", "--maxShapes", "--saveEngine",
    "--exportLayerInfo", "--loadEngine", "--shapes", "--noDataTransfers",
}  # fmt: skip
TENSORRT_RTX = {
    "--onnx", "--skipInference", "--computeCapabilities", "--minShapes", "--optShapes",
    "--maxShapes", "--saveEngine", "--loadEngine", "--shapes", "--rtxCudaGraphStrategy",
}  # fmt: skip


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from afresh_each_time(monkeypatch)


def job_of(**changes: object) -> Job:
    plain = Job(
        library="tensorrt",
        onnx="onnx/sparse/model.onnx",
        plan="unused",
        layers=None,
        flags=["SPARSE_WEIGHTS"],
        ranges={"x": ((1, 16, 64), (8, 128, 64), (8, 128, 64))},
        capabilities=[],
        workspace_gib=None,
        builder_level=None,
        compatibility="none",
        timing_cache=None,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def script_of(job: Job, *timed: dict[str, Sequence[int]], version: str = "10.16.1.11") -> str:
    build = Build(name="sparse", job=job, timed=timed)
    return reproduction(
        [build], script=SCRIPT, version=version, polygraphy="0.53.6", device="NVIDIA H200"
    )


def run_script(bundle: Path, text: str, noted: Sequence[str], fails: str = "-") -> "Ran":
    """Run a script of a bundle where programs of these names write down how they are called."""
    script = bundle / SCRIPT
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(text, encoding="utf-8")
    programs = bundle.parent / "programs"
    programs.mkdir()
    for name in noted:
        (programs / name).write_text(NOTER.format(python=sys.executable, fails=fails))
        (programs / name).chmod(0o755)
    notes = bundle.parent / "notes"
    notes.touch()
    # The command `polygraphy` lies beside this Python.
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    ran = subprocess.run(
        ["sh", SCRIPT, "../out of it"],
        cwd=bundle,
        env={**os.environ, "PATH": path, "NOTES": str(notes)},
        capture_output=True,
        text=True,
        check=False,
    )
    return Ran(ran, [json.loads(line) for line in notes.read_text().splitlines()])


class Ran:
    """What a script did."""

    def __init__(self, ran: subprocess.CompletedProcess[str], calls: list[list[str]]) -> None:
        self.code, self.said, self.calls = ran.returncode, ran.stdout, calls
        assert ran.stderr == ""

    def calls_of(self, program: str) -> list[list[str]]:
        return [call[1:] for call in self.calls if call[0] == program]


def since_parsing() -> list[tuple[str, list[object]]]:
    """What was asked of TensorRT; before it parses, the command shows settings to the parser."""
    asked = [
        (name, [list(v) if isinstance(v, tuple) else v for v in values])
        for name, values in fake_tensorrt.calls
    ]
    fake_tensorrt.calls.clear()
    assert asked[0] == ("Builder.create_network", [2])  # 1 << STRONGLY_TYPED
    parsed = [name for name, _ in asked].index("OnnxParser.parse_from_file")
    flags = [call for call in asked[:parsed] if call[0] == "OnnxParser.flags"]
    return [*flags, *asked[parsed:]]


def options_of(call: Sequence[str]) -> dict[str, str]:
    return dict(word.partition("=")[::2] for word in call)


JOBS = {
    "dense": job_of(flags=[]),
    "sparse": job_of(),
    "limited": job_of(workspace_gib=1.5, builder_level=5),
    "for later versions": job_of(
        flags=["SPARSE_WEIGHTS", "VERSION_COMPATIBLE"], compatibility="version"
    ),
    "for every GPU": job_of(compatibility="ampere+"),
    "without weights": job_of(flags=["SPARSE_WEIGHTS", "STRIP_PLAN", "REFIT"]),
    "of a name that is a pattern": job_of(ranges={"x[0]*": ((1, 1, 64), (2, 3, 64), (2, 3, 64))}),
    "of a name that a shell would run": job_of(
        ranges={'$(touch pwned) `touch pwned` "x";': ((1, 1, 64), (2, 3, 64), (2, 3, 64))}
    ),
    "of a name with a colon and a quote": job_of(
        ranges={"it's:0": ((1, 1, 64), (2, 3, 64), (2, 3, 64))}
    ),
}


@pytest.mark.parametrize("version", ["10", "11"])
@pytest.mark.parametrize("name", JOBS)
def test_polygraphy_asks_tensorrt_for_what_the_job_asked_for(
    name: str, version: Version, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Call by call, on the stand-in: by the job, and by the command line of the script."""
    monkeypatch.setitem(sys.modules, "tensorrt", library(version))
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (tensor,) = JOBS[name].ranges
    write_model(bundle, name=tensor)
    ran = run_script(bundle, script_of(JOBS[name]), ["polygraphy", "trtexec"])
    assert (ran.code, list(bundle.rglob("pwned"))) == (0, [])
    (words,) = ran.calls_of("polygraphy")
    monkeypatch.chdir(bundle)
    # Polygraphy makes paths whole.
    model = str(bundle / JOBS[name].onnx)
    run_job(replace(JOBS[name], onnx=model, plan=str(tmp_path / "job.plan")))
    asked = since_parsing()
    convert = importlib.import_module("polygraphy.tools.convert").Convert()
    arguments = convert.setup_parser().parse_args(words[1:])
    convert.parse(arguments)
    convert.run(arguments)
    assert since_parsing() == asked
    # Beside where the script was called, not where it lies.
    assert (tmp_path / "out of it" / "sparse.plan").read_bytes() == b"plan"


def test_trtexec_is_told_the_same() -> None:
    job = job_of(
        flags=["SPARSE_WEIGHTS", "VERSION_COMPATIBLE", "REFIT"],
        workspace_gib=1.5,
        builder_level=4,
        compatibility="ampere+",
        ranges={"a:0": ((1, 0), (2, 7), (2, 7)), "b": ((), (), ())},
    )
    text = script_of(job, {"a:0": (2, 7), "b": ()}, {"a:0": (1, 0), "b": ()})
    used = set(re.findall(r"(?<= )'?(--[a-zA-Z]+)", " ".join(re.findall(r"trtexec .*", text))))
    assert used <= TRTEXEC
    for word in (
        "--sparsity=enable", "--stronglyTyped", "--versionCompatible", "--refit",
        "--memPoolSize=workspace:1610612736B", "--builderOptimizationLevel=4",
        "--hardwareCompatibilityLevel=ampere+",
    ):  # fmt: skip
        assert f" {word} " in text


def test_each_shape_is_timed_as_the_bundle_times_it(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    timed: list[dict[str, Sequence[int]]] = [{"x": (1, 16, 64)}, {"x": (8, 128, 64)}]
    ran = run_script(bundle, script_of(job_of(), *timed), ["polygraphy", "trtexec"])
    build, *runs = [options_of(call) for call in ran.calls_of("trtexec")]
    assert build["--maxShapes"] == "x:8x128x64"
    assert [run["--shapes"] for run in runs] == ["x:1x16x64", "x:8x128x64"]
    assert {run["--loadEngine"] for run in runs} == {build["--saveEngine"]}
    assert all("--noDataTransfers" in run for run in runs)
    assert "sparse.1.trtexec.log:GPU Compute Time: min = 1 ms" in ran.said
    # Which TensorRT 11 does unasked, as it does capture CUDA graphs.
    newer = script_of(job_of(), *timed, version="11.4.0.106")
    assert newer.count("--noCudaGraph") == 2
    assert "--noDataTransfers" not in newer


def test_what_fails_is_said_and_the_rest_is_run(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    ran = run_script(
        bundle, script_of(job_of(), {"x": (1, 16, 64)}), ["polygraphy", "trtexec"], "convert"
    )
    assert ran.code == 1
    assert "no such engine\nThat failed, see " in ran.said
    assert len(ran.calls) == 3


@pytest.mark.parametrize("name", ["a,b", "it's", "every*", "two\nlines", "", "-o"])
def test_what_a_tool_cannot_be_told_is_left_out_by_name(name: str) -> None:
    text = script_of(job_of(ranges={name: ((1,), (2,), (2,))}), {name: (2,)})
    polygraphy = "run sparse.polygraphy " in text
    trtexec = "run sparse.trtexec " in text
    assert (polygraphy, trtexec) == {
        "two\nlines": (False, False), "": (False, False), "-o": (False, True),
    }.get(name, (True, False))  # fmt: skip
    notes = [line for line in text.splitlines() if line.startswith("# Not by ")]
    assert len(notes) == 2 - polygraphy - trtexec
    assert all(ascii(name) in note for note in notes)


def test_a_version_or_a_card_ends_no_comment() -> None:
    text = reproduction(
        [Build(name="dense", job=job_of(), timed=())],
        script=SCRIPT,
        version="10.1\nrm -r .",
        polygraphy="0.53.6",
        device="a card\nrm -r .",
    )
    assert not [line for line in text.splitlines() if line.startswith("rm")]


def test_weights_are_left_where_an_engine_is_to_be_timed() -> None:
    text = script_of(JOBS["without weights"], {"x": (1, 16, 64)})
    assert "--strip-plan" in text
    assert "--stripWeights" not in text
    assert "# With its weights, because trtexec runs no engine without." in text


def test_both_twins_and_graphs_of_a_bundle_are_in_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tensorrt, "gpu", lambda: H200)
    monkeypatch.setitem(sys.modules, "tensorrt", library("11"))
    options = EngineOptions(
        batches=(1, 2),
        sequences=(4,),
        tensorrt=TensorRtOptions(timing_cache=Path("/home/somebody/timings")),
    )
    backend = open_tensorrt("tensorrt", options)
    assert isinstance(backend, Reproducible)
    model = write_model(tmp_path)
    engines = [engine_of(backend, model.path, twin) for twin in ("dense", "sparse")]
    encoder = "onnx/sparse/encoder.onnx"
    (tmp_path / encoder).write_bytes((tmp_path / model.path).read_bytes())
    text = backend.reproduction(tmp_path, [*engines, engine_of(backend, encoder, "sparse")], SCRIPT)
    assert re.findall(r"^# (\w+(?:\.\w+)?)$", text, flags=re.MULTILINE) == [
        "dense", "sparse", "sparse.encoder",
    ]  # fmt: skip
    assert text.count("--shapes=x:1x4x64") == text.count("--shapes=x:2x4x64") == 3
    assert text.count("--sparse-weights") == text.count("--sparsity=enable") == 2
    # A folder of the machine that built is nothing to others.
    assert str(tmp_path) not in text
    assert "somebody" not in text


def engine_of(backend: TensorRt, onnx: str, twin: str) -> Engine:
    assert twin in ("dense", "sparse")
    return Engine(
        path="engines/tensorrt/x/engine.plan",
        backend=backend.name,
        twin="sparse" if twin == "sparse" else "dense",
        onnx=onnx,
        onnx_sha256="",
        device=backend.device(),
        dtype="float16",
        versions={},
        size_bytes=4,
    )


@pytest.mark.tensorrt_rtx
def test_tensorrt_rtx_makes_the_same_engine_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Byte by byte, by the commands of the script; for one product it builds reproducibly."""
    monkeypatch.setattr(tensorrt, "gpu", lambda: {"gpu": "none"})
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    model = write_model(bundle)
    options = EngineOptions(
        batches=(2, 6), sequences=(3,), tensorrt=TensorRtOptions(capabilities=("SM86", "SM120"))
    )
    backend = open_tensorrt("tensorrt_rtx", options)
    engine = backend.build(bundle, model, Path("engines/tensorrt-rtx/sparse"), twin="sparse")
    ran = run_script(bundle, backend.reproduction(bundle, [engine], SCRIPT), ["tensorrt_rtx"])
    log = (tmp_path / "out of it" / "sparse.polygraphy.log").read_text()
    assert ran.code == 0, log
    assert "Setting 2 target compute capabilities: [(8, 6), (12, 0)]" in log
    made = (tmp_path / "out of it" / "sparse.plan").read_bytes()
    assert made == (bundle / engine.path).read_bytes()
    calls = [options_of(call) for call in ran.calls_of("tensorrt_rtx")]
    assert {name for call in calls for name in call} == TENSORRT_RTX
    assert calls[0]["--computeCapabilities"] == "86,120"
    assert [call.get("--shapes") for call in calls] == [None, "x:2x3x64", "x:6x3x64"]
