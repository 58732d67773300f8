"""kill -9 of the runner, of the bus and of a supervisor, at every state of a run: each run is executed once."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import signal
from pathlib import Path

import pytest
from corral.bus.process_identity import boot_id
from corral.cli.local.server import EmbeddedServer
from corral.runners.journal import Journal
from corral.runners.launcher import Launcher
from corral.schemas.work.jobs import JobState
from corral.schemas.work.runs import RunVerb
from msgspec.structs import replace
from support.local_cluster import alive, wait_for
from support.planner_of_runs import PlannerOfRuns, RunnerProcess, a_run

# Notes each of its executions, and ends with 5 once there is a file `go`.
COUNTED = 'echo $$ >> "$0/executions"; until [ -e "$0/go" ]; do sleep 0.02; done; exit 5'


def executions(folder: Path) -> list[int]:
    file = folder / "executions"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


async def test_a_run_survives_the_runner_that_is_killed_while_it_runs(
    planner: PlannerOfRuns, runner: RunnerProcess, tmp_path: Path
) -> None:
    await planner.until(lambda: planner.token)
    await planner.push(a_run("sh", "-c", COUNTED, str(tmp_path)))
    await planner.state("1.1", JobState.RUNNING)
    runner.kill()
    planner.reports.clear()
    runner.start()
    await planner.state("1.1", JobState.RUNNING)
    (tmp_path / "go").touch()
    report = await planner.ended("1.1")
    assert (report.part.exit_code, len(executions(tmp_path))) == (5, 1)


@pytest.mark.long
async def test_a_run_that_ends_without_a_runner_is_reported_by_the_next_one_until_that_is_stored(
    planner: PlannerOfRuns, runner: RunnerProcess, tmp_path: Path
) -> None:
    await planner.until(lambda: planner.token)
    planner.acknowledges = False
    run = a_run("sh", "-c", COUNTED, str(tmp_path))
    await planner.push(run)
    await planner.state("1.1", JobState.RUNNING)
    runner.kill()
    (tmp_path / "go").touch()
    [pid] = executions(tmp_path)
    await asyncio.to_thread(wait_for, lambda: not alive(pid))
    for _ in range(2):  # the end is not stored by the planner yet, so it comes again after a further kill
        planner.reports.clear()
        runner.start()
        assert (await planner.ended("1.1")).part.exit_code == 5
        runner.kill()
    planner.acknowledges = True
    runner.start()
    planner.reports.clear()
    await planner.ended("1.1")
    # Once it is stored it does not come again, nor is it executed again where an order for it comes late.
    sent = len(planner.all_reports)
    await planner.until(lambda: len(planner.all_reports) > sent + 1 and not planner.all_reports[-1].runs)
    await planner.push(run)
    sent = len(planner.all_reports)
    await planner.until(lambda: len(planner.all_reports) > sent)
    assert len(executions(tmp_path)) == 1


@pytest.mark.parametrize(
    "at",
    [
        pytest.param("before the journal", marks=pytest.mark.long),
        "before the claim",
        pytest.param("claimed twice", marks=pytest.mark.long),
    ],
)
async def test_a_start_that_was_interrupted_is_made_once(
    at: str, planner: PlannerOfRuns, runner: RunnerProcess, tmp_path: Path
) -> None:
    # What is on disk in these moments is made by hand: by a run that is prepared, and a runner that is killed then.
    await planner.until(lambda: planner.token)
    run = a_run("sh", "-c", COUNTED, str(tmp_path), verb=RunVerb.PREPARE)
    await planner.push(run)
    await planner.until(lambda: (found := planner.reports.get("1.1")) and found.prepared)
    runner.kill()
    host = runner.folder / "runner" / "node-7"
    [folder] = (host / "runs").iterdir()
    assert not (folder / "status").exists()
    if at != "before the journal":
        journal = Journal(host)
        journal.begin([folder.name], boot_id())
        journal.close()
    planner.runs["1.1"] = replace(planner.runs["1.1"], verb=RunVerb.START)
    runner.start()
    await planner.state("1.1", JobState.RUNNING)
    if at == "claimed twice":
        # An order that a killed runner has still given to its zygote, as it comes to be carried out.
        runner.kill()
        claim = (folder / "status").read_bytes()
        runner.start()
        late = Launcher()
        late.fork({str(folder): {}})
        late.close()
        assert late.process is not None
        # It ends once the order is carried out.
        await asyncio.to_thread(late.process.wait)
        assert (folder / "status").read_bytes() == claim
    (tmp_path / "go").touch()
    assert (await planner.ended("1.1")).part.exit_code == 5
    assert len(executions(tmp_path)) == 1


async def test_a_run_that_is_prepared_is_prepared_by_the_next_runner_too(
    planner: PlannerOfRuns, runner: RunnerProcess
) -> None:
    await planner.until(lambda: planner.token)
    await planner.push(a_run("true", verb=RunVerb.PREPARE))
    await planner.until(lambda: (found := planner.reports.get("1.1")) and found.prepared)
    runner.kill()
    planner.reports.clear()
    runner.start()
    await planner.until(lambda: (found := planner.reports.get("1.1")) and found.prepared)


@pytest.mark.long
async def test_what_a_run_has_left_is_ended_without_the_runner(
    planner: PlannerOfRuns, runner: RunnerProcess, tmp_path: Path
) -> None:
    await planner.until(lambda: planner.token)
    # The command has ended, and what it has left resists SIGTERM: the state is completing.
    left = 'trap "" TERM; echo $$ > "$0/left"; while :; do sleep 0.05; done'
    script = f'setsid sh -c \'{left}\' "$0" & until [ -s "$0/left" ]; do sleep 0.02; done; exit 4'
    await planner.push(a_run("sh", "-c", script, str(tmp_path), grace_seconds=3.0))
    await planner.state("1.1", JobState.COMPLETING)
    runner.kill()
    pid = int((tmp_path / "left").read_text())
    await asyncio.to_thread(wait_for, lambda: not alive(pid))
    planner.reports.clear()
    runner.start()
    report = await planner.ended("1.1")
    assert (report.part.state, report.part.exit_code) == (JobState.FAILED, 4)


async def run_with_a_daemon(planner: PlannerOfRuns, folder: Path) -> int:
    """Start a run that leaves a daemon without its environment, and return the daemon's process id."""
    await planner.until(lambda: planner.token)
    bare = 'env -i setsid sh -c \'trap "" TERM; echo $$ > "$0/bare"; while :; do /bin/sleep 0.05; done\' "$0" &'
    await planner.push(a_run("sh", "-c", f"{bare} {COUNTED}", str(folder)))
    await planner.state("1.1", JobState.RUNNING)
    return int(wait_for(lambda: (folder / "bare").exists() and (folder / "bare").read_text()))


