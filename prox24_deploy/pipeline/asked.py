"""What options alone show to be wrong, for whoever writes a run down and does not start it."""

from dataclasses import replace

from prox24_deploy.config.limits import GivenLimits
from prox24_deploy.config.options import BuildOptions
from prox24_deploy.engines import kind_by_name
from prox24_deploy.packaging.naming import require_name
from prox24_deploy.pipeline import demands
from prox24_deploy.pipeline.stages import quantize, recover
from prox24_deploy.regression.comparability import require_keys


def require_sound(options: BuildOptions) -> None:
    """Refuse what `build` would refuse whatever the model and the machine; reads no file.

    Raises:
        UsageError: an option means nothing, or has no effect.
    """
    require_name(options.name)
    for backend in options.engine.backends:
        kind_by_name(backend)
    require_keys(options.allow)
    demands.accepted_losses(options)
    if options.baseline is None:
        demands.require_effect(replace(options, limits_file=None), GivenLimits())
    recover.require_effect(options)
    quantize.require_effect(options)
