"""Rollups recomputed from samples in plain Python, from the definition of each aggregate, and samples to try it on."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pyarrow as pa
from corral.processors.ingest.columnar import SCHEMA
from corral.processors.storage.rollup_columns import HOUR, Level

from .counter_stories import START

COLUMNS = (
    "gpu_utilization_percent",
    "power_watts",
    "memory_used_bytes",
    "energy_millijoules",
    "throttle_reasons_bitmask",
    "performance_state",
)
Rows = dict[tuple[int, int], dict[str, Any]]
"""Values by (second, device)."""

VALUES: dict[str, Any] = {
    "gpu_utilization_percent": lambda dice: float(dice.randint(0, 100)),
    "power_watts": lambda dice: dice.choice([0.0, 0.1, 55.5, 312.25, 700.0]),
    "memory_used_bytes": lambda dice: dice.choice([0, dice.randint(0, 2**40)]),
    "energy_millijoules": lambda dice: dice.choice(
        [dice.randint(0, 5), dice.randint(0, 100), 10**9 + dice.randint(0, 100), dice.randint(0, 2**50)]
    ),
    "throttle_reasons_bitmask": lambda dice: dice.randint(0, 2**20),
    "performance_state": lambda dice: dice.randint(0, 15),
}


def some_rows(dice: random.Random, rising: bool) -> Rows:
    """Samples about the turn of an hour, minutes after it, and after gaps of any length; any metric may be null.

    A counter that rises is the same whenever its samples come.
    """
    places = [*range(1980, 2020), *range(2055, 2062), *range(2090, 2400, 13), 0, 5700, 300_000]
    found = {
        (dice.choice(places), dice.randint(0, 1)): {
            name: draw(dice) for name, draw in VALUES.items() if dice.random() < 0.8
        }
        for _ in range(dice.randint(0, 25))
    }
    for (second, _), values in found.items():
        if rising and "energy_millijoules" in values:
            values["energy_millijoules"] = 7 * (second + 1)
    return found


def compare(level: Level, found: list[dict[str, Any]], expected: dict[tuple[int, str], dict[str, Any]]) -> None:
    """Check stored rows of a level against those that `recomputed` gives."""
    assert len(found) == len(expected)
    for got in found:
        wanted = expected[got["at"], got["device"]]
        for name, value in wanted.items():
            if value is None:
                assert got[name] is None, (level.name, name, got, wanted)
            elif name.endswith("_p95") and level is HOUR:
                near = {"abs_tol": 0.5} if "percent" in name else {"rel_tol": 0.01}
                assert math.isclose(got[name], value, **near), (level.name, name, got, wanted)
            else:
                close = math.isclose(got[name], value, rel_tol=1e-6, abs_tol=1e-12)
                assert close, (level.name, name, got, wanted)


def samples_table(rows: Rows, series: list[int]) -> pa.Table:
    """Samples as ingest commits them, of the devices with these numbers."""
    columns: dict[str, list[Any]] = {
        "time": [(START + second) * 1_000_000 for second, _ in rows],
        "series": [series[device] for _, device in rows],
    }
    for field in list(SCHEMA)[2:]:
        columns[field.name] = [found.get(field.name) for found in rows.values()]
    return pa.table(columns, schema=SCHEMA)


def recomputed(rows: Rows, width: int) -> dict[tuple[int, str], dict[str, Any]]:
    """Aggregates of each bucket in plain Python, from the definition of each."""
    growth = _growth(rows)
    buckets: dict[tuple[int, str], list[tuple[int, int, dict[str, Any]]]] = {}
    for (second, device), found in sorted(rows.items()):
        at = (START + second) // width * width
        buckets.setdefault((at, f"GPU-{device}"), []).append((second, device, found))
    expected: dict[tuple[int, str], dict[str, Any]] = {}
    for key, members in buckets.items():
        wanted: dict[str, Any] = {"samples": len(members)}
        for name in COLUMNS:
            present = [found[name] for _, _, found in members if name in found]
            last = present[-1] if present else None
            wanted[f"{name}_last"] = last
            if name in ("gpu_utilization_percent", "power_watts", "memory_used_bytes"):
                wanted[f"{name}_count"] = len(present)
                wanted[f"{name}_mean"] = sum(present) / len(present) if present else None
                wanted[f"{name}_p95"] = sorted(present)[math.ceil(0.95 * len(present)) - 1] if present else None
            if name not in ("energy_millijoules", "throttle_reasons_bitmask"):
                wanted[f"{name}_min"] = min(present, default=None)
                wanted[f"{name}_max"] = max(present, default=None)
            if name == "throttle_reasons_bitmask" and present:
                mask = 0
                for value in present:
                    mask |= value
                wanted[f"{name}_any"] = mask
            if name == "energy_millijoules":
                wanted[f"{name}_increase"] = (
                    sum(growth.get((second, device), 0) for second, device, _ in members) if present else None
                )
        expected[key] = wanted
    return expected


def _growth(rows: Rows) -> dict[tuple[int, int], int]:
    """How much the counter grew up to each sample since the reading before, by the words of docs/counters.md."""
    growth: dict[tuple[int, int], int] = {}
    for device in (0, 1):
        readings = [
            (second, rows[second, device]["energy_millijoules"])
            for second in sorted(second for second, owner in rows if owner == device)
            if "energy_millijoules" in rows[second, device]
        ]
        stood = [list(members) for _, members in itertools.groupby(readings, key=lambda reading: reading[1])]
        passing = {
            at
            for at in range(1, len(stood) - 1)
            if stood[at + 1][0][0] - stood[at - 1][-1][0] <= 120
            and (earlier := stood[at - 1][0][1]) <= (later := stood[at + 1][0][1])
            and not earlier <= stood[at][0][1] <= later
        }
        kept = [members for at, members in enumerate(stood) if at not in passing]
        for earlier, later in itertools.pairwise(kept):
            second, value = later[0]
            minutes = (START + second) // 60 - (START + earlier[-1][0]) // 60
            most = 5_000_000 * 60 * (1 + minutes)
            grown = value - earlier[0][1]
            if grown >= 0:
                growth[second, device] = grown if grown <= most else 0
            elif value <= most and value <= earlier[0][1] * (0.99 if minutes > 2 else 0.5):
                growth[second, device] = value
    return growth
