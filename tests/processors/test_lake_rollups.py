"""Rollups of a lake equal a recomputation from its samples, whoever owns the partitions and whatever came between."""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from corral.bus.layout import ensure_layout
from corral.processors.ingest import partitions
from corral.processors.storage.errors import Deposed, StoragePaused
from corral.processors.storage.lake import lake as lakes
from corral.processors.storage.lake import maintenance, partition, progress
from corral.processors.storage.lake.partition import PartRollups
from corral.processors.storage.protocol import Batch
from corral.processors.storage.rollup_columns import LEVELS
from corral.schemas import subjects
from nats.aio.client import Client
from support.postgres import Postgres
from support.recomputed import Rows, compare, recomputed, samples_table, some_rows

pytestmark = pytest.mark.long

PARTITIONS = 2
HOSTS = 6


@pytest.fixture(autouse=True)
def _recent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the samples, which have a fixed time, for recent ones."""
    monkeypatch.setattr(partition, "OLD_US", 10**18)


def hosts_of(number: int) -> list[str]:
    """Hosts whose subjects are in a partition."""
    names = (f"h{at}" for at in itertools.count())
    return list(itertools.islice((n for n in names if progress.partition_of(n, PARTITIONS) == number), HOSTS))


class Owner:
    """The owner of one partition, in this process."""

    def __init__(self, lake: lakes.Lake, history: str, number: int) -> None:
        self.number = number
        self.part = lakes.LakePart(lake, history, f"CORRAL_PARTITIONS/{number}")
        self.rollups = PartRollups(self.part)
        self.sequence = self.part.resume("S", "made")

    def store(self, rows: dict[str, Rows]) -> None:
        tables = [
            samples_table(found, [self.part.series.number(host, f"GPU-{at}") for at in range(2)])
            for host, found in rows.items()
        ]
        self.sequence += 1
        self.part.commit(Batch(stream="S", sequence=self.sequence, samples=lakes.pa.concat_tables(tables)))

    def close(self) -> None:
        self.rollups.close()
        self.part.close()


def check(lake: lakes.Lake, stored: dict[str, Rows]) -> None:
    """Compare all levels with a recomputation."""
    with lakes.attach(lake, read_only=True) as reader:
        for level in LEVELS:
            found: dict[str, list[dict[str, Any]]] = {host: [] for host in stored}
            sql = f"SELECT epoch(time)::BIGINT AS at, * EXCLUDE (time) FROM rollup_{level.name}"
            for row in reader.execute(sql).to_arrow_table().to_pylist():
                # A metric that no sample of its rows had is not written, and counts nothing.
                found[row["host"]].append({k: 0 if v is None and k.endswith("_count") else v for k, v in row.items()})
            for host, rows in stored.items():
                compare(level, found[host], recomputed(rows, level.seconds))
        of_bins = "SELECT sum(n) FROM rollup_{}_bins WHERE metric = 'power_watts'"
        counts = {reader.execute(of_bins.format(name)).fetchone() for name in ("1m", "1h")}
        assert counts == {
            (sum("power_watts" in values for rows in stored.values() for values in rows.values()) or None,)
        }


@pytest.mark.parametrize("seed", range(3))
def test_rollups_are_what_raw_samples_say_whoever_owns_the_partitions(lake: lakes.Lake, seed: int) -> None:
    """Two partitions; late samples; owners that end in between, with or without writing what they have."""
    dice = random.Random(seed)
    history = lakes.prepare(lake, PARTITIONS)
    owners = [Owner(lake, history, number) for number in range(PARTITIONS)]
    stored: dict[str, Rows] = {host: {} for owner in owners for host in hosts_of(owner.number)}
    for _ in range(5):
        for at, owner in enumerate(owners):
            rows: dict[str, Rows] = {}
            for host in hosts_of(owner.number):
                found = {key: v for key, v in some_rows(dice, len(host) % 2 == 0).items() if key not in stored[host]}
                stored[host] |= found
                rows[host] = found
            owner.store(rows)
            if dice.random() < 0.7:
                owner.rollups.refresh(everything=dice.random() < 0.5)
            if dice.random() < 0.4:
                late = owner
                owners[at] = Owner(lake, history, owner.number)
                with pytest.raises(Deposed):
                    late.rollups.refresh(everything=True)
                late.close()
            elif dice.random() < 0.2:
                maintenance.once(lake, ["inlined rows", "files with deleted rows", "small files"])
    for owner in owners:
        owner.rollups.refresh(everything=True)
        owner.close()
    check(lake, stored)


def test_only_closed_minutes_are_written_and_late_samples_correct_them(lake: lakes.Lake) -> None:
    (host, *_) = hosts_of(0)
    owner = Owner(lake, lakes.prepare(lake, PARTITIONS), 0)
    stored: Rows = {
        (second, 0): {"power_watts": float(second), "energy_millijoules": 7 * second} for second in range(100)
    }
    owner.store({host: stored})
    # They begin with second 40 of a minute: those of 80 s are closed.
    assert owner.rollups.refresh() == 2
    with lakes.attach(lake, read_only=True) as reader:
        assert reader.execute("SELECT sum(samples) FROM rollup_1m").fetchone() == (80,)
        assert reader.execute("SELECT sum(samples), count(*) FROM rollup_10s").fetchone() == (80, 8)
    late: Rows = {(0, 1): {"power_watts": 1.0}, (-10, 0): {"power_watts": 700.0}}
    owner.store({host: late})
    # The minute of the first is written anew, and the other is the only one of its device.
    assert owner.rollups.refresh() == 1
    assert owner.rollups.refresh(everything=True) == 2
    owner.close()
    check(lake, {host: stored | late})


def test_a_clock_that_jumps_far_ahead_and_back(lake: lakes.Lake) -> None:
    (host, *_) = hosts_of(0)
    owner = Owner(lake, lakes.prepare(lake, PARTITIONS), 0)
    stored: Rows = {}

    def store(seconds: range) -> None:
        rows: Rows = {(second, 0): {"energy_millijoules": 50_000 + 7 * second} for second in seconds}
        stored.update(rows)
        owner.store({host: rows})
        owner.rollups.refresh()

    store(range(0, 150, 10))
    store(range(200_000, 200_150, 10))
    for begin in range(150, 900, 150):
        store(range(begin, begin + 150, 10))
    owner.rollups.refresh(everything=True)
    owner.close()
    check(lake, {host: stored})


def test_samples_beyond_the_memory_are_read_from_the_lake(lake: lakes.Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "MEMORY_BYTES", 1)
    monkeypatch.setattr(partition, "KEYS_AT_ONCE", 2)
    owner = Owner(lake, lakes.prepare(lake, PARTITIONS), 0)
    rows: dict[str, Rows] = {
        host: {(second, 0): {"energy_millijoules": 7 * second} for second in range(200)} for host in hosts_of(0)
    }
    owner.store(rows)
    owner.rollups.refresh()
    owner.rollups.refresh(everything=True)
    owner.close()
    check(lake, rows)


def test_a_catalog_that_is_away_loses_no_rollup(lake: lakes.Lake, postgres: Postgres) -> None:
    (host, *_) = hosts_of(0)
    owner = Owner(lake, lakes.prepare(lake, PARTITIONS), 0)
    rows: Rows = {(second, 0): {"energy_millijoules": 7 * second} for second in range(0, 200, 5)}
    owner.store({host: rows})
    owner.rollups.refresh()
    more: Rows = {(second, 0): {"energy_millijoules": 7 * second} for second in range(200, 400, 5)}
    owner.store({host: more})
    postgres.stop()
    with pytest.raises(StoragePaused):
        owner.rollups.refresh()
    postgres.start()
    owner.rollups.refresh(everything=True)
    owner.close()
    check(lake, {host: rows | more})


DYING = """
import sys
from corral.processors.storage.lake import lake as lakes
from corral.processors.storage.lake import partition, writing
sys.path.insert(0, sys.argv[3])
from support.recomputed import samples_table
from corral.processors.storage.protocol import Batch
where = lakes.Lake(sys.argv[1], sys.argv[2], threads=1)
part = lakes.LakePart(where, lakes.prepare(where, 2), "CORRAL_PARTITIONS/0")
rollups = partition.PartRollups(part)
sequence = part.resume("S", "made") + 1
first = 100 * sequence
rows = {(second, 0): {"energy_millijoules": 7 * second, "power_watts": 5.0} for second in range(first, first + 100)}
samples = samples_table(rows, [part.series.number(sys.argv[4], "GPU-0")])
part.commit(Batch(stream="S", sequence=sequence, samples=samples))
written = writing.write
def write(*args, **how):
    written(*args, **how)
    if sys.argv[5] == "in":
        print("in", flush=True)
        sys.stdin.readline()
