"""Whether what was recovered holds on other samples: warnings about training."""

from collections.abc import Iterator, Sequence

from prox24_deploy.core.quantized import QuantizeResult
from prox24_deploy.core.records import EvaluateResult, Metric
from prox24_deploy.core.recovery import RecoverResult
from prox24_deploy.core.results import BuildResults
from prox24_deploy.report.against_dense import Judged

# Above this ratio of the loss on withheld samples to that on given ones that were trained on, what
# was learnt is for the most part what these have in particular. Text that the model wrote is not of
# them: it may be far harder or easier.
_MOST_APART = 1.5
# A rise of the loss on withheld samples by this share after the kept step is no noise.
_RISEN = 1.1


def recovery_warnings(found: RecoverResult | None, evaluate: EvaluateResult) -> Iterator[str]:
    """One sentence for each doubt about a recovery."""
    if found is None:
        return
    if found.warning:
        yield found.warning
    elif not found.kept:
        yield (
            f"Recovery found no weights that are better than those of pruning on withheld samples "
            f"in {found.taken} steps, and left them; pass more steps, more text, or another "
            "--recover-rate."
        )
    else:
        yield from _overfitting(found)
        yield from _other_domain(evaluate)


def remedies(results: BuildResults, judged: Sequence[Judged]) -> Iterator[str]:
    """What to try where the loss is too large, and nothing was done about it yet.

    What fails through an engine alone, or has no finite figure, is not of the weights.
    """
    failed = any(
        one.check.verdict == "fail" and one.check.value is not None and not one.group.prefix
        for one in judged
    )
    pruned = any(layer.status == "pruned" for layer in results.prune.layers)
    if failed and pruned and results.recover is None:
        yield (
            "Accuracy is below its limit and nothing was recovered: --recover 5min trains the kept "
            "weights against the dense model; or prune fewer layers, by --max-loss or --exclude."
        )


def training_warnings(found: QuantizeResult | None) -> Iterator[str]:
    """Why numbers that were trained are those that they were rounded to."""
    training = found.training if found else None
    if training is None or training.kept:
        return
    yield training.warning or (
        f"Training through the rounding found no better numbers on withheld samples in "
        f"{training.taken} steps, and left them; pass more steps to --recover-quantized, or "
        "another --recover-rate."
    )


def _overfitting(found: RecoverResult) -> Iterator[str]:
    last, more = found.curve[-1], "pass more text with --calibration and --calibration-tokens"
    if found.fitted is not None and found.after and found.after > _MOST_APART * found.fitted:
        yield (
            f"Recovery fits the given samples that it was trained on ({found.loss} "
            f"{found.fitted:.3g}) far better than withheld ones ({found.after:.3g}): there are too "
            f"few of them; {more}."
        )
        return
    if not (last.withheld and found.after and last.withheld > _RISEN * found.after):
        return
    kept = next((point for point in found.curve if point.step == found.kept), last)
    if kept.trained and last.trained and last.trained > _RISEN * kept.trained:
        yield (
            f"Recovery was unstable: after step {found.kept}, whose weights are kept, "
            f"{found.loss} rose from {kept.trained:.3g} to {last.trained:.3g} on what it was "
            f"trained on, too; pass a smaller --recover-rate than {found.learning_rate:g}."
        )
    else:
        yield (
            f"Recovery began to overfit: after step {found.kept}, whose weights are kept, "
            f"{found.loss} on withheld samples rose from {found.after:.3g} to "
            f"{last.withheld:.3g}; {more}, or pass fewer steps."
        )


def _other_domain(evaluate: EvaluateResult) -> Iterator[str]:
    """Whether evaluation samples got worse while withheld calibration samples got better."""
    if not evaluate.steps or evaluate.steps[0].name != "pruned":
        return
    before = evaluate.steps[0].metrics[0]
    recovered = [step.metrics for step in evaluate.steps if step.name == "recovered"]
    after = (recovered[0] if recovered else evaluate.metrics)[0]
    figures = [_figure(before), _figure(after)]
    if figures[0] is None or figures[1] is None:
        return
    gained = figures[1] - figures[0]
    # One that is the best there is can gain nothing.
    if (gained if after.higher_is_better else -gained) < 0:
        yield (
            f"Recovery made withheld calibration samples better, and {after.name} on evaluation "
            f"samples went from {figures[0]:.4g} to {figures[1]:.4g}: calibration is of another "
            "domain than evaluation, or too small; calibrate on samples like those that the model "
            "will see."
        )


def _figure(metric: Metric) -> float | None:
    return None if metric.estimate is None else metric.estimate.value
