"""The Python API: the page that documents it runs, and it is as light and private as it says."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import prox24_deploy as p24
from prox24_deploy.sparsity.pattern import is_24

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


def code_blocks() -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    return [part.split("```")[0] for part in text.split("```python\n")[1:]]


def test_the_page_runs_from_top_to_bottom(
    tiny_bert: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_bert, tmp_path / "model_dir")
    shutil.copy(prose, tmp_path / "domain.txt")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in code_blocks():
        exec(block, names)
    assert names["report"].verdict in {"pass", "fail", "inconclusive"}
    assert names["found"] is not None
    assert "pruned" in {layer.status for layer in names["pruned"].layers}
    assert names["proof"].proven
    assert not names["proof"].violations
    assert names["scores"].metrics[0].samples > 0
    assert (tmp_path / "SHA256SUMS").is_file()
    module = names["module"]
    pruned = [layer.name for layer in names["done"].layers if layer.status == "pruned"]
    assert set(pruned) == {name.removesuffix(".weight") for name in names["done"].axes}
    for name, axis in names["done"].axes.items():
        assert is_24(module.get_parameter(name).detach(), axis)


def test_every_public_name_is_there_and_is_what_type_checkers_are_told() -> None:
    tree = ast.parse(Path(p24.__file__).read_text(encoding="utf-8"))
    told = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {*told, "__version__"} == set(p24.__all__) == set(dir(p24))
    for name, module in told.items():
        assert getattr(p24, name).__module__ == module
    with pytest.raises(AttributeError, match="has no attribute 'prun'"):
        _ = p24.prun


def test_importing_it_takes_less_than_a_tenth_of_a_second() -> None:
    code = (
        "import time; t = time.process_time(); import prox24_deploy; print(time.process_time()-t)"
    )
    run = [sys.executable, "-c", code]
    fastest = min(float(subprocess.run(run, capture_output=True, check=True).stdout) for _ in "123")
    assert fastest < 0.1


PRUNE = "p24.prune({model!r}, {out!r}, options)"
PLAN = "p24.plan({model!r}, options, gpu_profile='h100.json', sensitivity=False)"


@pytest.mark.parametrize(
    ("before", "call"), [("", f"{PRUNE}; {PLAN}"), ("import transformers", PRUNE)]
)
def test_no_function_asks_a_model_hub(
    before: str, call: str, tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    code = f"""
import socket
{before}
def refuse(*args, **kwargs): raise SystemExit(f"asked the network: {{args}}")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import prox24_deploy as p24
options = p24.BuildOptions(
    text=p24.TextOptions(calibration=({str(prose)!r},), calibration_tokens=1024),
    prune=p24.PruneOptions(method="magnitude"),
)
{call.format(model=str(tiny_bert), out=str(tmp_path / "out"))}
"""
    unset = ("HF_HUB_OFFLINE", "ORT_DISABLE_TELEMETRY")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr


class Block(nn.Module):
    """A residual block of two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        changed: torch.Tensor = self.down(torch.relu(self.up(hidden)))
        return hidden + changed


