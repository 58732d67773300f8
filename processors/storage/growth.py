"""Growth of counters: one definition in SQL for every rollup (docs/counters.md describes it in words).

A reading is a value that is not null, at its time. The growth of a counter is the sum of the steps between one reading
and the next, however far apart. A step belongs to the bucket of the later reading:

1. A passing value is no reading: one between two others that are at most `PASSING_SECONDS` apart, of which the later
   is not below the earlier, and that lies outside of the range of these two.
2. A step up counts, unless the counter can't have grown as much in the time (`Unit.per_second`).
3. A step down is a reset where the value is small: no more than the counter can have grown by since, and at most half
   of what it was, or 99% after a silence. It counts from 0. Any other step down is a wobble, and counts nothing.

Times count in whole minutes of the clock. So a rollup's rows, which keep the minute of their last reading, are as good
as the readings themselves. If a bucket's readings only rise, its first and last are enough; otherwise the readings
around it are processed one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from duckdb import DuckDBPyConnection
from msgspec import Struct

from ...schemas.metrics import Metric
from .rollup_columns import FELL, Level, bigint_or_null
from .statements import column_names, put

PASSING_SECONDS: Final = 120
"""A value that lasts no longer than this is judged by the value after it: it may be passing, and then is no reset.
Metrics are read every 10 s at the slowest, and samples may be a minute apart."""
SILENCE_MINUTES: Final = 2
"""A step over more minutes than this is one after a gap: the driver may have been reloaded meanwhile."""
_PASSING: Final = PASSING_SECONDS * 1_000_000
_MINUTE: Final = 60_000_000
_DAY: Final = 86_400_000_000
_HOUR: Final = 3_600_000_000
NOTHING: Final = -(2**63)
"""In place of growth that is null."""


class Tables(Struct, frozen=True):
    """Tables with the rows of a level.

    Attributes:
        level: which.
        key: the columns that name a device.
        stored: the tables of its rows.
        hours: the rows of the hours, which are kept the longest, as a table name or a subquery in brackets.
        readings: the SELECT of raw samples between two times in microseconds (with columns of the key and `time`).
        stamp: assignment for a stored row that changes, such as `batch = 7`; empty for none.
        falls_marked: true if `…_inner` of staged rows is `FELL` wherever a counter fell, even if it rose again.
        rows: subqueries in brackets for the rows of the tables, if these leave out values that follow from others.
        corrected: table (key, time, name, value, old) that collects the growth of stored rows, in place of an update:
            of rows of one key, time and name the last counts, if its value is not the old one.
    """

    level: Level
    key: tuple[str, ...]
    stored: tuple[str, ...]
    hours: str
    readings: Callable[[int, int], str]
    stamp: str = ""
    falls_marked: bool = False
    corrected: str = ""
    rows: tuple[str, ...] = ()

    @property
    def read(self) -> tuple[str, ...]:
        """Rows of the stored tables, each as a table name or a subquery in brackets."""
        return self.rows or self.stored

    @property
    def width(self) -> int:
        """Width of a bucket, in microseconds."""
        return self.level.seconds * 1_000_000

    @property
    def reach(self) -> int:
        """Distance around a changed bucket in which its neighbors are read, in microseconds."""
        return 2 * (_PASSING + self.width)

    def keys(self, alias: str = "") -> str:
        """Columns of the key, as an SQL list."""
        return ", ".join(f"{alias}.{column}" if alias else column for column in self.key)

    def same(self, one: str, other: str) -> str:
        """SQL condition that two rows are of one device."""
        return " AND ".join(f"{one}.{column} = {other}.{column}" for column in self.key)


class LacksColumns(Exception):
    """A table has no room for values that are to be stored, and gets none in a transaction that has changed its rows.

    Attributes:
        table: which.
        columns: name and type of what it lacks.
    """

    def __init__(self, table: str, columns: Sequence[tuple[str, str]]) -> None:
        super().__init__(f"{table} lacks {', '.join(name for name, _ in columns)}")
        self.table = table
        self.columns = columns


def require(cursor: DuckDBPyConnection, table: str, columns: Sequence[tuple[str, str]]) -> None:
    """Raise `LacksColumns` unless a table has some columns, given by name and type."""
    have = column_names(cursor, table)
    if lacking := [column for column in columns if column[0] not in have]:
        raise LacksColumns(table, lacking)


def max_per_minute(metric: Metric) -> int | None:
    """The most that a counter can grow by in a minute; None if nothing limits it."""
    found = metric.row.unit.per_second
    return None if found is None else int(found * 60)


def step(metric: Metric, before: str, before_minute: str, value: str, minute: str) -> str:
    """SQL of the growth between two readings, each with its minute. A null before means that there was none yet."""
    at_most = max_per_minute(metric)
    apart = f"({minute} - {before_minute})"
    up = f"{value}::HUGEINT - {before}"
    small = f"{value}::HUGEINT * 100 <= {before}::HUGEINT * CASE WHEN {apart} > {SILENCE_MINUTES} THEN 99 ELSE 50 END"
    if at_most is not None:
        possible = f"{at_most}::HUGEINT * (1 + {apart})"
        up = f"CASE WHEN {up} <= {possible} THEN {up} ELSE 0 END"
        small += f" AND {value} <= {possible}"
    return (
        f"CASE WHEN {before} IS NULL OR {value} IS NULL THEN 0 WHEN {value} >= {before} THEN {up} "
        f"WHEN {small} THEN {value} ELSE 0 END"
    )


def _is_odd(metric: Metric) -> str:
    """SQL condition that a bucket's readings, or the step to them, must be processed one by one."""
    name, at_most = metric.name, max_per_minute(metric)
    odd = f"{name}_inner IS NULL OR {name}_inner = {FELL} OR {name}_first < {name}_before"
    if at_most is not None:
        odd += (
            f" OR {name}_inner > {at_most} OR {name}_first::HUGEINT - {name}_before > "
            f"{at_most}::HUGEINT * (1 + minute - {name}_minute)"
        )
    return f"coalesce({name}_first IS NOT NULL AND ({odd}), false)"


