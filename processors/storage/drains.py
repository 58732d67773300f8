"""Rows of drains: what was drained, from when to when, by whom and why."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from duckdb import DuckDBPyConnection

from ...schemas.request_events import RequestEvents
from ...schemas.work.drains import DrainSpan
from .rows import Columns, arrow_schema
from .statements import put, registered

KEYS: Final = ("target", "since", "window_id")
"""Columns that identify a row."""
_DRAINS: Final = Columns(arrow_schema("drains"), DrainSpan, ("window_id", "planner"))


def write_drains(cursor: DuckDBPyConnection, messages: Sequence[RequestEvents]) -> None:
    """Store drains that have begun, and the ends of those that are stored. Call it in a transaction.

    Of several ends of a drain the first counts: maintenance that is canceled ends before its planned end.

    Args:
        cursor: in a transaction.
        messages: in order.
    """
    found: dict[tuple[str, datetime, str], tuple[DrainSpan, str]] = {}
    for message in messages:
        for span in message.drains:
            key = span.target, span.since, span.window
            before = found.get(key)
            if before is None or _ends_sooner(span, before[0]):
                found[key] = span, message.planner
    if not found:
        return
    rows = [_DRAINS.row(span, window_id=span.window, planner=planner) for span, planner in found.values()]
    with registered(cursor, "new_drains", _DRAINS.table(rows)):
        put(
            cursor,
            "drains",
            "SELECT n.* REPLACE (least(d.until, n.until) AS until, "
            "CASE WHEN d.until <= n.until OR n.until IS NULL THEN coalesce(d.ended_by, n.ended_by) ELSE n.ended_by END "
            "AS ended_by) FROM new_drains n LEFT JOIN drains d USING (target, since, window_id)",
            KEYS,
        )


def _ends_sooner(span: DrainSpan, other: DrainSpan) -> bool:
    return span.until is not None and (other.until is None or span.until < other.until)
