"""The command of `corral run` as it is seen from there: started under a reaper, told signals, ended whole.

Messages are JSON lines. To the reaper (`reaper.py`): first what to start, then `{"signal": NUMBER}` to hand on and
`{"end": GRACE_SECONDS}`. From it: `started` or `failed`, `stopped`, `exited` with the exit code, `ending` and `left`
with the processes that it ends and that it can't end, and `done`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from .. import exits
from . import reaper

_REAPER: Final = Path(reaper.__file__).resolve()
SETTLE_SECONDS: Final = 1.0
KILLED: Final = -int(signal.SIGKILL)


class NotStarted(exits.CommandError):
    """The command can't be run; the exit code is the one that a shell would give."""


class TooLate(subprocess.SubprocessError):
    """The command was not started, since the time in which it might start was over at the very moment before."""


class Child:
    """A command, and the reaper that it runs under.

    Args:
        say: takes a line for people.
        stopped: told when the command has stopped, with its process id.

    Attributes:
        exited: its exit code, negative for a signal. What it has started may be there still.
    """

    def __init__(self, *, say: Callable[[str], None], stopped: Callable[[int], None]) -> None:
        self._tell_people = say
        self._stopped = stopped
        self._lease_id = ""
        self._asked: dict[str, Any] = {}
        self._environment: Mapping[str, str] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.StreamReader | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._hurried = False
        self._left = False
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def start(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        *,
        lease_id: str,
        grace_seconds: float,
        ttl_seconds: float,
        own_group: bool,
        ignored: Sequence[int] = (),
        start_by: float | None = None,
        settle_seconds: float = SETTLE_SECONDS,
    ) -> None:
        """Start it.

        Args:
            words: the command and its arguments.
            environment: its whole environment.
            lease_id: that it works under; empty where it works under none on this host.
            grace_seconds: between SIGTERM and SIGKILL of what it leaves behind.
            ttl_seconds: the lease's time to live.
            own_group: give it a process group of its own.
            ignored: signals that it ignores from the start.
            start_by: it is not started after that time, in seconds of the clock that counts sleep (`CLOCK_BOOTTIME`).
            settle_seconds: what ends by itself so soon after it (the rest of a pipe) is left alone.

        Raises:
            NotStarted: there is no such command, or it can't be executed.
            TooLate: it was later than `start_by`.
        """
        self._lease_id, self._environment = lease_id, environment
        self._asked = {
            "command": list(words),
            "grace_seconds": grace_seconds,
            "ttl_seconds": ttl_seconds,
            "own_group": own_group,
            "settle_seconds": settle_seconds,
            "start_by": start_by,
            "ignored": [int(number) for number in ignored],
        }
        # What the reaper can't keep together, if it is killed, comes here.
        reaper.become_subreaper()
        await self._start_reaper()
        message = await self._next()
        if message is None:
            raise NotStarted("the command could not be started: its reaper has ended", exits.FAILED)
        if "started" not in message:
            while await self._next() is not None:
                pass
            if "late" in message:
                raise TooLate
            raise _not_started(words[0], message)

    async def wait(self) -> int:
        """Wait until it and all that it has started has ended. Returns its exit code, negative for a signal."""
        done = False
        while (message := await self._next()) is not None:
            done = done or "done" in message
            self._hear(message)
        if not done and self._asked["command"] and not self._left:
            # Somebody has killed the reaper: what it kept has come here.
            self._asked = {**self._asked, "command": []}
            await self._start_reaper()
            await self.wait()
        if not self.exited.done():
            self.exited.set_result(KILLED)
        return self.exited.result()

    def signal(self, number: int) -> None:
        """Hand a signal on, to its process group where that is its own."""
        self._say({"signal": int(number)})

    def end(self, grace_seconds: float) -> None:
        """SIGTERM to the command; after the grace time SIGKILL to it and all that it has started."""
        self._say({"end": grace_seconds})

    def leave(self) -> None:
        """Hurry after the end of the command: SIGKILL to what it has left; the second time don't wait for that."""
        if self._hurried:
            self.give_up()
        self._hurried = True
        self.end(0.0)

    def give_up(self) -> None:
        """Wait no longer. The reaper goes on for a while by itself."""
        self._left = True
        if self._writer is not None:
            self._writer.close()

    def _hear(self, message: dict[str, Any]) -> None:
        if "exited" in message and not self.exited.done():
            self.exited.set_result(message["exited"])
        if "stopped" in message:
            self._stopped(message["stopped"])
        if "ending" in message:
            self._tell_people(f"the command has left {_some(message['ending'])}: ended with the lease")
        if message.get("left"):
            self._tell_people(f"waiting for {_some(message['left'])}, which can't be ended from here")

    async def _start_reaper(self) -> None:
        ours, theirs = socket.socketpair()
        theirs.set_inheritable(True)
        words = [sys.executable, "-I", "-S", str(_REAPER), self._lease_id, str(theirs.fileno()), str(os.getpid())]
        # Until it can take them, signals to its group wait; so do ours for this moment.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._process = _started(words, self._environment)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        self._say(self._asked)

    async def _next(self) -> dict[str, Any] | None:
        """The next message; None at the end of the reaper."""
        assert self._reader is not None
        assert self._writer is not None
        assert self._process is not None
        try:
            line = await self._reader.readline()
        except (ConnectionError, ValueError):
            line = b""
        if line:
            return json.loads(line)
        self._writer.close()
        if not self._left:
            await asyncio.to_thread(self._process.wait)
        return None

    def _say(self, message: dict[str, Any]) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")


def _started(words: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    # What this process was given, as `<(…)` of a shell, is for the command; its own files close by themselves.
    return subprocess.Popen(words, env=environment, close_fds=False)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _not_started(name: str, message: dict[str, Any]) -> NotStarted:
    code = exits.NOT_FOUND if message["failed"] == 2 else exits.NOT_EXECUTABLE
    return NotStarted(f"{name}: {message['message'][:1].lower()}{message['message'][1:]}", code)