class Tower(nn.Module):
    """Three blocks behind each other, which read vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            features = block(features)
        return features


def tower() -> tuple[Tower, list[dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    return Tower(), [{"features": torch.randn(64, 8)} for _ in range(4)]


def test_a_module_of_ones_own_is_pruned_in_place_and_closer_than_by_magnitude() -> None:
    dense, batches = tower()
    errors = {}
    for method in ("prox", "magnitude"):
        module, _ = tower()
        module.train()
        done = p24.prune_module(
            module,
            batches[:3],
            blocks="blocks",
            held_out=batches[3:],
            options=p24.PruneOptions(method=method),
        )
        assert module.training
        assert len(done.axes) == 6
        assert all(layer.held_out_error is not None for layer in done.layers)
        outputs = [model(**batches[3]).detach() for model in (dense, module)]
        errors[method] = float((outputs[0] - outputs[1]).norm())
    assert errors["prox"] < errors["magnitude"]


def test_a_module_that_does_not_fit_is_refused_in_one_sentence() -> None:
    module, batches = tower()
    prune = p24.prune_module
    with pytest.raises(p24.CalibrationError, match="There is no calibration batch"):
        prune(module, [], blocks="blocks")
    with pytest.raises(p24.CalibrationError, match="A batch has no input"):
        prune(module, [{}], blocks="blocks")
    with pytest.raises(p24.RecipeError, match="'layers', which Tower does not have"):
        prune(module, batches, blocks="layers")
    with pytest.raises(p24.RecipeError, match=r"'gate' matches no linear layer .* up, down"):
        prune(module, batches, blocks="blocks", layers=["gate"])
    with pytest.raises(p24.UsageError, match="max_loss and max_layers need the loss of a task"):
        prune(module, batches, blocks="blocks", options=p24.PruneOptions(max_layers=1))
    with pytest.raises(p24.UsageError, match=r"blocks\.0\.up\.weight is torch\.float16, expected"):
        prune(module.half(), batches, blocks="blocks")
    module.float().train()
    module.get_parameter("blocks.1.up.weight").data[0, 0] = float("nan")
    with pytest.raises(p24.ModelDirError):
        prune(module, batches, blocks="blocks")
    assert module.training


def test_a_pruned_model_of_another_architecture_is_not_evaluated(
    tiny_bert: Path, tiny_llama: Path, prose: Path
) -> None:
    options = p24.BuildOptions(text=p24.TextOptions(calibration=(prose,), calibration_tokens=2048))
    with pytest.raises(p24.ModelDirError, match="holds a LlamaForCausalLM, expected a Bert"):
        p24.evaluate(tiny_bert, tiny_llama, options)


def test_paths_in_options_may_be_strings(tmp_path: Path) -> None:
    file = str(tmp_path / "a.txt")
    text = p24.TextOptions(calibration=file, evaluation=[file])  # type: ignore[arg-type]
    assert (text.calibration, text.evaluation) == ((Path(file),), (Path(file),))
    assert p24.BuildOptions(recipe=file).recipe == Path(file)  # type: ignore[arg-type]
    assert p24.BuildOptions().recipe is None


def test_every_part_of_a_module_keeps_its_mode() -> None:
    module, batches = tower()
    module.train()
    module.get_submodule("blocks.1").eval()
    p24.prune_module(module, batches, blocks="blocks", options=p24.PruneOptions(method="magnitude"))
    assert module.training
    assert not module.get_submodule("blocks.1").training
    assert module.get_submodule("blocks.2.up").training


def test_a_module_of_which_nothing_can_be_pruned_is_refused() -> None:
    narrow = nn.Module()
    narrow.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6))])
    narrow.forward = lambda features: narrow.get_submodule("blocks.0")(features)
    with pytest.raises(p24.RecipeError, match=r"No layer of Module can be pruned: blocks\.0\.0"):
        p24.prune_module(narrow, [{"features": torch.randn(8, 6)}], blocks="blocks")


def test_a_block_that_is_a_layer_is_refused() -> None:
    bare = nn.Module()
    bare.blocks = nn.ModuleList([nn.Linear(8, 8)])
    with pytest.raises(p24.RecipeError, match=r"Block blocks\.0 is a layer itself, expected"):
        p24.prune_module(bare, [{"features": torch.randn(8, 8)}], blocks="blocks")


@pytest.mark.parametrize("mask", [torch.zeros(4, 8), torch.zeros(4, 1, 8, 8)])
def test_a_mask_of_another_meaning_is_refused(mask: torch.Tensor) -> None:
    module, batches = tower()
    with pytest.raises(p24.CalibrationError, match=r"An attention_mask of shape .* cannot be used"):
        p24.prune_module(module, [{**batches[0], "attention_mask": mask}], blocks="blocks")


def test_precisions_have_their_short_names_here_too() -> None:
    assert p24.BuildOptions(dtype="fp16").dtype == "float16"  # type: ignore[arg-type]
    with pytest.raises(p24.UsageError, match="Precision 'int7' is not known"):
        p24.BuildOptions(dtype="int7")  # type: ignore[arg-type]
