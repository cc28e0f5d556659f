"""The bill of materials where something is missing; test_handover.py reads a whole one."""

import json
import sys

import pytest
from builders import make_records

from prox24_deploy.bundle.manifest import FileEntry, Manifest
from prox24_deploy.core.errors import BackendMissingError, BundleError
from prox24_deploy.packaging.sbom import render_sbom

RECORDS = make_records(blocks=1)
MANIFEST = Manifest(
    complete=True,
    verdict="pass",
    model=RECORDS.model,
    versions={"python": "3.11.2", "torch": "2.13.0+cpu", "onnxruntime": "not installed"},
    files={"onnx/sparse/model.onnx": FileEntry(sha256="0" * 64, size=1)},
    self_sha256="e" * 64,
)


def test_it_lists_what_compiled_the_engines_and_nothing_that_was_not_there() -> None:
    bom = json.loads(render_sbom(MANIFEST, RECORDS.prune, {"tensorrt": "10.13.3"}))
    libraries = {p["name"]: p for p in bom["components"] if p["type"] == "library"}
    assert set(libraries) == {"torch", "tensorrt"}
    assert libraries["torch"]["purl"] == "pkg:pypi/torch@2.13.0%2Bcpu"
    assert libraries["tensorrt"]["version"] == "10.13.3"


def test_a_manifest_without_a_model_is_refused() -> None:
    with pytest.raises(BundleError, match="names no model"):
        render_sbom(MANIFEST.model_copy(update={"model": None}), RECORDS.prune, {})


@pytest.mark.parametrize("module", ["cyclonedx.output.json", "cyclonedx.validation.json"])
def test_a_library_that_is_not_there_is_named_with_its_remedy(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendMissingError, match=r"pip install 'prox24-deploy\[sbom\]'\.") as info:
        render_sbom(MANIFEST, RECORDS.prune, {})
    assert info.value.exit_code == 5


def test_a_validator_without_its_libraries_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from cyclonedx.exception import MissingOptionalDependencyException
    from cyclonedx.validation.json import JsonStrictValidator

    def missing(*_: object) -> None:
        raise MissingOptionalDependencyException("jsonschema")

    monkeypatch.setattr(JsonStrictValidator, "validate_str", missing)
    with pytest.raises(BackendMissingError, match="with its validator"):
        render_sbom(MANIFEST, RECORDS.prune, {})


def test_what_the_schema_refuses_is_not_written() -> None:
    wrong = MANIFEST.model_copy(update={"files": {"a": FileEntry(sha256="no hash", size=1)}})
    with pytest.raises(
        BundleError, match=r"what no SBOM of .* can hold \('no hash' .*\); build it"
    ):
        render_sbom(wrong, RECORDS.prune, {})


def test_what_the_library_refuses_is_not_written() -> None:
    wrong = MANIFEST.model_copy(update={"versions": {"": "1"}})
    with pytest.raises(BundleError, match=r"what no SBOM of .* can hold \(.*\); build it again"):
        render_sbom(wrong, RECORDS.prune, {})
