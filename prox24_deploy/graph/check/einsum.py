"""Over which axes of an operand Einsum sums, from its equation."""

from collections import Counter
from dataclasses import dataclass

_ELLIPSIS = "..."


@dataclass(frozen=True, slots=True)
class Contraction:
    """`count` neighbouring axes from `first` on are summed; `outputs` run over the results."""

    first: int
    count: int
    outputs: tuple[int, ...]


def contraction_of(equation: str, index: int, rank: int) -> Contraction | str | None:
    """How Einsum sums over one operand, or why that cannot be told; None if it does not.

    Several letters that neighbour each other, and follow each other in the other operand as well,
    are summed as one axis. An ellipsis stands for axes of batches, which are not summed.

    Args:
        equation: as the attribute has it, with or without the part behind the arrow.
        index: number of the operand.
        rank: its number of axes.
    """
    text = equation.replace(" ", "")
    inputs, arrow, result = text.partition("->")
    terms = [_letters(term) for term in inputs.split(",")]
    unread = f"the check does not read the equation {text!r} of Einsum"
    if index >= len(terms) or any(term is None for term in terms):
        return unread
    known = [term for term in terms if term is not None]
    kept = _letters(result) if arrow else _implied(known)
    if kept is None:
        return unread
    own = _spread(known[index], rank)
    others = [term for i, term in enumerate(known) if i != index]
    if own is None or len(set(own)) < len(own) or (_ELLIPSIS in own and _ELLIPSIS not in kept):
        return unread
    return _summed(own, others, kept, text)


def _summed(
    own: list[str], others: list[list[str]], kept: list[str], text: str
) -> Contraction | str | None:
    summed = [i for i, letter in enumerate(own) if letter not in kept and letter.isalpha()]
    if not summed:
        return None
    letters = [own[axis] for axis in summed]
    holders = [other for other in others if set(letters) & set(other)]
    if not holders or any(not _follows(letters, other) for other in holders):
        return f"Einsum {text!r} does not sum over one axis that both operands have"
    if summed != list(range(summed[0], summed[0] + len(summed))):
        return f"Einsum {text!r} sums over axes that do not neighbour each other"
    free = [
        axis
        for axis, letter in enumerate(own)
        if letter in kept and letter.isalpha() and not any(letter in other for other in others)
    ]
    return Contraction(summed[0], len(summed), tuple(free))


def _follows(letters: list[str], other: list[str]) -> bool:
    """Whether an operand has the letters as neighbours in this order, and none of them twice."""
    places = [at for at, letter in enumerate(other) if letter in letters]
    neighbours = places == list(range(places[0], places[0] + len(letters)))
    return neighbours and [other[at] for at in places] == letters


def _letters(term: str) -> list[str] | None:
    """Labels of a term, an ellipsis as one; None where it is no term of Einsum."""
    before, dots, behind = term.partition(_ELLIPSIS)
    found = [*before, *([_ELLIPSIS] if dots else []), *behind]
    return found if all(label.isalpha() or label == _ELLIPSIS for label in found) else None


def _spread(term: list[str], rank: int) -> list[str] | None:
    """One label for each axis, as many for the ellipsis as the rank leaves; None if none fits."""
    if _ELLIPSIS not in term:
        return term if len(term) == rank else None
    more = rank - (len(term) - 1)
    at = term.index(_ELLIPSIS)
    if more < 0:
        return None
    # Axes of batches are told apart by the dots that they stand for.
    return [*term[:at], *(_ELLIPSIS + "." * i for i in range(more)), *term[at + 1 :]]


def _implied(terms: list[list[str]]) -> list[str]:
    """The result without an arrow: the ellipsis, then letters that occur once, in their order."""
    counts = Counter(label for term in terms for label in term)
    dots = [_ELLIPSIS] if _ELLIPSIS in counts else []
    return dots + sorted(label for label, count in counts.items() if count == 1 and label.isalpha())
