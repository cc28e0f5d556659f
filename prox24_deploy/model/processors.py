"""Open what a model directory has beside the model: tokenizer, image processor, feature extractor.

As of the model itself nothing is unpickled, no remote code is run and nothing is fetched.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import normalizers

from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.core.foreign import blamed
from prox24_deploy.model.config_file import blame_config
from prox24_deploy.model.directory import ModelDir, quiet_transformers
from prox24_deploy.model.processor_file import require_usable_sizes
from prox24_deploy.model.sentence import read_pipeline
from prox24_deploy.model.token_files import TOKENIZER_FILE, require_readable

_TOKENIZER_FILES = f"{TOKENIZER_FILE} and tokenizer_config.json"


def load_tokenizer(directory: ModelDir) -> Any:
    """Open the tokenizer of a model directory as it reads texts; see `open_tokenizer`.

    What sentence-transformers says of lower case and of the length of a text is set in it.
    """
    tokenizer = open_tokenizer(directory.path)
    pipeline = read_pipeline(directory.path)
    if pipeline is not None and pipeline.lower_case:
        _put_in_lower_case(tokenizer)
    if pipeline is not None and pipeline.max_length is not None:
        tokenizer.model_max_length = pipeline.max_length
    return tokenizer


def _put_in_lower_case(tokenizer: Any) -> None:
    """Lower case before anything else, as sentence-transformers does it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelDirError(
            f"sentence_bert_config.json sets do_lower_case for a {type(tokenizer).__name__}, which "
            "has no normaliser to put it in; convert it to tokenizer.json."
        )
    known = backend.normalizer
    backend.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), *([] if known is None else [known])]
    )


def open_tokenizer(path: Path) -> Any:
    """Open the tokenizer in a directory (a transformers tokenizer).

    Raises:
        ModelDirError: there is none, or it cannot be opened without remote code.
    """
    transformers = quiet_transformers()
    require_readable(path)
    with blamed(partial(_does_not_open, path, "tokenizer", _TOKENIZER_FILES)):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    # Without any of its files transformers makes a tokenizer that knows no word.
    files = tokenizer.vocab_files_names.values()
    if not any((path / file).is_file() for file in files):
        raise ModelDirError(
            f"Model directory {path} has no tokenizer, expected one of {', '.join(files)}; add it."
        )
    _require_length(path, tokenizer.model_max_length)
    return tokenizer


def _require_length(path: Path, length: Any) -> None:
    """Transformers keeps whatever the file says, and compares it with numbers later.

    Saved tokenizers without a limit have 1e30, as an integer or as a float.
    """
    is_number = isinstance(length, int | float) and not isinstance(length, bool)
    if not is_number or not 1 <= length < math.inf:
        raise ModelDirError(
            f"Tokenizer of {path} has model_max_length {length!r}, expected a whole number of "
            "tokens from 1; correct tokenizer_config.json."
        )


def load_image_processor(path: Path) -> Any:
    """Open the image processor of a model directory (a transformers image processor).

    Raises:
        ModelDirError: there is none, or it cannot be opened without remote code.
    """
    quiet_transformers()
    # Older versions offer it at the top only beside torchvision, which it does not need.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    return _load_processor(path, AutoImageProcessor, "image processor")


def load_feature_extractor(path: Path) -> Any:
    """Open the feature extractor of a model that hears (a transformers feature extractor).

    Raises:
        ModelDirError: there is none, or it cannot be opened without remote code.
    """
    return _load_processor(path, quiet_transformers().AutoFeatureExtractor, "feature extractor")


def _load_processor(path: Path, auto: Any, what: str) -> Any:
    require_usable_sizes(path)
    with blamed(partial(_does_not_open, path, what, "preprocessor_config.json")):
        return auto.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _does_not_open(path: Path, what: str, files: str, reason: str) -> ModelDirError:
    blame_config(path, reason)
    return ModelDirError(
        f"Model directory {path} has no {what} that opens ({reason}); add {files}."
    )
