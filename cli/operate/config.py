"""`corral config`: shows settings with their sources, and changes and checks the configuration file."""

from __future__ import annotations

import os
from typing import Annotated, Any, Final, cast

import typer
from rich.markup import escape

from ...bus import config_files
from ...client.config import CONTEXT_VARIABLE, VARIABLES
from .. import config as files
from ..config import SOURCES
from ..exits import NOT_YOURS, USAGE, CommandError
from ..options import AsJson, print_json

SERVICES: Final = ("up", "collect", "runner", "process", "plan", "export", "dashboard", "notifier", "serve-http")
"""Commands whose settings are shown even if none is set."""


config = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", add_completion=False)


@config.callback()
def configuration() -> None:
    """Show the configuration with the source of each value, and change it.

    Precedence: flag, environment variable, configuration file, built-in default.

    Examples:
      corral config show
      corral config set collect.interval 100ms
      corral --config lab.toml config check
    """


@config.command()
def show(
    command: Annotated[
        str | None, typer.Argument(help="Command whose settings to show. Default: the services.")
    ] = None,
    changed: Annotated[bool, typer.Option("--changed", help="Leave out settings that have their defaults.")] = False,
    json: AsJson = False,
) -> None:
    """Show the settings of the services, with the source of each value: a variable, a file, or the default.

    Of other commands, only settings that are set are shown, unless the command is named.

    Examples:
      corral config show
      corral config show collect
      corral config show --changed --json
    """
    from ..registry import COMMANDS

    if command is not None and command not in COMMANDS:
        raise CommandError(f"there is no command {command!r}", USAGE)
    rows = [] if command else _bus()
    for name in [command] if command else COMMANDS:
        of_service = command is not None or name in SERVICES
        rows += [row for row in _of(name) if (of_service and not changed) or row["source"] != "default"]
    if json:
        print_json({"files": [str(path) for path in config_files.paths() if path.is_file()], "settings": rows})
        return
    from ..options import console
    from ..render import table

    made = table("SETTING", "VALUE", "SOURCE")
    for row in rows:
        value = row["value"]
        made.add_row(row["key"], escape(_text(value)), escape(row["source"]))
    console().print(made)


def _text(value: Any) -> str:
    match value:
        case None | "":
            return "–"
        case bool():
            return "true" if value else "false"
        case list():
            return ", ".join(map(str, cast("list[Any]", value)))
        case _:
            return str(value)


def _bus() -> list[dict[str, Any]]:
    from ...bus.connect import DEFAULT_URL, URL_VARIABLE

    found = files.read()
    name = os.environ.get(CONTEXT_VARIABLE) or found.current
    source = "default" if not name else str(found.origins["current"]) if name == found.current else "CORRAL_CONTEXT"
    rows: list[dict[str, Any]] = [{"key": "current", "value": name or None, "source": source}]
    for field, variable in VARIABLES.items():
        value = os.environ.get(variable) or (DEFAULT_URL if variable == URL_VARIABLE else None)
        source = SOURCES.get(variable) or (variable if os.environ.get(variable) else "default")
        rows.append({"key": field, "value": value, "source": source})
    return rows


def _of(name: str) -> list[dict[str, Any]]:
    """Settings of a command, with their values and sources."""
    from ..loading import load

    try:
        command = load(name)
    except ModuleNotFoundError:  # its part is not installed here
        return []
    found = files.read()
    ctx: Any = typer.Context(
        command,
        info_name=name,
        auto_envvar_prefix=f"CORRAL_{name}",
        default_map=files.defaults(found, name, command),
    )
    rows: list[dict[str, Any]] = []
    for key, setting in files.settings(command).items():
        value, source = setting.parameter.consume_value(ctx, {})
        word = source.name if source is not None else "DEFAULT"
        if word == "ENVIRONMENT":
            shown = variable_of(name, setting.parameter)
        elif word == "DEFAULT_MAP":
            shown = str(found.origins.get(f"{name}.{key}") or found.origins[f"{name}.{key.replace('-', '_')}"])
        else:
            shown = "default"
        plain = getattr(value, "value", value)
        if not isinstance(plain, bool | int | float | list | None):
            plain = str(plain)
        rows.append({"key": f"{name}.{key}", "value": plain, "source": shown})
    return rows


