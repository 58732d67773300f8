"""Jobs in containers of a rootless Podman: a runner without rights, as an account of its own."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.schemas.requests import Grant
from corral.schemas.work.jobs import JobState
from corral.schemas.work.runs import RunVerb
from msgspec.structs import replace
from support.containers import IMAGE, import_image, podman_environment, reason_against
from support.local_cluster import wait_for
from support.planner_of_runs import PlannerOfRuns, RunnerProcess, a_run

pytestmark = pytest.mark.long
NAME = "corral-rootless"
CDI = Path("/etc/cdi/corral-rootless.json")


@pytest.fixture
def account() -> Iterator[pwd.struct_passwd]:
    """An account with ids of its own for containers, which useradd gives it."""
    if os.geteuid() != 0 or shutil.which("useradd") is None or shutil.which("newuidmap") is None:
        pytest.skip("needs root to make an account, and newuidmap for its containers")
    python = subprocess.run(["/usr/bin/python3", "--version"], capture_output=True, text=True, check=False).stdout
    if not python.startswith(f"Python {sys.version_info.major}.{sys.version_info.minor}."):
        pytest.skip("the account needs a Python of this version outside of root's home")
    subprocess.run(["useradd", "--create-home", "--shell", "/bin/sh", NAME], check=True)
    yield pwd.getpwnam(NAME)
    subprocess.run(["userdel", "--remove", NAME], check=False, capture_output=True)


@pytest.fixture
def folder(account: pwd.struct_passwd) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as made:
        for name in ("", "run", "state"):
            (Path(made) / name).mkdir(mode=0o700, exist_ok=True)
            os.chown(Path(made) / name, account.pw_uid, account.pw_gid)
        yield Path(made)


@pytest.fixture
def variables(account: pwd.struct_passwd, folder: Path) -> Iterator[dict[str, str]]:
    """Variables of the account's Podman, which has the image."""
    own = podman_environment(folder) | {"HOME": account.pw_dir, "XDG_RUNTIME_DIR": str(folder / "run")}
    import_image(folder, podman_environment(folder))
    if why := reason_against(podman_environment(folder)):
        pytest.skip(why)
    (folder / "image.tar").chmod(0o644)
    done = podman(account, own, "import", str(folder / "image.tar"), IMAGE)
    tried = podman(account, own, "run", "--rm", "--network=host", IMAGE, "sh", "-c", "exit 3")
    if tried.returncode != 3:
        pytest.skip(f"no rootless containers here: {done.stderr} {tried.stderr}")
    device = {"name": "GPU-1", "containerEdits": {"env": ["FAKE_GPU_1=1"], "deviceNodes": [{"path": "/dev/full"}]}}
    CDI.parent.mkdir(exist_ok=True)
    CDI.write_text(json.dumps({"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "devices": [device]}))
    yield own
    CDI.unlink()
    podman(account, own, "system", "reset", "--force")


def podman(account: pwd.struct_passwd, variables: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["podman", *words],
        env={"PATH": os.environ["PATH"], **variables},
        user=account.pw_uid,
        group=account.pw_gid,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )


def lines_of(file: str) -> list[str]:
    return Path(file).read_text().splitlines()


async def test_a_runner_without_rights_runs_a_job_in_a_container(
    planner: PlannerOfRuns,
    server: EmbeddedServer,
    account: pwd.struct_passwd,
    folder: Path,
    variables: dict[str, str],
) -> None:
    runner = RunnerProcess(server.url, folder / "state", "--executor", "podman", more=variables, account=account)
    try:
        await planner.until(lambda: planner.token)
        assert planner.all_reports[-1].executors == ["podman"]
        script = '#!/bin/sh\nid -u; echo "$FAKE_GPU_1|$CUDA_VISIBLE_DEVICES|$TOKEN"; ls /dev; exit 7\n'
        # Without cgroup v2, limits have no effect without rights: Podman says so, and starts it.
        grants = [Grant(host="node-7", device="GPU-1", cpus=1.0, host_memory_bytes=2**28)]
        home = account.pw_dir
        run = a_run(job=1, script=script, image=IMAGE, environment={"TOKEN": "abc"}, directory=home, grants=grants)
        await planner.push(run)
        report = await planner.ended("1.1")
        out = [line for line in lines_of(report.part.log_file) if not line.startswith("Resource limits are not supp")]
        assert (report.part.message, report.part.exit_code) == ("", 7), out
        # Inside it has the account's own id, as its files outside have.
        assert out[:2] == [str(account.pw_uid), "1|GPU-1|abc"]
        assert ("full" in out, "kmsg" in out) == (True, False)
        going = a_run("sleep", "1000", job=2, image=IMAGE, directory=home, grace_seconds=1.0)
        await planner.push(going)
        await planner.state("2.1", JobState.RUNNING)
        wait_for(lambda: "corral-2.1" in podman(account, variables, "ps", "--format", "{{.Names}}").stdout)
        runner.kill()
        runner.start()
        await planner.push(replace(going, verb=RunVerb.STOP, spec=None))
        report = await planner.ended("2.1")
        assert report.part.exit_code in (128 + signal.SIGTERM, 128 + signal.SIGKILL) or report.part.signal
        assert podman(account, variables, "ps", "--all", "--quiet").stdout == ""
    finally:
        runner.stop()
        runner.end_runs()
