"""Credentials of the bus for a time: users of the authority that end, and the server's reloads."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import logging
import re
import secrets
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from ..bus.access.folder import Authority, AuthorityError
from ..bus.access.reload import reload
from ..bus.access.users import User
from .messages import Logout, logout_text
from .rules import LoginRefused, Person, Rules

log = logging.getLogger("corral.login")

MOST_LOGINS: Final = 16
"""Logins that a person may have at a time. The next one ends the oldest."""
SIGNED_SECONDS: Final = 300.0
"""Age up to which a signed logout is taken."""
_LONGEST_WAIT_SECONDS: Final = 30.0
"""Longest sleep: the clock may be set meanwhile, and the machine may sleep, which timers don't count."""
_AGAIN_SECONDS: Final = 10.0


class NoServer(Exception):
    """The server could not be told of a change; the message is for the operator."""


class Issuer:
    """Adds users to an authority for those who log in, and removes them when their time is over.

    Args:
        folder: of the authority.
        rules: how long a login lasts.

    Raises:
        AuthorityError: there is no authority, or it wants client certificates.

    Attributes:
        problem: why logins that have ended may still be taken; empty while none are.
    """

    def __init__(self, folder: Path, rules: Rules) -> None:
        self.problem = ""
        self._folder = folder
        self._rules = rules
        self._changed = asyncio.Event()
        # A predecessor may have been killed after a change.
        self._untold = True
        if Authority(folder).registry.mutual:
            raise AuthorityError(
                "this bus wants a certificate of each client (--mutual), and a login gives none: make users with "
                "`corral auth add`"
            )

    async def issue(self, person: Person, key: str) -> User:
        """Add a user for a person who has logged in, and have the server take it.

        Args:
            person: who it is.
            key: public NKey of the client.

        Raises:
            LoginRefused: the key or the name is another user's.
            NoServer: the server could not be told.
        """
        user = await asyncio.to_thread(self._issue, person, key)
        self._changed.set()
        return user

    def _issue(self, person: Person, key: str) -> User:
        if _public_bytes(key) is None:
            raise LoginRefused("this is no public key of a user")
        authority = Authority(self._folder)
        name = f"{_slug(person.owner)}-{secrets.token_hex(3)}"
        expires = datetime.now(UTC) + timedelta(hours=self._rules.hours)
        try:
            user, removed = authority.add_login(
                person.role, name, key, person.owner, person.group, expires, most=MOST_LOGINS
            )
        except AuthorityError as error:
            raise LoginRefused(str(error)) from None
        try:
            self._reload(authority)
        except NoServer:
            authority.revoke(name)
            raise
        log.info("%s logged in as %s: user %s, until %s", person.owner, person.role, name, user.expires)
        if removed:
            log.info("%s had more than %d logins: %s ended", person.owner, MOST_LOGINS, ", ".join(removed))
        return user

    async def log_out(self, message: Logout) -> bool:
        """End a login on the signed word of its holder. Returns false if there is no such login any more.

        Raises:
            LoginRefused: the signature is wrong or old.
        """
        try:
            return await asyncio.to_thread(self._log_out, message)
        finally:
            self._changed.set()

    def _log_out(self, message: Logout) -> bool:
        authority = Authority(self._folder)
        user = authority.registry.users.get(message.user)
        if user is None or not user.expires:
            return False
        age = (datetime.now(UTC) - message.at).total_seconds() if message.at.tzinfo else SIGNED_SECONDS + 1
        if abs(age) > SIGNED_SECONDS or not _signed(user.key, message):
            raise LoginRefused("the signature is not that of this login, or the clocks differ by more than 5 minutes")
        authority.revoke(user.name)
        self._reload(authority)
        log.info("%s logged out: user %s", user.owner or user.name, user.name)
        return True

    async def run(self) -> None:
        """Remove users whose time is over, and tell the server of each change until it has heard, until cancelled."""
        while True:
            self._changed.clear()
            wait = _LONGEST_WAIT_SECONDS
            try:
                following = await asyncio.to_thread(self._end)
                self.problem = ""
                if following is not None:
                    wait = min(wait, max(0.1, (following - datetime.now(UTC)).total_seconds()))
            except (AuthorityError, OSError, NoServer) as error:
                log.error("logins that have ended may still be taken, retrying: %s", error)
                self.problem = f"logins that have ended may still be taken: {error}"
                wait = _AGAIN_SECONDS
            except Exception:
                log.exception("logins that have ended may still be taken, retrying")
                self.problem = "logins that have ended may still be taken: the log says why"
                wait = _AGAIN_SECONDS
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._changed.wait()

    def _end(self) -> datetime | None:
        authority = Authority(self._folder)
        over, following = authority.end_logins(datetime.now(UTC))
        if over:
            log.info("the time of %s is over", ", ".join(over))
        if over or self._untold:
            self._reload(authority)
        return following

    def _reload(self, authority: Authority) -> None:
        self._untold = True
        pid_file = authority.registry.pid_file
        if not pid_file or reload(Path(pid_file)) is None:
            where = pid_file or "none is named: `corral auth init --pid-file`"
            raise NoServer(f"no nats-server runs under the pid file ({where}), so it can't be told of logins")
        self._untold = False


def _slug(owner: str) -> str:
    """Owner as the begin of a user's name, which has letters, digits, - and _ alone."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", owner).strip("-_")[:48] or "user"


def _public_bytes(key: str) -> bytes | None:
    """The 32 bytes of a user's public NKey; None if it is none. The server would not read a configuration with one."""
    import nkeys

    library: Any = nkeys
    try:
        raw = base64.b32decode(key + "=" * (-len(key) % 8))
    except (binascii.Error, ValueError):
        return None
    right = len(raw) == 35 and raw[0] == library.PREFIX_BYTE_USER
    return raw[1:33] if right and library.crc16(bytearray(raw[:33])) == int.from_bytes(raw[33:], "little") else None


def _signed(key: str, message: Logout) -> bool:
    from nacl.exceptions import BadSignatureError
    from nacl.signing import VerifyKey

    public = _public_bytes(key)
    try:
        VerifyKey(public or b"").verify(
            logout_text(message.user, message.at), base64.b64decode(message.signature, validate=True)
        )
    except (BadSignatureError, ValueError):
        return False
    return True
