"""Write a Whisper in CTranslate2's format as a Hugging Face directory with float32 weights.

    python ctranslate2_to_hf.py DATA OUT

DATA holds config.json, tokenizer.json and the weights: model.bin, or its parts in the order of
their names. Needs no package but transformers. CTranslate2 lays the projections of query, key and
value into one matrix; here they are taken apart again.
"""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

# CTranslate2's numbers of data types; it stores activations and flags as whole numbers.
DTYPES = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}
BINARY_VERSION = 6
FEED_FORWARD = {
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
NORMS = {"gamma": "weight", "beta": "bias"}
# Of the tokenizer of all Whispers that know more than English.
END, START, TRANSLATE, TRANSCRIBE, NO_TIMES = 50257, 50258, 50358, 50359, 50363


class Reader:
    """Numbers, names and arrays, one behind the other."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> Any:
        """One number."""
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def name(self) -> str:
        """A length, then characters and a final zero."""
        length = self.take("<H")
        self.at += length
        return self.data[self.at - length : self.at].rstrip(b"\0").decode()

    def variable(self) -> tuple[str, np.ndarray[Any, Any]]:
        """Name, rank, sizes, type, length and values."""
        name = self.name()
        shape = [self.take("<I") for _ in range(self.take("B"))]
        kind, length = self.take("B"), self.take("<I")
        self.at += length
        values = np.frombuffer(self.data[self.at - length : self.at], dtype=DTYPES[kind])
        return name, values.reshape(shape)


def read_variables(data: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """Every variable of a model.bin by its name."""
    reader = Reader(data)
    version, kind, _ = reader.take("<I"), reader.name(), reader.take("<I")
    if (version, kind) != (BINARY_VERSION, "WhisperSpec"):
        raise SystemExit(f"model.bin is a {kind} of version {version}, not a WhisperSpec of 6")
    return dict(reader.variable() for _ in range(reader.take("<I")))


def state(variables: dict[str, np.ndarray[Any, Any]]) -> dict[str, torch.Tensor]:
    """The weights under the names of transformers."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    for name, values in variables.items():
        if values.ndim:
            found |= dict(_renamed(name, values))
    found["proj_out.weight"] = found["model.decoder.embed_tokens.weight"]
    return {name: torch.tensor(values.astype(np.float32)) for name, values in found.items()}


def _renamed(name: str, values: np.ndarray[Any, Any]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    half, _, rest = name.partition("/")
    path, _, kind = rest.rpartition("/")
    kind = NORMS.get(kind, kind)
    if path.startswith("layer_") and "/" in path:
        block, _, path = path.partition("/")
        prefix = f"model.{half}.layers.{block.removeprefix('layer_')}"
        if path in FEED_FORWARD:
            yield f"{prefix}.{FEED_FORWARD[path]}.{kind}", values
        else:
            yield from _attention(prefix, path, kind, values)
        return
    names = {
        "embeddings": "embed_tokens.weight",
        "position_encodings": "embed_positions.weight",
        "layer_norm": f"layer_norm.{kind}",
        "conv1": f"conv1.{kind}",
        "conv2": f"conv2.{kind}",
    }
    if path in names:
        yield f"model.{half}.{names[path]}", values


def _attention(
    prefix: str, path: str, kind: str, values: np.ndarray[Any, Any]
) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    own = path.startswith("self_attention/")
    name = f"{prefix}.{'self_attn' if own else 'encoder_attn'}"
    part = path.rpartition("/")[2]
    if part == "layer_norm":
        yield f"{name}_layer_norm.{kind}", values
        return
    # One matrix for all three, or one for the query and one for what is attended to.
    joined = {"linear_0": "qkv", "linear_1": "o"}
    if not own:
        joined = {"linear_0": "q", "linear_1": "kv", "linear_2": "o"}
    which = joined[part]
    for letter, piece in zip(which, np.split(values, len(which)), strict=True):
        if (letter, kind) == ("k", "bias"):
            if piece.any():
                raise SystemExit(f"{name}: a key has a bias, which Whisper's have not")
            continue
        yield f"{name}.{'out' if letter == 'o' else letter}_proj.{kind}", piece


def config_of(variables: dict[str, np.ndarray[Any, Any]]) -> WhisperConfig:
    """Sizes as the weights have them."""
    vocabulary, width = variables["decoder/embeddings/weight"].shape
    halves = ("encoder", "decoder")
    norms = "ffn/layer_norm/gamma"
    layers = {h: sum(n.startswith(h) and n.endswith(norms) for n in variables) for h in halves}
    inner = {h: len(variables[f"{h}/layer_0/ffn/linear_0/weight"]) for h in layers}
    heads = {h: int(variables[f"{h}/num_heads"]) for h in layers}
    return WhisperConfig(
        vocab_size=vocabulary,
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        d_model=width,
        encoder_layers=layers["encoder"], decoder_layers=layers["decoder"],
        encoder_attention_heads=heads["encoder"], decoder_attention_heads=heads["decoder"],
        encoder_ffn_dim=inner["encoder"], decoder_ffn_dim=inner["decoder"],
        max_source_positions=len(variables["encoder/position_encodings/encodings"]),
        max_target_positions=len(variables["decoder/position_encodings/encodings"]),
        bos_token_id=END, eos_token_id=END, pad_token_id=END, decoder_start_token_id=START,
    )  # fmt: skip


def generation_of(given: dict[str, Any], tokenizer: WhisperTokenizer) -> GenerationConfig:
    """English is transcribed, without times; what is never said is suppressed."""
    languages = {str(tokenizer.convert_ids_to_tokens(i)): i for i in given["lang_ids"]}
    return GenerationConfig(
        is_multilingual=True, lang_to_id=languages, language="<|en|>", task="transcribe",
        task_to_id={"transcribe": TRANSCRIBE, "translate": TRANSLATE},
        no_timestamps_token_id=NO_TIMES, return_timestamps=False, max_length=448,
        suppress_tokens=given["suppress_ids"], begin_suppress_tokens=given["suppress_ids_begin"],
        bos_token_id=END, eos_token_id=END, pad_token_id=END, decoder_start_token_id=START,
    )  # fmt: skip


def convert(data: Path, out: Path) -> None:
    """Write weights, configuration, tokenizer and features; `out` is whole or absent."""
    variables = read_variables(b"".join(p.read_bytes() for p in sorted(data.glob("model.bin*"))))
    model = WhisperForConditionalGeneration(config_of(variables))
    model.load_state_dict(state(variables))  # strict: every weight has its place, and no other
    tokenizer = WhisperTokenizer(tokenizer_file=str(data / "tokenizer.json"))
    model.generation_config = generation_of(
        json.loads((data / "config.json").read_text(encoding="utf-8")), tokenizer
    )
    part = out.with_name(f"{out.name}.part")
    model.save_pretrained(part)
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(part)
    part.rename(out)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
