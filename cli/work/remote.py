"""Starts a command on another host, over ssh or similar, sends it signals, and ends it with its lease.

Corral doesn't have to be installed there; a POSIX shell and `/proc` are enough. The command runs under a small shell
that survives its signals, so that the exit code is returned. Before it returns, the shell ends the processes that the
command leaves behind; the lease is held until then. A separate watcher ends all processes that work under the lease
once the connection is lost, since sshd doesn't end processes without a terminal.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Final

from .. import exits

_ADDRESS: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")
"""Valid host names and addresses; any other text could be taken as an option of ssh or as shell code."""

# Signals all processes that have the lease in their environment, whatever their parent: $1 the lease, $2 the signal.
_TELL: Final = (
    'for e in $(grep -lsxzF "CORRAL_LEASE=$1" /proc/[0-9]*/environ); do '
    'e=${e#/proc/}; kill -s "$2" "${e%/environ}" 2>/dev/null; done'
)
# Functions for a shell that has set `lease`, `leader` (the command's shell) and `watcher`. `left` finds all processes
# with the lease in their environment, and those of the command's session (if its shell leads one) without any lease.
_LEFT: Final = r"""
pause() { sleep 0.2 2>/dev/null || sleep 1; }
left() {
    found= names=
    named=" $(echo $(grep -lsxzF "CORRAL_LEASE=$lease" /proc/[0-9]*/environ)) "
    for folder in /proc/[0-9]*; do
        pid=${folder#/proc/}
        { read -r line <"$folder/stat"; } 2>/dev/null || continue
        name=${line#*\(} name=${name%%\)*}
        set -- ${line##*\) }
        case $1 in [ZXx]) continue ;; esac
        if [ "$pid" = "$leader" ] || [ "$pid" = "$watcher" ] || [ "$2" = "$watcher" ]; then continue; fi
        case $named in
            *" $folder/environ "*) ;;
            *) [ "$4" = "$leader" ] && ! grep -qsz "^CORRAL_LEASE=" "$folder/environ" || continue ;;
        esac
        found="$found $pid" names="${names:+$names, }pid $pid ($name)"
    done
    [ -n "$found" ]
}
tell() { kill -s "$1" $found 2>/dev/null; }
"""
# $1 the command's shell, $2 the process that started it, $3 the grace time in seconds, $4 the lease.
_WATCH: Final = (
    _LEFT
    + """
leader=$1 parent=$2 grace=$3 lease=$4 watcher=$$
trap "" HUP INT QUIT TERM USR1 USR2
[ "$parent" -gt 1 ] && [ -d "/proc/$parent" ] || exit
while [ -d "/proc/$leader" ] && [ -d "/proc/$parent" ]; do sleep 1; done
left && tell TERM && tell CONT
while [ "$grace" -gt 0 ] && left; do sleep 1; grace=$((grace - 1)); done
tries=15; while [ "$tries" -gt 0 ] && left; do tell KILL; pause; tries=$((tries - 1)); done
"""
)
# $1 the grace time, $2 the lease, $3 the watcher, then the command. The watcher is an orphan, and neither it nor the
# shell is under the lease. The shell waits for the command despite signals, then for the processes that it has left.
_START: Final = (
    _LEFT
    + """
grace=$1 lease=$2 watch=$3 leader=$$; shift 3
watcher=$(sh -c "$watch" corral $$ $PPID "$grace" "$lease" </dev/null >/dev/null 2>&1 & echo $!)
trap : HUP INT QUIT TERM USR1 USR2
env CORRAL_LEASE="$lease" "$@"
code=$?
tries=$SETTLE; while [ "$tries" -gt 0 ] && left; do pause; tries=$((tries - 1)); done
if left; then
    echo "corral: the command has left $names: ended with the lease" >&2
    tell TERM; tell CONT
    tries=$((grace * 5))
    while [ "$tries" -gt 0 ] && [ -d "/proc/$PPID" ] && left; do pause; tries=$((tries - 1)); done
    tries=15; while [ "$tries" -gt 0 ] && left; do tell KILL; pause; tries=$((tries - 1)); done
    if left; then
        echo "corral: waiting for $names, which can't be ended by this user" >&2
        tries=$GIVE_UP; while [ "$tries" -gt 0 ] && left; do sleep 1; tries=$((tries - 1)); done
    fi
fi
kill -s KILL "$watcher" 2>/dev/null
exit "$code"
""".replace("$SETTLE", "5").replace("$GIVE_UP", "60")
)
LOGIN_SHELL: Final = ("sh", "-c", 'exec "${SHELL:-/bin/sh}" -l')


class Remote:
    """A host on which commands are started.

    Args:
        via: `ssh`, or a command that contains `{host}` or `{address}`; the remote command becomes its last argument.
        host: name of the host in the fleet.
        address: address of the host.
        terminal: request a terminal from ssh, because there is one here.

    Raises:
        CommandError: the name or address that the host's collector publishes is invalid.
    """

    def __init__(self, via: str, host: str, address: str, *, terminal: bool) -> None:
        self.host = host
        self._words = ["ssh", "--", "{address}"] if via == "ssh" else shlex.split(via)
        self._options = ["-t"] if via == "ssh" and terminal else []
        self._names = {"{host}": host, "{address}": address}
        for name, value in self._names.items():
            if any(name in word for word in self._words) and not _ADDRESS.fullmatch(value):
                raise exits.CommandError(
                    f"host {host!r} can't be reached at {value!r}, as its collector reports: no host name or address"
                )

    def start(self, command: Sequence[str], environment: Mapping[str, str], lease_id: str, grace: float) -> list[str]:
        """Local command line that starts a command on the host.

        Args:
            command: the command; an empty one opens a login shell.
            environment: variables for the command.
            lease_id: id of the lease that it works under.
            grace: seconds between SIGTERM and SIGKILL for processes that the command leaves behind, and for all
                processes under the lease if the connection is lost.
        """
        wait = str(max(0, round(grace)))
        script = ["sh", "-c", _START, "corral", wait, lease_id, _WATCH, *(command or LOGIN_SHELL)]
        # Only the command has the lease in its environment: its shell must survive signals to the lease's processes.
        values = [f"{name}={value}" for name, value in environment.items() if name != "CORRAL_LEASE"]
        # `exec`, so that the watcher watches the process of the connection, not a shell in between.
        return self._run(self._options, ["exec", "env", "-u", "CORRAL_LEASE", *values, *script])

    def tell(self, lease_id: str, signal: str) -> list[str]:
        """Local command line that sends a signal to all processes under a lease on the host."""
        return self._run([], ["exec", "sh", "-c", _TELL, "tell", lease_id, signal])

    def _run(self, options: Sequence[str], script: Sequence[str]) -> list[str]:
        words: list[str] = []
        for word in self._words:
            for name, value in self._names.items():
                word = word.replace(name, value)
            words.append(word)
        # ssh joins its arguments with spaces and passes them to the login shell, so they are quoted for a shell.
        return [words[0], *options, *words[1:], shlex.join(script)]
