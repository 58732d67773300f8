"""The states of jobs, whatever happens in whatever order; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from corral.planner.jobs.checks import InvalidJob, check
from corral.planner.jobs.listing import listing
from corral.planner.jobs.records import StoredJob
from corral.planner.jobs.retention import to_forget
from corral.planner.jobs.table import JobTable
from corral.planner.jobs.task import Task, time_of
from corral.schemas.requests import Grant, Lease, LeaseState, Preemption, WorkRequest
from corral.schemas.work.jobs import Attempt, Dependency, JobFilter, JobSpec, JobState, TaskPart, submitted
from corral.schemas.work.runs import RunReport
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from support.jobs_world import World


@example(205)  # a long array that runs one task at a time
@example(50886)  # a part runs that the killed planner had not noted when another host can't start its own
@settings(max_examples=25)
@given(st.integers(0, 2**32))
def test_each_attempt_runs_once_and_each_task_ends_whatever_happens(seed: int) -> None:
    """Grants, reports, lost orders, ends of leases, commands and crashes of the planner, in any order."""
    world = World(seed)
    for _ in range(150):
        world.step()
    world.settle()
    assert not [lease for lease in world.leases.values() if lease.state is LeaseState.ACTIVE]
    assert not world.queue
    for job in world.table.jobs.values():
        assert not job.live
        assert not job.in_line
        assert job.ended_at is not None
        for index in job.indexes:
            task = job.view(index)
            if task.state is JobState.DONE:
                assert task.exit_code == 0
                assert all(part.exit_code == 0 for part in task.parts.values())


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("$.command", {"command": []}),
        ("$.command[0]", {"command": [""]}),
        ("$.script", {"script": "#!/bin/sh\n"}),
        ("$.script", {"command": [], "script": "echo\n"}),
        ("$.arguments", {"arguments": ["x"]}),
        ("$.directory", {"directory": "here"}),
        ("$.image", {"image": "--privileged"}),
        ("$.output", {"output": "a\0b"}),
        ("$.array", {"array": "5-1"}),
        ("$.preempt_signal", {"preempt_signal": "SIGNOT"}),
        ("$.environment", {"environment": {"A=B": "c"}}),
        ("$.request.name", {"request": WorkRequest(owner="a", name="a\0b")}),
        ("$.request.gpus", {"hosts": 3, "request": WorkRequest(owner="a", gpus=4)}),
        ("$.request.wait_seconds", {"request": WorkRequest(owner="a", wait_seconds=1)}),
        ("$.request.gpus_max", {"request": WorkRequest(owner="a", gpus=1, gpus_max=2)}),
        ("$.request.host_labels", {"request": WorkRequest(owner="a", host_labels={"corral.runner": "yes"})}),
    ],
)
def test_a_job_that_says_nothing_or_too_much_is_refused_with_the_field(field: str, fields: dict[str, Any]) -> None:
    base: dict[str, Any] = {"request": WorkRequest(owner="a"), "command": ["true"]}
    check(JobSpec(**base))
    with pytest.raises(InvalidJob) as refused:
        check(JobSpec(**{**base, **fields}))
    assert refused.value.field == field


def test_ended_jobs_are_forgotten_by_age_and_room_but_not_while_others_wait_for_them() -> None:
    table, now = JobTable(), 1_700_000_000.0
    for number in range(1, 6):
        after = [Dependency(job_id="1")] if number == 5 else []
        spec = JobSpec(request=WorkRequest(owner="a"), command=["true"], after=after)
        table.submit(StoredJob(job_id=str(number), spec=submitted(spec), submitted_at=now), 1000, now)
    for job_id in ("3", "2", "4"):
        table.cancel(table.jobs[job_id], [], "enough", 0, now)
        now += 10
    assert to_forget(table.jobs.values(), now, 0) == []
    assert to_forget(table.jobs.values(), now, 8 * 2500) == ["3"]
    assert to_forget(table.jobs.values(), now + 86_400 - 15, 0) == ["3", "2"]
    table.cancel(table.jobs["1"], [], "enough", 0, now)
    assert table.jobs["5"].state is JobState.CANCELLED
    assert "job 1 has not ended as asked for" in table.jobs["5"].rest_message


def test_a_listing_is_cut_at_the_size_of_a_message_and_pages_over_the_tasks_of_one_job() -> None:
    table, now = JobTable(), 1_700_000_000.0
    spec = JobSpec(request=WorkRequest(owner="a", name="sweep"), command=["true"], array="0-999")
    for number in range(1, 31):
        table.submit(StoredJob(job_id=str(number), spec=submitted(spec), submitted_at=now), 1000, now)
    jobs = table.jobs.values()
    few = listing(jobs, JobFilter(), 5_000)
    assert few.total == 30
    assert 1 < len(few.jobs) < 30
    assert few.jobs[0].job.job_id == "30"
    page = listing(jobs, JobFilter(job_ids=["7"], tasks=True, offset=990, limit=5), 100_000).jobs[0]
    assert [task.index for task in page.tasks] == [990, 991, 992, 993, 994]
    assert page.total_tasks == 1000
    assert listing(jobs, JobFilter(name="swe*", owner="b"), 5_000).total == 0


def a_lease(now: float) -> Lease:
    return Lease(
        lease_id="L1",
        owner="ann",
        state=LeaseState.ACTIVE,
        grants=[Grant(host="a", device="0")],
        ttl_seconds=600.0,
        granted_at=time_of(now),
        expires_at=time_of(now + 600),
    )


def test_the_end_of_an_attempt_is_published_whatever_follows_at_once() -> None:
    """By this planner where the task is submitted again, and by the next one where this one was killed."""
    table, now = JobTable(), 1_700_000_000.0
    spec = submitted(JobSpec(request=WorkRequest(owner="ann", gpus=1), command=["false"]))
    job = table.submit(StoredJob(job_id="1", spec=spec, submitted_at=now), 1, now)
    assert table.granted(Attempt("1", 0, 1), a_lease(now), now)
    part = TaskPart(host="a", state=JobState.FAILED, exit_code=3, ended_at=time_of(now))
    table.reported("a", RunReport(run_id="1_0.1", lease_id="L1", part=part), now)
    assert table.resubmit(job, [], now) == 1
    [ended] = table.changes.ended["1"]
    last = Task.restored(job.tasks[0].stored()).last
    assert last is not None
    assert [(one.attempt, one.state, one.exit_code) for one in (ended, last)] == [(1, JobState.FAILED, 3)] * 2


def test_what_a_job_says_of_its_end_is_of_tasks_that_have_ended_and_its_progress_of_what_was_done() -> None:
    table, now = JobTable(), 1_700_000_000.0
    spec = submitted(JobSpec(request=WorkRequest(owner="ann", gpus=1), command=["x"], array="0-3", retries=1))
    job = table.submit(StoredJob(job_id="1", spec=spec, submitted_at=now), 1, now)

    def run(index: int, attempt: int, state: JobState, progress: float | None = None) -> None:
        lease = replace(a_lease(now), lease_id=f"L{index}.{attempt}")
        assert table.granted(Attempt("1", index, attempt), lease, now)
        part = TaskPart(host="a", state=JobState.RUNNING, started_at=time_of(now))
        report = RunReport(run_id=f"1_{index}.{attempt}", lease_id=lease.lease_id, part=part, progress=progress)
        table.reported("a", report, now)
        done = state is JobState.DONE
        part = replace(part, state=state, exit_code=0 if done else 3, ended_at=time_of(now + attempt))
        table.reported("a", replace(report, part=part), now)
        table.released("1", index)

    run(0, 1, JobState.DONE, 0.9)
    run(1, 1, JobState.FAILED, 0.5)
    run(1, 2, JobState.DONE)
    run(2, 1, JobState.FAILED, 0.5)
    run(2, 2, JobState.FAILED, 0.25)
    table.cancel(job, [3], "cancelled by ann", 0, now)
    found = listing([job], JobFilter(), 1_000_000).jobs[0].job
    # Two are done, and one was at a quarter.
    assert (found.state, found.progress, found.message) == ("failed", 2.25 / 4, "task 3: cancelled by ann")
    assert table.resubmit(job, [3], now) == 1
    run(3, 1, JobState.DONE)
    assert listing([job], JobFilter(), 1_000_000).jobs[0].job.message == "task 2: exit code 3"
    assert table.resubmit(job, [], now) == 1
    assert listing([job], JobFilter(), 1_000_000).jobs[0].job.message == ""
    run(2, 3, JobState.FAILED)
    run(2, 4, JobState.DONE)
    found = listing([job], JobFilter(), 1_000_000).jobs[0].job
    assert (found.state, found.progress, found.message) == ("done", 1.0, "")


@pytest.mark.parametrize(
    ("hosts", "others", "again"),
    [
        (1, JobState.STARTING, True),
        (2, JobState.STARTING, True),
        # A command of it was executed on the other host: only `retries` may do that again.
        (2, JobState.RUNNING, False),
    ],
)
def test_a_task_that_a_host_could_not_start_waits_again_at_no_cost(hosts: int, others: JobState, again: bool) -> None:
    table, now = JobTable(), 1_700_000_000.0
    spec = submitted(JobSpec(request=WorkRequest(owner="ann", gpus=hosts), command=["true"], hosts=hosts))
    job = table.submit(StoredJob(job_id="1", spec=spec, submitted_at=now), 1, now)
    lease = replace(a_lease(now), grants=[Grant(host=host, device="0") for host in "ab"[:hosts]])
    assert table.granted(Attempt("1", 0, 1), lease, now)

    def report(host: str, part: TaskPart, *, fault: bool = False) -> None:
        run = RunReport(run_id="1_0.1", lease_id="L1", part=part, prepared=others.value == "running", host_fault=fault)
        table.reported(host, run, now)

    started = time_of(now) if others is JobState.RUNNING else None
    if hosts == 2:
        report("b", TaskPart(host="b", state=others, started_at=started))
    report("a", TaskPart(host="a", state=JobState.FAILED, message="no space left on device"), fault=True)
    # A later leader finds what was stored.
    stored = Task.restored(job.tasks[0].stored())
    assert stored.host_fault == (job.tasks[0].is_live and started is not None)
    if started is not None:
        report("b", TaskPart(host="b", state=JobState.CANCELLED, started_at=started, signal=15))
    task = job.tasks[0]
    assert (task.state, task.retries_left) == (JobState.PENDING if again else JobState.FAILED, 0)
    assert task.message.startswith("attempt 1: no space left on device" if again else "no space left on device")


@pytest.mark.parametrize(("output", "shown"), [("", "/runner/output"), ("secret-%j", "")])
def test_a_file_that_a_job_names_is_not_listed(output: str, shown: str) -> None:
    table, now = JobTable(), 1_700_000_000.0
    spec = submitted(JobSpec(request=WorkRequest(owner="ann", gpus=1), command=["true"], output=output))
    job = table.submit(StoredJob(job_id="1", spec=spec, submitted_at=now), 1, now)
    assert table.granted(Attempt("1", 0, 1), a_lease(now), now)
    part = TaskPart(host="a", state=JobState.RUNNING, log_file="/runner/output")
    table.reported("a", RunReport(run_id="1_0.1", lease_id="L1", part=part), now)
    [listed] = listing([job], JobFilter(tasks=True), 1_000_000).jobs
    assert [part.log_file for part in listed.tasks[0].parts] == [shown]


@pytest.mark.parametrize("how", ["limit", "notice", "eviction"])
def test_the_grace_of_a_task_ends_with_its_lease(how: str) -> None:
    """Else what resists SIGTERM would be on devices that are another's by then."""
    table, now = JobTable(), 1_700_000_000.0
    spec = submitted(JobSpec(request=WorkRequest(owner="ann", gpus=1), command=["true"], grace_seconds=30.0))
    job = table.submit(StoredJob(job_id="1", spec=spec, submitted_at=now), 1, now)
    end = time_of(now + 10)
    limited = replace(a_lease(now), ends_at=end if how == "limit" else None)
    assert table.granted(Attempt("1", 0, 1), limited, now)
    task = job.tasks[0]
    table.reported("a", RunReport(run_id="1_0.1", lease_id="L1", part=TaskPart(host="a", state=JobState.RUNNING)), now)
    if how == "notice":
        notice = Preemption(notified_at=time_of(now), ends_at=end)
        table.noticed(replace(limited, preemption=notice), Attempt("1", 0, 1), now)
    elif how == "eviction":
        table.lease_ended(replace(limited, state=LeaseState.EVICTED), Attempt("1", 0, 1), now + 8)
    table.tick(now + 7)
    assert (task.ending is None, task.grace_seconds) == ((True, 30.0) if how != "eviction" else (False, 5.0))
    table.tick(now + 8)
    assert task.ending is not None
    assert now + 8 + task.grace_seconds <= now + (13 if how == "eviction" else 10)
