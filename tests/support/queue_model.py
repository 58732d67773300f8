"""Clients that wait in the queue under faults, and the invariants of waiting that are proved from what they saw.

Each of them asks for the only device of a host (`SLOTS`), so that of those that wait for it one starts after the
other. The checker knows nothing of how the planner works: it compares when clients asked, withdrew and went away with
the lease events, the request events and what is left in the bucket.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import nats
from corral.schemas import codec, subjects
from corral.schemas.request_events import RequestEvent, RequestEvents
from nats.aio.client import Client

from .planner_model import Held, History, RandomClient, stamp
from .planner_rig import ask, stream

SLOTS = ("slot0", "slot1")
SILENCE_SECONDS = 4.0
OVERDUE_SECONDS = 2.0
WAIT_SECONDS = 120.0
"""Wait of the requests in the queue."""
SLACK_SECONDS = 1.5
"""Time between a decision and what of it is seen from outside: keys are renewed four times a second."""
_ANSWER_SECONDS = 1.0
"""Time without an answer to anybody that counts as an outage."""
_NOT_HEARD = re.compile(r"not heard for (\d+) s")
_BUCKET = f"KV_{subjects.PLANNER_BUCKET}"
_QUEUE = f"$KV.{subjects.PLANNER_BUCKET}.queue."


@dataclass
class Asked:
    """A request that waits, as its client knows it. Times are seconds since the epoch; infinite for never.

    Attributes:
        owner: of the request.
        slot: host whose device it asks for.
        expected_seconds: its estimate; None for none.
        sent_at: when it was sent first.
        stored_at: when its entry was found in the bucket.
        rejected_at: when it was answered with a rejection, such as `withdrawn`.
        withdrawn_at: when its withdrawal was sent.
        gone_at: when its client went away, and never came back.
        excused: its client was told that it was not heard, and so may have lost its place.
        asks: when it was sent, each time.
    """

    owner: str
    slot: str
    expected_seconds: float | None
    sent_at: float
    stored_at: float = math.inf
    rejected_at: float = math.inf
    withdrawn_at: float = math.inf
    gone_at: float = math.inf
    excused: bool = False
    asks: list[float] = field(default_factory=list)

    @property
    def waits_until(self) -> float:
        """When its wait was over at the latest, if it was not granted.

        Its client may learn only after an outage that it was, or that its withdrawal had come.
        """
        withdrawn_at = self.withdrawn_at if self.rejected_at < math.inf else math.inf
        return min(self.rejected_at, withdrawn_at, self.sent_at + WAIT_SECONDS)


@dataclass
class Outage:
    """Time in which the bus was away, or a planner stood still."""

    since: float
    until: float


def seconds_away(outages: Iterable[Outage], since: float, until: float, recovery_seconds: float = 0.0) -> float:
    """Seconds of a time that lie in outages, which may overlap, or in the recovery from one."""
    away, at = 0.0, since
    for one in sorted(outages, key=lambda outage: outage.since):
        end = one.until + recovery_seconds
        away += max(0.0, min(end, until) - max(one.since, at))
        at = max(at, end)
    return away


async def watch_outages(nc: Client, outages: list[Outage]) -> None:
    """Add the times in which no planner answered to the outages: after a fault, or on a busy machine. Runs for ever."""
    answered_at = time.time()
    while True:
        asked_at = time.time()
        with contextlib.suppress(nats.errors.Error, OSError):
            if (await ask(nc, "fleet", timeout=_ANSWER_SECONDS))["type"] == "fleet":
                if time.time() - answered_at > _ANSWER_SECONDS:
                    outages.append(Outage(answered_at, time.time()))
                answered_at = asked_at
        await asyncio.sleep(_ANSWER_SECONDS / 4)


@dataclass
class QueueHistory:
    """What the clients of the queue did and saw.

    Attributes:
        asked: by request id.
        outages: in which silence does not count.
    """

    asked: dict[str, Asked] = field(default_factory=dict)
    outages: list[Outage] = field(default_factory=list)


class StoredEntries:
    """Watches the bucket for the entries of waiting requests."""

    def __init__(self, nc: Client) -> None:
        self._nc = nc
        self._subjects: dict[str, set[str]] = defaultdict(set)
        self._written = asyncio.Event()

    async def start(self) -> None:
        async def written(message: Any) -> None:
            if message.data:
                self._subjects[json.loads(message.data)["request"]["request_id"]].add(message.subject)
                self._written.set()

        await self._nc.subscribe(f"{_QUEUE}>", cb=written)

    async def wait(self, request_id: str) -> None:
        """Wait until an entry of a request was written, and the stream has it."""
        while True:
            self._written.clear()
            for subject in list(self._subjects.get(request_id, ())):
                with contextlib.suppress(nats.errors.Error, nats.js.errors.Error, TimeoutError):
                    await self._nc.jetstream().get_last_msg(_BUCKET, subject)
                    return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    await self._written.wait()


class WaitingClient(RandomClient):
    """Waits in the queue for a slot, asks again twice within the silence, and withdraws at times."""

    def __init__(
        self,
        nc: Client,
        name: str,
        histories: tuple[History, QueueHistory],
        entries: StoredEntries,
        seed: int,
        *,
        slot: str,
        expected_seconds: float | None = None,
        at_once: int = 1,
    ) -> None:
        super().__init__(nc, name, histories[0], seed)
        self.waits = histories[1]
        self.entries = entries
        self.slot = slot
        self.expected_seconds = expected_seconds
        self.at_once = at_once

    async def run(self, until: float) -> None:
        while time.time() < until:
            waiting = set[asyncio.Task[None]]()
            while len(waiting) < self.at_once:
                waiting.add(await self.ask())
                await asyncio.sleep(self.random.uniform(0.0, 0.5))  # estimates of durations change meanwhile
            await asyncio.gather(*waiting)

    async def ask(self) -> asyncio.Task[None]:
        """Ask, and return once the request is durable or was answered; the task ends with the lease."""
        self.turn += 1
        request_id = f"{self.name}-{self.turn}"
        body: dict[str, Any] = {
            "owner": self.name,
            "request_id": request_id,
            "hosts": [self.slot],
            "ttl_seconds": 2,
            "wait_seconds": WAIT_SECONDS,
        }
        if self.expected_seconds is not None:
            body["expected_seconds"] = self.expected_seconds
        asked = Asked(self.name, self.slot, self.expected_seconds, time.time())
        self.waits.asked[request_id] = asked
        task = asyncio.create_task(self._wait(body, asked))
        stored = asyncio.create_task(self.entries.wait(request_id))
        await asyncio.wait({task, stored}, return_when=asyncio.FIRST_COMPLETED)
        if stored.done() and not task.done():
            asked.stored_at = time.time()
        stored.cancel()
        return task

    async def _wait(self, body: dict[str, Any], asked: Asked) -> None:
        withdraws = asyncio.create_task(self._withdraw(body, asked)) if self.random.random() < 0.1 else None
        answer = await self._until_answered(body)
        self.history.answers[body["request_id"]].append(answer)
        if answer["type"] == "rejection":
            asked.rejected_at = min(asked.rejected_at, time.time())
        if withdraws is not None:
            await withdraws
        if answer["type"] != "assignment":
            return
        held = Held(answer["lease"], time.time(), stamp(answer["lease"]["expires_at"]))
        self.history.held.append(held)
        await asyncio.sleep(self.random.uniform(0.02, 0.2))
        held.until = min(held.until, time.time())
        await self.act("release", held)

    async def _until_answered(self, body: dict[str, Any]) -> dict[str, Any]:
        """Send a request again and again until there is a final answer."""
        inbox = self.nc.new_inbox()
        # By a subscription like the first the planner finds out that the client is there; by the second it does not.
        wild = self.random.random() < 0.5
        answers = await self.nc.subscribe(f"{inbox}.*" if wild else inbox)
        data = json.dumps(body).encode()
        sent_at = time.time()
        try:
            while True:
                # One that asks again too late, as this process may be slow, has no claim to its place.
                if time.time() - sent_at > SILENCE_SECONDS / 2:
                    self.waits.asked[body["request_id"]].excused = True
                sent_at = time.time()
                self.waits.asked[body["request_id"]].asks.append(sent_at)
                with contextlib.suppress(nats.errors.Error, OSError):
                    await self.nc.publish("corral.v1.plan.request", data, reply=f"{inbox}.1" if wild else inbox)
                with contextlib.suppress(nats.errors.TimeoutError):
                    message = await answers.next_msg(timeout=self.random.uniform(0.5, 1.0))
                    answer = json.loads(message.data) if message.data else {"type": "error", "code": "unavailable"}
                    if answer["type"] == "error" and answer["code"] == "unavailable":
                        silent = _NOT_HEARD.search(answer.get("message", ""))
                        if silent and float(silent[1]) >= SILENCE_SECONDS:
                            self.waits.asked[body["request_id"]].excused = True
                        await asyncio.sleep(self.random.uniform(0.1, 0.5))
                    elif answer["type"] != "queue":
                        return answer
        finally:
            with contextlib.suppress(nats.errors.Error):
                await answers.unsubscribe()

    async def _withdraw(self, body: dict[str, Any], asked: Asked) -> None:
        await asyncio.sleep(self.random.uniform(0.0, 1.0))
        asked.withdrawn_at = time.time()
        answer = await self.once("withdraw", {"owner": self.name, "request_id": body["request_id"]}, 1.5)
        if answer is not None and answer["type"] == "rejection":
            asked.rejected_at = min(asked.rejected_at, time.time())
            self.history.answers[body["request_id"]].append(answer)


class Blocker(RandomClient):
    """Holds a slot until a client that waits for it has been gone for too long to get it.

    The slot comes free when that client has been silent for more than half of `silence_seconds`, and is in the queue
    all the same: it leaves that after the whole. After three quarters it is granted nothing for another reason, so only
    a planner with at least `4 * SLACK_SECONDS` of silence shows whether it takes the client for present.
    """

    def __init__(
        self,
        nc: Client,
        name: str,
        histories: tuple[History, QueueHistory],
        entries: StoredEntries,
        seed: int,
        silence_seconds: float,
    ) -> None:
        super().__init__(nc, name, histories[0], seed)
        self.waits = histories[1]
        self.entries = entries
        self.silence_seconds = silence_seconds

    async def live_once(self, until: float) -> None:
        self.turn += 1
        request_id = f"{self.name}-{self.turn}"
        body = {"owner": self.name, "request_id": request_id, "hosts": [SLOTS[0]], "ttl_seconds": 60, "wait_seconds": 3}
        answer = await self.request(body)
        if answer is None or answer["type"] != "assignment":
            return
        held = Held(answer["lease"], time.time(), stamp(answer["lease"]["expires_at"]))
        self.history.held.append(held)
        url = self.nc.connected_url.geturl() if self.nc.connected_url else ""
        if url:
            await ask_and_go(url, f"{self.name}-gone{self.turn}", self.waits, self.entries, SLOTS[0], 0.0)
            await asyncio.sleep(self.silence_seconds / 2 + SLACK_SECONDS + 0.2)
        held.until = min(held.until, time.time())
        await self.act("release", held)
        await asyncio.sleep(SLACK_SECONDS)  # so that it is not the next in line itself


async def ask_and_go(url: str, name: str, waits: QueueHistory, entries: StoredEntries, slot: str, stay: float) -> None:
    """A client that asks, and whose connection ends while it waits."""
    request_id = f"{name}-1"
    async with asyncio.timeout(60):
        nc = await nats.connect(url, max_reconnect_attempts=-1, reconnect_time_wait=0.1, error_cb=_ignore)
    body = {"owner": name, "request_id": request_id, "hosts": [slot], "ttl_seconds": 1, "wait_seconds": WAIT_SECONDS}
    asked = waits.asked[request_id] = Asked(name, slot, None, time.time())
    inbox = nc.new_inbox()
    answers = await nc.subscribe(f"{inbox}.*")
    stored = asyncio.create_task(entries.wait(request_id))
    deadline = time.monotonic() + 30
    try:
        while not stored.done() and time.monotonic() < deadline:
            await nc.publish("corral.v1.plan.request", json.dumps(body).encode(), reply=f"{inbox}.1")
            with contextlib.suppress(nats.errors.TimeoutError):
                answer = await answers.next_msg(timeout=0.3)
                if answer.data and json.loads(answer.data)["type"] == "assignment":
                    break
        await asyncio.sleep(stay)
    except (nats.errors.Error, OSError):  # the bus is away: it goes all the same
        pass
    stored.cancel()
    with contextlib.suppress(Exception):
        async with asyncio.timeout(2):
            await nc.close()
    asked.gone_at = time.time()


async def _ignore(_: Exception) -> None:
    """Say nothing of errors on a connection that is meant to break."""


async def request_events(nc: Client) -> list[RequestEvent]:
    """Events of requests on the stream, each once."""
    found = stream(nc, subjects.REQUESTS_STREAM, f"{subjects.REQUEST_EVENTS}.*")
    batches = [codec.decode(message.data, RequestEvents, codec.JSON) async for message in found]
    return list({event.uid: event for batch in batches for event in batch.events}.values())


async def left_over(nc: Client, seconds: float) -> list[str]:
    """What still waits once nobody does: in the queue, or in the bucket; it is given some seconds to go."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(nats.errors.Error, TimeoutError):
            listed = [entry["request_id"] for entry in (await ask(nc, "queue"))["entries"]]
            stored = [kept.subject async for kept in stream(nc, _BUCKET, f"{_QUEUE}>") if kept.data]
            if not listed and not stored:
                return []
            if time.monotonic() > deadline:
                return [f"{name} still waits" for name in listed] + [f"{name} is left in the bucket" for name in stored]
        await asyncio.sleep(0.25)


