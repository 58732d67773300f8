"""Signals and the terminal of a command that holds a lease: handled once, from before the request to after the release.

A signal that comes while a lease is asked for ends the asking. One that comes later goes to the command, or, before
there is one, keeps it from being started. While the lease is given back there is nothing left to end, and that takes
seconds at most. What this process was started to ignore (as `nohup` does SIGHUP) it ignores, and so does the command.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import termios
from collections.abc import Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from ...client import processes
from ..options import cancel_surely

T = TypeVar("T")

HARMLESS: Final = frozenset({signal.SIGWINCH, signal.SIGCONT, signal.SIGTSTP})
"""They end no process, whether it handles them or not."""
_STALE_SECONDS: Final = 0.05
"""A command that was stopped together with this process is told of when both go on again."""
_NOT_OURS: Final = frozenset(
    {
        # Nobody can catch these; those mean this process itself, not the command.
        *(signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ),
        *(signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS),
        # Timers, and files that are ready: set up by whoever gets them.
        *(signal.SIGPROF, signal.SIGVTALRM, signal.SIGURG, signal.SIGIO),
        # A terminal stops this process together with the command.
        *(signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU),
    }
)


class Interrupted(Exception):
    """A signal has ended the work before there was a command to give it to.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by signal {number}")
        self.number = number

    @property
    def code(self) -> int:
        """The exit code, as of a process that the signal has ended."""
        return 128 + self.number


class Signals:
    """The signals to this process while it holds a lease, or asks for one. Enter it within a running loop.

    Args:
        stoppable: no terminal stops the command together with this process: SIGTSTP to this process is handed on.

    Attributes:
        ignored: signals that this process was started to ignore.
    """

    def __init__(self, *, stoppable: bool = False) -> None:
        self.ignored = [
            number
            for number in sorted(signal.valid_signals())
            # Python itself ignores two, whatever was so before.
            if number not in (signal.SIGPIPE, signal.SIGXFSZ) and signal.getsignal(number) is signal.SIG_IGN
        ]
        self._loop = asyncio.get_running_loop()
        handled = signal.valid_signals() - _NOT_OURS | ({signal.SIGTSTP} if stoppable else set())
        self._numbers = sorted(handled - set(self.ignored))
        self._receiver: Callable[[int], None] | None = None
        self._pending: list[int] = []

    def __enter__(self) -> Self:
        if signal.SIGCHLD in self.ignored:
            # Else nobody would learn how the command has ended.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in self._numbers:
            # Some systems keep numbers to themselves.
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                self._loop.add_signal_handler(number, functools.partial(self._hear, number))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in self._numbers:
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                self._loop.remove_signal_handler(number)

    async def unless_interrupted(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of work that a signal ends.

        Raises:
            Interrupted: one did.
        """
        task = asyncio.create_task(work)
        with self.to(lambda number: None if number in HARMLESS else self._interrupt(task, number)):
            try:
                return await task
            except asyncio.CancelledError:
                self.check()
                raise

    def check(self) -> None:
        """Raise `Interrupted` if a signal waits for a command that is not there yet."""
        for number in self._pending:
            if number not in HARMLESS:
                raise Interrupted(number)

    @contextlib.contextmanager
    def to(self, receiver: Callable[[int], None]) -> Generator[None]:
        """Give signals to a receiver for the length of a block, those first that nobody got yet."""
        self._receiver = receiver
        pending, self._pending = self._pending, []
        for number in pending:
            receiver(number)
        try:
            yield
        finally:
            self._receiver = None

    def _hear(self, number: int) -> None:
        if number == signal.SIGTSTP:
            self._stop()
        elif self._receiver is not None:
            self._receiver(number)
        else:
            self._pending.append(number)

    def _stop(self) -> None:
        if self._receiver is not None:
            self._receiver(signal.SIGTSTP)
        os.kill(os.getpid(), signal.SIGSTOP)

    def _interrupt(self, task: asyncio.Task[Any], number: int) -> None:
        # The first ends it. Taking a request back is a matter of a moment, and the next would interrupt that.
        if not any(known not in HARMLESS for known in self._pending):
            cancel_surely(task)
        self._pending.append(number)


class Terminal:
    """The terminal that controls this process, whatever its input is connected to; there may be none.

    A command shares this process's group there, so that it may read from the terminal, and that Ctrl-C and Ctrl-Z
    reach both at once, with whoever else is in the same pipe.
    """

    def __init__(self) -> None:
        try:
            self._file = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            self._file = -1
        self._settings: list[Any] | None = None
        if self.in_foreground:
            with contextlib.suppress(termios.error):
                self._settings = termios.tcgetattr(self._file)

    @property
    def is_there(self) -> bool:
        """Whether a terminal controls this process."""
        return self._file >= 0

    @property
    def in_foreground(self) -> bool:
        """Whether the terminal is this process group's now."""
        with contextlib.suppress(OSError):
            return self.is_there and os.tcgetpgrp(self._file) == os.getpgrp()
        return False

    def stop_with(self, pid: int) -> None:
        """Stop with a command that has stopped by itself (an editor's Ctrl-Z, `suspend` in a shell), so that the shell
        around both has the terminal again."""
        if self.is_there:
            loop = asyncio.get_running_loop()
            loop.call_later(_STALE_SECONDS, self._stop_with, pid, loop.time() + 2 * _STALE_SECONDS)

    def _stop_with(self, pid: int, latest: float) -> None:
        if asyncio.get_running_loop().time() > latest:
            # This process was stopped itself meanwhile: the command may only just be going on, too.
            self.stop_with(pid)
            return
        found = processes.process(pid)
        if found is not None and found.state == "T" and self.in_foreground:
            os.kill(os.getpid(), signal.SIGSTOP)

    def take_back(self, *, settings: bool) -> None:
        """Take the terminal back from a command that has ended without giving it back, as a shell does.

        Args:
            settings: put back how it was set, too, as after a command that a signal has ended.
        """
        if self._settings is None:
            return
        # Whoever sets a terminal from the background is stopped by this, unless it is blocked.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
        try:
            with contextlib.suppress(OSError, termios.error):
                if not self.in_foreground and _is_empty(os.tcgetpgrp(self._file)):
                    os.tcsetpgrp(self._file, os.getpgrp())
                if settings and self.in_foreground:
                    termios.tcsetattr(self._file, termios.TCSADRAIN, self._settings)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _is_empty(group: int) -> bool:
    """Whether a process group has no process. Another job of a shell, which has the terminal now, has some."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
