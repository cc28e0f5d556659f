"""The rooms and the direction between them, read from the imports themselves."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "prox24_deploy"
MODULES = sorted(PACKAGE.rglob("*.py"))
# Import name to distribution, where they differ.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cyclonedx": "cyclonedx-python-lib",
    "markdown_it": "markdown-it-py",
    "onnx_ir": "onnx-ir",
    "packageurl": "packageurl-python",
    "pynvml": "nvidia-ml-py",
    "yaml": "pyyaml",
}
# Extras whose libraries are imported by name, inside of the functions that need them.
OPTIONAL = ("sbom", "lm-eval")
# torch.onnx imports these when it exports.
INDIRECT = {"onnx", "onnxscript"}
# Comes with torch for CUDA, which alone uses it.
BROUGHT = {"triton"}
MAX_LINES = 500


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Dotted names that a module imports; those under TYPE_CHECKING count, as they bind design."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(path: Path) -> str:
    """First folder below the package, or the module's own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def ours(path: Path) -> set[str]:
    """Rooms and modules of the package that a module imports."""
    prefix = "prox24_deploy."
    return {n.removeprefix(prefix).split(".")[0] for n in imports(path) if n.startswith(prefix)}


COMMON = {
    "accuracy", "artifacts", "documents", "errors", "files", "fingerprint", "limits", "metrics",
    "options", "printable", "recipe", "snapshot", "tasks", "__version__",
}  # fmt: skip
MAY_IMPORT = {
    "pruning": {"pruning"},
    "model": {"model", "pruning"} | COMMON,
    "graph": {"graph"} | COMMON,
    "engines": {"engines", "graph", "model", "pruning"} | COMMON,
    "release": {"release", "engines"} | COMMON,
    "accuracy": {"artifacts"},
    "artifacts": {"fingerprint"},
    "errors": set(),
    "documents": {"errors"},
    "fingerprint": set(),
    "printable": set(),
    "options": {"artifacts", "errors", "fingerprint"},
    "limits": {"documents", "errors", "metrics"},
    "metrics": {"tasks"},
    "recipe": {"documents", "errors", "limits", "options", "tasks"},
    "snapshot": set(),
    "tasks": set(),
}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_lies_before_it(path: Path) -> None:
    allowed = MAY_IMPORT.get(room(path))
    if allowed is not None:
        assert ours(path) <= allowed
    assert "cli" not in ours(path) or room(path) in {"cli", "__main__"}


def test_pruning_knows_nothing_but_torch_and_the_compilers_of_its_loops() -> None:
    known = {"torch", "prox24_deploy"} | set(sys.stdlib_module_names)
    compilers = {"prox_cpu": {"numba", "numpy"}, "prox_cuda": {"triton"}}
    for path in (PACKAGE / "pruning").glob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert roots <= known | compilers.get(path.stem, set()), path
        assert not roots & {"pathlib", "logging", "os", "io"}, path


def test_only_the_command_line_prints_or_exits() -> None:
    for path in MODULES:
        if room(path) in {"cli", "__main__"}:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Name):
                assert node.id not in {"print", "SystemExit", "exit", "quit"}, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("sys", "exit"), ("os", "_exit")}, path


def test_terminal_libraries_stay_at_the_command_line() -> None:
    for path in MODULES:
        if room(path) != "cli":
            assert not {"typer", "rich"} & {name.split(".")[0] for name in imports(path)}, path


def distributions(requirements: Iterable[str]) -> set[str]:
    """Names in a list of requirements, without extras and versions."""
    return {re.split(r"[\[<>=]", requirement)[0] for requirement in requirements}


def libraries(names: Iterable[str]) -> set[str]:
    """Distributions of others that these modules are from."""
    roots = {name.split(".")[0] for name in names}
    third_party = roots - set(sys.stdlib_module_names) - {"prox24_deploy"}
    return {DISTRIBUTIONS.get(name, name) for name in third_party}


def test_every_imported_library_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = distributions(project["dependencies"])
    optional = distributions(
        line for extra in OPTIONAL for line in project["optional-dependencies"][extra]
    )
    # pytest itself loads the plugin, and nothing else in the package imports it.
    assert [path.stem for path in MODULES if "pytest" in imports(path)] == ["pytest_plugin"]
    needed = {library for path in MODULES for library in libraries(imports(path))}
    needed -= {"pytest"} | BROUGHT
    assert needed <= declared | optional, needed - declared - optional
    assert declared | optional <= needed | INDIRECT, (declared | optional) - needed
    for path in MODULES:
        assert not libraries(imports(path, top_level=True)) & optional, path


def test_no_module_outgrows_its_page() -> None:
    for path in MODULES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES, path


@pytest.mark.parametrize(
    "module", ["prox24_deploy", "prox24_deploy.cli", "prox24_deploy.pipeline.run"]
)
def test_importing_loads_no_heavy_library(module: str) -> None:
    heavy = ["torch", "transformers", "onnx", "onnxruntime", "tensorrt"]
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
