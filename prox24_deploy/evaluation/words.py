"""The words of a text, and how many of them another text gets wrong, as Whisper is judged by them.

Texts are normalised by transformers' copy of the normalisers of Radford et al., "Robust speech
recognition via large-scale weak supervision" (2022), appendix C, and errors are counted by jiwer.
A language that writes no spaces is counted in characters, as there.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# What only models of speech need, and every model would wait for, is imported where it is used.

ENGLISH = "en"
# Burmese, Cantonese, Japanese, Lao, Thai and Chinese.
UNSPACED = frozenset({"my", "yue", "ja", "lo", "th", "zh"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Speller:
    """How texts of a language are normalised before they are compared.

    Attributes:
        language: its code, as in Whisper's tokens; "en" for a checkpoint that knows English alone.
        spellings: from British to American, as a Whisper tokenizer has them beside it.
    """

    language: str = ENGLISH
    spellings: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def counts_characters(self) -> bool:
        """Whether what counts for a word is a character."""
        return self.language in UNSPACED

    def words(self, text: str) -> list[str]:
        """The words of a text, or its characters, without case, punctuation and fillers."""
        from transformers.models.whisper import english_normalizer as normalisers

        if self.language == ENGLISH:
            normalised = normalisers.EnglishTextNormalizer(dict(self.spellings))(text)
        else:
            basic = normalisers.BasicTextNormalizer(split_letters=self.counts_characters)
            normalised = basic(text)
        # Of dots alone the normaliser of English leaves some.
        return [word for word in normalised.split() if any(map(str.isalnum, word))]

    def errors(self, said: str, written: str) -> tuple[int, int]:
        """Words to replace, delete or insert to make one text the other, and words that were said.

        The fewest: the distance of Levenshtein over words.
        """
        import jiwer

        reference, hypothesis = self.words(said), self.words(written)
        found = jiwer.process_words(" ".join(reference), " ".join(hypothesis))
        return found.substitutions + found.deletions + found.insertions, len(reference)


def spellers_of(starts: Sequence[Sequence[int]], tokenizer: Any) -> list[Speller]:
    """How to spell what a decoder writes behind each start: by the language that is named there.

    Args:
        starts: of each recording, the tokens that the decoder starts from, and maybe more.
        tokenizer: of transformers; one of Whisper knows spellings.
    """
    spellings = getattr(tokenizer, "english_spelling_normalizer", None) or {}
    return [
        Speller(language=next(_languages(start, tokenizer), ENGLISH), spellings=spellings)
        for start in starts
    ]


def _languages(start: Sequence[int], tokenizer: Any) -> Iterator[str]:
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    for token in tokenizer.convert_ids_to_tokens([*start]):
        code = str(token).removeprefix("<|").removesuffix("|>")
        if code != token and code in LANGUAGES:
            yield code
