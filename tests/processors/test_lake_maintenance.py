"""The lake looks after itself: what is old goes, files stay few, and a crash at any point loses no row."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from corral.processors.ingest import partitions
from corral.processors.ingest.columnar import Decoder, Incoming
from corral.processors.storage.lake import lake as lakes
from corral.processors.storage.lake import maintenance
from corral.processors.storage.lake.progress import partition_of
from corral.processors.storage.protocol import Arrival, Batch
from corral.processors.storage.retention import Retention
from corral.schemas import codec, subjects
from support.history import sample_batch
from support.lake_owner import Owned
from support.postgres import Postgres

PART = "CORRAL_PARTITIONS/0"
DAYS = 3
KEPT = 2


def fill(lake: lakes.Lake, days: int = DAYS, times: int = 1, *, rolled_up: bool = True) -> None:
    """Batches with their rollups, of 8 devices and 60 ticks at 06:00 of each of the last days, today not among them."""
    part = Owned(lake, lakes.prepare(lake, 1), PART)
    sequence = part.watermarks()[PART]
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    for day in range(days, 0, -1):
        for at in range(times):
            start = midnight - timedelta(days=day) + timedelta(hours=6, minutes=at)
            message = sample_batch("h1", sequence + 1, devices=8, ticks=60, start_ns=int(start.timestamp()) * 10**9)
            sequence += 1
            incoming = Incoming(subjects.samples_subject("h1"), codec.encode(message), sequence)
            table, _, refused = Decoder(part.series).decode([incoming], lambda *_: True, time.time_ns())
            assert not refused
            part.commit(Batch(stream=PART, sequence=sequence, samples=table, messages=1))
    if rolled_up:
        part.roll_up()
    part.close()


def retention(days: int) -> Retention:
    return Retention(raw=3600.0, archive=days * 86400.0, ten_seconds=days * 86400.0, minutes=None)


pytestmark = pytest.mark.long

CRASHING = """
import sys
from corral.processors.storage.lake import lake, maintenance
from corral.processors.storage.retention import Retention
where = lake.Lake(sys.argv[1], sys.argv[2], threads=1)
kept = Retention(raw=3600.0, archive=float(sys.argv[3]), ten_seconds=float(sys.argv[3]), minutes=None)
print("ready", flush=True)
while True:
    maintenance.once(where, None, kept)
    print("once", flush=True)
