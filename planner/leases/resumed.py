"""Service time at the start of a term: from what the bucket holds, and from how long nobody led."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from ...schemas.requests import LeaseState
from ..durable.store import Entry
from .lifecycle import LeaseRecord
from .service_time import UNKNOWN_SECONDS, Outage, Service, with_outage


def outage_seconds(before: Entry | None, claimed_at: float, silent_seconds: float, since_seconds: float) -> float:
    """For how long nobody could renew before a term; both times are the server's, so that no clocks are compared.

    Args:
        before: the last heartbeat of the leader before.
        claimed_at: when the term began, by the server's clock.
        silent_seconds: for so long this planner has seen no other heartbeat.
        since_seconds: from the beginning of the term until holders can renew.
    """
    if before is None or not before.stored_at or claimed_at < before.stored_at:
        return UNKNOWN_SECONDS
    return min(max(claimed_at - before.stored_at, silent_seconds) + since_seconds, UNKNOWN_SECONDS)


def resumed(
    kept: Service | None, records: Sequence[LeaseRecord], heartbeat_at: float, outage: float
) -> tuple[Service, list[LeaseRecord]]:
    """Service time and records to go on with.

    What was written down last may be some seconds old; no record was extended after now. A record of an earlier
    version has the time of its planner's clock alone: what had gone by at that planner's last heartbeat is counted.

    Args:
        kept: as in the bucket.
        records: of the bucket.
        heartbeat_at: the last heartbeat by the clock of the planner that wrote it; 0 where that is not known.
        outage: how long nobody could renew.
    """
    seconds = max(
        (record.extended_service_seconds or 0.0 for record in records),
        default=0.0,
    )
    service = kept or Service()
    seconds = max(seconds, service.seconds)
    outages = with_outage(service.outages, Outage(seconds, round(outage, 3)))

    def stamped(record: LeaseRecord) -> LeaseRecord:
        if record.extended_service_seconds is not None or record.lease.state is not LeaseState.ACTIVE:
            return record
        gone = heartbeat_at - record.extended_at.timestamp() if heartbeat_at else 0.0
        return replace(record, extended_service_seconds=seconds - min(max(0.0, gone), record.life_seconds))

    return Service(seconds=seconds, outages=outages), [stamped(record) for record in records]
