"""The values that configuration files give to commands: behind flags and the environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import typer

from . import config as files
from .config import apply
from .exits import USAGE, CommandError

_MENDING: Final = ("config", "context")


def configure(
    ctx: typer.Context, context: str | None, load: Callable[[str], Any], *, must_be_there: bool = False
) -> None:
    """Give what the files say to the command that is about to run: it goes behind flags and the environment.

    Args:
        ctx: of the whole command line.
        context: that it names.
        load: makes a command by its name.
        must_be_there: the file was named on the command line.

    Raises:
        CommandError: a file is wrong, or there is no such context.
    """
    name = ctx.invoked_subcommand or ""
    mending = name in _MENDING
    if must_be_there and not mending and not files.path().exists():
        raise CommandError(f"there is no configuration file {files.path()}", USAGE)
    try:
        found = files.read()
    except CommandError:
        if name != "doctor":  # which tells it as a finding
            raise
        return
    apply(context, found, lenient=mending or name == "doctor")
    if name in found.tables:
        ctx.default_map = {name: files.defaults(found, name, load(name))}
        USED.update({f"{name}.{key}": value for key, value in found.tables[name].items()})
        ORIGINS.update(found.origins)


def defaults_of(name: str, command: Any) -> dict[str, Any]:
    """What the files that are read now give a command, whose options they are."""
    found = files.read()
    apply(None, found, lenient=name in _MENDING)
    if name in found.tables:
        USED.update({f"{name}.{key}": value for key, value in found.tables[name].items()})
        ORIGINS.update(found.origins)
    return files.defaults(found, name, command)


USED: Final[dict[str, Any]] = {}
"""The settings that the running command was given from a file, and their values."""
ORIGINS: Final[dict[str, Any]] = {}


def blame(message: str) -> str:
    """Where a value that a message is about was written, in parentheses; empty if in no file."""
    found = [key for key, value in USED.items() if isinstance(value, str) and value and value in message]
    return f" ({found[0]} in {ORIGINS[found[0]]})" if found else ""
