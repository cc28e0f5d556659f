"""Commands that compare a release with an accepted one."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from prox24_deploy.cli import options as arguments
from prox24_deploy.cli import tables
from prox24_deploy.cli.build import VERDICT_EXIT
from prox24_deploy.cli.help import GroupedCommand
from prox24_deploy.cli.terminal import print_json, print_table, say

ReportArg = Annotated[
    Path,
    typer.Argument(
        metavar="REPORT", help="The new release: a report.json or a bundle.", readable=False
    ),
]
baseline = typer.Typer(
    help="Accept a release as the baseline of later ones.",
    no_args_is_help=True,
    add_completion=False,
)


def compare(
    report: ReportArg,
    against: Annotated[
        Path,
        typer.Argument(
            metavar="BASELINE",
            help="What it must hold: a baseline file, a report.json or a bundle.",
            readable=False,
        ),
    ],
    *,
    limits: arguments.LimitsOpt = None,
    allow: arguments.AllowOpt = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="Folder for compare.json, .md, .junit.xml, benchmark.",
            readable=False,
        ),
    ] = None,
    as_json: arguments.JsonOpt = False,
) -> None:
    """Compare a report with a baseline; exit 3 on a regression, 5 if noise leaves it open."""
    from prox24_deploy.regression.comparability import in_words
    from prox24_deploy.regression.compare import compare_files
    from prox24_deploy.regression.views import write_comparison

    found = compare_files(report, against, limits=limits, allow=allow or ())
    if out:
        write_comparison(found, out)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        for difference in found.allowed:
            say(f"Note: {in_words(difference)}")
        print_table(tables.comparison(found))
        say(f"Verdict: {found.verdict}")
    raise typer.Exit(VERDICT_EXIT[found.verdict])


@baseline.command(cls=GroupedCommand)
def update(
    report: ReportArg,
    path: Annotated[
        Path, typer.Argument(metavar="BASELINE", help="Baseline file to write.", readable=False)
    ],
    reason: Annotated[str, typer.Option(help="Why this release is the one to hold others to.")],
    *,
    keep: Annotated[int, typer.Option(min=1, help="Accepted releases to keep figures of.")] = 10,
    as_json: arguments.JsonOpt = False,
) -> None:
    """Accept a report as the baseline; the figures of those before it stay for the trend."""
    from prox24_deploy.regression.baseline import update_baseline

    date = datetime.now(UTC).isoformat(timespec="seconds")
    made = update_baseline(report, path, reason=reason, date=date, keep=keep)
    if as_json:
        print_json(made.model_dump(mode="json", exclude={"report"}))
        return
    if made.report.verdict != "pass":
        say(f"Note: it did not pass. {made.report.sentence}")
    say(
        f"{path}: {made.report.model.title} accepted, release {len(made.history)} of at most "
        f"{keep} kept."
    )


@baseline.command(cls=GroupedCommand)
def show(
    path: Annotated[
        Path, typer.Argument(metavar="BASELINE", help="A baseline file.", readable=False)
    ],
    *,
    as_json: arguments.JsonOpt = False,
) -> None:
    """Show which release is the baseline, why, and the figures of those before it."""
    from prox24_deploy.regression.baseline import read_baseline_file

    found = read_baseline_file(path)
    if as_json:
        print_json(found.model_dump(mode="json", exclude={"report"}))
        return
    print_table(tables.releases(found))
    print_table(tables.history(found))
    say(f"Baseline since {found.date}: {found.reason}")
