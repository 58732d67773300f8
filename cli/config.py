"""The configuration file: which bus, and what each command takes where neither a flag nor the environment says it.

```toml
nats = "nats://gpu-bus:4222"     # the bus, where no context is in use

[collect]                        # options of `corral collect`, named as on the command line
interval = "100ms"
label = { rack = "r1" }
```

A setting is taken from the flag, else from the environment, else from the file, else from Corral itself. `corral.toml`
is found by `--config`, else `CORRAL_CONFIG`; else there are two, `/etc/corral/corral.toml` for a whole machine, and one
in `$XDG_CONFIG_HOME` or `~/.config`, which goes before it key by key.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import msgspec
import typer
from msgspec import Struct

from ..bus import credentials
from ..bus.connect import URL_VARIABLE
from ..client.request import OWNER_VARIABLE
from ..schemas.misspelt import closest, meant
from .exits import USAGE, CommandError

CONFIG_VARIABLE: Final = "CORRAL_CONFIG"
CONTEXT_VARIABLE: Final = "CORRAL_CONTEXT"
MACHINE_FILE: Final = Path("/etc/corral/corral.toml")


class Context(Struct, kw_only=True, omit_defaults=True):
    """A bus, and how to go there.

    Attributes:
        nats: URL.
        creds: path of a credentials file; empty if none.
        owner: who asks there; empty for the account's name.
        ca: path of the certificate that the server's is checked by; empty for the system's, or that of the credentials.
        cert: path of a client's certificate, where the server asks for one.
        key: path of its key.
    """

    nats: str = ""
    creds: str = ""
    owner: str = ""
    ca: str = ""
    cert: str = ""
    key: str = ""


PATHS: Final = ("creds", "ca", "cert", "key")
"""Fields that are paths of files."""


VARIABLES: Final[dict[str, str]] = {
    "nats": URL_VARIABLE,
    "creds": credentials.CREDENTIALS_VARIABLE,
    "owner": OWNER_VARIABLE,
    "ca": credentials.CA_VARIABLE,
    "cert": credentials.CERTIFICATE_VARIABLE,
    "key": credentials.KEY_VARIABLE,
}
"""The variable that says the same as a field of a context."""


class Config(Struct, kw_only=True):
    """What the files say.

    Attributes:
        top: the bus where no context is in use.
        current: name of the context in use; empty if none.
        contexts: by name.
        tables: of commands: option → value, by the command's name.
        origins: the file that each key comes from, such as `collect.interval`.
    """

    top: Context = msgspec.field(default_factory=Context)
    current: str = ""
    contexts: dict[str, Context] = {}
    tables: dict[str, dict[str, Any]] = {}
    origins: dict[str, Path] = {}


def path() -> Path:
    """Of the file that commands write to: `$CORRAL_CONFIG`, else `corral/corral.toml` in the user's configuration."""
    if named := os.environ.get(CONFIG_VARIABLE):
        return Path(named)
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(base) / "corral" / "corral.toml"


def paths() -> list[Path]:
    """Of all files that are read, the weakest first."""
    return [path()] if os.environ.get(CONFIG_VARIABLE) else [MACHINE_FILE, path()]


def read(files: Iterable[Path] | None = None) -> Config:
    """The configuration; an empty one where there is no file.

    Args:
        files: to read, the weakest first; those of `paths()` by default.

    Raises:
        CommandError: a file is there and wrong.
    """
    found = Config()
    for file in paths() if files is None else files:
        tree = _parsed(file)
        _check(file, tree)
        try:
            top = msgspec.convert({key: tree[key] for key in VARIABLES if key in tree}, Context)
            contexts = msgspec.convert(tree.get("contexts", {}), dict[str, Context])
            current = msgspec.convert(tree.get("current", ""), str)
        except msgspec.ValidationError as error:
            raise CommandError(f"{file} is wrong: {error}", USAGE) from None
        for key in VARIABLES:
            if key in tree:
                setattr(found.top, key, getattr(top, key))
        found.contexts = found.contexts | contexts
        found.current = current or found.current
        for name, table in tree.items():
            if isinstance(table, dict) and name != "contexts":
                options = cast("dict[str, Any]", table)
                found.tables[name] = found.tables.get(name, {}) | options
                found.origins |= {f"{name}.{option}": file for option in options}
            else:
                found.origins[name] = file
        found.origins |= {f"contexts.{name}": file for name in contexts}
    return found


