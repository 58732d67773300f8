"""Rows of work requests: what was asked, how long it waited, and what became of it; and of those that wait."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

import pyarrow as pa
from duckdb import DuckDBPyConnection

from ...schemas.request_events import AskedRequest, Forecast, RequestEvent, RequestEvents, WaitingRequest
from .protocol import ArrowTable, Asked
from .rows import arrow_schema
from .statements import registered

SCHEMA: Final = arrow_schema("requests")
_WAITING: Final = arrow_schema("store.waiting_requests")


def table_of(asked: Sequence[Asked]) -> ArrowTable:
    """Rows of requests; of several with the same uid the first."""
    first: dict[str, Asked] = {}
    for one in asked:
        first.setdefault(one.event.uid, one)
    return pa.Table.from_pylist([_row(one.event, one.planner) for one in first.values()], schema=SCHEMA)


def write_requests(cursor: DuckDBPyConnection, asked: Sequence[Asked], table: str = "requests") -> None:
    """Append requests that are not stored yet. Call it in a transaction."""
    if not asked:
        return
    # Only a row of the same times can be the same request: row groups of other times are skipped.
    times = [one.event.asked_at for one in asked]
    with registered(cursor, "incoming", table_of(asked)):
        cursor.execute(
            f"INSERT INTO {table} BY NAME SELECT * FROM incoming n WHERE NOT EXISTS (FROM {table} r "
            "WHERE r.asked_at >= ? AND r.asked_at <= ? AND r.asked_at = n.asked_at AND r.uid = n.uid)",
            [min(times), max(times)],
        )


def write_waiting(cursor: DuckDBPyConnection, messages: Sequence[RequestEvents], asked: str = "requests") -> None:
    """Update the requests that wait. Call it in a transaction, once the ended ones are stored.

    Args:
        cursor: in a transaction.
        messages: in order.
        asked: table of the ended requests.
    """
    waiting: dict[str, tuple[WaitingRequest, str]] = {}
    ended: set[str] = set()
    new_term = False
    for message in messages:
        if message.new_term:
            new_term = True
            waiting.clear()
        waiting.update((one.uid, (one, message.planner)) for one in message.waiting)
        for event in message.events:
            if event.queued:
                waiting.pop(event.uid, None)
                ended.add(event.uid)
    if new_term:
        cursor.execute("DELETE FROM store.waiting_requests")
    elif ended:
        with registered(cursor, "ended", pa.table({"uid": list(ended)})):
            cursor.execute("DELETE FROM store.waiting_requests WHERE uid IN (SELECT uid FROM ended)")
    if not waiting:
        return
    times = [one.asked_at for one, _ in waiting.values()]
    rows = pa.Table.from_pylist([_waiting_row(one, planner) for one, planner in waiting.values()], schema=_WAITING)
    with registered(cursor, "incoming", rows):
        cursor.execute(
            "INSERT INTO store.waiting_requests BY NAME SELECT * FROM incoming n "
            "WHERE uid NOT IN (SELECT uid FROM store.waiting_requests) "
            f"AND NOT EXISTS (FROM {asked} r WHERE r.asked_at >= ? AND r.asked_at <= ? "
            "AND r.asked_at = n.asked_at AND r.uid = n.uid)",
            [min(times), max(times)],
        )


def _waiting_row(one: WaitingRequest, planner: str) -> dict[str, Any]:
    return _request_row(one.request) | {
        "uid": one.uid,
        "asked_at": one.asked_at,
        "until": one.until,
        "position": one.position or None,
        "group_name": one.group or None,
        "estimated_seconds": None if one.estimate is None else one.estimate.seconds,
        "planner": planner,
    }


def _row(event: RequestEvent, planner: str) -> dict[str, Any]:
    estimate = event.estimate
    return _request_row(event.request) | {
        "uid": event.uid,
        "asked_at": event.asked_at,
        "ended_at": event.ended_at,
        "outcome": event.outcome.value,
        "code": event.code or None,
        "message": event.message or None,
        "queued": event.queued,
        "position": event.position or None,
        "lease_id": event.lease_id or None,
        "estimated_seconds": None if estimate is None else estimate.seconds,
        "estimated_low_seconds": None if estimate is None else estimate.low_seconds,
        "estimated_high_seconds": None if estimate is None else estimate.high_seconds,
        "estimate_basis": None if estimate is None else estimate.basis,
        **_forecast("forecast", event.forecast),
        **_forecast("last_forecast", event.last_forecast or event.forecast),
        "planner": planner,
        "group_name": event.group or None,
    }


def _request_row(request: AskedRequest) -> dict[str, Any]:
    """Columns of what was asked."""
    work = request.distribution
    items = None if work is None else work.items if isinstance(work.items, int) else len(work.items)
    return {
        "request_id": request.request_id,
        "owner": request.owner,
        "name": request.name,
        "gpus": request.gpus,
        "gpu_share": request.gpu_share,
        "gpu_memory_bytes": request.gpu_memory_bytes,
        "cpus": request.cpus,
        "host_memory_bytes": request.host_memory_bytes,
        "models": request.models,
        "vendors": request.vendors,
        "hosts": request.hosts,
        "host_labels": list(request.host_labels.items()),
        "min_compute_capability": request.min_compute_capability,
        "placement": request.placement.value,
        "mig": request.mig if isinstance(request.mig, str) else "*" if request.mig else None,
        "policy": request.policy,
        "priority": request.priority,
        "ttl_seconds": request.ttl_seconds,
        "wait_seconds": request.wait_seconds,
        "expected_seconds": request.expected_seconds,
        "max_seconds": request.max_seconds,
        "items": items,
        "labels": list(request.labels.items()),
        "preemptible": request.preemptible,
        "grace_seconds": request.grace_seconds,
        "checkpoint": request.checkpoint,
        "min_run_seconds": request.min_run_seconds,
        "requeue_of": request.requeue_of,
        "within": request.within,
        "prefer_within": request.prefer_within,
        "gpus_max": request.gpus_max,
    }


def _forecast(prefix: str, forecast: Forecast | None) -> dict[str, datetime | None]:
    return {
        f"{prefix}_at": None if forecast is None else forecast.made_at,
        f"{prefix}_start": None if forecast is None else forecast.expected_start,
        f"{prefix}_earliest": None if forecast is None else forecast.earliest_start,
        f"{prefix}_latest": None if forecast is None else forecast.latest_start,
    }
