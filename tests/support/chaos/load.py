"""Load on a cluster, probes that see whether it serves, and the account of what was promised and what is there."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import time
from collections import defaultdict
from typing import Any

import msgspec
import nats
from corral.bus.connect import connect as bus_connect
from corral.client.query import user_subject
from corral.schemas import codec, subjects
from corral.schemas.query import ProcessorStatus
from corral.schemas.telemetry import AgentReport, DeadLetter, DeviceEvent, SampleBatch
from nats.aio.client import Client
from nats.js import api
from support import planner_model
from support.planner_model import History, RandomClient, check

FRESH_SECONDS = float(os.environ.get("CORRAL_CHAOS_FRESH_SECONDS", "3"))
"""History serves while the newest sample of each host is younger; a machine that others use needs more."""


async def connect(urls: list[str], name: str = "chaos") -> Client:
    """A connection that outlives any server."""

    async def quiet(_: Exception) -> None:
        return None

    return await bus_connect(
        ",".join(urls), name=name, reconnect_time_wait=0.2, connect_timeout=1, ping_interval=2, error_cb=quiet
    )


class OwnedClient(RandomClient):
    """Asks where the server sees in whose name: nobody may ask elsewhere where there is authentication."""

    async def once(self, verb: str, body: dict[str, Any], timeout: float) -> dict[str, Any] | None:
        return await super().once(f"{verb}.{body['owner']}", body, timeout)


class Probe:
    """Asks again and again, and remembers when there was an answer."""

    def __init__(self, ask: Any) -> None:
        self._ask = ask
        self._over = False
        self.answered: list[float] = []
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        # A flag, since asyncio.wait_for may swallow a cancellation before Python 3.12.
        while not self._over:
            began = time.monotonic()
            with contextlib.suppress(Exception):
                if await asyncio.wait_for(self._ask(), 1.0):
                    self.answered.append(time.monotonic())
            await asyncio.sleep(max(0.02, 0.2 - (time.monotonic() - began)))

    async def stop(self) -> None:
        self._over = True
        await asyncio.gather(self._task, return_exceptions=True)

    def outage(self, since: float, until: float | None = None) -> float:
        """The longest time without an answer that began after a moment, or was going on at it."""
        end = until or time.monotonic()
        times = [since, *(at for at in self.answered if at < end), end]
        gaps = [later - max(earlier, since) for earlier, later in itertools.pairwise(times) if later > since]
        return max(gaps, default=0.0)

    @property
    def silent(self) -> float:
        """Seconds since the last answer."""
        return time.monotonic() - self.answered[-1] if self.answered else float("inf")


class Account(msgspec.Struct, kw_only=True):
    """What was expected after a fault, and what was found.

    Attributes:
        fault: its name.
        what: what was done, in words.
        rows_expected: samples that collectors have read, less what they say they dropped.
        rows_found: samples in the history.
        rows_doubled: of these, those that are there twice.
        rows_refused: samples that are dead letters instead, by the fault's own nature.
        messages_missing: messages of collectors that no stream has.
        leases_expected: leases that were answered.
        leases_found: of these, those whose grant is in the record.
        promised_twice: devices held beyond what they have, at any time.
        wrong: everything that is wrong, in words.
        placement_back_seconds: the longest time without an answer of the planner, from the fault on.
        history_back_seconds: the longest time without a fresh answer of the history, from the fault on.
        seconds: the whole run took.
        note: more, for people.
    """

    fault: str
    what: str
    rows_expected: int = 0
    rows_found: int = 0
    rows_doubled: int = 0
    rows_refused: int = 0
    messages_missing: int = 0
    leases_expected: int = 0
    leases_found: int = 0
    promised_twice: int = 0
    wrong: list[str] = []
    placement_back_seconds: float = 0.0
    history_back_seconds: float = 0.0
    seconds: float = 0.0
    note: str = ""


class Load:
    """Requesters and probes on a cluster whose collectors run already.

    Args:
        urls: of the servers.
        requesters: clients that ask, renew, release, forget and die.
        keepers: leases that are held from before the fault to after it.
    """

    def __init__(self, urls: list[str], *, requesters: int = 10, keepers: int = 3) -> None:
        self.urls = urls
        self.history = History()
        self.kept: list[dict[str, Any]] = []
        self.hosts = 0
        self.gone: set[str] = set()
        self.broken: set[str] = set()
        self.unnumbered: set[str] = set()
        self.refused_codes: set[str] = set()
        self._requesters = requesters
        self._keepers = keepers
        self._tasks: list[asyncio.Task[None]] = []
        self._until = float("inf")
        self.nc: Client = None  # type: ignore[assignment]
        self._crowd: Client = None  # type: ignore[assignment]
        self.placement: Probe = None  # type: ignore[assignment]
        self.records: Probe = None  # type: ignore[assignment]

    async def start(self, seed: int) -> None:
        rng = random.Random(seed)
        self.nc, self._crowd = await connect(self.urls), await connect(self.urls)
        keeper = OwnedClient(self.nc, "keeper", self.history, 1)
        for number in range(self._keepers):
            body = {
                "owner": "keeper", "request_id": f"keeper-{number}", "gpus": 1, "gpu_share": 0.2, "wait_seconds": 5,
                "gpu_memory_bytes": 2**30, "ttl_seconds": 3600,
            }  # fmt: skip
            answer = await keeper.request(body)
            assert answer is not None
            assert answer["type"] == "assignment", answer
            self.kept.append(answer["lease"])
        clients = [
            OwnedClient(self._crowd, f"c{number}", self.history, rng.getrandbits(32))
            for number in range(self._requesters)
        ]
        self._tasks = [asyncio.create_task(self._run(client)) for client in clients]
        self.placement, self.records = Probe(self._ask_planner), Probe(self._ask_history)

    async def _run(self, client: RandomClient) -> None:
        while time.time() < self._until:
            await client.live_once(self._until)
            await asyncio.sleep(client.random.expovariate(4.0))

    async def _ask_planner(self) -> bool:
        body = json.dumps({"owner": "probe", "gpus": 1, "gpu_share": 0.01, "gpu_memory_bytes": 2**20}).encode()
        answer = json.loads((await self.nc.request("corral.v1.plan.request.probe", body, timeout=0.9)).data)
        if answer["type"] == "assignment":
            release = json.dumps({"owner": "probe", "lease_id": answer["lease"]["lease_id"]}).encode()
            await self.nc.request("corral.v1.plan.release.probe", release, timeout=0.9)
        return answer["type"] in ("assignment", "rejection")

    async def _ask_history(self) -> bool:
        """Of every host that there is, but those that are gone by the fault's nature."""
        newest = await self.rows(
            "SELECT host, epoch(max(time)) FROM samples WHERE time > now() - INTERVAL 2 MINUTE GROUP BY host"
        )
        seen = [at for host, at in newest if host not in self.gone]
        return len(seen) >= self.hosts - len(self.gone) and all(time.time() - at < FRESH_SECONDS for at in seen)

    async def rows(self, sql: str, timeout: float = 0.9) -> list[list[Any]]:
        reply = await self.nc.request(
            user_subject(self.nc, subjects.QUERY), json.dumps({"sql": sql}).encode(), timeout=timeout
        )
        answer = json.loads(reply.data)
        if answer["type"] != "result":
            raise RuntimeError(answer)
        return answer["rows"]

    async def status(self) -> ProcessorStatus:
        """What the processor says of itself."""
        return codec.decode((await self.nc.request(subjects.HISTORY_STATUS, b"")).data, ProcessorStatus, codec.JSON)

    async def until_served(self, seconds: float = 180.0) -> None:
        """Both are back, and stay so for a while."""
        deadline = time.monotonic() + seconds
        steady = time.monotonic()
        while time.monotonic() - steady < 2.0:
            if self.placement.silent > 1.0 or self.records.silent > 1.0:
                steady = time.monotonic()
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"not back within {seconds:g} s: the planner silent for {self.placement.silent:.1f} s, "
                    f"the history for {self.records.silent:.1f} s"
                )
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """End the requesters in order; the probes go on."""
        self._until = time.time()
        await asyncio.gather(*self._tasks)
        await self.placement.stop()
        await self.records.stop()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for probe in (self.placement, self.records):
            if probe is not None:
                await probe.stop()
        for client in (self.nc, self._crowd):
            if client is not None:
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(client.close(), 2)


