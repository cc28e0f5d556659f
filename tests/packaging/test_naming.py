"""What a model is called: the user first, then its card, then its folder; never _name_or_path."""

import json
from pathlib import Path

import pytest

from prox24_deploy.core.errors import UsageError
from prox24_deploy.packaging.naming import folder_name, source_name

COMMIT = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"


def model_dir(path: Path, card: str | None = None) -> Path:
    path.mkdir(parents=True)
    config = {"_name_or_path": "org/what-it-was-made-from"}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if card is not None:
        (path / "README.md").write_text(card, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("# all-MiniLM-L6-v2\nThis is", "all-MiniLM-L6-v2"),
        ("---\nlicense: mit\n---\n\n\n# sentence-transformers/gtr-t5-base\n", None),
        (
            "---\nmodel-index:\n- name: bert-finetuned\n  results: []\n---\n# Other-1\n",
            "bert-finetuned",
        ),
        (
            "---\nmodel-index: [{name: SentenceTransformer based on x/y-1}]\n---\n# E5-small\n",
            "E5-small",
        ),
        ("# Model Card for `Mistral-7B`\n", "Mistral-7B"),
        ("# Model card of: Qwen/Qwen3-0.6B\n", "Qwen/Qwen3-0.6B"),
        ("Phi-2\n=====\n", "Phi-2"),
        ("# [bge-m3](https://example.org)\n", "bge-m3"),
        ("```bash\n# pip-install 3\n```\n\n## Not-the-1st\n\n# real-name\n", "real-name"),
        # Words of a page are no name, and nor is what would be a path.
        ("# Introduction\n", "folder"),
        ("# Usage\n\n# gte-small\n", "folder"),
        ("# A model of 3 parts\n", "folder"),
        ("# ../../etc\n", "folder"),
        ("# a/b/c-1\n", "folder"),
        ("# -1\n", "folder"),
        ("no heading\n", "folder"),
        ("---\n: [\n---\n# x-1\n", "x-1"),
        ("---\nmodel-index: 3\n---\n", "folder"),
        ("---\nmodel-index: [3, {name: 7}, {}]\n---\n", "folder"),
        ("\xff\xfe# \x00\n", "folder"),
        (None, "folder"),
    ],
)
def test_the_card_names_its_model(tmp_path: Path, card: str | None, name: str | None) -> None:
    found = source_name(model_dir(tmp_path / "folder", card))
    assert found == (name or "sentence-transformers/gtr-t5-base")


@pytest.mark.parametrize("asked", ["mine", "owner/my-model_1.0", "Modèle"])
def test_the_user_names_it_first(tmp_path: Path, asked: str) -> None:
    assert source_name(model_dir(tmp_path / "folder", "# all-MiniLM-L6-v2\n"), asked) == asked


@pytest.mark.parametrize("asked", ["", "a b", "/a", "a/", "a/b/c", "../a", "-a", "a\nb", "x" * 97])
def test_what_is_no_name_is_refused(tmp_path: Path, asked: str) -> None:
    with pytest.raises(UsageError, match=r"cannot be used, .* pass another --name"):
        source_name(model_dir(tmp_path / "folder"), asked)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (f"hub/models--BAAI--bge-small-en/snapshots/{COMMIT}", "BAAI/bge-small-en"),
        (f"hub/models--gpt2/snapshots/{COMMIT}", "gpt2"),
        ("models--a--b--c/snapshots/main/onnx", "a/b--c"),
        (f"mine/{COMMIT}", "mine"),
        ("mine/deadbeef", "deadbeef"),
        ("mine", "mine"),
    ],
)
def test_a_cached_snapshot_has_the_name_of_its_repository(
    tmp_path: Path, place: str, name: str
) -> None:
    path = model_dir(tmp_path / place)
    assert folder_name(path) == source_name(path) == name
    link = tmp_path / "link"
    link.symlink_to(path)
    assert folder_name(link) == name


def test_the_current_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_dir(tmp_path / "here"))
    assert folder_name(Path()) == "here"
