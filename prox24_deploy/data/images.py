"""Calibration and evaluation images: find them in folders, label them, turn them into batches."""

import hashlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from prox24_deploy.core.documents import open_regular, reason_of
from prox24_deploy.core.errors import BackendMissingError, CalibrationError, ModelDirError
from prox24_deploy.core.extras import install_of
from prox24_deploy.core.foreign import blamed
from prox24_deploy.core.modalities import IMAGES
from prox24_deploy.core.records import TextSource
from prox24_deploy.data.split import Files, Search, hold_out, readable_files
from prox24_deploy.model.batch import Batch, Samples

if TYPE_CHECKING:
    from PIL.Image import Image


SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
MIN_IMAGES = 16
_BATCH_IMAGES = 16
# A photograph of the largest cameras; decoded, it takes four bytes a pixel, twice.
MOST_PIXELS = 2**26
# Of as many pixels of four channels, each of two bytes.
_MOST_BYTES = 8 * MOST_PIXELS
# What is scaled by its shorter side grows by this.
MOST_ASPECT = 20
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")


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
        digest.update(batch.inputs[IMAGES.input].numpy().tobytes())
    classes = _classes(files, labels)
    if classes is not None:
        digest.update(classes.numpy().tobytes())
    source = TextSource(
        kind=images.kind,
        paths=images.paths,
        sha256=digest.hexdigest(),
        samples=len(files),
        tokens=len(files),
        unit=IMAGES.unit,
    )
    return Samples(batches=batches, source=source, labels=classes)


def pixel_sizes(processor: Any) -> dict[str, int]:
    """Channels, height and width of what the processor makes of an image.

    Raises:
        ModelDirError: it makes nothing of one.
    """
    pixels = _prepared(pillow().new("RGB", (96, 64)), processor)
    return dict(zip(("channels", "height", "width"), pixels.shape, strict=True))


def _images_in(folder: Path) -> list[tuple[Path, str]]:
    if not folder.is_dir():
        raise CalibrationError(f"Images {folder} is not a folder; pass a folder of images.")
    files = [path for path in readable_files(folder) if path.suffix.lower() in SUFFIXES]
    return [(path, path.parent.relative_to(folder).as_posix().strip(".")) for path in files]


def _batches(files: Sequence[tuple[Path, str]], processor: Any) -> Iterator[Batch]:
    shape: torch.Size | None = None
    for start in range(0, len(files), _BATCH_IMAGES):
        # One at a time, for a photograph takes a thousand times the memory of its pixels here.
        group = [_pixels(path, processor) for path, _ in files[start : start + _BATCH_IMAGES]]
        shape = shape or group[0].shape
        for (path, _), pixels in zip(files[start:], group, strict=False):
            if pixels.shape != shape:
                raise ModelDirError(
                    f"The image processor makes {tuple(pixels.shape)} of {path} and "
                    f"{tuple(shape)} of {files[0][0]}, expected one size of all; set it in "
                    "preprocessor_config.json."
                )
        real = torch.ones(len(group), dtype=torch.bool)
        yield Batch({IMAGES.input: torch.stack(group)}, real)


def _pixels(path: Path, processor: Any) -> Tensor:
    return _prepared(_read(path), processor)


def _prepared(image: "Image", processor: Any) -> Tensor:
    """What the model reads of one image, (channels, height, width)."""
    kind = f"The {type(processor).__name__} that preprocessor_config.json describes"

    def refused(reason: str) -> ModelDirError:
        return ModelDirError(f"{kind} cannot prepare an image ({reason}); restore it.")

    with blamed(refused):
        made: Tensor = processor(images=[image], return_tensors="pt")[IMAGES.input]
        pixels = made[0]
        sound = pixels.ndim == 3 and bool(pixels.isfinite().all())
    if not sound:
        raise ModelDirError(
            f"{kind} makes values of shape {tuple(pixels.shape)}, some of them NaN or infinite, or "
            "not of three axes; restore it."
        )
    return pixels


def pillow() -> Any:
    """The module of Pillow that opens images.

    Raises:
        BackendMissingError: it is not installed.
    """
    try:
        # An extra, which models of text and speech do without.
        import PIL.Image
    except ImportError as error:
        raise BackendMissingError(
            f"Models of images need Pillow, which cannot be imported ({error}); install it with: "
            f"{install_of('images')}"
        ) from error
    return PIL.Image


def _read(path: Path) -> "Image":
    """One image of a named format: others start programs, as Ghostscript for PostScript."""
    images = pillow()
    try:
        with open_regular(path) as file, warnings.catch_warnings():
            # The bound here is lower.
            warnings.simplefilter("ignore", images.DecompressionBombWarning)
            with images.open(_held(file), formats=_FORMATS) as image:
                _require_size(*image.size)
                found: Image = image.convert("RGB")
                return found
    except MemoryError:
        raise
    except Exception as error:
        # What Pillow raises on damaged files has no common base.
        raise CalibrationError(
            f"Image {path} cannot be read ({reason_of(error)}); remove it or write it again."
        ) from error


def _held(file: BinaryIO) -> io.BytesIO:
    """All of a file: what is held gives no more than there is, whatever length a part claims."""
    size = os.fstat(file.fileno()).st_size
    if size > _MOST_BYTES:
        raise ValueError(f"it has {size:,} bytes, more than the {_MOST_BYTES:,} that are read")
    return io.BytesIO(file.read())


def _require_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"it has {width} × {height} pixels, more than the {MOST_PIXELS:,} that are read"
        )
    if max(width, height) > MOST_ASPECT * min(width, height):
        raise ValueError(
            f"it has {width} × {height} pixels, more than {MOST_ASPECT} times as long as wide"
        )


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
