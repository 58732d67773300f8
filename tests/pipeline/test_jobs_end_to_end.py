"""Jobs from the command line to a process and back: a real planner, a real runner, real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.local_cluster import CORRAL, LocalCluster, environment, wait_for

HOSTS = "sim-[0001-0002]"


@pytest.fixture(scope="module")
def runner(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A runner of both hosts."""
    folder = tmp_path_factory.mktemp("runner")
    log = folder / "runner.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*CORRAL, "runner", "--host", HOSTS, "--executor", "process", "--own-account", "--end-jobs",
             "--state", str(folder / "state")],
            env=environment(CORRAL_NATS_URL=cluster.url), stdout=out, stderr=out,
        )  # fmt: skip
    wait_for(lambda: b"running jobs" in log.read_bytes() or process.poll() is not None, 30)
    yield
    process.terminate()
    process.wait(30)


def test_an_array_runs_and_its_output_and_exit_code_come_back(cluster: LocalCluster, runner: None) -> None:
    code = "test $CORRAL_ARRAY_INDEX != 2 || exit 7; echo $CORRAL_ARRAY_INDEX of $CORRAL_ARRAY_COUNT, $SECRET"
    done = cluster.corral("submit", "--quiet", "--follow", "--array", "1-3%2", "--gpus", "1", "--env", "SECRET",
                          "--", "sh", "-c", code, SECRET="hidden")  # fmt: skip
    job, *lines = done.stdout.splitlines()
    assert (done.returncode, sorted(lines)) == (7, [f"{job}_{index} | {index} of 3, hidden" for index in (1, 3)])
    shown = cluster.corral("job", job, "--json").stdout
    assert "hidden" not in shown
    tasks = json.loads(shown)["tasks"]
    assert [(task["state"], task["exit_code"]) for task in tasks] == [("done", 0), ("failed", 7), ("done", 0)]
    again = cluster.corral("resubmit", f"{job}_2")
    assert (again.returncode, "(1 tasks)" in again.stdout) == (0, True), again.stderr
    wait_for(lambda: cluster.json("job", f"{job}_2")["tasks"][0]["attempt"] == 2)


def test_what_each_attempt_has_printed_can_be_read(cluster: LocalCluster, runner: None) -> None:
    code = "echo attempt $CORRAL_ATTEMPT; test $CORRAL_ATTEMPT = 2"
    done = cluster.corral("submit", "--quiet", "--wait", "--retries", "1", "--gpus", "1", "--", "sh", "-c", code)
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    assert cluster.corral("logs", job).stdout == "attempt 2\n"
    assert cluster.corral("logs", job, "--attempt", "1").stdout == "attempt 1\n"
    assert cluster.corral("logs", job, "--attempt", "3").returncode == 5


def test_a_function_is_called_where_its_gpu_is_and_a_job_is_cancelled(
    cluster: LocalCluster, runner: None, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from corral.client import SyncClient, as_completed, map, submit\n"
        "def work(path, text):\n"
        "    import os\n"
        "    open(path, 'w').write(text + os.environ['CUDA_VISIBLE_DEVICES'][:4])\n"
        "if __name__ == '__main__':\n"
        f"    job, long = submit(work, {str(tmp_path / 'out')!r}, 'on '), submit(['sleep', '100'])\n"
        "    assert [one.job_id for one in as_completed([job])] == [job.job_id]\n"
        "    with SyncClient() as client:\n"
        "        assert client.jobs.get(job).job.job_id == client.jobs.wait(job).job.job_id == job.job_id\n"
        "        assert client.jobs.submit(['true'], gpus=1, after=job).after[0].job_id == job.job_id\n"
        "    long.cancel('enough')\n"
        "    print(job.exit_code, long.wait(timeout=30), long.job.state.value)\n"
    )
    done = subprocess.run(
        [sys.executable, str(program)],
        env=environment(CORRAL_NATS_URL=cluster.url), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.split()[0::2] == ["0", "cancelled"], done.stderr
    assert (tmp_path / "out").read_text() == "on GPU-"
