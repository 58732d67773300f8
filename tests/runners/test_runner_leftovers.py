"""What the commands of runs leave behind is ended before their end is reported: nine ways to leave it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from corral.schemas.work.jobs import JobState
from corral.schemas.work.runs import RunVerb
from msgspec.structs import replace
from support.local_cluster import alive, wait_for
from support.planner_of_runs import PlannerOfRuns, RunnerProcess, a_run

WORKER = """
import os, signal, sys, time
nowhere = os.open("/dev/null", os.O_RDWR)
for number in (0, 1, 2): os.dup2(nowhere, number)
if len(sys.argv) > 2: signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1] + ".new", "w").write(str(os.getpid()))
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(300)
"""
AGENT = """
import os, signal, subprocess, sys, time
subprocess.Popen([sys.executable, sys.argv[1], sys.argv[2]])
while not os.path.exists(sys.argv[2]): time.sleep(0.02)
os.kill(os.getpid(), signal.SIGKILL)
"""
# $1 is the worker with its file. It ends by itself: the first two; it is stopped: the others.
SHELL = {
    "the command ends, a worker in the background stays": '$1 & until [ -e "$2" ]; do sleep 0.02; done; exit 0',
    "the agent kills itself, its worker stays": "exec $0 $3",
    "a worker in a session of its own": "setsid $1 & sleep 300",
    "a worker that ignores SIGTERM": "$1 ignore & wait",
    "the direct child": "exec $1",
    "a shell script around the worker": "$1; echo done",
    "a direct child that ignores SIGTERM": "exec $1 ignore",
    "a stubborn worker in a session of its own": "setsid $1 ignore & wait",
    "a daemon that has forked twice": "(setsid $1 ignore &); sleep 300",
}
EXITS = [(0, None), (None, 9), (None, 15), (None, 15), (None, 15), (None, 15), (None, 9), (None, 15), (None, 15)]


async def test_nothing_is_left_when_the_end_is_reported(
    planner: PlannerOfRuns, runner: RunnerProcess, tmp_path: Path
) -> None:
    worker, agent = tmp_path / "worker.py", tmp_path / "agent.py"
    worker.write_text(WORKER)
    agent.write_text(AGENT)
    await planner.until(lambda: planner.token)
    runs = []
    for job, script in enumerate(SHELL.values(), start=1):
        file = tmp_path / f"{job}.pid"
        words = f"{sys.executable} {worker} {file}"
        runs.append(a_run("sh", "-c", script, sys.executable, words, str(file), f"{agent} {worker} {file}", job=job))
    await planner.push(*runs)
    files = [tmp_path / f"{run.job_id}.pid" for run in runs]
    await asyncio.to_thread(wait_for, lambda: all(file.exists() for file in files))
    pids = [int(file.read_text()) for file in files]
    await planner.state("9.1", JobState.RUNNING)
    # The first two end by themselves; the runner is killed under the others, which are stopped by the next one.
    runner.kill()
    runner.start()
    for run in runs[2:]:
        planner.runs[run.run_id] = replace(planner.runs[run.run_id], verb=RunVerb.STOP, grace_seconds=0.5, reason="x")
    for run, pid, exit_and_signal in zip(runs, pids, EXITS, strict=True):
        report = await planner.ended(run.run_id)
        assert not alive(pid), SHELL
        assert (run.run_id, report.part.exit_code, report.part.signal) == (run.run_id, *exit_and_signal)
        assert report.part.state is (JobState.DONE if exit_and_signal == (0, None) else report.part.state)
