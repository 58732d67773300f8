"""Nothing is deleted by one clock alone, and of no table more than a day in a run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import pytest
from corral.processors.ingest import facts
from corral.processors.ingest.columnar import Incoming
from corral.processors.ingest.deduplication import Arrivals
from corral.processors.storage import Batch, Database, Maintenance, Retention, retention
from corral.processors.storage.embedded.rollups import LEVELS
from corral.schemas import codec, subjects
from corral.schemas.telemetry import AgentReport, ProcessBatch, ProcessSample
from hypothesis import given
from hypothesis import strategies as st
from support.archive_days import DAY_US, FIRST_US, samples

DAYS = 5
FIRST = datetime.fromtimestamp(FIRST_US / 1e6, UTC)
NEWEST = FIRST + timedelta(days=DAYS - 1, seconds=1)
"""Much earlier than this machine's clock, as for a processor whose clock is months ahead."""
TABLES = ("rollup_10s", "rollup_1m", "rollup_1m_bins", "rollup_1h", "processes", "agents", "samples")
DAY = 86400.0
KEPT = Retention(raw=DAY, archive=2 * DAY, ten_seconds=DAY, minutes=DAY, hours=DAY, processes=DAY)

times = st.datetimes(datetime(2020, 1, 1), datetime(2030, 1, 1), timezones=st.just(UTC))


@given(times, st.none() | times, st.none() | times, st.floats(0, 400 * 86400.0))
def test_what_is_old_is_old_by_every_clock(
    now: datetime, server: datetime | None, newest: datetime | None, seconds: float
) -> None:
    horizon = retention.agreed(now, server, newest)
    if server is None or newest is None:
        assert horizon is None
        return
    assert horizon is not None
    limit = horizon.before(seconds)
    assert all(limit <= clock - timedelta(seconds=seconds) for clock in (now, server, newest))
    oldest = limit - timedelta(days=3)
    assert horizon.upto(limit, oldest) <= retention.end_of_day(oldest)
    assert bool(retention.disagreement(now, server)) == (abs(now - server) > retention.APART)


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Database(tmp_path_factory.mktemp("closed") / "history.duckdb")
    for day in range(DAYS):
        at = FIRST_US * 1000 + day * DAY_US * 1000
        said = {"host": "h1", "agent": "a", "time_ns": at}
        processes = ProcessBatch(**said, sequence=2 * day + 1, processes=[ProcessSample(device="GPU-0", pid=1)])
        report = AgentReport(**said, sequence=2 * day + 2)
        messages = [
            (subjects.processes_subject("h1"), codec.encode(processes)),
            (subjects.agent_subject("h1"), codec.encode(report)),
        ]
        found = facts.decode([Incoming(*message, 1) for message in messages], Arrivals().is_new, at)
        made.commit(Batch(stream="S", sequence=day + 1, samples=samples(made, day, 80), tables=found.tables()))
    care = Maintenance(made, KEPT)
    for level in LEVELS:
        care.roll_up(level)
    made.close()
    return made.path


@pytest.fixture
def made(closed: Path, tmp_path: Path) -> Iterator[Database]:
    """A history of five days."""
    opened = Database(Path(shutil.copy(closed, tmp_path)))
    yield opened
    opened.close()


def days_of(made: Database) -> dict[str, set[int]]:
    """Which days each table has, counted from the first."""
    cursor = made.cursor()
    found: dict[str, set[int]] = {}
    for table in TABLES:
        rows = cursor.execute(f"SELECT DISTINCT time::DATE FROM {table}").fetchall()
        found[table] = {(day - FIRST.date()).days for (day,) in rows}
    return found


def unknown() -> datetime | None:
    return None


@pytest.mark.long
@pytest.mark.parametrize("server_now", [unknown, lambda: FIRST, lambda: NEWEST])
def test_a_processor_whose_clock_is_far_ahead_takes_nothing_for_old(
    made: Database, server_now: Callable[[], datetime | None]
) -> None:
    before = days_of(made)
    kept = Retention(raw=DAYS * 86400.0, archive=DAYS * 86400.0, minutes=DAYS * 86400.0, processes=DAYS * 86400.0)
    care = Maintenance(made, kept, server_now=server_now)
    for _ in range(3):
        care.housekeeping()
    assert days_of(made) == before
    assert bool(care.held_back) == (server_now() is not None)
    if care.held_back:
        assert "ahead of that of the bus" in care.held_back
    # An hour that changes is computed anew from all its minutes: they are there.
    late = samples(made, DAYS - 1, 88).slice(80)
    made.commit(Batch(stream="S", sequence=99, samples=late))
    for level in LEVELS:
        care.roll_up(level)
    row = made.cursor().execute("SELECT sum(samples) FROM rollup_1h").fetchone()
    assert row == (DAYS * 80 + 8,)


@pytest.mark.long
def test_a_day_of_each_table_goes_in_a_run_until_all_that_is_old_is_gone(made: Database) -> None:
    care = Maintenance(made, KEPT, server_now=lambda: datetime.now(UTC))
    seen = [days_of(made)]
    for _ in range(DAYS + 2):
        care.housekeeping()
        seen.append(days_of(made))
        for table in TABLES:
            gone = seen[-2][table] - seen[-1][table]
            assert len(gone) <= 1, table
            assert not gone or gone == {min(seen[-2][table])}, table
    assert seen[-1]["processes"] == {DAYS - 1}, "by the newest sample, though it is months old"
    assert seen[-1]["samples"] == {2, 3, 4}
    assert made.days == {f"{FIRST + timedelta(days=day):%Y%m%d}" for day in (DAYS - 2, DAYS - 1)}


@pytest.mark.long
def test_a_host_whose_clock_is_years_behind_keeps_no_day_from_its_turn(made: Database) -> None:
    care = Maintenance(made, KEPT, server_now=lambda: datetime.now(UTC))
    behind = FIRST_US * 1000 - 1000 * DAY_US * 1000
    for run in range(DAYS + 3):
        # It goes on sending while the days of all others grow old.
        batch = ProcessBatch(
            host="h2", agent="b", sequence=run + 1, time_ns=behind, processes=[ProcessSample(device="GPU-9", pid=1)]
        )
        message = Incoming(subjects.processes_subject("h2"), codec.encode(batch), 1)
        found = facts.decode([message], Arrivals().is_new, behind)
        made.commit(Batch(stream="S", sequence=100 + run, samples=samples(made, -1000, 8), tables=found.tables()))
        for level in LEVELS:
            care.roll_up(level)
        care.housekeeping()
    kept = {table: {day for day in days if day >= 0} for table, days in days_of(made).items()}
    assert all(kept[table] <= {DAYS - 2, DAYS - 1} for table in TABLES if table != "samples"), kept
    assert kept["samples"] == {2, 3, 4}
    assert {f"{FIRST + timedelta(days=day):%Y%m%d}" for day in (DAYS - 2, DAYS - 1)} == made.days


@pytest.mark.long
def test_who_forces_it_goes_by_one_clock_once(made: Database) -> None:
    care = Maintenance(made, KEPT, force=True)
    care.housekeeping()
    found = days_of(made)
    assert not found["processes"] | found["agents"]
    # The archive has days that were made just now: they are old by the time of their samples.
    assert not made.days
    made.commit(Batch(stream="S", sequence=99, samples=samples(made, 0, 8)))
    care.housekeeping()
    assert len(made.days) == 1
    with pytest.raises(duckdb.Error):
        made.cursor().execute("FROM store.nothing")
