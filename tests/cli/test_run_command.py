"""`corral run`: the command's environment, the life of its lease, and the order in which processes end."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from support.local_cluster import CORRAL, LocalCluster, alive, environment, wait_for


def start(
    cluster: LocalCluster, *arguments: str, output: Path | None = None, before: Sequence[str] = (), **values: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*before, *CORRAL, "run", *([] if "--host" in arguments else ["--host", "any"]), *arguments],
        env=environment(CORRAL_NATS_URL=cluster.url, **values),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if output is None else output.open("w"),
        stderr=subprocess.PIPE,
        text=True,
    )


def leases(cluster: LocalCluster, name: str) -> list[str]:
    return [one["lease_id"] for one in cluster.json("leases")["leases"] if one["name"] == name]


def test_the_command_sees_its_devices_and_its_code_comes_back(cluster: LocalCluster) -> None:
    script = 'echo "$CUDA_VISIBLE_DEVICES$ROCR_VISIBLE_DEVICES"; echo "$CORRAL_LEASE"; exit 41'
    process = start(
        cluster, "--gpus", "2", "--name", "env", "--host", "sim-0001", "--", "sh", "-c", script, CORRAL_HOST="sim-0001"
    )
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 41
    devices, lease = out.split()
    assert len(devices.split(",")) == 2
    [ended] = cluster.json("leases", "--ended", "--lease", lease)["leases"]
    assert ended["state"] == "released"
    assert sorted(grant["device"] for grant in ended["grants"]) == sorted(devices.split(","))


def test_a_command_that_is_not_there_is_127_and_its_lease_is_given_back(cluster: LocalCluster) -> None:
    process = start(cluster, "--name", "typo", "--", "no-such-command-here")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 127
    assert "command not found" in err
    assert leases(cluster, "typo") == []


def test_signals_reach_the_command(cluster: LocalCluster, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    script = f"trap 'exit 42' TERM; touch {ready}; while :; do sleep 0.05; done"
    process = start(cluster, "--name", "signals", "--", "sh", "-c", script)
    wait_for(ready.exists)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 42
    assert leases(cluster, "signals") == []


def test_a_lease_outlives_its_ttl_while_the_command_runs(cluster: LocalCluster) -> None:
    # On a host whose clock is wrong, where that can be tried: renewals go by the time that passes, not by what it is.
    wrong = ["faketime", "-f", "-2h"] if shutil.which("faketime") else []
    values = {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1"}
    process = start(cluster, "--ttl", "2s", "--name", "long", "--", "sleep", "4", before=wrong, **values)
    granted = wait_for(lambda: leases(cluster, "long"))
    time.sleep(2.5)
    assert leases(cluster, "long") == granted
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_an_evicted_lease_ends_the_command_and_all_that_it_started(cluster: LocalCluster, tmp_path: Path) -> None:
    # It ignores SIGTERM, and so does what it started in a session of its own.
    child = tmp_path / "child"
    script = (
        f"trap '' TERM; setsid sh -c 'trap \"\" TERM; echo $$ > {child}; while :; do sleep 0.1; done' & wait; sleep 60"
    )
    process = start(cluster, "--name", "evicted", "--grace", "300ms", "--", "sh", "-c", script)
    wait_for(lambda: child.exists() and child.read_text().strip())
    grandchild = int(child.read_text())
    [lease] = leases(cluster, "evicted")
    assert cluster.corral("evict", lease, "--reason", "host goes down").returncode == 0
    _, err = process.communicate(timeout=30)
    assert process.returncode == 9
    assert "host goes down" in err
    wait_for(lambda: not alive(grandchild))


def test_a_command_that_ended_before_its_lease_keeps_its_code(cluster: LocalCluster, tmp_path: Path) -> None:
    left = tmp_path / "left"
    script = f"sh -c 'trap \"\" TERM; echo $$ > {left}; while :; do sleep 0.1; done' & sleep 0.5; exit 3"
    process = start(cluster, "--name", "ended", "--grace", "20s", "--", "sh", "-c", script)
    assert process.stderr is not None
    wait_for(lambda: left.exists() and left.read_text().strip())
    said = iter(process.stderr.readline, "")
    assert any("the command has left" in line for line in said)
    [lease] = leases(cluster, "ended")
    assert cluster.corral("evict", lease, "--reason", "host goes down").returncode == 0
    assert any("host goes down" in line and "stopping what the command has left" in line for line in said)
    process.send_signal(signal.SIGTERM)  # to wait no longer
    _, err = process.communicate(timeout=30)
    assert (process.returncode, "was stopped" in err) == (3, False)


def test_killed_outright_it_takes_the_command_along_and_leaks_no_lease(cluster: LocalCluster, tmp_path: Path) -> None:
    child = tmp_path / "pid"
    script = f"echo $$ > {child}; while :; do sleep 0.1; done"
    process = start(cluster, "--ttl", "2s", "--name", "killed", "--", "sh", "-c", script)
    wait_for(lambda: child.exists() and child.read_text().strip())
    assert len(leases(cluster, "killed")) == 1
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    wait_for(lambda: not alive(int(child.read_text())))
    wait_for(lambda: leases(cluster, "killed") == [])


def test_it_waits_in_line_and_says_why(cluster: LocalCluster) -> None:
    host = cluster.json("devices")["devices"][0]["host"]
    blocker = cluster.json("request", "--gpus", "4", "--host", host, "--ttl", "1m")["lease"]["lease_id"]
    try:
        arguments = ["run", "--gpus", "4", "--host", host, "--wait", "30s", "--name", "patient", "--", "echo", "went"]
        process = subprocess.Popen(
            [*CORRAL, *arguments],
            env=environment(CORRAL_NATS_URL=cluster.url),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        [entry] = wait_for(lambda: cluster.json("queue")["entries"])
        assert (entry["name"], entry["gpus"], entry["position"]) == ("patient", 4, 1)
        time.sleep(1.2)  # the client looks into the queue once a second
    finally:
        cluster.corral("release", blocker)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert out == "went\n"
    assert "position 1 in the queue" in err
