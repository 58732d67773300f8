"""The commands about jobs, on a real bus, with the planner's side played by `JobsPlanner`."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.cli.work.jobs import tables as job_tables
from corral.schemas.work.jobs import Condition, Dependency, Job, JobState, JobVerb, OverrideAction
from nats.aio.client import Client as Bus
from rich.console import Console
from support.jobs_planner import JobsPlanner, jobs_planner
from support.local_cluster import invoke

Done = subprocess.CompletedProcess[str]
Corral = Callable[..., Awaitable[Done]]


@pytest.fixture
async def planner(nc: Bus) -> AsyncIterator[JobsPlanner]:
    async with jobs_planner(nc) as made:
        yield made


@pytest.fixture
def corral(server: EmbeddedServer, planner: JobsPlanner) -> Corral:
    async def run(*words: str, **environment: str) -> Done:
        return await asyncio.to_thread(lambda: invoke(*words, url=server.url, **environment))

    return run


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., str]:
    def write(*lines: str) -> str:
        file = tmp_path / "train.sh"
        file.write_text("\n".join(("#!/bin/bash", *lines, "python train.py", "")))
        return str(file)

    return write


async def test_a_script_goes_with_its_options_and_the_command_line_wins(
    corral: Corral, planner: JobsPlanner, script: Callable[..., str]
) -> None:
    file = script(
        "#CORRAL --gpus-per-host 4 --memory 20GiB --retries 3 --requeue --name deep --group lab",
        "#CORRAL --env A=script --env B=script --label team=vision",
    )
    done = await corral("submit", "--gpus", "2", "--no-requeue", "--env", "A=mine", file, "--lr", "0.1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Submitted job 1000" in done.stdout
    spec = planner.specs["1000"]
    assert (spec.request.gpus, spec.request.gpu_memory_bytes, spec.request.name) == (2, 20 * 2**30, "deep")
    assert (spec.retries, spec.requeue, spec.arguments) == (3, False, ["--lr", "0.1"])
    assert spec.group == "lab"
    assert (spec.environment, spec.request.labels) == ({"A": "mine", "B": "script"}, {"team": "vision"})
    assert spec.script.endswith("python train.py\n")
    # A variable goes between: after the command line, before the script.
    await corral("submit", file, CORRAL_SUBMIT_RETRIES="1")
    assert (planner.specs["1001"].retries, planner.specs["1001"].request.gpus) == (1, 4)


async def test_lines_of_slurm_are_understood_or_named(
    corral: Corral, planner: JobsPlanner, script: Callable[..., str]
) -> None:
    known = script("#SBATCH --gres=gpu:a100:2 -t 2:00:00", "#SBATCH -p gpu -d afterany:7", "#SBATCH --array=0-9%2")
    done = await corral("submit", "--quiet", known)
    assert (done.returncode, done.stdout) == (0, "1000\n")
    assert "train.sh:3: -p gpu: there are no partitions" in done.stderr
    spec = planner.specs["1000"]
    assert (spec.request.gpus, spec.request.models, spec.request.max_seconds) == (2, ["*a100*"], 7200)
    assert (spec.array, spec.after) == ("0-9%2", [Dependency(job_id="7", condition=Condition.ANY)])
    unknown = script("#SBATCH --gpus=1", "#SBATCH --exclusive", "#SBATCH --licenses=ansys")
    done = await corral("submit", unknown)
    assert done.returncode == 2
    assert all(text in done.stderr for text in ("train.sh:3: --exclusive", "train.sh:4: --licenses=ansys"))
    done = await corral("submit", "--ignore-unknown", "--json", unknown)
    assert (done.returncode, json.loads(done.stdout)["gpus"]) == (0, 1)
    assert "ignored: " in done.stderr


async def test_a_command_stands_behind_two_dashes(corral: Corral, planner: JobsPlanner, tmp_path: Path) -> None:
    await corral("submit", "--hosts", "2", "--after", "7,8:any", "--env", "KEY", "--", "python", "t.py", "--gpus", "9",
                 KEY="secret")  # fmt: skip
    spec = planner.specs["1000"]
    assert (spec.command, spec.script, spec.hosts, spec.request.gpus) == (["python", "t.py", "--gpus", "9"], "", 2, 2)
    assert [f"{one.job_id}:{one.condition.value}" for one in spec.after] == ["7:ok", "8:any"]
    assert (spec.environment, spec.request.name) == ({"KEY": "secret"}, "python")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("python", "train.py"), "corral submit -- python train.py"),
        (("/bin/true",), "can't be read"),
        (("--array", "9-0", "--", "x"), "--array"),
        (("--gpus", "3", "--hosts", "2", "--", "x"), "ask for 4, or say how many each has with --gpus-per-host"),
        (("--after", "x", "--", "x"), "--after 'x' is no dependency"),
        (("--env", "=1", "--", "x"), "--env '=1'"),
        (("--env", "NOT_SET_HERE", "--", "x"), "write NOT_SET_HERE=VALUE"),
        (("--on-preempt", "NONE", "--", "x"), "SIGUSR1"),
        (("--gpuz", "2", "--", "x"), "--gpus"),
        (("--memory", "20", "--", "x"), "20GiB"),
    ],
)
async def test_a_wrong_submission_is_told_what_is_right(corral: Corral, words: tuple[str, ...], why: str) -> None:
    done = await corral("submit", *words)
    assert (done.returncode, why in done.stderr) == (2, True), done.stderr
    assert done.stdout == ""


async def test_wrong_lines_of_a_script_are_named(corral: Corral, script: Callable[..., str]) -> None:
    for line, why in (
        ("#CORRAL --gpuz 2", "train.sh:3: No such option: --gpuz"),
        ("#CORRAL --retries -2", "train.sh:3: Invalid value for '--retries'"),
        ("#CORRAL python train.py", "train.sh:3: 'python' is no option"),
        ("#CORRAL --name 'x", "train.sh: line 3"),
        ("# CORRAL --gpus 2", "train.sh:3: # CORRAL --gpus 2"),
    ):
        done = await corral("submit", script("#CORRAL --name x", line))
        assert (done.returncode, why in done.stderr) == (2, True), done.stderr


async def test_submit_waits_and_ends_as_the_job_does(corral: Corral, planner: JobsPlanner) -> None:
    async def end(state: JobState, job_id: str, **values: Any) -> None:
        while job_id not in planner.specs:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        planner.set(job_id, JobState.RUNNING, log_bytes=6)
        await planner.print(job_id, "h0", 0, b"hello\n", ended=True)
        planner.set(job_id, state, log_bytes=6, **values)

    codes: list[int] = []
    for job_id, state, values in (
        ("1000", JobState.DONE, {"exit_code": 0}),
        ("1001", JobState.FAILED, {"exit_code": 7}),
        ("1002", JobState.FAILED, {"signal": 9}),
        ("1003", JobState.PREEMPTED, {}),
    ):
        ending = asyncio.create_task(end(state, job_id, **values))
        done = await corral("submit", "--follow", "--quiet", "--", "x")
        await ending
        assert done.stdout == f"{job_id}\nhello\n"
        codes.append(done.returncode)
    assert codes == [0, 7, 137, 9]


async def test_jobs_are_listed_and_shown(corral: Corral, planner: JobsPlanner) -> None:
    await corral("submit", "--name", "sweep", "--array", "0-99", "--memory", "8GiB", "--", "x")
    await corral("submit", "--name", "other", "--", "python", "a b.py", CORRAL_OWNER="ben")
    planner.set("1000", JobState.RUNNING, index=7, progress=0.42)
    planner.set("1000", JobState.FAILED, index=8, exit_code=3, message="it ended with 3")
    done = await corral("jobs")
    assert [line.split()[:4] for line in done.stdout.splitlines()[1:]] == [
        ["1001", "ben", "other", "pending"],
        ["1000", "tester", "sweep", "running"],
    ]
    assert "1 running, 98 pending, 1 failed" in done.stdout
    mine = json.loads((await corral("jobs", "--mine", "--json")).stdout)
    assert [(one["job"]["job_id"], one["job"]["counts"]["failed"]) for one in mine["jobs"]] == [("1000", 1)]
    shown = (await corral("job", "1000", "--most", "2")).stdout
    for text in ("sweep", "0-99: 1 running", "8.0 GiB each", "1000_7", "42%", "exit 3", "98 more tasks", "1000_8"):
        assert text in shown, text
    assert (await corral("job", "1001", "--script", CORRAL_OWNER="ben")).stdout == "python 'a b.py'\n"
    assert (await corral("job", "1001", "--script")).returncode == 5
    waiting = asyncio.create_task(corral("job", "1000_7", "--wait"))
    for _ in range(2):
        planner.listed.clear()
        await planner.listed.wait()
    planner.set("1000", JobState.FAILED, index=7, exit_code=4)
    assert (await waiting).returncode == 4
    assert (await corral("job", "99")).returncode == 5
    assert (await corral("job", "1000_100")).returncode == 5
    assert "did you mean running?" in (await corral("jobs", "--state", "runing")).stderr


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_a_narrow_terminal_has_what_matters_most(width: int) -> None:
    many = [
        Job(
            job_id=str(123456 + number), owner="ann.lee", name="a-long-name-of-a-sweep-over-learning-rates",
            state=JobState.PREEMPTED, submitted_at=datetime(2026, 3, 2, tzinfo=UTC), array="0-99", gpus=8, hosts=2,
            counts={"preempted": 100}, message="the lease was preempted for others, who are guaranteed it",
        )
        for number in range(3)
    ]  # fmt: skip
    out = Console(width=width, record=True, file=io.StringIO())
    out.print(job_tables.jobs_table(many, width, datetime(2026, 3, 3, tzinfo=UTC)))
    lines = out.export_text().splitlines()
    assert len(lines) == 4
    assert all(len(line.rstrip()) <= width for line in lines)
    assert all(word in lines[2] for word in ("123457", "preempted", "a-long"))
    assert ("the lease" in lines[2], "100 preempted" in lines[2]) == (width >= 80, width >= 120)


async def test_jobs_and_tasks_are_commanded(corral: Corral, planner: JobsPlanner) -> None:
    await corral("submit", "--array", "0-9", "--", "x")
    await corral("submit", "--", "x", CORRAL_OWNER="ben")
    done = await corral("cancel", "1000_[2-4]", "1000_7", "--signal", "int", "--reason", "noon")
    assert (done.returncode, done.stdout.count("Cancelled")) == (0, 2)
    commands = [(one.verb, one.indexes, one.signal) for one in planner.commands if not isinstance(one, OverrideAction)]
    assert commands == [(JobVerb.CANCEL, [2, 3, 4], "SIGINT"), (JobVerb.CANCEL, [7], "SIGINT")]
    for name, verb in (("hold", JobVerb.HOLD), ("unhold", JobVerb.RELEASE), ("resubmit", JobVerb.RESUBMIT)):
        assert (await corral(name, "1000")).returncode == 0
        last = planner.commands[-1]
        assert not isinstance(last, OverrideAction)
        assert (last.verb, last.indexes) == (verb, [])
    # One that is another's does not keep the others from being cancelled.
    done = await corral("cancel", "1001", "1000")
    assert (done.returncode, "Cancelled 1000" in done.stdout, "--override" in done.stderr) == (5, True, True)
    assert (await corral("cancel", "--override", "1001")).returncode == 0
    assert isinstance(planner.commands[-1], OverrideAction)
    assert (await corral("cancel", "--all", CORRAL_OWNER="ben")).stdout == "no jobs\n"
    for words in (("cancel",), ("cancel", "--all", "7"), ("cancel", "x"), ("hold", "7_[9-1]"), ("resubmit", "--all")):
        assert (await corral(*words)).returncode == 2


async def test_logs_show_either_end_and_the_names_of_tasks(corral: Corral, planner: JobsPlanner) -> None:
    await corral("submit", "--array", "0-1", "--", "x")
    for index in (0, 1):
        planner.set("1000", JobState.DONE, index=index, log_bytes=100)
        await planner.print("1000", "h0", 0, b"one\ntwo\nthr", index=index)
        await planner.print("1000", "h1", 11, b"ee\nfo", index=index)
        await planner.print("1000", "t3", 90, b"ly\nlast", index=index, ended=True)
    done = await corral("logs", "1000_1")
    assert done.stdout == "one\ntwo\nthree\nfo" + "ly\nlast"
    assert done.stderr == "corral: 74 B were not kept here, in /logs/1000_1 on host-1\n"
    both = "".join(f"1000_{index} | {line}\n" for index in (0, 1) for line in ("one", "two"))
    assert (await corral("logs", "1000", "--head", "2")).stdout == both
    assert (await corral("logs", "1000_0", "--tail", "2")).stdout == "ly\nlast\n"
    assert (await corral("logs", "-f", "1000")).stdout.count("1000_1 | ") == 6
    assert (await corral("logs", "1000_5")).returncode == 5
    assert (await corral("logs", "1000", "--head", "2", "-f")).returncode == 2
