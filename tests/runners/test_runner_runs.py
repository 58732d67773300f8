"""Runs by a real runner: what it executes, what it reports, and what is left."""

from __future__ import annotations

from pathlib import Path

from corral.schemas.jobs import JobState
from support.planner_of_runs import PlannerOfRuns, RunnerProcess, a_run


async def test_a_run_is_executed_and_reported(planner: PlannerOfRuns, runner: RunnerProcess) -> None:
    await planner.until(lambda: planner.token)
    await planner.push(a_run("sh", "-c", "echo hello; exit 3"))
    report = await planner.ended("1.1")
    assert (report.part.state, report.part.exit_code, report.part.signal) == (JobState.FAILED, 3, None)
    assert Path(report.part.log_file).read_text() == "hello\n"
    assert report.part.executor == "process"
