"""Services as processes: they say how they are, and end in order while they work."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from corral.bus.connect import connect
from corral.cli.local.server import EmbeddedServer
from corral.client.health import ask_health
from corral.schemas import codec, subjects
from corral.schemas.health import ServiceHealth
from corral.schemas.instruments import INSTRUMENTS
from corral.schemas.telemetry import SampleBatch
from nats.aio.client import Client
from nats.js import api
from support.local_cluster import CORRAL, environment, invoke, wait_for

COLLECT = ("collect", "--source", "simulated", "--hosts", "4", "--devices", "4", "--interval", "100ms", "--batch", "0")
STOP_SECONDS = 10.0


class Services:
    """Processes over one server."""

    def __init__(self, server: EmbeddedServer, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str, **values: str) -> subprocess.Popen[bytes]:
        values = {"CORRAL_NATS_URL": self.server.url, "CORRAL_STATE_DIR": str(self.folder / "state"), **values}
        with self.log(name).open("ab") as out:
            process = self.processes[name] = subprocess.Popen(
                [*CORRAL, *arguments],
                env=environment(**values),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        return process

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def records(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log(name).read_text().splitlines() if line.startswith("{")]

    def end(self, name: str) -> float:
        """Tell it to stop; how long it took. It must end in order."""
        process = self.processes.pop(name)
        began = time.monotonic()
        process.terminate()
        code = process.wait(STOP_SECONDS + 5)
        assert code == 0, self.log(name).read_text()[-3000:]
        return time.monotonic() - began

    def kill(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


@pytest.fixture
def services(server: EmbeddedServer, tmp_path: Path) -> Iterator[Services]:
    made = Services(server, tmp_path)
    yield made
    made.kill()


@pytest.fixture
async def asking(server: EmbeddedServer) -> AsyncIterator[Client]:
    client = await connect(server.url, name="test", inbox_prefix="_INBOX.test")
    yield client
    await client.close()


async def until(nc: Client, good: Any, service: str | None = None, seconds: float = 40.0) -> list[ServiceHealth]:
    """Ask until the answers are as wanted."""
    end = time.monotonic() + seconds
    while True:
        found = await ask_health(nc, service)
        if good(found):
            return found
        assert time.monotonic() < end, found
        await asyncio.sleep(0.1)


def value(health: ServiceHealth, name: str, **labels: str) -> float:
    found = [each for each in health.measures if each.name == name and each.labels == labels]
    assert found, (name, health.measures)
    return (found[0].counts and sum(found[0].counts)) or found[0].value


@pytest.mark.long
async def test_services_say_how_they_are_and_end_in_order_under_load(services: Services, asking: Client) -> None:
    nc = asking
    services.start("collector", *COLLECT)
    services.start("processor", "process", "--db", str(services.folder / "history.duckdb"))
    services.start("exporter", "export", "--listen", "127.0.0.1:0")
    services.start("dashboard", "dashboard", "--port", "0", "--state", str(services.folder / "dashboard"))
    services.start("first", "plan")
    await until(nc, lambda found: [h.role for h in found if h.ready] == ["leader"], "planner")
    services.start("second", "plan")

    roles = ["collector", "dashboard", "exporter", "planner", "planner", "processor"]
    found = await until(nc, lambda every: sorted(h.service for h in every if h.ready) == roles)
    by_role = {health.role or health.service.value: health for health in found}
    assert sorted(by_role) == ["collector", "dashboard", "exporter", "leader", "processor", "standby"]
    for health in found:  # each tells all that the catalogue has; labels come with the first event
        told = {measure.name for measure in health.measures}
        unlabelled = {name for name, each in INSTRUMENTS[health.service].items() if not each.labels}
        unlabelled = {name for name in unlabelled if not name.startswith("otlp_")}  # told by an exporter that sends
        assert unlabelled <= told
        assert told <= set(INSTRUMENTS[health.service])

    poison = await nc.jetstream().publish(subjects.agent_subject("nobody"), b"no message at all")

    # Work goes on while they end.
    enough = asyncio.Event()
    asked = asyncio.create_task(_ask(nc, enough))
    await asyncio.sleep(0.5)
    [leader] = [h for h in await ask_health(nc, "planner") if h.role == "leader"]
    assert value(leader, "requests", outcome="granted") > 0
    assert value(leader, "grant_seconds") > 0
    assert value(leader, "write_group") > 0
    first = services.processes["first"]
    assert _instance(services, "first") == leader.instance
    assert services.end("first") < STOP_SECONDS
    assert first.returncode == 0
    await until(nc, lambda every: [h.role for h in every] == ["leader"] and every[0].ready, "planner")
    await asyncio.sleep(0.5)
    enough.set()
    granted = await asked

    took = {name: services.end(name) for name in ("collector", "processor", "exporter", "dashboard")}
    assert max(took.values()) < STOP_SECONDS

    # No lease that was answered is lost.
    leases = json.loads((await nc.request("corral.v1.plan.leases", b"{}", timeout=10)).data)["leases"]
    assert granted
    assert granted <= {lease["lease_id"] for lease in leases}
    services.end("second")

    # What the collector read is on the stream without a gap, to its last word.
    sequences, samples = await _published(nc)
    assert sequences == list(range(1, len(sequences) + 1))
    # And the history has each of it once.
    services.start("processor", "process", "--db", str(services.folder / "history.duckdb"))
    stream = (await nc.jetstream().stream_info(subjects.TELEMETRY_STREAM)).state.last_seq

    def stored() -> bool:
        done = invoke("query", "SELECT count(*) FROM samples", "--json", url=services.server.url)
        return done.returncode == 0 and json.loads(done.stdout)["rows"][0][0] == samples

    await asyncio.to_thread(wait_for, stored, 40)
    assert stream > 0
    services.end("processor")
    [told] = [record for record in services.records("processor") if record.get("sequence") == poison.seq]
    assert told["subject"] == subjects.agent_subject("nobody")
    assert told["stream"] == subjects.TELEMETRY_STREAM
    for name in ("collector", "processor", "exporter", "dashboard", "first", "second"):
        records = services.records(name)
        assert records[-1]["event"] == "shut down"
        assert {record["service"] for record in records} == {
            name.replace("first", "planner").replace("second", "planner")
        }
        assert records[-1]["instance"]


def _instance(services: Services, name: str) -> str:
    return services.records(name)[-1]["instance"]


async def _ask(nc: Client, enough: asyncio.Event) -> set[str]:
    """Ask for parts of devices, several at a time; the leases that were granted."""
    granted: set[str] = set()
    body = json.dumps({"owner": "load", "gpu_share": 0.001, "ttl_seconds": 3600}).encode()

    async def one() -> None:
        while not enough.is_set():
            try:
                reply = json.loads((await nc.request("corral.v1.plan.request", body, timeout=2)).data)
            except Exception:  # nobody leads just then
                await asyncio.sleep(0.05)
                continue
            if reply["type"] == "assignment":
                granted.add(reply["lease"]["lease_id"])
            await asyncio.sleep(0.02)

    await asyncio.gather(*(one() for _ in range(4)))
    return granted


async def _published(nc: Client) -> tuple[list[int], int]:
    """The numbers of all messages of the collector's run, and how many device samples are in them."""
    numbers: list[int] = []
    samples = 0
    js = nc.jetstream()
    for stream, subject in (
        (subjects.TELEMETRY_STREAM, f"{subjects.PREFIX}.>"),
        (subjects.FACTS_STREAM, f"{subjects.EVENTS}.*"),
    ):
        config = api.ConsumerConfig(ack_policy=api.AckPolicy.NONE)
        subscription = await js.pull_subscribe(subject, stream=stream, config=config)
        left = (await subscription.consumer_info()).num_pending or 0
        while left:
            for message in await subscription.fetch(min(left, 500), timeout=5):
                left -= 1
                headers = message.headers or {}
                if "Nats-Msg-Id" not in headers:  # the one that is at fault
                    continue
                numbers.append(int(headers["Nats-Msg-Id"].rpartition("-")[2]))
                if message.subject.startswith(subjects.SAMPLES):
                    samples += len(codec.decode(message.data, SampleBatch).times_ns) // 8
        await subscription.unsubscribe()
    inventories = [
        int(headers["Nats-Msg-Id"].rpartition("-")[2])
        async for headers in _headers(nc, subjects.INVENTORY_STREAM, f"{subjects.INVENTORY}.*")
    ]
    return sorted([*numbers, *inventories]), samples


