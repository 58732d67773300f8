"""Sessions in signed cookies: a cookie names the user, and its signature proves that this server issued it."""

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
GUEST_ID: Final = "guest"
"""Id of the session of everyone where no login is required."""
BROWSER_COOKIE: Final = "corral_browser"
"""Cookie of a browser that has logged in to an account. It grants no access, but has a separate limit of failed logins,
so that failures of others don't delay this browser."""
SECRET_FILE: Final = "secret"
_ENDED_FILE: Final = "ended.json"


class Session(Struct, frozen=True, kw_only=True):
    """Session of a user who has logged in.

    Attributes:
        id: id of the session; a page can be used only by the session that opened it.
        name: name of the account.
        stamp: fingerprint of the account's password hash.
        expires: expiry time in epoch seconds.
        role: current role of the account.
    """

    id: str
    name: str
    stamp: str
    expires: float
    role: Role = Role.VIEWER


class Sessions:
    """Creates and reads sessions.

    Args:
        folder: the state folder; the signing secret is created in it if it is missing.
        accounts: accounts of the users.
        seconds: lifetime of a session.
        login: require a login; if false, all users are guests.
        clock: returns epoch seconds.
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
        self._secret = secret
        self._signer = self.signer("corral.dashboard.session")
        self._browsers = self.signer("corral.dashboard.browser")
        self._ended_path = folder / _ENDED_FILE
        self._ended: dict[str, float] = {}
        with contextlib.suppress(FileNotFoundError, ValueError):
            self._ended = dict(json.loads(self._ended_path.read_text()))

    def signer(self, salt: str) -> URLSafeSerializer:
        """Signer of cookies for one purpose, which the salt names."""
        return URLSafeSerializer(self._secret, salt=salt)

    def start(self, account: Account) -> tuple[Session, str]:
        """Create a session. Returns it and the value of its cookie."""
        session = Session(
            id=secrets.token_urlsafe(18),
            name=account.name,
            stamp=account.stamp,
            expires=self._clock() + self._seconds,
            role=account.role,
        )
        return session, self._signer.dumps([session.id, session.name, session.stamp, session.expires])

    def read(self, cookie: str | None) -> Session | None:
        """Session of a cookie, with the account's current role; None if the cookie is invalid or the session ended."""
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
        """The session with the account's current role; None if it has ended."""
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
        """Create the value of the cookie for a browser that has logged in to an account."""
        return self._browsers.dumps([secrets.token_urlsafe(12), name])

    def known_browser(self, cookie: str | None, name: str) -> str:
        """Id of a browser that has logged in to an account before; empty for other browsers."""
        try:
            id, named = self._browsers.loads(cookie or "")
        except (BadSignature, ValueError, TypeError):
            return ""
        return str(id) if named == name else ""

    def guest(self) -> Session:
        """Session of all users where no login is required."""
        account = self._accounts.guest()
        return Session(id=GUEST_ID, name=account.name, stamp="", expires=float("inf"), role=account.role)

    def end(self, session: Session) -> None:
        """End a session: its cookie becomes invalid, also after a restart of the server."""
        now = self._clock()
        self._ended = {id: expires for id, expires in self._ended.items() if expires > now}
        self._ended[session.id] = session.expires
        write_secret(self._ended_path, json.dumps(self._ended))


def _secret(path: Path) -> str:
    """Signing secret of a state folder, created at the first start. One that other users may read is replaced."""
    try:
        if path.stat().st_mode & 0o077 == 0 and (found := path.read_text().strip()):
            return found
    except FileNotFoundError:
        pass
    made = secrets.token_urlsafe(48)
    write_secret(path, made)
    return made