def join(cursor: DuckDBPyConnection, tables: Tables, counters: Sequence[Metric], first: int, last: int) -> None:
    """Compute the growth of each staged bucket, and recompute it for the stored buckets that this changes.

    Args:
        cursor: with the temporary table `staged`: time, the key, and of each counter first, last, inner and increase.
        tables: of the level.
        counters: that have readings.
        first: the first of the buckets that are staged, by number.
        last: the last.
    """
    if not counters:
        return
    start, end = first * tables.width, (last + 1) * tables.width
    if not tables.falls_marked:
        _mark_falls(cursor, tables, counters, start, end)
    _gather(cursor, tables, counters, start, end)
    _link_earlier(cursor, tables, counters, start)
    growth = ", ".join(
        bigint_or_null(
            f"CASE WHEN {m.name}_inner <> {FELL} THEN {m.name}_inner::HUGEINT + "
            f"{step(m, f'{m.name}_before', f'{m.name}_minute', f'{m.name}_first', 'minute')} END"
        )
        + f" AS {m.name}_increase, {_is_odd(m)} AS {m.name}_odd"
        for m in counters
    )
    cursor.execute(
        f"CREATE OR REPLACE TEMP TABLE grown AS SELECT time, {tables.keys()}, staged, follows, {growth} "
        "FROM temp.main.linked"
    )
    sets = ", ".join(f"{m.name}_increase = g.{m.name}_increase" for m in counters)
    cursor.execute(
        f"UPDATE temp.main.staged SET {sets} FROM temp.main.grown g WHERE g.staged "
        f"AND {tables.same('g', 'staged')} AND g.time = staged.time"
    )
    _update_followers(cursor, tables, counters)
    odd = cursor.execute(
        "SELECT " + ", ".join(f"bool_or({m.name}_odd)" for m in counters) + " FROM temp.main.grown"
    ).fetchone()
    for metric, found in zip(counters, odd or (), strict=True):
        if found:
            _go_through(cursor, tables, metric, start - tables.reach)


def last_readings(cursor: DuckDBPyConnection, tables: Tables, counters: Sequence[Metric]) -> dict[str, Any]:
    """Last readings of the devices of the staged buckets, as `Readings.learn` takes them. Call it after `join`."""
    names = ", ".join(f"l.{m.name}_before, l.{m.name}_minute, l.{m.name}_last" for m in counters)
    odd = " OR ".join(f"{m.name}_odd" for m in counters)
    return cursor.execute(
        f"SELECT l.series, epoch_us(l.time) // {tables.width} AS bucket, coalesce(o.upto, 0) AS odd, {names} "
        "FROM temp.main.linked l LEFT JOIN (SELECT series, epoch_us(max(time)) + "
        f"{tables.width} AS upto FROM temp.main.grown WHERE {odd} GROUP BY series) o USING (series) "
        "WHERE l.staged QUALIFY l.time = max(l.time) OVER (PARTITION BY l.series)"
    ).fetchnumpy()


