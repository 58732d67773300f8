"""People and their roles: a file of passwords, and a link to log in that works once."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import os
import re
import secrets
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Final

from msgspec import Struct

USERS_FILE: Final = "users"
LINK_FILE: Final = "link"
GUEST: Final = "guest"
"""Who comes where no login is asked for."""

_NAME: Final = re.compile(r"[A-Za-z0-9_@-][A-Za-z0-9_@.+-]{0,127}")
# OWASP's first choice for scrypt: 128 MiB would be N=2^17; N=2^15, r=8, p=3 is its equal at 32 MiB.
_N, _R, _P = 2**15, 8, 3
_MEMORY: Final = 64 * 2**20
LEAST_PASSWORD: Final = 8


class Role(StrEnum):
    """What somebody may do, each including those before it."""

    VIEWER = "viewer"
    """Sees everything, changes nothing."""
    REQUESTER = "requester"
    """Requests devices under their own name, and gives back what they hold."""
    OPERATOR = "operator"
    """Also releases and evicts leases of others, drains and undrains."""

    def covers(self, other: Role) -> bool:
        """Whether this role may do what the other may."""
        order = list(Role)
        return order.index(self) >= order.index(other)


class Account(Struct, frozen=True, kw_only=True):
    """Somebody who may log in.

    Attributes:
        name: stands as owner or operator in what they do.
        role: what they may do.
        secret: `scrypt$salt$hash`; empty for whoever comes by the link.
    """

    name: str
    role: Role
    secret: str = ""

    @property
    def stamp(self) -> str:
        """Changes with the password: sessions of the old one end."""
        return hashlib.sha256(self.secret.encode()).hexdigest()[:16]


class AccountsError(ValueError):
    """The file of accounts can't be read, or a name or password can't be taken; the message says what to do."""


class Accounts:
    """The accounts of a state folder. The file is read again when it has changed.

    Args:
        folder: the state folder.
        link_name: the name of whoever comes by the link.
        link_role: their role.
    """

    def __init__(self, folder: Path, link_name: str = GUEST, link_role: Role = Role.OPERATOR) -> None:
        self.path = folder / USERS_FILE
        self._link = folder / LINK_FILE
        self._by_link = Account(name=link_name, role=link_role)
        self._read_at: tuple[int, int] | None = None
        self._accounts: dict[str, Account] = {}

    def all(self) -> dict[str, Account]:
        """The accounts of the file by name.

        Raises:
            AccountsError: a line can't be read.
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
        """The account of a session; None once it is gone or its password has changed."""
        account = self._by_link if stamp == self._by_link.stamp else self.all().get(name)
        return account if account and account.name == name and hmac.compare_digest(account.stamp, stamp) else None

    def check(self, name: str, password: str) -> Account | None:
        """The account that a name and password open. Takes as long for a name that is not there."""
        account = self.all().get(name)
        right = _matches(password, account.secret if account else _NOBODY)
        return account if account and right else None

    def save(self, name: str, role: Role, password: str) -> None:
        """Add an account, or change it.

        Raises:
            AccountsError: the name or the password can't be taken.
        """
        if not _NAME.fullmatch(name):
            raise AccountsError(f"{name!r} is no name: letters, digits and _ @ - . + only, no dot or plus in front")
        if len(password) < LEAST_PASSWORD:
            raise AccountsError(f"a password has at least {LEAST_PASSWORD} characters")
        self._write({**self.all(), name: Account(name=name, role=role, secret=hashed(password))})

    def assign(self, name: str, role: Role) -> bool:
        """Give an account another role, with the password that it has; False where there is no such account."""
        account = self.all().get(name)
        if account is None:
            return False
        self._write({**self.all(), name: Account(name=name, role=role, secret=account.secret)})
        return True

    def remove(self, name: str) -> bool:
        """Remove an account; False where there is none. Its sessions end."""
        accounts = dict(self.all())
        found = accounts.pop(name, None) is not None
        self._write(accounts)
        return found

    def _write(self, accounts: dict[str, Account]) -> None:
        lines = [f"{account.name}:{account.role}:{account.secret}\n" for account in accounts.values()]
        write_secret(self.path, "# name:role:scrypt$salt$hash, written by `corral dashboard user`\n" + "".join(lines))

    def new_link(self) -> str:
        """A token that opens the door once, for whoever can read the state folder. The one before it is void."""
        token = secrets.token_urlsafe(32)
        write_secret(self._link, token)
        return token

    def take_link(self, token: str) -> Account | None:
        """Use the token up; None where it is wrong or was used."""
        try:
            waiting = self._link.read_text().strip()
        except FileNotFoundError:
            return None
        if not waiting or not hmac.compare_digest(waiting.encode(), token.encode()):
            return None
        self._link.unlink(missing_ok=True)
        return self._by_link

    def guest(self) -> Account:
        """Everyone, where no login is asked for."""
        return Account(name=GUEST, role=self._by_link.role)


def write_secret(path: Path, text: str) -> None:
    """Write a file that only its owner may read, as a whole or not at all."""
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
    """A password as it is kept: `scrypt$salt$hash`, both base64."""
    salt = secrets.token_bytes(16) if salt is None else salt
    made = hashlib.scrypt(password.encode(), salt=salt, n=_N, r=_R, p=_P, maxmem=_MEMORY, dklen=32)
    return "$".join(("scrypt", base64.b64encode(salt).decode(), base64.b64encode(made).decode()))


def _matches(password: str, secret: str) -> bool:
    _, salt, made = secret.split("$")
    return hmac.compare_digest(hashed(password, base64.b64decode(salt)).split("$")[2], made)


_NOBODY: Final = "scrypt$" + base64.b64encode(bytes(16)).decode() + "$" + base64.b64encode(bytes(32)).decode()


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
                f"{path}, line {number}: expected name:role:scrypt$salt$hash; set it anew with "
                "`corral dashboard user NAME --role ROLE`"
            )
        found[name] = Account(name=name, role=Role(role), secret=secret.strip())
    return found
