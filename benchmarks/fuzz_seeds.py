"""The sound inputs that are spoilt: one folder, a room, for each kind of parser."""

import contextlib
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from fuzz_onnx_seeds import onnx_seeds
from fuzz_tokenizers import write_tokenizer
from PIL import Image
from safetensors.torch import save_file
from tiny_directories import (
    write_directory,
    write_images,
    write_prose,
    write_recordings,
)

from prox24_deploy import cli
from prox24_deploy.core.shapes import Shape
from prox24_deploy.engines.cusparselt.choice import LayerChoice
from prox24_deploy.engines.cusparselt.planning import Plan, plan_layers, plan_shapes, write_plan
from prox24_deploy.engines.cusparselt.profile import (
    GemmShape,
    GemmTiming,
    GpuProfile,
    write_profile,
)

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
# Rows of tiny_families with what keeps them small, and what they are calibrated on.
_MODELS = {
    "bert": {"num_hidden_layers": 1},
    "llama": {"num_hidden_layers": 1},
    "t5": {"num_layers": 1, "num_decoder_layers": 1},
    "vit, classes": {},
    "whisper": {"encoder_layers": 1, "decoder_layers": 1, "max_source_positions": 10},
}
# Of the tokenizers of these families; others are read by single bytes.
_TOKENIZERS = {"bert": "WordPiece", "t5": "Unigram", "llama": "BPE"}
SMALL = ("--calibration-tokens", "2048", "--evaluation-tokens", "1024")


def run_quietly(*line: str | Path) -> int:
    """One line of the command line in this process, its exit code."""
    shown = io.StringIO()
    before, sys.argv = sys.argv, ["prox24-deploy", *map(str, line)]
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0


