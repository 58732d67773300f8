"""`corral dashboard`: serves the dashboard and manages its accounts."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...bus.addresses import network
from ...dashboard.security.login_links import login_link
from ..exits import FAILED, USAGE, CommandError
from ..options import NatsUrl, console, say
from .listening import TrustedProxy
from .logs import LogFormat, LogFormatOption, LogLevel, LogLevelOption, Verbose, configure
from .run_service import STOP_WITHIN, StopWithin, run_service, stop_seconds

if TYPE_CHECKING:
    from ...dashboard.security.accounts import Role

State = Annotated[
    Path | None,
    typer.Option(
        "--state",
        metavar="FOLDER",
        help="Folder for secret, accounts and login link. Default: ~/.local/state/corral/dashboard.",
    ),
]
RoleName = Annotated[str, typer.Option("--role", metavar="ROLE", help="viewer, requester or operator.")]

dashboard = typer.Typer(add_completion=False, rich_markup_mode="rich", invoke_without_command=True)


def default_state() -> Path:
    """Default state folder: `$XDG_STATE_HOME/corral/dashboard`, else `~/.local/state/corral/dashboard`."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "corral" / "dashboard"


@dashboard.callback()
def serve(
    context: typer.Context,
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(
            "--port", min=0, max=65535, help="Port; 0 picks a free one. Default: 8600, or a free one if that is in use."
        ),
    ] = None,
    state: State = None,
    role: RoleName = "operator",
    no_login: Annotated[
        bool,
        typer.Option("--no-login", help="Require no login: everyone who can reach the port has --role. Loopback only."),
    ] = False,
    name: Annotated[
        list[str] | None,
        typer.Option(
            "--name", metavar="HOST", help="Host name in the browsers' address bar, if behind a proxy. Repeatable."
        ),
    ] = None,
    secure: Annotated[
        bool, typer.Option("--secure", help="Send cookies over HTTPS only; for use behind a TLS proxy.")
    ] = False,
    trusted_proxy: TrustedProxy = None,
    openid: Annotated[
        Path | None,
        typer.Option(
            "--openid", metavar="FILE", help="Rules of logins through an OpenID Connect provider (docs/login.md)."
        ),
    ] = None,
    session: Annotated[
        str, typer.Option("--session", metavar="TIME", help="Lifetime of a session after the login.")
    ] = "12h",
    interval: Annotated[str, typer.Option("--interval", metavar="TIME", help="Refresh interval of the fleet.")] = "2s",
    prices: Annotated[
        Path | None,
        typer.Option("--prices", metavar="FILE", help="Prices for the page Usage, in TOML, as for corral report."),
    ] = None,
    nats: NatsUrl = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Don't print the login link.")] = False,
    stop_within: StopWithin = STOP_WITHIN,
    log_format: LogFormatOption = LogFormat.AUTO,
    log_level: LogLevelOption = LogLevel.INFO,
    verbose: Verbose = False,
) -> None:
    """Serve the dashboard until stopped, and print a login link that works once.

    Roles: a viewer sees everything; a requester also requests GPUs and releases their own leases; an operator also
    releases and evicts any lease, and drains. --role is the role of users who log in with the link.

    Examples:
      corral dashboard
      corral dashboard user alice --role operator      an account with a password
      corral dashboard link                            a new login link
      corral dashboard --openid login.toml             log in with the organization's account
      corral dashboard --host 0.0.0.0 --name gpus.example.org --secure --trusted-proxy 10.0.0.5
    """
    if context.invoked_subcommand is not None:
        return
    from ...schemas.values.units import parse_seconds

    identity = configure("dashboard", log_format, log_level, verbose=verbose)
    within = stop_seconds(stop_within)
    # At any level: they would log URLs of pages and sockets, which contain secrets that grant access to them.
    for noisy in ("uvicorn", "websockets", "engineio", "socketio", "nicegui"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        seconds, between = parse_seconds(session), parse_seconds(interval)
        proxies = tuple(network(text) for text in trusted_proxy or ())
    except ValueError as error:
        raise CommandError(str(error), USAGE) from error
    if seconds < 60 or between < 0.1:
        raise CommandError("--session wants at least 1m, and --interval at least 100ms", USAGE)
    from ...dashboard import server
    from ...dashboard.security.accounts import AccountsError
    from ...dashboard.settings import Settings, SettingsError
    from ...login.rules import RulesError, read_rules
    from ..price_list import read_prices

    try:
        rules = None if openid is None else read_rules(openid)
    except RulesError as error:
        raise CommandError(str(error), USAGE) from None
    settings = Settings(
        state=(state or default_state()).expanduser().absolute(),
        host=host,
        port=port,
        url=nats,
        login=not no_login,
        role=_role(role),
        names=tuple(name or ()),
        secure=secure,
        trusted_proxies=proxies,
        openid=rules,
        session_seconds=seconds,
        interval_seconds=between,
        prices=None if prices is None else read_prices(prices.expanduser()),
    )

    def started(url: str, link: str) -> None:
        say(f"the dashboard is at {url}")
        if not quiet and not no_login:
            # Printed only on a terminal; a log would keep the token where others can read it.
            if sys.stderr.isatty():
                console(stderr=True).print(
                    f"log in with this link, which works once:\n  [bold]{link}[/]", soft_wrap=True
                )
            else:
                option = f" --state {shlex.quote(str(settings.state))}" if state else ""
                say(f"for a login link: corral dashboard link{option}")

    try:
        stop = asyncio.Event()
        run_service(server.serve(settings, started, stop, identity.named), within, stop)
    except (SettingsError, AccountsError) as error:
        raise CommandError(str(error), USAGE) from error
    except server.PortTaken as error:
        raise CommandError(str(error), FAILED) from error


@dashboard.command("user")
def user(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the account.")],
    role: RoleName = "viewer",
    remove: Annotated[bool, typer.Option("--remove", help="Remove the account and end its sessions.")] = False,
    new_password: Annotated[
        bool, typer.Option("--new-password", help="Ask for a new password for an existing account.")
    ] = False,
    password_file: Annotated[
        Path | None,
        typer.Option(
            "--password-file", metavar="FILE", help="Read the password from a file; - for stdin. Default: ask for it."
        ),
    ] = None,
    state: State = None,
) -> None:
    """Add an account with a password, or change its role or password. A new password ends its sessions.

    Examples:
      corral dashboard user alice --role operator
      corral dashboard user alice --remove
    """
    from ...dashboard.security.accounts import Accounts, AccountsError

    accounts = Accounts((state or default_state()).expanduser().absolute())
    try:
        if remove:
            if not accounts.remove(name):
                raise CommandError(f"there is no account {name!r}", FAILED)
            say(f"{name} is removed, and logged out")
            return
        if password_file is None and not new_password and accounts.assign(name, _role(role)):
            say(f"{name} has the role {role} now")
            return
        if password_file is None:
            password = typer.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
        else:
            text = sys.stdin.read() if str(password_file) == "-" else password_file.read_text()
            password = text.rstrip("\r\n")
        accounts.save(name, _role(role), password)
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}") from error
    except AccountsError as error:
        raise CommandError(str(error), USAGE) from error
    say(f"{name} can log in as {role}")


@dashboard.command("link")
def link(state: State = None) -> None:
    """Print a new login link that works once. Earlier links stop working."""
    from ..local.access import data_in_use
    from ..local.folders import dashboard_state, default_data

    # Without --state it is the running one: of the cluster in use, a separate one, or that of `corral up`.
    in_use = data_in_use()
    others = [*([dashboard_state(in_use)] if in_use else []), default_state(), dashboard_state(default_data())]
    places = [state.expanduser().absolute()] if state else others
    found = next((link for link in map(login_link, places) if link), None)
    if found is None:
        places_text = ", ".join(map(str, dict.fromkeys(places)))
        text = "start one with `corral dashboard` or `corral up`, or give the folder of a running one with --state"
        raise CommandError(f"no dashboard runs on {places_text}: {text}", FAILED)
    typer.echo(found)


def _role(text: str) -> Role:
    from ...dashboard.security.accounts import Role

    try:
        return Role(text)
    except ValueError:
        raise CommandError(f"--role {text!r}: use viewer, requester or operator", USAGE) from None
