"""The rooms and the direction between them, read from the imports themselves."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from longest_files import LONGEST
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from prox24_deploy import __version__

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
OPTIONAL = ("sbom", "lm-eval", "tables", "speech", "images")
# torch.onnx imports these when it exports.
INDIRECT = {"onnx", "onnxscript"}
# Comes with torch for CUDA, which alone uses it.
BROUGHT = {"triton"}
MAX_LINES = 50
OURS = "prox24_deploy."
HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "safetensors"}
# What is imported there may not be installed: Triton, and the extra for bills of materials.
SPARED = {
    "pruning/permute_search.py",
    "pruning/solvers/admm_step.py",
    "pruning/solvers/baselines.py",
    "pruning/solvers/prox.py",
    "packaging/package.py",
}
_OPTIONS = "each option of the command is a parameter, and is handed on by its name"
# Longer functions, by file and name, and why they are.
LONG = {
    ("cli/build.py", "build"): _OPTIONS,
    ("cli/build.py", "prune"): _OPTIONS,
    ("cli/build.py", "recover"): _OPTIONS,
    ("cli/inspect.py", "plan"): _OPTIONS,
    ("cli/package.py", "package"): _OPTIONS,
}


@cache
def tree_of(path: Path) -> ast.Module:
    """A module, parsed once."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Dotted names that a module imports; those under TYPE_CHECKING count, as they bind design."""
    tree = tree_of(path)
    nodes = tree.body if top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(parts: Sequence[str]) -> str:
    """The room that a dotted name below the package lies in; the solvers are one of their own."""
    return "solvers" if list(parts[:2]) == ["pruning", "solvers"] else parts[0].removesuffix(".py")


def room(path: Path) -> str:
    """First folder below the package, or the module's own name."""
    return room_of(path.relative_to(PACKAGE).parts)


def ours(path: Path) -> set[str]:
    """Rooms and modules of the package that a module imports."""
    prefix = "prox24_deploy."
    return {
        room_of(n.removeprefix(prefix).split(".")) for n in imports(path) if n.startswith(prefix)
    }


