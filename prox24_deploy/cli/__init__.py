"""The command line: the only room that prints or exits."""

from prox24_deploy.cli.main import main

__all__ = ["main"]
