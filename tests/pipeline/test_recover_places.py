"""Where a recovered model may go, and by which teacher: nothing is mixed, nothing is lost."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from prox24_deploy.bundle.bundle import open_bundle
from prox24_deploy.bundle.manifest import Manifest, StageEntry, read_manifest, write_manifest
from prox24_deploy.config.options import BuildOptions, PruneOptions, RecoverOptions, TextOptions
from prox24_deploy.core.errors import BundleError, ModelDirError, UsageError
from prox24_deploy.model.directory import open_model_dir
from prox24_deploy.pipeline.context import read_context
from prox24_deploy.pipeline.stages import recover


def pruned_from(folder: Path, source: dict[str, str]) -> Path:
    """A bundle whose manifest says that it was pruned from these files."""
    entry = StageEntry(
        key="0", inputs={"source": source}, reads=[], outputs=[], seconds=0, finished=""
    )
    folder.mkdir()
    write_manifest(folder, Manifest(stages={"prune": entry}))
    return folder


def test_a_bundle_is_recovered_in_itself_whether_it_is_named_as_output_or_not(
    tmp_path: Path,
) -> None:
    bundle = pruned_from(tmp_path / "bundle", {})
    assert recover.is_own(bundle, None)
    assert recover.is_own(bundle, tmp_path / "none" / ".." / "bundle")
    assert not recover.is_own(bundle, tmp_path / "new")


def test_no_output_holds_or_lies_in_another_model(tmp_path: Path) -> None:
    bundle, other = (pruned_from(tmp_path / name, {}) for name in ("bundle", "other"))
    with pytest.raises(BundleError, match=r"holds a model that was pruned there, and .*bundle is"):
        recover.is_own(bundle, other)
    with pytest.raises(BundleError, match=r"lies in what is recovered, .*bundle; pass another -o"):
        recover.is_own(bundle, bundle / "sub")
    with pytest.raises(ModelDirError, match="absent does not exist; pass a bundle or"):
        recover.is_own(tmp_path / "absent", None)
    (tmp_path / "model").mkdir()
    with pytest.raises(UsageError, match="is not a bundle that the recovered model could go to"):
        recover.is_own(tmp_path / "model", None)


def test_the_teacher_of_a_bundle_has_the_weights_that_it_was_pruned_from(
    tiny_bert: Path, tmp_path: Path
) -> None:
    teacher = open_model_dir(tiny_bert)
    files = {**teacher.fingerprint(), "tokenizer.json": "another"}
    recover.require_teacher(pruned_from(tmp_path / "same", files), teacher)
    bundle = pruned_from(tmp_path / "other", {**files, "model.safetensors": "0" * 64})
    with pytest.raises(ModelDirError, match="pruned from other weights than those of the teacher"):
        recover.require_teacher(bundle, teacher)


def test_a_manifest_says_by_what_its_model_was_recovered(tmp_path: Path) -> None:
    with open_bundle(pruned_from(tmp_path / "bundle", {})) as bundle:
        recover.note_options(bundle, RecoverOptions(steps=7))
    found = read_manifest(tmp_path / "bundle").options
    assert found["recover"] == json.loads(json.dumps(found["recover"]))
    assert found["recover"]["steps"] == 7


@pytest.mark.parametrize("part", ["text", "prune"])
def test_no_output_lies_in_samples_or_masks(tiny_bert: Path, tmp_path: Path, part: str) -> None:
    read = tmp_path / "read"
    read.mkdir()
    save_file({"a": torch.zeros(1)}, read / "model.safetensors")
    found: dict[str, Any] = {
        "text": TextOptions(evaluation=(read,)), "prune": PruneOptions(mask=read)
    }  # fmt: skip
    options = BuildOptions(**{part: found[part]})
    with pytest.raises(BundleError, match=r"out lies in the folder of \w+ .*read; pass another -o"):
        read_context(tiny_bert, read / "out", options)


@pytest.mark.parametrize("option", [{"top_k": 5}, {"temperature": 2.0}])
def test_options_of_logits_are_refused_where_there_are_none(
    tiny_bert: Path, option: dict[str, Any]
) -> None:
    options = BuildOptions(recover=RecoverOptions(steps=1, **option), device="cpu")
    context = read_context(tiny_bert, None, options)
    with pytest.raises(UsageError, match=r"--recover-\S+ \d has no effect on a model for feature-"):
        recover.require_usable(options, context)
    config = {**context.source.config, "id2label": {"0": "LABEL_0"}}
    reranker = replace(
        context,
        recipe=context.recipe.model_copy(update={"task": "text-classification"}),
        source=replace(context.source, config=config),
    )
    with pytest.raises(UsageError, match="which gives one score and no classes; leave it out"):
        recover.require_usable(options, reranker)
