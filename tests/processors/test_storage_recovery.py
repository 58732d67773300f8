"""A damaged database is found at the start, put aside, and made anew of what is left, the archive and the streams."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pytest
from corral.processors.ingest.columnar import Incoming
from corral.processors.storage import Database, Maintenance, StorageError
from corral.processors.storage.embedded import recovery
from corral.processors.storage.embedded.rollups import LEVELS
from support.feed import Feed
from support.sorted_days import sort_all

HEADERS, BLOCK = 3 * 4096, 262_144
DAY_NS = 86_400 * 10**9


def spoil(path: Path, block: int) -> None:
    """Turn the bits of some bytes in the middle of a block, as a disk does."""
    at = HEADERS + block * BLOCK + BLOCK // 2
    with path.open("r+b") as file:
        file.seek(at)
        found = file.read(64)
        file.seek(at)
        file.write(bytes((byte + 37 * number + 11) % 256 for number, byte in enumerate(found)))


def numbers(database: Database) -> dict[str, Any]:
    cursor = database.cursor()
    found = {
        "samples": cursor.execute("SELECT count(*), count(DISTINCT (device, time)), sum(power_watts) FROM samples"),
        "10s": "SELECT count(*), sum(samples) FROM rollup_10s",
        "1h": "SELECT count(*), sum(samples), round(sum(power_watts_mean), 3) FROM rollup_1h",
    }
    return {
        name: cursor.execute(sql).fetchone() if isinstance(sql, str) else sql.fetchone() for name, sql in found.items()
    }


def rolled_up(database: Database) -> Maintenance:
    maintenance = Maintenance(database)
    for level in LEVELS:
        maintenance.roll_up(level)
    return maintenance


@pytest.fixture
def feed() -> Feed:
    return Feed()


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Incoming]]:
    """The folder of a closed history of an archived day and the present one, and all of it as the stream has it."""
    folder, feed = tmp_path_factory.mktemp("closed"), Feed()
    database = Database(folder / "history.duckdb")
    feed.publish(5, ago_days=4, ticks=100)
    feed.publish(20, ticks=450)
    messages = feed.messages
    feed.messages = messages[:15]
    feed.store(database)
    maintenance = rolled_up(database)
    maintenance.housekeeping(datetime.now(UTC))
    sort_all(database)
    feed.messages = messages
    feed.store(database)
    maintenance = rolled_up(database)
    assert database.cursor().execute("SELECT count(*) FROM store.archive_files").fetchone() != (0,)
    (folder / "before.json").write_text(json.dumps(numbers(database)))
    database.close()
    return folder, feed.messages


@pytest.fixture
def history(closed: tuple[Path, list[Incoming]], tmp_path: Path, feed: Feed) -> Path:
    """A copy of that history, with its stream in `feed`."""
    folder, messages = closed
    feed.messages = messages[:]
    return shutil.copytree(folder, tmp_path / "data") / "history.duckdb"


def before(path: Path) -> dict[str, Any]:
    return {name: tuple(values) for name, values in json.loads((path.parent / "before.json").read_text()).items()}


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-5), name


def test_a_sound_database_is_left_alone(history: Path) -> None:
    assert recovery.bad_blocks(history) == []
    assert recovery.examine(history) == ""
    database = Database(history)
    same(numbers(database), before(history))
    database.close()
    assert not list(history.parent.glob("*.damaged-*"))


def blocks_of(path: Path, table: str) -> list[int]:
    """The blocks that hold a table's columns, of those that are not shared with another one."""
    with duckdb.connect(str(path), read_only=True) as connection:
        rows = connection.execute(
            "SELECT block_id, count(*) FROM pragma_storage_info(?) "
            "WHERE persistent AND block_id >= 0 GROUP BY block_id ORDER BY 2 DESC",
            [table],
        ).fetchall()
    return [block for block, _ in rows]


