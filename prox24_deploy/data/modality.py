"""How samples of each modality are read and made, and what their model fixes of a graph's sizes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from prox24_deploy.config.options import TextOptions
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.modalities import (
    IMAGES,
    PAIRS,
    RECORDINGS,
    TEXT,
    ModalityKind,
)
from prox24_deploy.core.types import Progress
from prox24_deploy.data.fields import Fields, chat_of
from prox24_deploy.data.images import make_image_samples, pillow, pixel_sizes, read_images
from prox24_deploy.data.pairs import make_pairs, start_token
from prox24_deploy.data.recordings import read_recordings
from prox24_deploy.data.speech import Listener, feature_sizes, make_speech_samples
from prox24_deploy.data.text import Reading, characters_for, make_samples, read_texts
from prox24_deploy.model.batch import Samples, shared_samples
from prox24_deploy.model.config_file import labels_of, longest_of, read_config
from prox24_deploy.model.directory import ModelDir, load_model
from prox24_deploy.model.processors import (
    load_feature_extractor,
    load_image_processor,
    load_tokenizer,
)
from prox24_deploy.model.sentence import settled
from prox24_deploy.model.vocabulary import require_embedded, require_special_tokens

_Made = tuple[Samples, Samples]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Samples that are asked for.

    Attributes:
        directory: the model that they are for.
        recipe: what fits it.
        options: where samples lie and how many to use.
        device: where the dense model runs, if it must write targets of its own.
        progress: told of that.
    """

    directory: ModelDir
    recipe: Recipe
    options: TextOptions
    device: Callable[[], torch.device]
    progress: Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Modality:
    """A row of the table.

    Attributes:
        kind: what every room may know of it.
        sizes: from a model directory to the axes of graph inputs that it fixes, by name.
        read: from what is asked for to samples to calibrate on and samples held out.
    """

    kind: ModalityKind
    sizes: Callable[[Path], Mapping[str, int]]
    read: Callable[[Wanted], _Made]


def fitted_sizes(recipe: Recipe, model_dir: Path) -> Recipe:
    """The recipe with the axes made static that the model directory fixes.

    Raises:
        ModelDirError: the directory does not say.
    """
    return recipe.with_sizes(MODALITIES[recipe.modality.name].sizes(model_dir))


def read_samples(wanted: Wanted) -> _Made:
    """Samples to calibrate on and samples held out, as the model reads them.

    Raises:
        CalibrationError: there are too few, or they cannot be read.
        ModelDirError: what the model has beside it cannot make samples of them.
    """
    calibration, held_out = MODALITIES[wanted.recipe.modality.name].read(wanted)
    shared = shared_samples(calibration, held_out)
    return calibration, replace(held_out, source=replace(held_out.source, shared=shared))


def _no_sizes(_: Path) -> Mapping[str, int]:
    return {}


def _image_sizes(model_dir: Path) -> Mapping[str, int]:
    # Transformers, too, opens no image processor without it, and blames the model.
    pillow()
    return pixel_sizes(load_image_processor(model_dir))


def _recording_sizes(model_dir: Path) -> Mapping[str, int]:
    return feature_sizes(read_config(model_dir))


def _read_text(wanted: Wanted) -> _Made:
    directory, recipe, options = wanted.directory, wanted.recipe, wanted.options
    tokenizer = load_tokenizer(directory)
    require_special_tokens(directory, tokenizer)
    budgets = (options.calibration_tokens, options.evaluation_tokens)
    fields = Fields(text=options.column, target=options.target_column, chat=chat_of(tokenizer))
    reading = Reading(fields=fields, most=characters_for(sum(budgets)))
    texts = read_texts(options.calibration, options.evaluation, options.seed, reading)
    longest = min(recipe.sequence_length, longest_of(directory.config, recipe.sequence_length))
    if (pipeline := settled(directory.path, recipe)) is not None:
        longest = min(longest, int(tokenizer.model_max_length))
        texts = (texts[0].behind(pipeline.prompt), texts[1].behind(pipeline.prompt))
    if recipe.decoder is None:
        make = partial(make_samples, tokenizer=tokenizer, recipe=recipe, max_length=longest)
    else:
        start = start_token(directory)
        make = partial(
            make_pairs, tokenizer=tokenizer, recipe=recipe, max_length=longest, start=start
        )
    calibration, held_out = (
        make(part, tokens=tokens) for part, tokens in zip(texts, budgets, strict=True)
    )
    require_embedded(directory, tokenizer, (*calibration.batches, *held_out.batches))
    return calibration, held_out


def _read_images(wanted: Wanted) -> _Made:
    options = wanted.options
    if options.column or options.target_column:
        raise UsageError("--column and --target-column have no effect on images; leave them out.")
    images = read_images(options.calibration, options.evaluation, options.seed)
    processor = load_image_processor(wanted.directory.path)
    labels = labels_of(wanted.directory.config)
    calibration, held_out = (
        make_image_samples(part, processor, labels, limit=options.images) for part in images
    )
    return calibration, held_out


def _read_recordings(wanted: Wanted) -> _Made:
    directory, options = wanted.directory, wanted.options
    recordings = read_recordings(
        options.calibration, options.evaluation, options.seed, options.column
    )
    extractor, tokenizer = load_feature_extractor(directory.path), load_tokenizer(directory)
    require_special_tokens(directory, tokenizer)
    model = load_model(directory, wanted.recipe, wanted.device())
    listener = Listener(directory=directory, model=model, extractor=extractor, tokenizer=tokenizer)
    calibration, held_out = (
        make_speech_samples(part, listener, limit=options.recordings, progress=wanted.progress)
        for part in recordings
    )
    require_embedded(directory, tokenizer, (*calibration.batches, *held_out.batches))
    return calibration, held_out


MODALITIES: dict[str, Modality] = {
    row.kind.name: row
    for row in (
        Modality(kind=TEXT, sizes=_no_sizes, read=_read_text),
        Modality(kind=PAIRS, sizes=_no_sizes, read=_read_text),
        Modality(kind=IMAGES, sizes=_image_sizes, read=_read_images),
        Modality(kind=RECORDINGS, sizes=_recording_sizes, read=_read_recordings),
    )
}
