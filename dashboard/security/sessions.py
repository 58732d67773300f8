"""Signed sessions: a cookie says who has logged in, and its signature that this server said so."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from itsdangerous import BadSignature, URLSafeSerializer
from msgspec import Struct

from .accounts import Account, Accounts, Role, write_secret

COOKIE: Final = "corral_session"
BROWSER_COOKIE: Final = "corral_browser"
"""Of a browser that has logged in to an account: it opens nothing, and others' guesses do not hold it up."""
SECRET_FILE: Final = "secret"
_ENDED_FILE: Final = "ended.json"


class Session(Struct, frozen=True, kw_only=True):
    """Somebody who has logged in.

    Attributes:
        id: of the session; pages that it opened are its own.
        name: of the account.
        stamp: of the account's password.
        expires: seconds since the epoch.
        role: what the account may do now.
    """

    id: str
    name: str
    stamp: str
    expires: float
    role: Role = Role.VIEWER


class Sessions:
    """Makes and reads sessions.

    Args:
        folder: the state folder; the secret is made in it where there is none.
        accounts: who there is.
        seconds: that a session lasts.
        login: False makes everyone a guest.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        folder: Path,
        accounts: Accounts,
        seconds: float,
        *,
        login: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._accounts = accounts
        self._seconds = seconds
        self._login = login
        self._clock = clock
        secret = _secret(folder / SECRET_FILE)
        self._signer = URLSafeSerializer(secret, salt="corral.dashboard.session")
        self._browsers = URLSafeSerializer(secret, salt="corral.dashboard.browser")
        self._ended_path = folder / _ENDED_FILE
        self._ended: dict[str, float] = {}
        with contextlib.suppress(FileNotFoundError, ValueError):
            self._ended = dict(json.loads(self._ended_path.read_text()))

    def start(self, account: Account) -> tuple[Session, str]:
        """A new session, and the cookie's value."""
        session = Session(
            id=secrets.token_urlsafe(18),
            name=account.name,
            stamp=account.stamp,
            expires=self._clock() + self._seconds,
            role=account.role,
        )
        return session, self._signer.dumps([session.id, session.name, session.stamp, session.expires])

    def read(self, cookie: str | None) -> Session | None:
        """The session of a cookie, with the role that its account has now; None where it does not hold (any more)."""
        if not self._login:
            return self.guest()
        if not cookie:
            return None
        try:
            body: Any = self._signer.loads(cookie)
            id, name, stamp, expires = body
        except (BadSignature, ValueError, TypeError):
            return None
        return self.renewed(Session(id=id, name=name, stamp=stamp, expires=expires))

    def renewed(self, session: Session) -> Session | None:
        """The session with the role that its account has now; None once it has ended."""
        if not self._login:
            return session
        if session.expires <= self._clock() or session.id in self._ended:
            return None
        account = self._accounts.find(session.name, session.stamp)
        if account is None:
            return None
        return Session(
            id=session.id, name=session.name, stamp=session.stamp, expires=session.expires, role=account.role
        )

    def browser(self, name: str) -> str:
        """A cookie's value for a browser in which somebody has logged in."""
        return self._browsers.dumps([secrets.token_urlsafe(12), name])

    def known_browser(self, cookie: str | None, name: str) -> str:
        """The id of a browser in which an account has logged in before; empty for any other."""
        try:
            id, named = self._browsers.loads(cookie or "")
        except (BadSignature, ValueError, TypeError):
            return ""
        return str(id) if named == name else ""

    def guest(self) -> Session:
        """Of everyone, where no login is asked for."""
        account = self._accounts.guest()
        return Session(id="guest", name=account.name, stamp="", expires=float("inf"), role=account.role)

    def end(self, session: Session) -> None:
        """Log out: the cookie holds no more, also after a restart."""
        now = self._clock()
        self._ended = {id: expires for id, expires in self._ended.items() if expires > now}
        self._ended[session.id] = session.expires
        write_secret(self._ended_path, json.dumps(self._ended))


def _secret(path: Path) -> str:
    """The signing secret of a state folder; made at the first start. One that others may read is replaced."""
    try:
        if path.stat().st_mode & 0o077 == 0 and (found := path.read_text().strip()):
            return found
    except FileNotFoundError:
        pass
    made = secrets.token_urlsafe(48)
    write_secret(path, made)
    return made
