"""The accuracy metrics that an evaluation gives, each declared once with all that follows from it.

Whoever makes or judges one of them takes it from here as an object; nobody else writes its name.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from prox24_deploy.core.tasks import TASKS, Judging


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricKind:
    """What is known of a metric before anything is measured.

    Attributes:
        name: as reports have it.
        judged_by: the evaluations that give it.
        higher_is_better: which of two values is the better one.
        direct: it compares the two models with each other, and neither has a value of its own.
        bounded: the value of every sample lies between 0 and 1; an error rate may go above, where
            more is wrong than there is.
        labelled: it needs labels or transcripts of the user.
        against_dense: its limit against the dense model, as a file of limits has it; a metric
            without informs.
        limited_by: the evaluations in which that limit holds; those that give it unless told.
        against_baseline: percent that it may lose against a baseline, by glob, where that is not
            what every metric may.
        instead: the metric that its own limit takes the place of, where labels tell more.
        deviation: from what was measured of an engine against PyTorch to what should be 0; a metric
            without holds no engine to anything.
        in_percent: a change of it is told in percent of the dense model's value.
        logarithm: the metric on whose scale a limit on it is judged.
        hub_name: what the Hugging Face Hub calls it, "" where it has no name for it.
    """

    name: str
    judged_by: frozenset[Judging]
    higher_is_better: bool
    direct: bool = False
    bounded: bool = False
    labelled: bool = False
    against_dense: Mapping[str, float] = field(default_factory=dict)
    limited_by: frozenset[Judging] | None = None
    against_baseline: Mapping[str, float] = field(default_factory=dict)
    instead: "MetricKind | None" = None
    deviation: Callable[[float], float] | None = None
    in_percent: bool = False
    logarithm: "MetricKind | None" = None
    hub_name: str = ""

    @property
    def loss(self) -> str:
        """The name of the loss that it tells, of which less is better."""
        return f"1 - {self.name}" if self.higher_is_better else self.name

    def limits_in(self, judging: Judging) -> Mapping[str, float]:
        """Its limit against the dense model in one evaluation; empty where it has none."""
        by = self.judged_by if self.limited_by is None else self.limited_by
        return self.against_dense if judging in by else {}


def _one_less(value: float) -> float:
    return 1 - value


_HEARS: frozenset[Judging] = frozenset({"speech"})
_WRITES: frozenset[Judging] = frozenset({"language", "speech"})
_EMBEDS: frozenset[Judging] = frozenset({"embeddings"})
_CLASSIFIES: frozenset[Judging] = frozenset({"classes"})

WORD_ERRORS_TO_DENSE = MetricKind(
    name="word error rate to dense",
    judged_by=_HEARS,
    higher_is_better=False,
    direct=True,
    bounded=True,
    against_dense={"threshold": 0.05},
)
WORD_ERRORS = MetricKind(
    name="word error rate",
    judged_by=_HEARS,
    higher_is_better=False,
    bounded=True,
    labelled=True,
    against_dense={"max-degradation": 0.02},
    # Near zero, where percents are small; the one to the dense model has the same.
    against_baseline={"word error rate*": 10},
    instead=WORD_ERRORS_TO_DENSE,
    hub_name="wer",
)
# Of recordings in languages that write no spaces between words.
CHARACTER_ERRORS_TO_DENSE = MetricKind(
    name="character error rate to dense",
    judged_by=_HEARS,
    higher_is_better=False,
    direct=True,
    bounded=True,
    against_dense={"threshold": 0.05},
)
CHARACTER_ERRORS = MetricKind(
    name="character error rate",
    judged_by=_HEARS,
    higher_is_better=False,
    bounded=True,
    labelled=True,
    against_dense={"max-degradation": 0.02},
    against_baseline={"character error rate*": 10},
    instead=CHARACTER_ERRORS_TO_DENSE,
    hub_name="cer",
)
LOG_PERPLEXITY = MetricKind(
    name="log-perplexity", judged_by=_WRITES, higher_is_better=False, deviation=abs
)
PERPLEXITY = MetricKind(
    name="perplexity",
    judged_by=_WRITES,
    higher_is_better=False,
    against_dense={"max-degradation-percent": 10},
    in_percent=True,
    logarithm=LOG_PERPLEXITY,
    hub_name="perplexity",
)
COSINE = MetricKind(
    name="embedding cosine",
    judged_by=_EMBEDS,
    higher_is_better=True,
    direct=True,
    bounded=True,
    against_dense={"threshold": 0.95},
    deviation=_one_less,
)
NEIGHBOURS = MetricKind(
    name="nearest-neighbour agreement",
    judged_by=_EMBEDS,
    higher_is_better=True,
    direct=True,
    bounded=True,
    against_dense={"threshold": 0.80},
)
SCORE_CHANGE = MetricKind(
    name="score change",
    judged_by=_CLASSIFIES,
    higher_is_better=False,
    direct=True,
    # Scores of a reranker that differ by normal errors then still correlate by 0.95.
    against_dense={"threshold": 0.25},
    against_baseline={"score change": 10, "engine/*/score change": 20},
    deviation=abs,
)
TOP_1 = MetricKind(
    name="top-1 agreement",
    judged_by=_WRITES | _CLASSIFIES,
    higher_is_better=True,
    direct=True,
    bounded=True,
    against_dense={"threshold": 0.95},
    # A near tie decides single tokens.
    limited_by=_CLASSIFIES,
)
ACCURACY = MetricKind(
    name="accuracy",
    judged_by=_CLASSIFIES,
    higher_is_better=True,
    bounded=True,
    labelled=True,
    against_dense={"max-degradation": 0.02},
    instead=TOP_1,
    deviation=abs,
    hub_name="accuracy",
)
DIVERGENCE = MetricKind(
    name="KL divergence",
    judged_by=_WRITES | _CLASSIFIES,
    higher_is_better=False,
    direct=True,
    against_baseline={"KL divergence": 10, "engine/*/KL divergence": 20},
    deviation=abs,
)

METRICS = {
    kind.name: kind
    for kind in (
        WORD_ERRORS,
        WORD_ERRORS_TO_DENSE,
        CHARACTER_ERRORS,
        CHARACTER_ERRORS_TO_DENSE,
        PERPLEXITY,
        LOG_PERPLEXITY,
        COSINE,
        NEIGHBOURS,
        ACCURACY,
        SCORE_CHANGE,
        TOP_1,
        DIVERGENCE,
    )
}

# What the full name of a figure starts with: through the engines of a backend, of a task of the
# lm-evaluation-harness.
ENGINE, HARNESS = "engine/", "lm-eval/"


def metrics_of(task: str, *, labelled: bool) -> list[str]:
    """Names of the metrics that a task may give, with labels or transcripts or without."""
    judging = TASKS[task].judged_by
    return [
        kind.name
        for kind in METRICS.values()
        if judging in kind.judged_by and (labelled or not kind.labelled)
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


def is_in_percent(name: str) -> bool:
    """Whether a change is told in percent: of any perplexity, that of the harness among them."""
    kind = METRICS.get(plain_name(name))
    if kind is not None:
        return kind.in_percent
    return name.endswith(PERPLEXITY.name) and not name.endswith(LOG_PERPLEXITY.name)


def limit_scale(name: str) -> str:
    """The name of the metric on whose scale a limit on this one is judged; "" if its own."""
    kind = METRICS.get(name)
    return kind.logarithm.name if kind and kind.logarithm else ""
