"""Sound tokenizers of the kinds that models ship, each with every part that a file can describe."""

import base64
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from tiny_directories import SPECIAL
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_BEGIN, _PAD, _END = 0, 1, 2
_LETTERS = string.ascii_lowercase + string.digits + string.punctuation
# Of SentencePiece: a trie of no entry, behind its size, and no text behind that.
_CHARACTERS = base64.b64encode((4 * 256).to_bytes(4, "little") + bytes(4 * 256) + b"\0")


def write_tokenizer(folder: Path, kind: str) -> None:
    """Exchange the tokenizer of a model directory for one of WordPiece, Unigram or BPE."""
    tokenizer = _KINDS[kind]()
    begin, pad, end = (SPECIAL[i] for i in (_BEGIN, _PAD, _END))
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, pad_token=pad, eos_token=end, unk_token=pad
    )
    wrapped.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["added_tokens_decoder"] = {
        str(i): {"content": token, "lstrip": False, "normalized": False, "rstrip": False,
                 "single_word": False, "special": True}
        for i, token in enumerate(SPECIAL[:3])
    }  # fmt: skip
    config |= {"truncation_side": "right", "padding_side": "right", "model_max_length": 64}
    config |= {"clean_up_tokenization_spaces": False, "model_input_names": ["input_ids"]}
    file.write_text(json.dumps(config), encoding="utf-8")
    named = {"bos_token": config["added_tokens_decoder"]["0"], "pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(named), encoding="utf-8")


def _word_piece() -> Tokenizer:
    pieces = [*SPECIAL, *_LETTERS, *(f"##{letter}" for letter in _LETTERS)]
    made = Tokenizer(models.WordPiece(_numbered(pieces), unk_token=SPECIAL[_PAD]))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.BertProcessing(
        (SPECIAL[_END], _END), (SPECIAL[_BEGIN], _BEGIN)
    )
    made.enable_truncation(48, stride=2)
    made.enable_padding(pad_id=_PAD, pad_token=SPECIAL[_PAD], pad_to_multiple_of=8)
    return made


def _unigram() -> Tokenizer:
    pieces = [*SPECIAL, "▁", *_LETTERS, *(f"▁{letter}" for letter in string.ascii_lowercase)]
    scored: Any = [(piece, -float(i)) for i, piece in enumerate(pieces)]
    made = Tokenizer(models.Unigram(scored, unk_id=_PAD))
    made.normalizer = normalizers.Sequence([
        normalizers.Precompiled(base64.b64decode(_CHARACTERS)),
        normalizers.Strip(left=False, right=True),
        normalizers.Replace(Regex(" {2,}"), "▁"),
    ])  # fmt: skip
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.Metaspace(),
    ])  # fmt: skip
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single=f"$A {SPECIAL[_END]}", special_tokens=[(SPECIAL[_END], _END)]
    )
    return made


def _byte_pairs() -> Tokenizer:
    vocabulary = _numbered([*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))])
    made = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token=SPECIAL[_PAD]))
    made.normalizer = normalizers.Sequence([
        normalizers.Prepend("▁"),
        normalizers.Replace(" ", "▁"),
    ])  # fmt: skip
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d|▁?\w+"), "isolated")
    made.decoder = decoders.Sequence([
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    made.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[_BEGIN]} $A", special_tokens=[(SPECIAL[_BEGIN], _BEGIN)]
    )
    return made


def _numbered(pieces: list[str]) -> dict[str, int]:
    return {piece: i for i, piece in enumerate(pieces)}


_KINDS: dict[str, Callable[[], Tokenizer]] = {
    "WordPiece": _word_piece,
    "Unigram": _unigram,
    "BPE": _byte_pairs,
}
