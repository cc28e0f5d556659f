"""The shape of one run of a model: rows, new tokens of each, and tokens that its cache holds."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class Shape:
    """`batch` rows of `sequence` new tokens behind `past` tokens, which a cache holds.

    `sequence` is 0 for a graph that has no such axis. One new token behind others is a step of
    decoding; many behind none are a prefill, or a text that is read at once.
    """

    batch: int
    sequence: int
    past: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        """Of the named axes of a graph; a decoder reads as many states as it has tokens."""
        source = self.past + self.sequence
        return {
            "batch": self.batch, "sequence": self.sequence, "source": source, "past": self.past,
        }  # fmt: skip

    def __str__(self) -> str:
        """In a few characters, for the head of a column."""
        length = f"×{self.sequence}" if self.sequence else ""
        return f"{self.batch}{length}" + (f"+{self.past}" if self.past else "")