async def read_stream(nc: Client, stream: str, subject: str = ">", tries: int = 10) -> list[tuple[str, bytes]]:
    """Every message of a stream, with its subject. A cluster that has just healed is asked again."""
    try:
        return await _read_stream(nc, stream, subject)
    except (nats.errors.Error, TimeoutError):
        if not tries:
            raise
        await asyncio.sleep(1.0)
        return await read_stream(nc, stream, subject, tries - 1)


async def _read_stream(nc: Client, stream: str, subject: str) -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    config = api.ConsumerConfig(ack_policy=api.AckPolicy.NONE, mem_storage=True)
    consumer = await nc.jetstream().pull_subscribe(subject, stream=stream, config=config)
    left = (await consumer.consumer_info()).num_pending or 0
    while left > 0:
        for message in await consumer.fetch(min(left, 500), timeout=10):
            found.append((message.subject, message.data))
            left -= 1
    await consumer.unsubscribe()
    return found


class _Sequenced(msgspec.Struct):
    agent: str = ""
    sequence: int = 0


async def account_for_telemetry(load: Load, account: Account, *, patience: float = 40.0) -> None:
    """Rows and messages, expected and found. Collectors have ended in order or were killed."""
    telemetry = await read_stream(load.nc, subjects.TELEMETRY_STREAM)
    facts = await read_stream(load.nc, subjects.FACTS_STREAM, f"{subjects.EVENTS}.*")
    inventory = await read_stream(load.nc, subjects.INVENTORY_STREAM)
    sequences: dict[str, set[int]] = defaultdict(set)
    rows: dict[str, int] = defaultdict(int)
    reports: dict[str, AgentReport] = {}
    for subject, payload in telemetry:
        if subject.rpartition(".")[2] in load.broken:
            continue
        try:
            head = msgspec.msgpack.decode(payload, type=_Sequenced)
        except msgspec.MsgspecError:
            continue
        if head.sequence < 1 or not head.agent:
            continue
        if subject.startswith(subjects.SAMPLES):
            with contextlib.suppress(codec.DecodeError):
                batch = codec.decode(payload, SampleBatch)
                if head.sequence not in sequences[head.agent]:
                    rows[head.agent] += len(batch.times_ns) // 8
        elif subject.startswith(subjects.AGENTS):
            reports[head.agent] = codec.decode(payload, AgentReport)
        sequences[head.agent].add(head.sequence)
    ended: set[str] = set()
    for _, payload in facts:
        with contextlib.suppress(codec.DecodeError):
            event = codec.decode(payload, DeviceEvent)
            if event.agent and event.sequence:
                sequences[event.agent].add(event.sequence)
            if event.kind == "agent_stopped":
                ended.add(event.agent)
    # Inventories are numbered too, but only the last few of a host are kept: what is missing may be one of them.
    inventories: dict[str, int] = defaultdict(int)
    for _, payload in inventory:
        with contextlib.suppress(msgspec.MsgspecError):
            inventories[msgspec.msgpack.decode(payload, type=_Sequenced).agent] += 1
    for agent, seen in sequences.items():
        dropped = reports[agent].dropped_messages if agent in reports else 0
        missing = max(seen) - len(seen) - dropped - inventories[agent]
        account.messages_missing += max(0, missing)
        if agent in load.unnumbered:
            account.messages_missing -= max(0, missing)
        if agent in ended:
            # What the collector itself counted, whatever the stream has.
            read = reports[agent].samples - reports[agent].dropped_samples
            if read != rows[agent]:
                account.wrong.append(f"collector {agent} read {read} samples, the stream has {rows[agent]}")
    account.rows_expected += sum(rows.values())
    account.rows_refused = await _refused_rows(load)
    deadline = time.monotonic() + patience
    while True:
        with contextlib.suppress(Exception):
            account.rows_found = int((await load.rows("SELECT count(*) FROM samples", 5))[0][0])
        if account.rows_found >= account.rows_expected - account.rows_refused or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.1)
    await asyncio.sleep(0.5)
    [[found, distinct]] = await load.rows("SELECT count(*), count(DISTINCT (host, device, time)) FROM samples", 10)
    account.rows_found, account.rows_doubled = int(found), int(found) - int(distinct)
    if account.rows_found + account.rows_refused != account.rows_expected:
        account.wrong.append(f"{account.rows_expected} samples were published, {account.rows_found} are stored")
    if account.rows_doubled:
        account.wrong.append(f"{account.rows_doubled} samples are stored twice")
    if account.messages_missing:
        account.wrong.append(f"{account.messages_missing} messages of collectors are missing")


