"""`plan`: time the GEMMs of a model, dense and sparse, and say which layers are worth pruning."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from prox24_deploy.config.options import BuildOptions
from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.records import Sensitivity
from prox24_deploy.core.shapes import Shape
from prox24_deploy.core.types import DType, Progress, Quantize
from prox24_deploy.engines import require_fixed_work
from prox24_deploy.engines.cusparselt.choice import LayerChoice, choose, gemm_obstacle
from prox24_deploy.engines.cusparselt.formats import gpu_obstacle
from prox24_deploy.engines.cusparselt.gemm import copy_rate, gpu_profile, measure_layers, uses_at
from prox24_deploy.engines.cusparselt.linear import LayerUse, layer_uses
from prox24_deploy.engines.cusparselt.merge import (
    Groups,
    by_member,
    members,
    merged_uses,
    shared_layers,
)
from prox24_deploy.engines.cusparselt.planning import Plan, plan_layers, plan_shapes
from prox24_deploy.engines.cusparselt.prepare import prepare
from prox24_deploy.engines.cusparselt.profile import (
    GemmFormat,
    GemmTiming,
    GpuProfile,
    half_format,
)
from prox24_deploy.engines.cusparselt.timings import remember
from prox24_deploy.engines.cusparselt.torch_model import (
    TorchModel,
    median_ms,
    open_torch_model,
    require_gpu,
)
from prox24_deploy.engines.cusparselt.ways import EIGHT_BITS
from prox24_deploy.engines.feeds import random_feeds
from prox24_deploy.graph.export.module import RecipeModule
from prox24_deploy.model.blocks import find_blocks, target_layers
from prox24_deploy.model.checkpoint import stored_dtype
from prox24_deploy.model.dtypes import settled_dtype
from prox24_deploy.model.layers import obstacle
from prox24_deploy.model.mapped import Memory
from prox24_deploy.pipeline.context import (
    RunContext,
    fitted_shapes,
    read_context,
    torch_device,
    vocabulary_of,
    warn_of_lengths,
)
from prox24_deploy.pruning.selection import left_dense
from prox24_deploy.pruning.sensitivity import measure_sensitivity, over_budget

Shapes = Sequence[Shape]

# A run on this many samples and tokens tells which layers see a row per token.
_PROBE = Shape(batch=2, sequence=3)
_SECONDS_PER_SHAPE = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timed:
    """What is known of the times of a model: of its layers at every shape, and of the whole.

    `uses` and `targets` have products where an engine computes several layers as one; `outputs` has
    the number of outputs of every layer.
    """

    uses: Sequence[LayerUse]
    targets: set[str]
    outputs: Mapping[str, int]
    profile: GpuProfile
    dense_ms: list[float | None]


def plan(
    model_dir: Path,
    options: BuildOptions,
    *,
    saved: GpuProfile | None,
    sensitivity: bool,
    progress: Progress,
    quantize: Quantize = "none",
) -> Plan:
    """Decide which layers to prune for the GPU at hand, or for that of a saved profile.

    Args:
        model_dir: the dense model.
        options: shapes, dtype and budget; the text for the sensitivity.
        saved: timings of another GPU; None measures the one at hand.
        sensitivity: whether to measure what each paying layer costs.
        progress: called with (label, done, total).
        quantize: the 8-bit format that layers may use besides the dtype.

    Raises:
        BackendMissingError: there is no GPU and no saved profile.
        Prox24Error: what `build` raises for the same model and options.
    """
    context = read_context(model_dir, None, options, progress)
    require_fixed_work(context.recipe, "plan")
    shapes = _shapes(context, options)
    dtype = _planned_dtype(context, options, saved)
    if saved is None:
        timed = _measured(context, options, shapes, dtype, quantize, progress)
    else:
        timed = _estimated(context, options, shapes, saved, half_format(dtype), quantize)
    choices = _choices(timed, dtype)
    layers = plan_layers(choices, {}, {}, _eight_bit(timed), quantize)
    found = None
    if sensitivity and (paying := {layer.choice.name for layer in layers if layer.prune}):
        found = _sensitivity(context, options, choices, paying, progress)
        losses = {layer.name: layer.loss for layer in found.layers}
        layers = plan_layers(choices, losses, over_budget(found), _eight_bit(timed), quantize)
    context.source.require_unchanged()
    return Plan(
        model_sha256=context.source.sha256,
        dtype=dtype,
        quantize=quantize,
        source="measured" if saved is None else "profile",
        metric=found.metric if found else "",
        shapes=plan_shapes(shapes, layers, timed.dense_ms, quantize),
        layers=layers,
        profile=timed.profile,
    )


def _shapes(context: RunContext, options: BuildOptions) -> Shapes:
    """What is timed, with lengths that the model accepts."""
    recipe = context.recipe
    warn_of_lengths(options.engine, context.model)
    fitted = fitted_shapes(options.engine, context.source.config, recipe)
    return fitted.shapes(images=not recipe.modality.has_length, cached=recipe.cache)


def _choices(timed: _Timed, dtype: DType) -> tuple[LayerChoice, ...]:
    """What 2:4 would gain in 16 bit, for each layer that the recipe prunes."""
    choices = choose(timed.uses, timed.profile, timed.targets, half_format(dtype))
    return tuple(
        replace(choice, name=name, n=timed.outputs[name], timings=timings)
        for choice in choices
        if choice.name in timed.targets
        for name, timings in by_member(choice.name, choice.timings, timed.outputs).items()
    )


def _measured(
    context: RunContext,
    options: BuildOptions,
    shapes: Shapes,
    dtype: DType,
    quantize: Quantize,
    progress: Progress,
) -> _Timed:
    """Time the dense model and each of its GEMMs on the GPU at hand."""
    require_gpu("plan", "--gpu-profile FILE, measured elsewhere")
    if quantize != "none" and (why := gpu_obstacle(quantize, torch.cuda.get_device_capability())):
        raise UsageError(f"plan --quantize {quantize} cannot be timed here: {why}; leave it out.")
    opened = open_torch_model(context.source, context.recipe, dtype)
    single = uses_at(opened, shapes)
    groups = opened.groups(shapes[0])
    uses, targets = _products(single, groups, _targets(opened.wrapped, context))
    profile = gpu_profile()
    if quantize != "none":
        profile = replace(profile, copy_rate=copy_rate())
    formats: list[GemmFormat] = [half_format(dtype)]
    formats += [] if quantize == "none" else [quantize]
    for format in formats:
        profile = measure_layers(profile, uses, targets, format, progress)
    remember(profile)
    dense_ms = _dense_ms(context, opened.merge(groups), shapes, eager=options.engine.eager)
    outputs = {use.name: use.n for use in single}
    return _Timed(uses=uses, targets=targets, outputs=outputs, profile=profile, dense_ms=dense_ms)


def _products(
    uses: Sequence[LayerUse], groups: Groups, targets: set[str]
) -> tuple[list[LayerUse], set[str]]:
    """The GEMMs with layers merged that are all targets or none, and those of targets."""
    halves = [[n for n in g if (n in targets) is own] for g in groups for own in (True, False)]
    merged = merged_uses(uses, tuple(tuple(half) for half in halves if len(half) > 1))
    return merged, {use.name for use in merged if targets.issuperset(members(use.name))}


def _dense_ms(
    context: RunContext, opened: TorchModel, shapes: Shapes, *, eager: bool
) -> list[float | None]:
    """Time of the whole dense model at every shape."""
    times: list[float | None] = []
    with prepare(opened, shapes, (), eager=eager) as ready:
        session = opened.session(f"the model in {context.source.path}", ready.compiled)
        for shape in shapes:
            sets = [opened.feeds(shape, seed) for seed in range(4)]
            times.append(median_ms(session, sets, _SECONDS_PER_SHAPE))
        session.close()
    return times


def _eight_bit(timed: _Timed) -> Mapping[str, Mapping[GemmFormat, tuple[GemmTiming, ...]]]:
    """By layer and 8-bit format the times at every shape, of the formats in the profile."""
    formats = [format for format in EIGHT_BITS if format in timed.profile.formats]
    found: dict[str, dict[GemmFormat, tuple[GemmTiming, ...]]] = {}
    for use in timed.uses:
        for format in formats if use.name in timed.targets else ():
            if gemm_obstacle(use, format):
                continue
            known = (timed.profile.timing(gemm, format) for gemm in use.gemms)
            whole = [timed.profile.with_rounding(timing) for timing in known]
            for name, timings in by_member(use.name, whole, timed.outputs).items():
                found.setdefault(name, {})[format] = timings
    return found


def _planned_dtype(context: RunContext, options: BuildOptions, saved: GpuProfile | None) -> DType:
    """The dtype to plan for; one that was not asked for gives way to what a saved profile has."""
    own = _timed_dtype(context, options)
    if saved is None or options.dtype is not None or own in saved.formats:
        return own
    held: tuple[DType, ...] = ("float16", "bfloat16")
    return next((dtype for dtype in held if dtype in saved.formats), own)


def _timed_dtype(context: RunContext, options: BuildOptions) -> DType:
    """The dtype asked for, else the checkpoint's own if there are sparse kernels for it."""
    own = settled_dtype(context.source, context.recipe, options.dtype)
    return "float16" if options.dtype is None and own == "float32" else own