def check_queue(
    waits: QueueHistory,
    lease_events: Iterable[dict[str, Any]],
    events: Sequence[RequestEvent],
    left: Sequence[str],
    silence_seconds: float = SILENCE_SECONDS,
) -> list[str]:
    """Everything that is wrong with the queue; empty if nothing is.

    Args:
        waits: of the clients.
        lease_events: in the order of their times.
        events: of requests, each once.
        left: what still waits in the end, though no client does.
        silence_seconds: of the planners.
    """
    granted: dict[str, float] = {}
    for event in lease_events:
        if event["kind"] == "granted":
            granted[event["lease"]["request_id"]] = stamp(event["lease"]["granted_at"])
    wrong = [f"ghost: {one}" for one in left]
    for request_id, asked in waits.asked.items():
        wrong += _ghosts(request_id, asked, granted.get(request_id, math.inf), waits.outages, silence_seconds)
    left_at = left_silent(events)
    wrong += _order(waits.asked, granted, left_at)
    wrong += _silences(waits, left_at, silence_seconds)
    wrong += _outcomes(waits.asked, granted, events)
    return wrong


def _ghosts(
    request_id: str, asked: Asked, granted_at: float, outages: Sequence[Outage], silence_seconds: float
) -> list[str]:
    """Grants to a request that its client had withdrawn, or whose client was gone for longer than the silence."""
    if granted_at == math.inf:
        return []
    if asked.rejected_at < math.inf:
        return [f"ghost: {request_id} was rejected at {asked.rejected_at:.3f} and granted at {granted_at:.3f}"]
    silent = granted_at - asked.gone_at - seconds_away(outages, asked.gone_at, granted_at)
    if silent > silence_seconds / 2 + SLACK_SECONDS:
        return [f"ghost: {request_id} was granted {silent:.1f} s after its client had gone"]
    return []


