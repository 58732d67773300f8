"""The reaper: a process between `corral run` and its command that ends all processes which the command leaves behind.

It starts the command, adopts its orphans (prctl(2), PR_SET_CHILD_SUBREAPER), so that none of them leaves the process
tree, and runs until the last one has ended. If `corral run` ends, for any reason, the reaper ends the command and all
its descendants. It exchanges JSON lines with `corral run` over a socket; `cli/work/children.py` is the other side.

It is started by its path and uses only the standard library, so that it starts within milliseconds and stays small.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING or __package__:
    from ...bus import processes
else:
    _PLACE = Path(__file__).resolve().parents[2] / "bus" / "processes.py"
    _SPEC = importlib.util.spec_from_file_location("processes", _PLACE)
    processes = importlib.util.module_from_spec(_SPEC)
    _SPEC.loader.exec_module(processes)

LOOK_SECONDS: Final = 1.0
"""Interval of checks whether `corral run` is stopped."""
SCAN_SECONDS: Final = 0.05
UNKILLABLE_SECONDS: Final = 3.0
"""Time after SIGKILL when remaining processes are reported: they are another user's, or stuck in the kernel."""
GIVE_UP_SECONDS: Final = 60.0
"""Maximum wait for processes that can't be killed once `corral run` has ended."""
AT_ONCE_SECONDS: Final = 1.0
"""A signal that this process got within this time was sent to the process group, and has reached the command too."""
_CLOCK: Final[int] = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Clock that includes the time in which the machine is suspended, as in `bus/elapsed.py`."""


class Reaper:
    """Supervises a command and all its descendants.

    Args:
        control: socket to `corral run`.
        lease_id: id of the lease that the command works under; empty if it works under none on this host.
        owner: process id of `corral run`.
        asked: first message of `corral run`; see `cli/work/children.py`.
        rest: bytes that were received after it.
    """

    def __init__(
        self, control: socket.socket, lease_id: str, owner: int, asked: dict[str, Any], rest: bytes = b""
    ) -> None:
        self._control = control
        self._owner: int | None = owner
        self._grace: float = asked["grace_seconds"]
        self._ttl: float = asked["ttl_seconds"]
        self._settle: float = asked["settle_seconds"]
        self._own_group: bool = asked["own_group"]
        self._start_by: float = asked["start_by"] or math.inf
        # Root of the process tree: this process, or `corral run` if it has adopted the orphans of a killed reaper.
        own = processes.process(os.getpid())
        since = own.started_ticks if own is not None and asked["command"] else 0
        self._left_behind = processes.LeftBehind(lease_id, os.getpid() if asked["command"] else owner, since)
        self._command = 0
        self._buffer = rest
        self._heard: dict[int, float] = {}
        self._stopped_at: float | None = None
        self._settle_until = math.inf
        self._ending = False
        self._kill_at = math.inf
        self._give_up_at = math.inf
        self._reported: list[str] = []
        self._childless = False
        self._empty_scans = 0
        self._scan_seconds = 0.0

    def begin(self, words: Sequence[str], ignored: Sequence[int]) -> None:
        """Start the command; without a command, end the processes that a killed reaper has left."""
        if not words:
            self._end_in(self._grace)
            return
        receive, give = os.pipe()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _execute(words, ignored, give, parent, self._own_group, self._start_by)
        os.close(give)
        failed = b""
        while piece := os.read(receive, 4096):
            failed += piece
        os.close(receive)
        if failed:
            os.waitpid(pid, 0)
            self._report(json.loads(failed))
            return
        self._command = pid
        self._report({"started": pid})

    def run(self, wake: int) -> None:
        """Run until no process is left.

        Args:
            wake: file descriptor that yields the numbers of signals to this process.
        """
        self._take(b"")
        while not self._step():
            awaited = [wake] if self._owner is None else [wake, self._control.fileno()]
            ready, _, _ = select.select(awaited, [], [], self._pause())
            if wake in ready:
                now = time.monotonic()
                for number in os.read(wake, 4096):
                    self._heard[number] = now
            if self._owner is not None and self._control.fileno() in ready:
                self._read()

    # The command

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            except ChildProcessError:
                # This process adopts orphans, so without children it has no descendants.
                self._childless = True
                return
            self._childless = False
            if pid == 0:
                return
            if os.WIFSTOPPED(status):
                if pid == self._command:
                    self._report({"stopped": pid})
            elif os.WIFCONTINUED(status):
                if pid == self._command and self._owner_is_stopped():
                    # `corral run` had stopped with the command, so it resumes with it.
                    os.kill(self._owner or 0, signal.SIGCONT)
            elif pid == self._command:
                self._command = 0
                self._report({"exited": os.waitstatus_to_exitcode(status)})
                self._settle_until = time.monotonic() + self._settle

    def _forward(self, number: int) -> None:
        """Forward a signal that `corral run` has got, unless the command got it too, as part of the same group."""
        if not self._command:
            return
        heard = time.monotonic() - self._heard.get(number, -AT_ONCE_SECONDS) < AT_ONCE_SECONDS
        if not (heard and os.getpgid(self._command) == os.getpgrp()):
            self._send(number)

    def _send(self, number: int) -> None:
        with contextlib.suppress(OSError):
            (os.killpg if self._own_group else os.kill)(self._command, number)

    # The end

    def _step(self) -> bool:
        """Do what is due now: reap children, end processes, report to `corral run`. Returns true when all is done."""
        self._reap()
        now = time.monotonic()
        self._watch_owner(now)
        if self._command and not self._ending and now < self._kill_at:
            return False
        left = self._left(now)
        self._empty_scans = 0 if left or self._command else self._empty_scans + 1
        # A single scan may miss processes that are just being started.
        if self._empty_scans >= (1 if self._childless else 2):
            self._report({"done": True})
            return True
        if not self._ending and now < self._kill_at:
            if not left or now < self._settle_until:
                return False
            self._report({"ending": [str(one) for one in left]})
            self._end_in(self._grace)
        self._signal(left, now)
        return now >= self._give_up_at

    def _signal(self, left: Sequence[processes.Process], now: float) -> None:
        self._left_behind.end(left, kill=now >= self._kill_at)
        if now < self._kill_at + UNKILLABLE_SECONDS:
            return
        words = [f"{one} of {processes.user_of(one.pid)}" for one in left]
        if words != self._reported:
            self._reported = words
            self._report({"left": words})
        if self._owner is None:
            self._give_up_at = min(self._give_up_at, now + GIVE_UP_SECONDS)

    def _end_in(self, grace: float) -> None:
        """Begin to end all remaining processes: SIGTERM now, SIGKILL after the grace time in seconds."""
        self._ending = True
        self._kill_at = min(self._kill_at, time.monotonic() + grace)

    def _left(self, now: float) -> list[processes.Process]:
        """Processes that now work under the lease."""
        found = self._left_behind.find(now, {os.getpid(), self._owner or 0})
        if self._command and all(one.pid != self._command for one in found):
            # The command itself holds another lease (a `corral run`, for example), or this system has no `/proc`.
            found.append(processes.process(self._command) or processes.Process(self._command, 0, 0, "", "command"))
        self._scan_seconds = time.monotonic() - now
        return found

    def _pause(self) -> float:
        if self._command and not self._ending:
            return max(0.0, min(LOOK_SECONDS, self._kill_at - time.monotonic()))
        stuck = time.monotonic() > self._kill_at + UNKILLABLE_SECONDS
        return LOOK_SECONDS if stuck else max(SCAN_SECONDS, 4 * self._scan_seconds)

    # `corral run`

    def _watch_owner(self, now: float) -> None:
        """End the command if `corral run` has been stopped for the lease's time to live.

        A stopped `corral run` doesn't renew the lease, so its devices may then be granted to another owner.
        """
        if self._owner is None or self._ending:
            return
        if not self._owner_is_stopped():
            self._stopped_at = None
        elif self._stopped_at is None:
            self._stopped_at = now
        elif now - self._stopped_at >= self._ttl:
            self._end_in(self._grace)

    def _owner_is_stopped(self) -> bool:
        owner = None if self._owner is None else processes.process(self._owner)
        return owner is not None and owner.state == "T"

    def _read(self) -> None:
        try:
            piece = self._control.recv(65536)
        except OSError:
            piece = b""
        if not piece:
            self._owner = None
            # The lease was renewed within the last third of its time to live, so at least two thirds are left: all
            # processes are ended before the devices can be granted again.
            self._end_in(min(self._grace, self._ttl / 2))
            return
        self._take(piece)

    def _take(self, piece: bytes) -> None:
        self._buffer += piece
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "signal" in message:
                self._forward(message["signal"])
            if "end" in message:
                self._forward(signal.SIGTERM)
                self._forward(signal.SIGCONT)
                self._kill_at = min(self._kill_at, time.monotonic() + message["end"])

    def _report(self, message: dict[str, Any]) -> None:
        if self._owner is not None:
            with contextlib.suppress(OSError):
                self._control.sendall(json.dumps(message).encode() + b"\n")


def _execute(
    words: Sequence[str], ignored: Sequence[int], give: int, parent: int, own_group: bool, start_by: float
) -> None:
    """Execute the command in the child process; never returns."""
    try:
        if own_group:
            os.setpgid(0, 0)
        # If the reaper is killed before the command ends, the kernel ends the command.
        if not processes.end_with_parent(parent):
            os._exit(1)
        processes.restore_signals(ignored)
        if time.clock_gettime(_CLOCK) > start_by:
            os.write(give, json.dumps({"late": True}).encode())
            return
        error = processes.execute(words)
        os.write(give, json.dumps({"failed": error.errno, "message": error.strerror}).encode())
    finally:
        os._exit(127)


def _wake(number: int, frame: object) -> None:
    """Signal handler that does nothing: the signal's number is read from the wake-up file descriptor."""


