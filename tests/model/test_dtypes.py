"""The dtype of an export is the checkpoint's own, and what cannot be is said before any work."""

import json
from pathlib import Path

import pytest
import torch
from command_line import run_cli
from model_cases import BERT, LLAMA
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_bert, write_tiny_llama

from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.core.types import DType
from prox24_deploy.model.directory import open_model_dir
from prox24_deploy.model.dtypes import settled_dtype
from prox24_deploy.report.assemble import load_report


def stored_as(path: Path, blocks: torch.dtype, others: torch.dtype) -> Path:
    """Convert the matrices inside of blocks, and everything else, in the checkpoint's file."""
    file = path / "model.safetensors"
    weights = {
        name: tensor.to(blocks if "layer" in name and tensor.ndim == 2 else others)
        for name, tensor in load_file(file).items()
    }
    save_file(weights, file, {"format": "pt"})
    return path


@pytest.mark.parametrize(
    ("blocks", "others", "expected"),
    [
        (torch.float32, torch.float32, "float32"),
        (torch.float16, torch.float16, "float16"),
        (torch.bfloat16, torch.bfloat16, "bfloat16"),
        # What is pruned decides, not the larger embeddings or the norms that were left wide.
        (torch.bfloat16, torch.float32, "bfloat16"),
        (torch.float16, torch.bfloat16, "float16"),
    ],
)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_layers_that_are_pruned_decide(
    tmp_path: Path, family: str, blocks: torch.dtype, others: torch.dtype, expected: str
) -> None:
    if family == "bert":
        path, recipe = write_tiny_bert(tmp_path / "model"), BERT
    else:
        path, recipe = write_tiny_llama(tmp_path / "model"), LLAMA
    directory = open_model_dir(stored_as(path, blocks, others))
    assert settled_dtype(directory, recipe, None) == expected
    assert settled_dtype(directory, recipe, "float16") == "float16"


def test_all_weights_decide_where_names_tell_nothing(tmp_path: Path) -> None:
    directory = open_model_dir(
        stored_as(write_tiny_bert(tmp_path / "model"), torch.bfloat16, torch.float16)
    )
    strange: Recipe = BERT.model_copy(update={"blocks": "trunk.stages"})
    assert settled_dtype(directory, BERT, None) == "bfloat16"
    sizes = {"bfloat16": 0, "float16": 0}
    for tensor in directory.tensors.values():
        sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel
    assert settled_dtype(directory, strange, None) == max(sizes, key=sizes.__getitem__)


@pytest.mark.parametrize("asked", [None, "float32"])
def test_a_dtype_that_nothing_is_exported_in_must_be_asked_for(
    tmp_path: Path, asked: DType | None
) -> None:
    path = stored_as(write_tiny_bert(tmp_path / "model"), torch.float64, torch.float64)
    directory = open_model_dir(path)
    if asked is not None:
        assert settled_dtype(directory, BERT, asked) == asked
        return
    with pytest.raises(
        ModelDirError, match=r"stores its weights in float64, .* pass --dtype float"
    ):
        settled_dtype(directory, BERT, None)
    done = run_cli("build", path, "-o", tmp_path / "out")
    assert done.code == 2
    assert not (tmp_path / "out").exists()


def test_a_bfloat16_checkpoint_is_exported_as_it_is_and_said_not_to_run_on_a_cpu(
    tmp_path: Path, prose: Path
) -> None:
    model = write_tiny_llama(tmp_path / "model", dtype=torch.bfloat16)
    out = tmp_path / "out"
    done = run_cli(
        "build", model, "-o", out, "--calibration", prose, "--method", "magnitude",
        "--calibration-tokens", "2048", "--evaluation-tokens", "1024", "--shapes", "batch=1",
        "sequence=8",
    )  # fmt: skip
    assert done.code in {0, 5}, done.err
    report = load_report(out / "report.json")
    assert report.options["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in report.sparsity.tensors if tensor.expected} == {"bfloat16"}
    (missing,) = report.not_measured
    assert "no bfloat16 kernels; build with --dtype float16 or float32" in missing.reason
    assert any("numerics of the bfloat16 files were not checked" in w for w in report.warnings)
    exported = json.loads(run_cli("export", out, "--json").out)
    assert {file["dtype"] for file in exported["sparse"]} == {"bfloat16"}
