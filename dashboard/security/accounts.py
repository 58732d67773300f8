"""User accounts with roles: a file of password hashes, and a login link that works once."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import tempfile
import time
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

USERS_FILE: Final = "users"
LINK_FILE: Final = "link"
PEOPLE_FILE: Final = "openid.json"
"""File of those who have logged in through an OpenID Connect provider."""
GUEST: Final = "guest"
"""Name of the account that is used where no login is required."""

_NAME: Final = re.compile(r"[A-Za-z0-9_@-][A-Za-z0-9_@.+-]{0,127}")
# OWASP's first choice for scrypt: 128 MiB would be N=2^17; N=2^15, r=8, p=3 is its equal at 32 MiB.
_N, _R, _P = 2**15, 8, 3
_MEMORY: Final = 64 * 2**20
MIN_PASSWORD: Final = 8


class Role(StrEnum):
    """Permissions of an account; each role includes those before it."""

    VIEWER = "viewer"
    """Sees everything, changes nothing."""
    REQUESTER = "requester"
    """Requests devices as owner under the account's name, renews and releases its leases."""
    OPERATOR = "operator"
    """Also releases and evicts leases of other owners, drains and undrains."""

    def covers(self, other: Role) -> bool:
        """True if this role includes the permissions of the other."""
        order = list(Role)
        return order.index(self) >= order.index(other)


class Account(Struct, frozen=True, kw_only=True):
    """An account of a user.

    Attributes:
        name: name of the account, and owner or operator in its requests and actions.
        role: permissions of the account.
        secret: password hash as `scrypt$salt$hash`; empty for the account of the login link.
    """

    name: str
    role: Role
    secret: str = ""

    @property
    def stamp(self) -> str:
        """Fingerprint of the password hash; sessions with an older one are invalid."""
        return hashlib.sha256(self.secret.encode()).hexdigest()[:16]


class Remembered(Struct, frozen=True, kw_only=True):
    """Somebody who has logged in through the provider.

    Attributes:
        role: at the last login.
        secret: that the account's sessions depend on.
        expires: epoch seconds at which the last login ends.
    """

    role: Role
    secret: str
    expires: float


class RememberedPeople:
    """People who have logged in through the provider, in a file that outlives restarts.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._people = msgspec.json.decode(path.read_bytes(), type=dict[str, Remembered])
        except (FileNotFoundError, msgspec.MsgspecError):
            self._people = dict[str, Remembered]()

    def find(self, name: str, now: float) -> Account | None:
        """Account of somebody whose login lasts."""
        found = self._people.get(name)
        return (
            None if found is None or found.expires <= now else Account(name=name, role=found.role, secret=found.secret)
        )

    def remember(self, name: str, role: Role, expires: float, now: float) -> Account:
        """Note a login. Those that are over are forgotten."""
        known = self._people.get(name)
        secret = known.secret if known is not None and known.expires > now else secrets.token_urlsafe(24)
        self._people = {other: found for other, found in self._people.items() if found.expires > now}
        self._people[name] = Remembered(role=role, secret=secret, expires=expires)
        write_secret(self._path, json.dumps(msgspec.to_builtins(self._people)))
        return Account(name=name, role=role, secret=secret)


class AccountsError(ValueError):
    """The file of accounts can't be read, or a name or password is invalid; the message says what to do."""


