"""`corral login` and `corral logout`: credentials of the bus for a time, from an OpenID Connect provider."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import ssl
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar
from urllib.parse import urlsplit

import msgspec
import typer

from ...bus.addresses import is_loopback
from ...bus.config_files import path as config_path
from ...bus.credentials import CredentialsError, read
from ...client.config import Context
from ...login.messages import (
    LOGOUT_PATH,
    POLL_PATH,
    START_PATH,
    LoggedIn,
    Logout,
    Poll,
    Start,
    Started,
    Waiting,
    logout_text,
)
from ...schemas.requests import Error
from ..config import write
from ..exits import FAILED, NOT_YOURS, TIMED_OUT, USAGE, CommandError
from ..options import say
from .context import own

T = TypeVar("T")

_TIMEOUT_SECONDS: Final = 30.0
_CONNECT_SECONDS: Final = 15.0
"""Time in which the bus must have taken a new login."""
_LONGEST_PAUSE_SECONDS: Final = 30.0
_UNAVAILABLE: Final = 503

Ca = Annotated[
    Path | None,
    typer.Option(
        "--ca", metavar="FILE", help="CA certificate for checking the login service's. Default: the system's."
    ),
]


def login(
    url: Annotated[
        str | None,
        typer.Argument(metavar="URL", help="Login service. Default: that of the login in use, to renew it."),
    ] = None,
    kept_as: Annotated[
        str | None,
        typer.Option("--as", metavar="CONTEXT", help="Context to keep the login in. Default: the service's host name."),
    ] = None,
    ca: Ca = None,
) -> None:
    """Log in with your organization's account. It prints a page and a code; credentials of the bus follow, for a time.

    The key is made here, and never leaves this machine. A context is added for the bus, and is in use from then on.

    Examples:
      corral login https://login.gpus.example
      corral login
    """
    from ...bus.access.folder import make_key

    place = url or _login_in_use()
    where = _checked(place)
    name = kept_as or _context_of(place) or (urlsplit(where).hostname or "login")
    trust = _trust(ca)
    seed, key = make_key()
    started = _post(where + START_PATH, Start(key=key), Started, trust)
    page = started.verification_uri_complete or started.verification_uri
    typer.echo(f"Open {page}\nand confirm the code {started.user_code}", err=True)
    found = _wait(where, started, trust)
    file = _keep(name, place, found, seed)
    config = own()
    config.contexts[name] = Context(nats=found.nats, creds=str(file))
    config.current = name
    write(config)
    asyncio.run(_until_taken(found, file))
    group = f", group {found.group}" if found.group else ""
    ends = found.expires_at.astimezone().strftime("%a %H:%M %Z")
    say(f"logged in as {found.owner or found.user} ({found.role}{group}) until {ends}; context {name} is in use")
    for warning in found.warnings:
        say(warning)


def logout(
    kept_as: Annotated[
        str | None, typer.Argument(metavar="CONTEXT", help="Context of the login. Default: the one in use.")
    ] = None,
    ca: Ca = None,
) -> None:
    """End a login before its time: the bus refuses its key from then on, here and wherever it was copied.

    Examples:
      corral logout
    """
    config = own()
    name = kept_as or config.current
    known = config.contexts.get(name)
    file = Path(known.creds) if known is not None and known.creds else None
    facts = _facts(file) if file is not None else {}
    if file is None or not facts.get("login"):
        raise CommandError(f"context {name!r} is no login: `corral context list` shows which there are", NOT_YOURS)
    _, seed = read(file)
    at = datetime.now(UTC)
    message = Logout(user=facts.get("user", ""), at=at, signature=_sign(seed, logout_text(facts.get("user", ""), at)))
    ended = _post(_checked(facts["login"]) + LOGOUT_PATH, message, dict[str, bool], _trust(ca))
    for gone in (file, file.with_suffix(".ca.crt")):
        gone.unlink(missing_ok=True)
    del config.contexts[name]
    if config.current == name:
        config.current = ""
    write(config)
    say(f"{name}: logged out" if ended.get("ended") else f"{name}: the login had ended already, and is removed here")


def _login_in_use() -> str:
    config = own()
    known = config.contexts.get(config.current)
    facts = _facts(Path(known.creds)) if known is not None and known.creds else {}
    if not facts.get("login"):
        raise CommandError("which login service? Give its URL: corral login https://…", USAGE)
    return facts["login"]


def _context_of(place: str) -> str:
    """Name of the context whose login is from a service; empty if there is none."""
    for name, known in own().contexts.items():
        if known.creds and _facts(Path(known.creds)).get("login") == place:
            return name
    return ""


def _facts(file: Path) -> dict[str, str]:
    try:
        return read(file)[0]
    except CredentialsError:
        return {}


def _checked(url: str) -> str:
    parts = urlsplit(url)
    safe = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))
    if not safe or not parts.hostname:
        raise CommandError(f"{url!r}: the login service's URL begins with https://", USAGE)
    return url.rstrip("/")


def _trust(ca: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=None if ca is None else str(ca))
    except OSError as error:
        raise CommandError(f"--ca {ca}: {error.strerror or error}", USAGE) from None


def _wait(where: str, started: Started, trust: ssl.SSLContext) -> LoggedIn:
    """Wait until the person has confirmed the code. A service or provider that is away for a moment ends nothing."""
    deadline = time.monotonic() + started.expires_seconds
    pause = started.interval_seconds
    problem = ""
    while time.monotonic() < deadline:
        time.sleep(pause)
        try:
            answer = _post(where + POLL_PATH, Poll(session=started.session), Waiting | LoggedIn, trust)
        except _AwayError as error:
            # RFC 8628, section 3.5: ask less often then.
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            if problem != str(error):
                problem = str(error)
                say(f"{problem}; still waiting")
            continue
        if isinstance(answer, LoggedIn):
            return answer
        pause, problem = answer.interval_seconds, ""
    raise CommandError(f"the code was not entered in time: log in again{f' ({problem})' if problem else ''}", TIMED_OUT)


class _AwayError(CommandError):
    """The service or its provider does not answer now."""


def _post(url: str, message: object, kind: Any, trust: ssl.SSLContext) -> Any:
    """Send a message, and return the answer.

    Raises:
        CommandError: the service refuses.
        _AwayError: it does not answer, or its provider does not.
    """
    request = urllib.request.Request(
        url, msgspec.json.encode(message), {"Content-Type": "application/json"}, method="POST"
    )
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=trust), _NoRedirects())
    try:
        with opener.open(request, timeout=_TIMEOUT_SECONDS) as answer:
            return msgspec.json.decode(answer.read(1 << 20), type=kind)
    except urllib.error.HTTPError as error:
        with contextlib.suppress(msgspec.MsgspecError, OSError):
            refusal = msgspec.json.decode(error.read(1 << 16), type=Error)
            if error.code == _UNAVAILABLE:
                raise _AwayError(refusal.message) from None
            raise CommandError(refusal.message, NOT_YOURS if refusal.code == "refused" else FAILED) from None
        raise CommandError(f"{url} answers {error.code}: is that a login service of Corral?") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise _AwayError(f"no login service of Corral answers at {url}: {reason}") from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it could lead from HTTPS to a server of anybody's."""

    def redirect_request(self, *_: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Follow none."""


def _keep(name: str, place: str, found: LoggedIn, seed: str) -> Path:
    """Write the credentials file of a login, with mode 0600."""
    folder = config_path().parent / "logins"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = folder / f"{''.join(c if c.isalnum() or c in '-_.' else '-' for c in name)}.creds"
    facts = {
        "user": found.user,
        "role": found.role,
        "owner": found.owner,
        "inbox": f"_INBOX.{found.user}",
        "expires": found.expires_at.astimezone(UTC).isoformat(timespec="seconds"),
        "login": place,
    }
    if found.ca:
        ca = file.with_suffix(".ca.crt")
        ca.write_text(found.ca)
        facts["ca"] = ca.name
    lines = ["# A login to Corral's bus: whoever has this file is its holder, until it ends."]
    lines += [f"# {fact}: {value}" for fact, value in facts.items() if value]
    partial = file.with_name(f".{file.name}.partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write("\n".join([*lines, seed, ""]))
    partial.replace(file)
    return file


async def _until_taken(found: LoggedIn, file: Path) -> None:
    """Wait until the bus takes the login: its server reloads its users just now."""
    from ...bus.connect import BusUnavailable, connect

    if not found.nats:
        return
    deadline = time.monotonic() + _CONNECT_SECONDS
    while True:
        try:
            nc = await connect(found.nats, credentials=str(file), wait_seconds=2.0, name="corral-login")
        except BusUnavailable as error:
            if time.monotonic() < deadline:
                await asyncio.sleep(0.2)
                continue
            raise CommandError(f"logged in, but {error}") from None
        await nc.close()
        return


def _sign(seed: str, text: bytes) -> str:
    import nkeys

    library: Any = nkeys
    return base64.b64encode(library.from_seed(bytearray(seed, "ascii")).sign(text)).decode()
