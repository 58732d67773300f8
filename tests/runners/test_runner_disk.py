"""Runs on a disk that can't be written: no run stays as it is for ever, and each is executed at most once."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from corral.runners.ended import Ended, EndedRuns
from corral.runners.journal import Journal, run_key
from corral.runners.readiness import Readiness, probe, room
from corral.runners.supervisor import supervise
from corral.schemas.work.jobs import JobState
from corral.schemas.work.runs import RunVerb
from msgspec.structs import replace
from support.planner_of_runs import PlannerOfRuns, RunnerProcess, a_run


async def test_runs_that_the_host_cannot_keep_are_given_back_and_the_others_go_on(
    planner: PlannerOfRuns, runner: RunnerProcess
) -> None:
    await planner.until(lambda: planner.token)
    folder = runner.folder / "runner" / "node-7"
    unkept, unwritten, good = a_run("true", job=1), a_run("true", job=2), a_run("true", job=3)
    # Files where the folders belong of the run, and of its output: they can't be made, as on a full disk.
    (folder / "runs" / run_key(unkept)).touch()
    (folder / "work" / run_key(unwritten)).touch()
    wrong = [a_run("true", job=4, output="/nowhere/at/all"), a_run("true", job=5, output="/tmp/a\0b")]
    await planner.push(unkept, unwritten, good, *wrong)
    report = await planner.ended("1.1")
    assert (report.part.state, report.part.started_at, report.host_fault) == (JobState.FAILED, None, True)
    assert report.part.message == "the runner of node-7 can't keep it in its folder: not a directory"
    assert await planner.until(lambda: planner.all_reports[-1].unready)
    assert (await planner.ended("2.1")).host_fault
    assert (await planner.ended("3.1")).part.state is JobState.DONE
    for name in ("4.1", "5.1"):
        # The job itself has named the file.
        report = await planner.ended(name)
        assert (report.part.state, report.part.exit_code, report.host_fault) == (JobState.FAILED, 126, False)


async def test_a_host_that_cannot_write_gives_runs_back_and_starts_none_until_it_can(
    planner: PlannerOfRuns, runner: RunnerProcess
) -> None:
    await planner.until(lambda: planner.token)
    going = a_run("sleep", "1000", job=1)
    await planner.push(going)
    await planner.state("1.1", JobState.RUNNING)
    # Files that can't grow, as on a full disk; for the runner alone, so that the run above goes on.
    pid = runner.process.pid
    _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, most))
    await planner.push(a_run("true", job=2))
    report = await planner.ended("2.1")
    assert (report.part.state, report.part.started_at, report.host_fault) == (JobState.FAILED, None, True)
    assert report.part.message == "the runner of node-7 can't keep it in its folder: file too large"
    unready = await planner.until(lambda: planner.all_reports[-1].unready)
    assert unready == f"{runner.folder}/runner/node-7: file too large"
    await planner.push(replace(going, verb=RunVerb.STOP, spec=None))
    assert (await planner.ended("1.1")).part.signal == 15
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, most))
    await planner.push(a_run("true", job=3))
    assert (await planner.ended("3.1")).part.state is JobState.DONE


def test_a_host_is_ready_again_once_a_check_has_passed_and_some_time_has() -> None:
    found = Readiness()
    assert not found.checked("", 0.0)
    found.fault("it is full", 10.0)
    assert (found.checked("", 20.0), found.reason) == (False, "it is full")
    assert found.checked("it is fuller", 45.0)
    assert (found.checked("", 50.0), found.reason) == (True, "")


def test_a_folder_is_probed_by_writing(tmp_path: Path) -> None:
    assert (room(tmp_path), probe([tmp_path])) == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert probe([tmp_path / "none"]) == f"{tmp_path / 'none'}: no such file or directory"


async def test_a_run_is_ended_though_that_cannot_be_written(planner: PlannerOfRuns, runner: RunnerProcess) -> None:
    await planner.until(lambda: planner.token)
    run = a_run("sleep", "1000")
    await planner.push(run)
    await planner.state("1.1", JobState.RUNNING)
    (runner.folder / "runner" / "node-7" / "runs" / run_key(run) / "wanted.json.new").mkdir()
    await planner.push(replace(run, verb=RunVerb.STOP, spec=None))
    report = await planner.ended("1.1")
    assert (report.part.state, report.part.signal) == (JobState.CANCELLED, 15)


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


def test_half_a_line_costs_no_other_ended_run(tmp_path: Path) -> None:
    run = a_run("true", environment={"TOKEN": "secret"})
    ended = EndedRuns(tmp_path / "ended")
    ended.add_closed("1.1-abc", run)
    ended.close()
    with (tmp_path / "ended").open("a") as file:
        file.write('{"key":"2.1-d')
    ended = EndedRuns(tmp_path / "ended")
    ended.add_logged("1.1-abc")
    ended.close()
    assert ended.read() == {"1.1-abc": Ended(key="1.1-abc", run=replace(run, spec=None), logged=True)}


def test_a_supervisor_does_not_claim_what_it_cannot_start(tmp_path: Path) -> None:
    """The runner removes what is to be started as soon as it sees the claim of whoever has read it."""
    supervise(str(tmp_path), 0)
    assert not (tmp_path / "status").exists()
