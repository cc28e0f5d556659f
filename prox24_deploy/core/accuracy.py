"""Records of accuracy beyond that of the PyTorch models: of the engines, and on tasks.

Like those of `records`, they are handed from stage to stage as JSON.
"""

from dataclasses import dataclass

from prox24_deploy.core.records import Estimate, Metric, NotMeasured
from prox24_deploy.core.types import DType, Twin


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityCheck:
    """One metric of one engine against PyTorch on the same weights and inputs.

    `torch` and `engine` are what each scores, `difference` is engine − torch sample by sample;
    where the metric compares both directly they are None and `agreement` is set. `deviation` is
    how far the engine is from doing what PyTorch does, in units of the metric, with what
    sampling noise explains taken off; it is None where a figure is not finite. `tolerance` and
    `passed` are None for a metric that informs and gates nothing.
    """

    twin: Twin
    metric: str
    samples: int
    torch: Estimate | None
    engine: Estimate | None
    difference: Estimate | None
    agreement: Estimate | None
    deviation: float | None
    tolerance: float | None
    passed: bool | None

    @property
    def change(self) -> Estimate | None:
        """How far the engine is from PyTorch, in units of the metric."""
        return self.agreement if self.difference is None else self.difference


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeAccuracy:
    """Accuracy of engines that decode: a text is read up to its last tokens, and those one by one.

    Each is fed behind keys and values that the engine gave itself, and only what is predicted from
    them counts. `tokens` are those of all `samples` that were decoded, `past` is the least number
    before them. `metrics` and `parity` are as in `EngineAccuracy`; PyTorch reads a text at once.
    """

    samples: int
    tokens: int
    past: int
    metrics: tuple[Metric, ...]
    parity: tuple[ParityCheck, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineAccuracy:
    """Accuracy of the engines of one backend, on evenly spaced samples of the evaluation.

    `samples` and `tokens` count what was run, of `available` samples; `longest` is the length that
    longer samples were cut to because no engine takes more, None where none was cut. `metrics`
    compare the sparse engine with the dense one as those of the models do, `parity` holds either
    against PyTorch. `decode` is None where no past was asked for.
    """

    backend: str
    device: str
    dtype: DType
    samples: int
    tokens: int
    available: int
    longest: int | None
    metrics: tuple[Metric, ...]
    parity: tuple[ParityCheck, ...]
    seconds: float
    decode: DecodeAccuracy | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineAccuracyResult:
    """Result of the stage; `failed` names backends whose engines gave no usable output."""

    engines: tuple[EngineAccuracy, ...] = ()
    not_measured: tuple[NotMeasured, ...] = ()
    failed: tuple[NotMeasured, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScores:
    """Tasks of the lm-evaluation-harness on the PyTorch models, dense against sparse.

    `metrics` are named TASK/METRIC, with values and standard errors of the harness, `version` says
    of which; `limit` is how many documents of each task were used, None for all, and `documents`
    hashes what was asked. `left_out` names figures that have no standard error or no better side.
    """

    version: str
    limit: int | None
    documents: str
    metrics: tuple[Metric, ...]
    left_out: tuple[str, ...]
    seconds: float