def _first_line(control: socket.socket) -> tuple[bytes, bytes]:
    """Read the first message of `corral run`, and any bytes after it; both are empty if `corral run` has ended."""
    buffer = b""
    while b"\n" not in buffer:
        piece = control.recv(65536)
        if not piece:
            return b"", b""
        buffer += piece
    line, _, rest = buffer.partition(b"\n")
    return line, rest


def _let_go(kept: Sequence[int]) -> None:
    """Close inherited file descriptors except `kept`, so that a reader of the command's output sees its end in time."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    for name in os.listdir("/dev/fd"):
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))


def main() -> None:
    """Run the reaper: read what to start, start it, and supervise it until its end."""
    lease_id, number, owner = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    control = socket.socket(fileno=number)
    control.set_inheritable(False)
    processes.become_subreaper()
    processes.set_name("corral-reaper")
    # The reaper survives all signals, and records them. It was started with all of them blocked.
    receive, give = processes.catch_signals(_wake)
    line, rest = _first_line(control)
    if not line:
        return
    asked: dict[str, Any] = json.loads(line)
    reaper = Reaper(control, lease_id, owner, asked, rest)
    reaper.begin(asked["command"], asked["ignored"])
    _let_go((control.fileno(), receive, give))
    reaper.run(receive)


if __name__ == "__main__":
    main()