class Accounts:
    """Accounts of a dashboard. The file is read again when it has changed.

    Args:
        folder: the dashboard's state folder.
        link_name: name of the account of the login link.
        link_role: role of that account.
    """

    def __init__(self, folder: Path, link_name: str = GUEST, link_role: Role = Role.OPERATOR) -> None:
        self.path = folder / USERS_FILE
        self._link = folder / LINK_FILE
        self._by_link = Account(name=link_name, role=link_role)
        self._people = RememberedPeople(folder / PEOPLE_FILE)
        self._read_at: tuple[int, int] | None = None
        self._accounts: dict[str, Account] = {}

    def all(self) -> dict[str, Account]:
        """Accounts in the file, by name.

        Raises:
            AccountsError: a line is invalid.
        """
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            self._read_at, self._accounts = None, {}
            return self._accounts
        if (seen := (stat.st_mtime_ns, stat.st_size)) != self._read_at:
            self._accounts = _parse(self.path)
            self._read_at = seen
        return self._accounts

    def find(self, name: str, stamp: str) -> Account | None:
        """Account of a session; None if it was removed or its password has changed."""
        account = self._by_link if stamp == self._by_link.stamp else self.all().get(name)
        account = account or self._people.find(name, time.time())
        return account if account and account.name == name and hmac.compare_digest(account.stamp, stamp) else None

    def check(self, name: str, password: str) -> Account | None:
        """Account with a name and password; None if they are wrong. An unknown name takes as long as a known one."""
        account = self.all().get(name)
        right = _matches(password, account.secret if account else _DUMMY_HASH)
        return account if account and right else None

    def remember(self, name: str, role: Role, seconds: float) -> Account | None:
        """Account of somebody who has logged in through a provider; None if one with a password has that name.

        Args:
            name: of the account.
            role: as the provider's claims give it.
            seconds: for which the login lasts.
        """
        now = time.time()
        return None if name in self.all() else self._people.remember(name, role, now + seconds, now)

    def save(self, name: str, role: Role, password: str) -> None:
        """Add or change an account.

        Raises:
            AccountsError: the name or the password is invalid.
        """
        if not _NAME.fullmatch(name):
            raise AccountsError(
                f"{name!r} is not a valid name: use letters, digits and _ @ - . + only, and no dot or plus at the start"
            )
        if len(password) < MIN_PASSWORD:
            raise AccountsError(f"a password must have at least {MIN_PASSWORD} characters")
        self._write({**self.all(), name: Account(name=name, role=role, secret=hashed(password))})

    def assign(self, name: str, role: Role) -> bool:
        """Change the role of an account and keep its password. Returns false if there is no such account."""
        account = self.all().get(name)
        if account is None:
            return False
        self._write({**self.all(), name: Account(name=name, role=role, secret=account.secret)})
        return True

    def remove(self, name: str) -> bool:
        """Remove an account, which ends its sessions. Returns false if there is no such account."""
        accounts = dict(self.all())
        found = accounts.pop(name, None) is not None
        self._write(accounts)
        return found

    def _write(self, accounts: dict[str, Account]) -> None:
        lines = [f"{account.name}:{account.role}:{account.secret}\n" for account in accounts.values()]
        write_secret(self.path, "# name:role:scrypt$salt$hash, written by `corral dashboard user`\n" + "".join(lines))

    def new_link(self) -> str:
        """Create a login token that works once, and store it in the state folder; the previous one becomes invalid."""
        token = secrets.token_urlsafe(32)
        write_secret(self._link, token)
        return token

    def take_link(self, token: str) -> Account | None:
        """Use a login token, which invalidates it. Returns its account; None if it is wrong or was already used."""
        try:
            waiting = self._link.read_text().strip()
        except FileNotFoundError:
            return None
        if not waiting or not hmac.compare_digest(waiting.encode(), token.encode()):
            return None
        self._link.unlink(missing_ok=True)
        return self._by_link

    def guest(self) -> Account:
        """Account of all users where no login is required."""
        return Account(name=GUEST, role=self._by_link.role)


def write_secret(path: Path, text: str) -> None:
    """Write a file atomically, readable only by the user who runs this process."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w") as file:  # mkstemp makes it 0600
            file.write(text)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def hashed(password: str, salt: bytes | None = None) -> str:
    """Hash a password as `scrypt$salt$hash`, with salt and hash in base64."""
    salt = secrets.token_bytes(16) if salt is None else salt
    made = hashlib.scrypt(password.encode(), salt=salt, n=_N, r=_R, p=_P, maxmem=_MEMORY, dklen=32)
    return "$".join(("scrypt", base64.b64encode(salt).decode(), base64.b64encode(made).decode()))


def _matches(password: str, secret: str) -> bool:
    _, salt, made = secret.split("$")
    return hmac.compare_digest(hashed(password, base64.b64decode(salt)).split("$")[2], made)


_DUMMY_HASH: Final = "scrypt$" + base64.b64encode(bytes(16)).decode() + "$" + base64.b64encode(bytes(32)).decode()


def _parse(path: Path) -> dict[str, Account]:
    found: dict[str, Account] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        role, _, secret = rest.partition(":")
        parts = secret.strip().split("$")
        if not _NAME.fullmatch(name) or role not in list(Role) or len(parts) != 3 or parts[0] != "scrypt":
            raise AccountsError(
                f"{path}, line {number}: expected name:role:scrypt$salt$hash; set it again with "
                "`corral dashboard user NAME --role ROLE`"
            )
        found[name] = Account(name=name, role=Role(role), secret=secret.strip())
    return found
