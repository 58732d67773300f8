"""Configuration files: the bus, and defaults for the options of each command.

```toml
nats = "nats://gpu-bus:4222"     # the bus, where no context is in use

[collect]                        # options of `corral collect`, named as on the command line
interval = "100ms"
label = { rack = "r1" }
```

A flag takes precedence over the environment, the environment over the file, and the file over built-in defaults.
`--config`, else `CORRAL_CONFIG`, names the file. Without them two files are read: `/etc/corral/corral.toml` for the
whole machine, and `corral/corral.toml` in `$XDG_CONFIG_HOME` or `~/.config`, which overrides it key by key.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import msgspec
import typer

from ..bus.config_files import path
from ..client.config import CONTEXT_VARIABLE, VARIABLES, Config, ConfigError, unknown_context
from ..client.config import read as read_files
from ..schemas.values.misspelt import closest, meant
from .exits import USAGE, CommandError

PATHS: Final = ("creds", "ca", "cert", "key")
"""Fields of a context that are paths of files."""


def read(files: Iterable[Path] | None = None) -> Config:
    """Read the configuration; it is empty if there is no file.

    Args:
        files: files to read, lowest precedence first; those of `paths()` by default.

    Raises:
        CommandError: a file exists and is invalid.
    """
    try:
        return read_files(files, _check)
    except ConfigError as error:
        raise CommandError(str(error), USAGE) from None


def _check(file: Path, tree: Mapping[str, Any]) -> None:
    """Refuse unknown keys: a misspelled one would otherwise be ignored silently."""
    from .registry import COMMANDS

    top = {*VARIABLES, "current", "contexts"}
    for key, value in tree.items():
        table = isinstance(value, dict)
        if key not in top and key not in COMMANDS:
            raise CommandError(unknown(file, f"[{key}]" if table else key, key, [*top, *COMMANDS]), USAGE)
        if key in COMMANDS and not table:
            raise CommandError(f"{file} is invalid: {key} is a command: put its options under [{key}]", USAGE)
    contexts = tree.get("contexts", {})
    for name, context in cast("dict[str, Any]", contexts).items() if isinstance(contexts, dict) else ():
        if isinstance(context, dict):
            for key in cast("dict[str, Any]", context):
                if key not in VARIABLES:
                    raise CommandError(unknown(file, f"contexts.{name}.{key}", key, VARIABLES), USAGE)
            if not cast("dict[str, Any]", context).get("nats"):
                raise CommandError(f"{file} is invalid: contexts.{name} has no URL (nats)", USAGE)


def unknown(file: Path, where: str, key: str, known: Iterable[str]) -> str:
    """Error message for an unknown key, with the most similar known key as a suggestion."""
    names = list(known)
    close = meant(key, names) or closest(key, names, 0.6)
    return f"{file} is invalid: unknown key {where}" + (f": did you mean {close}?" if close else "")


def write(config: Config) -> None:
    """Write the contexts and the name of the one in use to the user's file, with mode 0600; all else in it is kept."""
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    target = path()
    try:
        document = tomlkit.parse(target.read_text()) if target.is_file() else tomlkit.document()
    except (OSError, TOMLKitError) as error:
        raise CommandError(f"{target} can't be changed: {error}", USAGE) from None
    tree = cast("dict[str, Any]", document)
    if config.current:
        tree["current"] = config.current
    else:
        tree.pop("current", None)
    if "contexts" not in tree and config.contexts:
        tree["contexts"] = tomlkit.table(is_super_table=True)
    there = cast("dict[str, Any]", tree.get("contexts", {}))
    for name in [name for name in there if name not in config.contexts]:
        del there[name]
    for name, context in config.contexts.items():
        fields = msgspec.to_builtins(context)
        table = there.get(name)
        if table is None:
            table = there[name] = tomlkit.table()
        for key in [key for key in table if key not in fields]:
            del table[key]
        table.update(fields)
    save(target, tomlkit.dumps(document))


def save(target: Path, text: str) -> None:
    """Replace a file of the user's atomically, with mode 0600."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        partial.unlink(missing_ok=True)
        partial.touch(mode=0o600)
        partial.write_text(text if text.endswith("\n") else text + "\n")
        partial.replace(target)
    except OSError as error:
        raise CommandError(f"{target} can't be written: {error.strerror}") from None


class Setting(NamedTuple):
    """An option of a command that can be set in the environment and in the file.

    Attributes:
        key: key in the command's table.
        parameter: parameter of the command.
    """

    key: str
    parameter: Any


LEFT_OUT: Final = ("nats", "creds", "context", "config", "help")
"""Options that command tables can't contain; the bus is set once for all commands, at the top of the file."""


