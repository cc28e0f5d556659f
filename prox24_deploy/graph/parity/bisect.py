"""Find the first module at which an exported file deviates from PyTorch."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from prox24_deploy.graph.check.model_file import load_onnx
from prox24_deploy.graph.check.modules import module_of
from prox24_deploy.graph.export.module import RecipeModule
from prox24_deploy.graph.parity.activations import watched
from prox24_deploy.sparsity.groups import Array

_FOLDER = "session.model_external_initializers_file_folder_path"


def first_difference(
    reference: RecipeModule, path: Path, feeds: Mapping[str, Array], relative: float
) -> str:
    """Path of the first module, in order of the forward pass, whose output differs.

    A module that gives one tensor is compared with the last node that carries its path, where that
    has the same shape. What a module computes on padding is compared too, so nothing should be
    padded.

    Args:
        reference: the float32 module.
        path: of the file; nothing is written beside it.
        feeds: one value per graph input, in the dtype of the file.
        relative: tolerated difference as a part of the largest magnitude of an output.

    Returns:
        "" where every module agrees that can be compared.
    """
    expected = _module_outputs(reference, feeds)
    found = _node_outputs(path, feeds, set(expected))
    for name, theirs in expected.items():
        mine = found.get(name)
        if mine is None or mine.shape != theirs.shape:
            continue
        gap = float(np.abs(mine.astype(np.float64) - theirs).max(initial=0.0))
        # Not `>`, which NaN would pass.
        if not gap <= relative * float(np.abs(theirs).max(initial=0.0)):
            return name
    return ""


def _module_outputs(reference: RecipeModule, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs by module path in order of completion, of modules that give a single one."""
    outputs: dict[str, list[Array]] = {}

    def see(name: str, output: torch.Tensor) -> None:
        outputs.setdefault(name, []).append(output.cpu().numpy().copy())

    tensors = [torch.from_numpy(feed) for feed in feeds.values()]
    device = next(reference.parameters()).device
    inputs = [(t.float() if t.is_floating_point() else t).to(device) for t in tensors]
    with torch.inference_mode(), watched(reference.wrapped, see):
        reference(*inputs)
    return {name: given[0] for name, given in outputs.items() if len(given) == 1}


def _node_outputs(path: Path, feeds: Mapping[str, Array], modules: set[str]) -> dict[str, Array]:
    """What the last node of each module gives, by module path."""
    model = load_onnx(path)
    last: dict[str, ir.Value] = {}
    for node in model.graph:
        parts = module_of(node).split(".")
        for length in range(1, len(parts) + 1):
            name = ".".join(parts[:length])
            if name in modules:
                last[name] = node.outputs[0]
    return dict(zip(last, run_for(model, path, list(last.values()), feeds), strict=True))


def run_for(
    model: ir.Model, path: Path, values: Sequence[ir.Value], feeds: Mapping[str, Array]
) -> list[Array]:
    """Run a graph in ONNX Runtime for values inside it, which become outputs of `model`.

    Args:
        model: loaded from `path`, where its external data lies; it is changed.
        path: of the file it was loaded from.
        values: of the graph, in the order of the result; one may stand twice.
        feeds: one value per graph input, in the dtype of the file.
    """
    session = session_for(model, path, values)
    found: list[Array] = session.run([value.name or "" for value in values], dict(feeds))
    return found


def session_for(model: ir.Model, path: Path, values: Sequence[ir.Value]) -> ort.InferenceSession:
    """Open a graph in ONNX Runtime whose `values` are outputs too; see `run_for`."""
    given = {value.name for value in model.graph.outputs}
    for value in {value.name: value for value in values}.values():
        if value.name not in given:
            model.graph.outputs.append(value)
    options = session_options()
    options.add_session_config_entry(_FOLDER, str(path.parent))
    return ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def session_options() -> ort.SessionOptions:
    """Options under which ONNX Runtime computes what the nodes of a file say.

    Left to itself it turns products between QuantizeLinear and DequantizeLinear into products of
    integers, on x86 of unsigned by signed ones, whose sums of two saturate at 16 bits where the
    processor has AVX2 or AVX512 without VNNI.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options
