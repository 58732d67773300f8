"""Clients of groups that lend and take back under faults, and the invariants that are proved from what they saw.

All of them ask for devices of a model that only the hosts `POOL` have. The checker knows nothing of how the planner
works: it recomputes from lease events alone what each group held at each instant.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nats.aio.client import Client

from .planner_model import ENDS, RECOVERY_SECONDS, History, RandomClient, grants_of, stamp
from .queue_model import SILENCE_SECONDS, Outage, StoredEntries, seconds_away

POOL = ("pool0", "pool1")
POOL_DEVICES = 4
MODEL = "NVIDIA L40S"
PRICE = 2.0
HALF_LIFE_SECONDS = 60.0
GROUPS: dict[str, dict[str, Any]] = {
    "lab": {"guarantee": 5, "limit": 6},
    "lab/vision": {"guarantee": 3, "limit": 3, "members": ["vision0", "vision1"]},
    "lab/nlp": {"guarantee": 2, "weight": 2.0, "members": ["nlp0"]},
    "ops": {"guarantee": 2, "borrowing_limit": 1, "members": ["ops0", "ops1"]},
    "guests": {"limit": 6, "weight": 0.5, "members": [f"guest{number}" for number in range(6)]},
}
"""Devices of `MODEL` by kind of quota."""
OWNERS = [owner for group in GROUPS.values() for owner in group.get("members", ())]
GROUP_OF = {owner: name for name, group in GROUPS.items() for owner in group.get("members", ())}
GUESTS = "guests"
LATE_SECONDS = 3.0
"""Time for a claim: leases are looked for once a second, and a planner may have to start."""
WRITTEN_SECONDS = 0.5
"""Time from the choice of a lease to its notice, on a busy machine."""
_TINY = 1e-6
_USAGE_ERROR = 0.005


def configured() -> dict[str, Any]:
    """The groups as an operator sets them."""
    found: list[dict[str, Any]] = []
    for name, group in GROUPS.items():
        quotas = {
            kind: {"gpus": {"L40S": group[kind]}} for kind in ("guarantee", "limit", "borrowing_limit") if kind in group
        }
        rest = {key: value for key, value in group.items() if key in ("weight", "members")}
        found.append({"name": name, **quotas, **rest})
    return {"groups": found, "prices": {"L40S": PRICE}, "half_life_seconds": HALF_LIFE_SECONDS}


def path_of(owner: str) -> list[str]:
    """Names of the groups around an owner, from the inside out; `default` for who is in none."""
    name = GROUP_OF.get(owner, "default")
    return ["/".join(name.split("/")[:depth]) for depth in range(name.count("/") + 1, 0, -1)]


@dataclass
class Claimed:
    """A request of a group's member. Times are seconds since the epoch; infinite for never.

    Attributes:
        body: as sent.
        sent_at: when it was sent first.
        stored_at: when its entry was found in the bucket.
        answered_at: when its client had a final answer, or had withdrawn it.
        withdrawn_at: when its withdrawal was sent.
    """

    body: dict[str, Any]
    sent_at: float
    stored_at: float = math.inf
    answered_at: float = math.inf
    withdrawn_at: float = math.inf

    @property
    def waits_until(self) -> float:
        """When it may have waited no longer, if it was not granted.

        Its client may learn only after an outage that its wait was over, or that its withdrawal had come.
        """
        return min(self.answered_at, self.withdrawn_at, self.stored_at + self.body.get("wait_seconds", math.inf))

    @property
    def devices(self) -> float:
        """Devices that it asks for."""
        return self.body["gpus"] * self.body.get("gpu_share", 1.0)


@dataclass
class GroupHistory:
    """What the members of groups did and saw.

    Attributes:
        asked: by request id.
        usage: answers about groups, with the times before and after.
        set_at: when the groups were set.
    """

    asked: dict[str, Claimed] = field(default_factory=dict)
    usage: list[tuple[float, float, dict[str, Any]]] = field(default_factory=list)
    set_at: float = 0.0


class GroupClient(RandomClient):
    """Asks within a group, answers notices or ignores them, and goes on in place of what was preempted."""

    withdraws = 0.3

    def __init__(
        self, nc: Client, name: str, histories: tuple[History, GroupHistory], entries: StoredEntries, seed: int
    ) -> None:
        super().__init__(nc, name, histories[0], seed)
        self.groups = histories[1]
        self.entries = entries
        self.preempted: str | None = None

    async def live_once(self, until: float) -> None:
        self.turn += 1
        body = self.wish()
        asked = self.groups.asked[body["request_id"]] = Claimed(body, time.time())
        stored = asyncio.create_task(self._note_stored(asked))
        answer = await self.request(body)
        asked.answered_at = min(asked.answered_at, time.time())
        stored.cancel()
        if answer is not None and answer["type"] == "assignment":
            await self._hold(answer["lease"], until)

    async def _note_stored(self, asked: Claimed) -> None:
        await self.entries.wait(asked.body["request_id"])
        asked.stored_at = time.time()

    def wish(self) -> dict[str, Any]:
        guest = self.name.startswith("guest")
        body: dict[str, Any] = {
            "owner": self.name,
            "request_id": f"{self.name}-{self.turn}",
            "models": [MODEL],
            "hosts": self.random.choice([["pool*"], ["pool*"], ["pool0"], ["pool1"]]),
            "ttl_seconds": 2,
            "wait_seconds": 8,
            "preemptible": guest or self.random.random() < 0.6,
            "grace_seconds": self.random.choice([0, 0.5, 1, 20, 20]),
            "min_run_seconds": self.random.choice([0, 0, 1, 8]),
            "checkpoint": True,
        }
        if self.random.random() < 0.2:
            body.update(gpus=1, gpu_share=0.5)
        else:
            body.update(gpus=self.random.choice([1, 2, 2, 2] if guest else [1, 1, 2]))
        if self.preempted is not None:
            body["requeue_of"], self.preempted = self.preempted, None
        return body

    async def withdraw(self, body: dict[str, Any]) -> dict[str, Any] | None:
        answer = await super().withdraw(body)
        if answer is not None and answer["type"] == "rejection":
            asked = self.groups.asked[body["request_id"]]
            asked.answered_at = min(asked.answered_at, time.time())
        return answer

    async def once(self, verb: str, body: dict[str, Any], timeout: float) -> dict[str, Any] | None:
        if verb == "withdraw":
            self.groups.asked[body["request_id"]].withdrawn_at = time.time()
        return await super().once(verb, body, timeout)

    async def _hold(self, lease: dict[str, Any], until: float) -> None:
        """Renew a lease until it ends, or it is given back or forgotten."""
        named = {"owner": self.name, "lease_id": lease["lease_id"]}
        wanted_until = time.time() + self.random.expovariate(0.05 if self.name.startswith("guest") else 0.3)
        while True:
            await asyncio.sleep(self.random.uniform(0.1, 0.5))
            if time.time() > until or (time.time() > wanted_until and self.random.random() < 0.2):
                return
            if time.time() > wanted_until:
                await self.once("release", named, 1.5)
                return
            answer = await self.once("renew", named, 1.5)
            if answer is None:
                continue
            if answer["type"] == "error":
                if "preempted" in answer["message"]:
                    self.preempted = lease["lease_id"]
                return
            if answer["preemption"] is not None and await self._give_way(named):
                return

    async def _give_way(self, named: dict[str, str]) -> bool:
        """Answer a notice. Returns whether the lease has ended."""
        dice = self.random.random()
        if dice < 0.06:
            answer = await self.once("checkpoint", {**named, "saved": True}, 1.5)
            if answer is not None and answer["type"] == "lease" and answer["state"] == "evicted":
                self.preempted = named["lease_id"]
                return True
        elif dice < 0.12:
            await self.once("checkpoint", {**named, "busy_seconds": 0.5}, 1.5)
        return False


# What is proved


@dataclass
class Story:
    """A lease as its events show it.

    Attributes:
        lease: at its end, or as last seen.
        since: when it was granted.
        until: when it ended; infinite if it has not.
        seen_until: when its end was seen by a planner, which may have been away; infinite if it has not ended.
        notices: each with the time until which it was out.
        shapes: what it held from when on, in order of time.
    """

    lease: dict[str, Any]
    since: float
    until: float = math.inf
    seen_until: float = math.inf
    notices: list[tuple[dict[str, Any], float]] = field(default_factory=list)
    shapes: list[tuple[float, list[dict[str, Any]]]] = field(default_factory=list)

    @property
    def devices(self) -> dict[str, float]:
        """Shares of devices of the pool."""
        found = [grant for grant in grants_of(self.lease) if grant["host"] in POOL and grant.get("device")]
        return {grant["device"]: grant.get("share", 1.0) for grant in found}

    @property
    def amount(self) -> float:
        """Devices of the pool in all."""
        return sum(self.devices.values())

    @property
    def hosts(self) -> set[str]:
        """Hosts on which it has something."""
        return {grant["host"] for grant in grants_of(self.lease)}

    @property
    def path(self) -> list[str]:
        """Groups around its owner."""
        return path_of(self.lease["owner"])

    def at(self, when: float) -> bool:
        """True if it is held at a time; what ends at an instant is free at that instant."""
        return self.since <= when < self.until

    def seen(self, when: float) -> bool:
        """True if planners count it at a time: one may have ended while none was there to see it."""
        return self.since <= when < self.seen_until


def stories_of(events: Iterable[dict[str, Any]]) -> dict[str, Story]:
    """Leases by id, from their events in the order of their times."""
    found: dict[str, Story] = {}
    notice: dict[str, dict[str, Any]] = {}
    for event in events:
        lease = event["lease"]
        lease_id = lease["lease_id"]
        story = found.setdefault(lease_id, Story(lease, stamp(lease["granted_at"])))
        story.lease = lease
        if not story.shapes:
            story.shapes.append((story.since, grants_of(lease)))
        elif event["kind"] == "resized":
            story.shapes.append((stamp(event["time"]), grants_of(lease)))
        ended = event["kind"] in ENDS
        if ended:
            story.until, story.seen_until = stamp(lease["ended_at"]), stamp(event["time"])
        before, now = notice.get(lease_id), lease.get("preemption")
        if before is not None and (now is None or ended or now["notified_at"] != before["notified_at"]):
            if now is None or now["notified_at"] != before["notified_at"]:
                story.notices.append((before, stamp(event["time"])))
            else:
                story.notices.append((now, story.until))
            notice.pop(lease_id)
            before = None
        if now is not None:
            if not ended:
                notice[lease_id] = now
            elif not story.notices or story.notices[-1][0]["notified_at"] != now["notified_at"]:
                story.notices.append((now, story.until))
    for lease_id, now in notice.items():
        found[lease_id].notices.append((now, math.inf))
    return found


def check_groups(
    history: GroupHistory,
    events: Iterable[dict[str, Any]],
    outages: Sequence[Outage],
    fleet: tuple[float, float, float],
    left_at: Mapping[str, Sequence[float]] | None = None,
) -> list[str]:
    """Everything that is wrong with groups; empty if nothing is.

    Args:
        history: of the clients.
        events: of leases, in the order of their times.
        outages: in which a planner may have stood still.
        fleet: what it has in all: devices counted by price, cores, bytes of RAM.
        left_at: when requests left the queue since their clients were not heard, by request id.
    """
    left_at = left_at or {}
    stories = stories_of(events)
    granted = {story.lease["request_id"]: story.since for story in stories.values()}
    pool = [story for story in stories.values() if story.devices]
    return [
        *_limits(pool),
        *_victims(pool),
        *_claimants(history, pool, granted, outages),
        *_freed(history, pool),
        *_kept_waiting(history, pool, granted, outages, left_at),
        *_silences(history, left_at, outages),
        *_usage(history, list(stories.values()), fleet),
    ]


def _used(stories: Iterable[Story], name: str, when: float) -> float:
    """Devices of the pool that a group held at a time."""
    return sum(story.amount for story in stories if name in story.path and story.at(when))


def _counted(stories: Iterable[Story], name: str, when: float) -> float:
    """The same as planners count it, who may not have seen yet that a lease had ended."""
    return sum(story.amount for story in stories if name in story.path and story.seen(when))


def _most(name: str) -> float:
    group = GROUPS.get(name, {})
    borrowing = group["guarantee"] + group["borrowing_limit"] if "borrowing_limit" in group else math.inf
    return min(group.get("limit", math.inf), borrowing)


def _limits(pool: Sequence[Story]) -> list[str]:
    """Instants at which a group was above its limit: it can only get there by a grant."""
    wrong: list[str] = []
    for story in pool:
        for name in story.path:
            used = _used(pool, name, story.since)
            if used > _most(name) + _TINY:
                wrong.append(f"limit: {name} held {used:g} devices at the grant of {story.lease['lease_id']}")
    return wrong


def _victims(pool: Sequence[Story]) -> list[str]:
    """Notices to leases that are not preemptible, or too early, and ends before the grace was over."""
    wrong: list[str] = []
    for story in pool:
        lease = story.lease
        for notice, until in story.notices:
            at, lease_id = stamp(notice["notified_at"]), lease["lease_id"]
            if not lease["preemptible"]:
                wrong.append(f"victim: {lease_id} is not preemptible, and got a notice")
            if at < story.since + lease["min_run_seconds"] - _TINY:
                wrong.append(f"victim: {lease_id} got a notice {at - story.since:.3f} s after its grant")
            saved = lease["saved_at"] is not None and stamp(lease["saved_at"]) >= at
            preempted = lease["state"] == "evicted" and until == story.until
            if preempted and not saved and story.until < at + lease["grace_seconds"] - _TINY:
                wrong.append(f"victim: {lease_id} ended {story.until - at:.3f} s after its notice")
    return wrong


def _claimants(
    history: GroupHistory, pool: Sequence[Story], granted: Mapping[str, float], outages: Sequence[Outage]
) -> list[str]:
    """Notices for requests that did not wait, were beyond their guarantee or of a victim, or that outlived them."""
    wrong: list[str] = []
    for story in pool:
        for notice, until in story.notices:
            at, claimant = stamp(notice["notified_at"]), notice["claimant"]
            asked, name = history.asked.get(claimant), f"notice of {story.lease['lease_id']} for {claimant}"
            if asked is None or notice["claimant_owner"] != asked.body["owner"]:
                wrong.append(f"claimant: {name}, which nobody asked for")
                continue
            if "requeue_of" in asked.body:
                wrong.append(f"cascade: {name}, which goes on with the work of a victim")
            started = granted.get(claimant, math.inf)
            if at < asked.sent_at or at > min(started, asked.answered_at) + 0.5:
                wrong.append(f"claimant: {name} at {at:.3f}, which did not wait")
            # Others of the group may have started while the notice was written.
            room = [
                GROUPS[level]["guarantee"] - _used(pool, level, when) - asked.devices
                for level in path_of(asked.body["owner"])
                if "guarantee" in GROUPS.get(level, {})
                for when in (at - WRITTEN_SECONDS, at)
            ]
            if max(room, default=-1.0) < -_TINY:
                wrong.append(f"claimant: {name}, which is beyond its guarantee")
            gone = min(started, asked.answered_at)
            if until > gone:
                late = min(until, story.until) - gone
                late -= seconds_away(outages, gone, gone + late, RECOVERY_SECONDS) if late < math.inf else 0.0
                if late > LATE_SECONDS:
                    wrong.append(f"claimant: {name} stayed for {late:.1f} s after that had gone")
    return wrong


def _freed(history: GroupHistory, pool: Sequence[Story]) -> list[str]:
    """Leases taken back together that do not let the request start, or not all of which it needs."""
    wrong: list[str] = []
    batches: dict[str, list[tuple[float, Story]]] = defaultdict(list)
    for story in pool:
        for notice, _ in story.notices:
            batches[notice["claimant"]].append((stamp(notice["notified_at"]), story))
    for claimant, notices in batches.items():
        asked = history.asked.get(claimant)
        if asked is None:
            continue
        notices.sort(key=lambda pair: pair[0])
        together: list[tuple[float, list[Story]]] = []
        for at, story in notices:
            # More are taken back at once if others have got what the first of them gave.
            if not together or at > together[-1][0] + 0.2 or any(_lost(one, at, pool) for one in together[-1][1]):
                together.append((at, []))
            together[-1][1].append(story)
        for at, victims in together:
            names = [story.lease["lease_id"] for story in victims]
            hosts = set[str]().union(*(story.hosts for story in victims))
            if len(hosts) > 1 or (asked.body["hosts"] != ["pool*"] and hosts != set(asked.body["hosts"])):
                wrong.append(f"freed: {names} on {hosts} for {claimant}, which may use {asked.body['hosts']}")
                continue
            host, ids = hosts.pop(), set(names)
            others = [story for story in pool if story.lease["lease_id"] not in ids and story.seen(at)]
            # Others may have started while the notice was written.
            before = [story for story in others if story.since <= at - WRITTEN_SECONDS]
            if _fitting(host, before, asked) < asked.body["gpus"]:
                wrong.append(f"freed: {names} are not enough for {claimant}")
            held = [*others, *victims]
            for spared in victims:
                # Devices that are free already may be kept for others: they are not counted.
                freed = _fitting(host, [*others, spared], asked) - _fitting(host, held, asked)
                if freed >= asked.body["gpus"]:
                    wrong.append(f"freed: {names} for {claimant}, and {spared.lease['lease_id']} is not needed")
    return wrong


def _lost(victim: Story, at: float, pool: Sequence[Story]) -> bool:
    """True if others have got what a victim gave, by a time: one without grace ends before the next has its notice."""
    return any(victim.until <= other.since <= at and victim.devices.keys() & other.devices.keys() for other in pool)


def _fitting(host: str, held: Iterable[Story], asked: Claimed) -> int:
    """Devices of a host that a request could use, were these leases held."""
    left = {f"GPU-{host}-{at}": 1.0 for at in range(POOL_DEVICES)}
    for story in held:
        for device, share in story.devices.items():
            if device in left:
                left[device] -= share
    return sum(share >= asked.body.get("gpu_share", 1.0) - _TINY for share in left.values())


def _kept_waiting(
    history: GroupHistory,
    pool: Sequence[Story],
    granted: Mapping[str, float],
    outages: Sequence[Outage],
    left_at: Mapping[str, Sequence[float]],
) -> list[str]:
    """Requests within guarantee that waited without a claim, while guests held what they could use."""
    wrong: list[str] = []
    claims: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for story in pool:
        for notice, until in story.notices:
            claims[notice["claimant"]].append((stamp(notice["notified_at"]), until))
    # What is not known for sure of a request counts against its claim, and for those of others of its group.
    asking = {
        request_id: (one, one.sent_at, min(one.answered_at, granted.get(request_id, math.inf)))
        for request_id, one in history.asked.items()
    }
    for request_id, asked in history.asked.items():
        since = asked.stored_at
        until = min([granted.get(request_id, math.inf), asked.waits_until, *left_at.get(request_id, ())])
        if "requeue_of" in asked.body or since >= until or until == math.inf:
            continue
        inner = path_of(asked.body["owner"])[0]
        rivals = [
            other for other in asking.values() if other[0] is not asked and path_of(other[0].body["owner"])[0] == inner
        ]
        instants = {since, until}
        instants |= {
            when for story in pool for when in (story.since, story.until, story.seen_until) if since < when < until
        }
        instants |= {when for pair in claims[request_id] for when in pair if since < when < until}
        instants |= {when for rival in rivals for when in rival[1:] if since < when < until}
        instants |= {when for story in pool if since < (when := story.since + story.lease["min_run_seconds"]) < until}
        began = math.inf
        for at, after in itertools.pairwise(sorted(instants)):
            claimed = any(begin <= at < end for begin, end in claims[request_id])
            asks = sum(rival.devices for rival, begin, end in rivals if begin <= after and at <= end)
            if claimed or not _is_owed(asked, asks, pool, at):
                began = math.inf
                continue
            began = min(began, at)
            late = after - began - seconds_away(outages, began, after, RECOVERY_SECONDS)
            if late > LATE_SECONDS:
                wrong.append(f"guarantee: {request_id} was owed, and nobody gave way for {late:.1f} s")
                break
    return wrong


def _is_owed(asked: Claimed, asks: float, pool: Sequence[Story], at: float) -> bool:
    """True if there is room for a request, and for what others of its group ask, and guests could make way for it."""
    path = path_of(asked.body["owner"])
    inner = GROUPS[path[0]].get("guarantee")
    if inner is None or _counted(pool, path[0], at) + asks + asked.devices > inner + _TINY:
        return False
    if any(_counted(pool, name, at) + asked.devices > _most(name) + _TINY for name in path):
        return False
    held = [story for story in pool if story.seen(at)]
    ours = [story for story in held if not _could_go(story, at)]
    hosts = POOL if asked.body["hosts"] == ["pool*"] else asked.body["hosts"]
    return any(_fitting(host, ours, asked) >= asked.body["gpus"] > _fitting(host, held, asked) for host in hosts)


def _could_go(story: Story, at: float) -> bool:
    """True for leases of guests that may be preempted, and have no notice yet."""
    noticed = any(stamp(notice["notified_at"]) <= at + 0.5 and at < until for notice, until in story.notices)
    return GUESTS in story.path and not noticed and at >= story.since + story.lease["min_run_seconds"]


def _silences(history: GroupHistory, left_at: Mapping[str, Sequence[float]], outages: Sequence[Outage]) -> list[str]:
    """Requests that left the queue though the server knew that their clients were there."""
    return [
        f"silence: {request_id} left the queue, and its client was connected"
        for request_id in history.asked
        for at in left_at.get(request_id, ())
        if not seconds_away(outages, at - SILENCE_SECONDS, at, RECOVERY_SECONDS)
    ]


def _usage(history: GroupHistory, stories: Sequence[Story], fleet: tuple[float, float, float]) -> list[str]:
    """Parts of past use that differ from the decayed sum of what was held, by more than `_USAGE_ERROR`."""
    wrong: list[str] = []
    for before, after, answer in history.usage:
        least, most = _held(stories, history.set_at, (before, after), fleet)
        for status in answer["groups"]:
            name, told = status["group"]["name"], status["usage"]
            low, high = _part_of(name, least, most), _part_of(name, most, least)
            if not low - _USAGE_ERROR < told < high + _USAGE_ERROR:
                wrong.append(f"usage: {name} is said to have used {told:.4f} of all, and used {low:.4f} to {high:.4f}")
    return wrong


def _held(
    stories: Iterable[Story], since: float, times: tuple[float, float], fleet: tuple[float, float, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Least and most that each group can have used of the fleet: the decayed sum of what was held.

    A lease may have ended while no planner was there to see it: until then it counts as held, or not any more.
    """
    sums: list[dict[str, list[float]]] = [defaultdict(lambda: [0.0, 0.0, 0.0]) for _ in range(2)]
    for story in stories:
        begins = [*(at for at, _ in story.shapes), math.inf]
        for (at, grants), following in zip(story.shapes, begins[1:], strict=True):
            begin = max(at, since)
            ends = [min(end, following) for end in (story.until, story.seen_until)]
            seconds = [_decayed(begin, min(end, now), now) for end in ends for now in times]
            for past, extreme in zip(sums, (min(seconds), max(seconds)), strict=True):
                for number, rate in enumerate(_rates(grants)):
                    for name in story.path:
                        past[name][number] += rate * extreme
    least, most = (
        {name: max(one / total for one, total in zip(amounts, fleet, strict=True)) for name, amounts in past.items()}
        for past in sums
    )
    return least, most


def _part_of(name: str, own: dict[str, float], others: dict[str, float]) -> float:
    """Part of a group in all use, where it used `own`, and its siblings and those of the groups around it `others`."""
    top = name.partition("/")[0]
    used = own.get(name, 0.0)
    rest = sum(part for other, part in others.items() if "/" not in other and other != top)
    everything = rest + (used if name == top else max(used, others.get(top, 0.0)))
    return used / everything if everything else 0.0


def _rates(grants: Sequence[dict[str, Any]]) -> tuple[float, float, float]:
    devices = [grant for grant in grants if grant.get("device")]
    return (
        sum(grant.get("share", 1.0) * (PRICE if grant["host"] in POOL else 1.0) for grant in devices),
        sum(grant.get("cpus", 0.0) for grant in grants),
        sum(grant.get("host_memory_bytes", 0) for grant in grants),
    )


def _decayed(since: float, until: float, now: float) -> float:
    """Seconds of a time, each halved for each half-life that has passed since: the integral."""
    if until <= since:
        return 0.0
    rate = math.log(2) / HALF_LIFE_SECONDS
    return (math.exp(-rate * (now - until)) - math.exp(-rate * (now - since))) / rate
