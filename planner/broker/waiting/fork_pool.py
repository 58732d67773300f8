"""Expensive queries, answered concurrently with the event loop: each in a forked copy of the planner process.

`fork` copies the page tables alone (1 ms at 10,000 devices, 5 ms at 100,000). So the copy has all the state that a
decision needs, queued requests included, and answers with the same functions that the planner decides with. The planner
goes on meanwhile. The copy can't change it: it has no connection, and exits after its answer.

Queries are limited: a number of copies run at once, one for each client, and queued queries are served round-robin by
client. A copy has a limit on time and on memory, and a lower CPU priority.
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

from ....bus.tasks import cancel_all
from ....schemas.instruments import FAST_SECONDS, Histogram
from ....schemas.requests import Error

log = logging.getLogger("corral.planner.broker.waiting.fork_pool")

QUESTION_SECONDS: Final = 20.0
"""Time limit of a query."""
_RUNNING: Final = 2
_WAITING_OF_ONE: Final = 8
_WAITING: Final = 256
_MEMORY_BYTES: Final = 2**30
"""Memory limit of a copy, beyond what the planner uses."""
_FORK_SHARE: Final = 0.1
"""Part of the event loop's time that forking may take at most."""
_LONGEST_PAUSE_SECONDS: Final = 0.5
_NICENESS: Final = 5
_READ_BYTES: Final = 2**16
_DONE: Final = b"\0"
"""First byte of a result; anything else is the reason why there is none."""


class QueueFull(Exception):
    """Too many queries of a client, or of all clients, are queued."""


def queue_full(client: str) -> Error:
    """Error for a client that has too many queries queued, with a time to retry after."""
    return Error(
        code="too_many_requests",
        message=f"{client!r} has too much in line that takes long to work out: ask one after the other",
        retry_after_seconds=1.0,
    )


class QueryFailed(Exception):
    """A query has no answer; the message says why."""


class ForkLimits(Struct, frozen=True, kw_only=True):
    """Limits on expensive queries.

    Attributes:
        running: copies at once.
        waiting_of_one: queued queries of one client.
        waiting: queued queries of all clients; a client that has none yet may exceed it, up to twice as many.
        seconds: time limit of one query.
        memory_bytes: memory limit of one copy, beyond what the planner uses.
    """

    running: int = _RUNNING
    waiting_of_one: int = _WAITING_OF_ONE
    waiting: int = _WAITING
    seconds: float = QUESTION_SECONDS
    memory_bytes: int = _MEMORY_BYTES


class _Query:
    __slots__ = ("answer", "client", "work")

    def __init__(self, client: str, work: Callable[[], bytes], answer: asyncio.Future[bytes]) -> None:
        self.client = client
        self.work = work
        self.answer = answer


