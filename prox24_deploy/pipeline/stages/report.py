"""The end of a build: from the results of all stages to report, card and sealed bundle."""

from typing import TYPE_CHECKING

from prox24_deploy.bundle.bundle import Bundle
from prox24_deploy.bundle.layout import (
    CARD,
    LATE_FILES,
    RECOVERED_CARD,
    REPORT_FILES,
    shipped_folder,
)
from prox24_deploy.bundle.manifest import contents_sha256
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.records import CompileResult
from prox24_deploy.core.results import STAGE_NAMES, BuildResults
from prox24_deploy.packaging.card import CARD_FILE, read_source_card, write_card
from prox24_deploy.pipeline.context import model_of
from prox24_deploy.pipeline.demands import Demands
from prox24_deploy.regression.compare import held_against
from prox24_deploy.report.assemble import Report, assemble_report, write_report

if TYPE_CHECKING:
    from prox24_deploy.model.directory import ModelDir

# Written when everything else is there; their sizes are not told in the report.
_UNTOLD = (*REPORT_FILES, *LATE_FILES)


def run(
    bundle: Bundle,
    source: "ModelDir",
    recipe: Recipe,
    results: BuildResults,
    demands: Demands,
) -> Report:
    """Assemble the report, hold it against a baseline, write its views and the card, and seal."""
    manifest = bundle.manifest
    shipped = shipped_folder(manifest.files)
    last = (*REPORT_FILES, f"{shipped}/{CARD_FILE}")
    # Of a model that is not shipped no card would be true.
    for name in {CARD, RECOVERED_CARD} - {*last}:
        bundle.drop_late(name)
    bundle.promise(last)
    made = assemble_report(
        model_of(bundle),
        results,
        recipe.limits,
        given=demands.given,
        options={**manifest.options, "recipe_sha256": recipe.sha256},
        environment={**manifest.versions, **_engine_versions(results.compile), **manifest.machine},
        sizes={
            name: entry.size
            for name, entry in sorted(manifest.files.items())
            if name not in _UNTOLD
        },
        timings={
            name: manifest.stages[name].seconds for name in STAGE_NAMES if name in manifest.stages
        },
    )
    told = {
        "date": max(entry.finished for entry in manifest.stages.values()),
        "contents_sha256": contents_sha256(manifest),
    }
    made = made.model_copy(update=told)
    if gate := demands.gate:
        made = held_against(made, gate.baseline, limits=gate.limits, allow=gate.allow)
    card = read_source_card(source.path)
    # Nothing reads the source after its card.
    source.require_unchanged()
    write_card(made, card, bundle.root / shipped)
    write_report(made, bundle.root)
    manifest.verdict = made.verdict
    bundle.seal(last)
    return made


def _engine_versions(compiled: CompileResult) -> dict[str, str]:
    return {name: text for engine in compiled.engines for name, text in engine.versions.items()}
