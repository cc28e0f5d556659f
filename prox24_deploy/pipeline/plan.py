"""`plan`: time the GEMMs of a model, dense and sparse, and say which layers are worth pruning."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from prox24_deploy.config.options import BuildOptions
from prox24_deploy.core.records import Sensitivity
from prox24_deploy.core.shapes import Shape
from prox24_deploy.core.types import DType, Progress
from prox24_deploy.engines import require_one_graph
from prox24_deploy.engines.cusparselt.choice import LayerChoice, choose
from prox24_deploy.engines.cusparselt.gemm import choose_measured, gpu_profile
from prox24_deploy.engines.cusparselt.linear import LayerUse, layer_uses
from prox24_deploy.engines.cusparselt.planning import Plan, plan_layers, plan_shapes
from prox24_deploy.engines.cusparselt.prepare import prepare
from prox24_deploy.engines.cusparselt.profile import GpuProfile
from prox24_deploy.engines.cusparselt.timings import remember
from prox24_deploy.engines.cusparselt.torch_model import median_ms, open_torch_model, require_gpu
from prox24_deploy.engines.feeds import random_feeds
from prox24_deploy.graph.export.module import RecipeModule
from prox24_deploy.model.blocks import find_blocks, target_layers
from prox24_deploy.model.checkpoint import stored_dtype
from prox24_deploy.model.directory import load_model
from prox24_deploy.model.dtypes import settled_dtype
from prox24_deploy.model.layers import obstacle
from prox24_deploy.pipeline.context import (
    RunContext,
    fitted_shapes,
    read_context,
    torch_device,
    vocabulary_of,
)
from prox24_deploy.pruning.selection import left_dense
from prox24_deploy.pruning.sensitivity import measure_sensitivity, over_budget

Shapes = Sequence[Shape]

# A run on this many samples and tokens tells which layers see a row per token.
_PROBE = Shape(batch=2, sequence=3)
_SECONDS_PER_SHAPE = 2.0


def plan(
    model_dir: Path,
    options: BuildOptions,
    *,
    saved: GpuProfile | None,
    sensitivity: bool,
    progress: Progress,
) -> Plan:
    """Decide which layers to prune for the GPU at hand, or for that of a saved profile.

    Args:
        model_dir: the dense model.
        options: shapes, dtype and budget; the text for the sensitivity.
        saved: timings of another GPU; None measures the one at hand.
        sensitivity: whether to measure what each paying layer costs.
        progress: called with (label, done, total).

    Raises:
        BackendMissingError: there is no GPU and no saved profile.
        Prox24Error: what `build` raises for the same model and options.
    """
    context = read_context(model_dir, None, options, progress)
    require_one_graph(context.recipe, "plan")
    fitted = fitted_shapes(options.engine, context.source.config, context.recipe)
    recipe = context.recipe
    shapes = fitted.shapes(images=not recipe.modality.has_length, cached=recipe.cache)
    if saved is None:
        choices, profile, dense_ms = _measured(context, options, shapes, progress)
    else:
        choices, profile = _estimated(context, shapes, saved), saved
        dense_ms = [None] * len(shapes)
    found = None
    if sensitivity and any(choice.chosen for choice in choices):
        found = _sensitivity(context, options, choices, progress)
    context.source.require_unchanged()
    losses = {layer.name: layer.loss for layer in found.layers} if found else {}
    layers = plan_layers(choices, losses, over_budget(found) if found else {})
    return Plan(
        model_sha256=context.source.sha256,
        source="measured" if saved is None else "profile",
        metric=found.metric if found else "",
        shapes=plan_shapes(shapes, layers, dense_ms),
        layers=layers,
        profile=profile,
    )


def _measured(
    context: RunContext, options: BuildOptions, shapes: Shapes, progress: Progress
) -> tuple[tuple[LayerChoice, ...], GpuProfile, list[float | None]]:
    """Time the dense model and each of its GEMMs on the GPU at hand."""
    require_gpu("plan", "--gpu-profile FILE, measured elsewhere")
    dtype = _timed_dtype(context, options)
    opened = open_torch_model(context.source, context.recipe, dtype)
    targets = _targets(opened.wrapped, context)
    known = gpu_profile(dtype)
    choices, profile = choose_measured(opened, shapes, targets, known, progress)
    remember(profile)
    dense_ms: list[float | None] = []
    with prepare(opened, shapes, (), eager=options.engine.eager) as ready:
        session = opened.session(f"the model in {context.source.path}", ready.compiled)
        for shape in shapes:
            sets = [opened.feeds(shape, seed) for seed in range(4)]
            dense_ms.append(median_ms(session, sets, _SECONDS_PER_SHAPE))
        session.close()
    return tuple(c for c in choices if c.name in targets), profile, dense_ms


def _timed_dtype(context: RunContext, options: BuildOptions) -> DType:
    """The dtype asked for, else the checkpoint's own if there are sparse kernels for it."""
    own = settled_dtype(context.source, context.recipe, options.dtype)
    return "float16" if options.dtype is None and own == "float32" else own


def _estimated(context: RunContext, shapes: Shapes, saved: GpuProfile) -> tuple[LayerChoice, ...]:
    """Look the GEMMs up in a saved profile; the model runs once, small, on the CPU."""
    model = load_model(context.source, context.recipe, torch.device("cpu"))
    targets = _targets(model, context)
    uses = [_scaled(use, context, shapes) for use in layer_uses(model, [_probe(model, context)])]
    return choose([use for use in uses if use and use.name in targets], saved, targets)


def _sensitivity(
    context: RunContext,
    options: BuildOptions,
    choices: Sequence[LayerChoice],
    progress: Progress,
) -> Sensitivity:
    """What each layer that pays costs when it alone is pruned, and what a budget makes of it."""
    model = load_model(context.source, context.recipe, torch_device(options.device))
    dense = left_dense(context.recipe, model, options.prune)
    return measure_sensitivity(
        model,
        context.recipe,
        context.calibration.batches,
        options.prune,
        dense={**{c.name: c.reason for c in choices if not c.chosen}, **dense},
        stored_dtype=lambda name: stored_dtype(context.source, name),
        progress=progress,
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
