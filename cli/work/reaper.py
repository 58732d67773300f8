"""The process between `corral run` and its command: it ends whatever the command leaves behind, whoever dies first.

It starts the command, takes over its orphans (prctl(2), PR_SET_CHILD_SUBREAPER), so that none of them leaves the tree,
and lives until the last one has ended. When `corral run` is gone, however it went, the command and all that it has
started is ended. It speaks JSON lines with `corral run` over a socket; `cli/work/children.py` is the other side.

Started by its path with nothing but the standard library, so that it is there within milliseconds and stays small.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
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
    from ...client import processes
else:
    _PLACE = Path(__file__).resolve().parents[2] / "client" / "processes.py"
    _SPEC = importlib.util.spec_from_file_location("processes", _PLACE)
    processes = importlib.util.module_from_spec(_SPEC)
    _SPEC.loader.exec_module(processes)

LOOK_SECONDS: Final = 1.0
"""It looks so often whether `corral run` is stopped, and for what names the lease without descending from here."""
SCAN_SECONDS: Final = 0.05
UNKILLABLE_SECONDS: Final = 3.0
"""What is there so long after SIGKILL is told: it is another user's, or stuck in the kernel."""
GIVE_UP_SECONDS: Final = 60.0
"""It waits no longer for what can't be killed where nobody is there any more to be told."""
AT_ONCE_SECONDS: Final = 1.0
"""A signal that reached this group so shortly before has reached the command, too."""
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
_PR_SET_CHILD_SUBREAPER: Final = 36
_CLOCK: Final[int] = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""As `bus/elapsed.py`: it counts a machine's sleep."""
_UNCATCHABLE: Final = (signal.SIGKILL, signal.SIGSTOP)
_FAULTS: Final = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP)


def become_subreaper() -> None:
    """Orphans among the descendants of this process become its children (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _named_for_lists_of_processes() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, b"corral-reaper", 0, 0, 0)


class Reaper:
    """A command and all that it has started.

    Args:
        control: to `corral run`.
        lease_id: that the command works under; empty where it works under none here.
        owner: process id of `corral run`.
        asked: its first message; see `cli/work/children.py`.
        rest: what came behind that.
    """

    def __init__(
        self, control: socket.socket, lease_id: str, owner: int, asked: dict[str, Any], rest: bytes = b""
    ) -> None:
        self._control = control
        self._lease_id = lease_id
        self._owner: int | None = owner
        self._grace: float = asked["grace_seconds"]
        self._ttl: float = asked["ttl_seconds"]
        self._settle: float = asked["settle_seconds"]
        self._own_group: bool = asked["own_group"]
        self._start_by: float = asked["start_by"] or math.inf
        # Orphans are adopted by whoever they are started under: here, or `corral run` where a reaper was killed.
        self._top = os.getpid() if asked["command"] else owner
        own = processes.process(os.getpid())
        self._since = own.started_ticks if own is not None and asked["command"] else 0
        self._command = 0
        self._buffer = rest
        self._heard: dict[int, float] = {}
        self._stopped_at: float | None = None
        self._settle_until = math.inf
        self._ending = False
        self._kill_at = math.inf
        self._give_up_at = math.inf
        self._termed: set[tuple[int, int]] = set()
        self._told: list[str] = []
        self._search_at = -math.inf
        self._named: list[processes.Process] = []
        self._childless = False
        self._empty_scans = 0
        self._scan_seconds = 0.0

    def begin(self, words: Sequence[str], ignored: Sequence[int]) -> None:
        """Start the command; without one, end what is there."""
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
            self._tell(json.loads(failed))
            return
        self._command = pid
        self._tell({"started": pid})

    def run(self, wake: int) -> None:
        """Until nothing is left.

        Args:
            wake: tells the numbers of signals that this process got.
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
                # Orphans come here, so without children nothing descends from here.
                self._childless = True
                return
            self._childless = False
            if pid == 0:
                return
            if os.WIFSTOPPED(status):
                if pid == self._command:
                    self._tell({"stopped": pid})
            elif os.WIFCONTINUED(status):
                if pid == self._command and self._owner_is_stopped():
                    # It had stopped with the command, and goes on with it.
                    os.kill(self._owner or 0, signal.SIGCONT)
            elif pid == self._command:
                self._command = 0
                self._tell({"exited": os.waitstatus_to_exitcode(status)})
                self._settle_until = time.monotonic() + self._settle

    def _forward(self, number: int) -> None:
        """Hand on what `corral run` has heard, unless the command has heard it too, being of the same group."""
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
        """What is due now. Returns whether all is done."""
        self._reap()
        now = time.monotonic()
        self._watch_owner(now)
        if self._command and not self._ending and now < self._kill_at:
            return False
        left = self._left(now)
        self._empty_scans = 0 if left or self._command else self._empty_scans + 1
        # One look at processes that come and go may miss some.
        if self._empty_scans >= (1 if self._childless else 2):
            self._tell({"done": True})
            return True
        if not self._ending and now < self._kill_at:
            if not left or now < self._settle_until:
                return False
            self._tell({"ending": [str(one) for one in left]})
            self._end_in(self._grace)
        self._signal(left, now)
        return now >= self._give_up_at

    def _signal(self, left: Sequence[processes.Process], now: float) -> None:
        for one in left:
            if now >= self._kill_at:
                processes.send(one, signal.SIGKILL)
            elif (one.pid, one.started_ticks) not in self._termed:
                self._termed.add((one.pid, one.started_ticks))
                processes.send(one, signal.SIGTERM)
                # One that is stopped would not hear it.
                processes.send(one, signal.SIGCONT)
        if now < self._kill_at + UNKILLABLE_SECONDS:
            return
        words = [f"{one} of {processes.user_of(one.pid)}" for one in left]
        if words != self._told:
            self._told = words
            self._tell({"left": words})
        if self._owner is None:
            self._give_up_at = min(self._give_up_at, now + GIVE_UP_SECONDS)

    def _end_in(self, grace: float) -> None:
        """SIGTERM to all that is left, SIGKILL after the grace time."""
        self._ending = True
        self._kill_at = min(self._kill_at, time.monotonic() + grace)

    def _left(self, now: float) -> list[processes.Process]:
        """What works under the lease now. Environments are read once a second alone: there may be many."""
        if self._lease_id and now >= self._search_at:
            self._search_at = now + LOOK_SECONDS
            self._named = processes.naming(self._lease_id, since_ticks=self._since)
        tops = [self._top, *(one.pid for one in self._named if processes.same(one))]
        found = processes.working(self._lease_id, tops, spared={os.getpid(), self._owner or 0, self._top})
        if self._command and all(one.pid != self._command for one in found):
            # It holds a lease of its own, as `corral run` does, or there is no table of processes here.
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
        """A `corral run` that is stopped renews nothing: after the lease's time its devices are another's."""
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
            # The lease was renewed within the last third of its time: all is ended before it is another's.
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

    def _tell(self, message: dict[str, Any]) -> None:
        if self._owner is not None:
            with contextlib.suppress(OSError):
                self._control.sendall(json.dumps(message).encode() + b"\n")


