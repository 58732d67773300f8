"""The command of `corral run`, on the side of `corral run`: starts it under a reaper, forwards signals, and ends it.

Messages are JSON lines. To the reaper (`reaper.py`): first what to start, then `{"signal": NUMBER}` to forward and
`{"end": GRACE_SECONDS}`. From the reaper: `started`, `failed` or `late`; `stopped`; `exited` with the exit code;
`ending` and `left` with the processes that it ends and that it can't end; and `done`.
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

from ...bus import processes
from .. import exits
from . import reaper

_REAPER: Final = Path(reaper.__file__).resolve()
SETTLE_SECONDS: Final = 1.0
KILLED: Final = -int(signal.SIGKILL)


class NotStarted(exits.CommandError):
    """The command can't be run; the exit code is the same as a shell's."""


class TooLate(subprocess.SubprocessError):
    """The command was not started, because the time by which it had to start had passed."""


class Child:
    """A command, and the reaper that it runs under.

    Args:
        say: called with messages for the user.
        stopped: called with the command's process id when the command was stopped by a signal.

    Attributes:
        exited: future of the command's exit code, negative for a signal. Its descendants may still be running.
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
        """Start the command.

        Args:
            words: the command and its arguments.
            environment: its complete environment.
            lease_id: id of the lease that it works under; empty if it works under none on this host.
            grace_seconds: seconds between SIGTERM and SIGKILL for processes that it leaves behind.
            ttl_seconds: the lease's time to live.
            own_group: start it in a new process group.
            ignored: signals that it ignores from the start.
            start_by: time after which it isn't started, in seconds of `CLOCK_BOOTTIME`, which counts suspended time.
            settle_seconds: time after its end in which its descendants (the rest of a pipe) may end by themselves.

        Raises:
            NotStarted: there is no such command, or it can't be executed.
            TooLate: `start_by` had passed.
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
        # If the reaper is killed, its descendants become children of this process.
        processes.become_subreaper()
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
        """Wait until the command and all its descendants have ended. Returns its exit code, negative for a signal."""
        done = False
        while (message := await self._next()) is not None:
            done = done or "done" in message
            self._hear(message)
        if not done and self._asked["command"] and not self._left:
            # The reaper was killed, so its descendants are children of this process now: a new reaper ends them.
            self._asked = {**self._asked, "command": []}
            await self._start_reaper()
            await self.wait()
        if not self.exited.done():
            self.exited.set_result(KILLED)
        return self.exited.result()

    def signal(self, number: int) -> None:
        """Forward a signal to the command, or to its process group if it was started in a new one."""
        self._say({"signal": int(number)})

    def end(self, grace_seconds: float) -> None:
        """Send SIGTERM to the command, and after the grace time SIGKILL to it and all its descendants."""
        self._say({"end": grace_seconds})

    def leave(self) -> None:
        """After the end of the command, send SIGKILL to its descendants; a second call also stops waiting for them."""
        if self._hurried:
            self.give_up()
        self._hurried = True
        self.end(0.0)

    def give_up(self) -> None:
        """Stop waiting. The reaper continues for a while without this process."""
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
            self._tell_people(f"waiting for {_some(message['left'])}, which can't be ended by this user")

    async def _start_reaper(self) -> None:
        ours, theirs = socket.socketpair()
        theirs.set_inheritable(True)
        words = [sys.executable, "-I", "-S", str(_REAPER), self._lease_id, str(theirs.fileno()), str(os.getpid())]
        # The reaper starts with all signals blocked, until it can handle them; so this process blocks them briefly too.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._process = _started(words, self._environment)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        self._say(self._asked)

    async def _next(self) -> dict[str, Any] | None:
        """The next message; None once the reaper has ended."""
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
    # File descriptors that this process inherited, such as a shell's `<(…)`, are for the command. The files that Python
    # has opened aren't inheritable.
    return subprocess.Popen(words, env=environment, close_fds=False)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _not_started(name: str, message: dict[str, Any]) -> NotStarted:
    code = exits.NOT_FOUND if message["failed"] == 2 else exits.NOT_EXECUTABLE
    return NotStarted(f"{name}: {message['message'][:1].lower()}{message['message'][1:]}", code)
