"""The stage in which a language model writes the text that it is calibrated on."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from prox24_deploy.bundle.bundle import Bundle
from prox24_deploy.bundle.layout import WRITTEN, WRITTEN_TOKENS
from prox24_deploy.bundle.stage import Stage, Workspace
from prox24_deploy.config.options import BuildOptions
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.fingerprint import unkeyed
from prox24_deploy.core.recovery import WrittenText
from prox24_deploy.core.types import Progress
from prox24_deploy.pipeline.context import RunContext, torch_device
from prox24_deploy.pipeline.stages.versions import numeric_versions

if TYPE_CHECKING:
    from prox24_deploy.model.directory import ModelDir

log = logging.getLogger(__name__)

# One core takes 4 s for each million weights to write 65,536 tokens, so 7 minutes for these.
MOST_WEIGHTS_ON_CPU = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteInputs:
    """What the text depends on: `tokens` in windows of `length`."""

    source: "ModelDir"
    recipe: Recipe
    tokens: int
    length: int
    seed: int
    device: str
    versions: Mapping[str, str]
    memory_limit: int | None = field(
        default=None, metadata=unkeyed("says whether there is room, not what is written")
    )


def run(
    bundle: Bundle, context: RunContext, options: BuildOptions, progress: Progress
) -> RunContext:
    """The context with text of the model's own to calibrate on, where the user gave none.

    A model that does not write, or not enough, keeps the built-in text.
    """
    if options.text.calibration or not _can_write(context, options):
        if STAGE.name in bundle.manifest.stages:
            bundle.forget(STAGE.name)
        return context
    from prox24_deploy.data.text import MIN_TOKENS
    from prox24_deploy.data.written import read_written

    inputs = WriteInputs(
        source=context.source,
        recipe=context.recipe,
        tokens=options.text.calibration_tokens,
        length=_length(context),
        seed=options.text.seed,
        device=torch_device(options.device).type,
        versions=numeric_versions(),
        memory_limit=options.memory_limit,
    )
    found = bundle.run(STAGE, inputs, progress)
    if found.tokens < MIN_TOKENS:
        log.warning(
            "%s wrote %d usable tokens, expected %d at least, so that it is calibrated on the "
            "built-in text; pass text of your own with --calibration PATH.",
            context.source.path, found.tokens, MIN_TOKENS,
        )  # fmt: skip
        return context
    file = bundle.artifact(WRITTEN).path.parent / WRITTEN_TOKENS
    return replace(context, calibration=read_written(file, context.recipe, found))


def _length(context: RunContext) -> int:
    """Tokens of a window, as of any other text."""
    return int(context.calibration.batches[0].real.shape[1])


def _can_write(context: RunContext, options: BuildOptions) -> bool:
    """Whether it is a decoder that says how texts start and is not too large for this device."""
    if not context.recipe.kind.decoder_alone:
        return False
    from prox24_deploy.data.written import start_token
    from prox24_deploy.model.processors import load_tokenizer

    weights = sum(tensor.numel for tensor in context.source.tensors.values())
    if torch_device(options.device).type == "cpu" and weights > MOST_WEIGHTS_ON_CPU:
        log.warning(
            "A model of %d weights is not asked to write its calibration text on a CPU, where that "
            "is slow; the built-in text is taken. Pass text of your own with --calibration PATH.",
            weights,
        )
        return False
    return start_token(load_tokenizer(context.source), context.source.config) is not None


def _write(inputs: WriteInputs, work: Workspace, progress: Progress) -> WrittenText:
    import torch

    from prox24_deploy.data.written import write_calibration
    from prox24_deploy.model.mapped import Memory
    from prox24_deploy.model.processors import load_tokenizer

    source, recipe, device = inputs.source, inputs.recipe, torch.device(inputs.device)
    memory = Memory(folder=work.kept, limit=inputs.memory_limit, models=1)
    if device.type != "cpu" and not memory.suffices(source, recipe, device):
        # All blocks would be read again for each token.
        raise UsageError(
            f"Model {source.path} would write the text that it is calibrated on, for which it "
            "must fit into the memory of the GPU as a whole; pass text of your own with "
            "--calibration PATH."
        )
    return write_calibration(
        memory.load(source, recipe, device),
        load_tokenizer(inputs.source),
        inputs.tokens,
        length=inputs.length,
        seed=inputs.seed,
        kept=work.kept,
        out=work.partial / WRITTEN_TOKENS,
        progress=progress,
    )


STAGE = Stage(name="write", result=WrittenText, run=_write, outputs=(WRITTEN,))
