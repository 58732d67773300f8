"""Global options, which may stand before or after the name of a command.

`corral --context lab devices` and `corral devices --context lab` are the same. A command that doesn't use the bus
refuses options that select one, rather than ignoring them.
"""

import os
from typing import Annotated, Any, Final

import typer
import typer.main

from ..bus import credentials
from ..bus.connect import URL_VARIABLE
from .exits import USAGE, CommandError

_BUS: Final = frozenset({"nats", "creds", "context"})
REFUSED_OPTIONS: Final = {
    "up": ("starts a bus of its own", _BUS),
    "demo": ("starts a bus of its own", _BUS),
    "simulate": ("uses no bus", _BUS),
    "login": ("adds a context for the bus that the login service names (--as)", _BUS),
    "logout": ("ends the login of one context, its argument", _BUS),
    "auth": ("only changes files (--dir, or those of the context in use)", frozenset({"nats"})),
}
"""Commands that refuse some global options: the reason, and the options."""
GIVEN: Final[dict[str, str]] = {}
"""Global options that the command line contains, such as `context`, with their values."""


def record_options(name: str, **given: str | None) -> None:
    """Record global options in `GIVEN`.

    Raises:
        CommandError: the command refuses one of them.
    """
    for option, value in given.items():
        if value:
            why, refused = REFUSED_OPTIONS.get(name, ("", frozenset[str]()))
            if option in refused:
                raise CommandError(f"--{option} doesn't apply to `corral {name}`: it {why}", USAGE)
            GIVEN[option] = value


def connection_flags() -> str:
    """Global options, as text for a command line, that make another command use the same bus."""
    words = (f" --{option} {GIVEN[option]}" for option in ("config", "context", "nats", "creds") if option in GIVEN)
    return "".join(words)


def use_credentials(path: str) -> None:
    """Use the credentials file that the command line names, and no longer treat it as set by a context."""
    os.environ[credentials.CREDENTIALS_VARIABLE] = path
    from .config import SOURCES

    SOURCES.pop(credentials.CREDENTIALS_VARIABLE, None)


def attach(name: str, command: Any) -> None:
    """Add the global options, hidden, to a command or to each command of a group."""
    inner = getattr(command, "commands", None)
    for one in inner.values() if inner else (command,):
        own = {written for parameter in one.params for written in getattr(parameter, "opts", ())}
        one.params += [option for option in _options(name, bool(inner)) if option.opts[0] not in own]


def _options(name: str, of_group: bool) -> list[Any]:
    def config(ctx: typer.Context, value: str | None) -> None:
        if value:
            from .config_defaults import defaults_of

            record_options(name, config=value)
            os.environ["CORRAL_CONFIG"] = os.path.abspath(value)
            ctx.default_map = (None if of_group else defaults_of(name, ctx.command)) or ctx.default_map

    def context(value: str | None) -> None:
        if value:
            from .config import apply

            record_options(name, context=value)
            apply(value)
            if path := GIVEN.get("creds"):
                use_credentials(path)

    def nats(value: str | None) -> None:
        if value:
            record_options(name, nats=value)
            os.environ[URL_VARIABLE] = use_url(value) or value

    def creds(value: str | None) -> None:
        if value:
            record_options(name, creds=value)
            use_credentials(value)

    made = typer.Typer(add_completion=False)

    @made.command()
    def options(
        config: Annotated[str | None, typer.Option("--config", hidden=True, is_eager=True, callback=config)] = None,
        context: Annotated[str | None, typer.Option("--context", hidden=True, is_eager=True, callback=context)] = None,
        nats: Annotated[str | None, typer.Option("--nats", hidden=True, callback=nats)] = None,
        creds: Annotated[str | None, typer.Option("--creds", hidden=True, callback=creds)] = None,
    ) -> None: ...

    del options
    found: list[Any] = [one for one in typer.main.get_command(made).params if one.name != "help"]
    for option in found:
        option.expose_value = option.allow_from_autoenv = False
    return found


def use_url(url: str | None) -> str | None:
    """Record the URL of a `--nats` flag, and unset a context's credentials if it names another bus. Returns the URL."""
    if url:
        GIVEN["nats"] = url
    if url and url != os.environ.get(URL_VARIABLE):
        from .config import drop_connection

        drop_connection()
    return url
