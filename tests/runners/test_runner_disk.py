"""Runs on a disk that can't be written: no run stays as it is for ever, and each is executed at most once."""

from __future__ import annotations

from pathlib import Path

import pytest
from corral.runners.journal import Journal, run_key
from corral.runners.supervisor import supervise
from corral.schemas.jobs import JobState
from corral.schemas.runs import RunVerb
from msgspec.structs import replace
from support.planner_of_runs import PlannerOfRuns, RunnerProcess, a_run


async def test_a_run_that_cannot_be_kept_fails_and_the_others_go_on(
    planner: PlannerOfRuns, runner: RunnerProcess
) -> None:
    await planner.until(lambda: planner.token)
    bad, good = a_run("true", job=1), a_run("true", job=2)
    # A file where the folder of the run belongs, as it can't be made on a full disk.
    (runner.folder / "runner" / "node-7" / "runs" / run_key(bad)).touch()
    await planner.push(bad, good)
    report = await planner.ended("1.1")
    assert (report.part.state, report.part.started_at) == (JobState.FAILED, None)
    assert report.part.message == "the runner of node-7 can't keep it in its folder: not a directory"
    assert (await planner.ended("2.1")).part.state is JobState.DONE


async def test_a_run_is_ended_though_that_cannot_be_written(planner: PlannerOfRuns, runner: RunnerProcess) -> None:
    await planner.until(lambda: planner.token)
    run = a_run("sleep", "1000")
    await planner.push(run)
    await planner.state("1.1", JobState.RUNNING)
    (runner.folder / "runner" / "node-7" / "runs" / run_key(run) / "wanted.json.new").mkdir()
    await planner.push(replace(run, verb=RunVerb.STOP, spec=None))
    report = await planner.ended("1.1")
    assert (report.part.state, report.part.signal) == (JobState.CANCELLED, 15)


async def test_an_output_that_is_no_path_is_the_end_of_the_run(planner: PlannerOfRuns, runner: RunnerProcess) -> None:
    await planner.until(lambda: planner.token)
    await planner.push(a_run("true", output="/tmp/a\0b"))
    report = await planner.ended("1.1")
    assert (report.part.state, report.part.exit_code) == (JobState.FAILED, 126)


@pytest.mark.parametrize("half", ["1.1-abc", "1.1-abc 0123-4567"])
def test_half_a_line_in_the_journal_costs_no_other(half: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(["2.1-def"], "boot")
    journal.close()
    with (tmp_path / "journal").open("a") as file:
        file.write(half)
    journal = Journal(tmp_path)
    journal.begin(["3.1-ghi"], "boot")
    journal.close()
    journal = Journal(tmp_path)
    assert [journal.begun_in(key) for key in ("2.1-def", "3.1-ghi")] == ["boot", "boot"]
    journal.close()


def test_a_supervisor_does_not_claim_what_it_cannot_start(tmp_path: Path) -> None:
    """The runner removes what is to be started as soon as it sees the claim of whoever has read it."""
    supervise(str(tmp_path), 0)
    assert not (tmp_path / "status").exists()
