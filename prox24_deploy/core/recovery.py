"""Records of recovery: how the kept weights of a pruned model were trained, and what that gave.

Like those of `records`, they are handed from stage to stage as JSON.
"""

from dataclasses import dataclass

from prox24_deploy.core.records import TextSource
from prox24_deploy.core.types import RecoverOptimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPoint:
    """The loss after some steps: on what was trained on since the last point, and withheld.

    `trained` is None before the first step, and where the loss was not finite; so is `withheld`.
    """

    step: int
    trained: float | None
    withheld: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setback:
    """A step at which training diverged, at which rate and how, and went on at a smaller one."""

    step: int
    rate: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenText:
    """Text that the dense model wrote itself, and how much of it was dropped as unusable.

    `samples` are rows that were kept, of `written`; `sha256` hashes their tokens.
    """

    written: int
    samples: int
    tokens: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverResult:
    """Result of the stage that recovers.

    Attributes:
        loss: what was minimised, such as "KL(dense, sparse)".
        steps: planned ones, of about `step_tokens` tokens each.
        taken: steps that were taken.
        kept: the step whose weights are kept; 0 where those that were given are.
        before: loss of the model that was given, on withheld samples; None if not measured.
        after: of the model that is kept, as it is stored; None likewise.
        fitted: of that on some of the given samples that it was trained on, not on written ones;
            None where the model is the one that was given.
        curve: measurements along the way, the first before any step.
        learning_rate: of the largest step, relative to the root mean square of kept weights; the
            last one where training diverged at others before.
        layers: 2:4 layers that were trained.
        vectors: norms and biases that were.
        parameters: values that were free to change.
        calibration: samples that were given; the withheld ones are of them.
        withheld: number of samples withheld.
        written: text of the dense model's own, None where none was added.
        warning: why the model that was given is kept or training ended early, and what to change;
            "" where nothing went wrong.
        device: where it was trained.
        embeddings: embedding tables and output layers that were trained.
        optimizer: what took the steps.
        processes: how many shared each step.
        needed_gib: memory of models, gradients and optimiser, as estimated before any work; None if
            it was not.
        peak_gib: most memory of a GPU that was in use, None on a CPU.
        state_sha256: hashes every weight file that was written.
        setbacks: where it diverged and went on from the best weights so far, at a smaller rate.
    """

    loss: str
    steps: int
    step_tokens: int
    taken: int
    kept: int
    before: float | None
    after: float | None
    curve: tuple[RecoveryPoint, ...]
    learning_rate: float
    layers: int
    vectors: int
    parameters: int
    calibration: TextSource
    withheld: int
    written: WrittenText | None
    warning: str
    device: str
    peak_gib: float | None
    state_sha256: str
    seconds: float
    embeddings: int = 0
    optimizer: RecoverOptimizer = "adamw"
    processes: int = 1
    needed_gib: float | None = None
    setbacks: tuple[Setback, ...] = ()
    fitted: float | None = None