def left_silent(events: Iterable[RequestEvent]) -> dict[str, list[float]]:
    """When requests left the queue since their clients were not heard, by request id."""
    found: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if _NOT_HEARD.search(event.message):
            found[event.request.request_id or ""].append(event.ended_at.timestamp())
    return found


def _order(asked: dict[str, Asked], granted: dict[str, float], left_at: Mapping[str, Sequence[float]]) -> list[str]:
    """Requests that started before one that was ahead of them: of the same owner and needs, or overdue by then."""
    wrong: list[str] = []
    for slot in SLOTS:
        of_slot = [(request_id, one) for request_id, one in asked.items() if one.slot == slot]
        started = [(granted[request_id], request_id, one) for request_id, one in of_slot if request_id in granted]
        for first, ahead in of_slot:
            # Whether one had to leave the queue is looked at by `_silences`.
            if ahead.excused or first in left_at or ahead.stored_at == math.inf or ahead.gone_at < math.inf:
                continue
            ended_at = min(granted.get(first, math.inf), ahead.waits_until)
            for at, later, behind in started:
                if behind.sent_at <= ahead.stored_at or at >= ended_at:
                    continue
                if behind.owner == ahead.owner and behind.expected_seconds == ahead.expected_seconds:
                    wrong.append(f"order: {later} started before {first}, which waited already when it was sent")
                elif at > ahead.stored_at + OVERDUE_SECONDS + SLACK_SECONDS:  # no planner may have had it before
                    late = at - ahead.stored_at
                    wrong.append(f"bound: {later} started before {first}, which had waited for {late:.1f} s")
    return wrong