@pytest.mark.long
@pytest.mark.parametrize("victim", ["store.samples", "store.samples_sorted", "store.rollup_1m", "the catalogue"])
def test_a_spoilt_block_is_found_and_everything_is_there_once(history: Path, feed: Feed, victim: str) -> None:
    day = f"store.samples_{datetime.now(UTC):%Y%m%d}"
    with duckdb.connect(str(history), read_only=True) as connection:
        tables = [
            f"{row[0]}.{row[1]}"
            for row in connection.execute("SELECT schema_name, table_name FROM duckdb_tables()").fetchall()
        ]
    if victim == "the catalogue":
        used = {block for table in tables for block in blocks_of(history, table)}
        blocks = (history.stat().st_size - HEADERS) // BLOCK
        block = next(number for number in range(blocks) if number not in used)
    else:
        block = blocks_of(history, victim.replace("store.samples", day))[0]
    spoil(history, block)
    assert recovery.bad_blocks(history) == [block]
    database = Database(history)
    feed.store(database)
    maintenance = rolled_up(database)
    for _ in range(3):
        maintenance.roll_up_archived()
    same(numbers(database), before(history))
    database.settle_recovery()
    database.close()
    if victim != "the catalogue":  # whose free blocks are as good as any
        report = json.loads(recovery.report_file(history).read_text())
        assert report["lost"] == {}
        assert report["replay"] == ("samples" in victim)
        assert Path(report["aside"]).exists()


def test_without_its_head_it_is_rebuilt_from_archive_and_stream(history: Path, feed: Feed) -> None:
    with history.open("r+b") as file:
        file.write(b"\0" * HEADERS)
    database = Database(history)
    feed.store(database)
    maintenance = rolled_up(database)
    for _ in range(5):
        maintenance.roll_up_archived()
    same(numbers(database), before(history))
    database.close()


def test_what_neither_archive_nor_stream_has_is_told_to_the_sample(history: Path, feed: Feed) -> None:
    spoil(history, blocks_of(history, f"store.samples_{datetime.now(UTC):%Y%m%d}")[0])
    gone = feed.messages
    feed.messages = []  # the stream has dropped them all
    database = Database(history)
    there = numbers(database)["samples"][0]
    database.settle_recovery()
    database.close()
    report = json.loads(recovery.report_file(history).read_text())
    assert 0 < there < before(history)["samples"][0]
    assert sum(report["lost"].values()) == before(history)["samples"][0] - there
    assert gone


def test_a_damaged_log_is_put_aside_and_its_batches_are_read_again(tmp_path: Path, feed: Feed) -> None:
    path = tmp_path / "history.duckdb"
    database = Database(path)
    feed.publish(2, ago_days=0.01)
    feed.store(database)
    database.close()
    # As kill -9 leaves it: what came since is in the log alone.
    child = (
        "import os, sys, pickle\nfrom pathlib import Path\nfrom corral.processors.storage import Database\n"
        "sys.path.insert(0, sys.argv[3])\nfrom support.feed import Feed\n"
        "feed = Feed()\nfeed.messages = pickle.loads(Path(sys.argv[2]).read_bytes())\n"
        "database = Database(Path(sys.argv[1]))\nfeed.store(database)\nos._exit(9)\n"
    )
    feed.publish(2)
    (tmp_path / "feed").write_bytes(pickle.dumps(feed.messages))
    subprocess.run(
        [sys.executable, "-c", child, str(path), str(tmp_path / "feed"), str(Path(__file__).parents[1])], timeout=60
    )
    log = path.with_name(path.name + ".wal")
    size = log.stat().st_size
    with log.open("r+b") as file:
        file.seek(size // 3)
        file.write(b"\xff" * 200)
    database = Database(path)
    feed.store(database)
    rows = 4 * 200 * 16
    assert numbers(database)["samples"][:2] == (rows, rows)
    database.close()


def test_a_damaged_file_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.duckdb"
    with duckdb.connect(str(path)) as other:
        other.execute("CREATE TABLE t AS SELECT range AS a, random() AS b FROM range(500000)")
    spoil(path, 2)
    spoilt = path.read_bytes()
    with pytest.raises(StorageError, match="history of Corral"):
        Database(path)
    assert path.read_bytes() == spoilt
