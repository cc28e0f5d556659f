"""The backends that a build can compile for, each declared once.

What a backend does stands in its own module under `engines/`; here is what every room may know of
it without loading its library.
"""

from dataclasses import dataclass
from typing import Literal

from prox24_deploy.core.extras import install_of

# https://docs.nvidia.com/cuda/cusparselt/types.html, cusparseLtSparsity_t: "paired 4:8 for e2m1".
NVFP4 = (
    "The sparse kernels for NVFP4 want pairs of weights (4:8), so no file that is 2:4 weight by "
    "weight runs sparse in NVFP4; fp8 and int8 take 2:4."
)

# Groups of options that only some backends read.
BackendOptions = Literal["tensorrt", "capabilities", "eager"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendKind:
    """What is known of a backend before it is loaded.

    Attributes:
        name: on the command line, and of its folder under `engines/` of a bundle.
        module: of its `open_backend(kind, options, origin)`; imported when it is asked for.
        title: what `doctor` calls what it needs.
        library: the module that it imports, as Python knows it.
        install: what installs that library.
        driver: another module that drives the library and has to be there too, "" for none.
        versions: entries of an engine's versions without which two builds are not alike.
        needs_gpu: why it cannot be used on a machine without an NVIDIA GPU, "" if it can.
        options: groups of options that have an effect on it.
    """

    name: str
    module: str
    title: str
    library: str
    install: str
    versions: tuple[str, ...]
    driver: str = ""
    needs_gpu: str = ""
    options: frozenset[BackendOptions] = frozenset()


BACKENDS = {
    kind.name: kind
    for kind in (
        BackendKind(
            name="onnxruntime",
            module="prox24_deploy.engines.onnxruntime",
            title="ONNX Runtime providers",
            library="onnxruntime",
            install="pip install onnxruntime",
            versions=("onnxruntime",),
        ),
        BackendKind(
            name="tensorrt",
            module="prox24_deploy.engines.tensorrt.backend",
            title="tensorrt",
            library="tensorrt",
            install=install_of("tensorrt"),
            versions=("tensorrt",),
            driver="polygraphy",
            needs_gpu="builds on an NVIDIA GPU, and there is none",
            options=frozenset({"tensorrt"}),
        ),
        BackendKind(
            name="tensorrt-rtx",
            module="prox24_deploy.engines.tensorrt.backend",
            title="tensorrt_rtx",
            library="tensorrt_rtx",
            install=install_of("tensorrt-rtx"),
            versions=("tensorrt_rtx",),
            driver="polygraphy",
            options=frozenset({"tensorrt", "capabilities"}),
        ),
        BackendKind(
            name="cusparselt",
            module="prox24_deploy.engines.cusparselt.backend",
            title="cuSPARSELt",
            library="torch",
            install="install a CUDA build of torch",
            versions=("torch", "cuda", "cusparselt"),
            needs_gpu="needs an NVIDIA GPU, Ampere or newer",
            options=frozenset({"eager"}),
        ),
    )
}
# What `--backend auto` stands for: the one that runs everywhere.
AUTO = BACKENDS["onnxruntime"]


def backends_with(options: BackendOptions) -> list[str]:
    """Names of the backends on which these options have an effect."""
    return [kind.name for kind in BACKENDS.values() if options in kind.options]
