"""Commands that make a bundle or one stage of it."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prox24_deploy.cli import options as arguments
from prox24_deploy.cli import tables
from prox24_deploy.cli.hub import local_model
from prox24_deploy.cli.progress import progress as shown
from prox24_deploy.cli.run_file import fill_from, run_file_text
from prox24_deploy.cli.terminal import print_json, print_table, print_text, say, stderr
from prox24_deploy.config.options import (
    BenchOptions,
    BuildOptions,
    HarnessOptions,
    RecoverOptions,
    TextOptions,
    parse_losses,
)

if TYPE_CHECKING:
    from prox24_deploy.report.assemble import Report

EXIT_REGRESSION, EXIT_SPARSITY, EXIT_INCONCLUSIVE = 3, 4, 5
_TEXT, _BUILD, _RECOVER = TextOptions(), BuildOptions(), RecoverOptions(steps=1)
VERDICT_EXIT = {"pass": 0, "fail": EXIT_REGRESSION, "inconclusive": EXIT_INCONCLUSIVE}


ConfigOpt = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="TOML with arguments of this command by name; the command line goes before it.",
        is_eager=True,
        callback=fill_from,
        readable=False,
    ),
]
PrintConfigOpt = Annotated[
    bool,
    typer.Option("--print-config", help="Print the run as such a file, with every key, and end."),
]


def build(
    context: typer.Context,
    model_dir: arguments.ModelArg,
    *,
    out: arguments.OutOpt = None,
    name: arguments.NameOpt = None,
    recipe: arguments.RecipeOpt = None,
    calibration: arguments.CalibrationOpt = None,
    evaluation: arguments.EvaluationOpt = None,
    column: arguments.ColumnOpt = None,
    target_column: arguments.TargetColumnOpt = None,
    calibration_tokens: arguments.TokensOpt = _TEXT.calibration_tokens,
    evaluation_tokens: arguments.EvaluationTokensOpt = _TEXT.evaluation_tokens,
    images: arguments.ImagesOpt = _TEXT.images,
    recordings: arguments.RecordingsOpt = _TEXT.recordings,
    method: arguments.MethodOpt = "prox",
    preset: arguments.PresetOpt = "default",
    refinement: arguments.RefinementOpt = "auto",
    reconstruct: arguments.ReconstructOpt = None,
    target: arguments.TargetOpt = "asymmetric",
    permute: arguments.PermuteOpt = "auto",
    mask: arguments.MaskOpt = None,
    include: arguments.IncludeOpt = None,
    exclude: arguments.ExcludeOpt = None,
    max_loss: arguments.MaxLossOpt = None,
    layers: arguments.LayersOpt = None,
    recover: arguments.RecoverOpt = None,
    recover_rate: arguments.RecoverRateOpt = None,
    recover_tokens: arguments.RecoverTokensOpt = None,
    recover_temperature: arguments.RecoverTemperatureOpt = 1.0,
    recover_top_k: arguments.RecoverTopKOpt = None,
    recover_write: arguments.RecoverWriteOpt = True,
    recover_checkpointing: arguments.RecoverCheckpointingOpt = False,
    recover_optimizer: arguments.RecoverOptimizerOpt = _RECOVER.optimizer,
    recover_embeddings: arguments.RecoverEmbeddingsOpt = False,
    recover_processes: arguments.RecoverProcessesOpt = 1,
    recover_quantized: arguments.RecoverQuantizedOpt = None,
    dtype: arguments.DTypeOpt = None,
    quantize: arguments.QuantizeOpt = "none",
    backend: arguments.BackendOpt = None,
    shapes: arguments.ShapesOpt = None,
    engine_tokens: arguments.EngineTokensOpt = _BUILD.engine_tokens,
    plan: arguments.PlanOpt = None,
    eager: arguments.EagerOpt = False,
    workspace_gib: arguments.WorkspaceOpt = None,
    builder_level: arguments.LevelOpt = None,
    compatibility: arguments.CompatibilityOpt = "none",
    refit: arguments.RefitOpt = False,
    strip_weights: arguments.StripOpt = False,
    timing_cache: arguments.TimingsOpt = None,
    compute_capability: arguments.CapabilityOpt = None,
    lm_eval: arguments.HarnessOpt = None,
    lm_eval_data: arguments.HarnessDataOpt = None,
    lm_eval_limit: arguments.HarnessLimitOpt = None,
    device: arguments.DeviceOpt = "auto",
    memory_limit: arguments.MemoryOpt = None,
    gpus: arguments.GpusOpt = 1,
    seed: arguments.SeedOpt = 0,
    baseline: arguments.BaselineOpt = None,
    limits: arguments.LimitsOpt = None,
    accept_loss: arguments.AcceptLossOpt = None,
    allow: arguments.AllowOpt = None,
    fresh: arguments.FreshOpt = False,
    as_json: arguments.JsonOpt = False,
    config: ConfigOpt = None,  # noqa: ARG001 - the other arguments have what it holds
    print_config: PrintConfigOpt = False,
) -> None:
    """Prune, export, prove, compile, measure and report: everything, into one bundle."""
    from prox24_deploy.pipeline import run as pipeline
    from prox24_deploy.pipeline.asked import require_sound
    from prox24_deploy.pipeline.ranks import is_helper

    tensorrt = arguments.tensorrt_options(
        workspace_gib=workspace_gib,
        builder_level=builder_level,
        compatibility=compatibility,
        refit=refit,
        strip_weights=strip_weights,
        timing_cache=timing_cache,
        capabilities=compute_capability,
    )
    options = BuildOptions(
        recipe=recipe,
        text=arguments.text_options(
            calibration=calibration,
            evaluation=evaluation,
            column=column,
            target_column=target_column,
            calibration_tokens=calibration_tokens,
            evaluation_tokens=evaluation_tokens,
            images=images,
            recordings=recordings,
            seed=seed,
        ),
        prune=arguments.prune_options(
            method=method,
            preset=preset,
            refinement=refinement,
            reconstruct=reconstruct,
            target=target,
            permute=permute,
            mask=mask,
            include=include,
            exclude=exclude,
            max_loss=max_loss,
            layers=layers,
            # What is printed may be of files that are not there yet.
            plan=None if print_config else plan,
        ),
        recover=arguments.recover_options(
            budget=recover,
            rate=recover_rate,
            tokens=recover_tokens,
            temperature=recover_temperature,
            top_k=recover_top_k,
            write=recover_write,
            checkpointing=recover_checkpointing,
            optimizer=recover_optimizer,
            embeddings=recover_embeddings,
            processes=recover_processes,
            quantized=recover_quantized,
        ),
        quantize=None if quantize == "none" else quantize,
        device=device,
        memory_limit_gib=memory_limit,
        gpus=gpus,
        dtype=dtype,
        engine=arguments.engine_options(
            backends=backend, shapes=shapes, tensorrt=tensorrt, plan=plan, eager=eager
        ),
        baseline=baseline,
        limits_file=limits,
        allow=tuple(allow or ()),
        harness=HarnessOptions(
            tasks=tuple(dict.fromkeys(lm_eval or ())), data=lm_eval_data, limit=lm_eval_limit
        ),
        engine_tokens=engine_tokens,
        name=name,
        accept_loss=parse_losses(accept_loss or ()),
    )
    if print_config:
        require_sound(options)
        print_text(run_file_text(context.params))
        return
    model_dir = local_model(model_dir)
    if is_helper():
        pipeline.help_to_prune(model_dir, options)
        return
    root = out or arguments.default_out(model_dir)
    with shown(stderr, root) as progress:
        report = pipeline.build(model_dir, root, options, fresh=fresh, progress=progress)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        print_report(report, root)
    raise typer.Exit(exit_code(report))


def prune(
    model_dir: arguments.ModelArg,
    *,
    out: arguments.OutOpt = None,
    name: arguments.NameOpt = None,
    recipe: arguments.RecipeOpt = None,
    calibration: arguments.CalibrationOpt = None,
    evaluation: arguments.EvaluationOpt = None,
    column: arguments.ColumnOpt = None,
    target_column: arguments.TargetColumnOpt = None,
    calibration_tokens: arguments.TokensOpt = _TEXT.calibration_tokens,
    evaluation_tokens: arguments.EvaluationTokensOpt = _TEXT.evaluation_tokens,
    images: arguments.ImagesOpt = _TEXT.images,
    recordings: arguments.RecordingsOpt = _TEXT.recordings,
    method: arguments.MethodOpt = "prox",
    preset: arguments.PresetOpt = "default",
    refinement: arguments.RefinementOpt = "auto",
    reconstruct: arguments.ReconstructOpt = None,
    target: arguments.TargetOpt = "asymmetric",
    permute: arguments.PermuteOpt = "auto",
    mask: arguments.MaskOpt = None,
    include: arguments.IncludeOpt = None,
    exclude: arguments.ExcludeOpt = None,
    max_loss: arguments.MaxLossOpt = None,
    layers: arguments.LayersOpt = None,
    device: arguments.DeviceOpt = "auto",
    memory_limit: arguments.MemoryOpt = None,
    gpus: arguments.GpusOpt = 1,
    seed: arguments.SeedOpt = 0,
    fresh: arguments.FreshOpt = False,
    as_json: arguments.JsonOpt = False,
) -> None:
    """Prune only: OUT becomes a bundle with the pruned model directory."""
    from prox24_deploy.pipeline import run as pipeline
    from prox24_deploy.pipeline.ranks import is_helper

    options = BuildOptions(
        recipe=recipe,
        text=arguments.text_options(
            calibration=calibration,
            evaluation=evaluation,
            column=column,
            target_column=target_column,
            calibration_tokens=calibration_tokens,
            evaluation_tokens=evaluation_tokens,
            images=images,
            recordings=recordings,
            seed=seed,
        ),
        prune=arguments.prune_options(
            method=method,
            preset=preset,
            refinement=refinement,
            reconstruct=reconstruct,
            target=target,
            permute=permute,
            mask=mask,
            include=include,
            exclude=exclude,
            max_loss=max_loss,
            layers=layers,
        ),
        device=device,
        memory_limit_gib=memory_limit,
        gpus=gpus,
        name=name,
    )
    model_dir = local_model(model_dir)
    if is_helper():
        pipeline.help_to_prune(model_dir, options)
        return
    root = out or arguments.default_out(model_dir)
    with shown(stderr, root) as progress:
        result = pipeline.prune(model_dir, root, options, fresh=fresh, progress=progress)
    if as_json:
        print_json(asdict(result))
        return
    pruned = [layer for layer in result.layers if layer.status == "pruned"]
    print_table(tables.layers(result.layers))
    for note in result.notes:
        say(f"Note: {note}")
    for line in tables.order_lines(result.orders):
        say(line)
    say(f"{len(pruned)} layers are 2:4 in {root / 'pruned'}.")


def recover(
    pruned: arguments.PrunedArg,
    *,
    teacher: arguments.TeacherOpt,
    out: arguments.RecoverOutOpt = None,
    recover: arguments.BudgetOpt = arguments.RECOVER_BUDGET,
    recover_rate: arguments.RecoverRateOpt = None,
    recover_tokens: arguments.RecoverTokensOpt = None,
    recover_temperature: arguments.RecoverTemperatureOpt = 1.0,
    recover_top_k: arguments.RecoverTopKOpt = None,
    recover_write: arguments.RecoverWriteOpt = True,
    recover_checkpointing: arguments.RecoverCheckpointingOpt = False,
    recover_optimizer: arguments.RecoverOptimizerOpt = _RECOVER.optimizer,
    recover_embeddings: arguments.RecoverEmbeddingsOpt = False,
    recover_processes: arguments.RecoverProcessesOpt = 1,
    recipe: arguments.RecipeOpt = None,
    calibration: arguments.RecoverCalibrationOpt = None,
    column: arguments.ColumnOpt = None,
    target_column: arguments.TargetColumnOpt = None,
    calibration_tokens: arguments.TokensOpt = _TEXT.calibration_tokens,
    images: arguments.ImagesOpt = _TEXT.images,
    recordings: arguments.RecordingsOpt = _TEXT.recordings,
    device: arguments.DeviceOpt = "auto",
    memory_limit: arguments.MemoryOpt = None,
    seed: arguments.SeedOpt = 0,
    as_json: arguments.JsonOpt = False,
) -> None:
    """Recover only: train the kept weights of a pruned model against the dense one."""
    from prox24_deploy.pipeline import run as pipeline

    options = BuildOptions(
        recipe=recipe,
        text=TextOptions(
            calibration=tuple(calibration or ()),
            column=column,
            target_column=target_column,
            calibration_tokens=calibration_tokens,
            images=images,
            recordings=recordings,
            seed=seed,
        ),
        recover=arguments.recover_options(
            budget=recover,
            rate=recover_rate,
            tokens=recover_tokens,
            temperature=recover_temperature,
            top_k=recover_top_k,
            write=recover_write,
            checkpointing=recover_checkpointing,
            optimizer=recover_optimizer,
            embeddings=recover_embeddings,
            processes=recover_processes,
        ),
        device=device,
        memory_limit_gib=memory_limit,
    )
    pruned, teacher = local_model(pruned), local_model(teacher)
    with shown(stderr) as progress:
        result = pipeline.recover(pruned, teacher, out, options, progress=progress)
    if as_json:
        print_json(asdict(result))
        return
    for line in tables.recovery_lines(result):
        say(line)
    say(f"The model is in {(out or pruned) / 'recovered'}.")


def export(
    bundle: arguments.BundleArg,
    *,
    dtype: arguments.DTypeOpt = None,
    quantize: arguments.AnewQuantizeOpt = None,
    as_json: arguments.JsonOpt = False,
) -> None:
    """Export dense and sparse ONNX twins of a pruned bundle and prove 2:4 on the file."""
    from prox24_deploy.pipeline import run as pipeline

    with shown(stderr, bundle) as progress:
        result = pipeline.export(bundle, dtype, quantize=quantize, progress=progress)
    if as_json:
        print_json(asdict(result))
        return
    say(tables.export_line(result, bundle))


def compile_engines(
    bundle: arguments.BundleArg,
    *,
    backend: arguments.BackendOpt = None,
    shapes: arguments.ShapesOpt = None,
    quantize: arguments.AnewQuantizeOpt = None,
    eager: arguments.EagerOpt = False,
    workspace_gib: arguments.WorkspaceOpt = None,
    builder_level: arguments.LevelOpt = None,
    compatibility: arguments.CompatibilityOpt = "none",
    refit: arguments.RefitOpt = False,
    strip_weights: arguments.StripOpt = False,
    timing_cache: arguments.TimingsOpt = None,
    compute_capability: arguments.CapabilityOpt = None,
    as_json: arguments.JsonOpt = False,
) -> None:
    """Compile engines from the ONNX twins of a bundle."""
    from prox24_deploy.pipeline import run as pipeline

    tensorrt = arguments.tensorrt_options(
        workspace_gib=workspace_gib,
        builder_level=builder_level,
        compatibility=compatibility,
        refit=refit,
        strip_weights=strip_weights,
        timing_cache=timing_cache,
        capabilities=compute_capability,
    )
    options = arguments.engine_options(
        backends=backend, shapes=shapes, tensorrt=tensorrt, eager=eager
    )
    with shown(stderr, bundle) as progress:
        result = pipeline.compile_engines(bundle, options, quantize=quantize, progress=progress)
    if as_json:
        print_json(asdict(result))
        return
    for engine in result.engines:
        say(f"{engine.twin}: {bundle / engine.path}")
    for evidence in result.evidence:
        say(f"{evidence.backend}: {evidence.summary}")


def bench(
    bundle: arguments.BundleArg,
    *,
    shapes: arguments.ShapesOpt = None,
    rounds: arguments.RoundsOpt = None,
    warmup: arguments.WarmupOpt = 3,
    seconds: arguments.SecondsOpt = None,
    as_json: arguments.JsonOpt = False,
) -> None:
    """Measure dense against sparse latency of a bundle's engines, interleaved."""
    from prox24_deploy.pipeline import run as pipeline

    timing = BenchOptions(rounds=rounds, warmup=warmup, seconds=seconds)
    engine = arguments.engine_options(backends=None, shapes=shapes)
    with shown(stderr, bundle) as progress:
        result = pipeline.bench(bundle, engine, timing=timing, progress=progress)
    if as_json:
        print_json(asdict(result))
        return
    print_table(tables.latency(result.latency))


