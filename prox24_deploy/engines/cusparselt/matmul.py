"""Plans of cuSPARSELt that live as long as the layers which use them, through its C interface.

`torch._cslt_sparse_mm` makes a plan for every call and drops it afterwards. On Hopper a plan whose
result has the layout that the next layer reads loads its kernel anew, 0.3 s each time (H200,
cuSPARSELt 0.8), and a CUDA graph would keep kernels of plans that are gone. Here a plan is made
once for a GEMM and an algorithm, and shared by all layers that multiply so.

Source: the reference of cuSPARSELt, https://docs.nvidia.com/cuda/cusparselt/functions.html.
"""

import ctypes
import weakref
from functools import cache

import torch
from torch import Tensor

from prox24_deploy.core.errors import EngineError
from prox24_deploy.engines.cusparselt.formats import result_dtype
from prox24_deploy.engines.cusparselt.profile import GemmShape

_LIBRARY = "libcusparseLt.so.0"
# Above the size of every opaque structure in any version (512 bytes in 0.8), and their alignment.
_OPAQUE_BYTES, _ALIGNMENT = 16384, 64
# Alignment of matrices in bytes, and values of the enumerations of the C interface.
_MATRIX_ALIGNMENT = 16
_AS_IS, _TRANSPOSED = 0, 1
_BY_COLUMNS, _BY_ROWS = 1, 2
_DATA_TYPES = {torch.float16: 2, torch.int8: 3, torch.bfloat16: 14, torch.float8_e4m3fn: 28}
_SUM_INT32, _SUM_FLOAT32 = 0, 2
_HALF_OF_THE_WEIGHTS = 0
_DEFAULT_SELECTION = 0
_ALGORITHM, _ALGORITHM_COUNT = 0, 1
_BIAS = 8


class MatmulPlan:
    """How cuSPARSELt computes Y = X Wᵀ + b for one GEMM: descriptors, algorithm and workspace.

    Sums are float32, of integers int32, and Y is of `result_dtype`. Not for use by several streams
    at once: they would share the workspace.

    Args:
        shape: of the GEMM.
        dtype: of X and W: float16, bfloat16, float8_e4m3fn or int8.
        algorithm: its number; how many there are depends on the GEMM and on the dtype.
        bias: (n,) or None; the plan keeps it.

    Raises:
        EngineError: cuSPARSELt refuses the shape or the algorithm.
    """

    def __init__(
        self, shape: GemmShape, dtype: torch.dtype, algorithm: int, bias: Tensor | None
    ) -> None:
        self._shape, self._bias, self._result = shape, bias, result_dtype(dtype)
        self._gemm = _Gemm(shape, dtype, bias)
        _set_int(self._gemm, _ALGORITHM, algorithm)
        self._plan = _Opaque()
        _call("MatmulPlanInit", self._gemm.handle.at, self._plan.at, self._gemm.matmul.at,
              self._gemm.selection.at)  # fmt: skip
        size = ctypes.c_size_t()
        _call("MatmulGetWorkspace", self._gemm.handle.at, self._plan.at, ctypes.byref(size))
        self._workspace = torch.empty(size.value, dtype=torch.uint8, device="cuda")
        weakref.finalize(self, _destroy_plan, self._plan, self._gemm)

    def multiply(self, packed: Tensor, rows: Tensor) -> Tensor:
        """Y (m, n) of contiguous rows X (m, k) and a weight that `torch._cslt_compress` packed.

        Raises:
            EngineError: the kernel could not be launched.
        """
        result = rows.new_empty(self._shape.m, self._shape.n, dtype=self._result)
        one, zero = ctypes.c_float(1), ctypes.c_float(0)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _call("Matmul", self._gemm.handle.at, self._plan.at, ctypes.byref(one), _data(packed),
              _data(rows), ctypes.byref(zero), _data(result), _data(result),
              _data(self._workspace), ctypes.byref(stream), 1)  # fmt: skip
        return result


def count_algorithms(shape: GemmShape, dtype: torch.dtype) -> int:
    """How many algorithms cuSPARSELt has for a GEMM on this GPU; their numbers begin at 0.

    Raises:
        EngineError: cuSPARSELt refuses the shape.
    """
    gemm = _Gemm(shape, dtype, None)
    count = ctypes.c_int()
    _call("MatmulAlgGetAttribute", gemm.handle.at, gemm.selection.at, _ALGORITHM_COUNT,
          ctypes.byref(count), ctypes.c_size_t(4))  # fmt: skip
    return count.value


