"""The manifest: nothing in a bundle can change unseen, and no path in it leads outside."""

import hashlib
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from prox24_deploy import __version__
from prox24_deploy.bundle.layout import MANIFEST_FILE
from prox24_deploy.bundle.manifest import (
    SCHEMA_VERSION,
    FileEntry,
    Manifest,
    StageEntry,
    canonical_json,
    checksum_list,
    hash_file,
    list_files,
    read_manifest,
    verify,
    write_manifest,
)
from prox24_deploy.core.errors import BundleError
from prox24_deploy.core.records import ModelInfo

MODEL = ModelInfo(
    path="/models/é",
    sha256="ab" * 32,
    model_type="bert",
    architecture="BertModel",
    family="bert",
    task="feature-extraction",
    parameters=7,
    source_dtype="float32",
)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Two files and a sealed manifest."""
    root = tmp_path / "bundle"
    (root / "onnx").mkdir(parents=True)
    (root / "onnx" / "model.onnx").write_bytes(b"graph")
    (root / "report.json").write_bytes(b"{}")
    files = {name: hash_file(root / name) for name in list_files(root)}
    stage = StageEntry(key="k", inputs={"a": [1, "é"]}, outputs=["onnx"], seconds=1.5)
    write_manifest(root, Manifest(complete=True, files=files, stages={"export": stage}))
    return root


def rewrite(root: Path, **changes: object) -> None:
    """Change entries and format the text as the tool does, as a forger would."""
    manifest = json.loads((root / MANIFEST_FILE).read_bytes()) | changes
    (root / MANIFEST_FILE).write_bytes(canonical_json(manifest))


def test_it_reads_what_it_wrote(tmp_path: Path) -> None:
    written = Manifest(
        complete=True,
        verdict="pass",
        model=MODEL,
        recipe='family = "bert"\n',
        options={"shapes": [[1, 8]], "recipe": None},
        seed=24,
        versions={"torch": "2"},
        machine={"gpu": "none"},
        stages={"export": StageEntry(key="k", inputs={"é": 0.1}, outputs=["onnx"], seconds=1.5)},
        files={"onnx/model.onnx": FileEntry(sha256="00" * 32, size=2**40)},
    )
    write_manifest(tmp_path, written)
    read = read_manifest(tmp_path)
    assert len(read.self_sha256) == 64
    assert read.model_copy(update={"self_sha256": ""}) == written
    assert (read.schema_version, read.tool_version) == (SCHEMA_VERSION, __version__)


def test_writing_again_gives_the_same_bytes_and_leaves_nothing_beside(bundle: Path) -> None:
    before = (bundle / MANIFEST_FILE).read_bytes()
    write_manifest(bundle, read_manifest(bundle))
    assert (bundle / MANIFEST_FILE).read_bytes() == before
    assert sorted(p.name for p in bundle.iterdir()) == [MANIFEST_FILE, "onnx", "report.json"]


def test_its_own_hash_is_that_of_its_text_without_the_hash(bundle: Path) -> None:
    sound = (bundle / MANIFEST_FILE).read_text(encoding="utf-8")
    own = json.loads(sound)["self_sha256"]
    blank = sound.replace(own, "")
    assert hashlib.sha256(blank.encode()).hexdigest() == own


def test_every_flipped_bit_of_the_manifest_is_found(bundle: Path) -> None:
    path = bundle / MANIFEST_FILE
    sound = path.read_bytes()
    for position in range(len(sound)):
        flipped = bytearray(sound)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        assert any(MANIFEST_FILE in fault for fault in verify(bundle)), position
    path.write_bytes(sound)
    assert verify(bundle) == []


def test_a_manifest_cut_short_or_with_an_entry_left_out_is_found(bundle: Path) -> None:
    path = bundle / MANIFEST_FILE
    sound = path.read_bytes()
    for kept in (0, 1, len(sound) // 2, len(sound) - 1):
        path.write_bytes(sound[:kept])
        assert verify(bundle) != [], kept
    # Without this key the content reads as the default, which is what it was.
    parsed = json.loads(sound)
    assert parsed.pop("seed") == 0
    path.write_bytes(canonical_json(parsed))
    assert verify(bundle) == [f"{MANIFEST_FILE} was changed after it was written."]


def test_every_flipped_byte_of_every_file_is_found_and_the_file_named(bundle: Path) -> None:
    for name in ("onnx/model.onnx", "report.json"):
        sound = (bundle / name).read_bytes()
        for position in range(len(sound)):
            flipped = bytearray(sound)
            flipped[position] ^= 0xFF
            (bundle / name).write_bytes(flipped)
            (fault,) = verify(bundle)
            assert fault.startswith(f"{name} was changed: {len(sound)} bytes with sha256 ")
        (bundle / name).write_bytes(sound)
    assert verify(bundle) == []


def test_a_changed_file_is_described_as_found_and_as_expected(bundle: Path) -> None:
    (bundle / "report.json").write_bytes(b"{ }")
    found, expected = (hashlib.sha256(text).hexdigest()[:16] for text in (b"{ }", b"{}"))
    assert verify(bundle) == [
        f"report.json was changed: 3 bytes with sha256 {found}…, expected 2 bytes with {expected}…."
    ]


def test_missing_and_extra_files_are_named(bundle: Path) -> None:
    (bundle / "report.json").unlink()
    (bundle / "onnx" / "model.onnx").unlink()
    (bundle / "onnx" / "model.onnx").mkdir()
    (bundle / "onnx" / ".extra").write_bytes(b"")
    (bundle / "zz").symlink_to("nowhere")
    assert verify(bundle) == [
        "zz is a link, expected the file itself.",
        "onnx/model.onnx is missing.",
        "report.json is missing.",
        f"onnx/.extra is not listed in {MANIFEST_FILE}.",
    ]


def link_more(bundle: Path, outside: Path) -> str:
    (bundle / "more").symlink_to(outside)
    return "more"


def link_instead(bundle: Path, outside: Path) -> str:
    (bundle / "onnx").rename(outside / "onnx")
    (bundle / "onnx").symlink_to(outside / "onnx")
    return "onnx"


def link_file(bundle: Path, outside: Path) -> str:
    """To the very bytes that the manifest lists: they can change without anybody touching OUT."""
    (bundle / "onnx" / "model.onnx").rename(outside / "model.onnx")
    (bundle / "onnx" / "model.onnx").symlink_to(outside / "model.onnx")
    return "onnx/model.onnx"


@pytest.mark.parametrize("link", [link_more, link_instead, link_file])
def test_a_link_to_elsewhere_is_found(
    bundle: Path, tmp_path: Path, link: Callable[[Path, Path], str]
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    name = link(bundle, outside)
    assert any(fault.startswith(f"{name} ") for fault in verify(bundle))


def test_an_unfinished_build_does_not_verify(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    manifest.complete = False
    write_manifest(bundle, manifest)
    assert verify(bundle) == [
        f"{MANIFEST_FILE} belongs to an unfinished build; run the same build again."
    ]


def test_without_a_manifest_there_is_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json cannot be read \(No such file"):
        verify(tmp_path)
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        with pytest.raises(BundleError, match=rf"{name} is not a directory; pass the OUT of"):
            verify(tmp_path / name)


def test_a_manifest_that_is_a_folder_is_no_manifest(bundle: Path) -> None:
    (bundle / MANIFEST_FILE).unlink()
    (bundle / MANIFEST_FILE).mkdir()
    with pytest.raises(BundleError, match=r": manifest\.json cannot be read \(Is a directory"):
        verify(bundle)


HOSTILE = ["../x", "..", "/etc/x", "a/../../x", "a/../b", "a/..", ".", "./a", "", "a//b", "a/"]
HOSTILE += ["a\0b", "x" * 256, "a/" + "é" * 128, "/".join(["x" * 200] * 16)]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_path_that_leaves_the_bundle_is_refused(bundle: Path, name: str) -> None:
    rewrite(bundle, files={name: {"sha256": "0", "size": 1}})
    with pytest.raises(BundleError, match="is not a plain path inside the bundle"):
        read_manifest(bundle)
    stage = {"key": "k", "inputs": {}, "outputs": ["onnx", name], "seconds": 1}
    rewrite(bundle, files={}, stages={"export": stage})
    with pytest.raises(BundleError, match="is not a plain path inside the bundle"):
        read_manifest(bundle)


@pytest.mark.parametrize("name", ["a", "a/b.c", ".hidden", "..a", "a b/é", "-", "C:\\x"])
def test_an_unusual_path_inside_the_bundle_is_none_the_worse(bundle: Path, name: str) -> None:
    rewrite(bundle, files={name: {"sha256": "0", "size": 1}})
    assert list(read_manifest(bundle).files) == [name]


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"schema_version": 2}, "schema_version: Input should be 1"),
        ({"tool": "other"}, "tool: Input should be 'prox24-deploy'"),
        ({"files": []}, "files: "),
        ({"files": {"a": {"sha256": "0"}}}, "files.a.size: Field required"),
        ({"files": {"a": {"sha256": "0", "size": 1, "mode": 7}}}, "files.a.mode: Extra"),
        ({"surprise": 1}, "surprise: Extra inputs"),
        (
            {"stages": {"export": {"key": "k", "inputs": {}, "outputs": [], "seconds": "1e999"}}},
            "stages.export.seconds: Input should be a finite number",
        ),
    ],
)
def test_a_manifest_of_another_kind_is_refused_with_its_place(
    bundle: Path, changes: dict[str, object], where: str
) -> None:
    rewrite(bundle, **changes)
    with pytest.raises(BundleError) as caught:
        read_manifest(bundle)
    start, end = f"{bundle / MANIFEST_FILE} is damaged or of another version (", "pass another -o."
    assert str(caught.value).startswith(start + where)
    assert str(caught.value).endswith(end)
    # For `verify` it is a finding like any other, not an error.
    assert verify(bundle) == [str(caught.value)]


def test_a_manifest_that_is_not_json_is_refused_as_a_whole(bundle: Path) -> None:
    deep = b'{"options": ' + b"[" * 5000 + b"]" * 5000 + b"}"
    not_finite = b'{"options": {"x": NaN}}'
    for data in (b"", b"\xff", b"{", b'{"seed": 0, "seed": 1}', deep, not_finite):
        (bundle / MANIFEST_FILE).write_bytes(data)
        with pytest.raises(BundleError, match=r"manifest\.json is not readable JSON \(.*\); rest"):
            read_manifest(bundle)
    (bundle / MANIFEST_FILE).write_bytes(b"[]")
    with pytest.raises(BundleError, match=r"another version \(the file: "):
        read_manifest(bundle)


def test_the_same_value_has_one_text() -> None:
    expected = '{\n  "a": "é",\n  "b": {\n    "c": 1,\n    "d": [\n      0.1\n    ]\n  }\n}\n'
    assert canonical_json({"b": {"d": [0.1], "c": 1}, "a": "é"}) == expected.encode()
    assert canonical_json({"a": "é", "b": {"c": 1, "d": [0.1]}}) == expected.encode()
    assert canonical_json([math.inf, math.nan]) == b'[\n  "inf",\n  "nan"\n]\n'


def test_a_file_is_hashed_over_all_of_its_bytes(tmp_path: Path) -> None:
    # Longer than any read buffer.
    data = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(data)
    expected = FileEntry(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
    assert hash_file(tmp_path / "file") == expected


def test_files_are_listed_below_a_folder_a_file_or_nothing(bundle: Path) -> None:
    (bundle / "onnx" / "a" / "b").mkdir(parents=True)
    (bundle / "onnx" / "a" / "b" / ".c").touch()
    (bundle / "onnx.log").touch()
    assert list_files(bundle, "onnx") == ["onnx/a/b/.c", "onnx/model.onnx"]
    assert list_files(bundle, "report.json") == ["report.json"]
    assert list_files(bundle, "nowhere") == []
    assert list_files(bundle) == [
        MANIFEST_FILE, "onnx.log", "onnx/a/b/.c", "onnx/model.onnx", "report.json",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["plain", "with space", "back\\slash", "new\nline", "größe"])
def test_sha256sum_reads_any_name_in_the_list_of_hashes(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes(b"content")
    manifest = read_manifest(bundle)
    manifest.files[name] = hash_file(bundle / name)
    write_manifest(bundle, manifest)
    text = checksum_list(bundle, manifest)
    check = ["sha256sum", "--check", "--strict", "-"]
    ran = subprocess.run(check, input=text, cwd=bundle, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.splitlines()) == len(manifest.files) + 1
    (bundle / name).write_bytes(b"changed")
    ran = subprocess.run(check, input=text, cwd=bundle, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
