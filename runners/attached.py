"""The process of a session inside a run: starts a command for it, and relays between that and the runner.

The run's supervisor forks it, so that the session is confined as the run is, counts as part of it, and ends with it.
It connects to the runner by a socket in the run's folder. Both sides send frames: kind, length, content. When the
connection ends, it ends the command with all that this has started; so it does when the command has ended.

It uses only the standard library, since `supervisor.py` loads it by its path.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys
import termios
import time
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING or __package__:
    from ..bus import processes
    from . import execution
else:
    processes = sys.modules["corral_processes"]
    execution = sys.modules["corral_execution"]

HEADER: Final = struct.Struct(">BI")
"""Kind and length of a frame."""
# Frames of the runner.
INPUT: Final = 1
INPUT_ENDED: Final = 2
SIZE: Final = 3
SIGNAL: Final = 4
MORE: Final = 5
"""A frame of output was taken, so that one more may come."""
# Frames of this process.
OUTPUT: Final = 11
ERROR_OUTPUT: Final = 12
TAKEN: Final = 13
"""All of an input was written."""
EXIT: Final = 14

FRAMES_AHEAD: Final = 4
"""Frames of output that are sent before the runner has taken the first of them."""
FRAME_BYTES: Final = 16 * 1024
KILL_SECONDS: Final = 1.0
"""Time between SIGTERM and SIGKILL for what is left of a session."""
UNKILLABLE_SECONDS: Final = 3.0
"""Time after SIGKILL when what is left is left to the supervisor."""
_END_OF_INPUT: Final = b"\x04"
"""Control-D, with which a terminal's input ends."""
_SIZE: Final = struct.Struct(">HH")
_NO_LOGIN: Final = ("nologin", "false")


def fork(folder: str, wanted: dict[str, Any], command: dict[str, Any], start: dict[str, Any]) -> int:
    """Start the process of a session.

    Args:
        folder: of the run.
        wanted: what the runner has asked for; see `runners/sessions.py`.
        command: first command of the run, whose environment the session's has.
        start: account and directory of the run.

    Returns:
        Its process id.
    """
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            wake, give = processes.new_wakeup()
            # What the supervisor has open is not for this process.
            for name in os.listdir("/proc/self/fd"):
                if int(name) not in (0, 1, 2, wake, give):
                    with contextlib.suppress(OSError):
                        os.close(int(name))
            if processes.end_with_parent(parent):
                processes.become_subreaper()
                processes.set_name("corral-attach")
                _Attached(_connect(folder, wanted["socket"]), wanted, command, start, wake).run()
        finally:
            os._exit(0)
    return pid


def _connect(folder: str, name: str) -> socket.socket:
    """Connect to a socket, whose path may be longer than the address of a socket."""
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        control.connect(f"/proc/self/fd/{place}/{name}")
    finally:
        os.close(place)
    control.setblocking(False)
    return control


