"""Background tasks are kept until they end, their errors are logged, and cancellation waits for them."""

import asyncio
import contextlib
import gc
import logging

import pytest
from corral.bus import tasks as bus_tasks
from corral.bus.tasks import BackgroundTasks


async def test_a_task_that_nobody_else_keeps_runs_to_its_end() -> None:
    tasks, done = BackgroundTasks(), asyncio.Event()

    async def work() -> None:
        # Only the event loop's weak set and this future refer to the task.
        await asyncio.sleep(0.01)
        done.set()

    tasks.start(work())
    gc.collect()
    await done.wait()
    await asyncio.sleep(0)
    assert len(tasks) == 0


async def test_the_error_of_a_task_is_logged_with_its_name(caplog: pytest.LogCaptureFixture) -> None:
    tasks = BackgroundTasks()

    async def work() -> None:
        raise ValueError("no such stream")

    caplog.set_level(logging.ERROR, "corral.bus")
    tasks.start(work(), name="catching up")
    for _ in range(2):  # the task itself, then its callback
        await asyncio.sleep(0)
    (record,) = caplog.records
    assert record.getMessage() == "the task catching up failed"
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "no such stream"


async def test_cancellation_waits_until_every_task_has_cleaned_up() -> None:
    tasks, cleaned = BackgroundTasks(), list[int]()

    async def work(number: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append(number)

    for number in range(3):
        tasks.start(work(number))
    await asyncio.sleep(0)
    await tasks.cancel()
    assert sorted(cleaned) == [0, 1, 2]
    assert len(tasks) == 0


async def test_a_task_that_swallows_its_cancellation_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_tasks, "CANCEL_AGAIN_SECONDS", 0.01)

    async def stubborn() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    async def fails() -> None:
        raise OSError("it failed before")

    running = [asyncio.create_task(work()) for work in (stubborn, fails)]
    await asyncio.sleep(0)
    async with asyncio.timeout(20):
        await bus_tasks.cancel_all(running)
    assert [task.cancelled() for task in running] == [True, False]


async def test_a_cancellation_that_an_await_swallows_is_heeded_after_it() -> None:
    async def swallows() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return "the result"

    async def in_time() -> str:
        async with asyncio.timeout(0.01):
            return await bus_tasks.heeding(swallows())

    ended = asyncio.create_task(bus_tasks.heeding(swallows()))
    await asyncio.sleep(0)
    ended.cancel()
    await asyncio.wait({ended})
    assert ended.cancelled()
    with pytest.raises(TimeoutError):
        await in_time()
    assert await bus_tasks.heeding(asyncio.sleep(0, "a result")) == "a result"
