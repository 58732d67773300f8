"""Plans of moves over the bus: for the request that is next, for one by id, for whole hosts; and carried out."""

from __future__ import annotations

import asyncio
import json
import subprocess
from typing import Any

from corral.cli.local.server import EmbeddedServer
from nats.aio.client import Client
from support.local_cluster import invoke
from support.planner_rig import FakeHosts, ask, queued, running, until_ready


async def lease(nc: Client, **fields: Any) -> str:
    answer = await ask(nc, "request", {"ttl_seconds": 600, "grace_seconds": 0, **fields})
    assert answer["type"] == "assignment", answer
    return answer["lease"]["lease_id"]


async def command(server: EmbeddedServer, *options: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(invoke, "plan-moves", *options, url=server.url)


async def test_the_fewest_leases_are_named_and_taken_when_told(server: EmbeddedServer, nc: Client) -> None:
    hosts = FakeHosts(nc, hosts=3)
    await hosts.start()
    async with running(server.url):
        await until_ready(nc, 12)
        nothing = await ask(nc, "moves")
        assert (nothing["type"], nothing["possible"], nothing["moves"]) == ("moves", True, [])
        two, other = [
            await lease(nc, owner="bob", gpus=2, hosts=["node0"], preemptible=True, name=name) for name in ("a", "b")
        ]
        for _ in range(4):
            await lease(nc, owner="bob", hosts=["node1"], preemptible=True)
        stays = await lease(nc, owner="eve", gpus=4, hosts=["node2"])
        await ask(nc, "checkpoint", {"owner": "bob", "lease_id": other, "saved": True})

        want = {"owner": "ann", "wait_seconds": 600, "ttl_seconds": 600}
        first = asyncio.create_task(ask(nc, "request", {**want, "gpus": 2, "request_id": "two"}, timeout=60))
        await queued(nc, 1)
        whole = asyncio.create_task(ask(nc, "request", {**want, "gpus": 4, "request_id": "four"}, timeout=60))
        await queued(nc, 2)

        # The request that is next: of the two leases on node0 the one that was saved loses less.
        found = await ask(nc, "moves")
        assert (found["request_id"], found["owner"], found["ahead"], found["proven"]) == ("two", "ann", 0, True)
        (move,) = found["moves"]
        assert (move["lease_id"], move["owner"], move["devices"], move["hosts"]) == (other, "bob", 2.0, ["node0"])
        assert "could start if 1 lease went" in found["message"]
        found = await ask(nc, "moves", {"request_id": "four"})
        assert [each["lease_id"] for each in found["moves"]] == [other, two]
        assert "1 request ahead of it may take what comes free" in found["message"]
        assert found["price_gpu_seconds"] == sum(each["price_gpu_seconds"] for each in found["moves"])

        found = await ask(nc, "moves", {"free_hosts": 2})
        assert (len(found["moves"]), found["free_hosts"]) == (6, ["node0", "node1"])
        found = await ask(nc, "moves", {"free_hosts": 1, "hosts": ["node1"]})
        assert len(found["moves"]) == 4
        found = await ask(nc, "moves", {"free_hosts": 3})
        assert (found["possible"], found["moves"]) == (False, [])
        text = f"at most 2 hosts could be freed: not node2 ({stays} is not preemptible (yet))"
        assert found["message"] == text
        found = await ask(nc, "moves", {"free_hosts": 1, "hosts": ["nod"]})
        assert (found["possible"], found["moves"]) == (False, [])
        assert found["message"] == "the fleet has no host with such a name and such devices"
        for wrong, field in (
            ({"free_hosts": 1, "request_id": "two"}, "$.free_hosts"),
            ({"hosts": ["node1"]}, "$.hosts"),
            ({"free_hosts": 0}, "$.free_hosts"),
            ({"owner": "ann"}, "$.owner"),
        ):
            answer = await ask(nc, "moves", wrong)
            assert (answer["type"], answer["field"]) == ("error", field)
        assert (await ask(nc, "moves", {"request_id": "gone"}))["code"] == "not_found"

        # Nothing has changed so far; with --apply the request starts.
        assert len((await ask(nc, "leases"))["leases"]) == 7
        shown = await command(server, "--json")
        assert [each["lease_id"] for each in json.loads(shown.stdout)["moves"]] == [other]
        assert (await command(server, "--apply")).returncode == 2
        done = await command(server, "--apply", "--reason", "a large run")
        assert done.returncode == 0, done.stderr
        assert f"Preempted {other} of bob" in done.stdout
        assert (await first)["type"] == "assignment"
        ended = (await ask(nc, "leases", {"lease_id": other, "states": ["evicted"]}))["leases"][0]
        assert "a large run" in ended["preemption"]["reason"]
        done = await command(server, "--request", "four", "--apply", "--reason", "a larger run")
        assert done.stdout.count("Preempted ") == 4
        assert {grant["host"] for grant in (await whole)["lease"]["grants"]} == {"node1"}
        impossible = await command(server, "--free-hosts", "1")
        assert (impossible.returncode, impossible.stdout.startswith("At most 0 hosts could be freed")) == (4, True)
    await hosts.stop()


async def test_an_elastic_lease_is_asked_first_and_quotas_hold(server: EmbeddedServer, nc: Client) -> None:
    hosts = FakeHosts(nc, hosts=2)
    await hosts.start()
    async with running(server.url):
        await until_ready(nc, 8)
        groups = [
            {"name": "a", "limit": {"gpus": {"*": 4}}, "members": ["ann"]},
            {"name": "c", "limit": {"gpus": {"*": 1}}, "members": ["cleo"]},
        ]
        assert (await ask(nc, "set_groups", {"set": groups}))["type"] == "groups"
        elastic = await lease(nc, owner="bob", gpus={"min": 2, "max": 4}, hosts=["node0"], grace_seconds=30)
        firm = await lease(nc, owner="eve", gpus=4, hosts=["node1"], preemptible=True)
        want = {"owner": "ann", "wait_seconds": 600, "ttl_seconds": 600, "preemptible": True, "grace_seconds": 0}
        two = asyncio.create_task(ask(nc, "request", {**want, "gpus": 2, "request_id": "two"}, timeout=60))

        async def notice() -> dict[str, Any]:
            async with asyncio.timeout(20):
                while not (found := (await ask(nc, "leases", {"lease_id": elastic}))["leases"][0]["resize"]):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            return found

        # The planner asks by itself, and the holder declines: an operator may still ask.
        asked = {"owner": "bob", "lease_id": elastic, "number": (await notice())["number"]}
        assert (await ask(nc, "resize", {**asked, "accept": False}))["resize"] is None
        found = await ask(nc, "moves")
        [move] = found["moves"]
        assert (move["lease_id"], len(move["gives_back"]), move["price_gpu_seconds"]) == (elastic, 2, 0.0)
        assert "could start if 1 elastic lease gave 2 devices back, which loses no work" in found["message"]
        done = await command(server, "--apply", "--reason", "a large run")
        assert f"Asked {elastic} of bob for its GPUs" in done.stdout
        noticed = await notice()
        assert ([grant["device"] for grant in noticed["grants"]], noticed["claimant"]) == (move["gives_back"], "")
        assert "a large run" in noticed["reason"]
        by_hand = {"lease_id": elastic, "reason": "r", "devices": move["gives_back"]}
        assert (await ask(nc, "preempt", by_hand))["resize"]["number"] == noticed["number"]
        for wrong, field in (
            ({**by_hand, "devices": move["gives_back"][:1]}, "$.devices"),
            ({**by_hand, "lease_id": firm}, "$.devices"),
        ):
            assert (await ask(nc, "preempt", wrong))["field"] == field
        await ask(nc, "resize", {"owner": "bob", "lease_id": elastic, "number": noticed["number"]})
        own = (await two)["lease"]["lease_id"]

        # Whatever else ends, the group of the request is above its limit while its own lease goes on.
        four = asyncio.create_task(ask(nc, "request", {**want, "gpus": 4, "request_id": "four"}, timeout=60))
        cleo = {"owner": "cleo", "gpus": 2, "request_id": "more", "wait_seconds": 600}
        more = asyncio.create_task(ask(nc, "request", cleo, timeout=60))
        await queued(nc, 2)
        found = await ask(nc, "moves", {"request_id": "four"})
        assert {each["lease_id"] for each in found["moves"]} == {own, firm}
        found = await ask(nc, "moves", {"request_id": "more"})
        assert (found["possible"], found["moves"]) == (False, [])
        assert "can't start, whatever leases go: group c uses 0 devices of '*', and 1 are its limit" in found["message"]
        done = await command(server, "--request", "four", "--apply", "--reason", "a larger run")
        assert done.stdout.count("Preempted ") == 2
        assert {grant["host"] for grant in (await four)["lease"]["grants"]} == {"node1"}
        await ask(nc, "withdraw", {"owner": "cleo", "request_id": "more"})
        assert (await more)["type"] == "rejection"
    await hosts.stop()
