"""What crosses the parts, with the real commands: telemetry to SQL, request to release, deaths and returns."""

import asyncio
import json
import os
import signal
import time
from pathlib import Path

import nats
import pytest
from corral.client import SyncClient
from support.local_cluster import LocalCluster, alive, corral, wait_for


def test_telemetry_becomes_history(cluster: LocalCluster) -> None:
    [[devices, hosts, samples, per_device]] = wait_for(
        lambda: [
            row
            for row in cluster.rows(
                "SELECT count(DISTINCT device), count(DISTINCT host), count(*), count(DISTINCT (device, time)) "
                "FROM samples"
            )
            if row[2] >= 40
        ]
    )
    assert (devices, hosts) == (8, 2)
    assert samples == per_device, "a sample was stored twice"
    listed = {device["uuid"]: device for device in cluster.json("devices")["devices"]}
    stored = dict(cluster.rows("SELECT device, any_value(memory_total_bytes) FROM samples GROUP BY device"))
    assert stored == {uuid: device["memory_total_bytes"] for uuid, device in listed.items()}


def test_a_request_is_granted_used_and_released(cluster: LocalCluster) -> None:
    lease = cluster.json("request", "--gpus", "2", "--memory", "8GiB", "--name", "pipeline")["lease"]
    assert len(lease["grants"]) == 2
    assert len({grant["host"] for grant in lease["grants"]}) == 1
    uuids = {grant["device"] for grant in lease["grants"]}
    [environment] = lease["environment"].values()
    assert environment["CORRAL_LEASE"] == lease["lease_id"]

    held = {device["uuid"] for device in cluster.json("devices")["devices"] if lease["lease_id"] in device["leases"]}
    assert held == uuids
    # Cause and effect: the simulated devices fill up for whoever leased them.
    wait_for(
        lambda: all(
            (device.get("memory_used_bytes") or 0) > 2**30
            for device in cluster.json("devices")["devices"]
            if device["uuid"] in uuids
        )
    )
    assert cluster.corral("release", lease["lease_id"]).returncode == 0
    [[state, owner, devices]] = wait_for(
        lambda: cluster.rows(
            f"SELECT state, owner, devices FROM leases WHERE lease_id = '{lease['lease_id']}' AND ended_at IS NOT NULL"
        )
    )
    assert (state, owner, set(devices)) == ("released", "tester", uuids)


async def test_any_client_of_the_bus_can_ask_in_json(cluster: LocalCluster) -> None:
    """Nothing of Corral is needed but its subjects."""
    nc = await nats.connect(cluster.url)

    async def ask(subject: str, body: object) -> dict:
        reply = await nc.request(subject, json.dumps(body).encode(), timeout=10)
        return json.loads(reply.data)

    try:
        granted = await ask("corral.v1.plan.request", {"owner": "node-client", "gpus": 1, "gpu_memory_bytes": 2**30})
        assert granted["type"] == "assignment"
        lease = granted["lease"]["lease_id"]
        refused = await ask("corral.v1.plan.release", {"lease_id": lease, "owner": "somebody-else"})
        assert (refused["type"], refused["code"]) == ("error", "not_owner")
        assert (await ask("corral.v1.plan.renew", {"lease_id": lease, "owner": "node-client"}))["state"] == "active"
        assert (await ask("corral.v1.plan.release", {"lease_id": lease, "owner": "node-client"}))["type"] == "lease"
        rejected = await ask("corral.v1.plan.request", {"owner": "node-client", "gpus": 1000})
        assert rejected["type"] == "rejection"
        assert rejected["reasons"]
        wrong = await ask("corral.v1.plan.request", {"owner": "node-client", "gpus": "two"})
        assert (wrong["type"], wrong["field"]) == ("error", "$.gpus")
        rows = await ask("corral.v1.query", {"sql": "SELECT count(DISTINCT host) FROM samples"})
        assert rows["rows"] == [[2]]
    finally:
        await nc.close()


@pytest.mark.long
def test_what_is_killed_comes_back_and_nothing_is_lost(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path / "data")
    try:
        second = corral("up", "--data", str(tmp_path / "data"), "--port", "0")
        assert second.returncode == 1
        assert cluster.url in second.stderr

        lease = cluster.json("request", "--gpus", "1", "--ttl", "10m")["lease"]["lease_id"]
        before = wait_for(lambda: cluster.rows("SELECT count(*) FROM samples")[0][0])
        with SyncClient(cluster.url, owner="holder") as client, client.lease(gpus=2, ttl=8) as held:
            began = time.monotonic()
            for name in ("processor", "planner", "collector", "nats"):
                pid = cluster.parts()[name]
                os.kill(pid, signal.SIGKILL)
                wait_for(lambda pid=pid, name=name: cluster.parts().get(name, pid) != pid)
            # All answer again: the same leases, fresh devices, more history and none of it twice.
            wait_for(lambda: cluster.corral("health", "planner").returncode == 0)
            assert {one["lease_id"] for one in cluster.json("leases")["leases"]} == {lease, held.lease_id}
            wait_for(lambda: all(device["usable"] for device in cluster.json("devices")["devices"]))
            [[samples, distinct]] = wait_for(
                lambda: [
                    row
                    for row in _rows_if_any(cluster, "SELECT count(*), count(DISTINCT (device, time)) FROM samples")
                    if row[0] > before + 40
                ]
            )
            assert samples == distinct
            # The client is the one from before: it has connected again by itself, and has kept its lease.
            assert next(client.watch()).device
            time.sleep(max(0.0, began + 9 - time.monotonic()))
            held.check()
            assert [one.lease_id for one in client.leases(owner="holder")] == [held.lease_id]
        assert cluster.corral("release", lease).returncode == 0
        assert cluster.json("leases")["leases"] == []
        pids = [*cluster.parts().values()]
        assert len(pids) == 4
    finally:
        code = cluster.stop()
    assert code == 0, cluster.output()
    assert not [pid for pid in pids if alive(pid)]
    for part in ("collector", "planner", "processor"):
        assert f"{part} has stopped" in cluster.output()


def _rows_if_any(cluster: LocalCluster, sql: str) -> list[list[int]]:
    done = cluster.corral("query", sql, "--json")
    return json.loads(done.stdout)["rows"] if done.returncode == 0 else []


@pytest.mark.long
def test_when_the_supervisor_is_killed_its_parts_end_too(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path / "data")
    pids = [*cluster.parts().values()]
    cluster.process.kill()
    cluster.process.wait()
    wait_for(lambda: not [pid for pid in pids if alive(pid)])
    # The folder is free again, and the next cluster finds in it what this one left.
    again = LocalCluster(tmp_path / "data")
    assert again.corral("watch", "--count", "1").returncode == 0
    assert again.stop() == 0


@pytest.mark.long
async def test_the_demo_ends_well() -> None:
    done = await asyncio.to_thread(corral, "demo")
    assert done.returncode == 0, done.stdout + done.stderr
    for said in (
        "Granted",
        "Rejected (impossible)",
        "Renewed",
        "Released",
        "step 3 of 3",
        "Ended job",
        "in all",
        "That was Corral",
    ):
        assert said in done.stdout
    assert done.stdout.count("SELECT") == 3
    assert done.stdout.count(" rows in ") == 3