# What each room may import besides itself and the core; a room stands below those that it imports.
MAY_IMPORT = {
    "core": set(),
    "config": set(),
    "sparsity": set(),
    "solvers": {"sparsity"},
    "model": {"config", "sparsity"},
    "evaluation": {"config", "model"},
    "data": {"config", "model", "evaluation"},
    "pruning": {"config", "sparsity", "solvers", "model", "evaluation", "data"},
    "rotation": {"config", "sparsity", "solvers", "model", "data"},
    "recovery": {"config", "sparsity", "model", "evaluation", "data", "pruning"},
    "quantization": {"config", "sparsity", "solvers", "model", "pruning", "recovery"},
    "graph": {"config", "sparsity", "quantization"},
    "engines": {"config", "sparsity", "model", "quantization", "graph"},
    "latency": {"engines"},
    "bundle": {"__version__"},
    "report": {"config", "latency"},
    "regression": {"config", "bundle", "report"},
    # Which weights of a file are 2:4 is declared in what is handed over, too.
    "packaging": {
        "__version__", "config", "sparsity", "graph", "engines", "bundle", "report", "regression",
    },
    "pipeline": {
        "config", "model", "evaluation", "data", "pruning", "recovery", "quantization", "graph",
        "engines", "latency", "bundle", "report", "regression", "packaging", "rotation",
    },
    "cli": {
        "__version__", "config", "graph", "engines", "bundle", "report", "regression", "packaging",
        "pipeline",
    },
    "pytest_plugin": {"report", "regression"},
    "__main__": {"cli"},
    # Where the public names are, each loaded when it is asked for.
    "__init__": {"config", "pruning", "report", "packaging", "pipeline"},
}  # fmt: skip
LOOSE = {"__init__", "__main__", "pytest_plugin"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_lies_before_it(path: Path) -> None:
    own = room(path)
    assert ours(path) <= MAY_IMPORT[own] | {own, "core"}


def test_every_room_is_in_the_table_in_its_order() -> None:
    assert {room(path) for path in MODULES} == MAY_IMPORT.keys()
    seen: set[str] = {"__version__"}
    for name, allowed in MAY_IMPORT.items():
        assert allowed <= seen, name
        seen.add(name)


def test_no_command_loads_at_its_start_what_it_may_not_need() -> None:
    for path in (PACKAGE / "cli").glob("*.py"):
        assert not any("prox24_deploy.pipeline" in n for n in imports(path, top_level=True)), path


def test_no_module_lies_loose() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == LOOSE


@pytest.mark.parametrize("name", ["core", "config", "report", "regression", "packaging"])
def test_records_and_reports_know_no_torch(name: str) -> None:
    for path in (PACKAGE / name).rglob("*.py"):
        assert not {"torch", "transformers"} & {n.split(".")[0] for n in imports(path)}, path


def test_the_map_of_the_code_names_every_file() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\* `([\w/]+\.py)`: \S", text, flags=re.MULTILINE)
    modules = [path.relative_to(PACKAGE) for path in MODULES if path.stem not in LOOSE]
    assert sorted(listed) == sorted(str(path) for path in modules)
    named = re.findall(r"\| `([\w/]+\.py)`", text)
    assert named
    assert all((PACKAGE / name).is_file() for name in named)


def test_solvers_know_nothing_but_torch_and_the_compilers_of_their_loops() -> None:
    known = {"torch", "prox24_deploy"} | set(sys.stdlib_module_names)
    compilers = {
        "prox_cpu": {"numba", "numpy"},
        "prox_cuda": {"triton"},
        "sparsegpt_cuda": {"triton"},
    }
    for path in (PACKAGE / "pruning" / "solvers").glob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert roots <= known | compilers.get(path.stem, set()), path
        assert not roots & {"pathlib", "logging", "os", "io"}, path


@cache
def modules_imported(path: Path) -> set[Path]:
    """Files of the package that a module imports as it is loaded, without those for types alone."""
    tree = tree_of(path)
    names = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    files = (ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in names)
    return {file for file in files if file.is_file()}


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {path: modules_imported(path) for path in MODULES}
    TopologicalSorter(graph).prepare()


@cache
def libraries_of(path: Path) -> frozenset[str]:
    """Libraries that a module imports itself."""
    return frozenset(name.split(".")[0] for name in imports(path, top_level=True))


def loaded_by(path: Path, seen: set[Path]) -> set[str]:
    """Libraries that come with a module when it is imported."""
    seen.add(path)
    found = set(libraries_of(path))
    for other in modules_imported(path) - seen:
        found |= loaded_by(other, seen)
    return found


def inner_imports(path: Path) -> Iterator[ast.ImportFrom]:
    """Imports of the package inside of functions."""
    for function in ast.walk(tree_of(path)):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(OURS):
                    yield node


def test_an_import_inside_of_a_function_spares_somebody_a_heavy_library() -> None:
    """The command line starts without what a command needs; the others without torch and ONNX."""
    for path in MODULES:
        if room(path) in {"cli", "pytest_plugin"} or str(path.relative_to(PACKAGE)) in SPARED:
            continue
        own = loaded_by(path, set()) & HEAVY
        for node in inner_imports(path):
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            files = [ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in names]
            loads = {lib for file in files if file.is_file() for lib in loaded_by(file, set())}
            assert (loads & HEAVY) - own, f"{path}:{node.lineno}"


def test_only_the_command_line_prints_or_exits() -> None:
    for path in MODULES:
        if room(path) in {"cli", "__main__"}:
            continue
        for node in ast.walk(tree_of(path)):
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


def test_pinned_versions_lie_within_the_declared_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = {
        canonicalize_name(pin.name): next(iter(pin.specifier)).version
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
        for pin in [Requirement(line)]
    }
    declared = [Requirement(line) for line in project["dependencies"]]
    for one in declared:
        assert one.specifier.contains(pins[canonicalize_name(one.name)].partition("+")[0]), one
    # Its versions are those of a driver, and end nothing.
    unbounded = {one.name for one in declared if not any(s.operator == "<" for s in one.specifier)}
    assert unbounded == {"nvidia-ml-py"}


def test_the_changelog_begins_with_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\d+\.\d+\.\d+) - \d{4}-\d\d-\d\d$", text, re.MULTILINE)
    assert newest is not None
    assert newest[1] == __version__


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Every function and method of a module, with its lines from `def` to the end."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def test_no_function_outgrows_what_can_be_seen_at_once() -> None:
    long = {
        (str(path.relative_to(PACKAGE)), name)
        for path in MODULES
        for name, lines in functions(path)
        if lines > MAX_LINES
    }
    assert long == LONG.keys(), "split it by meaning, or shorten the list"


def test_most_functions_are_read_at_a_glance() -> None:
    lines = sorted(length for path in MODULES for _, length in functions(path))
    assert lines[len(lines) // 2] <= 9
    assert lines[len(lines) * 9 // 10] <= 25


def test_only_what_has_many_parameters_is_excused() -> None:
    for file, name in LONG:
        tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
        (function,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name]
        assert len([*function.args.args, *function.args.kwonlyargs]) >= 10, name


@pytest.mark.parametrize(
    "module", ["prox24_deploy", "prox24_deploy.cli", "prox24_deploy.pipeline.run"]
)
def test_importing_loads_no_heavy_library(module: str) -> None:
    heavy = ["torch", "transformers", "onnx", "onnxruntime", "tensorrt"]
    # Help is there in half a second.
    heavy += ["numpy"] * module.endswith(".cli")
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_the_longest_files_of_tests_are_there() -> None:
    assert len(set(LONGEST)) == len(LONGEST)
    assert all((ROOT / "tests" / name).is_file() for name in LONGEST)
