"""Random clients of a planner under faults, their history, and a checker that proves from it what must hold.

The checker knows nothing of how the planner works. It looks at what clients were told and when, at the lease events on
the stream, and at the leases that are listed in the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import nats
from nats.aio.client import Client

MEMORY = 80 * 2**30
CPUS = 64.0
ENDS = frozenset({"released", "expired", "lost", "evicted"})
TRIES_MOST = 40
HEARD_SECONDS = 60.0
ABSENT_SECONDS = 120.0
RECOVERY_SECONDS = 2.0
"""Time after an outage until a planner leads and its clients have been heard."""
NOTICE_SECONDS = 8.0
"""Longer ahead than leases of these clients get their notice for a window."""


@dataclass
class Patience:
    """Says when one has asked in vain, by what can be held against whoever should have answered.

    Where nobody listens the server says so at once: that makes many tries of little time, and no planner has had any of
    them. All of them may be down together for as long as a busy machine takes to start one, and be killed meanwhile.

    Attributes:
        tries: that somebody may have had.
        heard_seconds: which these took, pauses between them included.
        absent_seconds: in a row in which nobody listened.
        looked_at: when one looked last, by a clock that does not go back.
    """

    looked_at: float
    tries: int = 0
    heard_seconds: float = 0.0
    absent_seconds: float = 0.0

    def over(self, now: float, heard: bool) -> bool:
        """Whether that is enough, after one more try without an answer, which somebody may have had or nobody."""
        passed, self.looked_at = now - self.looked_at, now
        if heard:
            self.tries += 1
            self.heard_seconds += passed
            self.absent_seconds = 0.0
        else:
            self.absent_seconds += passed
        many = self.tries >= TRIES_MOST and self.heard_seconds >= HEARD_SECONDS
        return many or self.absent_seconds >= ABSENT_SECONDS


@dataclass
class Held:
    """A lease as its client knows it: from being told of it until it gives it back or may no longer count on it."""

    lease: dict[str, Any]
    since: float
    until: float


@dataclass
class History:
    """What clients saw. Times are seconds since the epoch, by the machine's clock.

    Attributes:
        answers: request id → every answer that came, as it came.
        unanswered: requests and releases that got none though their clients asked to the end.
        held: leases as clients counted on them.
        released: lease ids whose release was answered.
        betrayed: what was answered about a lease that its client could still count on.
        errors: answers of other kinds, for people.
        windows: booked windows, as answered.
    """

    answers: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    unanswered: list[str] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    released: set[str] = field(default_factory=set)
    betrayed: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    windows: list[dict[str, Any]] = field(default_factory=list)

    def granted(self) -> int:
        """How many requests were first answered with a lease."""
        return sum(answers[0]["type"] == "assignment" for answers in self.answers.values() if answers)


class RandomClient:
    """Requests, asks again, withdraws, renews, releases, forgets and dies, as its dice say."""

    withdraws = 0.15
    """Part of the requests that it withdraws."""

    def __init__(self, nc: Client, name: str, history: History, seed: int) -> None:
        self.nc = nc
        self.name = name
        self.history = history
        self.random = random.Random(seed)
        self.turn = 0
        self.heard = 0
        """Messages that somebody listened to, be they answered or not."""

    async def run(self, until: float) -> None:
        while time.time() < until:
            await self.live_once(until)
            await asyncio.sleep(self.random.expovariate(8.0))

    async def live_once(self, until: float) -> None:
        self.turn += 1
        body = self.wish()
        answer = await self.request(body)
        if answer is None or answer["type"] != "assignment":
            return
        held = Held(answer["lease"], time.time(), stamp(answer["lease"]["expires_at"]))
        self.history.held.append(held)
        while True:
            await asyncio.sleep(self.random.uniform(0.01, 0.8))
            dice = self.random.random()
            if dice < 0.15 or time.time() > until:  # it dies, and nobody renews
                return
            if dice < 0.5:
                # It lets go of the devices before it says so.
                held.until = min(held.until, time.time())
                await self.act("release", held)
                return
            if not await self.act("renew", held):
                return

    def wish(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "owner": self.name,
            "request_id": f"{self.name}-{self.turn}",
            "ttl_seconds": self.random.choice([1, 2, 4]),
            "wait_seconds": self.random.choice([0, 0, 1, 3]),
            "priority": self.random.choice([0, 0, 1]),
        }
        # Some compete with those that wait for one host, and with groups.
        body["hosts"] = ["node*"] if self.random.random() < 0.9 else ["node*", "slot*", "pool*"]
        if self.random.random() < 0.5:
            body["max_seconds"] = self.random.choice([1, 2, 4])
        kind = self.random.random()
        if kind < 0.4:
            body.update(gpus=1, gpu_share=self.random.choice([0.25, 0.5, 0.7]), gpu_memory_bytes=10 * 2**30)
        elif kind < 0.8:
            body.update(gpus=self.random.choice([1, 2, 4]), cpus=8)
        elif kind < 0.9:
            # Not of slots: where a device is kept until those on other hosts come free, brief requests use it
            # meanwhile, ahead of a long one that is overdue.
            hosts = [hosts for hosts in body["hosts"] if hosts != "slot*"]
            body.update(gpus=3, placement="fewest_hosts", hosts=hosts)
        else:
            body.update(gpus=0, cpus=self.random.choice([8, 16]))
        return body

    async def request(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """Ask until there is an answer; at times twice at once, at times again afterwards."""
        request_id = body["request_id"]
        patience = Patience(time.monotonic())
        while True:
            heard = self.heard
            times = 2 if self.random.random() < 0.1 else 1
            asking = [self.once("request", body, body["wait_seconds"] + 1.5) for _ in range(times)]
            if self.random.random() < self.withdraws:
                asking.append(self.withdraw(body))
            found = await asyncio.gather(*asking)
            answers = [answer for answer in found if answer is not None]
            self.history.answers[request_id].extend(answers)
            if answers:
                if self.random.random() < 0.1:
                    again = await self.once("request", body, body["wait_seconds"] + 1.5)
                    if again is not None:
                        self.history.answers[request_id].append(again)
                return answers[0]
            if patience.over(time.monotonic(), self.heard > heard):
                self.history.unanswered.append(f"request {request_id}")
                return None
            await self.pause(self.heard > heard)

    async def withdraw(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """Change its mind: before the request, while it waits, or too late."""
        await asyncio.sleep(self.random.choice([0, 0, 0.01, 0.3, 1.0]))
        answer = await self.once("withdraw", {"owner": self.name, "request_id": body["request_id"]}, 1.5)
        # A lease is told as it is now, and not as it was granted; whoever was told of none has none for ever.
        return None if answer is None or answer["type"] == "assignment" else answer

    async def act(self, verb: str, held: Held) -> bool:
        """Renew or release until there is an answer. Returns whether the lease goes on."""
        lease_id, promised = held.lease["lease_id"], stamp(held.lease["expires_at"])
        if verb == "renew":
            promised = held.until
        patience = Patience(time.monotonic())
        while True:
            heard = self.heard
            answer = await self.once(verb, {"owner": self.name, "lease_id": lease_id}, 1.5)
            if answer is None:
                if verb == "renew" and time.time() > held.until:
                    return False
                if patience.over(time.monotonic(), self.heard > heard):
                    self.history.unanswered.append(f"{verb} of lease {lease_id}")
                    return False
                await self.pause(self.heard > heard)
                continue
            if answer["type"] == "error":
                # The lease has ended, at its time or because an answer to an earlier try was lost.
                self.history.errors[f"{verb}: {answer['code']}"] += 1
                if answer["code"] != "ended" or time.time() < promised:
                    self.history.betrayed.append(f"{verb} of lease {lease_id}, promised until {promised}: {answer}")
                return False
            if verb == "release":
                self.history.released.add(lease_id)
                return False
            held.until = stamp(answer["expires_at"])
            return True

    async def pause(self, heard: bool) -> None:
        """Between two tries: longer where nobody listens, since a crowd that asks on and on lets no planner start."""
        await asyncio.sleep(0.1 if heard else self.random.uniform(0.1, 0.5))

    async def once(self, verb: str, body: dict[str, Any], timeout: float) -> dict[str, Any] | None:
        """One message, and its answer if it came; `unavailable` is none."""
        try:
            reply = await self.nc.request(f"corral.v1.plan.{verb}", json.dumps(body).encode(), timeout=timeout)
        except nats.errors.NoRespondersError:
            return None
        except (nats.errors.Error, TimeoutError, OSError):
            self.heard += 1  # who can tell?
            return None
        self.heard += 1
        answer = json.loads(reply.data)
        if answer["type"] == "error" and answer["code"] == "unavailable":
            return None
        return answer


class RandomBooker(RandomClient):
    """Books windows that begin in a moment, for some of the others."""

    async def live_once(self, until: float) -> None:
        self.turn += 1
        begin = time.time() + self.random.uniform(1.5, 4.0)
        window = {
            "window_id": f"w-{self.turn}",
            "gpus": self.random.choice([1, 2]),
            "hosts": ["node*"],
            "owners": [f"c{self.random.randrange(10)}"],
            "lead_seconds": 1,
            "reason": "model check",
            "starts_at": time_of(begin),
            "ends_at": time_of(begin + self.random.uniform(0.5, 2.0)),
        }
        for _ in range(TRIES_MOST):
            answer = await self.once("book", {"book": window}, 1.5)
            if answer is not None:
                self.history.windows += [status["window"] for status in answer.get("windows", [])]
                return
            await self.pause(True)


def time_of(seconds: float) -> str:
    """Seconds since the epoch as RFC 3339."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def stamp(text: str) -> float:
    """RFC 3339 as seconds since the epoch."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def check(
    history: History,
    events: list[dict[str, Any]],
    active: list[dict[str, Any]],
    lost_hosts: frozenset[str] = frozenset(),
    left: Sequence[tuple[float, str]] = (),
    disturbed: Callable[[float, float], bool] = lambda since, until: False,
) -> list[str]:
    """Everything that is wrong; empty if nothing is.

    Args:
        history: of the clients.
        events: lease events in the order of their times.
        active: leases that are listed in the end.
        lost_hosts: that were silent for too long: their leases end with that, and no others do.
        left: devices that windows could not count on any more, each with the time.
        disturbed: says whether a planner may have stood still between two times: notices are late then.
    """
    wrong = [f"{asked} was never answered" for asked in history.unanswered]
    wrong += history.betrayed
    leases: dict[str, dict[str, Any]] = {}
    of_request: dict[str, str] = {}
    for request_id, answers in history.answers.items():
        if not answers:  # it is among the unanswered
            continue
        # Asked again after its end, it is told that it has ended; the first answer may have been lost.
        answers = [answer for answer in answers if answer.get("code") != "ended"]
        if not answers:
            continue
        if any(_as_granted(answer) != _as_granted(answers[0]) for answer in answers):
            wrong.append(f"request {request_id} got {len(answers)} answers that differ: {answers[:2]}")
        if answers[0]["type"] == "assignment":
            lease = answers[0]["lease"]
            if lease["lease_id"] in leases:
                wrong.append(
                    f"lease {lease['lease_id']} was granted to {of_request[lease['lease_id']]} and {request_id}"
                )
            leases[lease["lease_id"]], of_request[lease["lease_id"]] = lease, request_id
        elif answers[0]["type"] == "error":
            wrong.append(f"request {request_id} got an error: {answers[0]}")
        elif answers[0]["request_id"] != request_id:
            wrong.append(f"request {request_id} got the answer of another: {answers[0]}")
    wrong += check_events(events, leases, history, active)
    spans = spans_of(events, active)
    wrong += [
        f"planned: {problem}" for problem in overcommitted((span.grants, span.since, span.until) for span in spans)
    ]
    wrong += late(history.windows, spans, left, disturbed)
    lost_at: dict[str, float] = {}
    for event in events:
        if event["kind"] == "lost":
            lease_id = event["lease"]["lease_id"]
            lost_at[lease_id] = stamp(event["time"])
            if not {grant["host"] for grant in grants_of(event["lease"])} & lost_hosts:
                wrong.append(f"lease {lease_id} was lost, and its hosts were there: {event['lease']['reason']}")
    counted_on = [
        (grants_of(held.lease), held.since, min(held.until, lost_at.get(held.lease["lease_id"], held.until)))
        for held in history.held
    ]
    wrong += [f"counted on: {problem}" for problem in overcommitted(counted_on)]
    return wrong


@dataclass
class Span:
    """Devices that a lease held from one change of them to the next.

    Attributes:
        lease: as last seen.
        grants: all that it held.
        added: devices that it got at the begin.
        since: seconds since the epoch.
        until: likewise; infinite if it holds them still.
    """

    lease: dict[str, Any]
    grants: list[dict[str, Any]]
    added: set[str]
    since: float
    until: float = float("inf")

    @property
    def devices(self) -> set[str]:
        """UUIDs of its devices."""
        return {grant["device"] for grant in self.grants if grant.get("device")}

    @property
    def ends(self) -> float:
        """Time by which it has surely ended."""
        limit = self.lease.get("ends_at")
        return min(self.until, stamp(limit) if limit else float("inf"))


def devices_of(lease: dict[str, Any]) -> set[str]:
    """UUIDs of a lease's devices."""
    return {grant["device"] for grant in lease["grants"] if grant.get("device")}


