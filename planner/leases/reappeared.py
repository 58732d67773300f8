"""Leases that ended, and are active in the bucket all the same: their ends are durable as events.

NATS servers up to 2.15 do not record on disk that a value was replaced, where a stream keeps one value per subject.
When the replacement has expired or was deleted, and the server is killed then (`kill -9`, loss of power), it reads the
replaced value back (`findings/nats_replaced_value_returns.sh`). So the active record of a lease returns once the record
of its end has expired. Nothing in the bucket shows that, whichever way the end is written. But the end of a lease is
final, its id is unique, and its event has been on the facts stream since before the record expired.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Final

from msgspec.structs import replace
from nats.aio.client import Client
from nats.js import api

from ...bus.stream_reader import read
from ...schemas import codec, subjects
from ...schemas.requests import LeaseEvent, LeaseState
from ..durable.store import Store, WriteFailed, decode_or_none, lease_key
from .ledger import RETAIN_AT_LEAST_SECONDS, RETAIN_SECONDS
from .lifecycle import KIND_OF_END, LeaseRecord

log = logging.getLogger("corral.planner.reappeared")

_CLOCKS_DIFFER_SECONDS: Final = 60.0
"""Tolerance for the clocks of the servers that lead the two streams."""


async def end_reappeared(
    nc: Client, store: Store, term: int, records: Sequence[tuple[LeaseRecord, int]], since: float
) -> list[tuple[LeaseRecord, int]]:
    """Replace the active records of leases that have ended by records of their ends, durably.

    It reads the ends since `since`: those of some minutes, if holders renew, whatever the number of leases.

    Args:
        nc: connection.
        store: the bucket.
        term: revision of the leader's key.
        records: of the bucket, each with its revision.
        since: time when the oldest of the active ones was stored, by the server's clock; infinity for none.

    Returns:
        The records to go on with. Their events need not be published again.

    Raises:
        Deposed: another planner leads.
        NatsError, OSError, TimeoutError: the facts stream can't be read.
    """
    active = {record.lease.lease_id for record, _ in records if record.lease.state is LeaseState.ACTIVE}
    if not active:
        return list(records)
    ends = await _ends(nc, active, since - _CLOCKS_DIFFER_SECONDS)
    if not ends:
        return list(records)
    log.warning("%d leases that had ended came back with a restart of the server: they end again", len(ends))

    async def one(record: LeaseRecord, revision: int) -> tuple[LeaseRecord, int]:
        event = ends.get(record.lease.lease_id)
        if event is None:
            return record, revision
        ended = with_end(record, event)
        retention = RETAIN_SECONDS - (time.time() - event.time.timestamp())
        try:
            return ended, await store.put(
                lease_key(record.lease.lease_id),
                codec.encode(ended, codec.JSON),
                term,
                ttl_seconds=max(RETAIN_AT_LEAST_SECONDS, retention),
            )
        except WriteFailed as error:  # a full bucket, say: the next leader finds it again
            log.debug("the end of lease %s is kept in memory alone: %s", record.lease.lease_id, error)
            return ended, revision

    return await asyncio.gather(*(one(record, revision) for record, revision in records))


def with_end(record: LeaseRecord, event: LeaseEvent) -> LeaseRecord:
    """Record of a lease after its end, of which the stream has the event.

    Args:
        record: an earlier one, of the active lease.
        event: of the end.
    """
    lease = replace(
        record.lease,
        state=event.lease.state,
        ended_at=event.lease.ended_at or event.time,
        reason=event.lease.reason,
        preemption=event.lease.preemption,
    )
    version = record.version + 1
    return replace(
        record,
        lease=lease,
        version=version,
        told=version,
        earlier=[],
        changed_at=event.time,
        kind=event.kind,
        is_notice=False,
        planner=event.planner,
    )


async def _ends(nc: Client, lease_ids: Iterable[str], since: float) -> dict[str, LeaseEvent]:
    """Events of the ends of some leases, by lease id, of those on the stream since a time."""
    wanted = set(lease_ids)
    found: dict[str, LeaseEvent] = {}

    async def of_kind(kind: str) -> None:
        config = api.ConsumerConfig(
            deliver_policy=api.DeliverPolicy.BY_START_TIME,
            opt_start_time=datetime.fromtimestamp(max(0.0, since), UTC),
        )
        async for stored in read(nc, subjects.FACTS_STREAM, subjects.lease_subject(kind, "*"), config):
            lease_id = stored.subject.rpartition(".")[2]
            if lease_id not in wanted:
                continue
            event = decode_or_none(stored.subject, stored.data, LeaseEvent)
            if event is not None and event.lease.state is not LeaseState.ACTIVE:
                found[lease_id] = event

    await asyncio.gather(*(of_kind(kind.value) for kind in KIND_OF_END.values()))
    return found