def _tensor_files(room: Path) -> None:
    torch.manual_seed(0)
    seeds = room / "seeds"
    seeds.mkdir()
    pruned = torch.randn(4, 8)
    pruned[:, ::2] = 0
    for number, dtype in enumerate(_FLOATS):
        tensors = {name: pruned.to(dtype).clone() for name in ("a.weight", "b.weight")}
        tensors["norm"] = torch.ones(8)
        declared = {"prox24.sparse_weights": json.dumps({"a.weight": 1})} if number % 2 else {}
        save_file(tensors, seeds / f"{number}.safetensors", {"format": "pt", **declared})
    others = {
        "bytes": torch.arange(16, dtype=torch.uint8).view(2, 8),
        "ids": torch.arange(4),
        "mask": torch.tensor([True, False]),
        "nothing.weight": torch.empty(0, 4),
        "scalar": torch.tensor(1.5),
        "conv.weight": pruned.view(2, 4, 2, 2).double(),
    }
    save_file(others, seeds / "others.safetensors")
    (room / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")


def _index(room: Path) -> None:
    torch.manual_seed(0)
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for i, name in enumerate(names):
        tensors = {f"{i}.weight": torch.randn(2, 4), f"{i}.bias": torch.ones(2)}
        tensors[f"{i}.weight"][:, ::2] = 0
        declared = {"prox24.sparse_weights": json.dumps({f"{i}.weight": 1})}
        save_file(tensors, room / name, {"format": "pt", **declared})
    weights = {f"{i}.{kind}": names[i] for i in (0, 1) for kind in ("weight", "bias")}
    index = {"metadata": {"total_size": 80}, "weight_map": weights}
    text = json.dumps(index, indent=2)
    (room / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    (room / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")


def _models(room: Path) -> None:
    write_prose(room / "text.txt", paragraphs=240)
    write_recordings(room / "recordings")
    for row, options in _MODELS.items():
        folder = write_directory(room / row.partition(",")[0], row, **options)
        labels = () if row != "vit, classes" else ("LABEL_0", "LABEL_1")
        if labels:
            write_images(room / "images", labels=labels)
        _add_companions(folder, row)


def _add_companions(folder: Path, row: str) -> None:
    """What a build also reads where it is there."""
    from prox24_deploy.config.recipe import shipped_recipes

    name = row.partition(",")[0]
    # Short samples, of which a forward pass takes little time.
    text = re.sub(r"sequence_length = \d+", "sequence_length = 32", shipped_recipes()[name])
    (folder / "recipe.toml").write_text(text, encoding="utf-8")
    if name in _TOKENIZERS:
        write_tokenizer(folder, _TOKENIZERS[name])
    if row == "bert":
        _add_sentence_modules(folder)


def _add_sentence_modules(folder: Path) -> None:
    """One module of each kind, as sentence-transformers saves them."""
    torch.manual_seed(0)
    width = 32
    dense = {"linear.weight": torch.randn(width, width), "linear.bias": torch.randn(width)}
    norm = {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    made: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "Transformer": ({"max_seq_length": 32, "do_lower_case": False}, {}),
        "Pooling": ({"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}, {}),
        "Dense": ({
            "in_features": width, "out_features": width, "bias": True, "use_residual": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        }, dense),
        "LayerNorm": ({"dimension": width}, norm),
        "Normalize": ({}, {}),
    }  # fmt: skip
    modules = []
    for i, (kind, (options, weights)) in enumerate(made.items()):
        path = f"{i}_{kind}" if i else ""
        type_name = f"sentence_transformers.models.{kind}"
        modules.append({"idx": i, "name": str(i), "path": path, "type": type_name})
        (folder / path).mkdir(exist_ok=True)
        name = "config.json" if i else "sentence_bert_config.json"
        _write_json(folder / path / name, options)
        if weights:
            save_file(weights, folder / path / "model.safetensors")
    _write_json(folder / "modules.json", modules)
    library = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    library |= {"similarity_fn_name": "cosine", "__version__": {"torch": "2"}}
    _write_json(folder / "config_sentence_transformers.json", library)


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value), encoding="utf-8")


def _bundle(room: Path) -> None:
    """A sealed bundle, a baseline, limits and plans, as the command line writes them."""
    model = write_directory(room / "model", "bert", num_hidden_layers=1)
    text, out = write_prose(room / "text.txt"), room / "bundle"
    given = ("--calibration", text, *SMALL, "--shapes", "batch=1", "sequence=8")
    fast = ("--method", "magnitude", "--refinement", "none", "--engine-tokens", "1024")
    # What the verdict says of a random model is of no interest; a sealed bundle is.
    code = run_quietly("build", model, "-o", out, *given, *fast)
    if run_quietly("verify", out):
        raise RuntimeError(f"no bundle to spoil: build ended with {code}")
    for _ in range(2):
        run_quietly("baseline", "update", out, room / "baseline.json", "--reason", "first")
    (room / "limits.toml").write_text(
        '"*" = { max-degradation-percent = 2 }\n"engine/*" = { threshold = 0.5 }\n'
        '"speed-up/*" = { max-degradation = 1, max-degradation-standard-errors = 3 }\n'
        '"layers/*" = { min-improvement = 0 }\n',
        encoding="utf-8",
    )


def _plans(room: Path) -> None:
    shapes = [GemmShape(n=n, k=64, m=m) for n in (64, 128) for m in (8, 64)]
    timings = tuple(
        GemmTiming(shape=shape, dense_us=9.0 + i, sparse_us=8.0, algorithm=i)
        for i, shape in enumerate(shapes)
    )
    profile = GpuProfile(
        gpu="NVIDIA H100",
        driver="570.1",
        versions={"torch": "2.13.0"},
        gemms=timings,
    )
    choices = [
        LayerChoice(
            name="encoder.layer.0.a", n=64, k=64, timings=timings[:1], chosen=True, reason="pays"
        )
    ]
    layers = plan_layers(choices, {}, {})
    plan = Plan(
        dtype="float16",
        model_sha256="a" * 64,
        source="profile",
        metric="",
        shapes=plan_shapes([Shape(batch=1, sequence=8)], layers, [None]),
        layers=layers,
        profile=profile,
    )
    write_plan(plan, room / "plan.json")
    write_profile(profile, room / "profile.json")


def _texts(room: Path) -> None:
    write_prose(room / "text.txt", paragraphs=30)
    lines = [{"text": f"sample {i} of a text", "target": f"target {i}"} for i in range(120)]
    (room / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (room / "plain.jsonl").write_text("\n".join(f'"line {i} of a plain text"' for i in range(120)))
    write_directory(room / "model", "t5", num_layers=1)


def _waves(room: Path) -> None:
    draw = Random(0)
    seeds = room / "seeds"
    import wave

    seeds.mkdir()
    for width in (1, 2, 3, 4):
        with wave.open(str(seeds / f"{width}.wav"), "wb") as file:
            file.setparams((1, width, 16_000, 0, "NONE", ""))
            file.writeframes(draw.randbytes(width * 50))
    folder = write_recordings(room / "recordings")
    listed = [{"audio": f"{i}.wav", "text": f"words {i}"} for i in range(10)]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, listed)), encoding="utf-8")


def _images(room: Path) -> None:
    seeds = room / "seeds"
    seeds.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (12, 10, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"):
        picture.save(seeds / f"{kind}.img", kind)
    for mode in ("P", "L", "1", "I;16", "RGBA", "LA"):
        picture.convert("L" if mode == "I;16" else mode).save(
            seeds / f"{mode[0]}{len(mode)}.img", "PNG"
        )
    # What is no image that the tool names, and that an image library may still open.
    for kind in ("PPM", "ICO", "TGA", "PCX", "SGI", "EPS", "PDF", "DDS", "IM", "ICNS"):
        with contextlib.suppress(OSError, KeyError):
            picture.save(seeds / f"other-{kind}.img", kind)
    frames = [picture.rotate(90 * i) for i in range(3)]
    frames[0].save(seeds / "frames.img", "GIF", save_all=True, append_images=frames[1:])
    write_directory(room / "model", "vit, classes")


def _graphs(room: Path) -> None:
    seeds = room / "seeds"
    seeds.mkdir()
    for name, (model, files) in onnx_seeds().items():
        (seeds / f"{name}.onnx").write_bytes(model.SerializeToString())
        for file, data in files.items():
            (room / file).write_bytes(data)


ROOMS: dict[str, Callable[[Path], None]] = {
    "tensor files": _tensor_files,
    "index": _index,
    "models": _models,
    "bundle": _bundle,
    "plans": _plans,
    "texts": _texts,
    "waves": _waves,
    "images": _images,
    "graphs": _graphs,
}