def kill_supervisor(runner: RunnerProcess) -> None:
    """Kill the supervisor of the only run."""
    [claim] = (runner.folder / "runner" / "node-7" / "runs").glob("*/status")
    os.kill(json.loads(claim.read_bytes().splitlines()[0])["pid"], signal.SIGKILL)


@pytest.mark.long
async def test_a_run_whose_supervisor_is_killed_is_lost_and_leaves_nothing(
    planner: PlannerOfRuns, runner: RunnerProcess, tmp_path: Path
) -> None:
    bare_pid = await run_with_a_daemon(planner, tmp_path)
    kill_supervisor(runner)
    report = await planner.state("1.1", JobState.LOST)
    assert report.part.message == "its supervisor was killed"
    assert [alive(pid) for pid in (*executions(tmp_path), bare_pid)] == [False, False]


@pytest.mark.long
async def test_what_a_supervisor_leaves_that_is_killed_without_a_runner_is_ended(
    planner: PlannerOfRuns, runner: RunnerProcess, tmp_path: Path
) -> None:
    bare_pid = await run_with_a_daemon(planner, tmp_path)
    runner.kill()
    kill_supervisor(runner)
    for pid in (*executions(tmp_path), bare_pid):
        await asyncio.to_thread(wait_for, lambda pid=pid: not alive(pid))
    planner.reports.clear()
    runner.start()
    await planner.state("1.1", JobState.LOST)
    assert len(executions(tmp_path)) == 1


@pytest.mark.long
async def test_jobs_go_on_without_the_bus_and_are_reported_when_it_is_back(
    planner: PlannerOfRuns, runner: RunnerProcess, server: EmbeddedServer, tmp_path: Path
) -> None:
    await planner.until(lambda: planner.token)
    await planner.push(a_run("sh", "-c", COUNTED, str(tmp_path)))
    await planner.state("1.1", JobState.RUNNING)
    server.kill()
    (tmp_path / "go").touch()
    [pid] = executions(tmp_path)
    await asyncio.to_thread(wait_for, lambda: not alive(pid))
    server.start()
    assert (await planner.ended("1.1")).part.exit_code == 5
    assert len(executions(tmp_path)) == 1


@pytest.mark.long
async def test_a_run_ends_at_its_time_limit_without_bus_and_runner(
    planner: PlannerOfRuns, runner: RunnerProcess, tmp_path: Path
) -> None:
    await planner.until(lambda: planner.token)
    limit = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=2)
    await planner.push(a_run("sh", "-c", COUNTED, str(tmp_path), ends_at=limit))
    await planner.state("1.1", JobState.RUNNING)
    runner.kill()
    [pid] = executions(tmp_path)
    await asyncio.to_thread(wait_for, lambda: not alive(pid))
    planner.reports.clear()
    runner.start()
    report = await planner.ended("1.1")
    assert report.part.signal == signal.SIGTERM
    assert report.part.message == "its time limit has ended it"
    assert report.part.ended_at is not None
    assert report.part.ended_at <= limit


@pytest.mark.long
async def test_a_run_that_resists_is_killed_before_its_lease_ends_however_long_its_grace(
    planner: PlannerOfRuns, runner: RunnerProcess, tmp_path: Path
) -> None:
    """Whoever has the devices next finds them free."""
    await planner.until(lambda: planner.token)
    limit = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=2)
    stubborn = 'trap "" TERM; while :; do sleep 0.05; done'
    left = "setsid sh -c '" + stubborn + "' & sleep 1"
    runs = [
        a_run("sh", "-c", command, job=job, run_id=f"{job}.1", ends_at=limit, grace_seconds=30.0)
        for job, command in ((1, stubborn), (2, left))
    ]
    await planner.push(*runs)
    await planner.state("1.1", JobState.RUNNING)
    # As the planner does some time before the limit, or when the job is cancelled.
    await planner.push(replace(runs[0], verb=RunVerb.STOP, grace_seconds=30.0, reason="time limit of 2 s"))
    for run in runs:
        report = await planner.ended(run.run_id)
        assert report.part.ended_at is not None
        assert report.part.ended_at <= limit
