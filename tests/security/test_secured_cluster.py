"""The parts and their people on one server, each with credentials of its own, over mutual TLS."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from corral.bus.access.roles import Role
from corral.client import Client, Conflict, NotOwner, Refused, Unavailable, connect
from corral.schemas import Group, Resources
from support.empty_history import empty_history
from support.local_cluster import invoke
from support.secured_bus import SecuredBus

SECONDS = 40.0
Person = Callable[[str], Awaitable[Client]]


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[SecuredBus]:
    folder = tmp_path / "secured"
    folder.mkdir()
    made = SecuredBus(folder, tls=True, mutual=True)
    made.add(Role.PLANNER, "planner")
    made.add(Role.PROCESSOR, "processor")
    made.add(Role.COLLECTOR, "collector", hosts=["sim", "sim-[0001-0002]"], follows_leases=True)
    for name in ("alice", "bob"):
        made.add(Role.REQUESTER, name)
    made.add(Role.REQUESTER, "portal", owner="*")
    made.add(Role.VIEWER, "vera")
    made.add(Role.VIEWER, "exporter", serves=True)
    made.add(Role.OPERATOR, "olga")
    made.server.start()
    shutil.copy(empty_history(), folder / "history.duckdb")
    simulated = ("collect", "--source", "simulated", "--hosts", "2", "--devices", "4", "--interval", "250ms")
    with contextlib.ExitStack() as parts:
        parts.callback(made.server.kill)
        parts.enter_context(made.part("processor", "process", "--db", str(folder / "history.duckdb")))
        parts.enter_context(made.part("planner", "plan"))
        parts.enter_context(made.part("collector", *simulated, "--state", str(folder / "state")))
        parts.enter_context(made.part("exporter", "export", "--listen", "127.0.0.1:0"))
        yield made
        # What a part needs, it may; else something of it would not work, and nobody would have noticed.
        assert made.violations(ignoring=("alice", "bob", "vera", "olga")) == []


async def until(look: Callable[[], Awaitable[Any]]) -> Any:
    """Last result; earlier errors come from a cluster that is still starting."""
    end = time.monotonic() + SECONDS
    while True:
        with contextlib.suppress(Exception):
            if found := await look():
                return found
        assert time.monotonic() < end, "it does not come"
        await asyncio.sleep(0.1)


@pytest.fixture
async def person(secured: SecuredBus) -> AsyncIterator[Person]:
    """Connects as a user; the fleet is there by then."""
    async with contextlib.AsyncExitStack() as stack:

        async def made(name: str) -> Client:
            client = await connect(secured.server.url, credentials=secured.credentials(name))
            stack.push_async_callback(client.close)

            async def all_there() -> bool:
                return (await client.fleet()).usable_devices == 8

            await until(all_there)
            return client

        yield made


def run(secured: SecuredBus, name: str, *arguments: str) -> Any:
    return invoke(*arguments, url=secured.server.url, CORRAL_NATS_CREDS=secured.credentials(name), CORRAL_OWNER="")


@pytest.mark.long
@pytest.mark.timeout(300)  # each wait has an end of its own
async def test_everyone_does_what_is_theirs_and_nothing_else(
    secured: SecuredBus, person: Person, tmp_path: Path
) -> None:
    """One cluster for all of it: it takes longer to start than to try."""
    await without_a_name_one_is_told_where_to_ask(person)
    await each_asks_in_their_own_name(person)
    await an_operator_signs_what_it_does_and_who_waits_is_answered(person)
    await a_viewer_sees_live_and_in_the_history(person)
    await commands_work_for_the_roles_that_they_are_for(secured, person, tmp_path)
    await revoked_and_rotated_keys_are_refused_at_once(secured, person, tmp_path)
    await a_request_outlives_its_planner_across_accounts(secured, person)


async def test_a_server_without_tls_is_not_spoken_to(tmp_path: Path) -> None:
    with_tls, plain = SecuredBus(tmp_path / "tls", tls=True), SecuredBus(tmp_path / "plain")
    with_tls.add(Role.REQUESTER, "alice")
    plain.server.start()
    try:
        with pytest.raises(Unavailable, match="does not speak TLS"):
            await connect(plain.server.url, credentials=with_tls.credentials("alice"), wait=0.5)
    finally:
        plain.server.kill()


async def without_a_name_one_is_told_where_to_ask(person: Person) -> None:
    """The asker of an unnamed subject is unknown across accounts; the reply names the subject to use."""
    olga = await person("olga")
    asked = {
        **dict.fromkeys(("request", "renew", "release", "withdraw"), "owner"),
        **dict.fromkeys(("drain", "evict", "set_groups", "book"), "operator"),
        "explain": "user",
    }
    for what, name in asked.items():
        subject = f"corral.v1.plan.{what}"
        body = b'{"owner": "olga", "gpus": 1, "drain": true, "hosts": ["sim-0001"], "reason": "r"}'
        answer = await olga.nc.request(subject, body, timeout=5)
        told = json.loads(answer.data)
        assert (told["code"], answer.headers["Nats-Service-Error-Code"]) == ("refused", "403")
        assert f"{subject}.<{name}>" in told["message"]
        # A publish wants no answer, and is done as little.
        await olga.nc.publish(subject, body)

    async def history() -> Any:
        return await olga.nc.request("corral.v1.history.status", b"", timeout=1)

    await until(history)
    for subject in ("history.snapshot", "history.read"):
        told = json.loads((await olga.nc.request(f"corral.v1.{subject}", b"{}", timeout=5)).data)
        assert (told["code"], f"corral.v1.{subject}.<user>" in told["message"]) == ("refused", True)
    for subject in (*(f"plan.{what}" for what in ("leases", "devices", "fleet", "queue", "groups")), "history.status"):
        kinds = [
            json.loads((await olga.nc.request(f"corral.v1.{subject}{rest}", b"{}", timeout=5)).data)["type"]
            for rest in ("", ".olga")
        ]
        assert kinds[0] == kinds[1] != "error"
    assert (await olga.fleet()).leased_devices == 0
    assert (await olga.fleet()).usable_devices == 8


async def each_asks_in_their_own_name(person: Person) -> None:
    alice, bob, vera, portal = [await person(name) for name in ("alice", "bob", "vera", "portal")]
    lease = (await alice.request(gpus=1, ttl=60)).lease
    assert lease.owner == "alice"
    with pytest.raises(NotOwner):
        await bob.release(lease.lease_id)
    began = time.monotonic()
    with pytest.raises(Refused, match="owner 'bob' only"):
        await bob.release(lease.lease_id, owner="alice")
    with pytest.raises(Refused, match=r"vera \(viewer\)"):
        await vera.request(gpus=1)
    with pytest.raises(Refused, match=r"alice \(requester\)"):
        await alice.drain(reason="mine", hosts=["sim-0001"])
    assert time.monotonic() - began < 5, "a refusal is told at once, not after the timeout"
    # The body can't say otherwise than the subject.
    body = json.dumps({"lease_id": lease.lease_id, "owner": "alice"}).encode()
    answer = await bob.nc.request("corral.v1.plan.release.bob", body, timeout=5)
    assert json.loads(answer.data)["code"] == "refused"
    assert (await alice.release(lease.lease_id)).owner == "alice"
    for owner in ("carol", "dave"):
        assert (await portal.release((await portal.request(owner=owner)).lease.lease_id, owner=owner)).owner == owner


async def an_operator_signs_what_it_does_and_who_waits_is_answered(
    person: Person,
) -> None:
    alice, bob, olga = [await person(name) for name in ("alice", "bob", "olga")]
    held = (await alice.request(gpus=4, ttl=120)).lease
    waiting = asyncio.create_task(bob.request(gpus=8, placement="fewest_hosts", wait=60))
    entry = (await until(olga.queue))[0]
    assert entry.owner == "bob"
    with pytest.raises(Refused):
        await olga.evict(held.lease_id, reason="mine", operator="alice")
    assert "(by olga)" in (await olga.evict(held.lease_id, reason="others wait")).reason
    granted = (await waiting).lease
    assert granted.owner == "bob"
    await bob.release(granted.lease_id)
    assert "by olga" in (await olga.drain(reason="fans", hosts=["sim-0001"]))["host:sim-0001"]
    assert await olga.undrain(hosts=["sim-0001"]) == {}
    lab = Group(name="lab", guarantee=Resources(gpus={"*": 4.0}), members=["alice"])
    with pytest.raises(Refused, match=r"alice \(requester\)"):
        await alice.set_groups(lab)
    with pytest.raises(Refused):
        await olga.set_groups(lab, operator="alice")
    assert (await olga.set_groups(lab, revision=0)).revision == 1
    assert [status.group for status in (await bob.groups(name="lab")).groups] == [lab]
    with pytest.raises(Conflict):
        await olga.set_groups(delete=["lab"], revision=0)
    await olga.set_groups(delete=["lab"])


async def a_viewer_sees_live_and_in_the_history(person: Person) -> None:
    vera, alice = await person("vera"), await person("alice")
    events = vera.lease_events()
    first = asyncio.ensure_future(anext(events))
    async with asyncio.timeout(SECONDS):
        async for sample in vera.watch():
            assert sample.host.startswith("sim-000")
            break
        lease = (await alice.request(gpus=1)).lease
        assert (await first).lease.owner == "alice"
    await alice.release(lease.lease_id)
    await events.aclose()  # type: ignore[attr-defined]

    async def stored() -> bool:
        found = await vera.query("SELECT (SELECT count(*) FROM samples), (SELECT count(*) FROM leases)")
        return found.rows[0][0] > 8 and found.rows[0][1] > 0

    await until(stored)
    # Parts of a large answer are acknowledged from one account to the other.
    large = await vera.query("SELECT range AS i, repeat('x', 100) FROM range(200000)", limit=200_000)
    assert len(large.rows) == 200_000


async def commands_work_for_the_roles_that_they_are_for(secured: SecuredBus, person: Person, tmp_path: Path) -> None:
    await person("vera")
    for name, *command in (
        ("vera", "health", "bus"),
        ("vera", "health", "planner"),
        ("vera", "health", "exporter"),
        ("vera", "health", "collector", "--host", "sim"),
        ("collector", "health", "collector", "--host", "sim"),
        ("planner", "health", "planner"),
        ("processor", "health", "processor"),
        ("vera", "doctor"),
        ("olga", "snapshot", str(tmp_path / "copy.duckdb")),
        ("alice", "explain", "--gpus", "2"),
    ):
        done = await asyncio.to_thread(run, secured, name, *command)
        assert done.returncode == 0, (name, command, done.stdout, done.stderr)
    refused = await asyncio.to_thread(run, secured, "alice", "drain", "--host", "sim-0001", "--reason", "x")
    assert (refused.returncode, "olga" in refused.stderr) == (5, False), refused.stderr
    stranger = await asyncio.to_thread(lambda: invoke("fleet", url=secured.server.url))
    assert stranger.returncode == 3
    assert "Traceback" not in stranger.stderr


async def revoked_and_rotated_keys_are_refused_at_once(secured: SecuredBus, person: Person, tmp_path: Path) -> None:
    secured.add(Role.REQUESTER, "mallory")
    folder = str(secured.authority.folder)
    assert invoke("auth", "add", "viewer", "guest", "--dir", folder, url="").returncode == 0
    mallory = await until(lambda: connect(secured.server.url, credentials=secured.credentials("mallory")))
    assert await until(mallory.fleet)
    old = tmp_path / "old.creds"
    for name in ("mallory.creds", "mallory.crt", "mallory.key", "ca.crt"):
        (tmp_path / name).write_bytes(Path(secured.credentials("mallory")).with_name(name).read_bytes())
    (tmp_path / "mallory.creds").rename(old)
    assert invoke("auth", "rotate", "mallory", "--dir", folder, url="").returncode == 0
    await until(lambda: asyncio.sleep(0, mallory.nc.is_closed or not mallory.nc.is_connected))
    with pytest.raises(Unavailable, match="does not take the credentials"):
        await connect(secured.server.url, credentials=str(old))
    renewed = await connect(secured.server.url, credentials=secured.credentials("mallory"))
    assert await renewed.fleet()
    proof = Path(secured.credentials("mallory"))
    assert invoke("auth", "revoke", "mallory", "--dir", folder, url="").returncode == 0
    assert not await asyncio.to_thread(proof.exists)
    await until(lambda: asyncio.sleep(0, renewed.nc.is_closed or not renewed.nc.is_connected))
    for client in (mallory, renewed):
        await client.close()
    # Whoever was not meant has noticed nothing.
    assert (await (await person("vera")).fleet()).usable_devices == 8


async def a_request_outlives_its_planner_across_accounts(secured: SecuredBus, person: Person) -> None:
    """A leader that hung passes on who waits, though the server lets nobody hand on the way back to another account."""
    alice, bob = await person("alice"), await person("bob")
    leader = await alice.fleet()
    held = (await alice.request(gpus=8, placement="fewest_hosts", ttl=120)).lease
    body = json.dumps({"gpus": 1, "wait_seconds": 60, "request_id": "outlives"}).encode()
    answer = asyncio.create_task(bob.nc.request("corral.v1.plan.request.bob", body, timeout=60))
    await until(alice.queue)
    first = next(
        pid
        for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
        if _is(pid, "plan", secured.server.url)
    )
    with secured.part("planner", "plan"):
        await asyncio.sleep(2.0)  # it stands by
        os.kill(first, signal.SIGSTOP)
        try:

            async def taken_over() -> bool:
                return (await alice.fleet()).planner != leader.planner

            await until(taken_over)
        finally:
            os.kill(first, signal.SIGCONT)
        await until(alice.queue)
        await alice.release(held.lease_id)
        lease = json.loads((await answer).data)["lease"]
        assert lease["owner"] == "bob"
        await bob.release(lease["lease_id"])


def _is(pid: int, word: str, url: str) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return word.encode() in words and url.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
