"""Every name of TensorRT that our code uses, looked up in the real bindings of each version.

The bindings of 10 and 11 load over three empty libraries; nothing can be built with them. A name
that the code uses and the stand-in lacks fails here and in every test on the stand-in; a name that
the stand-in has and the bindings lack fails here.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import fake_tensorrt
import pytest
from fake_tensorrt import Version, offered

ENGINES = Path(__file__).parents[2] / "prox24_deploy" / "engines" / "tensorrt"
WHEELS: dict[Version, str] = {
    "10": "tensorrt-cu12-bindings==10.16.1.11",
    "11": "tensorrt-cu13-bindings==11.4.0.106",
}
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
FUNCTIONS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry", "getNvOnnxParserVersion", "getPluginRegistry",
    "initLibNvInferPlugins",
)  # fmt: skip
# In modules that import no TensorRT these names hold its objects.
HOLDERS = {"trt", "engine", "parser", "inspector", "refitter", "context"}
PROBE = """
import importlib, json, sys
library = importlib.import_module(sys.argv[1])
print(json.dumps([library.__version__, [
    f"{kind}.{name}" for kind, names in json.load(sys.stdin).items() for name in names
    if not hasattr(getattr(library, kind, None) if kind else library, name)
]]))
"""


def missing(module: str, names: dict[str, list[str]], **environment: str) -> tuple[str, list[str]]:
    """Version of a library and which names it lacks, asked in a process of its own."""
    ran = subprocess.run(
        [sys.executable, "-c", PROBE, module],
        input=json.dumps(names),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    version, lacking = json.loads(ran.stdout)
    return version, lacking


@pytest.fixture(scope="module", params=WHEELS)
def bindings(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Version, dict[str, str]]:
    """The bindings of one version over empty libraries, as variables of a process."""
    version: Version = request.param
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler for the empty libraries under the TensorRT bindings")
    folder = tmp_path_factory.mktemp(f"tensorrt-{version}")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    options = ["--only-binary", ":all:", "--retries", "1", "--dest", str(folder)]
    got = subprocess.run([*pip, *options, WHEELS[version]], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        pytest.skip(f"needs {WHEELS[version]}, pip cannot download it: {got.stderr[-200:]}")
    zipfile.ZipFile(wheels[0]).extractall(folder)
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for library in LIBRARIES:
        target = folder / f"lib{library}.so.{version}"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", target, source], check=True)
    return version, {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(folder)}


def test_real_bindings_have_every_name(bindings: tuple[Version, dict[str, str]]) -> None:
    version, environment = bindings
    found, lacking = missing("tensorrt_bindings", offered(version), **environment)
    assert found == fake_tensorrt.NUMBERS[version]
    assert lacking == []


def test_real_bindings_lack_what_only_tensorrt_rtx_has(
    bindings: tuple[Version, dict[str, str]],
) -> None:
    """The other way round: the probe does see what is not there."""
    _, environment = bindings
    wanted = offered("rtx")
    _, lacking = missing("tensorrt_bindings", wanted, **environment)
    assert set(lacking) == {
        "IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability",
        *(f"ComputeCapability.{name}" for name in wanted["ComputeCapability"]),
    }  # fmt: skip


@pytest.mark.tensorrt_rtx
def test_the_real_tensorrt_rtx_has_every_name() -> None:
    _, lacking = missing("tensorrt_rtx", offered("rtx"))
    assert lacking == []


@pytest.mark.parametrize(
    ("file", "ours"),
    [("backend.py", {"engine"}), ("job.py", set()), ("session.py", set())],
)
def test_the_code_uses_no_name_that_the_stand_in_lacks(file: str, ours: set[str]) -> None:
    """Read from the code itself: attributes of whatever holds an object of TensorRT."""
    known = {name for names in offered("rtx").values() for name in names}
    known |= offered("rtx").keys() | {"__version__"}
    used = set()
    for node in ast.walk(ast.parse((ENGINES / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            inner = node.value
            while isinstance(inner, ast.Attribute) and inner.attr not in HOLDERS:
                inner = inner.value
            holder = inner.attr if isinstance(inner, ast.Attribute) else getattr(inner, "id", "")
            # In `ours` are variables that hold a record of this project there.
            if holder in HOLDERS - ours:
                used.add(node.attr)
    assert len(used) > 1
    assert used <= known
