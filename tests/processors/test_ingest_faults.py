"""The real `corral process` killed, starved of disk, and given files that are not its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest
from corral.bus.connect import connect
from corral.bus.layout import ensure_layout
from corral.cli.local.server import EmbeddedServer
from corral.schemas import codec, subjects
from nats.aio.client import Client
from support.empty_history import empty_history
from support.history import Asking, sample_batch


class Processor:
    """A processor as a process of its own."""

    def __init__(self, db: Path, url: str) -> None:
        self.db = db
        self.url = url
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "corral.cli.main", "process", "--db", str(self.db)]
        with (self.db.parent / "processor.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--nats", self.url], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)


@pytest.fixture
def processor(server: EmbeddedServer, tmp_path: Path) -> Iterator[Processor]:
    (tmp_path / "db").mkdir()
    found = Processor(Path(shutil.copy(empty_history(), tmp_path / "db" / "history.duckdb")), server.url)
    yield found
    found.kill()


async def answering(nc: Client, processor: Processor, seconds: float = 60.0) -> Asking:
    assert processor.process is not None
    deadline = time.monotonic() + seconds
    asking = Asking(nc)
    while time.monotonic() < deadline and processor.process.poll() is None:
        with contextlib.suppress(Exception):
            await asking.status()
            return asking
        await asyncio.sleep(0.05)
    log = (processor.db.parent / "processor.log").read_text()
    raise AssertionError(f"no processor answers (exit code {processor.process.poll()}): {log[-4000:]}")


async def test_kill_in_mid_stream_stores_each_sample_once(nc: Client, processor: Processor) -> None:
    js = nc.jetstream()
    messages = 1500
    done = asyncio.Event()
    # Each sample has a time of its own: batches at the clock's time, of ticks a second apart, meet by chance.
    began_ns = time.time_ns() - 60 * 10**9

    async def publish() -> None:
        for sequence in range(1, messages + 1):
            host = f"h{sequence % 5}"
            start_ns = began_ns + sequence * 10**7
            batch = sample_batch(host, sequence, devices=2, ticks=2, start_ns=start_ns, step_ns=10**6)
            await js.publish(subjects.samples_subject(host), codec.encode(batch))
        done.set()

    publishing = asyncio.create_task(publish())
    kills = 0
    while kills < 4 or not done.is_set():
        processor.start()
        # At a different point of its life each time, the start included.
        await asyncio.sleep((0.35, 0.8, 1.3)[kills % 3])
        processor.kill()
        kills += 1
    await publishing
    processor.start()
    asking = await answering(nc, processor)
    await asking.until("SELECT count(*) FROM samples", messages * 4)
    assert await asking.rows("SELECT count(DISTINCT (host, device, time)) FROM samples") == [[messages * 4]]
    await asking.until("SELECT sum(samples) FROM rollup_1m", messages * 4)
    assert processor.stop() == 0
    # What it leaves is a plain DuckDB file that says the same.
    with duckdb.connect(str(processor.db), read_only=True) as left:
        assert left.execute("SELECT count(*) FROM samples").fetchone() == (messages * 4,)


async def test_a_full_disk_pauses_ingest_and_loses_nothing(nc: Client, processor: Processor) -> None:
    """A limit on the size of files stands for the disk; it is raised while the processor runs."""
    js = nc.jetstream()
    sent = 0

    async def publish(messages: int) -> None:
        nonlocal sent
        for _ in range(messages):
            sent += 1
            batch = sample_batch("h1", sent, devices=64, ticks=30, noisy=True)
            await js.publish(subjects.samples_subject("h1"), codec.encode(batch))

    processor.start()
    assert processor.process is not None
    asking = await answering(nc, processor)
    await publish(10)
    await asking.until("SELECT count(*) > 0 FROM samples", True)
    resource.prlimit(processor.process.pid, resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY))
    deadline = time.monotonic() + 20
    while not (paused := (await asking.status()).paused) and time.monotonic() < deadline:
        await publish(20)
    assert "nothing can be written to" in paused
    await publish(20)
    resource.prlimit(processor.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await asking.until("SELECT count(*) FROM samples", sent * 64 * 30)
    assert (await asking.status()).paused == ""


def refusal(db: Path, url: str) -> str:
    """What the command says where it can't start."""
    ended = subprocess.run(
        [sys.executable, "-m", "corral.cli.main", "process", "--db", str(db), "--nats", url],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 1, ended.stderr
    return ended.stderr.strip().splitlines()[-1]


def test_files_that_are_not_ours_are_refused_and_left_alone(server: EmbeddedServer, tmp_path: Path) -> None:
    other = tmp_path / "other.duckdb"
    with duckdb.connect(str(other)) as connection:
        connection.execute("CREATE TABLE accounts AS SELECT 1 AS id")
    assert "is not a history of Corral: it holds main.accounts" in refusal(other, server.url)

    newer = tmp_path / "newer.duckdb"
    with duckdb.connect(str(newer)) as connection:
        connection.execute("CREATE TABLE corral_meta (key VARCHAR PRIMARY KEY, value VARCHAR)")
        connection.execute("INSERT INTO corral_meta VALUES ('program', 'corral'), ('version', '999')")
    assert "written by a newer Corral (its tables have version 999" in refusal(newer, server.url)

    text = tmp_path / "notes.txt"
    text.write_text("not a database at all\n" * 1000)
    assert "is not a DuckDB database" in refusal(text, server.url)
    assert text.read_text() == "not a database at all\n" * 1000

    taken = tmp_path / "taken.duckdb"
    with duckdb.connect(str(taken)):
        said = refusal(taken, server.url)
    assert "is in use by" in said
    assert str(os.getpid()) in said


AS_NOBODY = """
import os, sys
from pathlib import Path
from corral.processors.storage import Database, StorageError
os.setuid(65534)
for path in sys.argv[1:]:
    try:
        Database(Path(path))
    except StorageError as error:
        print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as a user who may not write here")
def test_a_folder_that_may_not_be_written_is_named() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, "/var/corral-test/history.duckdb", "/var/history.duckdb"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    made, written = ended.stdout.splitlines()
    assert made == "/var/corral-test can't be made: Permission denied"
    assert written.startswith("/var/history.duckdb can't be written by user 65534")


@pytest.mark.long
async def test_a_snapshot_is_taken_with_the_command_while_ingest_goes_on(
    nc: Client, processor: Processor, tmp_path: Path
) -> None:
    js = nc.jetstream()
    for sequence in range(1, 101):
        batch = sample_batch("h1", sequence, devices=8, ticks=60, noisy=True)
        await js.publish(subjects.samples_subject("h1"), codec.encode(batch))
    processor.start()
    asking = await answering(nc, processor)
    await asking.until("SELECT count(*) FROM samples", 48_000)
    # Any quantile of any devices, from the bins.
    await asking.until("SELECT sum(n) FROM rollup_1m_bins WHERE metric = 'power_watts'", 48_000)
    [[low, exact]] = await asking.rows(
        "SELECT (SELECT weighted_quantile(list({value: value, n: n}), 0.99) FROM rollup_1m_bins "
        "WHERE metric = 'power_watts'), (SELECT quantile_disc(power_watts, 0.99) FROM samples)"
    )
    assert low == pytest.approx(exact, rel=0.01)

    out = tmp_path / "copy.duckdb"
    command = [sys.executable, "-m", "corral.cli.main", "snapshot", str(out), "--nats", processor.url]
    taking = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    _, said = await taking.communicate()
    assert taking.returncode == 0, said
    assert b"48,000 samples" in said
    with duckdb.connect(str(out), read_only=True) as copy:
        assert copy.execute("SELECT count(*) FROM samples").fetchone() == (48_000,)
    assert not list(processor.db.with_name("history.duckdb.snapshots").glob("*.duckdb"))
    again = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    assert b"exists already" in (await again.communicate())[1]
    assert again.returncode == 2


async def test_a_server_that_dies_and_returns_loses_and_doubles_nothing(
    server: EmbeddedServer, processor: Processor
) -> None:
    began_ns = time.time_ns() - 60 * 10**9

    async def publish(first: int, last: int) -> Asking:
        nc = await connect(server.url, name="test")
        await ensure_layout(nc.jetstream())
        for sequence in range(first, last):
            start_ns = began_ns + sequence * 10**7
            payload = codec.encode(sample_batch("h1", sequence, start_ns=start_ns, step_ns=10**6))
            await nc.jetstream().publish(subjects.samples_subject("h1"), payload)
        return await answering(nc, processor)

    processor.start()
    before = await publish(1, 100)
    server.kill()
    server.start()
    asking = await publish(100, 200)
    await asking.until("SELECT count(*) FROM samples", 199 * 12)
    assert await asking.rows("SELECT count(DISTINCT (device, time)) FROM samples") == [[199 * 12]]
    assert (await asking.status()).duplicates == 0
    await before.nc.close()
    await asking.nc.close()
