"""Write the recipe that a model of an unknown family seems to need."""

import inspect
import json
from collections.abc import Sequence

from torch import nn

from prox24_deploy.core.tasks import Task, TaskKind, task_of_class
from prox24_deploy.model.capacity import bounded
from prox24_deploy.model.directory import ModelDir, auto_class, quiet_transformers
from prox24_deploy.model.layers import is_layer
from prox24_deploy.model.notes import FUSED_EXPERTS, expert_weights

_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_ENCODER_DECODER = (
    "it is an encoder-decoder, for which no recipe can be drawn; copy bart.toml with its table "
    "[decoder], adapt both halves, and pass it with --recipe."
)
_SPEECH = (
    "it reads audio, for which no recipe can be drawn; if it is an encoder-decoder that reads "
    "log-mel features as Whisper does, copy whisper.toml, adapt both halves, and pass it with "
    "--recipe."
)


def advise(directory: ModelDir) -> str:
    """How to go on with a model of an unknown family, as the end of a sentence; "" if unknown."""
    if "num_mel_bins" in directory.config:
        return _SPEECH
    if directory.config.get("is_encoder_decoder"):
        return _ENCODER_DECODER
    skeleton, experts = _drawn(directory)
    if not skeleton:
        return ""
    how = "this one was drawn from the model, save it, correct it and pass it with --recipe"
    left_out = f"; {experts}" if experts else ""
    return f"{how}{left_out}:\n\n{skeleton}"


def skeleton_recipe(directory: ModelDir) -> str:
    """TOML of a recipe with the list of blocks and their linear layers as found in the model.

    The model is built from its configuration without memory for weights. What is written is a
    starting point: whether it exports, and which targets cost too much, only a build can tell.

    Returns:
        "" where the model cannot be built, reads no tokens, or has no list of blocks with layers
        that can be pruned. What of the blocks it leaves out stands in a comment.
    """
    return _drawn(directory)[0]


def _drawn(directory: ModelDir) -> tuple[str, str]:
    """The recipe of a model, and what is to be said of its experts; "" where there is none."""
    architecture = directory.architecture
    task = task_of_class(architecture)
    model = without_weights(directory, task.name)
    found = _largest_list(model) if model is not None else None
    inputs = _inputs_of(model) if model is not None else []
    if found is None or "input_ids" not in inputs:
        return "", ""
    path, blocks = found
    experts = _left_out(blocks)
    toml = _toml(directory.model_type, task, path, _layer_names(blocks), inputs)
    return (f"# Note: {experts}.\n{toml}" if experts else toml), experts


def without_weights(directory: ModelDir, task: Task) -> nn.Module | None:
    """The model of a directory for a task, on the meta device; None where it cannot be built."""
    transformers = quiet_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(
            directory.path, local_files_only=True, trust_remote_code=False
        )
        with bounded({name: tensor.numel for name, tensor in directory.tensors.items()}):
            model: nn.Module = auto_class(task).from_config(config, trust_remote_code=False)
    except Exception:
        return None
    return model


def _largest_list(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The list of modules with the most weights in layers that can be pruned; the outermost."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    sizes = [sum(m.weight.numel() for m in part.modules() if is_layer(m)) for _, part in lists]
    best = max(range(len(lists)), key=sizes.__getitem__, default=0)
    return lists[best] if lists and sizes[best] else None


def _layer_names(blocks: nn.ModuleList) -> list[str]:
    return list(
        dict.fromkeys(
            name for block in blocks for name, module in block.named_modules() if is_layer(module)
        )
    )


def _left_out(blocks: nn.ModuleList) -> str:
    """What is to be said of weights that no target can name; "" where there are none."""
    found = [(block, expert_weights(block)) for block in blocks]
    names = list(dict.fromkeys(name for _, weights in found for name in weights))
    if not names:
        return ""
    held = sum(block.get_parameter(name).numel() for block, known in found for name in known)
    share = held / sum(parameter.numel() for parameter in blocks.parameters())
    return (
        f"the experts ({', '.join(names)}), which hold {share:.0%} of the weights of the blocks, "
        f"are left out and stay dense, for {FUSED_EXPERTS}; copy that of export/qwen3_moe.toml"
    )


def _inputs_of(model: nn.Module) -> list[str]:
    known = inspect.signature(model.forward).parameters
    return [name for name in _TEXT_INPUTS if name in known]


def _toml(
    kind: str, task: TaskKind, blocks: str, targets: Sequence[str], inputs: Sequence[str]
) -> str:
    cache = task.decoder_alone
    lines = [
        f"family = {json.dumps(kind)}",
        f"model_types = [{json.dumps(kind)}]",
        f"task = {json.dumps(task.name)}",
        f"blocks = {json.dumps(blocks)}",
        f"targets = {json.dumps(list(targets))}",
        *(["cache = true"] if cache else []),
        "inputs = [",
    ]
    for name in inputs:
        length = "past + sequence" if cache and name == "attention_mask" else "sequence"
        lines.append(f'    {{ name = "{name}", dtype = "int64", axes = ["batch", "{length}"] }},')
    if task.output is None:
        raise ValueError(f"no recipe can be drawn for {task.name}")
    output = task.output[0]
    axes = ", ".join(json.dumps(axis) for axis in task.output[1])
    lines += ["]", f'outputs = [{{ name = "{output}", dtype = "float", axes = [{axes}] }}]']
    return "\n".join(lines) + "\n"
