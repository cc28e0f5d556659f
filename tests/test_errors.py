"""Exit codes are a public contract: release pipelines branch on them."""

import re

from prox24_deploy import errors
from prox24_deploy.errors import Prox24Error

EXIT_CODES = {
    "Prox24Error": 1,
    "UsageError": 2,
    "ModelDirError": 2,
    "RecipeError": 2,
    "CalibrationError": 2,
    "BundleError": 2,
    "SparsityLostError": 4,
    "SparsityUnprovenError": 5,
    "ExportError": 1,
    "EngineError": 1,
    "BackendMissingError": 5,
}
ERRORS: dict[str, type[Prox24Error]] = {
    name: value for name, value in vars(errors).items() if isinstance(value, type)
}


def test_every_error_keeps_its_exit_code() -> None:
    assert all(issubclass(error, Prox24Error) for error in ERRORS.values())
    assert {name: error.exit_code for name, error in ERRORS.items()} == EXIT_CODES


def test_the_drawn_tree_is_the_tree() -> None:
    """Parent and exit code of every line of the docstring."""
    lines = re.findall(r"^([ │├└─]*)(\w+Error) +(?:exit code )?(\d)", errors.__doc__ or "", re.M)
    branch = ["Exception"]
    drawn = {}
    for indent, name, code in lines:
        depth = len(indent) // 4
        branch = [*branch[: depth + 1], name]
        drawn[name] = (branch[depth], int(code))
    assert drawn == {
        name: (error.__bases__[0].__name__, error.exit_code) for name, error in ERRORS.items()
    }
