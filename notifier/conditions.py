"""Conditions that last: broken devices, a long queue, a group beyond its share, idle leases. Pure.

A condition is an episode from when it is first seen until it has not been seen for some time. Each rule tells of an
episode once, so that a value around its limit is no stream of messages. Episodes are kept on the bus: neither a restart
nor a planner that is away ends one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from ..schemas.operations import DeviceStatus, QueueEntry
from ..schemas.requests import Lease
from ..schemas.work.groups import GroupStatus
from ..schemas.work.notifications import NewsKind, OwnedRule
from .news import Excess, IdleLease, LongQueue, News, Trouble, of_condition

HOLD_SECONDS: Final = 300.0
"""Time for which a condition must be gone before its episode is over."""
_LOST: Final = "host_lost"
_UNHEALTHY: Final = "unhealthy"


class Source(StrEnum):
    """Source of what conditions are about. What is not known at the moment is not over."""

    LEASES = "leases"
    DEVICES = "devices"
    QUEUE = "queue"
    GROUPS = "groups"
    IDLE = "idle"


class Episode(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A condition from its begin on, as it is kept on the bus.

    Attributes:
        since: when it was first seen.
        gone_at: since when it is not seen any more; null while it is.
        told: ids of the rules that have told of it.
        subject: what it is about, as it was when it began; null for idle leases.
    """

    since: datetime
    gone_at: datetime | None = None
    told: frozenset[str] = frozenset()
    subject: Trouble | LongQueue | Excess | None = None


class Condition(Struct, frozen=True):
    """A condition that holds now.

    Attributes:
        subject: what it is about.
        rule: id of the rule whose limit it exceeds; empty if it is none of a rule.
    """

    subject: Trouble | LongQueue | Excess | IdleLease
    rule: str = ""


Conditions = Mapping[str, Condition]
"""By key: the source, a colon, and what the condition is about."""


def id_of(owned: OwnedRule) -> str:
    """Id of a rule among those of all owners."""
    return f"{owned.owner}/{owned.rule.name}"


def fold(
    episodes: Mapping[str, Episode], seen: Conditions, known: Collection[Source], now: datetime
) -> tuple[dict[str, Episode], dict[str, Episode]]:
    """Begin and end episodes.

    Args:
        episodes: by key, as they were.
        seen: conditions that hold now.
        known: sources that were asked, and have answered.
        now: the time.

    Returns:
        Those that go on, and those that are over.
    """
    going = {key: _begun(condition, now) for key, condition in seen.items() if key not in episodes}
    over: dict[str, Episode] = {}
    for key, episode in episodes.items():
        if key in seen:
            going[key] = episode if episode.gone_at is None else replace(episode, gone_at=None)
        elif key.partition(":")[0] not in known or key.rpartition(":")[0] in seen:
            # Not known either: a device of a host that is lost.
            going[key] = episode
        elif episode.gone_at is None:
            going[key] = replace(episode, gone_at=now)
        elif now - episode.gone_at >= timedelta(seconds=HOLD_SECONDS):
            over[key] = episode
        else:
            going[key] = episode
    return going, over


def _begun(condition: Condition, now: datetime) -> Episode:
    subject = condition.subject
    return Episode(since=now, subject=None if isinstance(subject, IdleLease) else subject)


def news_of(key: str, episode: Episode, condition: Condition) -> News:
    """News of an episode that goes on."""
    return of_condition(condition.subject, key, episode.since)


def over_news(key: str, episode: Episode) -> News | None:
    """News that an episode is over; None for an idle lease, of which nothing is told."""
    if episode.subject is None:
        return None
    return of_condition(replace(episode.subject, over=True), f"over:{key}", episode.since)


# What holds now


def troubles(devices: Iterable[DeviceStatus]) -> dict[str, Condition]:
    """Devices that report an error, and hosts that are lost, with all their devices as one."""
    lost: dict[str, list[DeviceStatus]] = {}
    found: dict[str, Condition] = {}
    for device in devices:
        if _LOST in device.why_not:
            lost.setdefault(device.host, []).append(device)
        elif _UNHEALTHY in device.why_not:
            found[f"{Source.DEVICES}:{device.host}:{device.uuid}"] = Condition(Trouble(device.host, [device]))
    for host, its in lost.items():
        found[f"{Source.DEVICES}:{host}"] = Condition(Trouble(host, its, lost=True))
    return found


def long_queues(rules: Iterable[OwnedRule], queue: Sequence[QueueEntry]) -> dict[str, Condition]:
    """The queue, for each rule whose limits it exceeds."""
    found: dict[str, Condition] = {}
    if not queue:
        return found
    longest = max(queue, key=lambda entry: entry.waiting_seconds)
    subject = LongQueue(
        len(queue), sum(entry.gpus for entry in queue), longest.waiting_seconds, longest.owner or "somebody"
    )
    for owned in rules:
        rule = owned.rule
        if NewsKind.QUEUE_LONG in rule.on and (
            (rule.queue_requests is not None and subject.requests >= rule.queue_requests)
            or (rule.queue_seconds is not None and subject.longest_seconds >= rule.queue_seconds)
        ):
            found[f"{Source.QUEUE}:{id_of(owned)}"] = Condition(subject, id_of(owned))
    return found


def excesses(rules: Iterable[OwnedRule], groups: Sequence[GroupStatus]) -> dict[str, Condition]:
    """Groups that use more than their fair share while others wait, for each rule."""
    found: dict[str, Condition] = {}
    waiting = sum(status.waiting_requests for status in groups if "/" not in status.group.name)
    for owned in rules:
        if NewsKind.OVER_SHARE not in owned.rule.on:
            continue
        for status in groups:
            name, others = status.group.name, waiting - status.waiting_requests
            if others and status.fair_usage > 0 and status.usage > status.fair_usage * (1 + owned.rule.share_excess):
                subject = Excess(name, status.usage, status.fair_usage, others)
                found[f"{Source.GROUPS}:{id_of(owned)}:{name}"] = Condition(subject, id_of(owned))
    return found


def idle_leases(owned: OwnedRule, idle: Iterable[IdleLease], now: datetime) -> dict[str, Condition]:
    """Leases that are idle by a rule, without those whose holders the planner has warned: that is news of its own."""
    limit = timedelta(seconds=owned.rule.idle_seconds)
    return {
        f"{Source.IDLE}:{id_of(owned)}:{each.lease.lease_id}": Condition(each, id_of(owned))
        for each in idle
        if each.lease.idle is None and now - each.since >= limit
    }


def with_owners(news: News, leases: Mapping[str, Lease]) -> News:
    """News of a device with the owners of the leases on it.

    Args:
        news: as it is.
        leases: active leases by their id.
    """
    subject = news.subject
    if not isinstance(subject, Trouble):
        return news
    held = [leases[name] for device in subject.devices for name in device.leases if name in leases]
    return replace(
        news,
        owners=frozenset(lease.owner for lease in held),
        groups=frozenset(lease.group for lease in held if lease.group),
    )
