"""Random models of a few thousand weights, written as complete Hugging Face model directories."""

import json
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

SPECIAL = ("<|endoftext|>", "[PAD]", "[CLS]", "[SEP]")
VOCABULARY = len(SPECIAL) + 256
# Samples a second that the tiny model of speech hears.
RATE = 16000


def write_tiny_bert(path: Path, *, seed: int = 0, hidden: int = 32, layers: int = 2) -> Path:
    """A BERT encoder without a pooler's weights, two blocks of six linear layers; float32."""
    torch.manual_seed(seed)
    BertModel(_bert(hidden, layers), add_pooling_layer=False).save_pretrained(path)
    _byte_tokenizer("[CLS] $A [SEP]").save_pretrained(path)
    return path


def write_tiny_classifier(path: Path, kind: str = "Sequence", *, labels: int = 3) -> Path:
    """A BERT classifier of whole texts ("Sequence") or of tokens ("Token"); float32."""
    torch.manual_seed(0)
    heads = {"Sequence": BertForSequenceClassification, "Token": BertForTokenClassification}
    config = _bert(32, 2)
    config.num_labels = labels
    heads[kind](config).save_pretrained(path)
    _byte_tokenizer("[CLS] $A [SEP]").save_pretrained(path)
    return path


def _bert(hidden: int, layers: int) -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=128,
        pad_token_id=1,
        initializer_range=0.2,
    )


def write_tiny_llama(
    path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float16, shard: str = "50GB"
) -> Path:
    """A Llama decoder with tied embeddings and grouped queries, two blocks of seven layers."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    # transformers wraps `to` in a decorator that loses its signature.
    torch.nn.Module.to(model, dtype)
    model.save_pretrained(path, max_shard_size=shard)
    _byte_tokenizer(None).save_pretrained(path)
    return path


def write_tiny_gpt2(path: Path, *, seed: int = 0) -> Path:
    """A GPT-2 decoder, two blocks of four Conv1D layers; float32."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
    )
    GPT2LMHeadModel(config).save_pretrained(path)
    _byte_tokenizer(None).save_pretrained(path)
    return path


def write_tiny_qwen3(path: Path, *, seed: int = 0) -> Path:
    """A Qwen3 decoder with grouped queries, two blocks of seven layers; float32."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    _byte_tokenizer(None).save_pretrained(path)
    return path


def _byte_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """One token per byte of text, after the special tokens."""
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    if template is not None:
        special = [(token, SPECIAL.index(token)) for token in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=128,
    )


def write_tiny_bart(path: Path, *, seed: int = 0, layers: int = 2) -> Path:
    """A BART encoder-decoder, `layers` blocks of six layers and as many of ten; float32."""
    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=128,
        init_std=0.2,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=3,
    )
    BartForConditionalGeneration(config).save_pretrained(path)
    _byte_tokenizer("[CLS] $A [SEP]").save_pretrained(path)
    return path


def write_tiny_whisper(path: Path, *, seed: int = 0) -> Path:
    """A Whisper that hears a second, a block of six layers and one of ten; float32."""
    torch.manual_seed(seed)
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=24,
        init_std=0.2,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=2,
        begin_suppress_tokens=None,
        # What is tied to the embedding repeats one token for ever.
        tie_word_embeddings=False,
    )
    WhisperForConditionalGeneration(config).save_pretrained(path)
    _byte_tokenizer(None).save_pretrained(path)
    # Twenty frames, as many as the stem makes ten positions of.
    WhisperFeatureExtractor(
        feature_size=8, sampling_rate=RATE, hop_length=800, chunk_length=1, n_fft=400
    ).save_pretrained(path)
    return path


def write_wave(
    path: Path, samples: Sequence[int], *, rate: int = RATE, width: int = 2, channels: int = 1
) -> Path:
    """PCM of these integers in a WAV file."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        # One byte is unsigned in this format, more are signed.
        offset = 128 if width == 1 else 0
        file.writeframes(
            b"".join((n + offset).to_bytes(width, "little", signed=width > 1) for n in samples)
        )
    return path


def write_recordings(folder: Path, count: int) -> Path:
    """Tones of several lengths and pitches in noise, without transcripts."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        time = np.arange(int(RATE * random.uniform(0.5, 1))) / RATE
        tone = np.sin(2 * np.pi * random.uniform(100, 3000) * time)
        sound = 8000 * tone + random.normal(0, 2000, len(time))
        write_wave(folder / f"{i}.wav", [int(sample) for sample in sound])
    return folder


def configure(path: Path, **changes: Any) -> None:
    """Change keys of the config.json of a model directory."""
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | changes), encoding="utf-8")
