"""A command on another host, over ssh or the like: how it is started there, told signals, and ended with its lease.

Nothing of Corral has to be there, only a POSIX shell and `/proc`. The command runs under a small shell that outlives
its signals, so that its exit code comes back; beside it a watcher ends whatever works under the lease once the
connection is gone, since sshd ends nothing that has no terminal.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Final

from . import exits

_ADDRESS: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")
"""What a host may be called or reached at; anything else could be an option of ssh, or words of a shell."""

# All that has the lease in its environment, wherever it has gone: $1 the lease, $2 the signal.
_TELL: Final = (
    'for e in $(grep -lsxzF "CORRAL_LEASE=$1" /proc/[0-9]*/environ); do '
    'e=${e#/proc/}; kill -s "$2" "${e%/environ}" 2>/dev/null; done'
)
# $1 the command's shell, $2 what it was started by, $3 the grace time in seconds, $4 the lease, $5 how to tell it.
_WATCH: Final = (
    'trap "" HUP INT QUIT TERM USR1 USR2; '
    '[ "$2" -gt 1 ] && [ -d "/proc/$2" ] || exit; '
    'while [ -d "/proc/$1" ] && [ -d "/proc/$2" ]; do sleep 1; done; '
    '[ -d "/proc/$1" ] || exit; '
    'sh -c "$5" tell "$4" TERM; '
    'left=$3; while [ -d "/proc/$1" ] && [ "$left" -gt 0 ]; do sleep 1; left=$((left - 1)); done; '
    'sh -c "$5" tell "$4" KILL'
)
# $1 the grace time, $2 the lease, $3 the watcher, $4 how to tell it, then the command. The watcher is nobody's child
# and not under the lease; the shell waits for the command through every signal.
_START: Final = (
    "grace=$1 lease=$2 watch=$3 tell=$4; shift 4; "
    '(env -u CORRAL_LEASE sh -c "$watch" corral $$ $PPID "$grace" "$lease" "$tell" </dev/null >/dev/null 2>&1 &); '
    "trap : HUP INT QUIT TERM USR1 USR2; "
    '"$@"; exit $?'
)
LOGIN_SHELL: Final = ("sh", "-c", 'exec "${SHELL:-/bin/sh}" -l')


class Remote:
    """A host that commands are started on.

    Args:
        via: `ssh`, or a command with `{host}` or `{address}` in it; what is run there becomes its last argument.
        host: as the fleet names it.
        address: as it is reached.
        terminal: ask ssh for a terminal there, since there is one here.

    Raises:
        CommandError: the host's name or address, which its collector publishes, is none.
    """

    def __init__(self, via: str, host: str, address: str, *, terminal: bool) -> None:
        self.host = host
        self._words = ["ssh", "--", "{address}"] if via == "ssh" else shlex.split(via)
        self._options = ["-t"] if via == "ssh" and terminal else []
        self._names = {"{host}": host, "{address}": address}
        for name, value in self._names.items():
            if any(name in word for word in self._words) and not _ADDRESS.fullmatch(value):
                raise exits.CommandError(
                    f"host {host!r} can't be reached at {value!r}, as its collector says: that is no name or address"
                )

    def start(self, command: Sequence[str], environment: Mapping[str, str], lease_id: str, grace: float) -> list[str]:
        """What to run here so that a command runs there.

        Args:
            command: none opens a login shell.
            environment: that it gets.
            lease_id: that it works under.
            grace: seconds between SIGTERM and SIGKILL where the connection is lost.
        """
        wait = str(max(0, round(grace)))
        script = ["sh", "-c", _START, "corral", wait, lease_id, _WATCH, _TELL, *(command or LOGIN_SHELL)]
        values = [f"{name}={value}" for name, value in environment.items()]
        # `exec`, so that what the watcher watches is the connection's own process and no shell between.
        return self._run(self._options, ["exec", "env", *values, *script])

    def tell(self, lease_id: str, signal: str) -> list[str]:
        """What to run here so that all that works under a lease there gets a signal."""
        return self._run([], ["exec", "sh", "-c", _TELL, "tell", lease_id, signal])

    def _run(self, options: Sequence[str], script: Sequence[str]) -> list[str]:
        words: list[str] = []
        for word in self._words:
            for name, value in self._names.items():
                word = word.replace(name, value)
            words.append(word)
        # ssh joins its arguments with spaces and gives them to the login shell, so they are quoted for one.
        return [words[0], *options, *words[1:], shlex.join(script)]
