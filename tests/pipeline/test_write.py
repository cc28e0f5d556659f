"""Without text of the user's a decoder is calibrated on what it writes itself, once a bundle."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prox24_deploy.bundle.bundle import Bundle
from prox24_deploy.bundle.manifest import read_manifest
from prox24_deploy.config.options import BuildOptions, PruneOptions, RecoverOptions, TextOptions
from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.recovery import WrittenText
from prox24_deploy.data import written
from prox24_deploy.data.written import read_written
from prox24_deploy.model import mapped, offload
from prox24_deploy.model.batch import Samples
from prox24_deploy.model.checkpoint import write_tensors
from prox24_deploy.pipeline import run as pipeline
from prox24_deploy.pipeline import stages
from prox24_deploy.pipeline.context import read_context
from prox24_deploy.recovery import session

OPTIONS = BuildOptions(
    text=TextOptions(calibration_tokens=1100, evaluation_tokens=1024),
    prune=PruneOptions(method="magnitude", refinement="none"),
    device="cpu",
)


def silent(*_: object) -> None:
    """Progress that nobody sees."""


def prune(model: Path, out: Path, **changes: Any) -> Any:
    options = replace(OPTIONS, **changes)
    return pipeline.prune(model, out, options, fresh=False, progress=silent)


@pytest.fixture(scope="module")
def bundle(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("write") / "bundle"
    prune(tiny_llama, out)
    return out


def test_the_text_is_listed_by_hash_and_said_to_be_written(bundle: Path, tiny_llama: Path) -> None:
    manifest = read_manifest(bundle)
    assert "written/tokens.safetensors" in manifest.files
    found = json.loads((bundle / "stages" / "prune.json").read_text(encoding="utf-8"))
    tokens = load_file(bundle / "written" / "tokens.safetensors")["tokens"]
    source = found["calibration"]
    assert (source["kind"], source["paths"]) == ("written", [])
    assert (source["samples"], source["tokens"]) == (len(tokens), tokens.numel())
    assert source["tokens"] >= 1024
    # What accuracy is judged by stays what it was.
    held_out = read_context(tiny_llama, None, OPTIONS).held_out.source
    assert (found["held_out"]["kind"], found["held_out"]["sha256"]) == ("split", held_out.sha256)


def test_what_is_trained_on_is_written_once_and_has_nothing_of_what_was_pruned_on(
    bundle: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An eighth of that is withheld, and tells what the training is worth.
    out = shutil.copytree(bundle, tmp_path / "bundle")
    write = written.write_text
    seen: list[tuple[int, ...]] = []

    def remembered(*arguments: Any) -> Any:
        batches, record = write(*arguments)
        seen.extend(tuple(row) for batch in batches for row in batch.inputs["input_ids"].tolist())
        return batches, record

    monkeypatch.setattr(session, "write_text", remembered)
    options = replace(OPTIONS, recover=RecoverOptions(steps=12, step_tokens=512))
    pipeline.recover(out, tiny_llama, None, options, progress=silent)
    pruned_on = load_file(out / "written" / "tokens.safetensors")["tokens"].tolist()
    assert len(pruned_on) >= 16
    assert len(seen) >= 16
    assert not {*seen} & {*map(tuple, pruned_on)}
    # It is kept for another recovery of this bundle, and not for one with another seed.
    monkeypatch.setattr(written.Author, "_sample", None)
    options = replace(options, recover=RecoverOptions(steps=12, step_tokens=512, learning_rate=0.1))
    pipeline.recover(out, tiny_llama, None, options, progress=silent)
    other = replace(options, text=replace(options.text, seed=1))
    with pytest.raises(TypeError, match="not callable"):
        pipeline.recover(out, tiny_llama, None, other, progress=silent)


def test_it_is_written_once_and_pruned_on(
    bundle: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.write, "_write", None)
    seen: list[Samples] = []
    reused: list[list[str]] = []
    run = Bundle.run

    def record(bundle: Bundle, stage: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        if stage.name == "prune":
            seen.append(inputs.calibration)
        result = run(bundle, stage, inputs, *rest, **more)
        reused.append([*bundle.reused])
        return result

    monkeypatch.setattr(Bundle, "run", record)
    prune(tiny_llama, bundle)
    assert reused[-1] == ["write", "prune"]
    tokens = load_file(bundle / "written" / "tokens.safetensors")["tokens"]
    rows = torch.cat([batch.inputs["input_ids"] for batch in seen[0].batches])
    assert torch.equal(rows, tokens.long())
    assert all(bool(batch.real.all()) for batch in seen[0].batches)


def test_text_of_the_user_takes_its_place(
    bundle: Path, tiny_llama: Path, prose: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    found = prune(tiny_llama, out, text=replace(OPTIONS.text, calibration=(prose,)))
    assert found.calibration.kind == "file"
    assert not (out / "written").exists()
    assert "write" not in read_manifest(out).stages


def test_a_large_model_on_a_cpu_takes_the_built_in_text(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(stages.write, "MOST_WEIGHTS_ON_CPU", 100)
    assert prune(tiny_llama, tmp_path / "bundle").calibration.kind == "builtin"
    assert "is not asked to write its calibration text on a CPU" in caplog.text
    assert not (tmp_path / "bundle" / "written").exists()


def test_a_model_that_does_not_fit_writes_the_same_from_files(
    bundle: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Path] = []
    load = mapped.load_mapped

    def noted(directory: Any, recipe: Any, folder: Path, **more: Any) -> Any:
        kept.append(folder)
        return load(directory, recipe, folder, **more)

    monkeypatch.setattr(mapped, "load_mapped", noted)
    # What it wrote is there when pruning, which comes next, is refused.
    with pytest.raises(UsageError, match="Pruning takes at least"):
        prune(tiny_llama, tmp_path / "small", memory_limit_gib=1e-6)
    assert len(kept) == 1
    assert (tmp_path / "small") in kept[0].parents
    found, expected = (
        load_file(folder / "written" / "tokens.safetensors")["tokens"]
        for folder in (tmp_path / "small", bundle)
    )
    assert torch.equal(found, expected)


def test_a_model_that_does_not_fit_into_a_gpu_is_not_asked_to_write(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []

    def none_free(device: torch.device, _: int | None) -> int:
        asked.append(device)
        return 0

    monkeypatch.setattr(offload, "free_on", none_free)
    monkeypatch.setattr(stages.write, "torch_device", lambda _: torch.device("cuda"))
    with pytest.raises(UsageError, match="memory of the GPU as a whole; pass text of your own"):
        prune(tiny_llama, tmp_path / "bundle")
    assert asked == [torch.device("cuda")]


def test_a_model_that_repeats_itself_takes_the_built_in_text(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(written, "is_degenerate", lambda *_: True)
    assert prune(tiny_llama, tmp_path / "bundle").calibration.kind == "builtin"
    assert "wrote 0 usable tokens, expected 1024 at least" in caplog.text


def test_a_model_that_does_not_say_how_texts_start_takes_the_built_in_text(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(written, "start_token", lambda *_: None)
    assert prune(tiny_llama, tmp_path / "llama").calibration.kind == "builtin"


def test_a_file_is_read_in_batches_as_of_any_other_text(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = read_context(tiny_llama, None, OPTIONS).recipe
    tokens = torch.arange(5 * 1024).view(5, 1024) % 7
    write_tensors(tmp_path / "t", {"tokens": tokens.int()}, {})
    record = WrittenText(written=9, samples=7, tokens=5 * 1024, sha256="0" * 64)
    found = read_written(tmp_path / "t", recipe, record)
    assert [len(batch.real) for batch in found.batches] == [2, 2, 1]
    assert found.source.sha256 == "0" * 64
    assert set(found.batches[0].inputs) == {"input_ids", "attention_mask"}
