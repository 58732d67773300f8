"""The write-ahead log stays small whoever reads meanwhile, and to read it takes no more memory than was given."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from corral.processors.ingest import facts
from corral.processors.ingest.columnar import Incoming
from corral.processors.storage import Batch, Database, Maintenance, Retention
from corral.processors.storage.embedded import database
from corral.processors.storage.embedded.rollups import LEVELS
from corral.processors.storage.protocol import HostClock
from corral.schemas import codec, subjects
from corral.schemas.requests import Lease, LeaseEvent, LeaseEventKind, LeaseState
from corral.schemas.telemetry import DeviceInfo, HostInfo, Inventory
from support.log_batches import MIDNIGHT, START_NS, samples


def listed(devices: list[tuple[str, str]], at: int) -> Batch:
    """What hosts list: each device with its host."""
    hosts = sorted({host for _, host in devices} | {"h1"})
    told = [
        (
            subjects.inventory_subject(host),
            Inventory(
                host=HostInfo(name=host),
                agent="a",
                time_ns=START_NS + at * 10**9,
                devices=[
                    DeviceInfo(uuid=uuid, host=host, index=n) for n, (uuid, on) in enumerate(devices) if on == host
                ],
            ),
        )
        for host in hosts
    ]
    messages = [
        Incoming(subject, codec.encode(body), n, None, START_NS + at * 10**9) for n, (subject, body) in enumerate(told)
    ]
    found = facts.decode(messages, lambda *_: True, START_NS + at * 10**9)
    assert not found.refused
    return Batch(stream="I", sequence=at, inventories=found.inventories, messages=len(messages))


def lease(kind: LeaseEventKind, state: LeaseState, at: int) -> Batch:
    held = Lease(
        lease_id="l1", owner="alice", name="", request_id="r", policy="pack", ttl_seconds=60.0, state=state,
        granted_at=MIDNIGHT, expires_at=MIDNIGHT + timedelta(seconds=60 + at),
        ended_at=MIDNIGHT + timedelta(seconds=at) if state is not LeaseState.ACTIVE else None, grants=[],
    )  # fmt: skip
    event = LeaseEvent(kind=kind, time=MIDNIGHT + timedelta(seconds=at), lease=held, planner="p")
    return Batch(stream="F", sequence=at, leases=[event], messages=1)


def house(history: Database) -> Maintenance:
    return Maintenance(history, Retention(raw=1e9, ten_seconds=86400.0, minutes=86400.0, processes=86400.0))


def roll_up(history: Database) -> None:
    for level in LEVELS:
        house(history).roll_up(level)


def prepared(history: Database) -> None:
    history.commit(samples(history, 1, START_NS))
    history.commit(samples(history, 2, START_NS + 3600 * 10**9))
    history.commit(listed([("GPU-1", "h1"), ("GPU-2", "h1")], 1))
    history.commit(listed([("GPU-1", "h1"), ("GPU-2", "h1"), ("GPU-1", "h2")], 2))
    history.commit(lease(LeaseEventKind.GRANTED, LeaseState.ACTIVE, 1))
    history.commit(Batch(stream="I", sequence=3, clocks=[HostClock("h1", 100.0, START_NS, None)]))
    roll_up(history)


WRITING: dict[str, Callable[[Database], object]] = {
    "samples": lambda history: history.commit(samples(history, 3, START_NS + 7200 * 10**9)),
    "a late sample before what was rolled up": lambda history: (
        history.commit(samples(history, 3, START_NS + 3540 * 10**9, ticks=2)),
        roll_up(history),
    ),
    "rollups": lambda history: (
        history.commit(samples(history, 3, START_NS + 7200 * 10**9)),
        roll_up(history),
    ),
    "a device that is gone": lambda history: history.commit(listed([("GPU-1", "h1")], 10)),
    "devices listed again by two hosts": lambda history: history.commit(
        listed([("GPU-1", "h1"), ("GPU-2", "h1"), ("GPU-1", "h2")], 11)
    ),
    "a lease that is renewed": lambda history: history.commit(lease(LeaseEventKind.RENEWED, LeaseState.ACTIVE, 2)),
    "a lease that ends": lambda history: history.commit(lease(LeaseEventKind.RELEASED, LeaseState.RELEASED, 3)),
    "a clock that is right again": lambda history: history.commit(
        Batch(stream="I", sequence=12, clocks=[HostClock("h1", 100.0, START_NS, START_NS + 10**9)])
    ),
    "retention": lambda history: house(history).housekeeping(datetime.now(UTC)),
}


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with some of everything, and no log."""
    history = Database(tmp_path_factory.mktemp("folded") / "history.duckdb")
    prepared(history)
    history.close()
    return history.path


