"""A small process that forks one child for each connection, so that what a child does to itself harms nobody else.

The processor is too large to fork and has many threads. This process has one thread and only what it was started with,
so a fork takes a few milliseconds or less. A connection is one end of a Unix socket pair, handed over on a control
socket; the child has its own copy of everything, and is gone once it has answered.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable, Generator
from typing import Final

_LENGTH: Final = struct.Struct("!I")
_FORK: Final = b"f"


def write_frame(connection: socket.socket, body: bytes) -> None:
    """Send a message with its length in front."""
    connection.sendall(_LENGTH.pack(len(body)) + body)


def read_frame(connection: socket.socket) -> bytes:
    """Receive a message; empty if the other end closed the connection before all of it arrived."""
    head = _read(connection, _LENGTH.size)
    return _read(connection, _LENGTH.unpack(head)[0]) if head else b""


def _read(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(min(size - len(parts), 2**18))
        if not part:
            return b""
        parts += part
    return bytes(parts)


def fork_remotely(control: socket.socket) -> socket.socket:
    """Connect to a new child of the process at the other end of a control socket.

    Raises:
        OSError: that process is gone.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            socket.send_fds(control, [_FORK], [theirs.fileno()])
        except OSError:
            ours.close()
            raise
    return ours


def is_open(control: socket.socket) -> bool:
    """True while the process at the other end of a control socket lives. It sends nothing there."""
    with contextlib.suppress(OSError, ValueError):  # it is closed here
        ready = select.poll()
        ready.register(control, select.POLLIN)
        return not ready.poll(0)
    return False


def serve(control: socket.socket, handle: Callable[[socket.socket], None]) -> None:
    """Fork a child for each connection, and run `handle` in it; return once the control socket is closed."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        for descriptor in descriptors:
            connection = socket.socket(fileno=descriptor)
            if os.fork() == 0:
                control.close()
                _run_and_exit(handle, connection)
            connection.close()


def _run_and_exit(handle: Callable[[socket.socket], None], connection: socket.socket) -> None:
    code = 1
    try:
        handle(connection)
        code = 0
    except (MemoryError, BrokenPipeError, ConnectionResetError):
        pass
    finally:
        os._exit(code)


@contextlib.contextmanager
def limited(cpu_seconds: float, wall_seconds: float, memory_bytes: int) -> Generator[None]:
    """Limit this process during a block. The kernel holds the limits, whatever the process is doing.

    Args:
        cpu_seconds: processor time; beyond it the process is ended.
        wall_seconds: time altogether; beyond it the process is ended.
        memory_bytes: address space that may be added, on Linux; beyond it allocations fail.
    """
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (address_space_bytes() + memory_bytes, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    signal.setitimer(signal.ITIMER_REAL, wall_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def address_space_bytes() -> int:
    """Address space of this process; 0 where it can't be read."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def prepare_this_process() -> None:
    """Have the kernel reap children, and end them at their limits; leave Ctrl-C to the one that started this."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
