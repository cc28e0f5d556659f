"""Versions of what shapes the numbers of a stage."""

from prox24_deploy.bundle.environment import versions


def numeric_versions() -> dict[str, str]:
    """Versions that can change a bit of the result."""
    known = versions()
    return {name: known[name] for name in _NUMERIC}


_NUMERIC = ("torch", "transformers", "numpy", "numba", "onnx", "onnxscript", "onnx-ir")