@pytest.mark.parametrize("kind", WRITING)
def test_what_is_written_beside_a_reader_can_be_folded(kind: str, folded: Path, tmp_path: Path) -> None:
    history = Database(Path(shutil.copy(folded, tmp_path)))
    reader = history.cursor()
    reader.execute("BEGIN TRANSACTION")
    reader.execute("SELECT count(*) FROM samples").fetchall()
    before = history.watermarks()
    WRITING[kind](history)
    assert kind == "retention" or history.watermarks() != before
    history.cursor().execute("CHECKPOINT")
    assert history.path.with_name(history.path.name + ".wal").exists() is False
    reader.close()
    history.close()


@pytest.mark.long
def test_the_log_is_bounded_while_three_readers_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 2**20
    monkeypatch.setattr(database, "CHECKPOINT_BYTES", most)
    history = Database(tmp_path / "history.duckdb", threads=1)
    prepared(history)
    wal = history.path.with_name(history.path.name + ".wal")
    readers = [history.cursor() for _ in range(3)]
    for reader in readers:
        reader.execute("BEGIN TRANSACTION")
        reader.execute("SELECT count(*) FROM samples").fetchall()
    sizes: list[int] = []
    written = 0
    for number in range(3, 12):
        # At every moment two of them at least are under way.
        reader = readers[number % 3]
        reader.execute("COMMIT")
        reader.execute("BEGIN TRANSACTION")
        reader.execute("SELECT count(*) FROM samples").fetchall()
        batch = samples(history, number, START_NS + number * 3600 * 10**9, devices=40, ticks=200)
        assert batch.samples is not None
        history.commit(batch)
        history.commit(listed([("GPU-1", "h1"), ("GPU-2", "h1")], 20 + number))
        roll_up(history)
        sizes.append(wal.stat().st_size if wal.exists() else 0)
        written += batch.samples.nbytes
    assert written > 5 * most
    assert max(sizes) < 2 * most
    for reader in readers:
        reader.close()
    history.close()


OPENING = """
import resource, sys
from pathlib import Path
from corral.processors.storage import Database
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
history = Database(Path(sys.argv[1]), memory_bytes=int(sys.argv[2]) or None, threads=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, history.watermarks()["S"])
"""

WRITING_ALL = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from corral.processors.storage import Database
from corral.processors.storage.embedded import database
from msgspec.structs import replace
from support.log_batches import START_NS, samples
database.CHECKPOINT_BYTES = 2**34
history = Database(Path(sys.argv[1]), threads=1)
batch = samples(history, 1, START_NS, devices=100, ticks=1000)
for number in range(1, 31):
    history.commit(replace(batch, sequence=number))
os._exit(0)
"""


@pytest.mark.long
def test_a_start_keeps_its_memory_limit_while_it_reads_the_log(tmp_path: Path) -> None:
    file = tmp_path / "history.duckdb"
    subprocess.run([sys.executable, "-c", WRITING_ALL, str(file), str(Path(__file__).parents[1])], check=True)
    log = file.with_name(file.name + ".wal").stat().st_size
    assert log > 100 * 2**20
    command = [sys.executable, "-c", OPENING, str(file), str(32 * 2**20)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    grown, sequence = told.splitlines()[-1].split()
    assert sequence == "30"
    # It was the log and the rows that it makes, three times as much.
    assert int(grown) * 1024 < log, (grown, log)
