"""Models named as on the Hugging Face Hub, by an id or an address; none is fetched."""

import re
from pathlib import Path

from prox24_deploy.cli.terminal import tell
from prox24_deploy.core.errors import UsageError

__all__ = ["is_address", "is_hub_id", "local_model", "without_address"]

# A name, behind its owner or alone as of the oldest models.
_ID = r"\w[\w.-]{0,95}(?:/\w[\w.-]{0,95})?"
# What says that a name is that of a file.
_FILES = (".onnx", ".safetensors", ".json", ".toml")
# A path has one slash where the address had two.
_ADDRESS = re.compile(r"(https?):/+(.+)")
_MODEL_ADDRESS = re.compile(rf"(?:www\.)?(?:huggingface\.co|hf\.co)/({_ID})(?:/tree/main)?")


def is_hub_id(name: str) -> bool:
    """Whether a model on the Hub could have this name."""
    return bool(re.fullmatch(_ID, name)) and not name.endswith(_FILES)


def is_address(path: Path) -> bool:
    """Whether a path is the address of a page."""
    return bool(_ADDRESS.fullmatch(path.as_posix()))


def without_address(path: Path | None) -> Path | None:
    """The id of the model that an address of the Hub leads to; any other path as it is.

    The callback of arguments that name a model.

    Raises:
        UsageError: it is another address.
    """
    found = _ADDRESS.fullmatch(path.as_posix()) if path else None
    if not found:
        return path
    if model := _MODEL_ADDRESS.fullmatch(found[2]):
        return Path(model[1])
    raise UsageError(
        f"{found[1]}://{found[2]} is not the address of a model on the Hugging Face Hub; pass a "
        "directory, or the id of a model as in owner/model."
    )


def local_model(path: Path) -> Path:
    """The directory of a model; of the id of a model on the Hub its snapshot in the local cache.

    Raises:
        UsageError: it could be an id, and the cache has no snapshot of it; says how to fetch one.
    """
    name = path.as_posix()
    if path.exists() or not is_hub_id(name):
        return path
    # Slow to load, and needed for an id alone.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(name, local_files_only=True))
    except HFValidationError:
        # The Hub allows no such name.
        return path
    except LocalEntryNotFoundError as error:
        raise UsageError(
            f"{name} does not exist here, and the local cache of the Hugging Face Hub has no "
            f"model of this id. If it is an id, fetch the model first with: hf download {name} "
            f"--local-dir {path.name}; then pass {path.name}."
        ) from error
    tell(f"model {name}, revision {found.name}, from the local cache of the Hub")
    return found
