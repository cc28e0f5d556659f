"""A long document gives the tokens that the whole of it would, for a small share of the work."""

from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prox24_deploy.config.recipe import read_recipe
from prox24_deploy.data.text import Texts, make_samples
from prox24_deploy.data.tokens import enough_of, truncated

EXPORT = Path(__file__).parents[2] / "export"
PROSE = "\n\n".join(topics[name] for name in sorted(topics))


def trained(kind: str) -> Any:
    """A tokenizer of each kind in use, trained on some of the text."""
    special = ["<s>", "</s>", "[UNK]"]
    made: Tokenizer
    trainer: Any
    if kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer()
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=special)
    elif kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=1500, special_tokens=special, unk_token="[UNK]"
        )
    elif kind == "bpe of bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=special)
    else:
        # As Llama 2 has it: the text is one word, in which spaces are letters.
        made = Tokenizer(models.BPE(unk_token="[UNK]"))
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special)
    texts = [PROSE[i : i + 300] for i in range(0, 120_000, 300)]
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe of bytes", "bpe of one word"])
def test_the_first_and_the_last_tokens_are_those_of_the_whole_text(kind: str) -> None:
    tokenizer = trained(kind)
    for start in (0, 40_001, 90_007):
        document = PROSE[start : start + 60_000]
        whole = tokenizer(document)["input_ids"]
        for tokens in (1, 2, 31, 500):
            part = enough_of(document, tokenizer, tokens)
            assert len(part) < len(document) / 4
            assert tokenizer(part)["input_ids"][:tokens] == whole[:tokens]
            part = enough_of(document, tokenizer, tokens, end=True)
            assert tokenizer(part)["input_ids"][-tokens:] == whole[-tokens:]
        cut = tokenizer(document, truncation=True, max_length=500)["input_ids"]
        assert truncated(document, tokenizer, 500) == cut
        tokenizer.truncation_side = "left"
        cut = tokenizer(document, truncation=True, max_length=500)["input_ids"]
        assert truncated(document, tokenizer, 500) == cut == whole[-500:]
        tokenizer.truncation_side = "right"


@dataclass
class Counting:
    """One token per ten letters, and a note of how many letters were looked at."""

    letters: int = 10
    seen: int = 0
    bos_token_id: None = None
    pad_token_id: None = None
    longest: int = field(default=0)

    def __call__(self, text: str = "", **_: object) -> dict[str, list[int]]:
        self.seen += len(text)
        return {"input_ids": [1] * (len(text) // self.letters)}


def test_a_short_document_is_given_whole_and_at_once() -> None:
    tokenizer = Counting()
    document = "a" * 16 * (100 + 64)
    assert enough_of(document, tokenizer, 100) is document
    assert tokenizer.seen == 0


@pytest.mark.parametrize("family", ["llama", "bert", "bart"])
def test_a_document_of_megabytes_costs_what_its_tokens_cost(family: str) -> None:
    from prox24_deploy.data.pairs import make_pairs

    tokenizer = Counting()
    recipe = read_recipe(EXPORT / f"{family}.toml")
    texts = Texts(kind="file", paths=("memory",), documents=("b" * 20_000_000,) * 4)
    if recipe.decoder:
        made = make_pairs(texts, tokenizer, recipe, tokens=1500, max_length=512, start=0)
    else:
        made = make_samples(texts, tokenizer, recipe, tokens=1500, max_length=512)
    assert made.source.tokens >= 1024
    assert tokenizer.seen < 300_000


def test_a_word_of_megabytes_is_given_up() -> None:
    tokenizer = Counting(letters=10**9)
    assert len(enough_of("b" * 20_000_000, tokenizer, 100)) <= 64 * (100 + 64)
    assert tokenizer.seen < 200_000
