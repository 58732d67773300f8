"""A database of an earlier version is opened, has what is new, and keeps what it had."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pytest
from corral.processors import views
from corral.processors.storage import Batch, Database
from support.history import known_since_version_3

NEW = {"agents": "samples", "devices": "mig_instance"}


def test_columns_that_are_new_are_added_to_old_tables(tmp_path: Path) -> None:
    file = tmp_path / "history.duckdb"
    found = known_since_version_3()

    def commit(history: Database, sequence: int) -> None:
        history.commit(
            Batch(stream="S", sequence=sequence, tables=found.tables(), inventories=found.inventories, messages=2)
        )

    history = Database(file)
    commit(history, 1)
    history.close()
    with duckdb.connect(str(file)) as old:
        for table, column in NEW.items():
            # DuckDB drops no column of a table that has a key.
            ((made,),) = old.execute("SELECT sql FROM duckdb_tables() WHERE table_name = ?", [table]).fetchall()
            without = made.replace(f", {column} BIGINT", "").replace(f", {column} INTEGER", "")
            assert without != made
            old.execute(f"CREATE TEMP TABLE kept AS SELECT * EXCLUDE ({column}) FROM {table}")
            old.execute(f"DROP TABLE {table}; {without}; INSERT INTO {table} FROM kept; DROP TABLE kept")
        old.execute("UPDATE corral_meta SET value = '2' WHERE key = 'version'")

    history = Database(file)
    cursor = history.cursor()
    assert cursor.execute("SELECT ticks, samples FROM agents").fetchall() == [(3, None)]
    assert cursor.execute("SELECT device, mig_profile, mig_instance FROM devices ORDER BY index").fetchall() == [
        ("GPU-1", "", None),
        ("MIG-1", "1g.10gb", None),
    ]
    commit(history, 2)
    assert cursor.execute("SELECT ticks, samples FROM agents ORDER BY samples NULLS FIRST").fetchall() == [
        (3, None),
        (3, 17),
    ]
    assert cursor.execute("SELECT device, mig_instance, present FROM devices ORDER BY index").fetchall() == [
        ("GPU-1", None, True),
        ("MIG-1", 5, True),
    ]
    history.close()


REPLACED = {
    "store.watermarks": "stream",
    "store.rolled": "level",
    "hosts": "host",
    "devices": "device",
    "leases": "lease_id",
}


def test_tables_whose_rows_are_replaced_lose_their_keys_and_keep_their_rows(tmp_path: Path) -> None:
    """DuckDB never takes deleted rows out of a table that has a key."""
    file = tmp_path / "history.duckdb"
    found = known_since_version_3()
    history = Database(file)
    history.commit(Batch(stream="S", sequence=7, inventories=found.inventories, messages=1))
    history.close()
    kept: dict[str, list[tuple[object, ...]]] = {}
    with duckdb.connect(str(file)) as old:
        for table, key in REPLACED.items():
            kept[table] = old.execute(f"FROM {table} ORDER BY ALL").fetchall()
            old.execute(f"ALTER TABLE {table} ADD PRIMARY KEY ({key})")
        old.execute("UPDATE corral_meta SET value = '3' WHERE key = 'version'")
    history = Database(file)
    cursor = history.cursor()
    assert {table: cursor.execute(f"FROM {table} ORDER BY ALL").fetchall() for table in REPLACED} == kept
    keyed = cursor.execute("SELECT table_name FROM duckdb_constraints() WHERE constraint_type = 'PRIMARY KEY'")
    assert sorted(name for (name,) in keyed.fetchall()) == ["corral_meta", "metrics", "series"]
    assert history.watermarks() == {"S": 7}
    history.close()


def test_views_are_made_anew_where_they_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "history.duckdb"
    Database(file).close()
    with monkeypatch.context() as changed:
        changed.setattr(views, "install", lambda _: pytest.fail("they are there"))
        Database(file).close()
    # As another Corral leaves it, with views of its own.
    with duckdb.connect(str(file)) as other:
        other.execute("CREATE OR REPLACE VIEW usage_by_owner AS SELECT 1 AS one")
        other.execute("CREATE OR REPLACE VIEW questions AS SELECT 'usage_by_owner' AS view, '?' AS question")
    history = Database(file)
    assert {row[0] for row in history.cursor().execute("DESCRIBE usage_by_owner").fetchall()} == set(
        views.VIEWS["usage_by_owner"].columns
    )
    history.close()
