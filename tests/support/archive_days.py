"""Days of samples for the archive."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from corral.processors.ingest.columnar import SCHEMA
from corral.processors.storage import Database

DAY_US = 86_400_000_000


FIRST_US = 1_780_000_000_000_000 // DAY_US * DAY_US


SAMPLES_A_DAY = 1600


def samples(history: Database, day: int, count: int = SAMPLES_A_DAY) -> pa.Table:
    """A day of samples of eight devices, whose power tells them apart: 1, 2, 3, …"""
    numbers = [history.series.number("h1", f"GPU-{at}") for at in range(8)]
    columns: dict[str, list[Any]] = {
        "time": [FIRST_US + day * DAY_US + at // 8 * 1_000_000 for at in range(count)],
        "series": [numbers[at % 8] for at in range(count)],
        "power_watts": [float(1 + at) for at in range(count)],
        "energy_millijoules": [at * 10 for at in range(count)],
    }
    return pa.table({f.name: pa.array(columns.get(f.name, [None] * count), f.type) for f in SCHEMA})