def spans_of(events: Iterable[dict[str, Any]], active: Iterable[dict[str, Any]]) -> list[Span]:
    """What leases held and when, from their events in the order of their times, and those that are listed."""
    by_lease: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        by_lease[event["lease"]["lease_id"]].append(event)
    listed = {lease["lease_id"]: lease for lease in active}
    found = [
        Span(lease, grants_of(lease), devices_of(lease), stamp(lease["granted_at"]))
        for lease_id, lease in listed.items()
        if lease_id not in by_lease
    ]
    for lease_id, told in by_lease.items():
        last = told[-1]["lease"]
        ended = next((event["lease"] for event in told if event["kind"] in ENDS), None)
        if ended is None and lease_id not in listed:
            continue
        own = [Span(last, grants_of(told[0]["lease"]), devices_of(told[0]["lease"]), stamp(last["granted_at"]))]
        for event in told:
            if event["kind"] == "resized":
                own[-1].until = stamp(event["time"])
                added = devices_of(event["lease"]) - own[-1].devices
                own.append(Span(last, grants_of(event["lease"]), added, own[-1].until))
        if ended is not None:
            own[-1].until = stamp(ended["ended_at"])
        found += own
    return found


def late(
    windows: list[dict[str, Any]],
    spans: Iterable[Span],
    left: Sequence[tuple[float, str]] = (),
    disturbed: Callable[[float, float], bool] = lambda since, until: False,
) -> list[str]:
    """Leases of others on the devices of a window, from when these close to its end; two windows on one device.

    Args:
        windows: as booked; `canceled_at`, in seconds, is when they were canceled.
        spans: what leases held.
        left: devices that windows could not count on any more, each with the time.
        disturbed: says whether a planner may have stood still between two times.
    """
    wrong: list[str] = []
    taken: list[tuple[str, float, float, str]] = []
    spans = list(spans)
    for window in windows:
        begin = stamp(window["starts_at"])
        # What had ended by the booking was in nobody's way: a window may be booked when its begin is past already.
        booked_at = stamp(window["booked_at"])
        closed, begin = max(begin - 1, booked_at), max(begin, booked_at)
        for uuid in window["devices"]:
            gone = [at for at, device in left if device == uuid and at > booked_at - RECOVERY_SECONDS]
            end = min([stamp(window["ends_at"]), window.get("canceled_at", float("inf")), *gone])
            for span in spans:
                lease = span.lease
                if uuid not in span.devices or lease["owner"] in window["owners"]:
                    continue
                late_notice = lease.get("preemptible") and disturbed(closed - NOTICE_SECONDS, span.ends)
                if span.since < end and closed < span.ends and not late_notice:
                    wrong.append(f"lease {lease['lease_id']} of {lease['owner']} is in the way of {window}: {lease}")
            wrong += [
                f"{uuid} is booked for {window['window_id']} and {other}"
                for device, since, until, other in taken
                if device == uuid and since < end and begin < until
            ]
            taken.append((uuid, begin, end, window["window_id"]))
    return wrong