def _parsed(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CommandError(f"{file} can't be read: {error.strerror}", USAGE) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CommandError(f"{file} is wrong: {error}", USAGE) from None


def _check(file: Path, tree: Mapping[str, Any]) -> None:
    """Refuse keys that mean nothing: a misspelt one would be silently left out."""
    from .registry import COMMANDS

    top = {*VARIABLES, "current", "contexts"}
    for key, value in tree.items():
        table = isinstance(value, dict)
        if key not in top and key not in COMMANDS:
            raise CommandError(unknown(file, f"[{key}]" if table else key, key, [*top, *COMMANDS]), USAGE)
        if key in COMMANDS and not table:
            raise CommandError(f"{file} is wrong: {key} is a command: write its options under [{key}]", USAGE)
    contexts = tree.get("contexts", {})
    for name, context in cast("dict[str, Any]", contexts).items() if isinstance(contexts, dict) else ():
        if isinstance(context, dict):
            for key in cast("dict[str, Any]", context):
                if key not in VARIABLES:
                    raise CommandError(unknown(file, f"contexts.{name}.{key}", key, VARIABLES), USAGE)
            if not cast("dict[str, Any]", context).get("nats"):
                raise CommandError(f"{file} is wrong: contexts.{name} names no bus (nats)", USAGE)


def unknown(file: Path, where: str, key: str, known: Iterable[str]) -> str:
    """What to say of a key that means nothing, with the nearest that does."""
    names = list(known)
    close = meant(key, names) or closest(key, names, 0.6)
    return f"{file} is wrong: there is no {where}" + (f": did you mean {close}?" if close else "")


def write(config: Config) -> None:
    """Put the contexts, and which is in use, into the user's file; all else in it stays. Only its owner may read it."""
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
    """Replace a file of the user's, which nobody else may read."""
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
    """An option of a command that the environment and the file may give.

    Attributes:
        key: in the command's table.
        parameter: of the command.
    """

    key: str
    parameter: Any


LEFT_OUT: Final = ("nats", "creds", "context", "config", "help")
"""Options that no table has: the bus is named once for all, at the top."""


def settings(command: Any) -> dict[str, Setting]:
    """The options of a command by their keys."""
    found: dict[str, Setting] = {}
    for parameter in command.params:
        names = [name[2:] for name in parameter.opts if name.startswith("--")]
        if parameter.param_type_name == "option" and names and parameter.name not in LEFT_OUT:
            found[names[0]] = Setting(names[0], parameter)
    return found


def defaults(config: Config, name: str, command: Any) -> dict[str, Any]:
    """A command's table as values of its parameters.

    Raises:
        CommandError: a key that is no option, or a value that it does not take.
    """
    known = settings(command)
    found: dict[str, Any] = {}
    for written, value in config.tables.get(name, {}).items():
        key = written.replace("_", "-")
        file = config.origins[f"{name}.{written}"]
        if key not in known:
            if key == "nats":
                raise CommandError(f"{file} is wrong: nats belongs to the top of the file, not to [{name}]", USAGE)
            raise CommandError(unknown(file, f"{name}.{written}", key, known), USAGE)
        parameter = known[key].parameter
        found[parameter.name] = _value(file, f"{name}.{written}", parameter, value)
        try:
            parameter.process_value(typer.Context(command, info_name=name), found[parameter.name])
        except typer.BadParameter as error:
            wrong = error.message.removeprefix("Value error, ")
            raise CommandError(f"{file} is wrong: {name}.{written}: {wrong}", USAGE) from None
    return found


def _value(file: Path, where: str, parameter: Any, value: Any) -> Any:
    """A value as the command line would give it, so that the same checks are made."""
    flag = bool(getattr(parameter, "is_flag", False))
    if flag != isinstance(value, bool):
        raise CommandError(f"{file} is wrong: {where} = {value!r}: it takes {'true or false' if flag else 'a value'}",
                           USAGE)  # fmt: skip
    if flag:
        return value
    if parameter.multiple:
        if isinstance(value, dict):
            value = [f"{key}={text}" for key, text in cast("dict[str, Any]", value).items()]
        return [str(entry) for entry in cast("list[Any]", value)] if isinstance(value, list) else [str(value)]
    if isinstance(value, list | dict):
        raise CommandError(f"{file} is wrong: {where} takes one value", USAGE)
    return str(value)


SOURCES: Final[dict[str, str]] = {}
"""Where a variable that was not in the environment has its value from, in words."""


def apply(flag: str | None, config: Config | None = None, *, lenient: bool = False) -> None:
    """Take a context's settings over into the environment, or those at the top of the file where none is in use.

    Args:
        flag: the context that the command line names: it goes before the environment. The one that `CORRAL_CONTEXT`
            names, or that is in use, only fills in what the environment does not say.
        config: what the files say; they are read by default.
        lenient: let it be if the context that the file has in use is not there; for commands that mend that.

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
            # The environment names another bus: credentials of this one are not shown to it.
            continue
        if value and (flag or not os.environ.get(variable)):
            os.environ[variable] = os.path.expanduser(value) if field in PATHS else value
            SOURCES[variable] = f"context {name}" if name else str(config.origins[field])
        elif flag and field != "owner":
            # Credentials of one bus are not shown to another.
            os.environ.pop(variable, None)


def unknown_context(name: str, config: Config) -> str:
    """The error for a context that is not there, with those that are."""
    known = f"there are {', '.join(config.contexts)}" if config.contexts else "there is none yet"
    return f"there is no context {name!r}: {known} (corral context add NAME URL)"
