"""`corral run --gpus 2-4 --on-resize`: the command follows the devices of its lease, and agrees to give some back."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

from support.local_cluster import CORRAL, LocalCluster, environment, wait_for

HOST = "sim-0002"


def test_a_command_grows_and_gives_back_when_it_has_left_the_devices(cluster: LocalCluster, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    corral = " ".join(CORRAL)
    # The command answers once it no longer uses the devices; an offer was accepted for it already.
    script = (
        f"follow() {{ cat $CORRAL_DEVICES_FILE >> {seen}; [ $(wc -l < {seen}) = 3 ] && {corral} resize accept; }}\n"
        f"trap follow USR2; follow; while :; do sleep 0.05; done"
    )
    ours = cluster.json("request", "--gpus", "2", "--host", HOST, "--ttl", "5m", "--name", "first")["lease"]["lease_id"]
    words = ["run", "--gpus", "2-4", "--host", HOST, "--name", "elastic", "--on-resize", "usr2", "--"]
    process = subprocess.Popen(
        [*CORRAL, *words, "sh", "-c", script],
        env=environment(CORRAL_NATS_URL=cluster.url),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: lines(seen) == 1)
        assert "2 (2-4)" in cluster.corral("leases").stdout
        assert cluster.corral("release", ours).returncode == 0
        wait_for(lambda: lines(seen) == 2, 30)
        assert devices(cluster) == 4
        back = cluster.json("request", "--gpus", "1", "--host", HOST, "--wait", "30s", "--ttl", "1m", "--name", "late")
        assert len(back["lease"]["grants"]) == 1
        wait_for(lambda: devices(cluster) == 3)
        starts, grown, left = [set(line.split(",")) for line in seen.read_text().split()]
        assert (len(starts), len(grown), len(left)) == (2, 4, 3)
        assert grown - left == {grant["device"] for grant in back["lease"]["grants"]}
        assert not (grown - left) & starts  # those that came last went first
        assert cluster.corral("release", back["lease"]["lease_id"]).returncode == 0
    finally:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert "corral resize accept" in err


def lines(file: Path) -> int:
    return file.read_text().count("\n") if file.exists() else 0


def devices(cluster: LocalCluster) -> int:
    [lease] = [one for one in cluster.json("leases")["leases"] if one["name"] == "elastic"]
    return len(lease["grants"])


def test_what_can_not_be_elastic_says_so(cluster: LocalCluster) -> None:
    for words, code, text in (
        (("run", "--gpus", "2", "--on-resize", "USR2", "--", "true"), 2, "--gpus 2-8"),
        (("run", "--gpus", "2-3", "--on-resize", "USR2", "--via", "ssh", "--", "true"), 2, "--via"),
        (("request", "--gpus", "4-2"), 2, "less than min"),
        (("request", "--gpus", "two"), 2, "--gpus"),
        (("request", "--gpus", "1-2", "--share", "0.5"), 2, "--share"),
        (("request", "--gpus", "2-4", "--items", "4"), 2, "--items"),
        (("resize", "accept"), 2, "CORRAL_LEASE"),
    ):
        found = cluster.corral(*words)
        assert found.returncode == code, (words, found)
        assert text in found.stderr, (words, found)
    lease = json.loads(cluster.corral("request", "--gpus", "1", "--json", "--ttl", "1m").stdout)["lease"]["lease_id"]
    assert cluster.corral("resize", "accept", "--lease", lease).returncode == 5
    assert cluster.corral("release", lease).returncode == 0
