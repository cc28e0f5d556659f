"""Triton's own definition of a model configuration, as NVIDIA's tritonclient ships it."""

import importlib.metadata
import importlib.util
from typing import Any

from google.protobuf import text_format


def parse_config(text: str) -> Any:
    """An `inference.ModelConfig`; raises where the text is not one.

    The file is loaded by itself, for the package around it needs grpcio.
    """
    module = _definition()
    return text_format.Parse(text, module.ModelConfig())


def data_type_name(value: int) -> str:
    """Name of a value of `inference.DataType`."""
    return str(_definition().DataType.Name(value))


def _definition() -> Any:
    files = importlib.metadata.files("tritonclient") or []
    path = next(f for f in files if f.as_posix() == "tritonclient/grpc/model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("triton_model_config_pb2", path.locate())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
