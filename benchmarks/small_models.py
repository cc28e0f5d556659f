"""Train a small decoder of a given layout, to measure pruning on models of other families.

    python benchmarks/small_models.py LAYOUT OUT --tokenizer MODEL_DIR [--text FILE] [--docstrings]

LAYOUT is qwen3 (grouped queries, normalised queries and keys) or gpt2 (Conv1D layers, fused
projection of queries, keys and values). The text is plain UTF-8, or the docstrings of every package
that is installed; a few million tokens and a minute on a GPU make a model whose layers are worth
pruning. Beside the model lie calibration.txt and evaluation.txt, docstrings of Python's own library
that it did not see. Prints one JSON line with the last loss.
"""

import argparse
import ast
import json
import math
import sysconfig
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

WINDOW = 512
BATCH = 48


def config_of(layout: str, vocabulary: int) -> PretrainedConfig:
    """Six blocks of width 256, about five million weights in them."""
    if layout == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary, n_positions=WINDOW, n_embd=256, n_layer=6, n_head=4,
            bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    return Qwen3Config(
        vocab_size=vocabulary, max_position_embeddings=WINDOW, hidden_size=256,
        intermediate_size=768, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip


def docstrings(folder: Path, *, without: Collection[str] = ()) -> Iterator[str]:
    """Docstrings of at least 80 characters below a folder, `without` folders of these names."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for file in sorted(folder.rglob("*.py")):
        if not set(without).isdisjoint(file.relative_to(folder).parts):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # templates, and tests of other encodings
            continue
        for node in ast.walk(tree):
            if isinstance(node, documented) and len(text := ast.get_docstring(node) or "") >= 80:
                yield text


def write_texts(folder: Path) -> None:
    """Write docstrings of the standard library, every second one to either file."""
    library = Path(sysconfig.get_path("stdlib"))
    found = dict.fromkeys(docstrings(library, without=("site-packages", "dist-packages")))
    texts = [" ".join(text.split()) for text in found]
    for start, name in enumerate(("calibration.txt", "evaluation.txt")):
        (folder / name).write_text("\n\n".join(texts[start::2]), encoding="utf-8")


def windows_of(paragraphs: list[str], tokenizer_dir: Path) -> tuple[Tensor, int]:
    """Token windows (n, 512) over paragraphs that each follow token 0, and the vocabulary size."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)
    ids: list[int] = []
    for encoded in tokenizer(paragraphs, add_special_tokens=False)["input_ids"]:
        ids += [0, *encoded]
    whole = len(ids) // WINDOW * WINDOW
    return torch.tensor(ids[:whole]).view(-1, WINDOW), len(tokenizer)


def train(model: nn.Module, windows: Tensor, steps: int, device: torch.device) -> float:
    """AdamW with warm-up and cosine decay; returns the mean loss of the last tenth."""
    adam = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam,
        lambda i: min(1.0, (i + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * i / steps))),
    )
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        batch = windows[torch.randint(len(windows), (BATCH,), generator=generator)].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        schedule.step()
        losses.append(loss.detach())
    return float(torch.stack(losses[-max(1, steps // 10) :]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layout", choices=("qwen3", "gpt2"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--docstrings", action="store_true")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    texts = [file.read_text(encoding="utf-8").split("\n\n") for file in arguments.text]
    paragraphs = [p for text in texts for p in text if p]
    if arguments.docstrings:
        # The same docstring often stands in several places; a model learns more from each once.
        paragraphs += dict.fromkeys(docstrings(Path(sysconfig.get_path("purelib"))))
    windows, vocabulary = windows_of(paragraphs, arguments.tokenizer)
    config = config_of(arguments.layout, vocabulary)
    classes = {"gpt2": GPT2LMHeadModel, "qwen3": Qwen3ForCausalLM}
    model = classes[arguments.layout](config)
    nn.Module.to(model, device)
    loss = train(model.train(), windows, arguments.steps, device)
    # Half the bytes, as models are shipped.
    nn.Module.to(model, torch.float16)
    model.save_pretrained(arguments.out, max_shard_size="8MB")
    AutoTokenizer.from_pretrained(arguments.tokenizer).save_pretrained(arguments.out)
    write_texts(arguments.out)
    found = {"layout": arguments.layout, "tokens": windows.numel(), "training_loss": loss}
    print(json.dumps({"benchmark": "small_models", **found}))


if __name__ == "__main__":
    main()
