"""GEMM timings of earlier builds on this machine, so that no build tunes again what one has tuned.

They lie in the user's cache folder, one file for each GPU, driver, dtype and set of versions.
"""

import hashlib
import json
import logging
import os
from pathlib import Path

from prox24_deploy.core.errors import UsageError
from prox24_deploy.engines.cusparselt.profile import GpuProfile, read_profile, write_profile

log = logging.getLogger(__name__)


def remembered(here: GpuProfile) -> GpuProfile:
    """What earlier builds have timed on this GPU; `here`, which is empty, where there is nothing.

    A file that cannot be read is as good as none: the timings are measured anew.
    """
    path = _file_of(here)
    try:
        known = read_profile(path)
    except (UsageError, OSError) as error:
        if path.exists():
            log.warning("Timings in %s are measured again: %s", path, error)
        return here
    return known if known.fits(here) else here


def remember(profile: GpuProfile) -> None:
    """Keep timings for later builds; a cache that cannot be written costs them time and no more."""
    known = remembered(profile)
    path = _file_of(profile)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_profile(known.with_timings(profile.gemms) if known.fits(profile) else profile, path)
    except OSError as error:
        log.warning("GEMM timings are not kept for later builds: %s", error)


def _file_of(profile: GpuProfile) -> Path:
    kind = [profile.gpu, profile.driver, profile.dtype, sorted(profile.versions.items())]
    digest = hashlib.sha256(json.dumps(kind).encode()).hexdigest()[:16]
    # https://specifications.freedesktop.org/basedir-spec: where caches of a user lie.
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "prox24-deploy" / f"gemms-{digest}.json"
