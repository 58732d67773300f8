"""`corral context`: named buses, so that commands need no URL. After `corral context add lab nats://…` they use it.

A flag takes precedence over the environment, the environment over the context, and that over built-in defaults.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from ...bus.config_files import path
from ...client.config import VARIABLES, Config, Context, unknown_context
from ..config import read, write
from ..exits import NOT_YOURS, USAGE, CommandError
from ..global_options import GIVEN


def own() -> Config:
    """Read the configuration file that commands write to."""
    return read([path()])


context = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", add_completion=False)


@context.callback()
def contexts() -> None:
    """Manage contexts, which are named connections to a bus, and select one.

    Examples:
      corral context add lab nats://gpu-bus:4222 --creds ~/lab.creds
      corral context use lab
      corral --context lab devices
    """


@context.command()
def add(
    name: Annotated[str, typer.Argument(help="Name of the context.")],
    url: Annotated[str, typer.Argument(metavar="URL", help="URL of the bus; several are separated by commas.")],
    creds: Annotated[str, typer.Option("--creds", metavar="FILE", help="Credentials file.")] = "",
    owner: Annotated[str, typer.Option("--owner", metavar="NAME", help="Owner of requests and leases.")] = "",
    ca: Annotated[str, typer.Option("--ca", metavar="FILE", help="CA certificate for checking the server's.")] = "",
    cert: Annotated[
        str, typer.Option("--cert", metavar="FILE", help="Client certificate, if the server requires one.")
    ] = "",
    key: Annotated[str, typer.Option("--key", metavar="FILE", help="Key of the client certificate.")] = "",
) -> None:
    """Add or change a context. The first one becomes the context in use.

    Examples:
      corral context add lab nats://gpu-bus:4222 --creds ~/lab.creds
    """
    if not name.strip() or "://" not in url:
        raise CommandError(f"{url!r} is no URL of a NATS server; expected a form such as nats://host:4222", USAGE)
    config = own()
    given = {"creds": creds or GIVEN.get("creds", ""), "ca": ca, "cert": cert, "key": key}
    full = {field: str(Path(file).expanduser().absolute()) for field, file in given.items() if file}
    config.contexts[name] = Context(nats=url, owner=owner, **full)
    config.current = config.current or name
    write(config)
    typer.echo(f"{name}: {url}{' (in use)' if config.current == name else ''}")


@context.command()
def use(name: Annotated[str, typer.Argument(help="Name of the context.")]) -> None:
    """Make a context the one in use.

    Examples:
      corral context use lab
    """
    known, config = read(), own()
    if name not in known.contexts:
        raise CommandError(unknown_context(name, known), NOT_YOURS)
    config.current = name
    write(config)
    typer.echo(f"{name}: {known.contexts[name].nats} (in use)")


@context.command("list")
def list_contexts(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List contexts; a star marks the one in use.

    Examples:
      corral context list
    """
    config = read()
    if json:
        from ..options import print_json

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
    """Print connection settings and owner as `export` commands, for programs other than Corral.

    Examples:
      eval "$(corral context export)"
    """
    from ...bus.connect import DEFAULT_URL, URL_VARIABLE
    from ...bus.credentials import CA_VARIABLE, INBOX_VARIABLE, CredentialsError, identify
    from ...client.request import OWNER_VARIABLE, default_owner

    values = {URL_VARIABLE: DEFAULT_URL} | {name: os.environ[name] for name in VARIABLES.values() if name in os.environ}
    try:
        # Other programs don't read these values from the credentials, as Corral does.
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
def remove(name: Annotated[str, typer.Argument(help="Name of the context.")]) -> None:
    """Remove a context.

    Examples:
      corral context remove lab
    """
    config = own()
    if config.contexts.pop(name, None) is None:
        raise CommandError(unknown_context(name, config), NOT_YOURS)
    if config.current == name:
        config.current = ""
    write(config)