def _execute(
    words: Sequence[str], ignored: Sequence[int], give: int, parent: int, own_group: bool, start_by: float
) -> None:
    """Become the command; never returns."""
    try:
        if own_group:
            os.setpgid(0, 0)
        if sys.platform == "linux":
            # Its reaper should not die before it; where somebody kills that all the same, it ends.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
            if os.getppid() != parent:
                os._exit(1)
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            if number not in _UNCATCHABLE:
                with contextlib.suppress(OSError, ValueError):
                    signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if time.clock_gettime(_CLOCK) > start_by:
            os.write(give, json.dumps({"late": True}).encode())
            return
        error = execute(words)
        os.write(give, json.dumps({"failed": error.errno, "message": error.strerror}).encode())
    finally:
        os._exit(127)


def execute(words: Sequence[str]) -> OSError:
    """Execute a command as a shell does: found in the PATH, and by `/bin/sh` where it is a script without `#!`.

    Returns:
        Why it could not be; otherwise it never returns.
    """
    name = words[0]
    paths = [name] if "/" in name else [os.path.join(folder, name) for folder in os.get_exec_path()]
    failed: OSError = FileNotFoundError(errno.ENOENT, "command not found")
    for path in paths:
        try:
            os.execv(path, list(words))
        except (FileNotFoundError, NotADirectoryError):
            if os.path.exists(path):
                failed = OSError(errno.ENOENT, "the interpreter that its first line names is not there")
        except OSError as error:
            if error.errno == errno.ENOEXEC and _is_text(path):
                os.execv("/bin/sh", ["/bin/sh", path, *words[1:]])
            if error.errno != errno.EACCES or "/" in name:
                return error
            # As a shell does: another one further on in the PATH may be allowed.
            failed = error
    return failed


def _is_text(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return b"\0" not in file.readline(1024)
    except OSError:
        return True


def _wake(number: int, frame: object) -> None:
    """Nothing: that it was heard is read from the wake-up file."""


def _first_line(control: socket.socket) -> tuple[bytes, bytes]:
    """What `corral run` says first, and what it may have said behind it; nothing where it is gone."""
    buffer = b""
    while b"\n" not in buffer:
        piece = control.recv(65536)
        if not piece:
            return b"", b""
        buffer += piece
    line, _, rest = buffer.partition(b"\n")
    return line, rest


def _let_go(kept: Sequence[int]) -> None:
    """Close what was inherited: whoever reads the command's output sees its end with the command's own."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    for name in os.listdir("/dev/fd"):
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))


def main() -> None:
    """Read what to start, and see to it until its end."""
    lease_id, number, owner = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    control = socket.socket(fileno=number)
    control.set_inheritable(False)
    receive, give = os.pipe()
    os.set_blocking(receive, False)
    os.set_blocking(give, False)
    become_subreaper()
    _named_for_lists_of_processes()
    # It outlives all that it may be told, and hears of it. It was started with all of them blocked.
    for one in signal.valid_signals():
        if one not in (*_UNCATCHABLE, *_FAULTS):
            with contextlib.suppress(OSError, ValueError):
                signal.signal(one, _wake)
    signal.set_wakeup_fd(give, warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
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
