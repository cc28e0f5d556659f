"""The manifest: nothing in a bundle can change unseen, and no path in it leads outside."""

import json
from pathlib import Path

import pytest

from prox24_deploy.errors import BundleError
from prox24_deploy.release.manifest import (
    MANIFEST_FILE,
    Manifest,
    StageEntry,
    canonical_json,
    hash_file,
    list_files,
    read_manifest,
    verify,
    write_manifest,
)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Two files and a sealed manifest."""
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"graph")
    (tmp_path / "report.json").write_bytes(b"{}")
    files = {name: hash_file(tmp_path / name) for name in list_files(tmp_path)}
    stage = StageEntry(key="k", inputs={"a": [1, "é"]}, outputs=["onnx"], seconds=1.5)
    write_manifest(tmp_path, Manifest(complete=True, files=files, stages={"export": stage}))
    return tmp_path


def rewrite(root: Path, **changes: object) -> None:
    """Change entries and seal again, as somebody with bad intentions would."""
    manifest = json.loads((root / MANIFEST_FILE).read_bytes()) | changes
    (root / MANIFEST_FILE).write_bytes(canonical_json(manifest))


def test_it_reads_what_it_wrote(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert list(manifest.files) == ["onnx/model.onnx", "report.json"]
    assert manifest.files["report.json"].size == 2
    assert manifest.stages["export"].inputs == {"a": [1, "é"]}
    assert verify(bundle) == []


def test_every_flipped_bit_of_the_manifest_is_found(bundle: Path) -> None:
    path = bundle / MANIFEST_FILE
    sound = path.read_bytes()
    for position in range(len(sound)):
        flipped = bytearray(sound)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(bytes(flipped))
        faults = verify(bundle)
        assert faults, position
        assert any(MANIFEST_FILE in fault for fault in faults)
    path.write_bytes(sound)
    assert verify(bundle) == []


def test_a_changed_missing_or_extra_file_is_named(bundle: Path) -> None:
    (bundle / "onnx" / "model.onnx").write_bytes(b"grapf")
    assert verify(bundle)[0].startswith("onnx/model.onnx was changed: 5 bytes with sha256 ")
    (bundle / "onnx" / "model.onnx").unlink()
    assert verify(bundle) == ["onnx/model.onnx is missing."]
    (bundle / "onnx" / "model.onnx").write_bytes(b"graph")
    (bundle / "onnx" / ".extra").write_bytes(b"")
    assert verify(bundle) == [f"onnx/.extra is not listed in {MANIFEST_FILE}."]


def test_an_unfinished_build_does_not_verify(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    manifest.complete = False
    write_manifest(bundle, manifest)
    assert any("unfinished build" in fault for fault in verify(bundle))


def test_without_a_manifest_there_is_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"manifest.json cannot be read"):
        verify(tmp_path)
    with pytest.raises(BundleError, match="is not a directory"):
        verify(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a/../b", ".", "", "a//b"])
def test_a_path_that_leaves_the_bundle_is_refused(bundle: Path, name: str) -> None:
    rewrite(bundle, files={name: {"sha256": "0", "size": 1}})
    with pytest.raises(BundleError, match="is not a plain path inside the bundle"):
        read_manifest(bundle)
    stage = {"key": "k", "inputs": {}, "outputs": [name], "seconds": 1}
    rewrite(bundle, files={}, stages={"export": stage})
    with pytest.raises(BundleError, match="is not a plain path inside the bundle"):
        read_manifest(bundle)


@pytest.mark.parametrize(
    "changes", [{"schema_version": 2}, {"tool": "other"}, {"files": []}, {"surprise": 1}]
)
def test_a_manifest_of_another_kind_is_refused(bundle: Path, changes: dict[str, object]) -> None:
    rewrite(bundle, **changes)
    with pytest.raises(BundleError, match=r"is damaged or of another version \("):
        read_manifest(bundle)


def test_the_same_value_has_one_text() -> None:
    assert canonical_json({"b": 1, "a": "é"}) == '{\n  "a": "é",\n  "b": 1\n}\n'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))
