"""Rows of work requests: what was asked, how long it waited, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

import pyarrow as pa
from duckdb import DuckDBPyConnection

from ...schemas.request_events import Forecast, RequestEvent
from .protocol import ArrowTable, Asked
from .rows import arrow_schema
from .statements import registered

SCHEMA: Final = arrow_schema("requests")


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


def _row(event: RequestEvent, planner: str) -> dict[str, Any]:
    request, estimate = event.request, event.estimate
    work = request.distribution
    items = None if work is None else work.items if isinstance(work.items, int) else len(work.items)
    return {
        "uid": event.uid,
        "request_id": request.request_id,
        "owner": request.owner,
        "name": request.name,
        "asked_at": event.asked_at,
        "ended_at": event.ended_at,
        "outcome": event.outcome.value,
        "code": event.code or None,
        "message": event.message or None,
        "queued": event.queued,
        "position": event.position or None,
        "lease_id": event.lease_id or None,
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
        "estimated_seconds": None if estimate is None else estimate.seconds,
        "estimated_low_seconds": None if estimate is None else estimate.low_seconds,
        "estimated_high_seconds": None if estimate is None else estimate.high_seconds,
        "estimate_basis": None if estimate is None else estimate.basis,
        **_forecast("forecast", event.forecast),
        **_forecast("last_forecast", event.last_forecast or event.forecast),
        "planner": planner,
        "preemptible": request.preemptible,
        "grace_seconds": request.grace_seconds,
        "checkpoint": request.checkpoint,
        "min_run_seconds": request.min_run_seconds,
        "requeue_of": request.requeue_of,
        "group_name": event.group or None,
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
