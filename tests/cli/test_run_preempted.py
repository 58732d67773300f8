"""`corral run --preemptible`: the notice reaches the command, and the work goes on in its place in line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.local_cluster import CORRAL, LocalCluster, environment, wait_for


def start(cluster: LocalCluster, name: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*CORRAL, "run", "--host", "any", "--preemptible", "--name", name, *arguments],
        env=environment(CORRAL_NATS_URL=cluster.url),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def preempt(cluster: LocalCluster, name: str) -> str:
    [lease] = [one["lease_id"] for one in cluster.json("leases")["leases"] if one["name"] == name]
    done = cluster.corral("preempt", lease, "--reason", "a course")
    assert done.returncode == 0, done.stderr
    return lease


def test_the_command_gets_its_signal_and_its_own_end_is_the_end(cluster: LocalCluster, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    script = f"trap 'exit 7' USR1; touch {ready}; while :; do sleep 0.05; done"
    process = start(cluster, "signaled", "--grace", "60s", "--on-preempt", "usr1", "--", "sh", "-c", script)
    wait_for(ready.exists)
    lease = preempt(cluster, "signaled")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 7
    assert "a course" in err
    assert "SIGUSR1" in err
    [ended] = cluster.json("leases", "--ended", "--lease", lease)["leases"]
    assert ended["state"] == "released"
    assert ended["preemption"]["reason"].startswith("a course")
    assert cluster.corral("preempt", lease, "--reason", "again").returncode == 5


def test_a_command_that_does_not_end_is_ended_with_its_lease(cluster: LocalCluster, tmp_path: Path) -> None:
    """SIGTERM comes before the end, by default alone; whoever ignores that is killed at the end."""
    ready, termed = tmp_path / "ready", tmp_path / "termed"
    script = f"trap 'touch {termed}' TERM; touch {ready}; while :; do sleep 0.05; done"
    process = start(cluster, "deaf", "--grace", "2s", "--", "sh", "-c", script)
    wait_for(ready.exists)
    preempt(cluster, "deaf")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 9
    assert termed.exists()
    assert "a course" in err


def test_the_work_is_saved_and_runs_again(cluster: LocalCluster, tmp_path: Path) -> None:
    """A script says that it has saved, which ends the lease; the next run goes on with what was saved."""
    ready, kept = tmp_path / "ready", tmp_path / "kept"
    corral = " ".join(CORRAL)
    script = (
        f'echo "run $CORRAL_RESTART_COUNT" >> {kept}; [ "$CORRAL_RESTART_COUNT" = 1 ] && exit 0\n'
        f"trap '{corral} saved >> {kept}; sleep 60' USR1; touch {ready}; while :; do sleep 0.05; done"
    )
    words = ["--grace", "10m", "--min-run", "0s", "--on-preempt", "SIGUSR1", "--requeue", "--", "sh", "-c", script]
    process = start(cluster, "requeued", *words)
    wait_for(ready.exists)
    first = preempt(cluster, "requeued")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    said = kept.read_text().splitlines()
    assert (said[0], said[-1]) == ("run 0", "run 1")
    leases = {one["lease_id"]: one for one in cluster.json("leases", "--ended")["leases"] if one["name"] == "requeued"}
    ended = leases.pop(first)
    [second] = leases.values()
    assert (ended["state"], ended["saved_at"]) == ("evicted", ended["ended_at"])
    assert (second["state"], second["requeued"]) == ("released", True)


def test_a_notice_is_listed_put_off_and_answered_by_hand(cluster: LocalCluster) -> None:
    words = ("request", "--host", "any", "--preemptible", "--grace", "10m", "--name", "by-hand")
    lease = cluster.json(*words)["lease"]["lease_id"]
    preempt(cluster, "by-hand")
    assert "preempted in" in cluster.corral("leases").stdout
    assert cluster.corral("busy", "15m", "--lease", lease).returncode == 0
    assert cluster.corral("busy", "15m", "--lease", lease).returncode == 5
    assert cluster.json("saved", "--lease", lease)["state"] == "evicted"


def test_what_needs_a_preemptible_lease_says_so() -> None:
    done = subprocess.run(
        [sys.executable, *CORRAL[1:], "run", "--requeue", "--", "true"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--preemptible" in done.stderr
