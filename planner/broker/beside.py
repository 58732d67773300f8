"""Dear questions, answered beside the planner's loop: each by a copy of the process as it is at that moment.

`fork` copies the page tables alone (1 ms at 10,000 devices, 5 ms at 100,000), so that the copy has all that a decision
rests on, the waiting requests among it, and answers from the very functions that the planner decides with. The planner
goes on meanwhile, and the copy can change nothing: it has no connection, and ends with its answer.

Questions are bounded: so many run at once, one of each asker, and those who wait take turns by asker. A copy has a
limit of time and of memory, and a lower priority on the processor.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

from msgspec import Struct

from ...schemas.instruments import FAST_SECONDS, Histogram
from ...schemas.requests import Error

log = logging.getLogger("corral.planner.broker.beside")

QUESTION_SECONDS: Final = 20.0
"""A question that takes longer is given up."""
_RUNNING: Final = 2
_WAITING_OF_ONE: Final = 8
_WAITING: Final = 256
_MEMORY_BYTES: Final = 2**30
"""Of a copy, beyond what the planner has."""
_FORK_SHARE: Final = 0.1
"""The part of the loop's time that goes into copies at most."""
_LONGEST_PAUSE_SECONDS: Final = 0.5
_NICENESS: Final = 5
_READ_BYTES: Final = 2**16
_DONE: Final = b"\0"
"""Before a result; whatever else comes is the reason why there is none."""


class TooMany(Exception):
    """An asker has enough questions in line."""


def too_many(asker: str) -> Error:
    """What such an asker is told."""
    return Error(
        code="too_many_requests",
        message=f"{asker!r} has too much in line that takes long to work out: ask one after the other",
        retry_after_seconds=1.0,
    )


class GivenUp(Exception):
    """A question has no answer; the message says why."""


class Bounds(Struct, frozen=True, kw_only=True):
    """What dear questions may take.

    Attributes:
        running: copies at once.
        waiting_of_one: questions of one asker in line.
        waiting: questions in line, of all askers.
        seconds: of one question.
        memory_bytes: of one copy, beyond what the planner has.
    """

    running: int = _RUNNING
    waiting_of_one: int = _WAITING_OF_ONE
    waiting: int = _WAITING
    seconds: float = QUESTION_SECONDS
    memory_bytes: int = _MEMORY_BYTES


class _Question:
    __slots__ = ("answer", "asker", "work")

    def __init__(self, asker: str, work: Callable[[], bytes], answer: asyncio.Future[bytes]) -> None:
        self.asker = asker
        self.work = work
        self.answer = answer


class Beside:
    """Runs dear questions.

    Args:
        bounds: see `Bounds`.

    Attributes:
        outcomes: of questions: `answered`, `refused`, `timed_out`, `failed`.
        fork_seconds: for which the loop stood still to make a copy.
    """

    def __init__(self, bounds: Bounds | None = None) -> None:
        self.outcomes: Counter[str] = Counter()
        self.fork_seconds = Histogram(FAST_SECONDS)
        self._bounds = bounds or Bounds()
        self._waiting: dict[str, deque[_Question]] = {}
        self._count = 0
        self._running: dict[str, asyncio.Task[None]] = {}
        self._fork_at = 0.0
        self._forking = asyncio.Lock()

    @property
    def running(self) -> int:
        """Copies that are at work."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Questions in line."""
        return self._count

    async def ask(self, asker: str, work: Callable[[], bytes]) -> bytes:
        """Work on a copy of this process.

        Args:
            asker: whose turn it is.
            work: what to do there; it must not wait for anything. Its result comes back, and nothing else does.

        Raises:
            TooMany: the asker has enough in line.
            GivenUp: it took too long or too much memory, or the system makes no copy.
        """
        mine = self._waiting.get(asker)
        there = len(mine) if mine else 0
        newcomer = not there and asker not in self._running
        if there >= self._bounds.waiting_of_one or (self._count >= self._bounds.waiting * (1 + newcomer)):
            self.outcomes["refused"] += 1
            raise TooMany
        question = _Question(asker, work, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(asker, deque()).append(question)
        self._count += 1
        self._start()
        return await question.answer

    async def close(self) -> None:
        """End all copies; those who wait get no answer."""
        tasks = list(self._running.values())
        for waiting in self._waiting.values():
            for question in waiting:
                question.answer.cancel()
        self._waiting.clear()
        self._count = 0
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self) -> None:
        """Let those at the head of the line begin, as far as there is room: one of each asker, in turn."""
        while len(self._running) < self._bounds.running:
            asker = next((asker for asker in self._waiting if asker not in self._running), None)
            if asker is None:
                return
            mine = self._waiting.pop(asker)
            question = mine.popleft()
            self._count -= 1
            if mine:  # behind all others
                self._waiting[asker] = mine
            self._running[asker] = asyncio.create_task(self._run(question))

    async def _run(self, question: _Question) -> None:
        try:
            data = await self._copy(question.work)
        except asyncio.CancelledError:
            question.answer.cancel()
            raise
        except Exception as error:
            self.outcomes["timed_out" if isinstance(error, TimeoutError) else "failed"] += 1
            if not question.answer.done():
                question.answer.set_exception(_given_up(error, self._bounds.seconds))
        else:
            self.outcomes["answered"] += 1
            if not question.answer.done():
                question.answer.set_result(data)
        finally:
            del self._running[question.asker]
            self._start()

    async def _copy(self, work: Callable[[], bytes]) -> bytes:
        loop = asyncio.get_running_loop()
        async with self._forking:
            await asyncio.sleep(max(0.0, self._fork_at - loop.time()))
            began = time.perf_counter()
            pid, end = _fork(work, self._bounds)
            took = time.perf_counter() - began
            self.fork_seconds.observe(took)
            self._fork_at = loop.time() + min(_LONGEST_PAUSE_SECONDS, took / _FORK_SHARE)
        try:
            async with asyncio.timeout(self._bounds.seconds):
                data = await _read(end)
        finally:
            os.close(end)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            await asyncio.shield(_reap(pid))
        if data[:1] != _DONE:
            raise GivenUp(data.decode(errors="replace") or "its copy of the planner was ended")
        return data[1:]