def settings(command: Any) -> dict[str, Setting]:
    """Options of a command by their keys."""
    found: dict[str, Setting] = {}
    for parameter in command.params:
        names = [name[2:] for name in parameter.opts if name.startswith("--")]
        if parameter.param_type_name == "option" and names and parameter.name not in LEFT_OUT:
            found[names[0]] = Setting(names[0], parameter)
    return found


def defaults(config: Config, name: str, command: Any) -> dict[str, Any]:
    """Convert a command's table to values of its parameters.

    Raises:
        CommandError: a key is no option of the command, or a value is invalid.
    """
    known = settings(command)
    found: dict[str, Any] = {}
    for written, value in config.tables.get(name, {}).items():
        key = written.replace("_", "-")
        file = config.origins[f"{name}.{written}"]
        if key not in known:
            if key == "nats":
                raise CommandError(f"{file} is invalid: nats belongs at the top of the file, not in [{name}]", USAGE)
            raise CommandError(unknown(file, f"{name}.{written}", key, known), USAGE)
        parameter = known[key].parameter
        found[parameter.name] = _value(file, f"{name}.{written}", parameter, value)
        try:
            parameter.process_value(typer.Context(command, info_name=name), found[parameter.name])
        except typer.BadParameter as error:
            wrong = error.message.removeprefix("Value error, ")
            raise CommandError(f"{file} is invalid: {name}.{written}: {wrong}", USAGE) from None
    return found


def _value(file: Path, where: str, parameter: Any, value: Any) -> Any:
    """Convert a value to the form that the command line would have, so that the same checks apply."""
    flag = bool(getattr(parameter, "is_flag", False))
    if flag != isinstance(value, bool):
        raise CommandError(f"{file} is invalid: {where} = {value!r}: it takes {'true or false' if flag else 'a value'}",
                           USAGE)  # fmt: skip
    if flag:
        return value
    if parameter.multiple:
        if isinstance(value, dict):
            value = [f"{key}={text}" for key, text in cast("dict[str, Any]", value).items()]
        return [str(entry) for entry in cast("list[Any]", value)] if isinstance(value, list) else [str(value)]
    if isinstance(value, list | dict):
        raise CommandError(f"{file} is invalid: {where} takes one value", USAGE)
    return str(value)


SOURCES: Final[dict[str, str]] = {}
"""Source, as text, of each variable that was set from the configuration."""


def drop_connection() -> None:
    """Unset what the configuration has set for a connection, because the command line names another bus.

    That bus must not get the credentials of this one. The owner stays.
    """
    for variable in SOURCES:
        if variable != VARIABLES["owner"]:
            os.environ.pop(variable, None)


def apply(flag: str | None, config: Config | None = None, *, lenient: bool = False) -> None:
    """Export the settings of a context as environment variables, or the top-level settings if no context is in use.

    Args:
        flag: context that the command line names; it overrides the environment. A context that `CORRAL_CONTEXT` names,
            or that is in use, only sets variables that aren't set.
        config: the configuration; read from the files by default.
        lenient: ignore it if the context in use doesn't exist, for commands that can repair that.

    Raises:
        CommandError: there is no such context.
    """
    if config is None:
        config = read()
    named = flag or os.environ.get(CONTEXT_VARIABLE)
    name = named or config.current
    chosen = config.contexts.get(name) if name else config.top
    if chosen is None:
        if named or not lenient:
            raise CommandError(unknown_context(name, config), USAGE)
        return
    url = os.environ.get(VARIABLES["nats"])
    another = not flag and bool(url) and url != chosen.nats
    for field, variable in VARIABLES.items():
        value = getattr(chosen, field) or (config.top.owner if field == "owner" else "")
        if another and field != "owner":
            # The environment names another bus, which must not get the credentials of this one.
            continue
        if value and (flag or not os.environ.get(variable)):
            os.environ[variable] = os.path.expanduser(value) if field in PATHS else value
            SOURCES[variable] = f"context {name}" if name else str(config.origins[field])
        elif flag and field != "owner":
            # The bus of the context must not get credentials that the environment holds for another.
            os.environ.pop(variable, None)