writing.write = write
if sys.argv[5] == "before":
    print("before", flush=True)
    sys.stdin.readline()
try:
    rollups.refresh(everything=True)
except BaseException as error:
    print(type(error).__name__, flush=True)
else:
    print("written", flush=True)
"""


@pytest.mark.parametrize("ends", ["killed", "paused"])
@pytest.mark.parametrize("where", ["before", "in"])
def test_an_owner_that_is_killed_or_paused_before_its_rollups_are_committed(
    lake: lakes.Lake, ends: str, where: str
) -> None:
    """Its successor writes them, once; and it writes none when it wakes."""
    (host, *_) = hosts_of(0)
    lakes.prepare(lake, PARTITIONS)
    tests = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", DYING, lake.catalog, lake.data, tests, host, where]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline().strip() == where
        if ends == "killed":
            process.send_signal(signal.SIGKILL)
            process.wait()
        history = lakes.prepare(lake, PARTITIONS)
        owner = Owner(lake, history, 0)
        rows: Rows = {(second, 0): {"energy_millijoules": 7 * second, "power_watts": 5.0} for second in range(100, 200)}
        more: Rows = {(second, 0): {"energy_millijoules": 7 * second} for second in range(200, 230)}
        owner.store({host: more})
        owner.rollups.refresh(everything=True)
        if ends == "paused":
            process.stdin.write("\n" * 9)
            process.stdin.close()
            said = process.stdout.read().split()
            assert said[-1] == "Deposed"
        owner.close()
    check(lake, {host: rows | more})


def test_a_lake_of_version_4_goes_on_where_its_rollups_were(lake: lakes.Lake) -> None:
    history = lakes.prepare(lake, PARTITIONS)
    owners = [Owner(lake, history, number) for number in range(PARTITIONS)]
    stored: dict[str, Rows] = {}

    def store(seconds: range) -> None:
        for owner in owners:
            rows: dict[str, Rows] = {
                host: {(s, 0): {"energy_millijoules": 7 * s, "power_watts": 5.0} for s in seconds}
                for host in hosts_of(owner.number)
            }
            owner.store(rows)
            for host, found in rows.items():
                stored.setdefault(host, {}).update(found)

    store(range(0, 200, 10))
    for owner in owners:
        owner.rollups.refresh(everything=True)
    with lakes.attach(lake) as older:
        newest = lakes.current_snapshot(older)
        older.execute("CREATE TABLE store.rolled (level VARCHAR, snapshot BIGINT, steps BIGINT)")
        older.execute(f"INSERT INTO store.rolled VALUES ('10s', {newest}, 1), ('1m', {newest}, 1), ('1h', {newest}, 1)")
    store(range(200, 300, 10))
    for owner in owners:
        owner.close()
    with lakes.attach(lake) as older:
        for number in range(PARTITIONS):
            older.execute(f"DROP TABLE {progress.table_of(number)}")
        older.execute("UPDATE corral_meta SET value = '4' WHERE key = 'lake_version'")
        older.execute("DELETE FROM corral_meta WHERE key = 'options'")
    lakes.prepare(lake, PARTITIONS)
    owners = [Owner(lake, history, number) for number in range(PARTITIONS)]
    assert progress.read(owners[0].part.cursor(), 0).samples == newest
    store(range(300, 400, 10))
    for owner in owners:
        owner.rollups.refresh(everything=True)
        owner.close()
    check(lake, stored)
    # Everything anew, as after a change of columns.
    with lakes.attach(lake) as older:
        older.execute("UPDATE store.rollup_10s SET samples = 1; UPDATE store.rollup_1h SET samples = 1")
        progress.reset(older, PARTITIONS)
    for number in range(PARTITIONS):
        owner = Owner(lake, history, number)
        owner.rollups.refresh(everything=True)
        assert progress.read(owner.part.cursor(), number).samples > newest
        owner.close()
    check(lake, stored)


async def test_a_host_is_in_the_partition_that_the_server_puts_it_in(nc: Client) -> None:
    js = nc.jetstream()
    await ensure_layout(js)
    await partitions.ensure_stream(js, 7)
    hosts = ["h1", "gpu-node-17", "Zürich", "a_b", "x" * 60, *(f"n{at}" for at in range(20))]
    for host in hosts:
        await js.publish(subjects.samples_subject(host), b"")
    reader = await js.pull_subscribe("corral.>", stream=partitions.STREAM)
    found: dict[str, int] = {}
    while len(found) < len(hosts):
        for message in await reader.fetch(len(hosts), timeout=10):
            *_, number, host = message.subject.split(".")
            found[host] = int(number)
    assert found == {host: progress.partition_of(host, 7) for host in hosts}


def test_snapshots_that_a_partition_has_not_rolled_up_are_kept(
    lake: lakes.Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "SNAPSHOTS_KEPT", datetime.now(UTC) - datetime.now(UTC))
    history = lakes.prepare(lake, PARTITIONS)
    owners = [Owner(lake, history, number) for number in range(PARTITIONS)]
    rows: dict[str, Rows] = {}
    for begin in (0, 200):
        for owner in owners:
            (host, *_) = hosts_of(owner.number)
            found: Rows = {(s, 0): {"energy_millijoules": 7 * s} for s in range(begin, begin + 200, 10)}
            rows.setdefault(host, {}).update(found)
            owner.store({host: found})
        # One of them falls behind.
        for owner in owners if not begin else owners[:1]:
            owner.rollups.refresh(everything=True)
    assert maintenance.once(lake, ["old snapshots", "small files"]) == {}
    for owner in owners:
        owner.close()
        owner = Owner(lake, history, owner.number)
        owner.rollups.refresh(everything=True)
        owner.close()
    check(lake, rows)


def test_rollups_that_fail_are_reported(lake: lakes.Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner(lake, lakes.prepare(lake, PARTITIONS), 0)
    assert (owner.rollups.failing, owner.rollups.behind_seconds) == ("", 0.0)
    monkeypatch.setattr(partition, "BEHIND_SECONDS", -1.0)
    time.sleep(0.01)
    assert owner.rollups.behind_seconds > 0
    owner.close()
