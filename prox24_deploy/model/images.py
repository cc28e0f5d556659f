"""Calibration and evaluation images: find them in folders, label them, turn them into batches."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from prox24_deploy.artifacts import TextSource
from prox24_deploy.errors import CalibrationError
from prox24_deploy.model.calibration import Batch, Samples
from prox24_deploy.model.held_out import Files, Search, hold_out

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
MIN_IMAGES = 16
_BATCH_IMAGES = 16


# Image files, each with the name of the folder it lies in, relative to the user's; "" at its top.
Images = Files[tuple[Path, str]]


def read_images(
    calibration: Sequence[Path], evaluation: Sequence[Path], seed: int
) -> tuple[Images, Images]:
    """Return calibration and held-out images, each in seeded order so that labels are mixed.

    Without `evaluation` a fifth of the calibration images is held out.

    Raises:
        CalibrationError: no folder is given, a folder is missing, or it holds too few images.
    """
    if not calibration:
        raise CalibrationError(
            "Image models have no built-in calibration data; pass --calibration FOLDER with "
            f"at least {MIN_IMAGES} images of the model's own domain, in sub-folders named by "
            "label if accuracy is to be measured."
        )
    search = Search(_images_in, MIN_IMAGES, "images", sorted(SUFFIXES))
    return hold_out(calibration, evaluation, seed, search)


def make_image_samples(
    images: Images, processor: Any, labels: Mapping[str, int], *, limit: int
) -> Samples:
    """Read at most `limit` images and prepare them as the model's own processor does.

    Args:
        images: what to read.
        processor: the model's, from images to `pixel_values`.
        labels: class of the model by label; used if the folders are named by labels.
        limit: how many images to use.

    Raises:
        CalibrationError: an image cannot be read, or only some folders are named by labels.
    """
    files = images.files[:limit]
    batches = tuple(_batches(files, processor))
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch.inputs["pixel_values"].numpy().tobytes())
    classes = _classes(files, labels)
    if classes is not None:
        digest.update(classes.numpy().tobytes())
    source = TextSource(
        images.kind, images.paths, digest.hexdigest(), len(files), len(files), unit="image"
    )
    return Samples(batches, source, classes)


def pixel_sizes(processor: Any) -> dict[str, int]:
    """Channels, height and width of what the processor makes of an image."""
    pixels = processor(images=[Image.new("RGB", (96, 64))], return_tensors="pt")["pixel_values"]
    return dict(zip(("channels", "height", "width"), pixels.shape[1:], strict=True))


def _images_in(folder: Path) -> list[tuple[Path, str]]:
    if not folder.is_dir():
        raise CalibrationError(f"Images {folder} is not a folder; pass a folder of images.")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return [(path, path.parent.relative_to(folder).as_posix().strip(".")) for path in files]


def _batches(files: Sequence[tuple[Path, str]], processor: Any) -> Iterator[Batch]:
    for start in range(0, len(files), _BATCH_IMAGES):
        group = [_read(path) for path, _ in files[start : start + _BATCH_IMAGES]]
        pixels: Tensor = processor(images=group, return_tensors="pt")["pixel_values"]
        yield Batch({"pixel_values": pixels}, torch.ones(len(group), dtype=torch.bool))


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise CalibrationError(
            f"Image {path} cannot be read ({error}); remove it or write it again."
        ) from error


def _classes(files: Sequence[tuple[Path, str]], labels: Mapping[str, int]) -> Tensor | None:
    """Class of each image where all folders are labels, None where none is."""
    known = [labels.get(folder) for _, folder in files]
    if all(label is None for label in known):
        return None
    for (path, folder), label in zip(files, known, strict=True):
        if label is None:
            raise CalibrationError(
                f"Folder {folder or '.'!r} of image {path} is no label of the model, but other "
                f"folders are; name all by labels such as {next(iter(labels))!r}, or none."
            )
    return torch.tensor([label for label in known if label is not None])