def _estimated(
    context: RunContext,
    options: BuildOptions,
    shapes: Shapes,
    saved: GpuProfile,
    half: GemmFormat,
    quantize: Quantize,
) -> _Timed:
    """Look the GEMMs up in a saved profile; the model runs once, small, on the CPU."""
    if wanting := [f for f in (half, quantize) if f not in (*saved.formats, "none")]:
        raise UsageError(
            f"The profile of {saved.gpu} holds no times in {wanting[0]}, only in "
            f"{', '.join(saved.formats) or 'no format at all'}; plan for one of them, or for "
            "another profile."
        )
    with TemporaryDirectory() as folder:
        memory = Memory(folder=Path(folder), limit=options.memory_limit, models=1)
        model = memory.load(context.source, context.recipe, torch.device("cpu"))
        probe = _probe(model, context)
        probed = [_scaled(use, context, shapes) for use in layer_uses(model, [probe])]
        single = [use for use in probed if use]
        groups = shared_layers(model, probe)
        uses, targets = _products(single, groups, _targets(model, context))
    return _Timed(
        uses=uses,
        targets=targets,
        outputs={use.name: use.n for use in single},
        profile=saved,
        dense_ms=[None] * len(shapes),
    )


def _sensitivity(
    context: RunContext,
    options: BuildOptions,
    choices: Sequence[LayerChoice],
    paying: set[str],
    progress: Progress,
) -> Sensitivity:
    """What each layer that pays costs when it alone is pruned, and what a budget makes of it."""
    source, recipe, device = context.source, context.recipe, torch_device(options.device)
    batches = context.calibration.batches
    with TemporaryDirectory() as folder:
        memory = Memory(folder=Path(folder), limit=options.memory_limit, models=1, samples=batches)
        fits = memory.suffices(source, recipe, device)
        if device.type != "cpu" and not fits:
            raise UsageError(
                f"Model {source.path} must fit into the memory of the GPU as a whole for its "
                "sensitivity to be measured there; pass --device cpu, where it may lie in files, "
                "or --no-sensitivity."
            )
        keep = None if fits else memory.keep(source, recipe)
        model = memory.load(source, recipe, device, changes=True)
        dense = left_dense(recipe, model, options.prune)
        return measure_sensitivity(
            model,
            recipe,
            batches,
            options.prune,
            dense={**{c.name: c.reason for c in choices if c.name not in paying}, **dense},
            stored_dtype=lambda name: stored_dtype(source, name),
            progress=progress,
            keep_weight=keep,
        )


