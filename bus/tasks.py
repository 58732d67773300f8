"""Cancellation of tasks."""

from __future__ import annotations

import asyncio


def heed_cancellation() -> None:
    """Raise `CancelledError` if this task was cancelled and an await swallowed that. Endless loops call it each time.

    nats-py catches cancellations while it flushes and closes, and its requests wait with `asyncio.wait_for`, which
    until Python 3.12 returns the result where that and the cancellation come at once (python/cpython#86296).

    Raises:
        asyncio.CancelledError: it was cancelled.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