def _as_granted(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without what changes of a lease afterwards: its notices, and the devices of an elastic one."""
    lease = answer.get("lease", {})
    if answer["type"] != "assignment":
        return answer
    if lease.get("elastic") is not None:
        return {"type": "assignment", "lease_id": lease["lease_id"]}
    return {**answer, "lease": {**lease, "preemption": None}}


def check_events(
    events: list[dict[str, Any]],
    answered: dict[str, dict[str, Any]],
    history: History,
    active: list[dict[str, Any]],
) -> list[str]:
    """Each change told once, none missing, and the list of the end agrees with them."""
    wrong: list[str] = []
    by_lease: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        by_lease[event["lease"]["lease_id"]].append(event)
    requests: dict[str, str] = {}
    listed = {lease["lease_id"]: lease for lease in active}
    for lease_id, told in by_lease.items():
        kinds = Counter(event["kind"] for event in told)
        if kinds["granted"] != 1:
            wrong.append(f"lease {lease_id} was told as granted {kinds['granted']} times")
        ended = sum(kinds[kind] for kind in ENDS)
        if ended > 1 or (ended == 1) == (lease_id in listed):
            wrong.append(f"lease {lease_id} ended {ended} times, and is {'' if lease_id in listed else 'not '}listed")
        if len({(event["kind"], event["time"]) for event in told}) != len(told):
            wrong.append(f"a change of lease {lease_id} was told twice: {[(e['kind'], e['time']) for e in told]}")
        if lease_id in history.released and kinds["released"] != 1:
            wrong.append(f"the release of lease {lease_id} was answered, and told {kinds['released']} times")
        request_id = told[0]["lease"]["request_id"]
        if requests.setdefault(request_id, lease_id) != lease_id:
            wrong.append(f"request {request_id} was granted {requests[request_id]} and {lease_id}")
        if any(e["kind"] == "expired" and stamp(e["time"]) < stamp(e["lease"]["expires_at"]) for e in told):
            wrong.append(f"lease {lease_id} expired before its time")
    for lease_id, lease in answered.items():
        # An answer that is repeated has the notice of a preemption that came meanwhile.
        told = by_lease.get(lease_id, [])
        if told and lease.get("elastic") is not None:
            continue
        notices = [None, *(event["lease"].get("preemption") for event in told)]
        granted = [event["lease"] for event in told if event["kind"] == "granted"]
        answer = {**lease, "preemption": lease.get("preemption")}
        if not any({**one, "preemption": notice} == answer for one in granted for notice in notices):
            wrong.append(f"lease {lease_id} was answered and is missing from the events")
    wrong += [f"lease {lease_id} is listed and was never told" for lease_id in listed if lease_id not in by_lease]
    return wrong


def grants_of(lease: dict[str, Any]) -> list[dict[str, Any]]:
    return lease["grants"]


def overcommitted(
    holdings: Iterable[tuple[list[dict[str, Any]], float, float]], memory: Mapping[str, float] | None = None
) -> list[str]:
    """Sweep over time: on no device more than its memory or one whole share, on no host more than its cores.

    Args:
        holdings: grants, with the time from which and until which they were held.
        memory: of each device, where they are not those of the model.
    """
    changes: dict[str, list[tuple[float, int, float]]] = defaultdict(list)
    limits: dict[str, float] = {}
    for grants, since, until in holdings:
        if until <= since:
            continue
        for grant in grants:
            amounts = [(f"cores of {grant['host']}", grant.get("cpus", 0.0), CPUS)]
            if grant.get("device"):
                amounts.append((f"share of {grant['device']}", grant.get("share", 1.0), 1.0))
                most = MEMORY if memory is None else memory[grant["device"]]
                amounts.append((f"memory of {grant['device']}", grant.get("memory_bytes", 0), most))
            for what, amount, limit in amounts:
                limits[what] = limit
                # What ends at an instant is free at that instant.
                changes[what] += [(since, 1, amount), (until, 0, -amount)]
    wrong: list[str] = []
    for what, steps in changes.items():
        level = 0.0
        for at, _, amount in sorted(steps):
            level += amount
            if level > limits[what] * (1 + 1e-6):
                wrong.append(f"{what}: {level:g} of {limits[what]:g} at {at:.6f}")
                break
    return wrong


async def connect_clients(url: str, count: int) -> list[Client]:
    """Connections that outlive the server."""

    async def quiet(_: Exception) -> None:
        return None

    return [
        await nats.connect(url, max_reconnect_attempts=-1, reconnect_time_wait=0.1, error_cb=quiet)
        for _ in range(count)
    ]


async def close(clients: list[Client]) -> None:
    for client in clients:
        with contextlib.suppress(Exception):
            await client.close()
