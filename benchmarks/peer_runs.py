"""Prune a decoder to 2:4 with one tool: run by `peers.py` in the environment of that tool.

    python peer_runs.py TOOL MODEL_DIR WINDOWS.npy OUT.safetensors

Imports nothing of prox24-deploy but for its own rows. The model is opened in float32 on the CPU;
all linear layers of its blocks are pruned, on windows of token ids (windows, length). Prints one
JSON line with the seconds that pruning took, by the clock and of the processor, without opening and
saving the model, and the largest resident memory of the process in GiB.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Prune = Callable[[Any, torch.Tensor], Any]


def _ours(**options: Any) -> Prune:
    def prune(model: Any, windows: torch.Tensor) -> Any:
        import prox24_deploy as p24

        batches = [{"input_ids": window[None]} for window in windows]
        p24.prune_module(
            model, batches, blocks="model.layers", layers=["*_proj"],
            options=p24.PruneOptions(**options),
        )  # fmt: skip
        return model

    return prune


def _modelopt(mode: str) -> Prune:
    """As its guide shows; the output layer is left out as it is by default."""

    def prune(model: Any, windows: torch.Tensor) -> Any:
        import modelopt.torch.sparsity as mts

        def forward_loop(each: Any) -> None:
            for window in windows:
                each(input_ids=window[None])

        config: dict[str, Any] = {}
        if mode == "sparsegpt":
            # On a machine without a GPU its search wants to be told.
            config = {"forward_loop": forward_loop, "device": "cpu"}
        return mts.export(mts.sparsify(model, mode=mode, config=config))

    return prune


def _llm_compressor(modifier: str) -> Prune:
    """One shot, block after block, one window at a time: its defaults."""

    def prune(model: Any, windows: torch.Tensor) -> Any:
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers import pruning

        rows = windows.tolist()
        data = Dataset.from_dict(
            {"input_ids": rows, "attention_mask": [[1] * len(rows[0])] * len(rows)}
        )
        recipe = getattr(pruning, modifier)(
            sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"]
        )
        oneshot(
            model=model, dataset=data, recipe=recipe, max_seq_length=len(rows[0]),
            num_calibration_samples=len(rows),
        )  # fmt: skip
        return model

    return prune


TOOLS: dict[str, Prune] = {
    "prox24 default": _ours(),
    "prox24 fast": _ours(preset="fast"),
    "prox24 sparsegpt": _ours(method="sparsegpt", target="symmetric", refinement="none"),
    "prox24 reconstruct": _ours(reconstruct=True),
    "llm-compressor SparseGPT": _llm_compressor("SparseGPTModifier"),
    "llm-compressor Wanda": _llm_compressor("WandaPruningModifier"),
    "ModelOpt sparsegpt": _modelopt("sparsegpt"),
    "ModelOpt sparse_magnitude": _modelopt("sparse_magnitude"),
}


def main(tool: str, model_dir: Path, windows: Path, out: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, local_files_only=True
    ).eval()
    names = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    given = torch.from_numpy(np.load(windows))
    begun, worked = time.perf_counter(), time.process_time()
    pruned = TOOLS[tool](model, given)
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - worked
    state = pruned.state_dict()
    # A wrapper of a tool may put a word in front of every name.
    kept = {
        n: t.detach().contiguous() for n, t in state.items() if n.removesuffix(".weight") in names
    }
    save_file({n: t.clone() for n, t in kept.items()}, out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_gib": peak}))


if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[1] not in TOOLS:
        raise SystemExit(f"{__doc__}\nTOOL is one of {', '.join(TOOLS)}.")
    main(sys.argv[1], *(Path(given) for given in sys.argv[2:]))
