"""Creates commands from their modules, each of which is imported only when its command runs."""

from __future__ import annotations

import importlib
from typing import Any

import typer
import typer.main

from .field_options import name_options
from .registry import COMMANDS


def unwrapped(text: str) -> str:
    """A help text whose paragraphs are one line each, since Typer keeps line breaks within them at every width.

    Lines that are indented, as those of examples, are kept.
    """
    lines: list[str] = []
    for line in text.splitlines():
        if lines and lines[-1] and line and not line.startswith(" ") and not lines[-1].startswith(" "):
            lines[-1] += f" {line}"
        else:
            lines.append(line)
    return "\n".join(lines)


def load(name: str) -> Any:
    """Import a command's module and create the Typer command, with global options and environment variables."""
    from ..bus import websockets

    websockets.leave_out()
    from .global_options import attach as attach_global_options

    entry = COMMANDS[name]
    module, attribute = entry.place.split(":")
    found = getattr(importlib.import_module(f"corral.cli.{module}"), attribute)
    if not isinstance(found, typer.Typer):
        app = typer.Typer(add_completion=False, rich_markup_mode="rich")
        settings = {"allow_interspersed_args": False} if entry.passes_arguments else {}
        app.command(name, context_settings=settings)(found)
        found = app
    command = typer.main.get_command(found)
    command.name = name
    attach_global_options(name, command)
    # Every option has a variable, CORRAL_<COMMAND>_<OPTION>; the help shows only variables that are set explicitly.
    command.context_settings["auto_envvar_prefix"] = f"CORRAL_{name}"
    inner: dict[str, Any] = getattr(command, "commands", None) or {}
    for one in (command, *inner.values()):
        name_options(one)
        one.help = unwrapped(one.help or "")
    options: list[Any] = [option for one in (command, *inner.values()) for option in one.params]
    for option in options:
        if hasattr(option, "show_envvar"):
            option.show_envvar = option.envvar is not None
    return command
