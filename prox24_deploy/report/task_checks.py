"""Warnings about tasks of the lm-evaluation-harness."""

from collections.abc import Iterator

from prox24_deploy.core.accuracy import TaskScores


def task_warnings(scores: TaskScores | None) -> Iterator[str]:
    """What a reader must know of these figures."""
    if scores is None:
        return
    if scores.limit is not None:
        yield (
            f"Tasks of the lm-evaluation-harness were run on their first {scores.limit} documents "
            "alone; leave out --lm-eval-limit for scores that can be compared with published ones."
        )
    if scores.left_out:
        yield (
            f"Figures of the lm-evaluation-harness without a standard error or a better side are "
            f"left out: {', '.join(scores.left_out)}."
        )
