"""The accuracy metrics that an evaluation gives, each declared once, by name."""

from collections.abc import Iterable
from dataclasses import dataclass

from prox24_deploy.core.types import WRITES_TEXT

_EMBEDS = frozenset({"feature-extraction", "text-encoding", "image-feature-extraction"})
_CLASSIFIES = frozenset({"text-classification", "token-classification", "image-classification"})
_HEARS = frozenset({"automatic-speech-recognition"})


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricKind:
    """What is known of a metric before anything is measured.

    Attributes:
        name: as reports have it.
        tasks: whose evaluation gives it.
        direct: it compares the two models with each other, and neither has a value of its own.
        bounded: the value of every sample lies between 0 and 1.
        labelled: it needs labels or transcripts of the user.
    """

    name: str
    tasks: frozenset[str]
    direct: bool = False
    bounded: bool = False
    labelled: bool = False


METRICS = {
    kind.name: kind
    for kind in (
        MetricKind(name="word error rate", tasks=_HEARS, bounded=True, labelled=True),
        MetricKind(name="word error rate to dense", tasks=_HEARS, direct=True, bounded=True),
        MetricKind(name="perplexity", tasks=WRITES_TEXT),
        MetricKind(name="log-perplexity", tasks=WRITES_TEXT),
        MetricKind(name="embedding cosine", tasks=_EMBEDS, direct=True, bounded=True),
        MetricKind(name="nearest-neighbour agreement", tasks=_EMBEDS, direct=True, bounded=True),
        MetricKind(name="accuracy", tasks=_CLASSIFIES, bounded=True, labelled=True),
        MetricKind(name="score change", tasks=_CLASSIFIES, direct=True),
        MetricKind(
            name="top-1 agreement", tasks=WRITES_TEXT | _CLASSIFIES, direct=True, bounded=True
        ),
        MetricKind(name="KL divergence", tasks=WRITES_TEXT | _CLASSIFIES, direct=True),
    )
}

# What the full name of a figure starts with: through the engines of a backend, of a task of the
# lm-evaluation-harness.
ENGINE, HARNESS = "engine/", "lm-eval/"


def metrics_of(task: str, *, labelled: bool) -> list[str]:
    """Names of the metrics that a task may give, with labels or transcripts or without."""
    return [
        kind.name
        for kind in METRICS.values()
        if task in kind.tasks and (labelled or not kind.labelled)
    ]


def plain_name(name: str) -> str:
    """The name of a metric without the engine through which it was measured."""
    return name.split("/", 2)[2] if name.startswith(ENGINE) and name.count("/") > 1 else name


def is_direct(name: str) -> bool:
    """Whether a metric compares the two models with each other; false where it is not known."""
    kind = METRICS.get(plain_name(name))
    return kind is not None and kind.direct


def is_bounded(name: str, values: Iterable[float]) -> bool:
    """Whether each sample lies between 0 and 1; of a metric that is not known, its values tell."""
    kind = METRICS.get(plain_name(name))
    return kind.bounded if kind else all(0 <= value <= 1 for value in values)
