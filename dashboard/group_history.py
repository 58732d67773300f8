"""Devices that groups held, borrowed and were owed over time, and preemptions: from the history."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

from msgspec import Struct

from ..client import Client
from ..schemas.operations import QueueEntry
from ..schemas.work.groups import GroupStatus
from .history import Window, instant

SERIES: Final = 8
"""Groups that a chart shows: as many as there are colors."""
PREEMPTIONS: Final = 100
"""Preemptions that a page shows."""
# Longest window and length of a bucket, both in seconds: about a hundred buckets each.
_BUCKETS: Final = ((3600, 60), (6 * 3600, 300), (24 * 3600, 900), (7 * 86400, 3600), (30 * 86400, 6 * 3600))
_COARSEST: Final = 86400
_ROWS: Final = 100_000


class Use(Struct, frozen=True, kw_only=True):
    """Mean numbers of devices over buckets of time, by group, each with the groups within.

    Attributes:
        times: start of each bucket, in epoch seconds.
        held: devices that leases held.
        waited: devices that requests in the queue waited for.
    """

    times: list[float]
    held: dict[str, list[float]]
    waited: dict[str, list[float]]


def bucket_seconds(seconds: float) -> int:
    """Length of the buckets of a window of a given length."""
    return next((bucket for most, bucket in _BUCKETS if seconds <= most), _COARSEST)


async def use(client: Client, window: Window, queue: Sequence[QueueEntry] = ()) -> Use:
    """Query what groups held and waited for in a window.

    Args:
        client: client of the bus.
        window: time window.
        queue: requests that wait now: the history has them once they are answered.

    Raises:
        CorralError: the history doesn't answer, or not in time.
    """
    start, end = window.bounds
    width = bucket_seconds(window.seconds)
    first = int(start // width)
    result = await client.query(sql(first * width, end, width), limit=_ROWS, timeout=20)
    now = time.time()
    rows = [*result.rows, *_waiting_now(queue, width, min(now, end), now)]
    return folded(rows, range(first, int(end // width) + 1), width, end)


def sql(start: float, end: float, width: int) -> str:
    """SQL for device seconds by kind (`held`, `waited`), group and bucket.

    A row of the kind `since` has the bucket in which the first lease of a group was granted.

    Args:
        start: start of the first bucket, in epoch seconds.
        end: end of the window, in epoch seconds.
        width: length of a bucket in seconds.
    """
    inside = f"< {instant(end)} AND {{}} > {instant(start)}"
    step = width * 1_000_000
    first, last = f"epoch_us({instant(start)})", f"epoch_us({instant(end)})"
    return f"""WITH parts AS (
    SELECT 'held' AS kind, l.group_name, epoch_us(s.started) AS since, epoch_us(s.ended) AS until, s.gpus
    FROM lease_spans s JOIN leases l USING (lease_id)
    WHERE l.group_name IS NOT NULL AND s.started {inside.format("s.ended")}
    UNION ALL
    SELECT 'waited', group_name, epoch_us(asked_at), epoch_us(ended_at), coalesce(gpu_share, gpus) FROM requests
    WHERE group_name IS NOT NULL AND queued AND asked_at {inside.format("ended_at")}
), clipped AS (
    SELECT kind, group_name, gpus, greatest(since, {first}) AS since, least(until, {last}) AS until FROM parts
), cut AS (
    SELECT *, unnest(range(since // {step}, (until - 1) // {step} + 1)) AS bucket FROM clipped WHERE until > since
)
SELECT kind, group_name, bucket,
    sum(gpus * (least(until, (bucket + 1) * {step}) - greatest(since, bucket * {step})) / 1e6) AS gpu_seconds
FROM cut GROUP BY ALL
UNION ALL SELECT 'since', '', epoch_us(min(granted_at)) // {step}, 0 FROM leases WHERE group_name IS NOT NULL"""


def _waiting_now(queue: Sequence[QueueEntry], width: int, end: float, now: float) -> Iterator[tuple[Any, ...]]:
    for entry in queue:
        since = now - entry.waiting_seconds
        if entry.group and since < end:
            for bucket in range(int(since // width), int(end // width) + 1):
                seconds = min(end, (bucket + 1) * width) - max(since, bucket * width)
                yield "waited", entry.group, bucket, entry.gpus * seconds


def folded(rows: Sequence[Sequence[Any]], buckets: range, width: int, end: float) -> Use:
    """Means over buckets. Those from before the first lease of a group are left out.

    Args:
        rows: as `sql` selects them.
        buckets: their numbers, since the epoch.
        width: length of a bucket in seconds.
        end: end of the last one, in epoch seconds: it may not be over yet.
    """
    found: dict[str, dict[str, list[float]]] = {"held": {}, "waited": {}}
    since = next((bucket for kind, _, bucket, _ in rows if kind == "since" and bucket is not None), buckets.stop)
    buckets = range(max(buckets.start, since), buckets.stop)
    for kind, name, bucket, seconds in rows:
        if kind in found and bucket in buckets:
            mean = seconds / max(1.0, min(width, end - bucket * width))
            for group in _around(name):
                found[kind].setdefault(group, [0.0] * len(buckets))[bucket - buckets.start] += mean
    times = [float(bucket * width) for bucket in buckets]
    return Use(times=times, held=found["held"], waited=found["waited"])


def _around(name: str) -> Iterator[str]:
    """A group and those around it."""
    while name:
        yield name
        name = name.rpartition("/")[0]


class Lending(Struct, frozen=True, kw_only=True):
    """Devices that groups borrowed and were owed, by bucket of time. Both have the same groups.

    Attributes:
        times: start of each bucket, in epoch seconds.
        beyond: devices that a group held beyond its guarantee; below zero those of it that it did not hold.
        owed: devices that a group waited for within its guarantee.
    """

    times: list[float]
    beyond: dict[str, list[float]]
    owed: dict[str, list[float]]


def lending(found: Use, groups: Sequence[GroupStatus]) -> Lending:
    """Compare what groups held with what they are guaranteed now; of at most `SERIES` groups, those with the most."""
    nothing = [0.0] * len(found.times)
    beyond: dict[str, list[float]] = {}
    owed: dict[str, list[float]] = {}
    for status in groups:
        name, guaranteed = status.group.name, status.gpus_guaranteed
        held, waited = found.held.get(name, nothing), found.waited.get(name, nothing)
        beyond[name] = [one - guaranteed for one in held]
        owed[name] = [min(asked, max(0.0, guaranteed - one)) for asked, one in zip(waited, held, strict=True)]
    greatest = {name: max(map(abs, (*beyond[name], *owed[name])), default=0.0) for name in beyond}
    most = sorted((name for name in beyond if greatest[name]), key=lambda name: -greatest[name])[:SERIES]
    shown = [name for name in beyond if name in most]
    return Lending(
        times=found.times,
        beyond={name: beyond[name] for name in shown},
        owed={name: owed[name] for name in shown},
    )


def inside(groups: Sequence[GroupStatus], around: str) -> list[GroupStatus]:
    """Groups directly within a group, or the outermost for an empty name: what they hold adds up."""
    return [status for status in groups if status.group.name.rpartition("/")[0] == around]


async def preemptions(client: Client, window: Window) -> list[dict[str, Any]]:
    """Query the preemptions whose notice was given in a window, newest first; at most `PREEMPTIONS`."""
    start, end = window.bounds
    result = await client.query(
        "SELECT epoch(notified_at) AS at, owner, group_name, name, lease_id, gpus, claimant_owner, claimant_group, "
        "reason, outcome, notice_seconds, lost_gpu_seconds FROM preemptions "
        f"WHERE notified_at >= {instant(start)} AND notified_at < {instant(end)} ORDER BY notified_at DESC",
        limit=PREEMPTIONS,
        timeout=20,
    )
    return result.dicts()
