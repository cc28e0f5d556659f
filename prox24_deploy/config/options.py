"""What a build can be told: small frozen dataclasses with real defaults, light to import."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.fingerprint import unkeyed
from prox24_deploy.core.shapes import Shape
from prox24_deploy.core.types import (
    DTYPES,
    DType,
    Preset,
    Pruning,
    QuantizedFormat,
    RecoverOptimizer,
    Refinement,
)

Target = Literal["asymmetric", "symmetric"]
Permute = Literal["auto", "none"]
DeviceChoice = Literal["auto", "cpu", "cuda"]
# Of the search for a rotation.
ROTATE_STEPS = 400
Compatibility = Literal["none", "version", "ampere+"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """Calibration and evaluation text, images or recordings, and how much of it to use.

    `column` of a table or of JSON records holds the texts, the chats or the transcripts, and
    `target_column` what a decoder should write; None takes those that docs/data.md names.
    """

    calibration: tuple[Path, ...] = ()
    evaluation: tuple[Path, ...] = ()
    column: str | None = None
    target_column: str | None = None
    calibration_tokens: int = 65536
    evaluation_tokens: int = 32768
    seed: int = 0
    images: int = 1024
    recordings: int = 256

    def __post_init__(self) -> None:
        _make_paths(self, "calibration", "evaluation")


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneOptions:
    """How to prune; `method` "none" leaves every layer as it is.

    `target` "asymmetric" matches the dense model's outputs from the pruned model's inputs,
    "symmetric" matches the dense layer on the pruned model's inputs. `refinement` is how the kept
    weights are updated once the mask is fixed; "auto" takes the one that belongs to the method.
    `reconstruct` None means: in preset "best" only, which also takes more steps for it.
    `planned_dense` has path and reason of each layer that a plan leaves dense. `permute` "auto"
    puts channels whose order the recipe declares free into the one in which 2:4 keeps most. `mask`
    is a safetensors file or a model directory that says which weights are kept; no method chooses
    then, and no channel is moved.

    `include` and `exclude` are globs over module paths, relative to a block or from the model on:
    of the recipe's targets, those are pruned that an `include` matches (any, if there is none) and
    no `exclude` does. `max_loss` bounds the rise of the model's loss on withheld calibration text,
    `max_layers` the number of layers; the least harmful layers are then pruned, as many as fit.
    """

    method: Pruning = "prox"
    preset: Preset = "default"
    target: Target = "asymmetric"
    refinement: Refinement = "auto"
    reconstruct: bool | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    max_loss: float | None = None
    max_layers: int | None = None
    planned_dense: tuple[tuple[str, str], ...] = ()
    permute: Permute = "auto"
    mask: Path | None = field(
        default=None, metadata=unkeyed("its content counts, wherever it lies")
    )

    def __post_init__(self) -> None:
        _make_paths(self, "mask")

    def idle(self, *, overridden: bool) -> str:
        """What was asked for of the pruning and has no effect, as a sentence; "" where all has.

        `overridden` says that a recipe prunes some layers by another method.
        """
        if self.method == "none":
            asked = [
                f"--{name.replace('_', '-')}"
                for name in ("preset", "target", "refinement", "reconstruct", "include", "exclude")
                if getattr(self, name) != getattr(PruneOptions(), name)
            ]
            asked += ["--max-loss"] * (self.max_loss is not None)
            asked += ["--layers"] * (self.max_layers is not None)
            verb = "has" if len(asked) == 1 else "have"
            return f"{', '.join(asked)} {verb} no effect with --method none." if asked else ""
        chosen = self.mask is None and self.method == "prox"
        if self.preset != "default" and not (chosen or overridden or self.reconstructs):
            why = "--mask" if self.mask else f"--method {self.method}"
            return (
                f"--preset {self.preset} has no effect with {why} unless blocks are tuned as a "
                "whole; add --reconstruct."
            )
        return ""

    @property
    def has_budget(self) -> bool:
        """Whether the sensitivity of each layer decides which are pruned."""
        return self.max_loss is not None or self.max_layers is not None

    @property
    def reconstructs(self) -> bool:
        """Whether to tune each block as a whole once its layers are solved."""
        return self.preset == "best" if self.reconstruct is None else self.reconstruct


# Learning rates of a recovery of many steps that was given none; smaller ones follow where training
# diverges. They are of a model of few blocks, and fall with a power of what is more of these, of
# steps that are fewer and of fewer tokens in each: docs/results.md. The power of tokens is that of
# Malladi et al., arXiv 2205.10287.
_RATES, _MANY_STEPS, _MANY_TOKENS, _FEW_BLOCKS = (0.01, 0.0025, 0.000625), 5000, 2048, 8
_STEPS_POWER, _TOKENS_POWER, _BLOCKS_POWER = 1 / 3, 1 / 2, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverOptions:
    """How to train the kept weights of a pruned model to do what the dense one does.

    Either `steps` or `minutes` is the budget; minutes are turned into steps once, by timing the
    first. `learning_rate` is relative to the root mean square of the kept weights of each layer;
    None is what `rates` says. `step_tokens` None means 8192 on a GPU and 2048 on a CPU.
    `temperature` divides the logits of both models; `top_k` compares only the likeliest tokens of
    the dense model one by one, and the others in sum. `write` lets a language model write text to
    train on besides the calibration text. `checkpointing` computes activations twice to hold fewer
    of them. `optimizer` "adafactor" keeps hardly any state beside the weights. `embeddings` trains
    embedding tables and the output layer, too. `quantized` is a number of steps that train the
    numbers of a quantised model. `processes` train on a share of each step, on a GPU with one GPU
    each.
    """

    steps: int | None = None
    minutes: float | None = None
    learning_rate: float | None = None
    step_tokens: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    write: bool = True
    checkpointing: bool = False
    optimizer: RecoverOptimizer = "adamw"
    embeddings: bool = False
    quantized: int | None = None
    processes: int = field(
        default=1, metadata=unkeyed("steps are the same, however many share them")
    )

    def rates(self, steps: int, step_tokens: int, blocks: int) -> tuple[float, ...]:
        """Learning rates to take, each once the one before it made training diverge.

        Of a model of up to eight blocks they are 0.01 and quarters of it from 5000 planned steps of
        2048 tokens on. They are less where there are fewer steps, 0.0027 for 100 of them, twice as
        large with four times the tokens in a step, up to 0.01, and half as large with twice the
        blocks.
        """
        if self.learning_rate is not None:
            return (self.learning_rate,)
        share = (steps / _MANY_STEPS) ** _STEPS_POWER
        share *= (step_tokens / _MANY_TOKENS) ** _TOKENS_POWER
        largest = min(share, 1.0) * _RATES[0] * min(_FEW_BLOCKS / blocks, 1.0) ** _BLOCKS_POWER
        share = float(f"{largest:.2g}") / _RATES[0]
        return tuple(share * rate for rate in _RATES)

    def require_usable(self) -> None:
        """Refuse a budget that is none, and a rate or temperature that is not above 0.

        Raises:
            UsageError: says what was given.
        """
        given = [each for each in (self.steps, self.minutes) if each is not None]
        if len(given) != 1 or not 0 < given[0] < math.inf:
            raise UsageError(
                f"Recovery takes a number of steps or of minutes above 0, got {self.steps} steps "
                f"and {self.minutes} minutes; pass one, for example 200steps or 5min."
            )
        rate, temperature = self.learning_rate, self.temperature
        if not ((rate is None or 0 < rate < math.inf) and 0 < temperature < math.inf):
            raise UsageError(
                f"Recovery takes a learning rate and a temperature above 0, got {rate} and "
                f"{temperature}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRtOptions:
    """How TensorRT builds; None leaves a setting to TensorRT.

    `workspace_gib` bounds the scratch memory of a kernel, `builder_level` (0 to 5) trades build
    time for speed, and `compatibility` lets an engine run on later versions of TensorRT
    ("version") or on every GPU from Ampere on ("ampere+"). `refit` builds an engine whose weights
    can be replaced, `strip_weights` one that is stored without them and refitted from its ONNX
    file. `timing_cache` is a folder in which timings outlive the bundle. `capabilities` such as
    "SM86" are what TensorRT-RTX compiles for; empty means its defaults.
    """

    workspace_gib: float | None = None
    builder_level: int | None = None
    compatibility: Compatibility = "none"
    refit: bool = False
    strip_weights: bool = False
    timing_cache: Path | None = field(
        default=None, metadata=unkeyed("says where timings are kept, not what is built")
    )
    capabilities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _make_paths(self, "timing_cache")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Which backends to compile for, for which shapes, and how.

    Of a model with a cache, one new token behind each of `pasts` is run, too, in every batch.
    `plan` is the file of a plan whose GEMM timings need not be measured again. `eager` runs the
    engines of backend cusparselt without torch.compile.
    """

    backends: tuple[str, ...] = ("auto",)
    batches: tuple[int, ...] = (1, 8)
    sequences: tuple[int, ...] = (128,)
    pasts: tuple[int, ...] = ()
    plan: Path | None = field(
        default=None, metadata=unkeyed("what is read there counts where it is used")
    )
    tensorrt: TensorRtOptions = field(default_factory=TensorRtOptions)
    eager: bool = False

    def __post_init__(self) -> None:
        _make_paths(self, "plan")

    def shapes(self, *, images: bool, cached: bool) -> list[Shape]:
        """Every shape, each once; sequence 0 for a graph without such an axis, as of images.

        Steps of decoding come last, and only where the graph is `cached`.
        """
        batches = sorted(set(self.batches))
        lengths = [0] if images else sorted(set(self.sequences))
        pasts = sorted(set(self.pasts)) if cached else []
        return [
            *(Shape(batch=batch, sequence=length) for batch in batches for length in lengths),
            *(Shape(batch=batch, sequence=1, past=past) for batch in batches for past in pasts),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """How long to time each shape: `rounds` exactly, or as many as fit into `seconds`, 20 at least.

    None of both means 4 seconds. `warmup` runs of each engine on each input come before.
    """

    rounds: int | None = None
    warmup: int = 3
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.rounds is not None and self.seconds is not None:
            raise UsageError(
                f"--rounds {self.rounds} and --seconds {self.seconds:g} both say when to stop; "
                "leave one out."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessOptions:
    """Tasks of the lm-evaluation-harness, the folder with their data, and documents of each."""

    tasks: tuple[str, ...] = ()
    data: Path | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        _make_paths(self, "data")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """Everything that `build` can be told.

    `name` is what the model is called in all that is published; None leaves it to its card. `dtype`
    is that of the exported files; None means the checkpoint's own. `recover` says how kept
    weights are trained once the masks stand; None leaves them. `quantize` is the format that
    weights and activations of the target layers are rounded to.
    `device` is where pruning and evaluation run. `engine_tokens` bounds how much of the evaluation
    is run through the engines; an image counts as 64 tokens. The report is held against the dense
    model and against `baseline`, by `limits_file` before the limits of the recipe, and may differ
    from the baseline in what `allow` names. `accept_loss` has names of metrics and how much worse
    than the dense model each may be, "25%" or a number. `memory_limit_gib` bounds what
    models take where a stage runs, `gpus` is how many processes share the pruning,
    one on each GPU; neither changes a result.
    """

    recipe: Path | None = None
    text: TextOptions = field(default_factory=TextOptions)
    prune: PruneOptions = field(default_factory=PruneOptions)
    recover: RecoverOptions | None = None
    quantize: QuantizedFormat | None = None
    device: DeviceChoice = "auto"
    dtype: DType | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)
    baseline: Path | None = None
    limits_file: Path | None = None
    allow: tuple[str, ...] = ()
    harness: HarnessOptions = field(default_factory=HarnessOptions)
    engine_tokens: int = 8192
    name: str | None = None
    accept_loss: tuple[tuple[str, str], ...] = ()
    memory_limit_gib: float | None = None
    gpus: int = 1

    @property
    def memory_limit(self) -> int | None:
        """Bytes that models may take where a stage runs; None for all that are free."""
        return None if self.memory_limit_gib is None else int(self.memory_limit_gib * 2**30)

    def __post_init__(self) -> None:
        _make_paths(self, "recipe", "baseline", "limits_file")
        if self.dtype is not None:
            object.__setattr__(self, "dtype", parse_dtype(self.dtype))


def _make_paths(options: object, *names: str) -> None:
    """Let a program write a path, or several, as str too."""
    for name in names:
        value = getattr(options, name)
        if isinstance(value, str):
            single = type(options).__dataclass_fields__[name].default is None  # type: ignore[attr-defined]
            object.__setattr__(options, name, Path(value) if single else (Path(value),))
        elif isinstance(value, Sequence):
            object.__setattr__(options, name, tuple(Path(each) for each in value))


def parse_dtype(word: str) -> DType:
    """A precision by its name, or by the short one that people say.

    Raises:
        UsageError: there is no such precision.
    """
    known: dict[str, DType] = {
        **{name: name for name in DTYPES},
        "fp32": "float32",
        "fp16": "float16",
        "half": "float16",
        "bf16": "bfloat16",
    }
    if word.lower() not in known:
        raise UsageError(f"Precision {word!r} is not known, expected one of {', '.join(known)}.")
    return known[word.lower()]


def parse_budget(word: str) -> tuple[int | None, float | None]:
    """`200steps`, or `5min` or `5`, as steps and minutes, of which one is None.

    Raises:
        UsageError: the word is neither.
    """
    steps, minutes = r"([0-9]{1,9}) ?steps?", r"([0-9]{1,6}(?:\.[0-9]{1,6})?)(?: ?min)?"
    match = re.fullmatch(f"{steps}|{minutes}", word.strip())
    if match is None or not float(match[1] or match[2]):
        raise UsageError(
            f"--recover {word} is not understood, expected a number of steps or of minutes such as "
            "200steps or 5min."
        )
    return (int(match[1]), None) if match[1] else (None, float(match[2]))


def parse_losses(words: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Parse NAME=AMOUNT, the last one of a name.

    Raises:
        UsageError: a word has no name or no amount.
    """
    losses: dict[str, str] = {}
    for word in words:
        name, _, amount = (part.strip() for part in word.rpartition("="))
        if not name or not amount:
            raise UsageError(
                f"--accept-loss {word} is not understood, expected METRIC=AMOUNT such as "
                "perplexity=25% or accuracy=0.05."
            )
        losses[name] = amount
    return tuple(losses.items())


def parse_capabilities(words: Sequence[str]) -> tuple[str, ...]:
    """Compute capabilities written "8.6" or "SM86" as "SM86".

    Raises:
        UsageError: a word is neither.
    """
    found = [re.fullmatch(r"(?:SM([0-9]{2,3})|([0-9]{1,2})\.([0-9]))", word) for word in words]
    for word, match in zip(words, found, strict=True):
        if match is None:
            raise UsageError(
                f"Compute capability {word!r} is not understood, expected a number such as 8.6."
            )
    return tuple(f"SM{m[1] or m[2] + m[3]}" for m in found if m)


def parse_shapes(words: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Parse `batch=1,8 sequence=128 past=1024`, in one word or several.

    Raises:
        UsageError: a word is not NAME=N[,N...] with NAME batch, sequence or past and N positive.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for word in (part for entry in words for part in entry.split()):
        name, _, values = word.partition("=")
        numbers = [int(v) for v in values.split(",") if v.isdigit() and int(v) > 0]
        if name not in {"batch", "sequence", "past"} or len(numbers) != len(values.split(",")):
            raise UsageError(
                f"Shape {word!r} is not understood, expected batch=N[,N], sequence=N[,N] or "
                "past=N[,N] with positive numbers, for example --shapes batch=1,8 sequence=128."
            )
        shapes[name] = tuple(numbers)
    return shapes
