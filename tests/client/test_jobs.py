"""Jobs over a real bus: submitted once, listed whole, waited for, and what they print put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
from corral.client import Client, NotFound
from corral.schemas import codec
from corral.schemas.subjects import log_subject
from corral.schemas.work.jobs import JobState, OverrideAction
from corral.schemas.work.runs import LogChunk, run_id
from nats.aio.client import Client as Bus
from support.jobs_planner import HOST, JobsPlanner, jobs_planner


@pytest.fixture
async def planner(nc: Bus) -> AsyncIterator[JobsPlanner]:
    async with jobs_planner(nc) as made:
        yield made


@pytest.fixture
def client(nc: Bus, planner: JobsPlanner) -> Client:
    return Client(nc, owner="ann.lee")


async def printed(
    client: Client, which: str, *, follow: bool = False, attempt: int | None = None
) -> list[tuple[int, int, bytes]]:
    pieces = client.jobs.logs(which, follow=follow, attempt=attempt)
    return [(piece.index, piece.missed, piece.data) async for piece in pieces]


async def test_lists_that_do_not_fit_in_a_message_are_whole(client: Client, planner: JobsPlanner) -> None:
    jobs = [await client.jobs.submit(["true"], gpus=0) for _ in range(5)]
    sweep = await client.jobs.map(["train", "--lr"], [0.1] * 200, gpus=1, array="%8")
    assert planner.specs[sweep.job_id].array == "0-199%8"
    assert [job.job_id for job in await client.jobs.find()] == [sweep.job_id, *(job.job_id for job in reversed(jobs))]
    assert [task.index for task in (await client.jobs.get(sweep)).tasks] == list(range(200))
    assert [task.index for task in (await client.jobs.get(f"{sweep.job_id}_[3,150-152]")).tasks] == [3, 150, 151, 152]
    with pytest.raises(NotFound):
        await client.jobs.get("99")
    twice = [await client.jobs.submit(["true"], submit_id="once") for _ in range(2)]
    assert twice[0] == twice[1]


async def test_jobs_and_tasks_are_waited_for(client: Client, planner: JobsPlanner) -> None:
    first, second = [await client.jobs.submit(["true"]) for _ in range(2)]
    sweep = await client.jobs.submit(["true"], array="0-2")

    async def end() -> None:
        planner.set(second.job_id, JobState.FAILED, exit_code=3)
        planner.set(sweep.job_id, JobState.DONE, index=1)
        await asyncio.sleep(0.2)
        planner.set(first.job_id, JobState.DONE)
        for index in (0, 2):
            planner.set(sweep.job_id, JobState.DONE, index=index)

    ending = asyncio.create_task(end())
    async with asyncio.timeout(20):
        ended = [job.job_id async for job in client.jobs.as_completed([first, second])]
        tasks = [task.index async for task in client.jobs.tasks_as_completed(sweep)]
        assert (await client.jobs.wait(f"{sweep.job_id}_1")).tasks[0].state is JobState.DONE
        assert (await client.jobs.wait(second)).tasks[0].exit_code == 3
    await ending
    assert ended == [second.job_id, first.job_id]
    assert (tasks[0], sorted(tasks)) == (1, [0, 1, 2])
    waiting = await client.jobs.submit(["true"])
    with pytest.raises(TimeoutError):
        await client.jobs.wait(waiting, timeout=0.1)


async def test_begin_and_end_are_put_together_and_holes_are_named(client: Client, planner: JobsPlanner) -> None:
    job = (await client.jobs.submit(["true"])).job_id
    planner.set(job, JobState.RUNNING, log_bytes=30, attempt=2)
    await planner.print(job, "h0", 0, b"an old try", attempt=1)
    await planner.print(job, "t0", 24, b"end", attempt=2)
    await planner.print(job, "h1", 4, b"two ", attempt=2)
    await planner.print(job, "t15", 20, b"the ", attempt=2)
    await planner.print(job, "h0", 0, b"one ", attempt=2)
    assert await printed(client, job) == [(0, 0, b"one "), (0, 0, b"two "), (0, 12, b"the "), (0, 0, b"end")]
    assert await printed(client, job, attempt=1) == [(0, 0, b"an old try")]
    assert await printed(client, job, attempt=2) == await printed(client, job)
    with pytest.raises(NotFound, match=r"attempt 3 of job .* it has had 2"):
        await printed(client, job, attempt=3)
    with pytest.raises(ValueError, match="followed"):
        await printed(client, job, attempt=1, follow=True)


async def test_a_runner_of_an_earlier_version_publishes_all_attempts_in_one_place(
    client: Client, planner: JobsPlanner, nc: Bus
) -> None:
    job = (await client.jobs.submit(["true"])).job_id
    planner.set(job, JobState.RUNNING, log_bytes=3, attempt=2)
    chunk = LogChunk(run_id=run_id(job, 0, 2), time=datetime.now(UTC), offset=0, data=b"new")
    await nc.jetstream().publish(log_subject(HOST, job, 0, "h0", planner.specs[job].request.owner), codec.encode(chunk))
    assert await printed(client, job) == [(0, 0, b"new")]


async def test_what_was_printed_last_is_there_once_a_job_is_known_to_have_ended(
    client: Client, planner: JobsPlanner
) -> None:
    job = (await client.jobs.submit(["true"])).job_id
    planner.set(job, JobState.DONE, log_bytes=3)
    reading = asyncio.create_task(printed(client, job))
    await asyncio.sleep(0.05)  # its runner publishes the last piece after its last report
    await planner.print(job, "h0", 0, b"end", ended=True)
    assert await reading == [(0, 0, b"end")]


async def test_what_comes_is_followed_to_the_end(client: Client, planner: JobsPlanner) -> None:
    job = (await client.jobs.submit(["true"], array="0-1")).job_id
    planner.set(job, JobState.RUNNING, index=0)
    await planner.print(job, "h0", 0, b"a")
    following = asyncio.create_task(printed(client, job, follow=True))
    await asyncio.sleep(0.1)
    await planner.print(job, "h0", 0, b"ab")  # the same piece, which has grown
    await planner.print(job, "h1", 2, b"c")
    # The second task starts later; the subscription sees only its second piece.
    await planner.print(job, "h0", 0, b"x", index=1)
    planner.set(job, JobState.RUNNING, index=1, log_bytes=1)
    await planner.print(job, "h1", 1, b"y", index=1, ended=True)
    planner.set(job, JobState.DONE, index=1, log_bytes=2)
    # Its end is known before the last piece comes.
    planner.set(job, JobState.DONE, index=0)
    await asyncio.sleep(0.3)
    await planner.print(job, "h2", 3, b"d", ended=True)
    async with asyncio.timeout(20):
        found = await following
    for index, text in ((0, b"abcd"), (1, b"xy")):
        assert b"".join(data for one, _, data in found if one == index) == text
    assert all(missed == 0 for _, missed, _ in found)


async def test_an_operator_signs_commands_about_jobs_of_others(client: Client, planner: JobsPlanner, nc: Bus) -> None:
    job = await client.jobs.submit(["true"], array="0-9")
    done = await Client(nc, owner="root").jobs.cancel(f"{job.job_id}_[0-3]", reason="noon", operator=True)
    assert (done.changed, done.job.counts) == (4, {"pending": 6, "cancelled": 4})
    [command] = planner.commands
    assert isinstance(command, OverrideAction)
    assert (command.operator, command.action.owner, command.action.reason) == ("root", None, "noon")
