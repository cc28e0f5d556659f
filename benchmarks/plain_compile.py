"""What one line of PyTorch gives: a dense Llama under torch.compile and CUDA graphs.

    python benchmarks/plain_compile.py [--blocks 4] [--dtype float16] [--shapes 1x512,2x2048,8x2048]

Imports nothing of this package, so that `engine_speed.py` can hold its dense twin against it. The
model is that of `engine_speed.py`: 4096 wide, random weights. Latencies are those of graph replays
by the GPU's clock, the L2 cache overwritten before each; of calls with a mask and without one the
faster counts. Prints one JSON line.
"""

import argparse
import json
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

_REPLAYS, _WARM_RUNS = 60, 3


def make_model(blocks: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """The layers of an 8 B Llama 3, a few of its blocks and a small vocabulary."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=blocks,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=4096,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    return model.eval().to(dtype)  # type: ignore[no-any-return]


def milliseconds(model: Callable[..., Any], batch: int, sequence: int, *, masked: bool) -> float:
    """Median over replays of one forward pass without a cache."""
    ids = torch.randint(0, 30000, (batch, sequence), device="cuda")
    mask = torch.ones_like(ids) if masked else None

    def run() -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_RUNS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    flush = torch.empty(2 * cache, dtype=torch.uint8, device="cuda")
    times: list[float] = []
    for _ in range(_REPLAYS):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        flush.zero_()
        marks[0].record()
        graph.replay()
        marks[1].record()
        torch.cuda.synchronize()
        times.append(marks[0].elapsed_time(marks[1]))
    del kept
    return median(times)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--shapes", default="1x512,2x2048,8x2048")
    arguments = parser.parse_args()
    model = torch.compile(make_model(arguments.blocks, getattr(torch, arguments.dtype)))
    found = {}
    for shape in arguments.shapes.split(","):
        batch, sequence = map(int, shape.split("x"))
        torch.compiler.reset()
        found[shape] = min(
            milliseconds(model, batch, sequence, masked=masked) for masked in (True, False)
        )
    print(json.dumps({"benchmark": "plain_compile", "ms": found}))


if __name__ == "__main__":
    main()