def _mark_falls(cursor: DuckDBPyConnection, tables: Tables, counters: Sequence[Metric], start: int, end: int) -> None:
    """Set `…_inner` to `FELL` if a counter fell between its first and its last reading of a bucket.

    Only counters with a positive `…_inner` are checked. Most stand still, and `from_raw` has already marked those whose
    first or last reading is not their least or greatest.
    """
    moved = cursor.execute(
        "SELECT " + ", ".join(f"bool_or({m.name}_inner > 0)" for m in counters) + " FROM temp.main.staged"
    ).fetchone()
    asked = [metric for metric, found in zip(counters, moved or (), strict=True) if found]
    if not asked:
        return
    before = ", ".join(f"lag({m.name} IGNORE NULLS) OVER w AS {m.name}_before" for m in asked)
    fell = ", ".join(f"bool_or({m.name} < {m.name}_before) AS {m.name}" for m in asked)
    cursor.execute(
        f"CREATE OR REPLACE TEMP TABLE fallen AS SELECT {tables.keys()}, make_timestamptz(bucket * {tables.width}) "
        f"AS time, {fell} FROM (SELECT {tables.keys()}, bucket, {', '.join(m.name for m in asked)}, {before} "
        f"FROM (SELECT *, epoch_us(time) // {tables.width} AS bucket FROM ({tables.readings(start, end)})) "
        f"SEMI JOIN temp.main.touched USING ({tables.keys()}, bucket) "
        f"WINDOW w AS (PARTITION BY {tables.keys()}, bucket ORDER BY time)) GROUP BY {tables.keys()}, bucket "
        f"HAVING {' OR '.join(f'bool_or({m.name} < {m.name}_before)' for m in asked)}"
    )
    if cursor.execute("SELECT 1 FROM temp.main.fallen LIMIT 1").fetchone() is None:
        return
    sets = ", ".join(f"{m.name}_inner = CASE WHEN f.{m.name} THEN {FELL} ELSE {m.name}_inner END" for m in asked)
    cursor.execute(
        f"UPDATE temp.main.staged SET {sets} FROM temp.main.fallen f "
        f"WHERE {tables.same('f', 'staged')} AND f.time = staged.time"
    )


def _gather(cursor: DuckDBPyConnection, tables: Tables, counters: Sequence[Metric], start: int, end: int) -> None:
    """Create the table `nearby`: the staged rows, and the stored rows of the same devices around them."""
    kept = "time, " + tables.keys() + ", "
    kept += ", ".join(f"{m.name}_first, {m.name}_last, {m.name}_inner, {m.name}_increase" for m in counters)
    reach = tables.reach
    stored = " UNION ALL ".join(
        f"SELECT {kept} FROM {table} WHERE time >= make_timestamptz({start - reach}) "
        f"AND time < make_timestamptz({end + reach})"
        for table in tables.read
    )
    cursor.execute(
        f"CREATE OR REPLACE TEMP TABLE nearby AS SELECT {kept}, true AS staged, false AS far FROM temp.main.staged "
        f"UNION ALL SELECT {', '.join(f'o.{column.strip()}' for column in kept.split(','))}, false, false "
        f"FROM ({stored}) o SEMI JOIN temp.main.staged s ON {tables.same('s', 'o')} "
        f"ANTI JOIN temp.main.touched t ON {tables.same('t', 'o')} AND t.time = o.time"
    )
    # The next reading may be far ahead: a sample that is late by an hour changes its device's growth since then.
    late = f"""SELECT {tables.keys()} FROM temp.main.touched GROUP BY ALL HAVING NOT bool_or(open)"""
    if cursor.execute(f"SELECT 1 FROM ({late}) LIMIT 1").fetchone() is None:
        return
    ahead = " UNION ALL ".join(
        f"SELECT {kept} FROM {table} WHERE time >= make_timestamptz({end + reach})" for table in tables.read
    )
    nexts = ", ".join(f"min(time) FILTER ({m.name}_first IS NOT NULL) AS {m.name}" for m in counters)
    cursor.execute(
        f"CREATE OR REPLACE TEMP TABLE ahead AS SELECT {tables.keys()}, {nexts} FROM ({ahead}) a "
        f"SEMI JOIN ({late}) l USING ({tables.keys()}) GROUP BY ALL"
    )
    # Of such a row only those counters count whose first reading since then it has.
    picked = ", ".join(
        f"CASE WHEN o.time = a.{m.name} THEN o.{m.name}_{part} END" + f" AS {m.name}_{part}"
        for m in counters
        for part in ("first", "last", "inner", "increase")
    )
    cursor.execute(
        f"INSERT INTO temp.main.nearby SELECT o.time, {tables.keys('o')}, {picked}, false, true "
        f"FROM ({ahead}) o JOIN temp.main.ahead a ON {tables.same('a', 'o')} "
        f"WHERE o.time IN ({', '.join(f'a.{m.name}' for m in counters)})"
    )


