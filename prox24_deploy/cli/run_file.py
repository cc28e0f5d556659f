"""One file for a run: every argument of `build` under its name, so that a release lies in git.

What a key may be follows from the command itself, so that no option can be missing here. The schema
that the package ships is written again by

    python -c "from prox24_deploy.cli.run_file import *; SCHEMA_FILE.write_text(schema_text())"
"""

import inspect
import json
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from typer.models import ParameterInfo

from prox24_deploy.cli.help import without_none
from prox24_deploy.cli.hub import is_address, is_hub_id
from prox24_deploy.core.documents import Document, first_problem, parse_toml, read_toml_text
from prox24_deploy.core.errors import UsageError

__all__ = ["SCHEMA_FILE", "fill_from", "run_file_text", "schema_text"]

SCHEMA_FILE = Path(__file__).with_name("run.schema.json")
# What is about the file itself.
_LEFT_OUT = {"context", "config", "print_config"}
_PRINTED = "`prox24-deploy build MODEL_DIR --print-config`"
_MODEL = "model_dir"


def fill_from(context: typer.Context, path: Path | None) -> Path | None:
    """Take what is not on the command line from a run file; paths are relative to its folder.

    The callback of `--config`, which is read before any other option.

    Raises:
        UsageError: the file cannot be read, or a key or a value of it is none of a run.
    """
    if path is not None:
        context.default_map = _read(path)
    return path


def run_file_text(given: Mapping[str, Any]) -> str:
    """A run file that says what a command was given, and names what was not.

    `given` has the value of each parameter by its name. Paths are written as they were given.
    """
    lines = []
    for name, field in _model().model_fields.items():
        value = given.get(name)
        lines.append(f"# {field.description}")
        key = f"{field.alias} ="
        empty = value is None or value in ([], ())
        lines.append(f"# {key}" if empty else f"{key} {_toml(value)}")
    return "\n".join(lines) + "\n"


def schema_text() -> str:
    """JSON schema (draft 2020-12) of a run file, as the package ships it."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_model().model_json_schema(),
    }
    return json.dumps(schema, indent=2) + "\n"


def _read(path: Path) -> dict[str, Any]:
    document = Document(f"Run file {path}", UsageError, f"{_PRINTED} writes one with every key")
    raw = parse_toml(read_toml_text(path, document), document)
    _require_known(raw, path)
    try:
        # As JSON, in which a path is text; a date of TOML is text, too.
        found = _model().model_validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        where, what = first_problem(error)
        raise document.refused(f"is wrong at {where!r}: {what}") from error
    given = {name: getattr(found, name) for name in found.model_fields_set}
    found_beside = {name: _beside(path.parent, value) for name, value in given.items()}
    if _MODEL in given and _is_elsewhere(path.parent, given[_MODEL]):
        found_beside[_MODEL] = str(given[_MODEL])
    return found_beside


def _require_known(raw: Mapping[str, Any], path: Path) -> None:
    known = [str(field.alias) for field in _model().model_fields.values()]
    for key in raw:
        if key not in known:
            close = get_close_matches(key.replace("_", "-"), known, n=1)
            meant = f"; did you mean {close[0]}? {_PRINTED}" if close else f"; {_PRINTED}"
            raise UsageError(
                f"Run file {path} is wrong: no option of a run is called {key!r}{meant} writes one "
                "with every key."
            )


def _is_elsewhere(folder: Path, model: Path) -> bool:
    """Whether a model is named as on the Hub, and no directory of this name is there or here."""
    named = is_address(model) or is_hub_id(model.as_posix())
    return named and not (folder / model).exists() and not model.exists()


def _beside(folder: Path, value: Any) -> Any:
    """A value as the command line would have it, paths from a folder on."""
    if isinstance(value, Path):
        return str(folder / value)
    return [_beside(folder, each) for each in value] if isinstance(value, list) else value


@cache
def _model() -> type[BaseModel]:
    """What `build` takes, as fields: all optional, for the command line may have them."""
    # The command takes this module's callback, so that it cannot be imported above.
    from prox24_deploy.cli.build import build

    made: dict[str, Any] = {}
    for name, parameter in inspect.signature(build).parameters.items():
        if name not in _LEFT_OUT:
            kind, info = get_args(parameter.annotation)[:2]
            made[name] = _field(name, kind, info)
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, title="run.toml")
    return create_model("RunFile", __config__=config, **made)


def _field(name: str, kind: Any, info: ParameterInfo) -> Any:
    # A parser of its own takes more words than the type has.
    value = str if info.parser else without_none(kind)
    field = Field(
        default=None,
        alias=_key(name, info),
        description=info.help,
        ge=info.min,
        le=info.max,
        json_schema_extra=_without_default,
    )
    return (Annotated[value, field], None)


def _without_default(schema: dict[str, Any]) -> None:
    """None, which says that a key is not there, is no value that a file may have."""
    schema.pop("default", None)


def _key(name: str, info: ParameterInfo) -> str:
    """The long name of an option without its dashes; "model" for the model directory."""
    if name == _MODEL:
        return "model"
    # Until an annotation is read, its first name stands where a default would.
    words = [info.default, *(getattr(info, "param_decls", None) or ())]
    declared = [word.partition("/")[0] for word in words if isinstance(word, str)]
    long = [word.removeprefix("--") for word in declared if word.startswith("--")]
    return long[0] if long else name.replace("_", "-")


def _toml(value: Any) -> str:
    """A value in TOML, which JSON is where it comes to numbers, lists and words."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    return f'"{"".join(map(_character, str(value)))}"'


def _character(sign: str) -> str:
    plain = sign.isprintable() and sign not in '"\\'
    return sign if plain else f"\\U{ord(sign):08X}"
