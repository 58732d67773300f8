"""Jobs as transient systemd units, in a container that boots systemd.

What the kernel makes of a unit's limits is systemd's matter; in a container it may lack the controllers for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.schemas.requests import Grant
from corral.schemas.work.jobs import JobState
from corral.schemas.work.runs import RunVerb
from msgspec.structs import replace
from support.containers import podman_environment
from support.planner_of_runs import PlannerOfRuns, a_run
from support.sessions import inside

pytestmark = [pytest.mark.long]
IMAGE = "localhost/corral-test:systemd"
"""Made by `debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,passwd bookworm` and `podman import`."""
NAME = "corral-test-systemd"
ROOT = Path(__file__).parents[2]


class Machine:
    """A container with systemd, in which the runner of this checkout runs."""

    def __init__(self, variables: dict[str, str]) -> None:
        self._environment = os.environ | variables

    def podman(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["podman", *words], env=self._environment, capture_output=True, text=True, check=False, timeout=120
        )

    def run(self, *words: str) -> str:
        return self.podman("exec", NAME, *words).stdout

    def names(self) -> list[str]:
        """Names of all processes in it."""
        return self.run("sh", "-c", "cat /proc/[0-9]*/comm").split()

    def boot(self, shared: Path) -> str:
        """Boot it. Returns why it does not; empty if it does."""
        self.podman("rm", "--force", "--time=0", NAME)
        interpreter = str(Path(sys.base_prefix))
        volumes = [f"{path}:{path}" for path in (str(ROOT), interpreter, str(shared))]
        options = ["--detach", "--name", NAME, "--network=host", "--systemd=always", "--privileged"]
        options += [word for volume in volumes for word in ("--volume", volume)]
        started = self.podman("run", *options, IMAGE, "/lib/systemd/systemd")
        if started.returncode:
            return started.stderr.strip()
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if self.run("systemctl", "is-system-running").strip() in ("running", "degraded"):
                return ""
            time.sleep(0.2)
        return "systemd did not boot within 60 s: " + self.podman("logs", NAME).stdout[-500:]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(podman_environment(tmp_path))
    try:
        found = made.podman("image", "exists", IMAGE).returncode == 0
    except FileNotFoundError:
        pytest.skip("podman is not installed")
    if not found:
        pytest.skip(f"there is no image {IMAGE} with systemd")
    try:
        if why := made.boot(tmp_path):
            pytest.skip(f"no container with systemd boots here: {why}")
        yield made
    finally:
        made.podman("rm", "--force", "--time=0", NAME)


async def test_a_job_in_a_unit_has_its_own_limits_survives_the_runner_and_leaves_nothing(
    planner: PlannerOfRuns, server: EmbeddedServer, machine: Machine, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    variables = [f"--setenv=CORRAL_NATS_URL={server.url}", "--setenv=CORRAL_CONFIG=/dev/null"]
    runner = [
        *("systemd-run", "--unit=corral-runner", "--property=KillMode=process", *variables, "--"),
        *(sys.executable, "-m", "corral.cli.main", "runner", "--host", "node-7", "--state", str(state)),
        *("--own-account", "--executor", "systemd"),
    ]
    machine.run(*runner)
    await planner.until(lambda: planner.token, 60)
    assert planner.all_reports[-1].executors == ["systemd"]
    grants = [Grant(host="node-7", device="GPU-1", cpus=2.0, host_memory_bytes=256 * 2**20)]
    script = 'cat /proc/self/cgroup; setsid sh -c "trap \\"\\" TERM; echo \\$\\$ > $0/left; sleep 300" & sleep 300'
    run = a_run("sh", "-c", script, str(tmp_path), grants=grants, environment={"TOKEN": "secret-of-the-job"})
    await planner.push(run)
    report = await planner.state("1.1", JobState.RUNNING)
    assert report.part.executor == "systemd"
    [unit] = machine.run("systemctl", "list-units", "--plain", "--no-legend", "corral-run-*").split()[:1]
    wanted = ("MemoryMax", "CPUQuotaPerSecUSec", "DevicePolicy", "KillMode", "Slice", "Environment", "ExecStart")
    shown = machine.run("systemctl", "show", unit, *(f"--property={name}" for name in wanted))
    found = dict(line.split("=", 1) for line in shown.splitlines())
    assert (found["MemoryMax"], found["CPUQuotaPerSecUSec"]) == (str(256 * 2**20), "2s")
    assert (found["DevicePolicy"], found["KillMode"], found["Slice"]) == ("closed", "control-group", "corral.slice")
    assert "secret-of-the-job" not in shown
    await planner.until(lambda: (tmp_path / "left").exists())
    assert unit in machine.run("cat", report.part.log_file)
    # A session is in the unit, too.
    out, code = await inside(planner.nc, "1.1", "sh", "-c", 'cat /proc/self/cgroup; echo "$TOKEN"', terminal=True)
    assert (unit in out, "secret-of-the-job" in out, code) == (True, True, 0)

    # The runner is killed; the unit goes on, and its end is reported by the next one.
    machine.run("systemctl", "kill", "--signal=KILL", "corral-runner")
    planner.reports.clear()
    machine.run("systemctl", "reset-failed", "corral-runner")
    machine.run(*runner)
    await planner.state("1.1", JobState.RUNNING)
    planner.runs["1.1"] = replace(planner.runs["1.1"], verb=RunVerb.STOP, grace_seconds=0.5)
    report = await planner.ended("1.1")
    assert (report.part.exit_code, report.part.signal) == (None, 15)
    assert "sleep" not in machine.names()

    # A supervisor that is killed: systemd ends what is left in the unit.
    await planner.push(a_run("sh", "-c", script, str(tmp_path), job=2, grants=grants))
    await planner.state("2.1", JobState.RUNNING)
    [unit] = machine.run("systemctl", "list-units", "--plain", "--no-legend", "corral-run-2*").split()[:1]
    machine.run("systemctl", "kill", "--kill-who=main", "--signal=KILL", unit)
    assert (await planner.state("2.1", JobState.LOST)).part.message == "its supervisor was killed"
    assert "sleep" not in machine.names()
    assert machine.run("systemctl", "list-units", "--plain", "--no-legend", "corral-run-*") == ""

    machine.run("systemctl", "stop", "corral-runner")
