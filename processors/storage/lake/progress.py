"""Progress of the rollups of each partition: a table of one row for each, rewritten with every rollup that is written.

The row has the fence of the partition's owner, as its watermark has (see `lake.py`). So of two processors that both act
as the owner, one conflicts with the other, or reads its fence, and writes no rollup.
"""

from __future__ import annotations

from typing import Final

from duckdb import DuckDBPyConnection
from msgspec import Struct

from ..errors import Deposed

PREFIX: Final = "rolled_"
_STREAM: Final = "CORRAL_PARTITIONS"
_FNV_BASIS: Final = 2166136261
_FNV_PRIME: Final = 16777619


class Progress(Struct, frozen=True):
    """Progress of a partition's rollups, in snapshots of DuckLake. 0 stands for none: everything is to be computed.

    Attributes:
        samples: those committed up to this snapshot are in stored rollups of 10 s and 1 min.
        minutes: those committed up to this snapshot are in stored hours.
    """

    samples: int
    minutes: int


def partition_of(host: str, partitions: int) -> int:
    """Partition of a host, as the NATS server maps its subject: FNV-1a (32 bits) of the token, modulo their number."""
    found = _FNV_BASIS
    for byte in host.encode():
        found = ((found ^ byte) * _FNV_PRIME) & 0xFFFFFFFF
    return found % partitions


def number_of(part: str) -> int | None:
    """Number of the partition that a part is; None if it has no samples."""
    stream, _, number = part.partition("/")
    return int(number) if stream == _STREAM and number.isdecimal() else None


def table_of(number: int) -> str:
    """Table of a partition's progress."""
    return f"store.{PREFIX}{number}"


def create(connection: DuckDBPyConnection, partitions: int, progress: Progress) -> None:
    """Create the missing tables of all partitions, each with some progress."""
    for number in range(partitions):
        table = table_of(number)
        connection.execute(f"CREATE TABLE IF NOT EXISTS {table} (fence UBIGINT, samples BIGINT, minutes BIGINT)")
        if connection.execute(f"FROM {table}").fetchone() is None:
            connection.execute(f"INSERT INTO {table} VALUES (0, ?, ?)", [progress.samples, progress.minutes])


def reset(connection: DuckDBPyConnection, partitions: int) -> None:
    """Have all rollups computed again from the samples."""
    for number in range(partitions):
        connection.execute(f"UPDATE {table_of(number)} SET samples = 0, minutes = 0")


def take_over(cursor: DuckDBPyConnection, number: int, fence: int) -> None:
    """Set the fence of a partition's new owner, in a transaction. A later owner's stays."""
    cursor.execute(f"UPDATE {table_of(number)} SET fence = ? WHERE fence < ?", [fence, fence])


def read(cursor: DuckDBPyConnection, number: int) -> Progress:
    """Progress of a partition."""
    row = cursor.execute(f"SELECT samples, minutes FROM {table_of(number)}").fetchone() or (0, 0)
    return Progress(int(row[0]), int(row[1]))


def write(cursor: DuckDBPyConnection, number: int, fence: int, progress: Progress) -> None:
    """Rewrite the row, in the transaction that writes rollups.

    Raises:
        Deposed: the partition has another owner.
    """
    row = cursor.execute(f"SELECT fence FROM {table_of(number)}").fetchone()
    if row is None or row[0] != fence:
        raise Deposed(f"the rollups of {_STREAM}/{number} have another owner")
    cursor.execute(
        f"UPDATE {table_of(number)} SET fence = fence, samples = ?, minutes = ?", [progress.samples, progress.minutes]
    )


def oldest_needed(connection: DuckDBPyConnection) -> int | None:
    """Oldest snapshot after which a partition still has to read what was committed; None if there is none."""
    tables = connection.execute(
        "SELECT table_name FROM duckdb_tables() WHERE database_name = 'lake' AND schema_name = 'store' "
        f"AND starts_with(table_name, '{PREFIX}')"
    ).fetchall()
    if not tables:
        return None
    rows = " UNION ALL ".join(f"SELECT unnest([samples, minutes]) AS snapshot FROM store.{name}" for (name,) in tables)
    row = connection.execute(f"SELECT min(snapshot) FROM ({rows}) WHERE snapshot > 0").fetchone()
    return None if row is None or row[0] is None else int(row[0])
