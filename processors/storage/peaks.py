"""Peaks of the memory of leases by lists of processes, kept as the lists come: a month of them takes long to read."""

from __future__ import annotations

from typing import Final

import pyarrow as pa
from duckdb import DuckDBPyConnection

from .statements import registered

TABLE: Final = "store.lease_peaks"
_DAY: Final = 86_400_000_000
REMEMBERED: Final = 100_000
"""Number of peaks kept in memory; beyond it they are forgotten, and a row more is stored for each."""

_Key = tuple[str, str, str]


def _of(source: str) -> str:
    """SELECT of the peak of each lease on each device, over lists of processes."""
    return (
        "SELECT lease, host, device, max(try_cast(used AS BIGINT)) AS peak FROM (SELECT lease, host, device, time, "
        f"sum(memory_used_bytes) AS used FROM {source} WHERE lease <> '' GROUP BY ALL) "
        "WHERE try_cast(used AS BIGINT) IS NOT NULL GROUP BY ALL"
    )


class Peaks:
    """Peaks that are stored by one writer. Rows are only added: the highest of a lease on a device is its peak."""

    def __init__(self) -> None:
        self._stored: dict[_Key, int] = {}
        self._written: dict[_Key, int] = {}

    def begin(self) -> None:
        """Begin a transaction: what an earlier one has written, and not committed, is not stored."""
        self._written = {}

    def write(self, cursor: DuckDBPyConnection, source: str) -> None:
        """Store the peaks that are higher than those before. Call it between `begin` and `committed`.

        Args:
            cursor: in the transaction.
            source: table with rows of `processes`; a list of a host is in one message, and so never split.
        """
        found = cursor.execute(_of(source)).fetchall()
        self._written = {row[:3]: row[3] for row in found if row[3] > self._stored.get(row[:3], -1)}
        if self._written:
            leases, hosts, devices = zip(*self._written, strict=True)
            rows = {"lease": leases, "host": hosts, "device": devices, "peak": [*self._written.values()]}
            with registered(cursor, "peaks", pa.table(rows)):
                cursor.execute(f"INSERT INTO {TABLE} BY NAME FROM peaks")

    def committed(self) -> None:
        """Remember what the transaction has stored."""
        if len(self._stored) > REMEMBERED:
            self._stored.clear()
        self._stored.update(self._written)
        self._written = {}


def fill(cursor: DuckDBPyConnection) -> None:
    """Store the peaks of all lists that an older version has stored, a day at a time: a month may be 100 M rows."""
    days = cursor.execute(f"SELECT DISTINCT epoch_us(time) // {_DAY} FROM processes ORDER BY 1").fetchall()
    for (day,) in days:
        first, end = (f"make_timestamptz({at * _DAY})" for at in (day, day + 1))
        source = f"(FROM processes WHERE time >= {first} AND time < {end})"
        cursor.execute(f"INSERT INTO {TABLE} BY NAME {_of(source)}")
