"""Attempts that readers must not succeed with: each function of DuckDB that is not allowed, and attempts by hand.

The guard has to refuse each. Then each is run without the guard, with locked settings in a read-only transaction, and
must change and reveal nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import psutil
import pytest
from corral.processors.query.guard import guard
from corral.processors.query.guard.allowlist import FUNCTIONS, OPERATORS, TABLE_FUNCTIONS
from corral.processors.query.guard.errors import QueryError
from corral.processors.query.guard.guard import SqlGuard
from corral.processors.query.guard.sandbox import Bounds
from corral.processors.storage import hardening

SECRET = "the-secret-of-the-host"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("confined")


@pytest.fixture(scope="module")
def database(place: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    for name in ("secret.csv", "secret.txt", "secret.json"):
        (place / name).write_text(f'{{"a": "{SECRET}"}}\n' if name.endswith("json") else f"a\n{SECRET}\n")
    duckdb.sql(f"COPY (SELECT '{SECRET}' AS a) TO '{place}/secret.parquet'")
    with duckdb.connect(str(place / "other.duckdb")) as other:
        other.execute(f"CREATE TABLE t AS SELECT '{SECRET}' AS a")
    archive = place / "archive"
    archive.mkdir()
    duckdb.sql(f"COPY (SELECT 1 AS n) TO '{archive}/day.parquet'")
    connection = duckdb.connect(str(place / "history.duckdb"))
    connection.execute("CREATE TABLE samples (time TIMESTAMPTZ, device VARCHAR, n INTEGER)")
    connection.execute("INSERT INTO samples VALUES (now(), 'gpu0', 1)")
    connection.execute("CREATE SCHEMA store; CREATE TABLE store.inner AS SELECT 1 AS n; CREATE SEQUENCE numbers")
    connection.execute(f"CREATE VIEW archived AS SELECT * FROM read_parquet(['{archive}/day.parquet'])")
    connection.execute("CREATE MACRO twice(x) AS 2 * x; CREATE MACRO thrice(x) AS x + x + x")
    connection.execute(f"CREATE VIEW wide AS SELECT {', '.join(f'n + {i} AS n{i}' for i in range(300))} FROM samples")
    hardening.lock(connection, directories=[archive], memory_bytes=256 * 2**20, spill_bytes=2**20)
    yield connection
    connection.close()


@pytest.fixture(scope="module")
def guarded(database: duckdb.DuckDBPyConnection) -> SqlGuard:
    return SqlGuard(database.cursor)


@pytest.fixture(scope="module")
def hasty(database: duckdb.DuckDBPyConnection) -> SqlGuard:
    """A guard that takes a tenth of a second of processor time to be too much."""
    return SqlGuard(database.cursor, bounds=Bounds(cpu_seconds=0.1))


def statements(place: Path) -> list[str]:
    """Attempts by hand; `{p}` is a folder with secrets, `history` the database."""
    text = """
        INSERT INTO samples VALUES (now(), 'x', 1)
        INSERT INTO samples BY NAME SELECT 1 AS n
        UPDATE samples SET n = 2
        DELETE FROM samples
        TRUNCATE samples
        MERGE INTO samples USING (SELECT 1 AS n) s ON samples.n = s.n WHEN MATCHED THEN DELETE
        DROP TABLE samples
        DROP VIEW archived
        DROP SCHEMA store CASCADE
        ALTER TABLE samples ADD COLUMN x INTEGER
        ALTER TABLE samples RENAME TO gone
        ALTER VIEW archived RENAME TO gone
        CREATE TABLE mine AS SELECT 1
        CREATE OR REPLACE TABLE samples AS SELECT 1
        CREATE TEMP TABLE mine AS SELECT 1
        CREATE VIEW mine AS SELECT 1
        CREATE OR REPLACE VIEW archived AS SELECT 2
        CREATE TEMP VIEW mine AS FROM read_csv('{p}/secret.csv')
        CREATE MACRO mine(x) AS x
        CREATE TEMP MACRO mine() AS TABLE FROM read_text('{p}/secret.txt')
        CREATE FUNCTION mine(x) AS x
        CREATE TYPE mine AS ENUM ('a')
        CREATE SCHEMA mine
        CREATE SEQUENCE mine
        CREATE INDEX mine ON samples (n)
        CREATE SECRET (TYPE http, BEARER_TOKEN 'x')
        CREATE PERSISTENT SECRET mine (TYPE http, BEARER_TOKEN 'x')
        DROP SECRET mine
        COMMENT ON TABLE samples IS 'x'
        ATTACH '{p}/other.duckdb' AS other
        ATTACH '{p}/other.duckdb' AS other (READ_ONLY)
        ATTACH DATABASE '{p}/new.duckdb'
        ATTACH ':memory:' AS mine
        ATTACH IF NOT EXISTS 'quack:127.0.0.1:9494' AS mine
        ATTACH 'postgres:host=127.0.0.1' AS mine (TYPE postgres)
        ATTACH 'sqlite:{p}/x.sqlite' AS mine (TYPE sqlite)
        ATTACH 'ducklake:{p}/x.ducklake' AS mine
        DETACH history
        USE memory
        USE store
        COPY samples TO '{p}/out.csv'
        COPY (SELECT 1) TO '{p}/out.parquet' (FORMAT parquet)
        COPY (SELECT 1) TO '{p}/archive/day.parquet' (FORMAT parquet)
        COPY samples FROM '{p}/secret.csv'
        COPY FROM DATABASE history TO memory
        EXPORT DATABASE '{p}/out'
        IMPORT DATABASE '{p}/out'
        INSTALL httpfs
        FORCE INSTALL httpfs FROM community
        INSTALL '{p}/evil.duckdb_extension'
        LOAD httpfs
        LOAD '{p}/evil.duckdb_extension'
        UPDATE EXTENSIONS
        SET memory_limit = '100GB'
        SET threads = 64
        SET GLOBAL enable_external_access = true
        SET enable_external_access = true
        SET lock_configuration = false
        SET allowed_directories = ['/']
        SET python_enable_replacements = true
        SET temp_directory = '{p}/tmp'
        SET log_query_path = '{p}/log'
        SET search_path = 'store'
        SET schema = 'store'
        SET VARIABLE mine = 1
        RESET memory_limit
        RESET lock_configuration
        PRAGMA database_list
        PRAGMA database_size
        PRAGMA show_tables
        PRAGMA table_info('samples')
        PRAGMA storage_info('samples')
        PRAGMA version
        PRAGMA platform
        PRAGMA user_agent
        PRAGMA enable_profiling
        PRAGMA profiling_output = '{p}/profile'
        PRAGMA enable_logging
        PRAGMA memory_limit = '1GB'
        PRAGMA enable_verification
        PRAGMA force_checkpoint
        PRAGMA import_database('{p}')
        CALL pragma_version()
        CALL duckdb_settings()
        CALL force_checkpoint()
        CALL enable_logging()
        CALL read_text('{p}/secret.txt')
        CHECKPOINT
        FORCE CHECKPOINT
        VACUUM
        VACUUM ANALYZE samples
        ANALYZE
        BEGIN
        BEGIN TRANSACTION READ WRITE
        COMMIT
        ROLLBACK
        PREPARE p AS SELECT 1
        EXECUTE p
        DEALLOCATE p
        SELECT 1; SELECT 2
        SELECT 1; DROP TABLE samples
        SELECT 1;; COMMIT; INSERT INTO samples VALUES (now(), 'x', 1)
        /* a */ SELECT 1 /* ; */; DELETE FROM samples --
        EXPLAIN ANALYZE INSERT INTO samples VALUES (now(), 'x', 1)
        EXPLAIN ANALYZE DELETE FROM samples
        EXPLAIN ANALYZE COPY samples TO '{p}/out.csv'
        EXPLAIN DROP TABLE samples
        EXPLAIN ANALYZE FROM archived
        EXPLAIN (ANALYZE, FORMAT json) FROM archived
        explain /* x */ analyze FROM archived
        EXPLAIN (ANALYZE) DELETE FROM samples
        EXPLAIN ANALYZE SELECT * FROM read_csv('{p}/secret.csv')
        DESCRIBE '{p}/secret.csv'
        DESCRIBE FROM read_csv('{p}/secret.csv')
        SUMMARIZE '{p}/secret.parquet'
        SUMMARIZE FROM read_parquet('{p}/secret.parquet')
        DESCRIBE store.inner
        SHOW DATABASES
        SHOW ALL DATABASES
        SHOW memory_limit
        SHOW secret_directory
        SHOW VARIABLES
        FROM '{p}/secret.csv'
        FROM "{p}/secret.csv"
        FROM '{p}/secret.json'
        FROM '{p}/secret.parquet'
        FROM '{p}/*.parquet'
        FROM '{p}/other.duckdb'
        FROM 'file://{p}/secret.csv'
        FROM 'http://127.0.0.1:1/secret.csv'
        FROM 'https://127.0.0.1:1/secret.parquet'
        FROM 's3://bucket/secret.parquet'
        FROM '/etc/passwd'
        FROM '/proc/self/environ'
        SELECT * FROM read_csv('/proc/self/environ')
        SELECT * FROM read_text('/etc/passwd')
        SELECT content FROM read_blob('{p}/secret.txt')
        SELECT * FROM read_csv_auto('{p}/secret.csv')
        SELECT * FROM read_json('{p}/secret.json')
        SELECT * FROM read_ndjson_objects('{p}/secret.json')
        SELECT * FROM parquet_scan('{p}/secret.parquet')
        SELECT * FROM read_parquet('{p}/archive/day.parquet')
        SELECT * FROM parquet_metadata('{p}/secret.parquet')
        SELECT * FROM parquet_file_metadata('{p}/archive/day.parquet')
        SELECT * FROM sniff_csv('{p}/secret.csv')
        SELECT * FROM read_duckdb('{p}/other.duckdb', table_name = 't')
        SELECT * FROM glob('{p}/*')
        SELECT * FROM glob('/home/*')
        SELECT * FROM "glob"('/etc/*')
        SELECT * FROM GLOB('/etc/*')
        SELECT * FROM "Read_Text"('{p}/secret.txt')
        SELECT * FROM main.read_text('{p}/secret.txt')
        SELECT * FROM system.main.read_text('{p}/secret.txt')
        SELECT * FROM pg_catalog.read_text('{p}/secret.txt')
        SELECT (SELECT content FROM read_text('{p}/secret.txt'))
        SELECT * FROM samples WHERE device IN (SELECT content FROM read_text('{p}/secret.txt'))
        SELECT * FROM samples, LATERAL (SELECT * FROM read_text('{p}/secret.txt'))
        SELECT [(SELECT content FROM read_text('{p}/secret.txt')) FOR x IN [1]]
        SELECT list_transform([1], lambda x: (SELECT max(content) FROM read_text('{p}/secret.txt')))
        SELECT CASE WHEN true THEN (SELECT content FROM read_text('{p}/secret.txt')) END
        SELECT n FROM samples ORDER BY (SELECT content FROM read_text('{p}/secret.txt'))
        SELECT n FROM samples LIMIT (SELECT count(*) FROM read_text('{p}/secret.txt'))
        SELECT n FROM samples GROUP BY (SELECT content FROM read_text('{p}/secret.txt')), n
        SELECT n FROM samples QUALIFY row_number() OVER (ORDER BY (SELECT content FROM read_text('{p}/secret.txt'))) = 1
        SELECT sum(n) FILTER ((SELECT count(*) FROM read_text('{p}/secret.txt')) > 0) FROM samples
        SELECT sum(n) OVER (PARTITION BY (SELECT content FROM read_text('{p}/secret.txt'))) FROM samples
        WITH x AS (FROM read_text('{p}/secret.txt')) FROM x
        WITH x AS MATERIALIZED (FROM read_text('{p}/secret.txt')) FROM x
        WITH RECURSIVE x AS (SELECT 1 AS a UNION ALL SELECT a + 1 FROM x, read_text('{p}/secret.txt')) FROM x
        SELECT 1 UNION ALL SELECT count(*) FROM read_text('{p}/secret.txt')
        (SELECT 1) EXCEPT (SELECT count(*) FROM read_text('{p}/secret.txt'))
        VALUES ((SELECT content FROM read_text('{p}/secret.txt')))
        PIVOT (FROM read_csv('{p}/secret.csv')) ON a IN ('x') USING count(*)
        UNPIVOT (FROM read_csv('{p}/secret.csv')) ON a
        PIVOT samples ON device
        FROM (DESCRIBE FROM read_csv('{p}/secret.csv'))
        FROM samples POSITIONAL JOIN read_csv('{p}/secret.csv')
        FROM samples ASOF JOIN read_csv('{p}/secret.csv') c ON samples.n >= c.a
        FROM samples SEMI JOIN read_csv('{p}/secret.csv') c ON samples.device = c.a
        FROM read_csv('{p}/secret.csv') TABLESAMPLE 10%
        FROM query('SELECT 1')
        FROM query('FROM read_text(''{p}/secret.txt'')')
        FROM query_table('samples')
        FROM query_table(['samples', 'store.inner'])
        FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))
        SELECT json_serialize_plan('FROM read_text(''{p}/secret.txt'')')
        SELECT json_deserialize_sql(json_serialize_sql('SELECT 1'))
        FROM store.inner
        FROM history.store.inner
        FROM "store"."inner"
        FROM memory.main.samples
        FROM temp.main.samples
        FROM system.main.duckdb_settings
        FROM duckdb_settings
        FROM duckdb_settings()
        FROM duckdb_databases()
        FROM duckdb_views()
        FROM duckdb_secrets()
        FROM duckdb_extensions()
        FROM duckdb_variables()
        FROM duckdb_temporary_files()
        FROM duckdb_memory()
        FROM duckdb_logs
        FROM duckdb_functions()
        FROM sqlite_master
        FROM sqlite_schema
        FROM pg_catalog.pg_settings
        FROM pg_settings
        FROM pg_catalog.pg_views
        FROM pg_class
        FROM pg_database
        FROM information_schema.views
        FROM information_schema.key_column_usage
        FROM information_schema.duckdb_settings
        WITH sqlite_master AS (SELECT 1) SELECT * FROM (SELECT 1), sqlite_master
        SELECT (WITH pg_settings AS (SELECT 1 AS a) SELECT a FROM pg_settings), (SELECT count(*) FROM pg_settings)
        WITH "{p}/secret.csv" AS (SELECT 1) FROM "{p}/secret.csv"
        SELECT (WITH "secret.csv" AS (SELECT 1 AS a) SELECT a FROM "secret.csv"), (SELECT 1 FROM "secret.csv")
        SELECT getenv('HOME')
        SELECT "getenv"('PATH')
        SELECT system.main.getenv('PATH')
        SELECT current_setting('secret_directory')
        SELECT current_setting('temp_directory')
        SELECT Current_Setting('home_directory')
        SELECT pg_catalog.current_setting('threads')
        SELECT 'memory_limit'.current_setting()
        SELECT getvariable('x')
        SELECT nextval('numbers')
        SELECT currval('numbers')
        SELECT setseed(0.5)
        SELECT sleep_ms(100)
        SELECT pg_sleep(1)
        SELECT write_log('x')
        SELECT pg_get_viewdef(1)
        SELECT txid_current()
        SELECT finalize('x')
        SELECT which_secret('s3://x', 's3')
        FROM which_secret('s3://x', 's3')
        FROM arrow_scan(1, 2, 3)
        FROM pandas_scan(1)
        FROM python_map_function(1)
        FROM seq_scan('samples')
        FROM test_all_types()
        FROM summary((FROM samples))
        FROM pragma_storage_info('samples')
        FROM pragma_database_size()
        FROM duckdb_table_sample('samples')
        FROM checkpoint()
        FROM enable_logging()
        FROM repeat_row(1, num_rows = (SELECT count(*) FROM read_text('{p}/secret.txt')))
        SELECT * FROM samples AT (VERSION => 1)
        SELECT $1
        SELECT ?
        SELECT $name
        FROM local_variable
        FROM guarded
        FROM database
        SELECT * FROM sqlite_scan('{p}/x.sqlite', 't')
        SELECT * FROM postgres_scan('host=127.0.0.1', 'public', 't')
        SELECT * FROM postgres_query('x', 'SELECT 1')
        SELECT * FROM mysql_query('x', 'SELECT 1')
        SELECT * FROM iceberg_scan('{p}')
        SELECT * FROM delta_scan('{p}')
        SELECT * FROM st_read('{p}/secret.csv')
        SELECT * FROM read_xlsx('{p}/x.xlsx')
        SELECT * FROM quack_query('quack:127.0.0.1:9494', 'SELECT 1')
        SELECT http_get('http://127.0.0.1:1')
        SELECT load_aws_credentials()
    """
    return [line.strip().replace("{p}", str(place)) for line in text.splitlines() if line.strip()]


def test_every_attempt_by_hand_is_refused(guarded: SqlGuard, place: Path) -> None:
    attempts = statements(place)
    assert len(attempts) >= 200
    passed = []
    for sql in attempts:
        with contextlib.suppress(QueryError):
            guarded.check(sql, 10)
            passed.append(sql)
    assert not passed


def test_every_function_that_is_not_allowed_is_refused(guarded: SqlGuard, database: duckdb.DuckDBPyConnection) -> None:
    rows = duckdb.connect().execute(
        "SELECT DISTINCT lower(function_name), function_type IN ('table', 'table_macro', 'pragma') "
        "FROM duckdb_functions()"
    )
    attempts = 0
    for name, in_from in rows.fetchall():
        allowed = TABLE_FUNCTIONS if in_from else FUNCTIONS | OPERATORS | TABLE_FUNCTIONS
        if name in allowed:
            continue
        for form in ("FROM {}()", "FROM {}('x')", "CALL {}()") if in_from else ("SELECT {}()", "SELECT {}('x', 1)"):
            for quoted in (f'"{name.upper()}"', f'system.main."{name}"'):
                attempts += 1
                with pytest.raises(QueryError) as refusal:
                    guarded.check(form.format(quoted), 10)
                assert refusal.value.code in ("refused", "invalid")
    assert attempts > 1000


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT repeat('x', 1000000) FROM range(2048)",
        "SELECT repeat('x', n) FROM samples",
        "SELECT repeat('x', 1000 * 1000)",
        "SELECT lpad('x', 2000000000, 'y')",
        "SELECT list_resize([1], 500000000, 1)",
        "SELECT printf('%1000000000d', 1)",
        "SELECT printf('%*d', 1000000000, 1)",
        "SELECT format('{:>1000000}', 'x')",
        "SELECT len(range(100000000)) FROM range(100)",
        "SELECT generate_series(0, -100000000, -1)",
        "FROM range(10), (SELECT repeat('x', 1000000))",
    ],
)
def test_values_that_memory_limits_do_not_see_are_refused(guarded: SqlGuard, sql: str) -> None:
    with pytest.raises(QueryError, match=r"written out|as one value"):
        guarded.check(sql, 10)


@pytest.mark.parametrize(
    "sql",
    [
        f"SELECT {'(' * 40_000}1{')' * 40_000}",
        f"SELECT {'NOT ' * 20_000}true",
        f"SELECT {'1 + ' * 500}1",
        f"SELECT {'1 + ' * 20_000}1",
        f"SELECT {'[' * 20_000}1{']' * 20_000}",
        f"SELECT {'CASE WHEN true THEN ' * 500}1{' END' * 500}",
        f"SELECT * FROM {'(SELECT * FROM ' * 3_000}samples{')' * 3_000}",
        f"SELECT x{chr(39).join(['->', 'a', '']) * 40} FROM (SELECT '{{}}'::JSON AS x)",
        f"SELECT {'list_transform([1], lambda x: ' * 30}1{')' * 30}",
    ],
    ids=range(9),
)
def test_a_statement_that_is_nested_too_deep_is_refused(guarded: SqlGuard, sql: str) -> None:
    with pytest.raises(QueryError, match=r"nested too deep|depth|memory exhausted|too large to plan"):
        guarded.check(sql, 10)


def _levels(first: str, level: str, last: str, levels: int) -> str:
    """A statement whose levels each mention the one below more than once; `{i}` is a level, `{j}` the one below."""
    return first + "".join(level.format(i=i, j=i - 1) for i in range(1, levels + 1)) + last.format(i=levels)


def _nested(inner: str, level: str, levels: int, last: str) -> str:
    for _ in range(levels):
        inner = level.replace("{}", inner)
    return last.replace("{}", inner)


def _ctes(body: str, how: str = "") -> tuple[str, str, str]:
    return "WITH c0 AS (SELECT n FROM samples)", f", c{{i}} AS {how} ({body})", " SELECT count(*) FROM c{i}"


DOUBLING = {
    "ctes": lambda n: _levels(*_ctes("SELECT a.n FROM c{j} a, c{j} b", "NOT MATERIALIZED"), n),
    "ctes in subqueries": lambda n: _levels(*_ctes("SELECT n FROM c{j} WHERE n IN (FROM c{j})", "NOT MATERIALIZED"), n),
    "columns": lambda n: _levels(*_ctes("SELECT * FROM c{j} a, c{j} b", "MATERIALIZED"), n),
    "stars": lambda n: _nested("SELECT n FROM samples", "SELECT *, * FROM ({})", n, "{}"),
    "aliases": lambda n: _levels("SELECT n AS a0", ", a{j} + a{j} AS a{i}", " FROM samples", n),
    "aliases of nothing": lambda n: _levels("SELECT 1 AS a0", ", a{j} + a{j} AS a{i}", "", n),
    "aliases in WHERE": lambda n: _levels("SELECT n AS a0", ", a{j} + a{j} AS a{i}", " FROM samples WHERE a{i} > 0", n),
    "structs": lambda n: _nested("SELECT n AS s FROM samples", "SELECT {'a': s, 'b': s} AS s FROM ({})", n, "{}"),
    "structs without a name": lambda n: _nested(
        "SELECT n AS s FROM samples", "SELECT {'a': #1, 'b': #1} FROM ({})", n, "{}"
    ),
    "lambdas": lambda n: _nested(
        "[n]", "list_transform({}, lambda q: {'a': q, 'b': q})", n, "SELECT {} FROM samples"
    ),
    "macros": lambda n: _nested("n", "nullif({}, 1)", n, "SELECT {} FROM samples"),
    "macros of the history": lambda n: _nested("n", "thrice({})", n, "SELECT {} FROM samples"),
    "BETWEEN": lambda n: _nested("n", "({} BETWEEN 1 AND 2)::INTEGER", n, "SELECT {} FROM samples"),
    "CASE": lambda n: _nested("n", "(CASE {} WHEN 1 THEN 2 WHEN 3 THEN 4 END)", n, "SELECT {} FROM samples"),
    "CASE and spaces": lambda n: _nested(
        "n", "(CASE\u00a0{} WHEN 1 THEN 2 WHEN 3 THEN 4 END)", n, "SELECT {} FROM samples"
    ),
    "CASE with labels": lambda n: _nested(
        "n", "(CASE (SELECT {} AS end) WHEN .5 THEN 2 WHEN 3 THEN 4 END)", n, "SELECT {} FROM samples"
    ),
    "windows": lambda n: (
        f"SELECT {', '.join(['sum(n) OVER w'] * 2**n)} FROM samples WINDOW w AS (ORDER BY {', '.join(['n'] * 2**n)})"
    ),
    "views": lambda n: f"SELECT count(*) FROM {', '.join(f'wide a{i}' for i in range(2**n))}",
}  # fmt: skip
"""Statements that grow with a power of their levels while DuckDB parses or binds them; interrupts have no effect."""


def _refused_levels(kind: str) -> int:
    return {"windows": 12, "views": 8}.get(kind, 30)


@pytest.mark.parametrize("kind", DOUBLING)
def test_a_short_statement_that_grows_without_bounds_is_refused(hasty: SqlGuard, kind: str) -> None:
    with pytest.raises(QueryError, match="too large to plan") as refusal:
        hasty.check(DOUBLING[kind](_refused_levels(kind)), 10)
    assert refusal.value.code == "refused"


def test_memory_is_limited_too(database: duckdb.DuckDBPyConnection) -> None:
    guarded = SqlGuard(database.cursor, bounds=Bounds(cpu_seconds=600, wall_seconds=200, plan_bytes=4 * 2**20))
    with pytest.raises(QueryError, match="too large to plan"):
        guarded.check(DOUBLING["columns"](30), 10)


@pytest.mark.long
@pytest.mark.parametrize("kind", DOUBLING)
def test_the_largest_statement_that_is_allowed_is_planned_soon(
    guarded: SqlGuard, database: duckdb.DuckDBPyConnection, kind: str
) -> None:
    allowed = ""
    levels = 0
    for levels in range(1, 17):
        try:
            allowed = guarded.check(DOUBLING[kind](levels), 10).sql
        except QueryError:
            break
    assert levels > 4, "analysts need a few levels"
    cursor = database.cursor()
    started = time.thread_time()  # planning is this thread's alone, whatever else the machine does
    cursor.execute(f"EXPLAIN {allowed}")
    assert time.thread_time() - started < 5
    cursor.close()


@pytest.mark.parametrize(
    "form", ["{}", "DESCRIBE {}", "FROM (SUMMARIZE {})", "SELECT (WITH a AS ({}) SELECT count(*) FROM a)"]
)
def test_views_count_by_their_size_wherever_they_are_mentioned(guarded: SqlGuard, form: str) -> None:
    few, many = (f"SELECT 1 FROM {', '.join(f'wide a{i}' for i in range(n))}" for n in (8, 200))
    assert guarded.check(form.format(few), 10)
    with pytest.raises(QueryError, match="too large to plan"):
        guarded.check(form.format(many), 10)


def test_questions_are_checked_while_others_are_stopped(hasty: SqlGuard) -> None:
    def ask(number: int) -> str:
        try:
            return hasty.check(DOUBLING["aliases"](30 + number) if number % 2 else f"SELECT {number}", 10).sql
        except QueryError as error:
            return error.code

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(ask, range(12))) == [
            "refused" if number % 2 else f"SELECT {number}" for number in range(12)
        ]


def test_the_process_that_checks_is_replaced_when_it_ends(guarded: SqlGuard) -> None:
    assert guarded.check("SELECT 'before'", 10)
    module = f"{SqlGuard.__module__.rpartition('.')[0]}.sandbox"
    found = [process for process in psutil.Process().children(recursive=True) if module in process.cmdline()]
    for process in found:
        process.kill()
    psutil.wait_procs(found, timeout=20)
    assert guarded.check("SELECT 'after'", 10).sql == "SELECT 'after'"


def test_a_table_is_known_as_soon_as_somebody_asks_for_it(place: Path) -> None:
    with duckdb.connect(str(place / "growing.duckdb")) as connection:
        guarded = SqlGuard(connection.cursor)
        with pytest.raises(QueryError, match="newer"):
            guarded.check("FROM newer", 10)
        connection.execute("CREATE TABLE newer (n INTEGER); CREATE VIEW newest AS SELECT n AS m FROM newer")
        deadline = time.monotonic() + 20
        while True:  # refusals read the schema again, though not each of them
            with contextlib.suppress(QueryError):
                assert guarded.check("SELECT m FROM newest", 10)
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(QueryError, match="nowhere") as refusal:
            guarded.check("SELECT nowhere FROM newer", 10)
        assert refusal.value.code == "invalid"


def test_without_the_guard_the_settings_still_hold(database: duckdb.DuckDBPyConnection, place: Path) -> None:
    """No file outside the archive is read or written, nothing changes, and the settings stay."""
    before = database.execute("SELECT * FROM samples").fetchall()
    files = sorted(str(path) for path in place.rglob("*") if ".wal" not in path.name)
    settings = "SELECT name, value FROM duckdb_settings() WHERE name NOT IN ('schema', 'search_path') ORDER BY ALL"
    values = database.execute(settings).fetchall()
    for sql in statements(place):
        # Some only wait or fill the log, and some end our transaction: they need the parser.
        if any(word in sql for word in ("sleep", "COMMIT", "log", "arrow_scan", "pandas_scan", "archive/", "BEGIN")):
            continue
        cursor = database.cursor()
        with contextlib.suppress(duckdb.Error, RuntimeError):
            guard.begin(cursor)
            shown = cursor.execute(sql).fetchall() if "ROLLBACK" not in sql else []
            assert SECRET not in str(shown), sql
        with contextlib.suppress(duckdb.Error):
            cursor.rollback()
        cursor.close()
    assert database.execute("SELECT * FROM samples").fetchall() == before
    assert database.execute(settings).fetchall() == values
    assert sorted(str(path) for path in place.rglob("*") if ".wal" not in path.name) == files


@pytest.mark.parametrize(
    "sql",
    [
        "FROM samples",
        "SELECT twice(n) FROM history.main.samples",
        "FROM archived",
        "WITH a AS (FROM samples), b AS (SELECT n FROM a) SELECT * FROM a JOIN b USING (n)",
        "WITH a AS NOT MATERIALIZED (FROM samples), b AS (FROM a, a AS c) SELECT n FROM b JOIN a USING (n)",
        _levels(*_ctes("SELECT a.n FROM c{j} a, c{j} b"), 12),
        "WITH a AS MATERIALIZED (FROM samples), b AS (FROM a, a AS c) SELECT b.n AS m, m + m AS k FROM b, b AS d",
        "SELECT CASE n WHEN 1 THEN 'ä' WHEN 2 THEN 'b' END AS end, CASE WHEN n = 1 THEN n END AS case FROM samples",
        "SELECT sum(n) OVER w, max(n) OVER w FROM samples WINDOW w AS (PARTITION BY device ORDER BY time)",
        "SELECT device, avg(n) OVER (ORDER BY time ROWS 3 PRECEDING) FROM samples QUALIFY row_number() OVER () < 5",
        "SELECT time_bucket(INTERVAL 1 HOUR, time) AS hour, quantile_cont(n, [0.5, 0.9]) FROM samples GROUP BY ALL",
        "SELECT s.device, t.n FROM samples s ASOF JOIN samples t ON s.device = t.device AND s.time >= t.time",
        "PIVOT samples ON device IN ('gpu0', 'gpu1') USING sum(n)",
        "SELECT list_filter([1, 2, 3], lambda x: x > 1), {'a': 1}.a, MAP {'k': 1}['k'], [x * 2 FOR x IN [1, 2]]",
        "SELECT json_extract('{\"a\": 1}', '$.a'), '{\"a\": 1}'::JSON ->> 'a', unnest([1, 2])",
        "SELECT n, CASE WHEN n > 0 THEN 'x' ELSE NULL END, n BETWEEN 1 AND 2, device LIKE 'g%' FROM samples",
        "SELECT * FROM generate_series(1, 3) t(i), range(2), (VALUES (1)) v(x)",
        "SELECT * EXCLUDE (n) REPLACE (upper(device) AS device) FROM samples ORDER BY ALL DESC LIMIT 5 OFFSET 0",
        "SELECT count(*) FILTER (n > 0), regr_count(n, epoch(time)), arg_max(device, n) FROM samples",
        "SELECT DISTINCT ON (device) * FROM samples ORDER BY device, time DESC",
        "SELECT COLUMNS('n|device') FROM samples UNION ALL BY NAME SELECT n FROM samples",
        "DESCRIBE samples", "SUMMARIZE samples", "SHOW TABLES", "SHOW ALL TABLES", "FROM (DESCRIBE samples)",
        "EXPLAIN FROM samples", "/* why */ EXPLAIN -- it\n FROM samples", "EXPLAIN (FORMAT json) FROM samples",
        "FROM information_schema.tables", "FROM information_schema.columns",
        "SELECT time AT TIME ZONE 'Europe/Berlin', extract(hour FROM time), now() - time FROM samples",
        "WITH RECURSIVE t(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM t WHERE i < 5) FROM t",
        "FROM samples TABLESAMPLE 50%", "TABLE samples", "SELECT #1 FROM samples",
        "SELECT current_date, version(), current_database()",
        "SELECT count(*) FROM range(2000000)",
        "SELECT repeat('=', 10), lpad(device, 8, ' '), printf('%5d', n), count(*) FROM samples, range(20) GROUP BY ALL",
    ],
)  # fmt: skip
def test_what_analysts_need_is_allowed_and_the_limit_changes_no_answer(
    guarded: SqlGuard, database: duckdb.DuckDBPyConnection, sql: str
) -> None:
    statement = guarded.check(f"{sql} ;  -- the end", 1000)
    cursor = database.cursor()
    guard.begin(cursor)
    plain = cursor.execute(statement.sql).fetchall()
    if "TABLESAMPLE" not in sql and "now()" not in sql:
        assert cursor.execute(statement.limited).fetchall() == plain
    cursor.close()


def test_answers_name_no_path_of_the_host(guarded: SqlGuard, database: duckdb.DuckDBPyConnection, place: Path) -> None:
    for sql in (
        "FROM information_schema.tables", "FROM information_schema.columns", "SHOW ALL TABLES", "DESCRIBE archived",
        "SUMMARIZE archived", "SELECT current_database()", "EXPLAIN FROM archived",
        "EXPLAIN (FORMAT json) FROM archived",
    ):  # fmt: skip
        assert str(place) not in str(database.cursor().execute(guarded.check(sql, 1000).sql).fetchall()), sql


def test_no_function_is_allowed_that_duckdb_does_not_have() -> None:
    have = {
        name for (name,) in duckdb.connect().execute("SELECT lower(function_name) FROM duckdb_functions()").fetchall()
    }
    windows = {"row_number", "rank", "dense_rank", "percent_rank", "cume_dist", "ntile", "lag", "lead",
               "first_value", "last_value", "nth_value"}  # fmt: skip
    assert FUNCTIONS - windows - have == set()
    assert TABLE_FUNCTIONS - have == set()
