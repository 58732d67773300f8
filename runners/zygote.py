"""The zygote of a runner: a small process that is forked for each run, so that a supervisor starts within milliseconds.

It reads folders of runs, a line each, from a socket. It ends with the runner; the supervisors go on.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import select
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from . import supervisor
else:
    _SPEC = importlib.util.spec_from_file_location("supervisor", Path(__file__).resolve().parent / "supervisor.py")
    supervisor = importlib.util.module_from_spec(_SPEC)
    _SPEC.loader.exec_module(supervisor)

processes = supervisor.processes


def _nothing(number: int, frame: object) -> None:
    """Signal handler that does nothing: it only wakes `select`."""


class Zygote:
    """Forks supervisors until its socket is closed.

    Args:
        control: socket to the runner.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._buffer = b""
        self._supervisors: set[int] = set()

    def run(self) -> None:
        """Fork a supervisor for each folder, until the runner has ended."""
        wake, give = processes.catch_signals(_nothing)
        while True:
            # Where a supervisor was killed, what it had adopted is a child of this process now.
            orphans = self._reap()
            ready, _, _ = select.select([wake, self._control], [], [], 0.1 if orphans else None)
            if wake in ready:
                os.read(wake, 4096)
            if self._control in ready:
                piece = self._control.recv(65536)
                if not piece:
                    return
                *lines, self._buffer = (self._buffer + piece).split(b"\n")
                for line in lines:
                    self._fork(line.decode(), (wake, give))

    def _fork(self, folder: str, pipe: tuple[int, int]) -> None:
        pid = os.fork()
        if pid:
            self._supervisors.add(pid)
            return
        code = 1
        try:
            os.setsid()
            wake, _ = processes.new_wakeup()
            for number in pipe:
                os.close(number)
            self._control.close()
            supervisor.supervise(folder, wake)
            code = 0
        finally:
            os._exit(code)

    def _reap(self) -> bool:
        """Reap children. Returns true while processes are left that a killed supervisor had adopted."""
        with contextlib.suppress(ChildProcessError):
            while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                self._supervisors.discard(pid)
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
