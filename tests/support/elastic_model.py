"""Elastic clients, booked windows, drains and faults under kills, and the invariants that are proved of them.

All of them are about the hosts `FLEX`, whose devices have a model of their own. The checker knows nothing of how the
planner works: it compares lease events with what clients sent and were answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from corral.schemas import codec, subjects
from corral.schemas.telemetry import DeviceEvent, Severity
from nats.aio.client import Client
from nats.errors import Error

from .planner_model import (
    NOTICE_SECONDS,
    RECOVERY_SECONDS,
    TRIES_MOST,
    Held,
    History,
    RandomClient,
    Span,
    devices_of,
    spans_of,
    stamp,
    time_of,
)
from .queue_model import Outage, seconds_away

FLEX = ("flex0", "flex1")
FLEX_DEVICES = 6
FLEX_MODEL = "NVIDIA A40"
GROW = ("grow0",)
"""A host without windows and drains, with a model of its own: little is in the way of growth there."""
GROW_DEVICES = 8
GROW_MODEL = "NVIDIA A10"
HELD_SECONDS = 10.0
"""Mean time for which an elastic lease is held."""
DECIDED_SECONDS = 0.1
"""Time from the decision on a lease to the time that it bears, on a busy machine, but for outages."""
LATE_SECONDS = 3.0
"""Time for the owner of a window, or of a notice: planners look twice a second, and one may have to start."""


@dataclass
class Answered:
    """An answer of a holder about its devices. Times are seconds since the epoch; infinite for never."""

    body: dict[str, Any]
    sent_at: float
    answered_at: float = math.inf
    reply: dict[str, Any] | None = None


@dataclass
class Closed:
    """Devices that take no new work: drained, or in maintenance.

    Attributes:
        devices: uuids.
        since: when that was answered, or began.
        until: when the end was sent, or came.
        before: when it was answered, if that was ahead: leases since then have ended when it begins; infinite if not.
    """

    devices: set[str]
    since: float
    until: float = math.inf
    before: float = math.inf


@dataclass
class Claim:
    """A booked window, with the request of its owner."""

    window: dict[str, Any]
    request_id: str
    sent_at: float


@dataclass
class ElasticHistory:
    """What was done to the hosts of this model, and seen.

    Attributes:
        sent: when a request was sent first, by its id.
        answered: answers of holders.
        closed: drains and maintenance.
        claims: windows with their owners' requests.
        left: when a device last stopped being one that a window can count on, by a drain, a fault or a maintenance.
    """

    sent: dict[str, float] = field(default_factory=dict)
    answered: list[Answered] = field(default_factory=list)
    closed: list[Closed] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    left: list[tuple[float, str]] = field(default_factory=list)


class FlexClient(RandomClient):
    """A client that asks for devices on hosts with elastic leases."""

    withdraws = 0.05

    def __init__(
        self,
        nc: Client,
        name: str,
        histories: tuple[History, ElasticHistory],
        seed: int,
        places: Sequence[list[str]] = (["flex*"], ["flex0"], ["flex1"]),
    ) -> None:
        super().__init__(nc, name, histories[0], seed)
        self.seen = histories[1]
        self.places = places


class ElasticClient(FlexClient):
    """Asks for a range of devices; agrees to notices, declines or ignores them, and gives back unasked."""

    def wish(self) -> dict[str, Any]:
        least = self.random.choice([1, 1, 2])
        body: dict[str, Any] = {
            "owner": self.name,
            "request_id": f"{self.name}-{self.turn}",
            "hosts": self.random.choice(self.places),
            "gpus": least,
            "ttl_seconds": self.random.choice([2, 4, 8]),
            "wait_seconds": self.random.choice([0, 0, 0, 2]),
            "cpus": self.random.choice([0, 2]),
            "grace_seconds": self.random.choice([0.5, 3.0, 3.0]),
            "preemptible": self.random.random() < 0.4,
        }
        if self.random.random() < 0.8:
            body["gpus"] = {"min": least, "max": least + self.random.choice([1, 2, 4])}
            if self.random.random() < 0.3:
                body["placement"] = "fewest_hosts"
        if self.random.random() < 0.2:
            body["max_seconds"] = self.random.choice([2, 4, 8])
        self.seen.sent.setdefault(body["request_id"], time.time())
        return body

    async def live_once(self, until: float) -> None:
        self.turn += 1
        answer = await self.request(self.wish())
        if answer is None or answer["type"] != "assignment":
            return
        lease, held = answer["lease"], dict[str, Held]()
        self._count_on(held, lease)
        wanted_until = time.time() + self.random.expovariate(1 / HELD_SECONDS)
        named = {"owner": self.name, "lease_id": lease["lease_id"]}
        while True:
            await asyncio.sleep(self.random.uniform(0.05, 0.4))
            if time.time() > until or self.random.random() < 0.01:  # it dies, and nobody renews
                return
            if time.time() > wanted_until:
                self._leave(held, held)
                await self.once("release", named, 1.5)
                return
            lease = await self.once("renew", named, 1.5)
            if lease is None:
                if time.time() > min((one.until for one in held.values()), default=math.inf):
                    return
                continue
            if lease["type"] == "error":
                return
            for one in held.values():
                one.until = stamp(lease["expires_at"])
            await self._answer(lease, held)

    async def _answer(self, lease: dict[str, Any], held: dict[str, Held]) -> None:
        notice, dice = lease["resize"], self.random.random()
        body: dict[str, Any] = {"owner": self.name, "lease_id": lease["lease_id"]}
        offered: list[str] = []
        if notice is None:
            spare = len(held) - (lease["elastic"] or {"min": math.inf})["min"]
            if dice > 0.04 or spare < 1:
                return
            body["devices"] = self.random.sample(sorted(held), self.random.randint(1, int(spare)))
        elif dice < 0.2:
            return
        else:
            body.update(number=notice["number"], accept=dice < 0.9)
            offered = sorted(grant["device"] for grant in notice["grants"])
            if notice["kind"] == "offer" and self.random.random() < 0.3:
                body["devices"] = self.random.sample(offered, self.random.randint(1, len(offered)))
        if body.get("accept", True) and (notice is None or notice["kind"] == "request"):
            self._leave(held, body.get("devices") or offered)
        while True:
            sent = Answered(body, time.time())
            self.seen.answered.append(sent)
            answer = await self.once("resize", body, 1.0)
            if answer is not None:
                break
            if "number" not in body or self.random.random() < 0.3:  # it can't know; the next renewal says so
                answer = await self.once("renew", {"owner": self.name, "lease_id": lease["lease_id"]}, 1.0)
                if answer is not None and answer["type"] == "lease":
                    self._count_on(held, answer)
                return
        sent.answered_at, sent.reply = time.time(), answer
        if answer["type"] == "lease" and answer["state"] == "active":
            self._count_on(held, answer)

    def _count_on(self, held: dict[str, Held], lease: dict[str, Any]) -> None:
        """Count on the devices of a lease as answered."""
        for grant in lease["grants"]:
            if grant["device"] not in held:
                one = Held({"lease_id": lease["lease_id"], "grants": [grant]}, time.time(), stamp(lease["expires_at"]))
                held[grant["device"]] = one
                if not lease["preemptible"]:  # nobody counts on those: the notice may be missed
                    self.history.held.append(one)
        self._leave(held, set(held) - devices_of(lease))

    def _leave(self, held: dict[str, Held], devices: Iterable[str]) -> None:
        """Stop using devices."""
        for device in list(devices):
            if device in held:
                one = held.pop(device)
                one.until = min(one.until, time.time())


class BriefClient(FlexClient):
    """Asks for devices for a moment, for which elastic leases are asked; and leaves them idle for a while."""

    def wish(self) -> dict[str, Any]:
        body = {
            "owner": self.name,
            "request_id": f"{self.name}-{self.turn}",
            "hosts": self.random.choice(self.places),
            "gpus": self.random.choice([1, 1, 2]),
            "ttl_seconds": 2,
            "wait_seconds": 6,
            "cpus": self.random.choice([0, 2]),
        }
        self.seen.sent.setdefault(body["request_id"], time.time())
        return body

    async def live_once(self, until: float) -> None:
        await super().live_once(until)
        await asyncio.sleep(self.random.uniform(0.3, 3.0))


class WindowClient(RandomClient):
    """Books windows for owners of one window each, who ask for what is booked; and cancels some."""

    def __init__(self, nc: Client, name: str, histories: tuple[History, ElasticHistory], seed: int) -> None:
        super().__init__(nc, name, histories[0], seed)
        self.seen = histories[1]

    async def live_once(self, until: float) -> None:
        self.turn += 1
        begin = time.time() + self.random.uniform(1.5, 3.5)
        owner, gpus = f"{self.name}-owner{self.turn}", self.random.choice([1, 2, 3])
        window = {
            "window_id": f"{self.name}-{self.turn}",
            "gpus": gpus,
            "hosts": ["flex*"],
            "owners": [owner],
            "lead_seconds": 1,
            "reason": "model check",
            "starts_at": time_of(begin),
            "ends_at": time_of(begin + self.random.uniform(1.5, 3.0)),
        }
        booked = await persisted(self, "book", {"book": window})
        if booked is None or not booked.get("windows"):
            await asyncio.sleep(0.5)
            return
        window = booked["windows"][0]["window"]
        self.history.windows.append(window)
        cancels = asyncio.create_task(self._cancel(window)) if self.random.random() < 0.25 else None
        # No lease grows while a request waits for what it could take.
        await asyncio.sleep(max(0.0, stamp(window["starts_at"]) - time.time() - self.random.uniform(0.0, 0.5)))
        claim = Claim(window, f"{owner}-1", time.time())
        self.seen.claims.append(claim)
        self.seen.sent[claim.request_id] = claim.sent_at
        await self._claim(claim, owner, gpus)
        if cancels is not None:
            await cancels

    async def _cancel(self, window: dict[str, Any]) -> None:
        await asyncio.sleep(self.random.uniform(0.0, 5.0))
        window["canceled_at"] = time.time()
        await persisted(self, "book", {"cancel": window["window_id"]})

    async def _claim(self, claim: Claim, owner: str, gpus: int) -> None:
        body = {
            "owner": owner,
            "request_id": claim.request_id,
            "gpus": gpus,
            "hosts": ["flex*"],
            "placement": "fewest_hosts",
            "ttl_seconds": 2,
            "wait_seconds": 60,
        }
        answer: dict[str, Any] | None = None
        while time.time() < stamp(claim.window["ends_at"]):
            answer = await self.once("request", body, 1.0)
            if answer is not None and answer["type"] != "queue":
                break
            answer = None
        if answer is None:
            answer = await persisted(self, "withdraw", {"owner": owner, "request_id": claim.request_id})
        if answer is not None and answer["type"] == "assignment":
            await asyncio.sleep(self.random.uniform(0.0, 0.5))
            await persisted(self, "release", {"owner": owner, "lease_id": answer["lease"]["lease_id"]})


class ClosingClient(RandomClient):
    """Drains and undrains devices and hosts, plans maintenance, and has devices fail and be repaired."""

    def __init__(
        self,
        nc: Client,
        name: str,
        histories: tuple[History, ElasticHistory],
        devices: Mapping[str, Sequence[str]],
        seed: int,
    ) -> None:
        super().__init__(nc, name, histories[0], seed)
        self.seen = histories[1]
        self.devices = devices
        self.sequence = 0

    async def live_once(self, until: float) -> None:
        self.turn += 1
        await asyncio.sleep(self.random.uniform(0.0, 3.0))
        host = self.random.choice(FLEX)
        device = self.random.choice(self.devices[host])
        dice = self.random.random()
        if dice < 0.5:
            await self._drain({"devices": [device]}, {device})
        elif dice < 0.55:
            await self._drain({"hosts": [host]}, set(self.devices[host]))
        elif dice < 0.7:
            await self._maintain(host)
        else:
            await self._fail(host, device)

    async def _drain(self, what: dict[str, Any], devices: set[str]) -> None:
        self._note_left(devices)
        answer = await persisted(self, "drain", {"drain": True, "reason": "model check", **what})
        if answer is not None and answer["type"] == "drains":
            closed = Closed(devices, time.time())
            self.seen.closed.append(closed)
            await asyncio.sleep(self.random.uniform(0.3, 1.5))
            closed.until = time.time()
        await persisted(self, "drain", {"drain": False, **what})

    async def _maintain(self, host: str) -> None:
        begin = time.time() + self.random.uniform(1.5, 3.0)
        end = begin + self.random.uniform(0.5, 1.5)
        times = {"starts_at": time_of(begin), "ends_at": time_of(end), "lead_seconds": 0}
        window_id = f"{self.name}-{self.turn}"
        body = {"maintenance": True, "hosts": [host], "reason": "model check", "window_id": window_id, **times}
        self._note_left(self.devices[host])
        answer = await persisted(self, "book", {"book": body})
        if answer is not None and answer["type"] == "windows":
            now = time.time()
            self.seen.closed.append(Closed(set(self.devices[host]), max(begin, now), end, now))
        await asyncio.sleep(max(0.0, end - time.time()))

    async def _fail(self, host: str, device: str) -> None:
        self._note_left([device])
        await self._event(host, device, Severity.HARDWARE)
        await asyncio.sleep(self.random.uniform(0.3, 1.5))
        await self._event(host, device, Severity.CLEARED)

    async def _event(self, host: str, device: str, severity: Severity) -> None:
        self.sequence += 1
        event = DeviceEvent(
            host=host,
            agent="fake",
            sequence=self.sequence,
            time_ns=time.time_ns(),
            kind="xid",
            severity=severity,
            device=device,
        )
        for _ in range(TRIES_MOST):
            with contextlib.suppress(Error, OSError, TimeoutError):
                await self.nc.jetstream().publish(subjects.events_subject(host), codec.encode(event), timeout=1.0)
                return
            await self.pause(True)

    def _note_left(self, devices: Iterable[str]) -> None:
        self.seen.left += [(time.time(), device) for device in devices]


async def persisted(client: RandomClient, verb: str, body: dict[str, Any]) -> dict[str, Any] | None:
    """Send a message that may be repeated until there is an answer; None if there was none to the end."""
    for _ in range(TRIES_MOST):
        answer = await client.once(verb, body, 1.5)
        if answer is not None:
            return answer
        await client.pause(True)
    return None


def crowd_of(
    connections: Sequence[Client],
    histories: tuple[History, ElasticHistory],
    devices: Mapping[str, Sequence[str]],
    rng: random.Random,
) -> list[RandomClient]:
    """Clients of all kinds."""
    found: list[RandomClient] = [
        ElasticClient(connections[number % len(connections)], f"elastic{number}", histories, rng.getrandbits(32))
        for number in range(3)
    ]
    found.append(BriefClient(connections[0], "brief0", histories, rng.getrandbits(32)))
    grow = [[name] for name in GROW]
    found += [
        ElasticClient(connections[number % len(connections)], f"grower{number}", histories, rng.getrandbits(32), grow)
        for number in range(3)
    ]
    found += [
        BriefClient(connections[0], f"passer{number}", histories, rng.getrandbits(32), grow) for number in range(2)
    ]
    found.append(WindowClient(connections[0], "course", histories, rng.getrandbits(32)))
    found.append(ClosingClient(connections[-1], "ops", histories, devices, rng.getrandbits(32)))
    return found


# What is proved


def check_elastic(
    history: ElasticHistory,
    events: Sequence[dict[str, Any]],
    active: Iterable[dict[str, Any]],
    outages: Sequence[Outage],
) -> list[str]:
    """Everything that is wrong with elastic leases, windows' owners and drains; empty if nothing is.

    Args:
        history: of the clients.
        events: of leases, in the order of their times.
        active: leases that are listed in the end.
        outages: in which a planner may have stood still.
    """
    spans = spans_of(events, active)
    by_lease: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        by_lease[event["lease"]["lease_id"]].append(event)
    wrong: list[str] = []
    for lease_id, told in by_lease.items():
        answers = [one for one in history.answered if one.body["lease_id"] == lease_id]
        wrong += _changes(told, answers)
        wrong += _answers(told, answers)
        wrong += _notices(told, history, spans)
    return wrong + _closed(history, spans, outages) + _owners(history, events, outages)


def _changes(told: Sequence[dict[str, Any]], answers: Sequence[Answered]) -> list[str]:
    """Changes of devices that the holder did not agree to, came too late, or leave too few or too many."""
    wrong: list[str] = []
    before: dict[str, Any] | None = None
    for event in told:
        lease, at, kind = event["lease"], stamp(event["time"]), event["kind"]
        name = f"resize: {kind} of {lease['lease_id']} at {event['time']}"
        held, had = devices_of(lease), devices_of(before or lease)
        limits = lease.get("elastic")
        if limits is not None and not limits["min"] <= len(lease["grants"]) <= limits["max"]:
            wrong.append(f"{name} leaves {len(lease['grants'])} devices of {limits}")
        if len(held) != len([grant for grant in lease["grants"] if grant.get("device")]):
            wrong.append(f"{name} has a device twice")
        notice = (before or {}).get("resize")
        if kind != "resized":
            if held != had:
                wrong.append(f"{name} changes its devices from {sorted(had)} to {sorted(held)}")
        else:
            added, gone = held - had, had - held
            if {grant["device"] for grant in event["returned"]} != gone:
                wrong.append(f"{name} returns {sorted(gone)}, and says {event['returned']}")
            if (before or {}).get("preemption") is not None:
                wrong.append(f"{name}, which is being preempted")
            if not any(one.sent_at <= at and _agrees(one.body, notice, added, gone) for one in answers):
                wrong.append(f"{name}: +{sorted(added)} -{sorted(gone)}, to which its holder did not agree: {notice}")
            if added and (notice is None or at > stamp(notice["ends_at"])):
                wrong.append(f"{name}: the offer was over: {notice}")
        before = lease
    return wrong


def _agrees(body: dict[str, Any], notice: dict[str, Any] | None, added: set[str], gone: set[str]) -> bool:
    """True if an answer is for these devices, none others."""
    if not body.get("accept", True) or (added and gone) or not (added or gone):
        return False
    named, listed = set(body.get("devices", ())), {grant["device"] for grant in (notice or {"grants": []})["grants"]}
    if "number" in body and (notice is None or notice["number"] != body["number"]):
        return False
    if added:
        return notice is not None and notice["kind"] == "offer" and added == (named or listed) and added <= listed
    return gone == (named or listed)


def _answers(told: Sequence[dict[str, Any]], answers: Sequence[Answered]) -> list[str]:
    """Answers to holders that differ from what the events say."""
    wrong: list[str] = []
    states = [devices_of(event["lease"]) for event in told]
    changes = [stamp(event["time"]) for event in told if event["kind"] == "resized"]
    for one in answers:
        if one.reply is None or one.reply["type"] != "lease":
            continue
        if devices_of(one.reply) not in states:
            wrong.append(f"resize: {one.body} was answered with devices that no event has: {one.reply['grants']}")
        if one.body.get("accept", True) and not any(at <= one.answered_at for at in changes):
            wrong.append(f"resize: {one.body} was answered, and has no event")
    return wrong


def _notices(told: Sequence[dict[str, Any]], history: ElasticHistory, spans: Sequence[Span]) -> list[str]:
    """Offers of devices that were not free, or of too many; requests for too many, or for nobody who asked."""
    wrong: list[str] = []
    for event in told:
        lease, at, notice = event["lease"], stamp(event["time"]), event["lease"].get("resize")
        if event["kind"] not in ("resize_offered", "resize_requested"):
            continue
        name = f"notice: {event['kind']} to {lease['lease_id']} at {event['time']}"
        devices, held = {grant["device"] for grant in notice["grants"]}, devices_of(lease)
        if lease["preemption"] is not None:
            wrong.append(f"{name}, which is being preempted")
        if event["kind"] == "resize_offered":
            if len(held) + len(devices) > lease["elastic"]["max"]:
                wrong.append(f"{name} of {len(devices)} devices in addition to {len(held)}")
            wrong += [
                f"{name} of what {span.lease['lease_id']} holds"
                for span in spans
                if span.since <= at < span.until and devices & span.devices
            ]
            wrong += [f"{name}: {devices & closed.devices} take no work" for closed in _closing(history, at, devices)]
        else:
            if not devices <= held or len(held) - len(devices) < lease["elastic"]["min"]:
                wrong.append(f"{name} for {sorted(devices)} of {sorted(held)}")
            if history.sent.get(notice["claimant"], math.inf) > at and not notice["claimant"].startswith("c"):
                wrong.append(f"{name} for {notice['claimant']}, which nobody asked for")
    return wrong


def _closing(history: ElasticHistory, at: float, devices: set[str]) -> list[Closed]:
    return [one for one in history.closed if one.since < at < one.until and one.devices & devices]


def _closed(history: ElasticHistory, spans: Sequence[Span], outages: Sequence[Outage]) -> list[str]:
    """New work on devices that take none, and leases on them that should have ended ahead of maintenance."""
    wrong: list[str] = []
    for span in spans:
        lease = span.lease
        devices = span.added
        name = f"closed: {lease['lease_id']} got {sorted(devices)} at {span.since:.3f}"
        # A planner may have stood still between a decision, which the drain came after, and the lease.
        closing = [
            one
            for one in _closing(history, span.since, devices)
            if span.since - one.since - seconds_away(outages, one.since, span.since) > DECIDED_SECONDS
        ]
        wrong += [f"{name}, between {one.since:.3f} and {one.until:.3f}" for one in closing]
        for one in history.closed:
            if not one.before < span.since < one.since or not one.devices & devices or span.ends <= one.since:
                continue
            if lease["preemptible"] and _disturbed(outages, one.since - NOTICE_SECONDS, span.ends):
                continue
            wrong.append(f"{name}, and went on until {span.ends:.3f}, into maintenance from {one.since:.3f}")
    return wrong


def _owners(history: ElasticHistory, events: Iterable[dict[str, Any]], outages: Sequence[Outage]) -> list[str]:
    """Owners of windows that did not get their devices at the begin."""
    granted = {
        event["lease"]["request_id"]: stamp(event["lease"]["granted_at"])
        for event in events
        if event["kind"] == "granted"
    }
    wrong: list[str] = []
    for claim in history.claims:
        window = claim.window
        due, end = max(stamp(window["starts_at"]), claim.sent_at), stamp(window["ends_at"])
        until = min(granted.get(claim.request_id, math.inf), end, window.get("canceled_at", math.inf))
        booked_at = stamp(window["booked_at"])
        if any(device in window["devices"] and at > booked_at - NOTICE_SECONDS for at, device in history.left):
            continue
        late = until - due - seconds_away(outages, due - NOTICE_SECONDS, until, RECOVERY_SECONDS)
        if late > LATE_SECONDS:
            wrong.append(f"window: {claim.request_id} waited {until - due:.1f} s after the begin of {window}")
    return wrong


def _disturbed(outages: Sequence[Outage], since: float, until: float) -> bool:
    return seconds_away(outages, since, until, RECOVERY_SECONDS) > 0
