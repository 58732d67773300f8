"""Contexts: named buses, so that nobody types URLs. `corral context add lab nats://…`, and every command goes there.

A setting is taken from the flag, else from the environment, else from the context, else from Corral itself.
"""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer
from msgspec import Struct

from ..client.request import OWNER_VARIABLE
from ..schemas import bus
from .exits import NOT_YOURS, USAGE, CommandError

CONFIG_VARIABLE: Final = "CORRAL_CONFIG"
CONTEXT_VARIABLE: Final = "CORRAL_CONTEXT"


class Context(Struct, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A bus, and how to go there.

    Attributes:
        nats: URL.
        creds: path of a credentials file; empty if none.
        owner: who asks there; empty for the account's name.
    """

    nats: str
    creds: str = ""
    owner: str = ""


class Config(Struct, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The configuration file.

    Attributes:
        current: name of the context in use; empty if none.
        contexts: by name.
    """

    current: str = ""
    contexts: dict[str, Context] = {}


def path() -> Path:
    """Of the configuration: `$CORRAL_CONFIG`, else `corral/config.toml` in `$XDG_CONFIG_HOME` or `~/.config`."""
    if named := os.environ.get(CONFIG_VARIABLE):
        return Path(named)
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "corral" / "config.toml"


def read() -> Config:
    """The configuration; an empty one where there is no file.

    Raises:
        CommandError: the file is there and wrong.
    """
    try:
        text = path().read_text()
    except FileNotFoundError:
        return Config()
    except OSError as error:
        raise CommandError(f"{path()} can't be read: {error.strerror}", USAGE) from None
    try:
        return msgspec.convert(tomllib.loads(text), Config)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise CommandError(f"{path()} is wrong: {error}", USAGE) from None


def write(config: Config) -> None:
    """Replace the configuration; only its owner may read it."""
    lines = [f"current = {json.dumps(config.current)}"] if config.current else []
    for name, context in config.contexts.items():
        lines += ["", f"[contexts.{json.dumps(name)}]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in msgspec.to_builtins(context).items()]
    target = path()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.touch(mode=0o600)
    partial.write_text("\n".join(lines).lstrip() + "\n")
    partial.replace(target)


def apply(flag: str | None) -> None:
    """Take a context's settings over into the environment.

    Args:
        flag: the context that the command line names: it goes before the environment. The one that `CORRAL_CONTEXT`
            names, or that is in use, only fills in what the environment does not say.

    Raises:
        CommandError: there is no such context.
    """
    name = flag or os.environ.get(CONTEXT_VARIABLE)
    config = read()
    chosen = config.contexts.get(name or config.current)
    if chosen is None:
        if name:
            raise CommandError(_unknown(name, config), USAGE)
        return
    for variable, value in (
        (bus.URL_VARIABLE, chosen.nats),
        (bus.CREDENTIALS_VARIABLE, chosen.creds),
        (OWNER_VARIABLE, chosen.owner),
    ):
        if value and (flag or not os.environ.get(variable)):
            os.environ[variable] = value
        elif flag and variable != OWNER_VARIABLE:
            # Credentials of one bus are not shown to another.
            os.environ.pop(variable, None)


def _unknown(name: str, config: Config) -> str:
    known = f"there are {', '.join(config.contexts)}" if config.contexts else "there is none yet"
    return f"there is no context {name!r}: {known} (corral context add NAME URL)"


context = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", add_completion=False)


@context.callback()
def contexts() -> None:
    """Name the buses that you use, and choose one.

    Examples:
      corral context add lab nats://gpu-bus:4222 --creds ~/lab.creds
      corral context use lab
      corral --context lab devices
    """


@context.command()
def add(
    name: Annotated[str, typer.Argument(help="Of the context.")],
    url: Annotated[str, typer.Argument(metavar="URL", help="Of the bus; several by comma.")],
    creds: Annotated[str, typer.Option("--creds", metavar="FILE", help="Credentials file.")] = "",
    owner: Annotated[str, typer.Option("--owner", metavar="NAME", help="Who asks there.")] = "",
) -> None:
    """Add a context, or change it; the first one is used at once.

    Examples:
      corral context add lab nats://gpu-bus:4222 --creds ~/lab.creds
    """
    if not name.strip() or "://" not in url:
        raise CommandError(f"{url!r} is no URL of a bus: write it like nats://host:4222", USAGE)
    config = read()
    full = str(Path(creds).expanduser().absolute()) if creds else ""
    config.contexts[name] = Context(nats=url, creds=full, owner=owner)
    config.current = config.current or name
    write(config)
    typer.echo(f"{name}: {url}{' (in use)' if config.current == name else ''}")


@context.command()
def use(name: Annotated[str, typer.Argument(help="Of the context.")]) -> None:
    """Use a context from now on.

    Examples:
      corral context use lab
    """
    config = read()
    if name not in config.contexts:
        raise CommandError(_unknown(name, config), NOT_YOURS)
    config.current = name
    write(config)
    typer.echo(f"{name}: {config.contexts[name].nats} (in use)")


@context.command("list")
def list_contexts(json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False) -> None:
    """List contexts; the one in use has a star.

    Examples:
      corral context list
    """
    config = read()
    if json:
        from .options import print_json

        found: Any = {"current": config.current, "contexts": config.contexts}
        print_json(found)
        return
    for name, one in config.contexts.items():
        star = "*" if name == config.current else " "
        details = "".join(f"  {key} {value}" for key, value in (("creds", one.creds), ("owner", one.owner)) if value)
        typer.echo(f"{star} {name}  {one.nats}{details}")


@context.command()
def remove(name: Annotated[str, typer.Argument(help="Of the context.")]) -> None:
    """Forget a context.

    Examples:
      corral context remove lab
    """
    config = read()
    if config.contexts.pop(name, None) is None:
        raise CommandError(_unknown(name, config), NOT_YOURS)
    if config.current == name:
        config.current = ""
    write(config)
