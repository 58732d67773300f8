"""The account that a job runs as."""

from __future__ import annotations

import os
import pwd
import time
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from ..schemas.values.globs import matches_any

FIRST_UID: Final = 1000
"""Smallest user id that jobs may run as: those below are the system's (`UID_MIN` in login.defs(5))."""
KEEP_SECONDS: Final = 2.0
"""Time for which what was read of an account counts: its groups are a file, or a directory service."""
_NOBODY: Final = 65534
_NO_LOGIN: Final = ("nologin", "false")


class AccountError(ValueError):
    """No job of the owner may run here; the message says why."""


class Account(NamedTuple):
    """An account of this machine.

    Attributes:
        name: its name.
        uid: its user id.
        gid: its group id.
        groups: ids of all its groups.
        home: its home directory.
        shell: its shell.
        switched: true if it is not the runner's own.
    """

    name: str
    uid: int
    gid: int
    groups: list[int]
    home: str
    shell: str
    switched: bool


class Accounts:
    """The accounts of owners.

    Args:
        table: account of owners whose account has another name.
        owners: globs over the owners whose jobs may run here.
        own: run all jobs as the runner's own account, as every runner does that is not root.
    """

    def __init__(self, table: Mapping[str, str], owners: Sequence[str] = ("*",), *, own: bool = False) -> None:
        self._table = dict(table)
        self._owners = tuple(owners)
        self.own = own or os.geteuid() != 0
        self._found: dict[str, tuple[float, Account]] = {}

    def account_of(self, owner: str) -> Account:
        """The account for an owner's jobs, as it was at most `KEEP_SECONDS` ago.

        Raises:
            AccountError: there is none, or no job of the owner may run here.
        """
        now = time.monotonic()
        at, found = self._found.get(owner, (float("-inf"), None))
        if found is None or now - at > KEEP_SECONDS:
            found = self._find(owner)
            self._found[owner] = (now, found)
        return found

    def _find(self, owner: str) -> Account:
        if not matches_any(owner, self._owners):
            raise AccountError(f"jobs of {owner} may not run here (--owners)")
        if self.own:
            return _account(pwd.getpwuid(os.geteuid()), switched=False)
        name = self._table.get(owner, owner)
        try:
            found = pwd.getpwnam(name)
        except (KeyError, ValueError):
            raise AccountError(f"there is no account {name} here") from None
        if found.pw_uid < FIRST_UID or found.pw_uid == _NOBODY:
            raise AccountError(f"{name} is a system account: no job runs as it")
        if os.path.basename(found.pw_shell) in _NO_LOGIN:
            raise AccountError(f"nobody can log in as {name}: no job runs as it")
        return _account(found, switched=True)


def _account(found: pwd.struct_passwd, *, switched: bool) -> Account:
    groups = os.getgrouplist(found.pw_name, found.pw_gid)
    shell = found.pw_shell or "/bin/sh"
    return Account(found.pw_name, found.pw_uid, found.pw_gid, groups, found.pw_dir or "/", shell, switched)
