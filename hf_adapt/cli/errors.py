"""How commands end that cannot go on."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import NoReturn

import typer


def fail(message: str) -> NoReturn:
    """Say what is wrong, and end with status 1."""
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(1)


def check_installed(command: str, modules: Mapping[str, str]) -> None:
    """End with the line that installs what a command needs, if something is missing.

    Args:
        command: Its name.
        modules: The modules that it imports, each with the name that pip knows.
    """
    missing = [pip for module, pip in modules.items() if find_spec(module) is None]
    if missing:
        fail(f"hf-adapt {command} needs {', '.join(missing)}: pip install 'hf-adapt[run]'")