def _targets(model: nn.Module, context: RunContext) -> set[str]:
    """Full paths of the layers that the recipe prunes."""
    blocks = enumerate(find_blocks(model, context.recipe))
    return {
        f"{context.recipe.blocks}.{index}.{name}"
        for index, block in blocks
        for name, layer in target_layers(block, context.recipe).items()
        if not obstacle(layer)
    }


def _probe(model: nn.Module, context: RunContext) -> Callable[[], object]:
    """A run of the model on a few tokens, or on two images."""
    module = RecipeModule(model, context.recipe)
    vocabulary = vocabulary_of(context.source.config)
    # The signature of a decoder comes from a run of its own.
    inputs = module.signature.inputs
    feeds = random_feeds(inputs, "float32", vocabulary)(_PROBE, 0)
    return partial(module, *(torch.from_numpy(feeds[spec.name]) for spec in inputs))


def _scaled(use: LayerUse, context: RunContext, shapes: Shapes) -> LayerUse | None:
    """The GEMMs at the shapes asked for, from that of the probe; None if its rows tell nothing."""
    if not use.gemms:
        return use
    batch, tokens = _PROBE.batch, _PROBE.sequence
    rows = use.gemms[0].m
    if not context.recipe.modality.has_length and rows % batch == 0:
        counts = [rows // batch * shape.batch for shape in shapes]
    elif rows == batch * tokens:
        counts = [shape.batch * shape.sequence for shape in shapes]
    elif rows == batch:
        counts = [shape.batch for shape in shapes]
    else:
        return None
    return replace(use, gemms=tuple(replace(use.gemms[0], m=count) for count in counts))
