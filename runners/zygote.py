"""The zygote of a runner: a small process that is forked for each run, so that a supervisor starts within milliseconds.

It reads runs, a line each, from a socket. When the runner has ended, the supervisors go on, and so does this
process until the last of them has ended: where one is killed, it ends what that one has left.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import math
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING or __package__:
    from . import supervisor
else:
    _SPEC = importlib.util.spec_from_file_location("supervisor", Path(__file__).resolve().parent / "supervisor.py")
    supervisor = importlib.util.module_from_spec(_SPEC)
    _SPEC.loader.exec_module(supervisor)

processes = supervisor.processes

IDLE_SECONDS: Final = 5.0
"""Time that a supervisor waits for a further run."""
MOST_RUNS: Final = 1000
"""Runs that one process supervises, in turn."""
ORPHANS_MS: Final = 100


def _nothing(number: int, frame: object) -> None:
    """Signal handler that does nothing: it only wakes `select`."""


def supervise_in_turn(line: bytes, control: socket.socket, wake: int) -> None:
    """Supervise a run, and further ones as long as each was short and has ended plainly.

    Args:
        line: folder of the run and what to start, with a tabulator in between.
        control: socket to the zygote, which gets a byte when this process waits for a further run.
        wake: file descriptor that yields the numbers of signals to this process.
    """
    for number in range(MOST_RUNS):
        folder, _, start = line.rpartition(b"\t")
        if not supervisor.supervise(folder.decode(), wake, start, reused=number > 0, lasting=control.close):
            return
        line = b""
        # It is closed here if the run was a long one, and there if there is none to come.
        with contextlib.suppress(OSError):
            control.sendall(b".")
            while piece := control.recv(65536):
                line += piece
                if line.endswith(b"\n"):
                    break
        if not line.endswith(b"\n"):
            return


class Zygote:
    """Forks supervisors until its socket is closed, and waits for their end.

    Args:
        control: socket to the runner.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._buffer = b""
        self._supervisors: set[int] = set()
        self._sockets: dict[int, socket.socket] = {}
        """Of the supervisors that may take a further run, by file descriptor."""
        self._idle: dict[int, float] = {}
        """Those that wait for one, and since when; the last one is the first to get one."""
        self._poll = select.poll()

    def run(self) -> None:
        """Hand each run to a supervisor, until the runner and all supervisors have ended."""
        wake, give = processes.catch_signals(_nothing)
        control = self._control.fileno()
        for file in (wake, control):
            self._poll.register(file, select.POLLIN)
        is_open, orphans = True, False
        while is_open or self._supervisors or orphans:
            for file, _ in self._poll.poll(ORPHANS_MS if orphans else IDLE_SECONDS * 1000 if self._idle else None):
                if file == wake:
                    os.read(wake, 4096)
                    # Where a supervisor was killed, what it had adopted is a child of this process now.
                    orphans = self._reap() or orphans
                elif file != control:
                    self._heard(file, is_open=is_open)
                elif not self._read((wake, give)):
                    is_open = False
                    self._poll.unregister(control)
                    self._dismiss(math.inf)
            orphans = orphans and self._end_orphans()
            self._dismiss(time.monotonic() - IDLE_SECONDS)

    def _read(self, pipe: tuple[int, int]) -> bool:
        """Read runs from the runner. Returns false once that has ended."""
        piece = self._control.recv(65536)
        *lines, self._buffer = (self._buffer + piece).split(b"\n")
        for line in lines:
            if not self._reuse(line):
                self._fork(line, pipe)
        return piece != b""

    def _heard(self, file: int, *, is_open: bool) -> None:
        """A supervisor waits for a further run, or will take none."""
        if os.read(file, 16) and is_open:
            self._idle[file] = time.monotonic()
        else:
            self._forget(file)

    def _reuse(self, line: bytes) -> bool:
        """Hand a run to a supervisor that waits for one. Returns false if there is none."""
        while self._idle:
            file, _ = self._idle.popitem()
            try:
                self._sockets[file].sendall(line + b"\n")
            except OSError:  # it was killed
                self._forget(file)
            else:
                return True
        return False

    def _dismiss(self, before: float) -> None:
        """End the supervisors that have waited since then."""
        for file in [file for file, since in self._idle.items() if since <= before]:
            self._forget(file)

    def _forget(self, file: int) -> None:
        self._idle.pop(file, None)
        self._poll.unregister(file)
        self._sockets.pop(file).close()

    def _fork(self, line: bytes, pipe: tuple[int, int]) -> None:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid:
            theirs.close()
            self._supervisors.add(pid)
            self._sockets[ours.fileno()] = ours
            self._poll.register(ours.fileno(), select.POLLIN)
            return
        code = 1
        try:
            os.setsid()
            wake, _ = processes.new_wakeup()
            for number in (*pipe, *self._sockets, ours.fileno(), self._control.fileno()):
                os.close(number)
            supervise_in_turn(line, theirs, wake)
            code = 0
        finally:
            os._exit(code)

    def _reap(self) -> bool:
        """Reap children. Returns true if a supervisor has ended otherwise than by itself, or something else has."""
        unusual = False
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
                pid, status = ended
                unusual = unusual or status != 0 or pid not in self._supervisors
                self._supervisors.discard(pid)
        return unusual

    def _end_orphans(self) -> bool:
        """End the processes that a killed supervisor had adopted. Returns true while there are any."""
        try:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        except OSError:
            return False
        orphans = [int(child) for child in children if int(child) not in self._supervisors]
        for pid in orphans:
            if (one := processes.process(pid)) is not None:
                processes.send(one, signal.SIGKILL)
        return bool(orphans)


def main() -> None:
    """Run the zygote; its argument is the number of the socket's file descriptor."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    processes.become_subreaper()
    processes.set_name("corral-zygote")
    supervisor.boot_id()
    # Collections would copy the pages that forks share with this process.
    gc.disable()
    gc.freeze()
    Zygote(control).run()


if __name__ == "__main__":
    main()
