"""Which backend a name selects, and what is said of a name that selects none."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prox24_deploy.config.options import EngineOptions
from prox24_deploy.config.recipe import parse_recipe, shipped_recipes
from prox24_deploy.core.errors import BackendMissingError, Prox24Error, UsageError
from prox24_deploy.engines import AVAILABLE_BACKENDS, Origin, backend_by_name
from prox24_deploy.engines.onnxruntime import OnnxRuntime

ORIGIN = Origin(
    dense=Path("model"),
    dense_sha256="",
    pruned="pruned",
    quantized="quantized.safetensors",
    recipe=parse_recipe(shipped_recipes()["bert"], "bert"),
)

OPTIONS = EngineOptions()


def refused(name: str) -> Prox24Error:
    with pytest.raises(Prox24Error) as caught:
        backend_by_name(name, OPTIONS, ORIGIN)
    return caught.value


def test_auto_is_the_one_that_needs_no_gpu() -> None:
    assert backend_by_name("auto", OPTIONS, ORIGIN) == backend_by_name(
        "onnxruntime", OPTIONS, ORIGIN
    )
    assert backend_by_name("auto", OPTIONS, ORIGIN) == OnnxRuntime()
    assert backend_by_name("onnxruntime", OPTIONS, ORIGIN).name == "onnxruntime"
    assert backend_by_name("onnxruntime", OPTIONS, ORIGIN).device()


@pytest.mark.gpu
def test_cusparselt_is_chosen_by_name_where_there_is_a_gpu() -> None:
    backend = backend_by_name("cusparselt", OPTIONS, ORIGIN)
    assert (backend.name, backend.device()) == ("cusparselt", torch.cuda.get_device_name())
    assert backend.sparse_kernels


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_cusparselt_is_missing_and_says_what_to_do() -> None:
    error = refused("cusparselt")
    assert type(error) is BackendMissingError
    assert str(error) == (
        "Backend 'cusparselt' needs an NVIDIA GPU (Ampere or newer) and a CUDA build of torch, but "
        f"torch {torch.__version__} finds no CUDA device; pass --backend onnxruntime, or run on a "
        "machine with one."
    )


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_refused_where_layers_must_read_as_many_rows_each_time(family: str) -> None:
    origin = replace(ORIGIN, recipe=parse_recipe(shipped_recipes()[family], family))
    told = (
        rf"Backend 'cusparselt' times each layer .* tokens an expert of recipe {family} reads "
        "depends on the text; .* pass --backend onnxruntime or tensorrt."
    )
    with pytest.raises(UsageError, match=told):
        backend_by_name("cusparselt", OPTIONS, origin)
    assert backend_by_name("onnxruntime", OPTIONS, origin).name == "onnxruntime"


# Names are matched whole: no case folding, no prefixes, no spaces.
@pytest.mark.parametrize("name", ["openvino", "", "ONNXRuntime", "onnx", " auto", "tensorrt_rtx"])
def test_an_unknown_name_is_a_usage_error_that_lists_the_names(name: str) -> None:
    error = refused(name)
    assert type(error) is UsageError
    names = ", ".join(AVAILABLE_BACKENDS)
    assert str(error) == f"Backend {name!r} does not exist; pass one of auto, {names}."


def test_no_engine_is_loaded_before_it_is_chosen() -> None:
    code = (
        "import sys; from prox24_deploy.engines import backend_by_name\n"
        "print([m for m in ('onnxruntime', 'torch', 'tensorrt') if m in sys.modules])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
