"""Hold files against schemas with check-jsonschema, in this process: it takes seconds to import."""

from pathlib import Path

from check_jsonschema import main
from click.testing import CliRunner, Result


def lint(path: Path, *options: str) -> Result:
    """As `check-jsonschema OPTIONS PATH` does: exit code 0 if the file fits, 1 if not."""
    return CliRunner().invoke(main, [*options, str(path)])
