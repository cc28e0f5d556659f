"""The record of a rotation, which lies in the model directory that it made."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from prox24_deploy.core.documents import Document, read_json
from prox24_deploy.core.errors import ModelDirError

ROTATION_FILE = "prox24_rotation.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RotateResult:
    """What rotating a model gave.

    Attributes:
        source_sha256: of the model that was rotated.
        channels: of its residual stream.
        dropped_before: mean share that 2:4 drops of what layers compute, by w² E[x²].
        dropped_after: the same in the new basis.
        difference: of the predictions for one batch in float32, the largest over the largest.
        rounded: the same as the weights are stored, read back from disk.
        agreement: share of its positions whose most likely token is the same, as stored.
        gained: weights that the model has more, of an output layer that it shared.
        tokens: of the text that it was searched on.
        steps: of the search.
        device: of the search.
        seconds: of it all.
    """

    source_sha256: str
    channels: int
    dropped_before: float
    dropped_after: float
    difference: float
    rounded: float
    agreement: float
    gained: int
    tokens: int
    steps: int
    device: str
    seconds: float


_RECORD = TypeAdapter(RotateResult)


def read_rotation(model_dir: Path) -> RotateResult | None:
    """The record in a model directory, or None if it was not rotated here.

    Raises:
        ModelDirError: there is one that is none.
    """
    path = model_dir / ROTATION_FILE
    if not path.is_file():
        return None
    document = Document(str(path), ModelDirError, "rotate the model again, or remove the file")
    found = read_json(path, document)
    try:
        return _RECORD.validate_python(found)
    except ValidationError as error:
        raise ModelDirError(
            f"{path} is no record of a rotation; rotate the model again, or remove the file."
        ) from error
