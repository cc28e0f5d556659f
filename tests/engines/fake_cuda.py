"""A stand-in for a GPU with cuSPARSELt, for machines that have neither.

It computes on the CPU what the GPU would, and its clock does not measure: a run takes 10 ms, less
a share for every sparse product in it that depends on the algorithm. It shows that the code around
the GPU asks for the right things; that the GPU does them is for tests/test_cuda.py to show.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from prox24_deploy.core.records import Compilation
from prox24_deploy.engines.cusparselt import backend as cusparselt
from prox24_deploy.engines.cusparselt import (
    cuda_graph,
    gemm,
    gemm_job,
    prepare,
    torch_model,
    trials,
)
from prox24_deploy.engines.cusparselt import matmul as cusparselt_plan
from prox24_deploy.engines.cusparselt.formats import OPERANDS, format_of, result_dtype
from prox24_deploy.engines.cusparselt.linear import PRODUCT_MARK
from prox24_deploy.engines.cusparselt.profile import GemmFormat, GemmShape, GpuProfile
from prox24_deploy.engines.cusparselt.trials import Trial
from prox24_deploy.pipeline import plan as planner
from prox24_deploy.sparsity.pattern import is_24

CARD = "a stand-in for a GPU"
SPARSE, DENSE = "stand_in_sparse_gemm", "stand_in_gemm"
RUN_MS = 10.0
# What each algorithm takes off a run, in ms; the last ends the process that tries it.
GAINS = (0.1, 0.6, 0.3, None)


@dataclass
class Machine:
    """Weights behind compressed tensors, and the sparse products of the current run."""

    weights: dict[int, Tensor] = field(default_factory=dict)
    last: Tensor = field(default_factory=lambda: torch.zeros(0))
    gains: list[float] = field(default_factory=list)
    products: int = 0
    # What every sparse product is multiplied by.
    error: float = 1.0
    # What the compiler of graphs says instead of compiling.
    obstacle: str = ""

    def compress(self, weight: Tensor) -> Tensor:
        assert is_24(weight), "cuSPARSELt compresses 2:4 weights only"
        packed = weight.new_zeros(weight.shape[0], weight.shape[1] * 9 // 16)
        self.weights[packed.data_ptr()] = self.last = weight.clone()
        return packed

    def compile(
        self, module: nn.Module, *, backend: str, fullgraph: bool, dynamic: bool
    ) -> Callable[..., object]:
        """Stands in for a compiler that there may not be here."""
        assert (backend, fullgraph) == ("inductor", True)

        def run(*inputs: Tensor) -> object:
            if self.obstacle:
                raise RuntimeError(self.obstacle)
            return module(*inputs)

        return run

    def plan(
        self, shape: GemmShape, dtype: torch.dtype, algorithm: int, bias: Tensor | None
    ) -> "Plan":
        multiple = OPERANDS[format_of(dtype)].row_multiple
        assert shape.m % multiple == 0, f"rows come in {multiple}s"
        gain = GAINS[algorithm]
        assert gain is not None, "this algorithm crashes"
        return Plan(self, shape, gain, bias)

    def run_trials(
        self, asked: Sequence[Trial], format: GemmFormat, answered: Callable[[int, int], None]
    ) -> dict[Trial, float]:
        gains = {trial: GAINS[trial.algorithm] for trial in asked}
        answered(len(gains), len(gains))
        return {trial: RUN_MS - gain for trial, gain in gains.items() if gain is not None}

    def stopwatch(self) -> "Stopwatch":
        return Stopwatch(self)


@dataclass(eq=False)
class Plan:
    machine: Machine
    shape: GemmShape
    gain: float
    bias: Tensor | None

    def multiply(self, packed: Tensor, rows: Tensor) -> Tensor:
        assert rows.is_contiguous()
        assert rows.shape == (self.shape.m, self.shape.k)
        self.machine.gains.append(self.gain)
        self.machine.products += 1
        weight = self.machine.weights.get(packed.data_ptr(), self.machine.last)
        if weight.shape != (self.shape.n, self.shape.k):
            # A copy, where another tensor lay; it is of what was compressed last.
            weight = self.machine.last
        product = rows.float() @ weight.T.float()
        biased = product if self.bias is None else product + self.bias
        return self.machine.error * biased.to(result_dtype(rows.dtype))


@dataclass
class Stopwatch:
    machine: Machine

    def milliseconds(self, replay: Callable[[], None], runs: int) -> npt.NDArray[np.float64]:
        times = []
        for _ in range(runs):
            self.machine.gains.clear()
            replay()
            times.append(RUN_MS - sum(self.machine.gains))
        return np.array(times)


def capture(run: Callable[[], tuple[Tensor, ...]]) -> cuda_graph.Captured:
    """Replays run again, into the same outputs."""
    outputs = run()

    def replay() -> None:
        with torch.inference_mode():
            for output, new in zip(outputs, run(), strict=True):
                output.copy_(new)

    return cuda_graph.Captured(replay, outputs)


def kernels_by_layer(run: Callable[[], object]) -> Mapping[str, tuple[str, ...]]:
    """Of each layer that a run multiplies sparse, by the ranges that mark them."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    names = (event.name for event in profiler.events() or ())
    return {
        name.removeprefix(PRODUCT_MARK): (SPARSE,)
        for name in names
        if name.startswith(PRODUCT_MARK)
    }


def gpu_profile() -> GpuProfile:
    return GpuProfile(gpu=CARD, driver="0.0", versions={"torch": torch.__version__}, gemms=())


def install(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Put the stand-in where the GPU would be reached."""
    machine = Machine()
    monkeypatch.setattr(torch, "_cslt_compress", machine.compress)
    monkeypatch.setattr(cusparselt_plan, "shared_plan", machine.plan)
    monkeypatch.setattr(cusparselt_plan, "count_algorithms", lambda shape, dtype: len(GAINS))
    monkeypatch.setattr(trials, "run_trials", machine.run_trials)
    gemm_job.gemm_inputs.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: CARD)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch_model, "require_gpu", lambda asker, instead: None)
    monkeypatch.setattr(planner, "require_gpu", lambda asker, instead: None)
    monkeypatch.setattr(planner, "gpu_profile", gpu_profile)
    monkeypatch.setattr(planner, "copy_rate", lambda: 4e6)
    monkeypatch.setattr(cuda_graph, "DEVICE", "cpu")
    monkeypatch.setattr(torch, "compile", machine.compile)
    # A child would look for the GPU itself.
    monkeypatch.setattr(prepare, "try_elsewhere", lambda *_: Compilation())
    monkeypatch.setattr(cuda_graph, "capture", capture)
    monkeypatch.setattr(cuda_graph, "Stopwatch", machine.stopwatch)
    monkeypatch.setattr(gemm, "gpu_profile", gpu_profile)
    monkeypatch.setattr(cusparselt, "gpu_profile", gpu_profile)
    monkeypatch.setattr(cusparselt, "kernels_by_layer", kernels_by_layer)
    return machine
