"""Options that several commands share, and what is done to a line before typer reads it."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from prox24_deploy.cli.hub import without_address
from prox24_deploy.config.options import (
    Compatibility,
    DeviceChoice,
    EngineOptions,
    Permute,
    PruneOptions,
    RecoverOptions,
    Target,
    TensorRtOptions,
    TextOptions,
    parse_budget,
    parse_capabilities,
    parse_dtype,
    parse_shapes,
)
from prox24_deploy.core.backends import BACKENDS, backends_with
from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.types import (
    DTYPES,
    DType,
    Preset,
    Pruning,
    Quantize,
    RecoverOptimizer,
    Refinement,
)

_DTYPES = ", ".join(DTYPES)
_LOG_FILE = "--log-file"
_COMMON = {"-v", "--verbose", "-q", "--quiet", "--debug", _LOG_FILE}
_TENSORRT, _ENGINE = TensorRtOptions(), EngineOptions()

# Groups of options in the help of a command.
_DATA = "Data"
_PRUNING = "Pruning"
_RECOVERY = "Recovery"
_ENGINES = "Files and engines"
_TENSORRT_HELP = "TensorRT"
_TASKS = "Tasks of the lm-evaluation-harness"
_LIMITS = "Limits and baseline"

ModelArg = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL_DIR",
        help="Hugging Face model directory with safetensors, or the id of one in the local cache.",
        readable=False,
        callback=without_address,
    ),
]
PrunedArg = Annotated[
    Path,
    typer.Argument(
        metavar="PRUNED",
        help="A bundle, or a model directory that is 2:4 already.",
        readable=False,
        callback=without_address,
    ),
]
BundleArg = Annotated[
    Path,
    typer.Argument(
        metavar="BUNDLE", help="A bundle: the OUT of an earlier command.", readable=False
    ),
]
OutOpt = Annotated[
    Path | None,
    typer.Option("-o", "--out", help="Bundle to write; default NAME-prox24.", readable=False),
]
NameOpt = Annotated[
    str | None,
    typer.Option(
        "--name",
        metavar="NAME",
        help="What the model is called, such as owner/model; default: as its card says.",
    ),
]
RecipeOpt = Annotated[
    Path | None,
    typer.Option(
        help="Export recipe; default: the model's own, else its family's.",
        readable=False,
        rich_help_panel=_PRUNING,
    ),
]
CalibrationOpt = Annotated[
    list[Path] | None,
    typer.Option(
        help="Text, JSON, CSV, Parquet, or folder of images or recordings to calibrate on; "
        "repeatable. Default, for text alone: what a decoder writes itself, else CPython's docs.",
        readable=False,
        rich_help_panel=_DATA,
    ),
]
RecoverCalibrationOpt = Annotated[
    list[Path] | None,
    typer.Option(
        "--calibration",
        help="Text, JSON, CSV, Parquet, or folder of images or recordings to train on; repeatable. "
        "Default: what the bundle was pruned on, with its settings; for another model as in build.",
        readable=False,
        rich_help_panel=_DATA,
    ),
]
EvaluationOpt = Annotated[
    list[Path] | None,
    typer.Option(
        help="Held-out text, images or recordings; repeatable. Default: a fifth of calibration.",
        readable=False,
        rich_help_panel=_DATA,
    ),
]
SameEvaluationOpt = Annotated[
    list[Path] | None,
    typer.Option(
        "--evaluation",
        help="Held-out text, images or recordings; repeatable. Default: as when pruned.",
        readable=False,
        rich_help_panel=_DATA,
    ),
]
ColumnOpt = Annotated[
    str | None,
    typer.Option(
        "--column",
        metavar="NAME",
        help="Column of JSON records or of a table with texts, chats or transcripts; default: "
        "text, messages, or the only one.",
        rich_help_panel=_DATA,
    ),
]
TargetColumnOpt = Annotated[
    str | None,
    typer.Option(
        "--target-column",
        metavar="NAME",
        help="Column with what a decoder should write; default: target.",
        rich_help_panel=_DATA,
    ),
]
TokensOpt = Annotated[
    int,
    typer.Option(
        min=1024,
        help="Calibration tokens to use.",
        rich_help_panel=_DATA,
    ),
]
ImagesOpt = Annotated[
    int,
    typer.Option(
        min=16,
        help="Images to use, of calibration and of evaluation; not of text.",
        rich_help_panel=_DATA,
    ),
]
RecordingsOpt = Annotated[
    int,
    typer.Option(
        min=8,
        help="Recordings to use, of calibration and of evaluation.",
        rich_help_panel=_DATA,
    ),
]
EvaluationTokensOpt = Annotated[
    int,
    typer.Option(
        min=1024,
        help="Evaluation tokens to use.",
        rich_help_panel=_DATA,
    ),
]
EngineTokensOpt = Annotated[
    int,
    typer.Option(
        min=1024,
        help="Of them, tokens to run through each engine; an image counts as 64.",
        rich_help_panel=_DATA,
    ),
]
SameEvaluationTokensOpt = Annotated[
    int | None,
    typer.Option(
        "--evaluation-tokens",
        min=1024,
        help="Evaluation tokens to use; default: as when pruned.",
        rich_help_panel=_DATA,
    ),
]
SameEngineTokensOpt = Annotated[
    int | None,
    typer.Option(
        "--engine-tokens",
        min=1024,
        help="Of them, tokens to run through each engine; default: as when pruned.",
        rich_help_panel=_DATA,
    ),
]
HarnessOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--lm-eval",
        metavar="TASK",
        help="Task of the lm-evaluation-harness to score both models on; repeatable.",
        rich_help_panel=_TASKS,
    ),
]
HarnessDataOpt = Annotated[
    Path | None,
    typer.Option(
        "--lm-eval-data",
        metavar="DIR",
        help="Its data as TASK/SPLIT.jsonl, and tasks of your own as YAML; nothing is fetched.",
        readable=False,
        rich_help_panel=_TASKS,
    ),
]
HarnessLimitOpt = Annotated[
    int | None,
    typer.Option(
        "--lm-eval-limit",
        min=2,
        help="Documents of each task; default: all.",
        rich_help_panel=_TASKS,
    ),
]
MethodOpt = Annotated[
    Pruning,
    typer.Option(
        help="Pruning method; ista is the literal one of the paper, none leaves all layers dense.",
        rich_help_panel=_PRUNING,
    ),
]
RefinementOpt = Annotated[
    Refinement,
    typer.Option(
        help="Update of the kept weights; auto: gradient for ista, else conjugate.",
        rich_help_panel=_PRUNING,
    ),
]
ReconstructOpt = Annotated[
    bool | None,
    typer.Option(
        "--reconstruct/--no-reconstruct",
        help="Tune each block as a whole, masks fixed; default: with preset best only.",
        rich_help_panel=_PRUNING,
    ),
]
TargetOpt = Annotated[
    Target,
    typer.Option(
        help="What a pruned layer is to give: what it gave in the dense model, or what the dense "
        "layer gives of the same inputs.",
        rich_help_panel=_PRUNING,
    ),
]
PermuteOpt = Annotated[
    Permute,
    typer.Option(
        help="auto: reorder channels where the recipe says that this is free, so that 2:4 keeps "
        "more; nothing changes at run time.",
        rich_help_panel=_PRUNING,
    ),
]
MaskOpt = Annotated[
    Path | None,
    typer.Option(
        "--mask",
        help="Keep the weights that a safetensors file of booleans, or a 2:4 model, keeps.",
        readable=False,
        rich_help_panel=_PRUNING,
    ),
]
IncludeOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="GLOB",
        help="Prune only targets whose path this glob matches; repeatable.",
        rich_help_panel=_PRUNING,
    ),
]
ExcludeOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        metavar="GLOB",
        help="Leave targets dense whose path this glob matches.",
        rich_help_panel=_PRUNING,
    ),
]
MaxLossOpt = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Prune the least harmful layers while the loss rises by no more than this.",
        rich_help_panel=_PRUNING,
    ),
]
LayersOpt = Annotated[
    int | None,
    typer.Option(
        "--layers",
        min=1,
        help="Prune only the N least harmful layers.",
        rich_help_panel=_PRUNING,
    ),
]
PresetOpt = Annotated[
    Preset,
    typer.Option(
        help="Schedule of the prox solver.",
        rich_help_panel=_PRUNING,
    ),
]
DTypeOpt = Annotated[
    DType | None,
    typer.Option(
        "--dtype",
        parser=parse_dtype,
        metavar="DTYPE",
        help=f"{_DTYPES}: precision of the exported models; default: the checkpoint's own. Nothing "
        "runs bfloat16 on a CPU, and TensorRT has no sparse kernels for float32.",
        rich_help_panel=_ENGINES,
    ),
]
PlanDTypeOpt = Annotated[
    DType | None,
    typer.Option(
        "--dtype",
        parser=parse_dtype,
        metavar="DTYPE",
        help=f"{_DTYPES}: precision to time; default: the checkpoint's own, float16 if that is "
        "float32, for which there are no sparse kernels.",
        rich_help_panel=_ENGINES,
    ),
]
# Of `recover`, and of --recover alone.
RECOVER_BUDGET = "5min"
RecoverOpt = Annotated[
    str | None,
    typer.Option(
        "--recover",
        metavar="BUDGET",
        help="Train the kept weights against the dense model, masks fixed: 200steps or 5min, which "
        "is also what --recover alone means.",
        rich_help_panel=_RECOVERY,
    ),
]
BudgetOpt = Annotated[
    str, typer.Option("--recover", metavar="BUDGET", help="How long to train: 200steps or 5min.")
]
MovedModelOpt = Annotated[
    Path | None,
    typer.Option(
        "--model",
        help="Where the model that was pruned lies now. Default: where it was.",
        readable=False,
        callback=without_address,
    ),
]
TeacherOpt = Annotated[
    Path,
    typer.Option(
        "--teacher",
        help="The dense model that it was pruned from.",
        readable=False,
        callback=without_address,
    ),
]
RecoverOutOpt = Annotated[
    Path | None,
    typer.Option(
        "-o", "--out", help="Bundle to write; default: the one that is recovered.", readable=False
    ),
]
RecoverRateOpt = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Recovery: learning rate, relative to the size of weights; default: 0.01, "
        "less for few steps or many blocks, and a quarter from where that diverges.",
        rich_help_panel=_RECOVERY,
    ),
]
RecoverTokensOpt = Annotated[
    int | None,
    typer.Option(
        min=64,
        help="Recovery: tokens of a step; default 8192, on a CPU 2048.",
        rich_help_panel=_RECOVERY,
    ),
]
RecoverTemperatureOpt = Annotated[
    float,
    typer.Option(
        min=0, help="Recovery: divides the logits of both models.", rich_help_panel=_RECOVERY
    ),
]
RecoverTopKOpt = Annotated[
    int | None,
    typer.Option(
        "--recover-top-k",
        min=1,
        help="Recovery: compare the likeliest tokens, the rest in sum.",
        rich_help_panel=_RECOVERY,
    ),
]
RecoverWriteOpt = Annotated[
    bool,
    typer.Option(
        "--recover-write/--no-recover-write",
        help="Recovery: also train on text that the dense model writes itself.",
        rich_help_panel=_RECOVERY,
    ),
]
RecoverCheckpointingOpt = Annotated[
    bool,
    typer.Option(
        "--recover-checkpointing",
        help="Recovery: compute activations twice to save memory.",
        rich_help_panel=_RECOVERY,
    ),
]
RecoverOptimizerOpt = Annotated[
    RecoverOptimizer,
    typer.Option(
        "--recover-optimizer",
        help="Recovery: adafactor takes less memory than adamw, for large models.",
        rich_help_panel=_RECOVERY,
    ),
]
RecoverEmbeddingsOpt = Annotated[
    bool,
    typer.Option(
        "--recover-embeddings",
        help="Recovery: train embeddings and the output layer, too.",
        rich_help_panel=_RECOVERY,
    ),
]
RecoverQuantizedOpt = Annotated[
    int | None,
    typer.Option(
        "--recover-quantized",
        metavar="STEPS",
        min=1,
        help="Recovery: train the numbers of --quantize through their rounding, too.",
        rich_help_panel=_RECOVERY,
    ),
]
RecoverProcessesOpt = Annotated[
    int,
    typer.Option(
        "--recover-processes",
        min=1,
        help="Recovery: processes that share each step, on GPUs one GPU each.",
        rich_help_panel=_RECOVERY,
    ),
]
QuantizeOpt = Annotated[
    Quantize,
    typer.Option(
        help="Round weights and activations of the target layers to 8 bits, zeros staying zeros.",
        rich_help_panel=_ENGINES,
    ),
]
AnewQuantizeOpt = Annotated[
    Quantize | None,
    typer.Option(
        "--quantize",
        help="Quantise the model before, on the samples that it was pruned on, and export it "
        "anew; default: as the bundle is.",
        rich_help_panel=_ENGINES,
    ),
]
PlanQuantizeOpt = Annotated[
    Quantize,
    typer.Option(
        "--quantize",
        help="8-bit format that layers may use besides the dtype; on the GPU at hand only what is "
        "asked for is timed, of a saved profile all that it holds is shown.",
        rich_help_panel=_ENGINES,
    ),
]
BackendOpt = Annotated[
    list[str] | None,
    typer.Option(
        help=f"{', '.join(BACKENDS)} or auto; repeatable.",
        rich_help_panel=_ENGINES,
    ),
]
PlanOutOpt = Annotated[
    Path | None,
    typer.Option(
        "-o", "--out", help="Write the plan to this file for build --plan.", readable=False
    ),
]
PlanOpt = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        help="Prune only the layers that a plan says to prune.",
        readable=False,
        rich_help_panel=_PRUNING,
    ),
]
EagerOpt = Annotated[
    bool,
    typer.Option(
        "--eager",
        help="cuSPARSELt: run both models without torch.compile.",
        rich_help_panel=_ENGINES,
    ),
]
WorkspaceOpt = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        max=1e6,
        help="TensorRT: scratch memory of a kernel at most, GiB.",
        rich_help_panel=_TENSORRT_HELP,
    ),
]
LevelOpt = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=5,
        help="TensorRT: optimisation level of its builder.",
        rich_help_panel=_TENSORRT_HELP,
    ),
]
CompatibilityOpt = Annotated[
    Compatibility,
    typer.Option(
        help="TensorRT: engines for later versions, or for every GPU from Ampere on.",
        rich_help_panel=_TENSORRT_HELP,
    ),
]
RefitOpt = Annotated[
    bool,
    typer.Option(
        "--refit",
        help="TensorRT: engines whose weights can be replaced.",
        rich_help_panel=_TENSORRT_HELP,
    ),
]
StripOpt = Annotated[
    bool,
    typer.Option(
        "--strip-weights",
        help="TensorRT: engines without weights, refitted from ONNX.",
        rich_help_panel=_TENSORRT_HELP,
    ),
]
TimingsOpt = Annotated[
    Path | None,
    typer.Option(
        help="TensorRT: folder to keep timings of kernels in.",
        readable=False,
        rich_help_panel=_TENSORRT_HELP,
    ),
]
CapabilityOpt = Annotated[
    list[str] | None,
    typer.Option(
        help="TensorRT-RTX: GPUs to compile for; default 8.6, 8.9, 12.0; repeatable.",
        rich_help_panel=_ENGINES,
    ),
]
ShapesOpt = Annotated[
    list[str] | None,
    typer.Option(
        help="Shapes to measure, e.g. batch=1,8 sequence=128 past=1024.",
        rich_help_panel=_ENGINES,
    ),
]
RoundsOpt = Annotated[
    int | None,
    typer.Option(min=2, help="Rounds of each shape, exactly; default: as many as --seconds has."),
]
WarmupOpt = Annotated[
    int, typer.Option(min=0, help="Runs before the timed ones, of each engine on each input.")
]
SecondsOpt = Annotated[
    float | None,
    typer.Option(
        min=0.1, max=1e6, help="Timed seconds of each shape, and 20 rounds at least; default 4."
    ),
]
SensitivityOpt = Annotated[
    bool,
    typer.Option(
        "--sensitivity/--no-sensitivity", help="Measure what pruning each paying layer costs."
    ),
]
ProfileOpt = Annotated[
    Path | None,
    typer.Option(
        "--gpu-profile",
        help="Plan for the GPU of this file, measured elsewhere. Shipped: "
        "h100, h200, h100-pcie, a100, b200, rtx4090, rtx5080 and gb10, each with .json.",
        readable=False,
    ),
]
SaveProfileOpt = Annotated[
    Path | None,
    typer.Option(
        "--save-profile", help="Write the measured GEMM times to this file.", readable=False
    ),
]
DeviceOpt = Annotated[DeviceChoice, typer.Option(help="Where models run in PyTorch.")]
GpusOpt = Annotated[
    int,
    typer.Option(
        min=1,
        help="Share pruning between as many processes, one on each GPU, started by torchrun.",
    ),
]
MemoryOpt = Annotated[
    float | None,
    typer.Option(
        min=0.1,
        max=1e6,
        help="Memory that a stage may take for models where it runs, GiB; default: all that is "
        "free. Results do not depend on it.",
    ),
]
SeedOpt = Annotated[int, typer.Option(help="Seed of everything drawn at random.")]
BaselineOpt = Annotated[
    Path | None,
    typer.Option(
        help="Hold the report against this baseline file, report.json or bundle.",
        readable=False,
        rich_help_panel=_LIMITS,
    ),
]
LimitsOpt = Annotated[
    Path | None,
    typer.Option(
        help="TOML with limits per metric, against a baseline and the dense model.",
        readable=False,
        rich_help_panel=_LIMITS,
    ),
]
AcceptLossOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--accept-loss",
        metavar="METRIC=AMOUNT",
        help="Loss to accept against the dense model, e.g. perplexity=25%; repeatable.",
        rich_help_panel=_LIMITS,
    ),
]
AllowOpt = Annotated[
    list[str] | None,
    typer.Option(
        help="Something that may differ, such as driver or evaluation; repeatable.",
        rich_help_panel=_LIMITS,
    ),
]
FreshOpt = Annotated[bool, typer.Option("--fresh", help="Run every stage again.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def default_out(model_dir: Path) -> Path:
    """The bundle of a model where -o names none."""
    # Reads cards, which the start of every command need not wait for.
    from prox24_deploy.packaging import naming

    return naming.default_out(model_dir)


def text_options(
    *,
    calibration: list[Path] | None,
    evaluation: list[Path] | None,
    column: str | None,
    target_column: str | None,
    calibration_tokens: int,
    evaluation_tokens: int,
    images: int,
    recordings: int,
    seed: int,
) -> TextOptions:
    """The options about text as one record."""
    return TextOptions(
        calibration=tuple(calibration or ()),
        evaluation=tuple(evaluation or ()),
        column=column,
        target_column=target_column,
        calibration_tokens=calibration_tokens,
        evaluation_tokens=evaluation_tokens,
        seed=seed,
        images=images,
        recordings=recordings,
    )


def prune_options(
    *,
    method: Pruning,
    preset: Preset,
    refinement: Refinement,
    reconstruct: bool | None,
    target: Target,
    permute: Permute,
    mask: Path | None,
    include: list[str] | None,
    exclude: list[str] | None,
    max_loss: float | None,
    layers: int | None,
    plan: Path | None = None,
) -> PruneOptions:
    """The options about pruning as one record.

    Raises:
        UsageError: the file is no plan, or it prunes nothing.
    """
    return PruneOptions(
        method=method,
        preset=preset,
        refinement=refinement,
        reconstruct=reconstruct,
        target=target,
        permute=permute,
        mask=mask,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        max_loss=max_loss,
        max_layers=layers,
        planned_dense=_planned_dense(plan),
    )


def recover_options(
    *,
    budget: str | None,
    rate: float | None,
    tokens: int | None,
    temperature: float,
    top_k: int | None,
    write: bool,
    checkpointing: bool,
    optimizer: RecoverOptimizer,
    embeddings: bool,
    processes: int,
    quantized: int | None = None,
) -> RecoverOptions | None:
    """The options about recovery as one record; None without a budget.

    Raises:
        UsageError: the budget is not understood, or an option has no effect without one.
    """
    settings = RecoverOptions(
        steps=1,
        learning_rate=rate,
        step_tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        write=write,
        checkpointing=checkpointing,
        optimizer=optimizer,
        embeddings=embeddings,
        processes=processes,
        quantized=quantized,
    )
    if budget is not None:
        steps, minutes = parse_budget(budget)
        return replace(settings, steps=steps, minutes=minutes)
    if settings != RecoverOptions(steps=1):
        raise UsageError("--recover-... has no effect without --recover; add --recover 5min.")
    return None


def _planned_dense(plan: Path | None) -> tuple[tuple[str, str], ...]:
    if plan is None:
        return ()
    from prox24_deploy.engines.cusparselt.planning import read_plan

    return read_plan(plan).left_dense


def tensorrt_options(
    *,
    workspace_gib: float | None,
    builder_level: int | None,
    compatibility: Compatibility,
    refit: bool,
    strip_weights: bool,
    timing_cache: Path | None,
    capabilities: list[str] | None,
) -> TensorRtOptions:
    """The options about TensorRT as one record.

    Raises:
        UsageError: a compute capability is not understood.
    """
    return TensorRtOptions(
        workspace_gib=workspace_gib,
        builder_level=builder_level,
        compatibility=compatibility,
        refit=refit,
        strip_weights=strip_weights,
        timing_cache=timing_cache,
        capabilities=parse_capabilities(capabilities or ()),
    )


def engine_options(
    *,
    backends: list[str] | None,
    shapes: list[str] | None,
    tensorrt: TensorRtOptions = _TENSORRT,
    plan: Path | None = None,
    eager: bool = False,
) -> EngineOptions:
    """The options about engines as one record.

    Raises:
        UsageError: a shape is not understood, or an option of a backend would have no effect.
    """
    default = EngineOptions()
    parsed = parse_shapes(shapes or ())
    chosen = tuple(backends or default.backends)
    reading = backends_with("tensorrt")
    if tensorrt != _TENSORRT and not {*reading} & {*chosen}:
        able = " or ".join(f"--backend {name}" for name in reading)
        raise UsageError(
            f"Options of TensorRT have no effect on backend {', '.join(chosen)}; add {able}."
        )
    if eager and not {*backends_with("eager")} & {*chosen}:
        able = " or ".join(f"--backend {name}" for name in backends_with("eager"))
        raise UsageError(
            f"--eager has no effect on backend {', '.join(chosen)}; add {able}, or leave it out."
        )
    if tensorrt.capabilities and not {*backends_with("capabilities")} & {*chosen}:
        raise UsageError(
            "--compute-capability has no effect on backend tensorrt, which builds for the GPU of "
            "this machine; add --backend tensorrt-rtx or leave it out."
        )
    return EngineOptions(
        backends=chosen,
        batches=parsed.get("batch", default.batches),
        sequences=parsed.get("sequence", default.sequences),
        pasts=parsed.get("past", default.pasts),
        plan=plan,
        tensorrt=tensorrt,
        eager=eager,
    )


def tensor_axes(arguments: Sequence[str]) -> dict[str, int]:
    """`GLOB=AXIS` of the command line as a table.

    Raises:
        UsageError: an argument has no such form.
    """
    found = {}
    for argument in arguments:
        glob, equals, axis = argument.rpartition("=")
        if not equals or not glob or not re.fullmatch(r"\d{1,2}", axis):
            raise UsageError(
                f"--axis takes GLOB=AXIS, as '*.c_attn.weight=0', got {argument!r}; pass a glob "
                "over names of tensors and the number of an axis."
            )
        found[glob] = int(axis)
    return found


def require_utf8(arguments: Sequence[str]) -> None:
    """Refuse names of files that no report could hold.

    Raises:
        UsageError: an argument holds bytes that are not UTF-8.
    """
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"Argument {argument!r} is not UTF-8; rename the file or folder."
            ) from error


def join_shapes(arguments: Sequence[str]) -> list[str]:
    """Let `--shapes batch=1,8 sequence=128` take several words: repeat the option for each."""
    joined: list[str] = []
    taking = False
    for argument in arguments:
        if taking and joined[-1] != "--shapes" and re.fullmatch(r"\w+=[\d,]+", argument):
            joined.append("--shapes")
        elif taking and joined[-1] != "--shapes":
            taking = False
        joined.append(argument)
        taking = taking or argument == "--shapes"
    return joined


def fill_budget(arguments: Sequence[str]) -> list[str]:
    """Let `--recover` stand without a budget, which no option can be: it is that of `recover`."""
    filled: list[str] = []
    for argument in (*arguments, "-"):
        if filled[-1:] == ["--recover"] and argument.startswith("-"):
            filled.append(RECOVER_BUDGET)
        filled.append(argument)
    return filled[:-1]


def hoist_common(arguments: Sequence[str]) -> list[str]:
    """Let -v, -q, --debug and --log-file FILE stand anywhere on the line, as users expect."""
    common: list[str] = []
    rest: list[str] = []
    for argument in arguments:
        valued = common[-1:] == [_LOG_FILE]
        hoisted = argument in _COMMON or argument.startswith(f"{_LOG_FILE}=")
        (common if valued or hoisted else rest).append(argument)
    return common + rest
