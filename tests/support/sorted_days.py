"""Samples that are sorted at once, however few they are."""

from __future__ import annotations

from corral.processors.storage import Database
from corral.processors.storage.embedded import sorting
from corral.processors.storage.schema import CLOSED


def sort_all(history: Database) -> None:
    """Close the parts of all days, and sort those that rollups include."""
    cursor = history.cursor()
    for day in [part for part in sorted(history.days) if len(part) == 8]:
        sorting.close(history, cursor, day)
    for part in sorted(history.days):
        if part.endswith(CLOSED):
            sorting.sort(history, cursor, part[:8])
    cursor.close()