"""


def test_killed_at_any_point_maintenance_loses_nothing_and_deletes_what_is_expired(lake: lakes.Lake) -> None:
    fill(lake, times=2)
    dice = random.Random(7)
    for kept in (DAYS, KEPT, KEPT):
        # The first life compacts, the others delete too.
        command = [sys.executable, "-c", CRASHING, lake.catalog, lake.data, str(kept * 86400)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(dice.uniform(0.05, 2.5))
            process.kill()
    maintenance.once(lake, None, retention(KEPT))
    reader = lakes.attach(lake)
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    rows = reader.execute(
        "SELECT time::DATE AS day, count(*), sum(gpu_utilization_percent) FROM samples GROUP BY day ORDER BY day"
    ).fetchall()
    assert [(str(day), count) for day, count, _ in rows] == [
        (f"{midnight - timedelta(days=day):%Y-%m-%d}", 2 * 480) for day in range(KEPT, 0, -1)
    ]
    expected = "SELECT count(*) FROM samples WHERE gpu_utilization_percent IS NOT NULL"
    assert reader.execute(expected).fetchone() == (2 * KEPT * 480,)
    # Rollups of 10 s go with them, those of 1 min stay, and both say what the samples say.
    for level, days in (("10s", KEPT), ("1m", DAYS)):
        found = reader.execute(
            f"SELECT count(DISTINCT time::DATE), sum(samples), sum(samples) FILTER (time >= ?) FROM rollup_{level}",
            [midnight - timedelta(days=KEPT)],
        ).fetchone()
        assert found == (days, days * 2 * 480, KEPT * 2 * 480), level
    # What the crashes have left: files that nobody knows, which go once no transaction can be under way any more.
    reader.execute("CALL ducklake_expire_snapshots('lake', older_than => now())")
    reader.execute("CALL ducklake_cleanup_old_files('lake', cleanup_all => true)")
    reader.execute("CALL ducklake_delete_orphaned_files('lake', cleanup_all => true)")
    on_disk = sorted(str(path) for path in Path(lake.data).rglob("*.parquet"))
    known = [
        name
        for schema, table in reader.execute(
            "SELECT schema_name, table_name FROM duckdb_tables() WHERE database_name = 'lake'"
        ).fetchall()
        for row in reader.execute(f"FROM ducklake_list_files('lake', '{table}', schema => '{schema}')").fetchall()
        for name in (row[0], row[4])
        if name
    ]
    assert on_disk == sorted(known)
    assert reader.execute(expected).fetchone() == (2 * KEPT * 480,)
    reader.close()


def test_files_stay_few_however_often_rollups_are_corrected(lake: lakes.Lake) -> None:
    lakes.prepare(lake, 1)
    for _ in range(3):
        # The same minutes again: each time their rollups are written anew.
        fill(lake, days=1)
        maintenance.once(lake, ["inlined rows", "files with deleted rows", "small files"])
    reader = lakes.attach(lake)
    files = dict(reader.execute("SELECT table_name, file_count FROM ducklake_table_info('lake')").fetchall())
    assert reader.execute("SELECT max(samples) FROM rollup_10s").fetchone() == (30,)
    assert {name: count for name, count in files.items() if count > 3} == {}
    reader.close()


def test_a_lake_in_object_storage(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real S3 server: ingest, maintenance, retention, and a confined reader."""
    server = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    from corral.processors.storage.lake.readers import for_readers

    door = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    door.start()
    try:
        host, port = door.get_host_and_port()
        url = f"http://{host}:{port}"
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
            monkeypatch.delenv(name, raising=False)
        catalog = postgres.database(f"lake_{time.time_ns()}")
        lake = lakes.Lake(catalog, "s3://corral/history", threads=1)
        with pytest.raises(lakes.StorageError, match="set AWS_ACCESS_KEY_ID"):
            lakes.prepare(lake, 1)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(lakes.StorageError, match="Is the bucket there"):
            lakes.prepare(lake, 1)
        with pytest.raises(lakes.StorageError, match="s3://bucket/prefix"):
            lakes.prepare(lakes.Lake(catalog, "ftp://corral/history"), 1)
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
        client.create_bucket(Bucket="corral")
        fill(lake, times=2)
        maintenance.once(lake, ["retention", "inlined rows", "small files", "old files"], retention(KEPT))
        found = client.list_objects_v2(Bucket="corral")["Contents"]
        assert any(entry["Key"].startswith("history/main/samples/") for entry in found)
        reader = for_readers(lake)
        reader.execute("USE lake")
        assert reader.execute("SELECT count(*), count(DISTINCT time::DATE) FROM samples").fetchone() == (
            KEPT * 960,
            KEPT,
        )
        assert reader.execute("SELECT sum(samples) FROM rollup_1m").fetchone() == (DAYS * 960,)
        client.put_object(Bucket="corral", Key="other.csv", Body=b"a\n1\n")
        for refused in ("FROM read_csv('s3://corral/other.csv')", "FROM read_text('/etc/passwd')"):
            with pytest.raises(lakes.duckdb.PermissionException):
                reader.execute(refused).fetchall()
        reader.close()
    finally:
        with contextlib.suppress(Exception):
            door.stop()


WRITERS = 8
SECONDS = float(os.environ.get("CORRAL_LAKE_SECONDS", "5"))
"""An hour where somebody has it: `CORRAL_LAKE_SECONDS=3600`."""