_plans: "weakref.WeakValueDictionary[tuple[object, ...], MatmulPlan]" = (
    weakref.WeakValueDictionary()
)


def shared_plan(
    shape: GemmShape, dtype: torch.dtype, algorithm: int, bias: Tensor | None
) -> MatmulPlan:
    """The plan for a GEMM, algorithm and bias on the current GPU, made if nobody holds it yet.

    Raises:
        EngineError: as `MatmulPlan`.
    """
    device = torch.cuda.current_device()
    key = (device, shape, dtype, algorithm, None if bias is None else bias.data_ptr())
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = MatmulPlan(shape, dtype, algorithm, bias)
    return plan


class _Opaque:
    """Memory for one structure of the C interface; `at` points to it."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(_OPAQUE_BYTES + _ALIGNMENT)
        address = ctypes.addressof(self._memory)
        self.at = ctypes.c_void_p(address + -address % _ALIGNMENT)


class _Gemm:
    """Descriptors of W (n, k), Xᵀ (k, m) and Yᵀ (n, m), in the layouts that PyTorch's rows have."""

    def __init__(self, shape: GemmShape, dtype: torch.dtype, bias: Tensor | None) -> None:
        kind, made = _DATA_TYPES[dtype], _DATA_TYPES[result_dtype(dtype)]
        summed = _SUM_INT32 if dtype == torch.int8 else _SUM_FLOAT32
        n, k, m = (ctypes.c_int64(size) for size in (shape.n, shape.k, shape.m))
        alignment = ctypes.c_uint32(_MATRIX_ALIGNMENT)
        self.handle, self.matmul, self.selection = _Opaque(), _Opaque(), _Opaque()
        self._weight, self._rows, self._result = _Opaque(), _Opaque(), _Opaque()
        handle = self.handle.at
        _call("Init", handle)
        _call("StructuredDescriptorInit", handle, self._weight.at, n, k, k, alignment, kind,
              _BY_ROWS, _HALF_OF_THE_WEIGHTS)  # fmt: skip
        _call("DenseDescriptorInit", handle, self._rows.at, m, k, k, alignment, kind, _BY_ROWS)
        _call("DenseDescriptorInit", handle, self._result.at, n, m, n, alignment, made, _BY_COLUMNS)
        _call("MatmulDescriptorInit", handle, self.matmul.at, _AS_IS, _TRANSPOSED, self._weight.at,
              self._rows.at, self._result.at, self._result.at, summed)  # fmt: skip
        if bias is not None:
            address = ctypes.c_void_p(bias.data_ptr())
            _call("MatmulDescSetAttribute", handle, self.matmul.at, _BIAS, ctypes.byref(address),
                  ctypes.c_size_t(ctypes.sizeof(address)))  # fmt: skip
        _call("MatmulAlgSelectionInit", handle, self.selection.at, self.matmul.at,
              _DEFAULT_SELECTION)  # fmt: skip


def _set_int(gemm: _Gemm, attribute: int, value: int) -> None:
    number = ctypes.c_int(value)
    _call("MatmulAlgSetAttribute", gemm.handle.at, gemm.selection.at, attribute,
          ctypes.byref(number), ctypes.c_size_t(ctypes.sizeof(number)))  # fmt: skip


def _destroy_plan(plan: _Opaque, gemm: _Gemm) -> None:
    """Unload the kernel; a failure at the end of a process has nobody to tell."""
    _library().cusparseLtMatmulPlanDestroy(plan.at)
    _library().cusparseLtDestroy(gemm.handle.at)


def _data(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _call(function: str, *arguments: object) -> None:
    library = _library()
    status = getattr(library, f"cusparseLt{function}")(*arguments)
    if status:
        said = library.cusparseLtGetErrorString(status)
        raise EngineError(
            f"cuSPARSELt failed in cusparseLt{function} ({said.decode()}); leave the layer dense, "
            "or see CUSPARSELT_LOG_LEVEL in its documentation."
        )


@cache
def _library() -> ctypes.CDLL:
    """The library that torch has loaded."""
    library = ctypes.CDLL(_LIBRARY)
    library.cusparseLtGetErrorString.restype = ctypes.c_char_p
    return library
