"""Service time at the start of a term, from the bucket and the time without a leader."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from ...schemas.requests import LeaseState
from ..durable.store import Entry
from .lifecycle import LeaseRecord
from .service_time import UNKNOWN_SECONDS, Outage, Service, with_outage


def outage_seconds(before: Entry | None, claimed_at: float, silent_seconds: float, since_seconds: float) -> float:
    """Length of the outage before a term, in which no holder could renew.

    Both times are by the server's clock, so that no clocks are compared.

    Args:
        before: last heartbeat of the previous leader.
        claimed_at: begin of the term, by the server's clock.
        silent_seconds: time for which this planner had seen no newer heartbeat.
        since_seconds: time from the begin of the term until holders can renew.

    Returns:
        Seconds; `UNKNOWN_SECONDS` at most, and if it is not known.
    """
    if before is None or not before.stored_at or claimed_at < before.stored_at:
        return UNKNOWN_SECONDS
    return min(max(claimed_at - before.stored_at, silent_seconds) + since_seconds, UNKNOWN_SECONDS)


def recover_service_time(
    kept: Service | None, records: Sequence[LeaseRecord], heartbeat_at: float, outage: float
) -> tuple[Service, list[LeaseRecord]]:
    """Service time and records to continue with in a new term.

    The stored service time may be some seconds old, so it goes on from the latest renewal or grant if that is later. A
    record of an earlier version has wall-clock time alone: then the time up to the last heartbeat of its planner, by
    that planner's clock, counts as gone by.

    Args:
        kept: as in the bucket.
        records: of the bucket.
        heartbeat_at: last heartbeat, by the clock of the planner that wrote it; 0 if not known.
        outage: length in seconds of the outage before this term.
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
