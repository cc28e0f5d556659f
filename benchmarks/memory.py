"""Peak host memory of every stage of a build, in multiples of the weights of the checkpoint.

    python benchmarks/memory.py
    python benchmarks/memory.py --memory-limit 1 --quantize int8 --tied

A random Llama is made on the spot, in float16 and in shards of a block, and `build` runs in a
process of its own, which another one watches in /proc. `held` is anonymous memory, which nothing
but swap could take from the process; `mapped` are pages of files, which the kernel gives up when
it needs them. `multiple` is what was held, less what the libraries alone hold, by the bytes of the
checkpoint; `all` the same of both together.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tiny_directories import VOCABULARY, write_byte_tokenizer, write_prose
from transformers import LlamaConfig, LlamaForCausalLM

from prox24_deploy.bundle.bundle import Bundle
from prox24_deploy.config.options import BuildOptions, EngineOptions, PruneOptions, TextOptions
from prox24_deploy.core.types import silent
from prox24_deploy.pipeline.run import build

_SECONDS = 0.004
_MIB = 2**20
_HEAD = f"{'stage':>10} {'s':>6} {'held MiB':>9} {'mapped MiB':>11} {'multiple':>9} {'all':>6}"


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
    if not (folder / "text.txt").exists():
        make_model(asked, folder / "model")
    size = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
    print(f"weights: {size / _MIB:.0f} MiB", _HEAD, sep="\n", file=sys.stderr)
    for line in measured(folder, size):
        print(json.dumps(line) if asked.json else row(line), flush=True)


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


def measured(folder: Path, size: int) -> Iterator[dict[str, float | str]]:
    """Each stage with its seconds and its peaks."""
    words = [sys.executable, __file__, *sys.argv[1:], "--inner-of", str(folder)]
    log = folder / "stages"
    log.write_text("", encoding="utf-8")
    child = subprocess.Popen(words)
    now, peak, rest, began = "", (0, 0, 0), 0, time.perf_counter()
    while child.poll() is None:
        found = memory_of(child.pid)
        stage = log.read_text(encoding="utf-8")
        if stage != now:
            if now:
                yield line_of(now, time.perf_counter() - began, peak, rest, size)
            else:
                rest = peak[0]
            now, peak, began = stage, (0, 0, 0), time.perf_counter()
        peak = tuple(map(max, peak, found))  # type: ignore[assignment]
        time.sleep(_SECONDS)
    yield line_of(now, time.perf_counter() - began, peak, rest, size)
    if child.returncode:
        raise SystemExit(child.returncode)


def memory_of(process: int) -> tuple[int, int, int]:
    """Bytes that a process holds, those of files that it has mapped, and both."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0, 0, 0
    values = dict(line.split(":", 1) for line in lines)
    held, mapped = (
        sum(int(values.get(name, "0").split()[0]) * 1024 for name in names)
        for names in (("RssAnon", "RssShmem"), ("RssFile",))
    )
    return held, mapped, held + mapped


def line_of(
    stage: str, seconds: float, peak: tuple[int, int, int], rest: int, size: int
) -> dict[str, float | str]:
    """What is printed of a stage."""
    return {
        "stage": stage,
        "seconds": round(seconds, 1),
        "held": peak[0],
        "mapped": peak[1],
        "multiple": round((peak[0] - rest) / size, 2),
        "all": round((peak[2] - rest) / size, 2),
    }


def row(line: dict[str, float | str]) -> str:
    """The same for people."""
    held, mapped = (round(float(line[name]) / _MIB) for name in ("held", "mapped"))
    return (
        f"{line['stage']:>10} {line['seconds']:>6} {held:>9} {mapped:>11} "
        f"{line['multiple']:>9} {line['all']:>6}"
    )


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
    import_all()
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


def import_all() -> None:
    """Have the libraries in memory, and wait until the watcher has seen it."""
    import onnxruntime  # noqa: F401
    import torch.onnx._internal.exporter._core  # noqa: F401

    time.sleep(1)


if __name__ == "__main__":
    main()