def evaluate(
    bundle: arguments.BundleArg,
    *,
    evaluation: arguments.SameEvaluationOpt = None,
    column: arguments.ColumnOpt = None,
    target_column: arguments.TargetColumnOpt = None,
    evaluation_tokens: arguments.SameEvaluationTokensOpt = None,
    engine_tokens: arguments.SameEngineTokensOpt = None,
    device: arguments.DeviceOpt = "auto",
    model: arguments.MovedModelOpt = None,
    as_json: arguments.JsonOpt = False,
) -> None:
    """Measure the accuracy of a bundle against the dense model, in PyTorch and by its engines."""
    from prox24_deploy.pipeline import finish

    asked = finish.EvaluationAsked(
        evaluation=tuple(evaluation or ()),
        column=column,
        target_column=target_column,
        evaluation_tokens=evaluation_tokens,
        engine_tokens=engine_tokens,
        device=device,
        model=model and local_model(model),
    )
    with shown(stderr, bundle) as progress:
        evaluated, through = finish.evaluate(bundle, asked, progress=progress)
    if as_json:
        print_json({"evaluate": asdict(evaluated), "accuracy": asdict(through)})
        return
    for metric in evaluated.metrics:
        say(tables.metric_line(metric))
    for engine in through.engines:
        say(f"Through {engine.backend}: {tables.metric_line(engine.metrics[0])}")
    for missing in (*through.not_measured, *through.failed):
        say(f"Through {missing.backend}: not measured. {missing.reason}")


