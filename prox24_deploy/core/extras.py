"""What only some need: how to get an extra of this package."""


def install_of(extra: str) -> str:
    """The command that installs an extra, by its name in pyproject.toml."""
    return f"pip install 'prox24-deploy[{extra}]'"
