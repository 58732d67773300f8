"""A history of known use: five leases around January 2026 as in Berlin, their samples, requests and a preemption."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
from corral.processors.ingest.columnar import SCHEMA
from corral.processors.storage import Batch, Database
from corral.processors.storage.embedded import rollups
from support.empty_history import new_database

START: Final = datetime(2025, 12, 31, 23, tzinfo=UTC)
END: Final = datetime(2026, 1, 31, 23, tzinfo=UTC)
HOUR: Final = timedelta(hours=1)
GIB: Final = 2**30
PRICES: Final = """
currency = "EUR"
energy_kwh = 0.30
[gpu_hour]
"*H100*" = 2.005
"*T4*" = 0.355
"""
DEVICES: Final = {"d1": "NVIDIA H100 80GB HBM3", "d2": "Tesla T4", "d3": "GB10", "d4": "NVIDIA H100 80GB HBM3"}
LEASES: Final = (
    # id, group, owner, begin, end, state, devices and shares
    ("l1", "lab/vision", "ann", START - HOUR / 2, START + 1.5 * HOUR, "evicted", {"d1": 1.0, "d4": 1.0}),
    ("l2", "lab/nlp", "ben", END - HOUR / 3, END + 5 * HOUR, "released", {"d2": 0.5}),
    ("l3", None, "ann", START + 3 * HOUR, START + 5 * HOUR, "released", {"d3": 1.0}),
    ("l4", "lab/vision", "ann", END - HOUR, None, "active", {"d1": 1.0}),
    ("l5", "lab/nlp", "ben", END + HOUR, END + 2 * HOUR, "released", {"d1": 1.0}),
)


def usage_history(folder: Path) -> Database:
    """Store it in a new file of a folder."""
    database = new_database(folder)
    cursor = database.cursor()
    for lease_id, group, owner, begin, end, state, devices in LEASES:
        cursor.execute(
            "INSERT INTO leases BY NAME SELECT ? AS lease_id, ? AS group_name, ? AS owner, 'train' AS name, "
            "? AS granted_at, ? AS ended_at, ? AS expires_at, ? AS state",
            [lease_id, group, owner, begin, end, END + 12 * HOUR, state],
        )
        for device, share in devices.items():
            cursor.execute(
                "INSERT INTO lease_devices BY NAME SELECT ? AS lease_id, 'h1' AS host, ? AS device, ? AS model, "
                "? AS share, ? AS memory_bytes",
                [lease_id, device, DEVICES[device], share, 40 * GIB],
            )
    cursor.execute(
        "INSERT INTO lease_events BY NAME SELECT 'l1' AS lease_id, 'ann' AS owner, 'evicted' AS state, ? AS time, "
        "? AS preemption_notified_at",
        [START + 1.5 * HOUR, START + HOUR],
    )
    for outcome, owner, group, lease_id, wait_seconds, expected in (
        ("granted", "ann", "lab/vision", "l1", 60, 3600.0),
        ("granted", "ann", "lab/vision", "l4", 0, None),
        ("timed_out", "ben", "lab/nlp", None, 600, 7200.0),
        ("refused", "ben", "lab/nlp", None, 0, 7200.0),
    ):
        cursor.execute(
            "INSERT INTO requests BY NAME SELECT ? AS outcome, ? AS owner, ? AS group_name, ? AS lease_id, "
            "2 AS gpus, ? AS asked_at, ? AS ended_at, ? AS expected_seconds, ['*H100*'] AS models",
            [outcome, owner, group, lease_id, START, START + timedelta(seconds=wait_seconds), expected],
        )
    _sample(database)
    return database


def _sample(database: Database) -> None:
    """Samples of l1's devices, every ten seconds for an hour before and two hours after: one is idle, 360 W each."""
    rows: list[dict[str, Any]] = [
        {"time": START - HOUR + timedelta(seconds=second), "series": database.series.number("h1", device),
         "gpu_utilization_percent": load, "power_watts": 360.0, "memory_used_bytes": 10 * GIB}
        for second in range(0, 3 * 3600, 10) for device, load in (("d1", 90.0), ("d4", 1.0))
    ]  # fmt: skip
    columns = {field.name: [row.get(field.name) for row in rows] for field in SCHEMA}
    database.commit(Batch(stream="S", sequence=1, samples=pa.table(columns, schema=SCHEMA)))
    for level in rollups.LEVELS:
        rollups.refresh(database.cursor(), level, sorted(database.days))