class ForkPool:
    """Runs expensive queries in forked copies of this process.

    Args:
        bounds: see `ForkLimits`.

    Attributes:
        outcomes: number of queries by outcome: `answered`, `refused`, `timed_out`, `failed`.
        fork_seconds: durations of forks, for which the event loop is blocked.
    """

    def __init__(self, bounds: ForkLimits | None = None) -> None:
        self.outcomes: Counter[str] = Counter()
        self.fork_seconds = Histogram(FAST_SECONDS)
        self._bounds = bounds or ForkLimits()
        self._waiting: dict[str, deque[_Query]] = {}
        self._count = 0
        self._running: dict[str, asyncio.Task[None]] = {}
        self._fork_at = 0.0
        self._forking = asyncio.Lock()

    @property
    def running(self) -> int:
        """Number of running copies."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Number of queued queries."""
        return self._count

    async def run(self, client: str, work: Callable[[], bytes]) -> bytes:
        """Run a function in a copy of this process, and return its result.

        Args:
            client: client, for fair queueing.
            work: the function; it must not wait for anything. Only its result comes back.

        Raises:
            QueueFull: the queue is full for this client.
            QueryFailed: it took too long or too much memory, it failed, or no copy could be made.
        """
        mine = self._waiting.get(client)
        output = len(mine) if mine else 0
        newcomer = not output and client not in self._running
        if output >= self._bounds.waiting_of_one or (self._count >= self._bounds.waiting * (1 + newcomer)):
            self.outcomes["refused"] += 1
            raise QueueFull
        query = _Query(client, work, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(client, deque()).append(query)
        self._count += 1
        self._start()
        return await query.answer

    async def close(self) -> None:
        """End all copies, and cancel the queued queries."""
        tasks = list(self._running.values())
        for waiting in self._waiting.values():
            for query in waiting:
                query.answer.cancel()
        self._waiting.clear()
        self._count = 0
        await cancel_all(tasks)

    def _start(self) -> None:
        """Start queued queries up to the limit on copies: one for each client at a time, round-robin."""
        while len(self._running) < self._bounds.running:
            client = next((client for client in self._waiting if client not in self._running), None)
            if client is None:
                return
            mine = self._waiting.pop(client)
            query = mine.popleft()
            self._count -= 1
            if mine:  # at the end of the round
                self._waiting[client] = mine
            self._running[client] = asyncio.create_task(self._run(query))

    async def _run(self, query: _Query) -> None:
        try:
            data = await self._copy(query.work)
        except asyncio.CancelledError:
            query.answer.cancel()
            raise
        except Exception as error:
            self.outcomes["timed_out" if isinstance(error, TimeoutError) else "failed"] += 1
            if not query.answer.done():
                query.answer.set_exception(_query_failed(error, self._bounds.seconds))
        else:
            self.outcomes["answered"] += 1
            if not query.answer.done():
                query.answer.set_result(data)
        finally:
            del self._running[query.client]
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
            raise QueryFailed(data.decode(errors="replace") or "its copy of the planner was ended")
        return data[1:]


def _query_failed(error: Exception, seconds: float) -> QueryFailed:
    if isinstance(error, QueryFailed):
        return error
    if isinstance(error, TimeoutError):
        return QueryFailed(f"it took longer than {seconds:g} s")
    log.warning("no copy could be made for a question: %r", error)
    return QueryFailed(f"the system makes no copy of the planner: {error}")


def _fork(work: Callable[[], bytes], bounds: ForkLimits) -> tuple[int, int]:
    """Fork a copy that runs a function; returns its process id and the file descriptor to read its output from."""
    end, output = os.pipe()
    os.set_blocking(end, False)
    # A signal that comes before the copy has reset the handlers would be handled as if sent to the planner.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        with warnings.catch_warnings():
            # Other threads hold no lock that the copy takes: it computes, writes to its pipe and ends.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if not pid:
            _run_copy(work, output, bounds)
    except OSError:
        os.close(end)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(output)
    return pid, end


def _run_copy(work: Callable[[], bytes], output: int, bounds: ForkLimits) -> None:
    """Run a function in the copy, write its result or error to the pipe, and exit. Never returns."""
    try:
        gc.disable()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        # The connection to NATS and all other descriptors are for the planner alone.
        _close_all_but(output)
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
            left = left[os.write(output, left) :]
    finally:
        os._exit(0)


def _close_all_but(output: int) -> None:
    """Close all open file descriptors but one and the standard streams.

    Those are listed rather than all possible numbers tried, of which a container may allow a billion.
    """
    try:
        numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        os.closerange(3, output)
        os.closerange(output + 1, os.sysconf("SC_OPEN_MAX"))
        return
    for number in numbers:
        if number > 2 and number != output:
            with contextlib.suppress(OSError):  # that of the folder itself
                os.close(number)


def _limit(bounds: ForkLimits) -> None:
    """Set resource limits: they end a copy that takes too much, or runs on after its planner is gone."""
    with contextlib.suppress(OSError, ValueError):
        seconds = int(bounds.seconds) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError, IndexError):  # Linux alone says how much there is now
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * os.sysconf("SC_PAGESIZE") + bounds.memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


async def _read(end: int) -> bytes:
    """Read a file descriptor to its end."""
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
    """Wait for a killed copy's exit, which comes at once, so that it does not stay a zombie."""
    pause = 0.001
    while True:
        try:
            if os.waitpid(pid, os.WNOHANG)[0]:  # noqa: ASYNC222  # it does not wait
                return
        except ChildProcessError:
            return
        await asyncio.sleep(pause)
        pause = min(0.1, pause * 2)