def _given_up(error: Exception, seconds: float) -> GivenUp:
    if isinstance(error, GivenUp):
        return error
    if isinstance(error, TimeoutError):
        return GivenUp(f"it took longer than {seconds:g} s")
    log.warning("no copy could be made for a question: %r", error)
    return GivenUp(f"the system makes no copy of the planner: {error}")


def _fork(work: Callable[[], bytes], bounds: Bounds) -> tuple[int, int]:
    """Make a copy that works; returns its process id and where to read what it writes."""
    end, there = os.pipe()
    os.set_blocking(end, False)
    # A signal that comes before the copy has forgotten the planner's handlers would be taken for the planner's own.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        with warnings.catch_warnings():
            # Other threads hold no lock that the copy takes: it computes, writes to its pipe and ends.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if not pid:
            _work(work, there, bounds)
    except OSError:
        os.close(end)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(there)
    return pid, end


def _work(work: Callable[[], bytes], there: int, bounds: Bounds) -> None:
    """What a copy does; it never returns."""
    try:
        gc.disable()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        # The bus and whatever else is open stays the planner's alone.
        _close_all_but(there)
        with contextlib.suppress(OSError):
            os.nice(_NICENESS)
        _limit(bounds)
        try:
            data = _DONE + work()
        except MemoryError:
            data = b"it took too much memory"
        except Exception as error:
            data = repr(error).encode()[:1024]
        left = memoryview(data)
        while left:
            left = left[os.write(there, left) :]
    finally:
        os._exit(0)


def _close_all_but(there: int) -> None:
    """Close what is open beside one. Not all that might be: in a container that may be a thousand million."""
    try:
        numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        os.closerange(3, there)
        os.closerange(there + 1, os.sysconf("SC_OPEN_MAX"))
        return
    for number in numbers:
        if number > 2 and number != there:
            with contextlib.suppress(OSError):  # that of the folder itself
                os.close(number)


def _limit(bounds: Bounds) -> None:
    """Let the system end a copy whose planner is gone, and one that takes too much."""
    with contextlib.suppress(OSError, ValueError):
        seconds = int(bounds.seconds) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError, IndexError):  # Linux alone says how much there is now
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * os.sysconf("SC_PAGESIZE") + bounds.memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


async def _read(end: int) -> bytes:
    """All that comes, to its end."""
    loop = asyncio.get_running_loop()
    parts: list[bytes] = []
    ended = loop.create_future()

    def readable() -> None:
        try:
            part = os.read(end, _READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        if part:
            parts.append(part)
        elif not ended.done():
            ended.set_result(None)

    loop.add_reader(end, readable)
    try:
        await ended
    finally:
        loop.remove_reader(end)
    return b"".join(parts)


async def _reap(pid: int) -> None:
    """Take note of a copy's end, which comes at once."""
    pause = 0.001
    while True:
        try:
            if os.waitpid(pid, os.WNOHANG)[0]:  # noqa: ASYNC222  # it does not wait
                return
        except ChildProcessError:
            return
        await asyncio.sleep(pause)
        pause = min(0.1, pause * 2)
