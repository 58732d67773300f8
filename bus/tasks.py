"""Background tasks, and their cancellation."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Coroutine, Iterable
from typing import Any, Final, TypeVar

log = logging.getLogger("corral.bus")

T = TypeVar("T")

CANCEL_AGAIN_SECONDS: Final = 8.0
"""Longer than what follows a cancellation in good order takes, shorter than the timeouts of supervisors."""


class BackgroundTasks:
    """Tasks that run while their owner goes on.

    The event loop itself keeps only weak references to tasks, so that a task without another reference may disappear
    before its end (`asyncio.create_task`). An error that ends a task is logged.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        """Number of tasks that have not ended."""
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, Any], *, name: str | None = None) -> None:
        """Run a coroutine as a task of the running event loop.

        Args:
            work: to run.
            name: of the task, for log lines.
        """
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the task %s failed", task.get_name(), exc_info=error)

    async def settled(self) -> None:
        """Wait until all tasks have ended that run now, and those that they start."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def cancel(self) -> None:
        """Cancel all tasks, and wait until they have ended."""
        await cancel_all(self._tasks)


def cancel_until_done(task: asyncio.Future[Any]) -> None:
    """Cancel a task now, and every `CANCEL_AGAIN_SECONDS` until it has ended. Returns at once."""
    if not task.done():
        task.cancel()
        task.get_loop().call_later(CANCEL_AGAIN_SECONDS, cancel_until_done, task)


async def cancel_all(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel tasks, and wait until they have ended; what they raise is ignored.

    They are cancelled again after `CANCEL_AGAIN_SECONDS`, since an await may swallow a cancellation (see
    `heed_cancellation`), and one that waits for a bus which is away may last for long.
    """
    every = list(tasks)
    left = set(every)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=CANCEL_AGAIN_SECONDS)
    await asyncio.gather(*every, return_exceptions=True)


def cancellations() -> int:
    """Number of times that the running task was cancelled and that nothing has taken back."""
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


def heed_cancellation(before: int = 0) -> None:
    """Raise `CancelledError` if this task was cancelled and an await swallowed that. Endless loops call it each time.

    nats-py catches cancellations while it flushes and closes, and its requests wait with `asyncio.wait_for`, which
    until Python 3.12 returns the result where that and the cancellation come at once (python/cpython#86296).

    Args:
        before: `cancellations` at the begin of a function that may be called to tidy up after a cancellation.

    Raises:
        asyncio.CancelledError: it was cancelled.
    """
    if cancellations() > before:
        raise asyncio.CancelledError


async def heeding(work: Awaitable[T]) -> T:
    """Await something that may swallow a cancellation, and raise that afterwards all the same.

    Raises:
        asyncio.CancelledError: this task was cancelled meanwhile; the result is dropped.
    """
    before = cancellations()
    try:
        return await work
    finally:
        heed_cancellation(before)
