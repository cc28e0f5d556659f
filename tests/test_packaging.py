"""A wheel holds everything that the installed command needs, and nothing of the tests."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.packaging


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder appears in the repository."""
    pytest.importorskip("setuptools", minversion="77", reason="needs setuptools 77 to build")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "PACKAGE.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    for name in ("prox24_deploy", "export"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    ran = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_code_recipes_templates_and_licence(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "prox24_deploy").rglob("*")
        if path.is_file() and path.suffix in {".py", ".json", ".jinja", ".typed"}
    }
    assert len(expected) > 40
    assert expected <= names
    recipes = {f"prox24_deploy/recipes/{path.name}" for path in (ROOT / "export").glob("*.toml")}
    assert recipes <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "benchmarks/", "export/")) for name in names)


def test_the_page_of_a_package_index_links_to_nothing_that_it_has_not(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        text = archive.read(name).decode()
    assert "Description-Content-Type: text/markdown" in text
    page = text.partition("\n\n")[2]
    assert page.startswith("# prox24-deploy")
    links = re.findall(r"\]\(([^)]*)\)", page)
    assert links
    assert [link for link in links if not link.startswith("https://")] == []


def test_the_installed_package_finds_its_recipes(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(site), str(wheel)], check=True)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "import prox24_deploy; assert prox24_deploy.__file__.startswith(sys.argv[1]);"
        "from prox24_deploy.config.recipe import shipped_recipes;"
        "print(sorted(shipped_recipes()))"
    )
    ran = subprocess.run(
        [sys.executable, "-I", "-c", code, str(site)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "bert" in ran.stdout
    script = (site / "bin" / "prox24-deploy").read_text(encoding="utf-8")
    assert "prox24_deploy.cli" in script
