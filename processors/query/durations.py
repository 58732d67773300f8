"""Digest of how long past leases lasted, over the bus: the planner estimates durations by it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Final

import duckdb
from duckdb import DuckDBPyConnection
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from ...schemas import codec, replies, subjects
from ...schemas.requests import Error
from ...schemas.values.durations import (
    BINS,
    HALF_LIFE_SECONDS,
    DurationDigest,
    DurationGroup,
    DurationsRequest,
    shape_of,
)

log = logging.getLogger("corral.query.durations")

FRESH_SECONDS: Final = 60.0
"""A digest is computed at most so often."""
WINDOW_DAYS: Final = 180
"""Leases that ended earlier count less than 2 % of one that ends now, and are left out."""

_SQL: Final = f"""
WITH held AS (
    SELECT l.lease_id, l.owner, l.name, l.state = 'released' AND l.preemption_notified_at IS NULL AS whole,
        coalesce(l.ended_at, least(l.expires_at, $now)) AS ended,
        epoch(coalesce(l.ended_at, least(l.expires_at, $now)) - l.granted_at) AS seconds
    FROM leases l
    WHERE coalesce(l.ended_at, $now) > $now - INTERVAL {WINDOW_DAYS} DAYS
), shapes AS (
    SELECT lease_id, count(*) FILTER (device IS NOT NULL AND since IS NULL) AS gpus,
        min(share) FILTER (device IS NOT NULL AND share < 1) AS share
    FROM lease_devices WHERE lease_id IN (SELECT lease_id FROM held) GROUP BY lease_id
), asked AS (
    SELECT lease_id, any_value(gpus) AS gpus, any_value(gpu_share) AS share, any_value(models) AS models,
        any_value(mig) AS mig
    FROM requests WHERE lease_id IN (SELECT lease_id FROM held) GROUP BY lease_id
)
SELECT owner, name, coalesce(a.gpus, s.gpus, 0)::INTEGER AS gpus,
    CASE WHEN a.lease_id IS NULL THEN s.share ELSE a.share END AS share, coalesce(a.models, []) AS models, a.mig,
    whole, least({BINS - 1}, CASE WHEN seconds < 1 THEN 0 ELSE floor(4 * log2(seconds)) END)::INTEGER AS bin,
    sum(pow(0.5, greatest(epoch($now - ended), 0) / {HALF_LIFE_SECONDS}))::DOUBLE AS weight
FROM held LEFT JOIN shapes s USING (lease_id) LEFT JOIN asked a USING (lease_id)
GROUP BY ALL ORDER BY bin
"""


def digest(cursor: DuckDBPyConnection, now: datetime) -> DurationDigest:
    """Compute the digest of all leases that ended lately, or have not ended.

    Released leases count as ended. Active, expired, lost and evicted ones count as censored, and so do those released
    after the notice of a preemption: their work would have lasted at least so long.
    """
    groups: dict[tuple[str, str, str], tuple[dict[int, float], dict[int, float]]] = {}
    for owner, name, gpus, share, models, mig, whole, number, weight in cursor.execute(_SQL, {"now": now}).fetchall():
        shape = shape_of(gpus, share, tuple(models), "true" if mig == "*" else mig or False)
        ended, censored = groups.setdefault((owner, name or "", shape), ({}, {}))
        counts = ended if whole else censored
        counts[number] = counts.get(number, 0.0) + weight
    found = [
        DurationGroup(
            owner=owner,
            name=name,
            shape=shape,
            ended=[(number, round(weight, 4)) for number, weight in sorted(ended.items())],
            censored=[(number, round(weight, 4)) for number, weight in sorted(censored.items())],
        )
        for (owner, name, shape), (ended, censored) in groups.items()
    ]
    found.sort(key=lambda group: -sum(weight for _, weight in (*group.ended, *group.censored)))
    return DurationDigest(time=now, groups=found)


class DurationsService:
    """Answers requests for the digest.

    Args:
        nc: connection to the bus.
        connect: returns a new cursor on the database; called from another thread.
        store_received: stores what was received before. Rollups are not read, so the history stays unread otherwise.
    """

    def __init__(
        self,
        nc: Client,
        connect: Callable[[], DuckDBPyConnection],
        store_received: Callable[[], Awaitable[None]],
    ) -> None:
        self._nc = nc
        self._connect = connect
        self._store_received = store_received
        self._digest: DurationDigest | None = None
        self._computed_at = 0.0
        self._lock = asyncio.Lock()
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        """Subscribe; of several processors one answers each request."""
        self._subscription = await self._nc.subscribe(subjects.DURATIONS, queue="q", cb=self._on_request)

    async def stop(self) -> None:
        """Unsubscribe."""
        if self._subscription is not None and not self._nc.is_closed:
            await self._subscription.unsubscribe()
            self._subscription = None

    async def _on_request(self, message: Msg) -> None:
        if not message.reply:
            return
        content = replies.asked_in(message.headers)
        warnings: list[str] = []
        try:
            asked, warnings = codec.decode_request(message.data, DurationsRequest, codec.content_type(message.headers))
            answer = await self._latest(asked.max_groups)
        except codec.DecodeError as error:
            answer = Error(code=error.code, message=str(error), field=error.field)
        except duckdb.Error as error:
            log.warning("the digest of durations could not be computed: %s", error)
            answer = Error(code="unavailable", message="The history can't be read now: ask again later")
        await self._nc.publish(
            message.reply, codec.encode(answer, content), headers=replies.headers(answer, content, warnings)
        )

    async def _latest(self, max_groups: int) -> DurationDigest:
        async with self._lock:
            if self._digest is None or time.monotonic() - self._computed_at > FRESH_SECONDS:
                await self._store_received()
                self._digest = await asyncio.to_thread(self._compute)
                self._computed_at = time.monotonic()
        found = self._digest
        # The answer has to fit in a message: groups with the least weight are left out.
        while True:
            cut = DurationDigest(time=found.time, groups=found.groups[:max_groups])
            if len(codec.encode(cut, codec.JSON)) < self._nc.max_payload - 4096:
                return cut
            max_groups = len(cut.groups) * 3 // 4

    def _compute(self) -> DurationDigest:
        cursor = self._connect()
        try:
            return digest(cursor, datetime.now(UTC))
        finally:
            cursor.close()
