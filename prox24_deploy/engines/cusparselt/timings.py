"""GEMM timings of earlier builds on this machine, so that no build tunes again what one has tuned.

They lie in the user's cache folder, one file for each GPU, driver and set of versions.
"""

import fcntl
import hashlib
import json
import logging
import os
from dataclasses import replace
from pathlib import Path

from prox24_deploy.core.errors import UsageError
from prox24_deploy.engines.cusparselt.profile import GpuProfile, read_profile, write_profile

log = logging.getLogger(__name__)


def remembered(here: GpuProfile) -> GpuProfile:
    """What earlier builds have timed on this GPU; `here`, which is empty, where there is nothing.

    A file that cannot be read is as good as none: the timings are measured anew.
    """
    try:
        return _read(_file_of(here), here)
    except (OSError, RuntimeError, UsageError) as error:
        log.warning("GEMM timings of earlier builds are measured again: %s", error)
        return here


def remember(profile: GpuProfile) -> None:
    """Keep timings for later builds; a cache that cannot be written costs them time and no more."""
    try:
        path = _file_of(profile)
        path.parent.mkdir(parents=True, exist_ok=True)
        with (path.parent / "lock").open("w") as lock:
            # Builds that end at the same time add to each other's timings.
            fcntl.flock(lock, fcntl.LOCK_EX)
            known = remembered(replace(profile, gemms=()))
            write_profile(known.with_timings(profile.gemms), path)
    except (OSError, RuntimeError) as error:
        log.warning("GEMM timings are not kept for later builds: %s", error)


def _read(path: Path, here: GpuProfile) -> GpuProfile:
    try:
        path.stat()
    except FileNotFoundError:
        return here
    known = read_profile(path)
    return known if known.fits(here) else here


def _file_of(profile: GpuProfile) -> Path:
    kind = [profile.gpu, profile.driver, sorted(profile.versions.items())]
    digest = hashlib.sha256(json.dumps(kind).encode()).hexdigest()[:16]
    # https://specifications.freedesktop.org/basedir-spec: where caches of a user lie; a path that
    # is not absolute is to be ignored.
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache = given if given.is_absolute() else Path.home() / ".cache"
    return cache / "prox24-deploy" / f"gemms-{digest}.json"
