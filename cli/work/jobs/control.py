"""Handles signals and the terminal for a command that holds a lease, from before the request to after the release.

A signal during the request withdraws it. A later signal is forwarded to the command; if it comes before the command
is started, the command isn't started. While the lease is released, which takes seconds at most, signals have no
effect. Signals that this process was started to ignore (as `nohup` does with SIGHUP) stay ignored, by the command too.
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

from ....bus import processes
from ....bus.tasks import cancel_until_done

T = TypeVar("T")

HARMLESS: Final = frozenset({signal.SIGWINCH, signal.SIGCONT, signal.SIGTSTP})
"""Signals that don't end a process, even by default."""
_STALE_SECONDS: Final = 0.05
"""Delay before this process stops with its command. If both were stopped together, the news comes late, when both have
resumed, and must be ignored."""
_NOT_OURS: Final = frozenset(
    {
        # The first two can't be caught; the others, and the next line, concern this process, not the command.
        *(signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ),
        *(signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS),
        # Timers and file notifications, which a process sets up for itself.
        *(signal.SIGPROF, signal.SIGVTALRM, signal.SIGURG, signal.SIGIO),
        # A terminal stops this process together with the command.
        *(signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU),
    }
)


class Interrupted(Exception):
    """A signal arrived before the command was started, and ended the work.

    Attributes:
        number: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by signal {number}")
        self.number = number

    @property
    def code(self) -> int:
        """Exit code of a process that was ended by the signal: 128 plus its number."""
        return 128 + self.number


class Signals:
    """Handlers for the signals to this process while it requests or holds a lease. Enter it within a running loop.

    Args:
        stoppable: forward SIGTSTP to the command, since no terminal stops it together with this process.

    Attributes:
        ignored: signals that this process was started to ignore.
    """

    def __init__(self, *, stoppable: bool = False) -> None:
        self.ignored = [
            number
            for number in sorted(signal.valid_signals())
            # Python itself ignores these two, whatever their setting was before.
            if number not in (signal.SIGPIPE, signal.SIGXFSZ) and signal.getsignal(number) is signal.SIG_IGN
        ]
        self._loop = asyncio.get_running_loop()
        handled = signal.valid_signals() - _NOT_OURS | ({signal.SIGTSTP} if stoppable else set())
        self._numbers = sorted(handled - set(self.ignored))
        self._receiver: Callable[[int], None] | None = None
        self._pending: list[int] = []

    def __enter__(self) -> Self:
        if signal.SIGCHLD in self.ignored:
            # Otherwise the exit status of the command would be lost.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in self._numbers:
            # Some systems reserve signal numbers.
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
        """Await work, and cancel it if a signal arrives.

        Returns:
            The result of the work.

        Raises:
            Interrupted: a signal arrived.
        """
        task = asyncio.create_task(work)
        with self.to(lambda number: None if number in HARMLESS else self._interrupt(task, number)):
            try:
                return await task
            except asyncio.CancelledError:
                self.check()
                raise

    def check(self) -> None:
        """Raise `Interrupted` if a signal has arrived that no receiver has got yet."""
        for number in self._pending:
            if number not in HARMLESS:
                raise Interrupted(number)

    @contextlib.contextmanager
    def to(self, receiver: Callable[[int], None]) -> Generator[None]:
        """Pass signals to a receiver for the length of a block, beginning with those that are pending."""
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
        # Only the first signal cancels the task: another one would interrupt the withdrawal of the request.
        if not any(known not in HARMLESS for known in self._pending):
            cancel_until_done(task)
        self._pending.append(number)


class Terminal:
    """The controlling terminal of this process, if any, whatever its input is connected to.

    The command shares the process group of this process, so that it may read from the terminal, and so that Ctrl-C and
    Ctrl-Z reach both at once, together with the other processes of a pipe.
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
        """True if this process has a controlling terminal."""
        return self._file >= 0

    @property
    def in_foreground(self) -> bool:
        """True if this process group is the terminal's foreground process group."""
        with contextlib.suppress(OSError):
            return self.is_there and os.tcgetpgrp(self._file) == os.getpgrp()
        return False

    def stop_with(self, pid: int) -> None:
        """Stop this process when its command has stopped itself (an editor's Ctrl-Z, `suspend` in a shell).

        The shell that started both then gets the terminal back.

        Args:
            pid: process id of the command.
        """
        if self.is_there:
            loop = asyncio.get_running_loop()
            loop.call_later(_STALE_SECONDS, self._stop_with, pid, loop.time() + 2 * _STALE_SECONDS)

    def _stop_with(self, pid: int, latest: float) -> None:
        if asyncio.get_running_loop().time() > latest:
            # This process was itself stopped in the meantime, so the command may be resuming just now: check again.
            self.stop_with(pid)
            return
        found = processes.process(pid)
        if found is not None and found.state == "T" and self.in_foreground:
            os.kill(os.getpid(), signal.SIGSTOP)

    def take_back(self, *, settings: bool) -> None:
        """Make this process group the terminal's foreground group again after the command has ended, as a shell does.

        Args:
            settings: restore the terminal's settings too, as is needed after a command that a signal has ended.
        """
        if self._settings is None:
            return
        # A background process that changes the terminal is stopped by SIGTTOU, unless that is blocked.
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
    """True if a process group has no processes. Another job of the shell that has the terminal would have some."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