class _Attached:
    """A session from its start to its end."""

    def __init__(
        self,
        control: socket.socket,
        wanted: dict[str, Any],
        command: dict[str, Any],
        start: dict[str, Any],
        wake: int,
    ) -> None:
        self._control = control
        self._wanted = wanted
        self._start = start
        self._wake = wake
        environment = command["environment"] | wanted["environment"]
        shell = environment.get("SHELL", "")
        if not shell or os.path.basename(shell) in _NO_LOGIN:
            shell = "/bin/sh"
        self._command = {"words": wanted["words"] or [shell], "environment": environment}
        self._received = b""
        self._sending = b""
        self._more = FRAMES_AHEAD
        self._input = b""
        self._input_ended = False
        self._outputs: dict[int, int] = {}
        self._input_file = -1
        self._pid = 0
        self._status: int | None = None
        self._lost = False

    def run(self) -> None:
        """Start the command, and relay until it has ended, or the runner is gone."""
        failure = self._begin()
        if failure is None:
            while not self._over():
                self._step()
            self._close_files()
            self._end()
        if not self._lost:
            self._send(EXIT, json.dumps(self._exit(failure)).encode())
            self._flush()
            self._await_close()

    def _begin(self) -> dict[str, Any] | None:
        size = self._wanted["terminal"]
        if size is not None:
            ours, theirs = os.openpty()
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
            self._pid, failure = execution.start(self._command, self._start, (theirs, theirs, theirs), terminal=True)
            os.close(theirs)
            self._input_file, self._outputs = ours, {ours: OUTPUT}
        else:
            (given, give), (output, write), (errors, write_errors) = os.pipe(), os.pipe(), os.pipe()
            self._pid, failure = execution.start(self._command, self._start, (given, write, write_errors))
            for file in (given, write, write_errors):
                os.close(file)
            self._input_file, self._outputs = give, {output: OUTPUT, errors: ERROR_OUTPUT}
        for file in {self._input_file, *self._outputs}:
            os.set_blocking(file, False)
        return failure

    def _exit(self, failure: dict[str, Any] | None) -> dict[str, Any]:
        if failure is not None:
            return {"failed": True, "exit_code": failure["code"], "message": failure["message"]}
        code = os.waitstatus_to_exitcode(self._status) if self._status is not None else None
        if code is None:
            return {}
        return {"signal": -code} if code < 0 else {"exit_code": code}

    # Relaying

    def _over(self) -> bool:
        if self._lost:
            return True
        if self._status is None or self._sending:
            return False
        if not self._outputs:
            return True
        # What it has started may still have the files open: only what is there already is waited for.
        poll = select.poll()
        for file in self._outputs:
            poll.register(file, select.POLLIN)
        return not any(event & select.POLLIN for _, event in poll.poll(0))

    def _step(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(self._control, select.POLLIN | (select.POLLOUT if self._sending else 0))
        events: dict[int, int] = {}
        if self._more > 0 and not self._sending:
            events = dict.fromkeys(self._outputs, select.POLLIN)
        if self._input and self._input_file >= 0:
            events[self._input_file] = events.get(self._input_file, 0) | select.POLLOUT
        for file, event in events.items():
            poll.register(file, event)
        for file, event in poll.poll():
            if file == self._wake:
                self._woken()
            elif file == self._control.fileno():
                self._flush_some()
                self._receive()
            elif event & select.POLLOUT and file == self._input_file:
                self._write_input()
            if file in self._outputs and event & (select.POLLIN | select.POLLHUP | select.POLLERR):
                self._read_output(file)
            elif file == self._input_file and file not in self._outputs and event & (select.POLLERR | select.POLLHUP):
                self._input_gone()

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            if signal.SIGTERM in os.read(self._wake, 4096):
                self._lost = True
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                if pid == self._pid:
                    self._status = status

    def _read_output(self, file: int) -> None:
        if self._more <= 0 or self._sending:
            return
        try:
            data = os.read(file, FRAME_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.EIO:  # nothing has the other side of the terminal open
                raise
            data = b""
        if data:
            self._more -= 1
            self._send(self._outputs[file], data)
            return
        del self._outputs[file]
        if file != self._input_file:
            os.close(file)
        elif self._status is None:
            # The command goes on without its terminal.
            self._input_gone()

    def _write_input(self) -> None:
        try:
            written = os.write(self._input_file, self._input)
        except BlockingIOError:
            return
        except OSError:
            self._input_gone()
            return
        self._input = self._input[written:]
        if not self._input:
            self._input_written()

    def _input_written(self) -> None:
        if self._input_ended and self._input_file >= 0:
            if self._wanted["terminal"] is None:
                os.close(self._input_file)
                self._input_file = -1
            else:
                with contextlib.suppress(OSError):
                    os.write(self._input_file, _END_OF_INPUT)
        self._send(TAKEN, b"")

    def _input_gone(self) -> None:
        """Drop input that nothing reads any more."""
        if self._input_file >= 0 and self._input_file not in self._outputs:
            os.close(self._input_file)
        self._input_file = -1
        if self._input:
            self._input = b""
            self._send(TAKEN, b"")

    # Frames

    def _receive(self) -> None:
        try:
            piece = self._control.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        if not piece:
            self._lost = True
            return
        self._received += piece
        while len(self._received) >= HEADER.size:
            kind, length = HEADER.unpack_from(self._received)
            end = HEADER.size + length
            if len(self._received) < end:
                return
            content, self._received = self._received[HEADER.size : end], self._received[end:]
            self._take(kind, content)

    def _take(self, kind: int, content: bytes) -> None:
        if kind == INPUT:
            if self._input_file < 0 or not content:
                self._input_written()
            else:
                self._input += content
        elif kind == INPUT_ENDED:
            self._input_ended = True
        elif kind == SIZE and self._wanted["terminal"] is not None:
            with contextlib.suppress(OSError):
                size = struct.pack("HHHH", *_SIZE.unpack(content), 0, 0)
                fcntl.ioctl(next(iter(self._outputs), self._input_file), termios.TIOCSWINSZ, size)
        elif kind == SIGNAL and self._status is None:
            with contextlib.suppress(OSError):
                os.killpg(self._pid, content[0])
        elif kind == MORE:
            self._more += 1

    def _send(self, kind: int, content: bytes) -> None:
        self._sending += HEADER.pack(kind, len(content)) + content
        self._flush_some()

    def _flush_some(self) -> None:
        if not self._sending:
            return
        try:
            self._sending = self._sending[self._control.send(self._sending) :]
        except BlockingIOError:
            return
        except OSError:
            self._sending, self._lost = b"", True

    def _flush(self) -> None:
        end = time.monotonic() + 5.0
        while self._sending and time.monotonic() < end:
            select.select([], [self._control], [], 0.5)
            self._flush_some()

    def _await_close(self) -> None:
        """Wait until the runner has closed the connection: it has read everything then.

        Closing it with something unread, such as a request for more output, is an error at the other end, for which
        asyncio drops what it has not handed on yet.
        """
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)
            self._control.settimeout(5.0)
            while self._control.recv(65536):
                pass

    # The end

    def _close_files(self) -> None:
        """Close the command's files: with its terminal, the kernel sends it SIGHUP."""
        for file in {self._input_file, *self._outputs} - {-1}:
            with contextlib.suppress(OSError):
                os.close(file)

    def _end(self) -> None:
        """End what is left of the session."""
        left_behind = processes.LeftBehind("", os.getpid(), 0)
        if self._status is None:
            with contextlib.suppress(OSError):
                os.killpg(self._pid, signal.SIGHUP)
        kill_at = time.monotonic() + KILL_SECONDS
        while True:
            self._woken()
            left = left_behind.find(time.monotonic())
            if not left or time.monotonic() >= kill_at + UNKILLABLE_SECONDS:
                return
            left_behind.end(left, kill=time.monotonic() >= kill_at)
            time.sleep(0.02)
