"""From the results of all stages to the report, the card and the sealed bundle."""

from typing import TYPE_CHECKING

from prox24_deploy.bundle.bundle import Bundle
from prox24_deploy.bundle.layout import LATE_FILES, PRUNED, REPORT_FILES
from prox24_deploy.config.limits import GivenLimits
from prox24_deploy.core.accuracy import EngineAccuracyResult, TaskScores
from prox24_deploy.core.records import (
    BenchResult,
    CompileResult,
    EvaluateResult,
    ExportResult,
    PruneResult,
)
from prox24_deploy.packaging.card import read_source_card, write_card
from prox24_deploy.pipeline.context import Subject, model_of
from prox24_deploy.regression.baseline import Gate
from prox24_deploy.regression.compare import held_against
from prox24_deploy.report.assemble import Report, assemble_report, write_report

if TYPE_CHECKING:
    pass


_STAGES = ("prune", "export", "compile", "bench", "evaluate", "accuracy", "tasks")


# Written when everything else is there.
_LAST_FILES = (*REPORT_FILES, *LATE_FILES)


def report(
    bundle: Bundle,
    subject: Subject,
    pruned: PruneResult,
    exported: ExportResult,
    compiled: CompileResult,
    measured: BenchResult,
    evaluated: EvaluateResult,
    gate: Gate | None = None,
    through: EngineAccuracyResult | None = None,
    tasks: TaskScores | None = None,
    given: GivenLimits | None = None,
) -> Report:
    """Assemble the report, hold it against a baseline, write its views and the card, and seal."""
    manifest = bundle.manifest
    bundle.promise(_LAST_FILES)
    made = assemble_report(
        model_of(bundle),
        {**manifest.options, "recipe_sha256": subject.recipe.sha256},
        {**manifest.versions, **_engine_versions(compiled), **manifest.machine},
        pruned,
        evaluated,
        exported,
        compiled,
        measured,
        {n: entry.size for n, entry in sorted(manifest.files.items()) if n not in _LAST_FILES},
        {name: manifest.stages[name].seconds for name in _STAGES if name in manifest.stages},
        subject.recipe.limits,
        through=through or EngineAccuracyResult(),
        tasks=tasks,
        given=given or GivenLimits(),
    )
    if gate:
        made = held_against(made, gate.baseline, limits=gate.limits, allow=gate.allow)
    card = read_source_card(subject.directory.path)
    # Nothing reads the source after its card.
    subject.directory.require_unchanged()
    write_card(made, card, bundle.root / PRUNED)
    write_report(made, bundle.root)
    manifest.verdict = made.verdict
    bundle.seal(_LAST_FILES)
    return made


def _engine_versions(compiled: CompileResult) -> dict[str, str]:
    return {name: text for engine in compiled.engines for name, text in engine.versions.items()}
