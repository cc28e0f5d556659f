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

from prox24_deploy.artifacts import DType
from prox24_deploy.engines import cuda_graph, cusparselt, gemm, torch_model
from prox24_deploy.engines.linear import SparseLinear
from prox24_deploy.engines.profile import GpuProfile
from prox24_deploy.pruning.pattern import is_24

CARD = "a stand-in for a GPU"
SPARSE, DENSE = "stand_in_sparse_gemm", "stand_in_gemm"
RUN_MS = 10.0
# What each algorithm takes off a run, in ms; cuSPARSELt refuses any other number.
GAINS = {0: 0.1, 1: 0.5, 2: 0.3}
SPLIT_K, SPLIT_GAIN = 2, 0.1


@dataclass
class Machine:
    """Weights behind compressed tensors, and the sparse products of the current run."""

    weights: dict[int, Tensor] = field(default_factory=dict)
    gains: list[float] = field(default_factory=list)
    products: int = 0

    def compress(self, weight: Tensor) -> Tensor:
        assert is_24(weight), "cuSPARSELt compresses 2:4 weights only"
        packed = weight.new_zeros(weight.shape[0], weight.shape[1] * 9 // 16)
        self.weights[packed.data_ptr()] = weight.clone()
        return packed

    def sparse_mm(
        self,
        packed: Tensor,
        dense: Tensor,
        bias: Tensor | None = None,
        *,
        transpose_result: bool,
        alg_id: int,
        split_k: int,
        split_k_mode: int,
    ) -> Tensor:
        if alg_id not in GAINS or split_k not in {1, SPLIT_K} or split_k_mode > 0:
            raise RuntimeError("CUSPARSE_STATUS_INVALID_VALUE")
        assert transpose_result
        assert dense.shape[1] % 8 == 0, "rows come in eights"
        self.gains.append(GAINS[alg_id] + (SPLIT_GAIN if split_k == SPLIT_K else 0))
        self.products += 1
        product = dense.T.float() @ self.weights[packed.data_ptr()].T.float()
        return (product if bias is None else product + bias).to(dense.dtype)

    def stopwatch(self) -> "Stopwatch":
        return Stopwatch(self)


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


def kernels_by_layer(
    model: nn.Module, names: Sequence[str], run: Callable[[], object]
) -> Mapping[str, tuple[str, ...]]:
    run()
    kinds = {name: isinstance(model.get_submodule(name), SparseLinear) for name in names}
    return {name: (SPARSE if sparse else DENSE,) for name, sparse in kinds.items()}


def gpu_profile(dtype: DType) -> GpuProfile:
    return GpuProfile(CARD, "0.0", dtype, {"torch": torch.__version__}, ())


def install(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Put the stand-in where the GPU would be reached."""
    machine = Machine()
    monkeypatch.setattr(torch, "_cslt_compress", machine.compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", machine.sparse_mm)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: CARD)
    monkeypatch.setattr(torch_model, "require_gpu", lambda asker, instead: None)
    monkeypatch.setattr(cuda_graph, "DEVICE", "cpu")
    monkeypatch.setattr(cuda_graph, "capture", capture)
    monkeypatch.setattr(cuda_graph, "Stopwatch", machine.stopwatch)
    monkeypatch.setattr(gemm, "gpu_profile", gpu_profile)
    monkeypatch.setattr(cusparselt, "gpu_profile", gpu_profile)
    monkeypatch.setattr(cusparselt, "kernels_by_layer", kernels_by_layer)
    return machine
