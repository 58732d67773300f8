"""Rollups equal a recomputation from raw samples, in whatever order these came and however often one refreshed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from corral.processors.ingest.columnar import SCHEMA, TIME_TYPE
from corral.processors.storage import Batch, Database
from corral.processors.storage.embedded.rollups import LEVELS, MINUTE, TEN_SECONDS, Rollups, refresh
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.counter_stories import START, tell_stories
from support.empty_history import new_database
from support.recomputed import Rows, compare, recomputed, samples_table, some_rows
from support.sorted_days import sort_all

HOSTS = 50
"""In one example, each with its own fate: a refresh costs the same for one as for all."""

numbers = itertools.count(1)
ROLLUPS = Rollups()
"""Keeps the last readings of counters over all refreshes of the module, as a processor does."""


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    database = Database(tmp_path_factory.mktemp("rollups") / "history.duckdb")
    yield database
    database.close()


def test_rollups_are_what_raw_samples_say(history: Database) -> None:
    check_rollups(history, random.Random(1), [True, False, True])


@pytest.mark.long
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.randoms(use_true_random=False), st.lists(st.booleans(), min_size=1, max_size=4))
def test_rollups_are_what_raw_samples_say_however_often_one_refreshed(
    history: Database, dice: random.Random, refresh_after_commit: list[bool]
) -> None:
    check_rollups(history, random.Random(dice.random()), refresh_after_commit)


def refresh_some(history: Database, dice: random.Random) -> None:
    """Refresh as a processor does, one that is killed now and then, or one whose levels have got out of step."""
    if dice.random() < 0.2:
        ROLLUPS.forget()
    if dice.random() < 0.3:
        ROLLUPS.refresh(history.cursor(), [dice.choice([TEN_SECONDS, MINUTE])], sorted(history.days))
    if dice.random() < 0.5:
        sort_all(history)  # as far as the samples are rolled up; those of the last commit wait
    _refresh(history, ROLLUPS)
    if dice.random() < 0.3:
        sort_all(history)


def check_rollups(history: Database, dice: random.Random, refresh_after_commit: list[bool]) -> None:
    """Store samples of `HOSTS` new hosts in as many commits, and compare each level with a recomputation."""
    example = next(numbers)
    hosts = [f"h{example}-{at}" for at in range(HOSTS)]
    stored: dict[str, Rows] = {host: {} for host in hosts}
    for refresh_now in refresh_after_commit:
        tables: list[pa.Table] = []
        for at, host in enumerate(hosts):
            fresh = {key: found for key, found in some_rows(dice, at % 2 == 0).items() if key not in stored[host]}
            stored[host] |= fresh
            tables.append(samples_table(fresh, [history.series.number(host, f"GPU-{at}") for at in range(2)]))
        sequence = history.watermarks().get("S", 0) + 1
        history.commit(Batch(stream="S", sequence=sequence, samples=pa.concat_tables(tables)))
        if refresh_now:
            refresh_some(history, dice)
    refresh_some(history, dice)

    for level in LEVELS:
        found: dict[str, list[dict[str, Any]]] = {host: [] for host in hosts}
        for row in (
            history.cursor()
            .execute(f"SELECT epoch(time)::BIGINT AS at, * EXCLUDE (time) FROM rollup_{level.name}")
            .to_arrow_table()
            .to_pylist()
        ):
            if row["host"] in found:
                found[row["host"]].append(row)
        for host in hosts:
            compare(level, found[host], recomputed(stored[host], level.seconds))


def test_a_counter_that_says_nonsense_stops_no_other_device(tmp_path: Path) -> None:
    storage = new_database(tmp_path)
    mad, sound = (storage.series.number("h", device) for device in ("mad", "sound"))
    rows: list[tuple[int, int, int]] = []
    for second in range(0, 7200, 5):
        rows += [(second, mad, 0 if second % 10 else 2**63 - 1), (second, sound, 1000 * second)]
    columns: dict[str, Any] = {field.name: pa.nulls(len(rows), field.type) for field in SCHEMA}
    columns["time"] = pa.array([(START + second) * 1_000_000 for second, _, _ in rows], pa.int64()).cast(TIME_TYPE)
    columns["series"] = pa.array([series for _, series, _ in rows], pa.int32())
    columns["energy_millijoules"] = pa.array([energy for _, _, energy in rows], pa.int64())
    storage.commit(Batch(stream="S", sequence=1, samples=pa.table(columns, SCHEMA)))
    _refresh(storage)
    for level in LEVELS:
        found = dict(
            storage.cursor()
            .execute(f"SELECT device, sum(energy_millijoules_increase) FROM rollup_{level.name} GROUP BY device")
            .fetchall()
        )
        assert found["sound"] == 1000 * 7195, level.name
    storage.close()


def test_growth_is_what_the_counter_says_over_silences_nulls_and_values_that_pass(tmp_path: Path) -> None:
    storage, kept = new_database(tmp_path), Rollups()
    tell_stories(storage, "S", lambda: _refresh(storage, kept))
    storage.close()


def test_an_hour_whose_minutes_are_gone_stays_as_it_was(tmp_path: Path) -> None:
    storage = Database(tmp_path / "history.duckdb")
    cursor = storage.cursor()
    hour = START + 2000

    def store(sequence: int, seconds: Iterable[int]) -> None:
        series = storage.series.number("h", "d")
        at = [hour + second for second in seconds]
        columns: dict[str, Any] = {field.name: pa.nulls(len(at), field.type) for field in SCHEMA}
        columns["time"] = pa.array([second * 1_000_000 for second in at], pa.int64()).cast(TIME_TYPE)
        columns["series"] = pa.array([series] * len(at), pa.int32())
        columns["power_watts"] = pa.array([100.0] * len(at), pa.float32())
        storage.commit(Batch(stream="S", sequence=sequence, samples=pa.table(columns, SCHEMA)))
        for level in LEVELS:
            refresh(cursor, level, sorted(storage.days), None, limit)

    day = 86400
    limit: datetime | None = None
    store(1, range(3000))
    # The device was silent, and its minutes are let go, before it comes back; then a sample of that hour comes late.
    limit = datetime.fromtimestamp(hour + 30 * day, UTC)
    cursor.execute("DELETE FROM store.rollup_1m WHERE time < ?", [limit])
    store(2, range(40 * day, 40 * day + 60))
    store(3, [3010])
    hours = "SELECT epoch(time)::BIGINT, samples FROM rollup_1h ORDER BY time"
    assert cursor.execute(hours).fetchall() == [(hour, 3000), (hour + 40 * day, 60)]
    store(4, range(40 * day + 60, 40 * day + 100))
    assert cursor.execute(hours).fetchall()[-1] == (hour + 40 * day, 100)
    storage.close()


def _refresh(history: Database, rollups: Rollups | None = None) -> None:
    """Refresh all levels, as one that has just started if no readings are kept."""
    (rollups or Rollups()).refresh(history.cursor(), LEVELS, sorted(history.days))
