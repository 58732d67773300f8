"""Jobs in containers of a real Podman: devices by a CDI file, exit codes, output, and nothing left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.runners.accounts import Account
from corral.runners.execution import VARIABLES_FILE
from corral.runners.executors import Command, Work
from corral.runners.executors import inside as inside_of
from corral.runners.executors.containers import confine
from corral.schemas.requests import Grant
from corral.schemas.work.jobs import JobState
from corral.schemas.work.runs import RunVerb
from msgspec.structs import replace
from support.containers import IMAGE, import_image, podman_environment, reason_against
from support.planner_of_runs import PlannerOfRuns, RunnerProcess, a_run
from support.sessions import inside

pytestmark = [pytest.mark.long]
CDI = Path("/etc/cdi/corral-test.json")


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("podman")
    variables = podman_environment(folder)
    import_image(folder, variables)
    if why := reason_against(variables):
        pytest.skip(why)
    if os.geteuid() != 0:
        pytest.skip("only root may write a CDI file to /etc/cdi")
    devices = [
        {"name": f"GPU-{number}", "containerEdits": {"env": [f"FAKE_GPU_{number}=1"], "deviceNodes": [{"path": node}]}}
        for number, node in ((1, "/dev/full"), (2, "/dev/kmsg"))
    ]
    CDI.parent.mkdir(exist_ok=True)
    CDI.write_text(json.dumps({"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "devices": devices}))
    yield variables
    CDI.unlink()


@pytest.fixture
def runner(server: EmbeddedServer, tmp_path: Path, podman: dict[str, str]) -> Iterator[RunnerProcess]:
    process = RunnerProcess(server.url, tmp_path / "state", "--own-account", more=podman)
    yield process
    process.stop()
    process.end_runs()


def containers(podman: dict[str, str]) -> list[str]:
    listed = subprocess.run(
        ["podman", "ps", "--all", "--format", "{{.Names}}", "--filter", "name=corral-"],
        env=os.environ | podman,
        capture_output=True,
        text=True,
        check=True,
    )
    return listed.stdout.split()


def printed(planner: PlannerOfRuns, run_id: str) -> str:
    return Path(planner.reports[run_id].part.log_file).read_text()


def all_arguments() -> str:
    return subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout


async def test_a_job_in_a_container_has_its_devices_alone_and_ends_with_its_exit_code(
    planner: PlannerOfRuns, runner: RunnerProcess, podman: dict[str, str], tmp_path: Path
) -> None:
    await planner.until(lambda: planner.token)
    assert "podman" in planner.all_reports[-1].executors
    script = 'echo "$TOKEN|$FAKE_GPU_1|$FAKE_GPU_2|$PWD|$CORRAL_JOB_ID|$CONTAINERS_STORAGE_CONF"; ls /dev; exit 41'
    fields = {
        "image": IMAGE,
        "directory": str(tmp_path),
        "environment": {"TOKEN": "secret-of-the-job", "CONTAINERS_STORAGE_CONF": "/of-the-job"},
    }
    await planner.push(a_run("sh", "-c", script, **fields))
    report = await planner.ended("1.1")
    out = printed(planner, "1.1")
    assert (report.part.exit_code, report.part.executor) == (41, "podman"), out
    lines = out.splitlines()
    # The client of the container runs as the runner's account: a job's variables have no effect on it.
    assert lines[0] == f"secret-of-the-job|1||{tmp_path}|1|/of-the-job"
    assert "full" in lines
    assert "kmsg" not in lines

    # A script, whose leftovers end with the container, also where a runner is killed in between.
    script = '#!/bin/sh\nsetsid sh -c "trap \\"\\" TERM; sleep 300" &\necho started\nsleep 300\n'
    run = a_run(job=2, script=script, **fields)
    await planner.push(run)
    await planner.state("2.1", JobState.RUNNING)
    await planner.until(lambda: "started" in printed(planner, "2.1"))
    assert len(containers(podman)) == 1
    assert "secret-of-the-job" not in all_arguments()
    # A session is in the container, too.
    session = 'echo "$TOKEN|$CUDA_VISIBLE_DEVICES|$PWD|$TERM|$(ls /dev)"; exit 3'
    for terminal in (False, True):
        out, code = await inside(planner.nc, "2.1", "sh", "-c", session, terminal=terminal)
        assert out.startswith(f"secret-of-the-job|GPU-1|{tmp_path}|{'vt100' if terminal else ''}"), out
        assert ("full" in out, "kmsg" in out, code) == (True, False, 3)
    runner.kill()
    runner.start()
    planner.runs["2.1"] = replace(planner.runs["2.1"], verb=RunVerb.STOP, grace_seconds=1.0)
    report = await planner.ended("2.1")
    assert report.part.exit_code in (128 + signal.SIGTERM, 128 + signal.SIGKILL) or report.part.signal
    assert containers(podman) == []

    # An option in place of an image is none: the client would take it.
    await planner.push(a_run("busybox", "true", job=4, image="--privileged"))
    assert "its image is none" in (await planner.state("4.1", JobState.FAILED)).part.message

    # Its runner says what it lacks.
    nameless = a_run("true", job=3, image=IMAGE, grants=[Grant(host="node-7", device="GPU-9", index=9)])
    await planner.push(nameless)
    assert "no CDI file" in (await planner.state("3.1", JobState.FAILED)).part.message


def test_docker_knows_every_option(podman: dict[str, str], tmp_path: Path) -> None:
    """The client checks its arguments, and reads the file of variables, before it looks for its daemon."""
    if shutil.which("docker") is None:
        pytest.skip("docker is not installed")
    run = a_run("sh", "-c", "exit 3", image=IMAGE, grants=[Grant(host="node-7", device="GPU-1", index=1, cpus=1.5)])
    work = Work(
        key="1.1-a",
        run=run,
        account=Account("alice", 1000, 1000, [1000, 44], "/home/alice", "/bin/sh", switched=False),
        commands=[Command(words=["sh", "-c", "exit 3"], environment={"TOKEN": "abc"})],
        directory=str(tmp_path),
        folder=str(tmp_path),
        image=IMAGE,
    )
    [command] = confine("docker", work).commands
    file = tmp_path / "variables"
    file.write_text("TOKEN=abc\n")
    started = [str(word).replace(VARIABLES_FILE, str(file)) for word in command.words]
    entered = inside_of("docker", "1.1-a", ["sh"], "vt100")
    for words in (started, entered, *confine("docker", work).finish):
        done = subprocess.run(
            words,
            env={"PATH": os.environ["PATH"], "DOCKER_HOST": f"unix://{tmp_path}/none"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert "annot connect to the Docker daemon" in done.stderr or "no such file" in done.stderr, done.stderr
        assert "flag" not in done.stderr
