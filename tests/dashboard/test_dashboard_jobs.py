"""Jobs in the dashboard: what is asked and followed for all browsers, on a real bus, and states and output as data."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.client import NotFound
from corral.client.jobs.logs import LogPiece
from corral.client.jobs.names import Selection
from corral.dashboard.fleet import Fleet
from corral.dashboard.job_output import HEAD_BYTES, TAIL_BYTES, OutputText
from corral.dashboard.job_tasks import STATES, TaskStates
from corral.dashboard.jobs import JobBoard, JobCounts
from corral.schemas.subjects import PlanSubject
from corral.schemas.work.jobs import (
    Job,
    JobEvent,
    JobEventKind,
    JobFilter,
    JobState,
    JobTask,
    JobVerb,
    attempt_of_request,
)
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client
from support.fake_jobs import FILE, HOST, FakeJobs


async def until(found: Callable[[], Any], seconds: float = 20.0) -> Any:
    async with asyncio.timeout(seconds):
        while not (value := found()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return value


@pytest.fixture
async def fake(nc: Client) -> FakeJobs:
    made = FakeJobs(nc)
    await made.start()
    return made


@pytest.fixture
async def fleet(server: EmbeddedServer, fake: FakeJobs) -> AsyncIterator[Fleet]:
    """Connected, and refreshed only when a test says so."""
    made = Fleet(server.url, 3600.0)
    async with made.running():
        await until(lambda: made.connected)
        yield made


async def refreshed(fleet: Fleet) -> None:
    """The next refresh, as a page that is open gets it."""
    before = fleet.refreshes
    stop = fleet.watch(lambda: None)
    await until(lambda: fleet.refreshes > before)
    stop()


async def test_a_question_is_asked_once_per_refresh_for_all_browsers(fleet: Fleet, fake: FakeJobs) -> None:
    board = JobBoard(fleet)
    mine, other = await fake.submit("ann", array="0-9"), await fake.submit("ben")
    await fake.change(other, JobTask(index=0, attempt=1, state=JobState.RUNNING))
    await refreshed(fleet)
    pages: list[Awaitable[Any]] = [board.page(JobFilter(owner="ann")) for _ in range(5)]
    for page in await asyncio.gather(*pages):
        assert [listing.job.job_id for listing in page.jobs] == [mine]
    assert fake.asked[PlanSubject.JOBS] == 1
    assert await board.counts() == await board.counts() == JobCounts(going=1, waiting=1)
    assert fake.asked[PlanSubject.JOBS] == 3
    listing = await board.job(mine, 7)
    assert [task.index for task in listing.tasks] == [7]
    with pytest.raises(NotFound):
        await board.job("99")
    before = fake.asked[PlanSubject.JOBS]
    await refreshed(fleet)
    assert fake.asked[PlanSubject.JOBS] == before, "a refresh alone asks nothing about jobs"
    await board.page(JobFilter(owner="ann"))
    assert fake.asked[PlanSubject.JOBS] == before + 1
    await board.act(JobVerb.CANCEL, Selection(mine, (3,)), owner="ann")
    await board.act(JobVerb.HOLD, Selection(mine), operator="olga", reason="tests")
    assert [(by, one.owner, one.verb, one.indexes) for by, one in fake.given] == [
        ("", "ann", JobVerb.CANCEL, [3]),
        ("olga", None, JobVerb.HOLD, []),
    ]


async def test_states_follow_the_events_and_what_was_missed_is_listed_again(fleet: Fleet, fake: FakeJobs) -> None:
    board = JobBoard(fleet)
    job_id = await fake.submit("ann", array="5-104")
    await fake.change(job_id, JobTask(index=6, attempt=1, state=JobState.DONE))

    def states() -> dict[int, JobState]:
        assert watched.states is not None
        at = enumerate(watched.states.codes)
        return {watched.states.indexes[n]: STATES[code] for n, code in at if STATES[code] is not JobState.PENDING}

    with board.watch_tasks(job_id) as watched, board.watch_tasks(job_id) as second:
        assert second is watched
        await until(lambda: watched.states)
        assert states() == {6: JobState.DONE}
        asked = fake.asked[PlanSubject.JOBS]
        await fake.change(job_id, JobTask(index=104, attempt=1, state=JobState.RUNNING))
        await until(lambda: states() == {6: JobState.DONE, 104: JobState.RUNNING})
        assert fake.asked[PlanSubject.JOBS] == asked
        await fake.change(job_id, JobTask(index=5, attempt=1, state=JobState.LOST), silent=True)
        await fake.change(job_id, JobTask(index=104, attempt=1, state=JobState.FAILED))
        await until(lambda: states() == {5: JobState.LOST, 6: JobState.DONE, 104: JobState.FAILED})
        assert watched.states is not None
        assert watched.states.agrees(fake.jobs[job_id].job)
    await fake.change(job_id, JobTask(index=50, attempt=1, state=JobState.DONE))
    with board.watch_tasks(job_id) as again:
        await until(lambda: again.states)
    assert 50 not in states(), "nobody looks at the first one any more"


async def test_an_output_is_followed_once_for_all_browsers_and_over_attempts(fleet: Fleet, fake: FakeJobs) -> None:
    board = JobBoard(fleet)
    job_id = await fake.submit("ann")
    await fake.run(job_id)
    await fake.prints(job_id, "h0", 0, b"begin\n")
    await fake.prints(job_id, "t0", 1000, b"end\n")
    with board.follow_output(job_id, 0) as followed:
        text = await until(lambda: followed.texts.get(HOST))
        await until(lambda: text.position == 1004)
        assert [(entry.offset, entry.text) for entry in text.since(0)] == [(0, "begin\n"), (1000, "end\n")]
        assert text.file == FILE
        with board.follow_output(job_id, 0) as second:
            assert second is followed
        await fake.prints(job_id, "t1", 1004, b"more", ended=True)
        await until(lambda: text.position == 1008)
        assert [entry.text for entry in text.since(1004)] == ["more"]
        await fake.end(job_id, state=JobState.FAILED, exit_code=3)
        await until(lambda: followed.ended)
        await fake.run(job_id, attempt=2)
        await fake.prints(job_id, "h0", 0, b"again\n", attempt=2)
        followed.follow((await board.job(job_id, 0)).tasks[0])
        await until(lambda: text.attempt == 2)
        assert [entry.text for entry in text.since(0)] == ["again\n"]
    asked = fake.asked[PlanSubject.JOBS]
    with pytest.raises(NotFound):
        await board.job("99")
    assert fake.asked[PlanSubject.JOBS] == asked + 1, "whoever has closed the page asks nothing"


def piece(offset: int, data: bytes, attempt: int = 1) -> LogPiece:
    return LogPiece(index=0, host=HOST, rank=0, attempt=attempt, offset=offset, data=data, file=FILE)


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=8), st.integers(0, 40))
def test_output_in_any_pieces_is_the_output(data: bytes, cuts: list[int], overlap: int) -> None:
    printable = bytes(byte for byte in data if byte >= 0x20 or byte == 0x0A)
    whole, parts = OutputText(), OutputText()
    whole.add(piece(0, printable))
    ends = sorted({min(cut, len(printable)) for cut in cuts} | {len(printable)})
    start = 0
    for end in ends:
        first = max(0, start - overlap)
        parts.add(piece(first, printable[first:end]))
        start = end
    assert parts.position == whole.position == len(printable)

    def joined(text: OutputText) -> str:
        return "".join(entry.text for entry in text.since(0))

    # What is cut within a character at the very end is not shown in either.
    assert joined(parts).replace("\x7f", "") == joined(whole).replace("\x7f", "")


def test_output_is_plain_text_and_bounded() -> None:
    text = OutputText()
    text.add(piece(0, b"\x1b[1;31mred\x1b[0m\r\n 10%\r 20%\r\x1b]0;title\x07\x00done\n"))
    assert [entry.text for entry in text.since(0)] == ["red\n 10%\n 20%\ndone\n"]
    line = b"x" * 1023 + b"\n"
    for at in range(text.position, 4 * TAIL_BYTES, len(line)):
        text.add(piece(at, line))
    kept = list(text.since(0))
    assert sum(len(entry.text) for entry in kept) <= HEAD_BYTES + TAIL_BYTES + len(line)
    holes = [(one.end, other.offset) for one, other in itertools.pairwise(kept) if one.end != other.offset]
    assert len(holes) == 1
    assert kept[-1].end == text.position
    text.add(piece(0, b"old", attempt=0))
    assert text.position > 3


def event(version: int, *tasks: JobTask) -> JobEvent:
    now = datetime.now(UTC)
    job = Job(job_id="1", owner="ann", submitted_at=now)
    return JobEvent(kind=JobEventKind.CHANGED, time=now, job=job, version=version, tasks=list(tasks))


def test_states_of_tasks() -> None:
    assert TaskStates("0-99999:3").indexes == range(0, 100000, 3)
    assert TaskStates("").indexes == range(1)
    states = TaskStates("1,3,5-9")
    assert list(states.indexes) == [1, 3, 5, 6, 7, 8, 9]
    assert [states.position(index) for index in (0, 1, 5, 9, 10)] == [None, 0, 2, 6, None]
    assert states.apply(event(4, JobTask(index=3, state=JobState.RUNNING), JobTask(index=4, state=JobState.DONE)))
    assert states.apply(event(5, JobTask(index=3, state=JobState.DONE)))
    assert not states.apply(event(7)), "6 is missing"
    counted = Job(job_id="1", owner="a", submitted_at=datetime.now(UTC), counts={"pending": 6, "done": 1})
    assert states.agrees(counted)
    states.set_all([JobTask(index=9, state=JobState.FAILED)])
    assert not states.agrees(counted)


def test_requests_say_which_attempt_of_a_job_they_are_for() -> None:
    assert attempt_of_request("job-12_7-3") == ("12", 7, 3)
    for other in ("", None, "job-12", "job-12_7", "job-x_1-1", "job-1_2-3-4", "a-job-1_2-3"):
        assert attempt_of_request(other) is None