def _link_earlier(cursor: DuckDBPyConnection, tables: Tables, counters: Sequence[Metric], start: int) -> None:
    """Create the table `linked`: `nearby` with the reading before each row and its minute, however old."""
    before = ", ".join(
        f"last_value({m.name}_last IGNORE NULLS) OVER w AS {m.name}_before, "
        f"last_value(CASE WHEN {m.name}_last IS NOT NULL THEN minute END IGNORE NULLS) OVER w AS {m.name}_minute"
        for m in counters
    )
    cursor.execute(
        f"CREATE OR REPLACE TEMP TABLE linked AS SELECT *, coalesce(bool_or(staged) OVER w, false) AS follows, "
        f"{before} "
        f"FROM (SELECT *, epoch_us(time) // {_MINUTE} AS minute FROM temp.main.nearby) "
        f"WINDOW w AS (PARTITION BY {tables.keys()} ORDER BY time ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)"
    )
    lacking = cursor.execute(
        "SELECT " + ", ".join(f"bool_or({_lacks(m)})" for m in counters) + " FROM temp.main.linked"
    ).fetchone()
    sought = [metric for metric, found in zip(counters, lacking or (), strict=True) if found]
    if not sought:
        return
    cursor.execute(
        f"CREATE OR REPLACE TEMP TABLE sought AS SELECT DISTINCT {tables.keys()} FROM temp.main.linked "
        f"WHERE {' OR '.join(_lacks(m) for m in sought)}"
    )
    _find_last(cursor, tables, sought, start - tables.reach, start - tables.reach)
    sets = ", ".join(
        f"{m.name}_before = coalesce({m.name}_before, f.{m.name}), "
        f"{m.name}_minute = coalesce({m.name}_minute, f.{m.name}_read)"
        for m in sought
    )
    cursor.execute(f"UPDATE temp.main.linked SET {sets} FROM temp.main.found f WHERE {tables.same('f', 'linked')}")


def _lacks(metric: Metric) -> str:
    """SQL condition that a row needs the reading before it, and that none is among the rows nearby."""
    return f"((staged OR follows) AND {metric.name}_first IS NOT NULL AND {metric.name}_before IS NULL)"


