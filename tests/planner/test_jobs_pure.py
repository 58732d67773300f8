"""The states of jobs, whatever happens in whatever order; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from corral.planner.jobs.checks import InvalidJob, check
from corral.schemas.jobs import JobSpec, JobState
from corral.schemas.requests import LeaseState, WorkRequest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.jobs_world import World


@settings(max_examples=40)
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
        ("$.array", {"array": "5-1"}),
        ("$.preempt_signal", {"preempt_signal": "SIGNOT"}),
        ("$.environment", {"environment": {"A=B": "c"}}),
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
