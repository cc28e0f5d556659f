"""The results of all stages of a build, as one record."""

from dataclasses import dataclass, field, fields

from prox24_deploy.core.accuracy import EngineAccuracyResult, TaskScores
from prox24_deploy.core.quantized import QuantizeResult
from prox24_deploy.core.records import (
    BenchResult,
    CompileResult,
    EvaluateResult,
    ExportResult,
    PruneResult,
)
from prox24_deploy.core.recovery import RecoverResult


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildResults:
    """What the stages gave, each under the name of its stage and in the order of their running.

    `recover` is None where kept weights stay as pruning left them, `quantize` where the model
    stays in 16 bits, `tasks` where no task of the lm-evaluation-harness was asked for.
    """

    prune: PruneResult
    recover: RecoverResult | None = None
    quantize: QuantizeResult | None = None
    export: ExportResult
    compile: CompileResult
    bench: BenchResult
    evaluate: EvaluateResult
    accuracy: EngineAccuracyResult = field(default_factory=EngineAccuracyResult)
    tasks: TaskScores | None = None


STAGE_NAMES = tuple(each.name for each in fields(BuildResults))