def _find_last(
    cursor: DuckDBPyConnection, tables: Tables, counters: Sequence[Metric], before: int, gathered_from: int
) -> None:
    """Create the table `found`: the last readings of the devices in `sought` before a time.

    The minute of each reading is in `…_read`. Times are in microseconds. From `gathered_from` on, the table `nearby`
    replaces the stored rows.
    """
    newest = ", ".join(
        f"arg_max({m.name}_last, time) FILTER ({m.name}_last IS NOT NULL) AS {m.name}, "
        f"epoch_us(max(time) FILTER ({m.name}_last IS NOT NULL)) // {_MINUTE} AS {m.name}_read"
        for m in counters
    )
    names = f"{tables.keys()}, time, " + ", ".join(f"{m.name}_last" for m in counters)
    high = min(before, gathered_from)
    near = f"time >= make_timestamptz({gathered_from}) AND time < make_timestamptz({before})"
    hour = f"time >= make_timestamptz({high - _HOUR}) AND time < make_timestamptz({high})"
    day = f"time >= make_timestamptz({high - _DAY}) AND time < make_timestamptz({high - _HOUR})"
    long_ago = f"time < make_timestamptz({high - _DAY})"
    among = ""
    if tables.key == ("series",):  # a new device has a number above all that are stored
        row = cursor.execute("SELECT min(series), max(series) FROM temp.main.sought").fetchone() or (0, 0)
        among = f" AND series BETWEEN {row[0]} AND {row[1]}"
    # Nearest first. Hours still exist when the rows of shorter rollups are deleted.
    for at, parts in enumerate(
        (
            [f"SELECT {names} FROM temp.main.nearby WHERE {near}"],
            [f"SELECT {names} FROM {table} WHERE {hour}{among}" for table in tables.read],
            [f"SELECT {names} FROM {table} WHERE {day}{among}" for table in tables.read],
            [f"SELECT {names} FROM {table} WHERE {long_ago}{among}" for table in tables.read],
            [
                f"SELECT {names} FROM (SELECT * REPLACE (time + INTERVAL 59 MINUTE AS time) FROM {tables.hours}) "
                f"WHERE {long_ago}"
            ],
        )
    ):
        found = (
            f"SELECT {tables.keys()}, {newest} FROM ({' UNION ALL '.join(parts)}) p "
            f"SEMI JOIN temp.main.sought s USING ({tables.keys()}) GROUP BY ALL"
        )
        if not at:
            cursor.execute(f"CREATE OR REPLACE TEMP TABLE found AS {found}")
            continue
        lacking = " OR ".join(f"{m.name} IS NULL" for m in counters)
        row = cursor.execute(
            f"SELECT 1 FROM temp.main.sought s LEFT JOIN temp.main.found f USING ({tables.keys()}) "
            f"WHERE {lacking} LIMIT 1"
        ).fetchone()
        if row is None:
            return
        merged = ", ".join(
            f"coalesce(f.{m.name}, o.{m.name}) AS {m.name}, coalesce(f.{m.name}_read, o.{m.name}_read) AS {m.name}_read"
            for m in counters
        )
        cursor.execute(f"CREATE OR REPLACE TEMP TABLE older AS {found}")
        cursor.execute(
            f"CREATE OR REPLACE TEMP TABLE found AS SELECT {tables.keys()}, {merged} FROM temp.main.found f "
            f"FULL JOIN temp.main.older o USING ({tables.keys()})"
        )


def _update_followers(cursor: DuckDBPyConnection, tables: Tables, counters: Sequence[Metric]) -> None:
    """Update the growth of stored rows after staged ones, if it has changed."""
    changed = " OR ".join(
        f"(n.{m.name}_first IS NOT NULL AND NOT g.{m.name}_odd "
        f"AND g.{m.name}_increase IS DISTINCT FROM n.{m.name}_increase)"
        for m in counters
    )
    cursor.execute(
        f"CREATE OR REPLACE TEMP TABLE changed_rows AS SELECT g.*, {', '.join(f'n.{m.name}_first' for m in counters)} "
        f"FROM temp.main.grown g JOIN temp.main.nearby n ON {tables.same('n', 'g')} AND n.time = g.time "
        f"WHERE g.follows AND NOT g.staged AND ({changed})"
    )
    if cursor.execute("SELECT 1 FROM temp.main.changed_rows LIMIT 1").fetchone() is None:
        return
    values = {
        f"{m.name}_increase": f"CASE WHEN g.{m.name}_first IS NOT NULL AND NOT g.{m.name}_odd "
        f"THEN g.{m.name}_increase ELSE t.{m.name}_increase END"
        for m in counters
    }
    for table in tables.stored:
        _set(cursor, tables, table, counters, values, "temp.main.changed_rows")


def _set(
    cursor: DuckDBPyConnection,
    tables: Tables,
    table: str,
    counters: Sequence[Metric],
    values: Mapping[str, str],
    found: str,
    where: str = "",
) -> None:
    """Update the growth of counters in the stored rows (`t`) that match rows of a table (`g`) by device and time."""
    match = f"{tables.same('g', 't')} AND g.time = t.time"
    if tables.corrected:
        for name, value in values.items():
            # Even if it is as stored: an earlier correction may say otherwise.
            cursor.execute(
                f"INSERT INTO {tables.corrected} SELECT {tables.keys('t')}, t.time, '{name}', {value}, t.{name} "
                f"FROM {table} t JOIN {found} g ON {match}"
            )
        return
    match += where and f" AND {where}"
    if tables.stamp:
        types = {f"{m.name}_increase": m.row.unit.sql for m in counters}
        require(cursor, table, [(name, types[name]) for name in values])
        column, _, value = tables.stamp.partition(" = ")
        assigned = ", ".join(f"{value} AS {name}" for name, value in {**values, column: value}.items())
        rows = f"SELECT t.* REPLACE ({assigned}) FROM {table} t JOIN {found} g ON {match}"
        put(cursor, table, rows, [*tables.key, "time"])
        return
    sets = ", ".join(f"{name} = {value}" for name, value in values.items())
    cursor.execute(f"UPDATE {table} AS t SET {sets} FROM {found} g WHERE {match}")


