"""Withdrawal of queued requests from the command line: by Ctrl-C, and by id."""

from __future__ import annotations

import signal
import subprocess
import threading
from typing import Any

import pytest
from corral.client import Rejected, SyncClient
from corral.schemas.requests import RejectionCode
from support.local_cluster import CORRAL, LocalCluster, environment, wait_for


@pytest.fixture
def full_host(cluster: LocalCluster) -> Any:
    """A host of the shared cluster without a free device."""
    host = cluster.json("devices")["devices"][-1]["host"]
    lease = cluster.json("request", "--gpus", "4", "--host", host, "--ttl", "2m", "--wait", "30s")["lease"]["lease_id"]
    yield host
    cluster.corral("release", lease)


def queued(cluster: LocalCluster, name: str) -> list[Any]:
    listed = cluster.json("queue")
    assert listed["total"] == len(listed["entries"])
    return [entry for entry in listed["entries"] if entry["name"] == name]


@pytest.mark.parametrize("command", ["run", "request"])
def test_ctrl_c_takes_a_waiting_command_out_of_line(cluster: LocalCluster, full_host: str, command: str) -> None:
    name = f"impatient-{command}"
    tail = ["--", "true"] if command == "run" else []
    process = subprocess.Popen(
        [*CORRAL, command, "--gpus", "4", "--host", full_host, "--wait", "5m", "--name", name, *tail],
        env=environment(CORRAL_NATS_URL=cluster.url),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: queued(cluster, name))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert queued(cluster, name) == []


def test_the_command_withdraws_by_how_an_id_begins(cluster: LocalCluster, full_host: str) -> None:
    with SyncClient(cluster.url, owner="tester") as client:
        answers: list[Any] = []

        def wait() -> None:
            try:
                answers.append(client.request(gpus=4, hosts=full_host, wait="1m", name="by-hand"))
            except Rejected as rejected:
                answers.append(rejected.code)

        thread = threading.Thread(target=wait)
        thread.start()
        [entry] = wait_for(lambda: queued(cluster, "by-hand"))
        assert cluster.corral("withdraw", "no-such-request").returncode == 5
        refused = cluster.corral("withdraw", entry["request_id"], CORRAL_OWNER="stranger")
        assert (refused.returncode, "--any-owner" in refused.stderr) == (5, True)
        done = cluster.corral("withdraw", entry["request_id"][:12], "--any-owner", CORRAL_OWNER="operator")
        assert done.returncode == 0, done.stderr
        assert "Withdrawn" in done.stdout
        thread.join(20)
        assert answers == [RejectionCode.WITHDRAWN]
        assert [one for one in client.leases(owner="tester") if one.name == "by-hand"] == []
