"""Open an ONNX file as the graph that is proven: sound, dense, and with its functions inlined."""

import warnings
from pathlib import Path

import onnx
import onnx_ir as ir

from prox24_deploy.core.errors import UsageError
from prox24_deploy.graph.check.inlining import inline_functions
from prox24_deploy.graph.check.soundness import require_sound
from prox24_deploy.graph.check.sparse_tensors import make_dense

# Name of a tensor that the file stores as a sparse one, among what is noted of a model.
SPARSE_META = "prox24.sparse_tensor"


def load_onnx(path: Path) -> ir.Model:
    """Load the graph of an ONNX file; weights stay in the file until they are read.

    Local functions are inlined, so that a weight passed to one is seen at its consumer, unless that
    would pass the bounds of `graph.inlining`; then they stay in `model.functions`.

    Raises:
        UsageError: the file cannot be read, is not an ONNX model, or is one of which two readers
            may take different weights.
    """
    proto = _read(path)
    require_sound(proto, path)
    sparse = make_dense(proto, path)
    try:
        with warnings.catch_warnings():
            # Of keys that the format does not know, which are left out.
            warnings.simplefilter("ignore")
            model = ir.from_proto(proto)
        inline_functions(model)
    except Exception as error:  # the deserialiser raises types of many kinds
        raise UsageError(_not_onnx(path)) from error
    if not len(model.graph):
        raise UsageError(_not_onnx(path))
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        ir.external_data.set_base_dir(graph, path.parent)
    model.meta[SPARSE_META] = min(sparse, default="")
    return model


def _read(path: Path) -> onnx.ModelProto:
    # A pipe would keep the reader waiting for ever.
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is not a regular file; pass an ONNX file.")
    try:
        return onnx.load(path, format="protobuf", load_external_data=False)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); pass an ONNX file.") from error
    except Exception as error:  # protobuf raises types of many kinds
        raise UsageError(_not_onnx(path)) from error


def _not_onnx(path: Path) -> str:
    return f"{path} is not an ONNX model, or is damaged; pass a file that onnx.load can read."
