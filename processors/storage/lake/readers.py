"""Read-only DuckDB instances of a lake, for those who ask."""

from __future__ import annotations

import threading
from pathlib import Path

from duckdb import DuckDBPyConnection

from .. import hardening
from .lake import RENEW_COMMITS, Lake, attach
from .object_storage import is_url


class Readers:
    """Cursors for readers of a lake, on an instance that is replaced after every `RENEW_COMMITS` cursors.

    DuckLake keeps what it has read of each snapshot for as long as it is attached. A replaced instance lives until its
    last cursor is closed.

    Args:
        lake: which.

    Raises:
        StorageError, StoragePaused: see `attach`.
    """

    def __init__(self, lake: Lake) -> None:
        self._lake = lake
        self._lock = threading.Lock()
        self._made = 0
        self._connection = for_readers(lake)

    def cursor(self) -> DuckDBPyConnection:
        """New cursor. May be called from any thread."""
        with self._lock:
            self._made += 1
            if self._made % RENEW_COMMITS == 0:
                # Not closed, since that would close its cursors too; it ends with the last of them.
                self._connection = for_readers(self._lake)
            made = self._connection.cursor()
        made.execute("USE lake")
        return made

    def close(self) -> None:
        """Close the current instance."""
        with self._lock:
            self._connection.close()


def for_readers(lake: Lake) -> DuckDBPyConnection:
    """Separate DuckDB instance that can't write to the lake, nor open anything but the lake's files."""
    connection = attach(lake, read_only=True)
    hardening.lock(connection, directories=[lake.data if is_url(lake.data) else Path(lake.data)])
    return connection
