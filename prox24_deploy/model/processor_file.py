"""Sizes in the configuration of a processor of images or recordings, before they take memory."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prox24_deploy.core.documents import Document, read_object
from prox24_deploy.core.errors import ModelDirError

# Where processors are described; the first is of the processor of a model with several.
FILES = ("processor_config.json", "preprocessor_config.json")
# Least and most of what a processor allocates by, beyond every published model that has a spectrum
# of each moment. With one feature, transformers pads a recording along both of its axes.
_RANGES = {
    "feature_size": (2, 1024),
    "sampling_rate": (1, 192_000),
    "chunk_length": (1, 60),
    "hop_length": (1, 65_536),
    "n_fft": (1, 65_536),
}
_PIXELS = (1, 2048)


def require_usable_sizes(path: Path) -> None:
    """Refuse sizes of a processor that no model has.

    Args:
        path: the model directory.

    Raises:
        ModelDirError: names the file, the key and the value.
    """
    for file in (path / name for name in FILES):
        if not file.is_file():
            continue
        document = Document(str(file), ModelDirError, "restore it")
        described = read_object(file, document, finite=False)
        for key, value, (least, most) in _bounded(described):
            if not least <= value <= most:
                raise document.refused(f"asks for {key} {value}, expected {least} to {most}")


def _bounded(
    described: Mapping[str, Any], *, pixels: bool = False
) -> Iterator[tuple[str, float, tuple[int, int]]]:
    """Each number that has a range, those within sizes of images under their own keys."""
    for key, value in described.items():
        size = pixels or (key.endswith("size") and key not in _RANGES)
        if isinstance(value, dict):
            yield from _bounded(value, pixels=size)
        bounds = _PIXELS if size else _RANGES.get(key)
        for item in value if isinstance(value, list) else [value]:
            # A switch is a number too, and beside the sizes of images there may be one.
            if bounds and isinstance(item, int | float) and not (size and isinstance(item, bool)):
                yield key, item, bounds