def _go_through(cursor: DuckDBPyConnection, tables: Tables, metric: Metric, gathered_from: int) -> None:
    """Add up the steps between single readings, around the buckets in which a counter did not only rise."""
    name, width, keys = metric.name, tables.width, tables.keys()
    cursor.execute(
        f"CREATE OR REPLACE TEMP TABLE sought AS SELECT {keys}, min(epoch_us(time)) - {_PASSING} AS low, "
        f"max(epoch_us(time)) + {width + _PASSING} AS high FROM temp.main.grown WHERE {name}_odd GROUP BY ALL"
    )
    limits = cursor.execute("SELECT min(low), max(high) FROM temp.main.sought").fetchone() or (0, 0)
    # The values around it show if a value passes; the reading before these comes from the rollups.
    low, high = int(limits[0]) - 2 * _PASSING, int(limits[1]) + 2 * _PASSING
    low = low // width * width
    _find_last(cursor, tables, [metric], low, gathered_from)
    steps = step(metric, "before", f"before_at // {_MINUTE}", "value", f"first_at // {_MINUTE}")
    cursor.execute(
        f"CREATE OR REPLACE TEMP TABLE stepped AS WITH readings AS ("
        f"SELECT {tables.keys('r')}, epoch_us(r.time) AS moment, r.{name} AS value "
        f"FROM ({tables.readings(low, high)}) r SEMI JOIN temp.main.sought s ON {tables.same('s', 'r')} "
        f"WHERE r.{name} IS NOT NULL UNION ALL "
        f"SELECT {keys}, {name}_read * {_MINUTE}, {name} FROM temp.main.found WHERE {name} IS NOT NULL"
        f"), begun AS (SELECT *, (value IS DISTINCT FROM lag(value) OVER w)::INTEGER AS begins FROM readings "
        f"WINDOW w AS (PARTITION BY {keys} ORDER BY moment)"
        f"), numbered AS (SELECT *, sum(begins) OVER (PARTITION BY {keys} ORDER BY moment ROWS UNBOUNDED PRECEDING) "
        f"AS run FROM begun), runs AS (SELECT {keys}, run, any_value(value) AS value, min(moment) AS first_at, "
        f"max(moment) AS last_at FROM numbered GROUP BY {keys}, run), flanked AS (SELECT *, "
        f"lag(value) OVER w AS earlier, lead(value) OVER w AS later, "
        f"lead(first_at) OVER w - lag(last_at) OVER w AS apart FROM runs "
        f"WINDOW w AS (PARTITION BY {keys} ORDER BY run)"
        f"), kept AS (SELECT * FROM flanked WHERE NOT coalesce(later >= earlier AND (value < earlier OR value > later) "
        f"AND apart <= {_PASSING}, false)"
        f"), linked AS (SELECT *, lag(value) OVER w AS before, lag(last_at) OVER w AS before_at FROM kept "
        f"WINDOW w AS (PARTITION BY {keys} ORDER BY run)"
        f"), counted AS (SELECT {keys}, first_at // {width} AS bucket, {steps} AS growth FROM linked "
        f"UNION ALL SELECT {keys}, moment // {width}, 0 FROM readings) "
        f"SELECT {tables.keys('c')}, make_timestamptz(c.bucket * {width}) AS time, "
        f"{bigint_or_null('sum(c.growth)')} AS growth FROM counted c JOIN temp.main.sought s "
        f"ON {tables.same('s', 'c')} WHERE (c.bucket + 1) * {width} > s.low AND c.bucket * {width} < s.high "
        "GROUP BY ALL"
    )
    cursor.execute(
        f"UPDATE temp.main.staged SET {name}_increase = g.growth FROM temp.main.stepped g "
        f"WHERE {tables.same('g', 'staged')} AND g.time = staged.time"
    )
    for table in tables.stored:
        other = f"t.{name}_increase IS DISTINCT FROM g.growth"
        _set(cursor, tables, table, [metric], {f"{name}_increase": "g.growth"}, "temp.main.stepped", other)
