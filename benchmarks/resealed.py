"""The manifest of a bundle with another content, and the hash of itself that belongs to it."""

import hashlib
from typing import Any

from prox24_deploy.bundle.manifest import canonical_json


def resealed(manifest: dict[str, Any]) -> bytes:
    """The bytes of the file.

    Raises:
        ValueError: a value is none of JSON.
    """
    digest = hashlib.sha256(canonical_json(manifest | {"self_sha256": ""})).hexdigest()
    return canonical_json(manifest | {"self_sha256": digest})