async def _refused_rows(load: Load) -> int:
    """Samples in dead letters whose code the fault brings about."""
    letters = (codec.decode(data, DeadLetter) for _, data in await read_stream(load.nc, subjects.DEAD_STREAM))
    refused = {
        letter.stream_sequence: letter.payload
        for letter in letters
        if letter.subject.startswith(subjects.SAMPLES) and letter.code in load.refused_codes
    }
    return sum(len(codec.decode(payload, SampleBatch).times_ns) // 8 for payload in refused.values())


async def account_for_leases(load: Load, account: Account, *, lost_hosts: frozenset[str] = frozenset()) -> None:
    """What clients were answered against what is on record. Planners have ended."""
    told = await read_stream(load.nc, subjects.FACTS_STREAM, f"{subjects.LEASE_EVENTS}.>")
    events = [json.loads(data) for subject, data in told if not subject.endswith(".no-such-lease")]
    bucket = await read_stream(load.nc, f"KV_{subjects.PLANNER_BUCKET}", "$KV.*.lease.*")
    newest = {subject: json.loads(data) for subject, data in bucket if data}
    active = [record["lease"] for record in newest.values() if record["lease"]["state"] == "active"]
    wrong = check(load.history, events, active, lost_hosts)
    answered = {
        answers[0]["lease"]["lease_id"]
        for answers in load.history.answers.values()
        if answers and answers[0]["type"] == "assignment"
    }
    granted = {event["lease"]["lease_id"] for event in events if event["kind"] == "granted"}
    account.leases_expected, account.leases_found = len(answered), len(answered & granted)
    account.promised_twice = sum(problem.startswith(("planned:", "counted on:")) for problem in wrong)
    still = {lease["lease_id"] for lease in active}
    for lease in load.kept:
        if lease["lease_id"] not in still and not {grant["host"] for grant in lease["grants"]} & lost_hosts:
            wrong.append(f"lease {lease['lease_id']} was to be held for an hour and is gone")
    gone = tuple(f"(host {host} " for host in lost_hosts)
    # A host that is gone takes its leases with it, and whoever asks is told so.
    account.wrong += [problem for problem in wrong if not any(name in problem for name in gone)]


def limit_cores(cores: float) -> None:
    """What the checker takes a host's cores for."""
    planner_model.CPUS = cores
