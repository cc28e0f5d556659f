"""Peak host memory of every stage of a build, in multiples of the weights of the checkpoint.

    python benchmarks/memory.py
    python benchmarks/memory.py --memory-limit 1 --quantize int8 --tied

A random Llama is made on the spot, in float16 and in shards of two blocks, and `build` runs in a
process of its own, which this one watches in /proc. `held` is anonymous memory, which nothing but
swap could take from the process; `mapped` are pages of files, which the kernel gives up when it
needs them. `multiple` is what was held, by the bytes of the checkpoint, less what the same stage
holds of a model of next to no weights: the libraries and what they make of a graph.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tiny_directories import VOCABULARY, write_byte_tokenizer, write_prose
from transformers import LlamaConfig, LlamaForCausalLM

from prox24_deploy.bundle.bundle import Bundle
from prox24_deploy.config.options import BuildOptions, EngineOptions, PruneOptions, TextOptions
from prox24_deploy.core.types import silent
from prox24_deploy.pipeline.run import build

_SECONDS = 0.01
_MIB = 2**20
_FEW = {"hidden": 64, "inner": 64, "heads": 2}
_HEAD = f"{'stage':>10} {'s':>6} {'held MiB':>9} {'mapped MiB':>11} {'multiple':>9}"


def main() -> None:
    """Make a model, build it in another process, and print a line for each stage."""
    asked = arguments()
    if asked.inner_of:
        build_noted(asked)
        return
    if asked.keep:
        measure(asked, asked.keep)
        return
    with TemporaryDirectory() as folder:
        measure(asked, Path(folder))


def measure(asked: argparse.Namespace, folder: Path) -> None:
    """Build in a folder; stages that an earlier run has finished there are not run again."""
    rest = at_rest(asked, folder / "rest")
    if not (folder / "text.txt").exists():
        make_model(asked, folder / "model")
    size = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
    print(f"weights: {size / _MIB:.0f} MiB", _HEAD, sep="\n", file=sys.stderr)
    for line in measured(folder, [*sys.argv[1:], "--inner-of", str(folder)]):
        line["multiple"] = round((line["held"] - rest.get(line["stage"], 0)) / size, 2)
        print(json.dumps(line) if asked.json else row(line), flush=True)


def at_rest(asked: argparse.Namespace, folder: Path) -> dict[str, int]:
    """What each stage holds of a model of next to no weights."""
    known = folder / "held.json"
    if not known.exists():
        few = argparse.Namespace(**{**vars(asked), **_FEW})
        make_model(few, folder / "model")
        words = [*sys.argv[1:], "--inner-of", str(folder)]
        lines = list(measured(folder, words))
        known.write_text(json.dumps({line["stage"]: line["held"] for line in lines}))
    found: dict[str, int] = json.loads(known.read_text())
    return found


def arguments() -> argparse.Namespace:
    """What to make and how to build it."""
    parser = argparse.ArgumentParser(description=__doc__)
    numbers = {
        "hidden": 768, "inner": 2048, "heads": 12, "blocks": 10, "vocabulary": 8192,
        "tokens": 1024,
    }  # fmt: skip
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tied", action="store_true", help="one weight for embedding and lm_head")
    parser.add_argument("--dtype", default="float16", help="of the checkpoint and the export")
    parser.add_argument("--memory-limit", type=float, help="GiB")
    parser.add_argument("--quantize", choices=("int8", "fp8"))
    parser.add_argument("--permute", choices=("auto", "none"), default="auto")
    parser.add_argument("--method", default="magnitude")
    parser.add_argument("--include", default="*.self_attn.*", help="glob of layers to prune")
    parser.add_argument("--keep", type=Path, help="folder to work in, and to go on in")
    parser.add_argument("--json", action="store_true", help="a JSON line of each stage")
    parser.add_argument("--inner-of", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_model(asked: argparse.Namespace, out: Path) -> None:
    """Write a random model with a tokenizer, and a text beside it."""
    config = LlamaConfig(
        vocab_size=max(asked.vocabulary, VOCABULARY),
        hidden_size=asked.hidden,
        intermediate_size=asked.inner,
        num_hidden_layers=asked.blocks,
        num_attention_heads=asked.heads,
        num_key_value_heads=asked.heads,
        max_position_embeddings=64,
        tie_word_embeddings=asked.tied,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, asked.dtype))
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    model.save_pretrained(out, max_shard_size=2 * block)
    write_byte_tokenizer(out)
    write_prose(out.parent / "text.txt", paragraphs=asked.tokens // 8)


def measured(folder: Path, words: list[str]) -> Iterator[dict[str, Any]]:
    """Each stage of a build in another process, with its seconds and peaks."""
    log = folder / "stages"
    log.write_text("", encoding="utf-8")
    # Tensors then come from the system one by one and go back to it, as those of large models do.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(_MIB)}
    child = subprocess.Popen([sys.executable, __file__, *words], env=environment)
    now, peak, began = "", (0, 0), time.perf_counter()
    while child.poll() is None:
        stage = log.read_text(encoding="utf-8")
        if stage != now:
            if now:
                yield line_of(now, time.perf_counter() - began, peak)
            now, peak, began = stage, (0, 0), time.perf_counter()
        found = memory_of(child.pid)
        peak = max(peak[0], found[0]), max(peak[1], found[1])
        time.sleep(_SECONDS)
    yield line_of(now, time.perf_counter() - began, peak)
    if child.returncode:
        raise SystemExit(child.returncode)


def memory_of(process: int) -> tuple[int, int]:
    """Bytes that a process holds, and those of files that it has mapped."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0, 0
    values = dict(line.split(":", 1) for line in lines)
    held, mapped = (
        sum(int(values.get(name, "0").split()[0]) * 1024 for name in names)
        for names in (("RssAnon", "RssShmem"), ("RssFile",))
    )
    return held, mapped


def line_of(stage: str, seconds: float, peak: tuple[int, int]) -> dict[str, Any]:
    """What is told of a stage."""
    return {"stage": stage, "seconds": round(seconds, 1), "held": peak[0], "mapped": peak[1]}


def row(line: dict[str, Any]) -> str:
    """The same for people."""
    held, mapped = (round(line[name] / _MIB) for name in ("held", "mapped"))
    return f"{line['stage']:>10} {line['seconds']:>6} {held:>9} {mapped:>11} {line['multiple']:>9}"


def build_noted(asked: argparse.Namespace) -> None:
    """Build in this process, and write the name of each stage as it begins."""
    folder, run = asked.inner_of, Bundle.run

    def noted(self: Bundle, stage, *args, **options):  # type: ignore[no-untyped-def]
        note(stage.name)
        return run(self, stage, *args, **options)

    def note(stage: str) -> None:
        made = folder / "stages.new"
        made.write_text(stage, encoding="utf-8")
        # Never read half-written.
        made.replace(folder / "stages")

    Bundle.run = noted  # type: ignore[method-assign]
    note("open")
    text = (folder / "text.txt",)
    options = BuildOptions(
        text=TextOptions(calibration=text, calibration_tokens=asked.tokens,
                         evaluation_tokens=asked.tokens),
        prune=PruneOptions(method=asked.method, preset="fast", refinement="none",
                           include=(asked.include,), permute=asked.permute),
        engine=EngineOptions(batches=(1,), sequences=(32,)),
        quantize=asked.quantize,
        device="cpu",
        engine_tokens=asked.tokens,
        memory_limit_gib=asked.memory_limit,
    )  # fmt: skip
    build(folder / "model", folder / "bundle", options, fresh=False, progress=silent)


if __name__ == "__main__":
    main()
