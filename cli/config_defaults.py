"""Defaults from the configuration files for the options of commands, below flags and the environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import typer

from ..bus import config_files
from . import config as files
from .config import apply
from .exits import USAGE, CommandError

_REPAIRING: Final = ("config", "context")


def configure(
    ctx: typer.Context, context: str | None, load: Callable[[str], Any], *, must_be_there: bool = False
) -> None:
    """Apply the configuration files to the command that is about to run, below flags and the environment.

    Args:
        ctx: context of the whole command line.
        context: configuration context that the command line names; None if none.
        load: creates a command by its name.
        must_be_there: require the file to exist, because the command line names it.

    Raises:
        CommandError: a file is invalid or missing, or there is no such context.
    """
    name = ctx.invoked_subcommand or ""
    mending = name in _REPAIRING
    if must_be_there and not mending and not config_files.path().exists():
        raise CommandError(f"there is no configuration file {config_files.path()}", USAGE)
    try:
        found = files.read()
    except CommandError:
        if name != "doctor":  # `corral doctor` reports it as a finding
            raise
        return
    apply(context, found, lenient=mending or name == "doctor")
    if name in found.tables:
        ctx.default_map = {name: files.defaults(found, name, load(name))}
        USED.update({f"{name}.{key}": value for key, value in found.tables[name].items()})
        ORIGINS.update(found.origins)


def defaults_of(name: str, command: Any) -> dict[str, Any]:
    """Apply the context in use, and return the defaults that the configuration files hold for a command's options."""
    found = files.read()
    apply(None, found, lenient=name in _REPAIRING)
    if name in found.tables:
        USED.update({f"{name}.{key}": value for key, value in found.tables[name].items()})
        ORIGINS.update(found.origins)
    return files.defaults(found, name, command)


USED: Final[dict[str, Any]] = {}
"""Settings, with their values, that the running command got from a file."""
ORIGINS: Final[dict[str, Any]] = {}


def setting_source(message: str) -> str:
    """Setting and file, in parentheses, that hold a value that an error message quotes; empty if no file does."""
    found = [key for key, value in USED.items() if isinstance(value, str) and value and value in message]
    return f" ({found[0]} in {ORIGINS[found[0]]})" if found else ""
