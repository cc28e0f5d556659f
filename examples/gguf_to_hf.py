"""Write the model in a GGUF file as a Hugging Face directory with float32 weights.

    python gguf_to_hf.py MODEL.gguf OUT

Needs the packages `gguf` and `accelerate`. transformers undoes the quantisation, but does not save
such a model; so its weights go into a fresh model of the same configuration.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def convert(file: Path, out: Path) -> None:
    """Write weights, configuration and tokenizer; `out` appears only when all of them are there."""
    read = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
    )
    values = read.config.to_dict()
    values.pop("quantization_config", None)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(read.state_dict())
    if not torch.equal(_logits(fresh), _logits(read)):
        raise SystemExit(f"{file}: the copy does not compute what the file does; report this")
    part = out.with_name(f"{out.name}.part")
    fresh.save_pretrained(part)
    AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True
    ).save_pretrained(part)
    part.rename(out)


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(torch.arange(8)[None]).logits
    return found


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
