"""Whether there were samples enough to judge accuracy by, and how many would do."""

import math
from collections.abc import Iterator, Sequence

from prox24_deploy.core.accuracy import EngineAccuracy
from prox24_deploy.core.intervals import FEW, FEWEST
from prox24_deploy.core.metrics import ENGINE, HARNESS
from prox24_deploy.core.records import TextSource
from prox24_deploy.report.against_dense import Judged
from prox24_deploy.report.wording import said

# Share of samples that may occur in both sets by chance, as short sentences do.
_MOST_SHARED = 0.05


def few_samples(evaluation: TextSource) -> str | None:
    """What can be said before any work: that so few samples will decide little, or nothing."""
    if evaluation.samples >= FEW:
        return None
    decide = "decide nothing" if evaluation.samples < FEWEST else "decide little"
    return (
        f"Evaluation has {_counted(evaluation)}, which {decide}: at least "
        f"{FEW} samples are advised; {_remedy(evaluation, FEW)}."
    )


def seen_samples(evaluation: TextSource) -> str | None:
    """What can be said before any work: that many of them are samples to calibrate on, too."""
    if evaluation.shared <= _MOST_SHARED * evaluation.samples:
        return None
    return (
        f"{evaluation.shared} of {_counted(evaluation)} to evaluate on are calibration samples, "
        "too, so that accuracy is judged by what the model was made to fit; pass others with "
        "--evaluation."
    )


def sample_warnings(
    judged: Sequence[Judged], evaluation: TextSource, engines: Sequence[EngineAccuracy]
) -> Iterator[str]:
    """That samples were seen before or were few, and for what is open how many would decide."""
    own = _open(judged, "")
    if (seen := seen_samples(evaluation)) is not None:
        yield seen
    if (few := few_samples(evaluation)) is not None:
        yield few
    elif own:
        wanted = _wanted(own)
        remedy = f"; {_remedy(evaluation, wanted)}" if wanted else ""
        yield f"{_undecided(own, evaluation.samples, wanted)}{remedy}."
    for engine in engines:
        through = _open(judged, f"{ENGINE}{engine.backend}/")
        if through:
            wanted = _wanted(through)
            more = " and the evaluation" if (wanted or 0) > engine.available else ""
            remedy = f"; raise --engine-tokens{more}" if wanted else ""
            yield f"{_undecided(through, engine.samples, wanted)}{remedy}."
    for one in _open(judged, HARNESS):
        wanted = _wanted([one])
        yield (
            f"{_undecided([one], one.metric.samples, wanted)}; or accept more loss with "
            f"--accept-loss '{one.check.name}=AMOUNT'."
        )


def _open(judged: Sequence[Judged], prefix: str) -> list[Judged]:
    return [j for j in judged if j.group.prefix == prefix and j.check.verdict == "inconclusive"]


def _wanted(judged: Sequence[Judged]) -> int | None:
    """Samples that would decide all of them; None where no reasonable number would."""
    wanted = [one.wanted for one in judged]
    known = [number for number in wanted if number is not None]
    return max(known) if len(known) == len(wanted) else None


def _undecided(judged: Sequence[Judged], samples: int, wanted: int | None) -> str:
    names = " and ".join(said(one.check.name) for one in judged)
    verb = "is" if len(judged) == 1 else "are"
    enough = f"about {wanted:,} would decide" if wanted else "very many more would be needed"
    return f"Whether {names} {verb} within the limit is open on {samples:,} samples; {enough}"


def _remedy(evaluation: TextSource, samples: int) -> str:
    """How to get so many samples, which hold as many tokens each as those at hand."""
    each = evaluation.tokens / max(evaluation.samples, 1)
    modality = evaluation.modality
    number = math.ceil(samples * each / modality.step) * modality.step
    return (
        f"pass about {number:,} {evaluation.unit}s with --evaluation and {modality.option} {number}"
    )


def _counted(source: TextSource) -> str:
    samples = f"{source.samples:,} sample" + ("" if source.samples == 1 else "s")
    if source.modality.is_counted_in_samples:
        return samples
    return f"{samples} ({source.tokens:,} {source.unit}s)"
