"""Counters over silences, nulls, resets and glitches, with the growth that each has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
from corral.processors.ingest.columnar import SCHEMA, TIME_TYPE
from corral.processors.storage import Batch, Database
from corral.processors.storage.embedded.rollups import LEVELS
from corral.processors.storage.lake.lake import LakePart

START = 1_780_000_000  # 2026-05-28 20:26:40: an hour begins 2000 s later


Story = tuple[str, list[int], list[int | None], int]
"""A metric, the seconds of its samples, their values, and what they add up to."""


def counter_stories() -> dict[str, Story]:
    """What may happen to a counter, by name, each with what is known of it."""
    joule = 1000
    base = 22_543_283_000
    minute = [base + 52 * joule * at for at in range(60)]
    away = [*range(10), *range(1210, 1220)]  # seconds: twenty minutes of silence
    stories: dict[str, Story] = {}

    def tell(name: str, metric: str, seconds: list[int], values: list[int | None], grown: int) -> None:
        stories[name] = (metric, seconds, values, grown)

    def energy(name: str, change: dict[int, int | None], grown: int = 59 * 52 * joule) -> None:
        values: list[int | None] = [change.get(at, value) for at, value in enumerate(minute)]
        tell(name, "energy_millijoules", list(range(60)), values, grown)

    energy("steady", {})
    energy("zero once", {15: 0})
    energy("low for three seconds", {15: 200_000, 16: 200_000, 17: 200_000})
    energy("a hair lower at the turn of a bucket", {10: minute[9] - 1})
    energy("a hair lower in a bucket", {25: minute[24] - 1})
    energy("all ones once", {25: 2**32 - 1})
    energy("far too high once", {33: 2**52})
    energy("null for half of it", dict.fromkeys(range(20, 50)))
    energy("zero to begin with", {0: 0}, 58 * 52 * joule)
    reloaded = {at: 52 * joule * (at - 30) for at in range(30, 60)}
    energy("driver loaded anew", dict(reloaded), (29 + 29) * 52 * joule)
    tell(
        "counter over a silence",
        "energy_millijoules",
        away,
        [base + 600 * joule * at for at in away],
        1219 * 600 * joule,
    )
    tell(
        "rebooted in a silence",
        "energy_millijoules",
        away,
        [base + at * joule if at < 10 else (at - 1000) * 300 * joule for at in away],
        9 * joule + 219 * 300 * joule,
    )
    tell("errors over a reboot", "ecc_uncorrected_count", away, [0 if at < 10 else 7 for at in away], 7)
    tell("errors since a reboot", "ecc_uncorrected_volatile_count", away, [3 if at < 10 else 2 for at in away], 2)
    slow = [5 if at // 10 != 2 else 0 for at in range(60)]
    tell("errors gone for one slow reading", "ecc_corrected_count", list(range(60)), list(slow), 0)
    tell(
        "replays all ones once",
        "pcie_replay_count",
        list(range(60)),
        [2**32 - 1 if at == 9 else 3 for at in range(60)],
        0,
    )
    held = [10**9 * at for at in away]
    tell("held back over a silence", "power_violation_nanoseconds", away, list(held), 1219 * 10**9)
    return stories


def tell_stories(storage: Database | LakePart, stream: str, refresh: Callable[[], None]) -> None:
    """Store them, and see that each adds up to what it should, in every rollup."""
    stories = counter_stories()
    tables: list[pa.Table] = []
    for name, (metric, seconds, values, _) in stories.items():
        columns: dict[str, Any] = {field.name: pa.nulls(len(seconds), field.type) for field in SCHEMA}
        columns["time"] = pa.array([(START + at) * 1_000_000 for at in seconds], pa.int64()).cast(TIME_TYPE)
        columns["series"] = pa.array([storage.series.number("h", name)] * len(seconds), pa.int32())
        columns[metric] = pa.array(values, pa.int64())
        tables.append(pa.table(columns, SCHEMA))
    # In two parts, so that some of each is known, and rolled up, before the rest.
    for sequence, part in enumerate((slice(0, 16), slice(16, None)), start=1):
        cut = pa.concat_tables(table[part] for table in tables)
        storage.commit(Batch(stream=stream, sequence=sequence, samples=cut))
        refresh()
    sums = ", ".join(
        f"sum({metric}_increase)::BIGINT AS {metric}" for metric in {story[0] for story in stories.values()}
    )
    for level in LEVELS:
        found = storage.cursor().execute(f"SELECT device, {sums} FROM rollup_{level.name} GROUP BY device")
        names = [column[0] for column in found.description]
        grown = {row[0]: dict(zip(names, row, strict=True)) for row in found.fetchall()}
        assert {name: grown[name][story[0]] for name, story in stories.items()} == {
            name: story[3] for name, story in stories.items()
        }, level.name
