"""`corral login-service`: lets people log in with their organization's account."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ...bus.addresses import is_loopback
from ..exits import FAILED, USAGE, CommandError
from ..operate.auth import Folder, bus_url, default_folder
from ..options import NatsUrl, say
from .listening import host_and_port
from .logs import LogFormat, LogFormatOption, LogLevel, LogLevelOption, Verbose, configure
from .run_service import STOP_WITHIN, StopWithin, run_service, stop_seconds

if TYPE_CHECKING:
    from ...login.rules import Person, Rules
    from ...login.service import Joined, LoginService

_TRIES: Final = 5
"""Attempts to change the groups while others change them, too."""


def login_service(
    rules: Annotated[Path, typer.Option("--rules", metavar="FILE", help="Provider, roles and groups (docs/login.md).")],
    listen: Annotated[
        str, typer.Option("--listen", envvar="CORRAL_LISTEN", metavar="HOST:PORT", help="Address and port to serve on.")
    ] = "127.0.0.1:8444",
    tls_cert: Annotated[
        Path | None, typer.Option("--tls-cert", metavar="FILE", help="Certificate for HTTPS, with --tls-key.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", metavar="FILE", help="Key of the certificate.")] = None,
    behind_proxy: Annotated[
        bool, typer.Option("--behind-proxy", help="A proxy in front of it has HTTPS, and limits clients.")
    ] = False,
    bus: Annotated[
        str, typer.Option("--bus", metavar="URL", help="URL of the bus for people. Default: from the authority.")
    ] = "",
    folder: Folder = None,
    nats: NatsUrl = None,
    stop_within: StopWithin = STOP_WITHIN,
    log_format: LogFormatOption = LogFormat.AUTO,
    log_level: LogLevelOption = LogLevel.INFO,
    verbose: Verbose = False,
) -> None:
    """Let people log in with `corral login`, through an OpenID Connect provider, until stopped.

    It runs where the authority and the bus's server are, since it adds users for a time. With groups in the rules it
    also needs an operator's credentials, to make people members. With credentials made with --service it answers health
    checks.

    Examples:
      corral login-service --rules login.toml --tls-cert login.crt --tls-key login.key --listen 0.0.0.0:8444
      corral login-service --rules login.toml --behind-proxy
    """
    logged = configure("login", log_format, log_level, verbose=verbose)
    for noisy in ("uvicorn", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    within = stop_seconds(stop_within)
    host, port = host_and_port(listen, "127.0.0.1:8444")
    if (tls_cert is None) != (tls_key is None):
        raise CommandError("--tls-cert and --tls-key go together", USAGE)
    if not is_loopback(host) and tls_cert is None and not behind_proxy:
        raise CommandError(
            f"{listen} can be reached from other machines: give --tls-cert and --tls-key, or --behind-proxy if a proxy "
            "in front of it has HTTPS",
            USAGE,
        )
    for file in (tls_cert, tls_key):
        if file is not None and not file.is_file():
            raise CommandError(f"{file}: there is no such file", USAGE)
    from ...bus.access.folder import Authority, AuthorityError
    from ...login.issuing import Issuer
    from ...login.rules import RulesError, read_rules
    from ...login.service import LoginService

    where = folder or default_folder()
    try:
        found = read_rules(rules)
        authority = Authority(where)
        service = LoginService(
            found,
            Issuer(where, found),
            nats=bus or bus_url(authority),
            ca=authority.folder / "ca.crt" if authority.tls else None,
            joined=_joining(nats, found) if found.groups else None,
            most_of_address=1000 if behind_proxy else 20,
        )
    except (RulesError, AuthorityError) as error:
        raise CommandError(str(error), USAGE) from None
    stop = asyncio.Event()
    logged.named(service.health.instance)
    run_service(_serve(service, host or "0.0.0.0", port, nats, tls_cert, tls_key, stop), within, stop)


async def _serve(
    service: LoginService,
    host: str,
    port: int,
    nats: str | None,
    certificate: Path | None,
    key: Path | None,
    stop: asyncio.Event,
) -> None:
    from ...login.service import serve

    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise CommandError(f"can't listen on {host}:{port}: {error.strerror or error}", FAILED) from error
    shown = f"[{host}]" if ":" in host else host
    scheme = "https" if certificate else "http"
    say(f"people log in with: corral login {scheme}://{shown}:{listening.getsockname()[1]}")
    await serve(service, listening, stop, nats_url=nats, certificate=certificate, key=key)


def _joining(nats: str | None, rules: Rules) -> Joined:
    """Bring people into the groups that the rules give them, with this process's credentials, an operator's."""
    from ...client.errors import Conflict, CorralError
    from ...login.groups import with_member
    from ...schemas.work.groups import DEFAULT_GROUP
    from ..options import connected

    async def joined(who: Person) -> str:
        if not who.owner:
            return ""
        lost = f"your group {who.group or '(none)'} could not be set"
        try:
            async with connected(nats) as client:
                for _ in range(_TRIES):
                    now = await client.groups()
                    known = [status.group for status in now.groups if status.group.name != DEFAULT_GROUP]
                    if who.group and who.group not in {group.name for group in known}:
                        return f"{lost}: there is no such group, so the operator has to add it"
                    changed = with_member(known, who.owner, who.group, set(rules.groups.values()))
                    if not changed:
                        return ""
                    with contextlib.suppress(Conflict):
                        await client.set_groups(*changed, revision=now.revision)
                        return ""
        except (CorralError, OSError, CommandError) as error:
            return f"{lost}: {error}"
        return f"{lost}: the groups keep changing"

    return joined
