"""Make small ONNX files with the exporters of other projects, for `foreign_check.py` to compare.

    python benchmarks/foreign_files.py EXPORTER OUT

EXPORTER is `legacy` (torch's exporter of TorchScript, in the environment of this project),
`optimum` or `genai`. The last two need an environment of their own, because they pin other versions
of transformers; this file imports nothing of the project and runs there as it is:

    python -m venv optimum && optimum/bin/pip install torch==2.13.0
    optimum/bin/pip install "transformers<4.58" optimum-onnx==0.1.0 onnx onnxruntime
    python -m venv genai && genai/bin/pip install torch==2.13.0
    genai/bin/pip install onnxruntime-genai==0.18.0 transformers onnx onnxruntime onnx-ir

The models have two blocks and random weights that are 2:4, but for one layer that is left dense
and one in which a single group holds three values.
"""

import argparse
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

WIDTH, VOCABULARY = 64, 96
# Weights whose last but one axis is that of the outputs; Conv1D stores (inputs, outputs).
_AXES = {"Linear": 1, "Conv2d": 1, "Conv1D": 0}


def config_of(layout: str) -> Any:
    """Configuration of a tiny model of one family."""
    transformers = import_module("transformers")
    common = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    wide = {"intermediate_size": 2 * WIDTH}
    if layout == "gpt2":
        return transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH, n_layer=2, n_head=4,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    if layout == "resnet":
        return transformers.ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"
        )
    if layout == "vit":
        return transformers.ViTConfig(**common, **wide, image_size=32, patch_size=8)
    kind = {"bert": "BertConfig", "llama": "LlamaConfig", "t5": "T5Config"}[layout]
    if layout == "t5":
        return transformers.T5Config(
            vocab_size=VOCABULARY, d_model=WIDTH, d_kv=16, d_ff=128, num_layers=2, num_heads=4
        )
    heads = {"num_key_value_heads": 2} if layout == "llama" else {}
    return getattr(transformers, kind)(
        vocab_size=VOCABULARY, max_position_embeddings=64, **common, **wide, **heads
    )


def class_of(layout: str) -> str:
    """Name of the class in transformers that a layout is opened with."""
    return {
        "gpt2": "GPT2LMHeadModel",
        "resnet": "ResNetModel",
        "vit": "ViTModel",
        "bert": "BertModel",
        "llama": "LlamaForCausalLM",
        "t5": "T5EncoderModel",
    }[layout]


def pruned_model(layout: str) -> Any:
    """A tiny model, 2:4 but for its second and its third layer."""
    torch.manual_seed(0)
    model = getattr(import_module("transformers"), class_of(layout))(config_of(layout))
    layers = [
        part
        for name, part in model.named_modules()
        if type(part).__name__ in _AXES and name != "lm_head"
    ]
    for index, layer in enumerate(layers):
        if index != 1 and layer.weight.shape[_AXES[type(layer).__name__]] % 4 == 0:
            prune(layer, spoil=index == 2)
    return model.eval()


def prune(layer: nn.Module, *, spoil: bool) -> None:
    """Keep two of every four weights along the inputs; three in one group if asked to."""
    axis = _AXES[type(layer).__name__]
    weight = layer.get_parameter("weight")
    moved = weight.data.movedim(axis, -1).clone(memory_format=torch.contiguous_format)
    groups = moved.view(-1, 4)
    groups.scatter_(-1, groups.abs().argsort(-1)[:, :2], 0.0)
    if spoil:
        groups[groups.shape[0] // 2, :3] = 0.5
    weight.data = moved.movedim(-1, axis).contiguous()


def save(layout: str, folder: Path) -> None:
    """Write a model directory with a tokenizer of whole words."""
    transformers, tokenizers = import_module("transformers"), import_module("tokenizers")
    words = {"<unk>": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<unk>", eos_token="<unk>"
    )
    pruned_model(layout).save_pretrained(folder)
    wrapped.save_pretrained(folder)


class FirstOutput(nn.Module):
    """A model reduced to its first input and output, which any exporter can trace."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, first: torch.Tensor) -> torch.Tensor:
        # Without a mask, decoders look for packed sequences with an operator that is not exported.
        mask = {} if first.is_floating_point() else {"attention_mask": torch.ones_like(first)}
        result: torch.Tensor = self.model(first, return_dict=True, **mask)[0]
        return result


def make_legacy(out: Path) -> None:
    """Files of `torch.onnx.export(dynamo=False)`."""
    for layout in ("bert", "llama", "gpt2", "vit", "resnet", "t5"):
        model = pruned_model(layout)
        model.config.use_cache = False
        images = layout in ("vit", "resnet")
        sample = torch.rand(1, 3, 32, 32) if images else torch.ones(1, 8, dtype=torch.int64)
        path = str(out / f"{layout}.onnx")
        torch.onnx.export(FirstOutput(model), (sample,), path, dynamo=False, opset_version=18)


def make_optimum(out: Path) -> None:
    """Files of optimum-onnx, with its own opset and cache layout."""
    main_export = import_module("optimum.exporters.onnx").main_export
    tasks = {
        "bert": "feature-extraction",
        "llama": "text-generation-with-past",
        "gpt2": "text-generation-with-past",
        "t5": "feature-extraction",
        "vit": "feature-extraction",
        "resnet": "feature-extraction",
    }
    for layout, task in tasks.items():
        folder = out / f"{layout}-model"
        save(layout, folder)
        main_export(str(folder), out / layout, task=task, do_validation=False)


def make_genai(out: Path) -> None:
    """Files of the model builder of ONNX Runtime GenAI, one for each precision."""
    folder = out / "llama-model"
    save("llama", folder)
    for precision in ("fp32", "fp16", "bf16", "int4"):
        provider = "cpu" if precision in ("fp32", "int4") else "cuda"
        target = out / f"llama-{precision}"
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        options = ["-p", precision, "-e", provider, "-c", str(out / "cache")]
        subprocess.run([*builder, "-i", str(folder), "-o", str(target), *options], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("exporter", choices=("legacy", "optimum", "genai"))
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    makers = {"legacy": make_legacy, "optimum": make_optimum, "genai": make_genai}
    makers[arguments.exporter](arguments.out)


if __name__ == "__main__":
    main()