@pytest.mark.timeout(SECONDS + 600)
def test_maintenance_succeeds_while_eight_partitions_write(lake: lakes.Lake, postgres: Postgres) -> None:
    processor = lakes.prepare(lake, WRITERS)
    stop = threading.Event()
    sent = [0] * WRITERS
    old = datetime.now(UTC) - timedelta(days=5)
    failed: dict[str, str] = {}

    def write(number: int) -> None:
        part = Owned(lake, processor, f"CORRAL_PARTITIONS/{number}")
        host = next(host for at in itertools.count() if partition_of(host := f"h{at}", WRITERS) == number)
        while not stop.is_set():
            sequence = sent[number] + 1
            start_ns = int(old.timestamp()) * 10**9 + sequence * 10**10 if sequence <= 3 else None
            message = sample_batch(host, sequence, devices=4, ticks=2, start_ns=start_ns)
            incoming = Incoming(subjects.samples_subject(host), codec.encode(message), sequence)
            table, _, _ = Decoder(part.series).decode([incoming], lambda *_: True, time.time_ns())
            seen = [Arrival(f"run-{host}", sequence, 1)]
            part.commit(Batch(stream="x", sequence=sequence, samples=table, arrivals=seen, messages=1))
            sent[number] = sequence
            if sequence % 3 == 0:
                part.rollups.refresh()
            stop.wait(partitions.LINGER_SECONDS)
        part.close()

    with ThreadPoolExecutor(WRITERS) as threads:
        writing = [threads.submit(write, number) for number in range(WRITERS)]
        try:
            until = time.monotonic() + SECONDS
            while min(sent) < 5 or time.monotonic() < until:
                if any(each.done() for each in writing):
                    break
                time.sleep(min(30.0, SECONDS / 50))
                if min(sent) >= 5:
                    before, failed = failed, maintenance.once(lake, None, retention(KEPT))
                    # What a writer came between in one round gets through in the next, as `LakeMaintenance` tells it.
                    assert {name: why for name, why in failed.items() if name in before} == {}
            if failed:
                assert maintenance.once(lake, None, retention(KEPT)) == {}
            rows_after = inlined(lake, postgres)
        finally:
            stop.set()
        for each in writing:
            each.result()
    reader = lakes.attach(lake)
    # What was old is gone, all else is there once, and the newest of each run is among what is left of arrivals.
    assert (
        reader.execute("SELECT count(*), count(DISTINCT (device, time)) FROM samples").fetchone()
        == (8 * (sum(sent) - 3 * WRITERS),) * 2
    )
    high = dict(reader.execute("SELECT stream, max(high) FROM store.arrivals GROUP BY stream").fetchall())
    assert high == {f"CORRAL_PARTITIONS/{number}": count for number, count in enumerate(sent)}
    # Only what came while the last round ran; and however long it ran, files stay few.
    assert rows_after < 3000
    files = dict(reader.execute("SELECT table_name, file_count FROM ducklake_table_info('lake')").fetchall())
    assert {name: count for name, count in files.items() if count > 12} == {}
    reader.close()


def inlined(lake: lakes.Lake, postgres: Postgres) -> int:
    """Rows that lie in PostgreSQL, those of the past among them."""
    connection = lakes.duckdb.connect()
    lakes.load(connection)
    connection.execute(f"ATTACH '{lake.catalog.removeprefix('postgres:')}' AS pg (TYPE postgres, READ_ONLY)")
    tables = connection.execute(
        "SELECT table_name FROM duckdb_tables() WHERE database_name = 'pg' "
        "AND regexp_full_match(table_name, 'ducklake_inlined_data_[0-9]+_[0-9]+')"
    ).fetchall()
    found = 0
    for (name,) in tables:
        ((rows,),) = connection.execute(f"SELECT count(*) FROM pg.{name}").fetchall()
        found += rows
    connection.close()
    return found


def test_a_table_that_fails_stops_none_behind_it_and_is_reported(lake: lakes.Lake) -> None:
    fill(lake, days=1, times=2)
    assert maintenance.once(lake, ["inlined rows"]) == {}
    fill(lake, days=1, times=2)
    assert maintenance.once(lake, ["inlined rows"]) == {}
    reader = lakes.attach(lake)

    def files(table: str) -> int:
        schema = "main" if table == "samples" else "store"
        rows = reader.execute(f"FROM ducklake_list_files('lake', '{table}', schema => '{schema}')").fetchall()
        return len(rows)

    before = files("samples")
    assert before > 1
    # The first tables by name are spoilt: a file of theirs is gone.
    name = reader.execute("SELECT data_file FROM ducklake_list_files('lake', 'samples')").fetchone()
    assert name is not None
    watermarks = files("watermark_corral_partitions_0")
    Path(name[0]).unlink()
    care = maintenance.LakeMaintenance(lake, Retention(), server_now=lambda: datetime.now(UTC))
    failed = maintenance.once(lake, ["files with deleted rows", "large files"])
    assert set(failed) == {"large files"}
    assert failed["large files"].startswith("samples: ")
    assert Path(name[0]).name in failed["large files"]
    assert files("samples") == before
    assert watermarks == 1 or files("watermark_corral_partitions_0") < watermarks
    care._report(failed, ["large files"])  # pyright: ignore[reportPrivateUsage]
    assert care.failing == {}
    care._report(failed, ["large files"])  # pyright: ignore[reportPrivateUsage]
    assert care.failing == failed
    care._report({}, ["large files"])  # pyright: ignore[reportPrivateUsage]
    assert care.failing == {}
    reader.close()
