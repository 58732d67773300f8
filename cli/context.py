"""Contexts: named buses, so that nobody types URLs. `corral context add lab nats://…`, and every command goes there.

A setting is taken from the flag, else from the environment, else from the context, else from Corral itself.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from .config import CONTEXT_VARIABLE, PATHS, VARIABLES, Config, Context, path, read, write
from .everywhere import GIVEN
from .exits import NOT_YOURS, USAGE, CommandError

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
            raise CommandError(_unknown(name, config), USAGE)
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


def own() -> Config:
    """What the file says that commands write to."""
    return read([path()])


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
    ca: Annotated[str, typer.Option("--ca", metavar="FILE", help="Certificate that the server's is checked by.")] = "",
    cert: Annotated[str, typer.Option("--cert", metavar="FILE", help="Your certificate, if the server asks.")] = "",
    key: Annotated[str, typer.Option("--key", metavar="FILE", help="Its key.")] = "",
) -> None:
    """Add a context, or change it; the first one is used at once.

    Examples:
      corral context add lab nats://gpu-bus:4222 --creds ~/lab.creds
    """
    if not name.strip() or "://" not in url:
        raise CommandError(f"{url!r} is no URL of a bus: write it like nats://host:4222", USAGE)
    config = own()
    given = {"creds": creds or GIVEN.get("creds", ""), "ca": ca, "cert": cert, "key": key}
    full = {field: str(Path(file).expanduser().absolute()) for field, file in given.items() if file}
    config.contexts[name] = Context(nats=url, owner=owner, **full)
    config.current = config.current or name
    write(config)
    typer.echo(f"{name}: {url}{' (in use)' if config.current == name else ''}")


@context.command()
def use(name: Annotated[str, typer.Argument(help="Of the context.")]) -> None:
    """Use a context from now on.

    Examples:
      corral context use lab
    """
    known, config = read(), own()
    if name not in known.contexts:
        raise CommandError(_unknown(name, known), NOT_YOURS)
    config.current = name
    write(config)
    typer.echo(f"{name}: {known.contexts[name].nats} (in use)")


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
        fields = ((field, getattr(one, field)) for field in VARIABLES if field != "nats")
        details = "".join(f"  {field} {value}" for field, value in fields if value)
        typer.echo(f"{star} {name}  {one.nats}{details}")


@context.command()
def export() -> None:
    """Print what leads to the bus in use, and who asks there, as variables, for programs that are not Corral.

    Examples:
      eval "$(corral context export)"
    """
    from ..bus.connect import DEFAULT_URL, URL_VARIABLE
    from ..bus.credentials import CA_VARIABLE, INBOX_VARIABLE, CredentialsError, identify
    from ..client.request import OWNER_VARIABLE, default_owner

    values = {URL_VARIABLE: DEFAULT_URL} | {name: os.environ[name] for name in VARIABLES.values() if name in os.environ}
    try:
        # What the credentials say of their holder, which Corral's own programs read there.
        identity = identify()
    except CredentialsError as error:
        raise CommandError(str(error), USAGE) from None
    values[OWNER_VARIABLE] = default_owner(identity.owner)
    for variable, value in ((INBOX_VARIABLE, identity.inbox), (CA_VARIABLE, identity.ca)):
        if value:
            values.setdefault(variable, value)
    for variable, value in values.items():
        typer.echo(f"export {variable}={shlex.quote(value)}")


@context.command()
def remove(name: Annotated[str, typer.Argument(help="Of the context.")]) -> None:
    """Forget a context.

    Examples:
      corral context remove lab
    """
    config = own()
    if config.contexts.pop(name, None) is None:
        raise CommandError(_unknown(name, config), NOT_YOURS)
    if config.current == name:
        config.current = ""
    write(config)