async def _headers(nc: Client, stream: str, subject: str) -> AsyncIterator[dict[str, str]]:
    config = api.ConsumerConfig(ack_policy=api.AckPolicy.NONE)
    subscription = await nc.jetstream().pull_subscribe(subject, stream=stream, config=config)
    left = (await subscription.consumer_info()).num_pending or 0
    while left:
        for message in await subscription.fetch(min(left, 500), timeout=5):
            left -= 1
            yield message.headers or {}
    await subscription.unsubscribe()


async def test_what_does_not_work_says_why(services: Services, asking: Client) -> None:
    services.start("planner", "plan")
    await until(asking, lambda found: [h.ready for h in found] == [True], "planner")

    async def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return await asyncio.to_thread(invoke, "health", *arguments, url=services.server.url)

    assert (await command("planner")).returncode == 0
    assert (await command("planner", "--here")).returncode == 0
    assert (await command("processor")).returncode == 6

    # A planner whose bucket is gone does not know whether it leads.
    assert await asking.jetstream().delete_stream(f"KV_{subjects.PLANNER_BUCKET}")
    [ill] = await until(asking, lambda found: [h.ready for h in found] == [False], "planner")
    assert ill.reasons
    done = await command("planner", "--here")
    assert done.returncode == 6
    assert ill.reasons[0].split(":")[0] in done.stderr
    shown = json.loads((await command("--json")).stdout)
    assert shown["well"] is False


@pytest.mark.parametrize("way", ["twice", "deadline"])
def test_a_stop_that_hangs_is_ended(services: Services, way: str) -> None:
    options = ("--stop-within", "1s") if way == "deadline" else ()
    process = services.start("planner", "plan", *options)
    wait_for(lambda: "is ready" in services.log("planner").read_text())
    assert services.server.process is not None
    os.kill(services.server.process.pid, signal.SIGSTOP)  # a bus that hangs, so that nothing can be said good-bye to
    try:
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: "shutting down" in services.log("planner").read_text())
        if way == "twice":
            process.send_signal(signal.SIGINT)
            assert process.wait(5) in (-signal.SIGINT, 0)
        else:
            assert process.wait(10) in (0, 1)
            if process.returncode:
                assert re.search("no graceful shutdown", services.log("planner").read_text())
    finally:
        os.kill(services.server.process.pid, signal.SIGCONT)