def _silences(waits: QueueHistory, left_at: Mapping[str, Sequence[float]], silence_seconds: float) -> list[str]:
    """Requests that left the queue since their clients were not heard, and that had been sent within the silence."""
    wrong: list[str] = []
    for request_id, asked in waits.asked.items():
        for at in left_at.get(request_id, ()):
            since = max((sent_at for sent_at in asked.asks if sent_at < at - SLACK_SECONDS), default=-math.inf)
            if at - since < silence_seconds and not seconds_away(waits.outages, since, at):
                wrong.append(f"silence: {request_id} left the queue {at - since:.1f} s after it had been sent")
    return wrong


def _outcomes(asked: dict[str, Asked], granted: dict[str, float], events: Sequence[RequestEvent]) -> list[str]:
    """Requests that waited without a row in the history, or with one that contradicts the leases."""
    wrong: list[str] = []
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    for event in events:
        outcomes[event.request.request_id or ""][event.outcome.value] += 1
    for request_id, one in asked.items():
        found = outcomes[request_id]
        if one.stored_at < math.inf and not found:
            wrong.append(f"history: {request_id} waited, and has no event")
        if found["granted"] != (request_id in granted) and one.stored_at < math.inf:
            wrong.append(f"history: {request_id} has outcomes {dict(found)}, granted: {request_id in granted}")
    return wrong
