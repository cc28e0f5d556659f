"""Complete model directories of tiny random models, and what they are calibrated on."""

import wave
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from PIL import Image
from tiny_families import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

SPECIAL = ("<s>", "<pad>", "</s>", "<start>")
VOCABULARY = len(SPECIAL) + 256
RATE = 16_000
_WORDS = ("layer", "weight", "sparse", "dense", "group", "kernel", "batch", "token", "engine")


def write_directory(path: Path, row: str, **options: Any) -> Path:
    """The model of a row of `tiny_families` with what a build reads beside its weights."""
    model = tiny_model(row, **({} if _sees(row) else {"vocab_size": VOCABULARY}), **options)
    model.save_pretrained(path)  # type: ignore[operator]  # a transformers model
    if _sees(row):
        size = {"height": 32, "width": 32}
        transformers.ViTImageProcessor(size=size).save_pretrained(path)
        return path
    write_byte_tokenizer(path)
    if row == "whisper":
        # As many frames as the tiny encoder takes.
        transformers.WhisperFeatureExtractor(
            feature_size=8, sampling_rate=RATE, hop_length=800, chunk_length=1, n_fft=400
        ).save_pretrained(path)
    return path


def write_prose(path: Path, *, paragraphs: int = 120, seed: int = 0) -> Path:
    """A text of different paragraphs."""
    draw = Random(seed)
    parts = [" ".join(draw.choices(_WORDS, k=draw.randint(6, 20))) + "." for _ in range(paragraphs)]
    path.write_text("\n\n".join(parts), encoding="utf-8")
    return path


def write_images(folder: Path, *, count: int = 20, labels: tuple[str, ...] = ()) -> Path:
    """Noise in PNG files, in a folder for each label if there are any."""
    draw = Random(0)
    for i in range(count):
        inner = folder / labels[i % len(labels)] if labels else folder
        inner.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (12, 10), draw.randbytes(360)).save(inner / f"{i}.png")
    return folder


def write_recordings(folder: Path, *, count: int = 10) -> Path:
    """Noise in WAV files, each with its transcript beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = Random(0)
    for i in range(count):
        with wave.open(str(folder / f"{i}.wav"), "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", ""))
            file.writeframes(draw.randbytes(2 * (RATE // 2 + i)))
        (folder / f"{i}.txt").write_text(f"{_WORDS[i % 9]} {_WORDS[i * 2 % 9]}", encoding="utf-8")
    return folder


def _sees(row: str) -> bool:
    return row.startswith(("vit", "deit", "swin", "resnet", "convnext", "clip, image"))


def write_byte_tokenizer(path: Path) -> None:
    """One token per byte of text, after the special tokens."""
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(path)


def quiet() -> None:
    """One thread, and no progress bars of transformers."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