def variables(name: str, parameter: Any) -> list[str]:
    """Environment variables for an option, highest precedence first."""
    own = parameter.envvar or []
    return [*([own] if isinstance(own, str) else own), f"CORRAL_{name}_{parameter.name}".upper()]


def variable_of(name: str, parameter: Any) -> str:
    """Environment variable that currently sets an option."""
    return next(variable for variable in variables(name, parameter) if os.environ.get(variable))


@config.command("set")
def set_value(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Key, such as collect.interval or nats.")],
    value: Annotated[list[str], typer.Argument(metavar="VALUE", help="Value; several for a repeatable option.")],
) -> None:
    """Set a value in the configuration file; comments are kept.

    Examples:
      corral config set nats nats://gpu-bus:4222
      corral config set collect.interval 100ms
      corral config set collect.label rack=r1 zone=a
    """
    _change(key, value)


@config.command()
def unset(key: Annotated[str, typer.Argument(metavar="KEY", help="Key, such as collect.interval.")]) -> None:
    """Remove a setting from the configuration file (exit code 5 if it isn't there).

    Examples:
      corral config unset collect.interval
    """
    _change(key, None)


def _change(key: str, values: list[str] | None) -> None:
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    target = config_files.path()
    try:
        document: Any = tomlkit.parse(target.read_text()) if target.is_file() else tomlkit.document()
    except (OSError, TOMLKitError) as error:
        raise CommandError(f"{target} can't be changed: {error}", USAGE) from None
    *where, name = key.split(".")
    node = document
    for part in where:
        node = node.get(part) if values is None else node.setdefault(part, tomlkit.table())
        if node is None:
            break
    if values is None:
        if not isinstance(node, dict) or name not in node:
            raise CommandError(f"{target} does not set {key}", NOT_YOURS)
        del cast("dict[str, Any]", node)[name]
    else:
        cast("dict[str, Any]", node)[name] = _typed(key, values)
    _check_text(tomlkit.dumps(document))
    files.save(target, tomlkit.dumps(document))


def _typed(key: str, values: list[str]) -> Any:
    """Convert the values of a setting to the type that its option takes; a key that is no option takes text."""
    from ..loading import load
    from ..registry import COMMANDS

    command, _, option = key.partition(".")
    if option and command in COMMANDS:
        setting = files.settings(load(command)).get(option.replace("_", "-"))
        if setting is not None and getattr(setting.parameter, "is_flag", False) and len(values) == 1:
            if values[0].lower() not in ("true", "false"):
                raise CommandError(f"{key} takes true or false, not {values[0]!r}", USAGE)
            return values[0].lower() == "true"
        if setting is not None and setting.parameter.multiple:
            return values
    if len(values) != 1:
        raise CommandError(f"{key} takes one value", USAGE)
    return values[0]


def _check_text(text: str) -> None:
    """Refuse the text of an invalid configuration file before it replaces the current file."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder, "corral.toml")
        trial.write_text(text)
        try:
            check_all([trial])
        except CommandError as error:
            raise CommandError(str(error).replace(str(trial), str(config_files.path())), error.code) from None


@config.command()
def check() -> None:
    """Validate the configuration files (exit code 2 if one is invalid).

    Examples:
      corral config check
      corral --config /etc/corral/corral.toml config check
    """
    there = [path for path in config_files.paths() if path.is_file()]
    check_all(there)
    typer.echo(
        "\n".join(f"{path}: valid" for path in there)
        or f"there is no configuration file; it would be {config_files.path()}"
    )


def check_all(paths: list[Any]) -> None:
    """Check all settings in configuration files.

    Raises:
        CommandError: a setting is invalid; the message says which.
    """
    from ..loading import load

    found = files.read(paths)
    for name in found.tables:
        files.defaults(found, name, load(name))


@config.command("path")
def show_path() -> None:
    """Print the path of the file that commands write to.

    Examples:
      corral config path
    """
    typer.echo(config_files.path())