def report(
    bundle: arguments.BundleArg,
    *,
    baseline: arguments.BaselineOpt = None,
    limits: arguments.LimitsOpt = None,
    accept_loss: arguments.AcceptLossOpt = None,
    allow: arguments.AllowOpt = None,
    model: arguments.MovedModelOpt = None,
    as_json: arguments.JsonOpt = False,
) -> None:
    """Report what the single stages of a bundle found, with its verdict, and seal it."""
    from prox24_deploy.pipeline import finish

    options = BuildOptions(
        baseline=baseline,
        limits_file=limits,
        accept_loss=parse_losses(accept_loss or ()),
        allow=tuple(allow or ()),
    )
    made = finish.report(bundle, options, model and local_model(model))
    if as_json:
        print_json(made.model_dump(mode="json"))
    else:
        print_report(made, bundle)
    raise typer.Exit(exit_code(made))


def exit_code(report: "Report") -> int:
    """4 if a pruned weight is not proven to be 2:4, else that of the verdict."""
    if any(check.kind == "sparsity" and check.verdict == "fail" for check in report.checks):
        return EXIT_SPARSITY
    return VERDICT_EXIT[report.verdict]


def print_report(report: "Report", root: Path) -> None:
    """The page of a build: what changed and its verdict, accuracy, latency, where to look."""
    for line in tables.report_head(report):
        say(line)
    if report.latency:
        print_table(tables.latency(report.latency))
    for warning in report.warnings:
        say(f"Note: {warning}")
    say(f"Report: {root / 'report.html'}")
