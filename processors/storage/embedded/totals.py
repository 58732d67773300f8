"""Totals of leases that have ended, so that views over a month of leases read a row for each and not its minutes.

A total is what the views `store.lease_used`, `store.lease_idle` and `store.lease_p95` give for a span of a lease: they
are computed by their own SELECTs. A lease has totals once its last hour is closed. Whenever one of its hours is
recomputed, its totals are deleted in the same transaction, and the views compute it again until it has new ones.
"""

from __future__ import annotations

import time
from typing import Final

from duckdb import DuckDBPyConnection

from ... import views
from ..rollup_columns import HOUR, TEN_SECONDS
from ..statements import transaction

TABLE: Final = "store.lease_totals"
_WIDTH: Final = HOUR.seconds * 1_000_000
LATE_US: Final = 600_000_000
"""Samples are mostly no later than this: an hour is closed if the newest sample is so much newer than its end."""
SPANS_AT_ONCE: Final = 2_000
"""Approximate number of spans for one step."""
AT_ONCE_SECONDS: Final = 20.0
"""Time after which a refresh pauses: other jobs wait for it."""


def refresh(cursor: DuckDBPyConnection) -> int:
    """Add the totals of leases that have ended; return the number of spans added. Another call adds what is left."""
    began = time.monotonic()
    added = 0
    while time.monotonic() - began < AT_ONCE_SECONDS:
        found = _step(cursor)
        if not found:
            break
        added += found
    return added


def _step(cursor: DuckDBPyConnection) -> int:
    newest = cursor.execute(
        f"SELECT epoch_us(max(time)) FROM (SELECT max(time) AS time FROM {TEN_SECONDS.table} UNION ALL "
        f"SELECT max(time) FROM {TEN_SECONDS.table}_open)"
    ).fetchone()
    if newest is None or newest[0] is None:
        return 0
    # Hours that are still open would have their leases deleted again and again.
    closed = (newest[0] - LATE_US) // _WIDTH * _WIDTH
    cursor.execute(
        "CREATE OR REPLACE TEMP TABLE chosen AS WITH ended AS (SELECT lease_id, max(last) AS last FROM "
        f"store.lease_untotaled GROUP BY lease_id HAVING max(last) <= {closed}) "
        "SELECT u.* FROM store.lease_untotaled u JOIN (SELECT e.lease_id FROM ended e JOIN leases l USING (lease_id) "
        f"WHERE l.state <> 'active' ORDER BY e.last, lease_id LIMIT {SPANS_AT_ONCE}) USING (lease_id)"
    )
    row = cursor.execute("SELECT count(*) FROM chosen").fetchone()
    if row is None or not row[0]:
        return 0
    for name, sql in views.INTERNAL_VIEWS.items():
        if name != "store.lease_untotaled":
            part = name.removeprefix("store.")
            of_chosen = sql.replace("store.lease_untotaled", "temp.main.chosen")
            cursor.execute(f"CREATE OR REPLACE TEMP TABLE {part}_chosen AS {of_chosen}")
    with transaction(cursor):
        # One of its spans was changed since: all are computed anew.
        cursor.execute(f"DELETE FROM {TABLE} WHERE lease_id IN (SELECT lease_id FROM chosen)")
        cursor.execute(
            f"INSERT INTO {TABLE} BY NAME SELECT c.*, u.* EXCLUDE (lease_id, host, device, first, last), p.p95, "
            "i.* EXCLUDE (lease_id, host, device, first, last) FROM chosen c "
            "LEFT JOIN lease_used_chosen u USING (lease_id, host, device, first, last) "
            "LEFT JOIN lease_idle_chosen i USING (lease_id, host, device, first, last) "
            "LEFT JOIN lease_p95_chosen p USING (lease_id)"
        )
    return int(row[0])


def delete_touched(cursor: DuckDBPyConnection, first: int, last: int) -> None:
    """Delete the totals of leases that hours are a part of. Call it in the transaction that recomputes these.

    Args:
        cursor: with the temporary table `touched`: series and number (`bucket`) of each hour.
        first: the first of the hours.
        last: the last.
    """
    within = f"last > {first * _WIDTH} AND first < {(last + 1) * _WIDTH}"
    if cursor.execute(f"SELECT 1 FROM {TABLE} WHERE {within} LIMIT 1").fetchone() is None:
        return
    cursor.execute(
        f"DELETE FROM {TABLE} WHERE lease_id IN (SELECT t.lease_id FROM {TABLE} t JOIN touched b "
        f"ON t.series = b.series AND t.first < (b.bucket + 1) * {_WIDTH} AND t.last > b.bucket * {_WIDTH} "
        f"WHERE {within.replace('last', 't.last').replace('first <', 't.first <')})"
    )
