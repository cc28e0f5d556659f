"""Pruning on a GPU gives what pruning on a CPU gives."""

from pathlib import Path

import pytest
import torch
from command_line import run_cli
from safetensors.torch import load_file

from prox24_deploy.pruning.pattern import is_24
from prox24_deploy.pruning.prox import objective_24, prox_24

pytestmark = pytest.mark.gpu
SMALL = ("--calibration-tokens", "4096", "--evaluation-tokens", "1024")


@pytest.mark.parametrize("lam", [1e-12, 0.1, 1.0, 10.0, 1e12])
def test_the_prox_on_cuda_reaches_the_objective_of_the_cpu(lam: float) -> None:
    weight = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    weight[0, :64] = 0.0
    on_cpu = prox_24(weight, lam).double()
    on_cuda = prox_24(weight.cuda(), lam).cpu().double()
    exact = weight.double()
    gap = objective_24(on_cuda, exact, lam) - objective_24(on_cpu, exact, lam)
    energy = 0.5 * exact.unflatten(-1, (-1, 4)).square().sum(-1)
    assert bool((gap.abs() <= 1e-6 * energy + 1e-12).all())


def test_pruning_on_cuda_agrees_with_the_cpu_and_with_itself(
    tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    weights = {}
    for name, device in (("cpu", "cpu"), ("first", "cuda"), ("second", "cuda")):
        run = run_cli(
            "prune", tiny_bert, "-o", tmp_path / name, "--calibration", prose, "--device", device,
            *SMALL,
        )  # fmt: skip
        assert run.code == 0, run.err
        weights[name] = load_file(tmp_path / name / "pruned" / "model.safetensors")
    targets = [n for n in weights["cpu"] if n.startswith("encoder") and n.endswith("dense.weight")]
    assert len(targets) == 6
    agreeing = total = 0
    for name in targets:
        first, second, cpu = (weights[run][name] for run in ("first", "second", "cpu"))
        assert is_24(first)
        assert torch.equal(first, second)
        agreeing += int(((first != 0) == (cpu != 0)).sum())
        total += cpu.numel()
    assert agreeing / total > 0.99
