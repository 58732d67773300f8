"""Properties of the pure parts behind the queries: turns in line, and rows as text."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections import Counter
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from corral.processors.query import results
from corral.processors.query.fairqueue import FairQueue
from corral.processors.query.guard.errors import QueryError
from corral.schemas.query import ResultFormat
from hypothesis import given, settings
from hypothesis import strategies as st

ASKERS = st.sampled_from(["a", "b", "c"])
MOVES = st.lists(st.tuples(st.sampled_from(["put", "take", "done", "remove"]), ASKERS), max_size=120)


@given(MOVES, st.integers(1, 4), st.integers(1, 3), st.integers(1, 12))
def test_nothing_is_lost_or_run_twice_and_no_bound_is_passed(
    moves: list[tuple[str, str]], slots: int, per_asker: int, waiting: int
) -> None:
    queue: FairQueue[int] = FairQueue(slots, per_asker, waiting)
    lines: dict[str, list[int]] = {asker: [] for asker in "abc"}
    running: Counter[str] = Counter()
    for number, (move, asker) in enumerate(moves):
        if move == "put":
            own, longest = len(lines[asker]), max(map(len, lines.values()))
            full = sum(map(len, lines.values())) >= waiting
            room = own < max(1, waiting // 2) and not (full and longest <= own + 1)
            left = queue.put(asker, number)
            assert (left is not None) == room
            assert len(left or ()) == (room and full)
            for entry in left or ():  # the last of one who has the most
                [line] = [line for line in lines.values() if entry in line]
                assert len(line) == longest
                assert line.pop() == entry
            if room:
                lines[asker].append(number)
        elif move == "take":
            taken = queue.take()
            # The second half of the slots is for those of whom nothing runs.
            more = per_asker if running.total() < slots - slots // 2 else 1
            ready = [name for name in lines if lines[name] and running[name] < min(more, per_asker)]
            assert (taken is None) == (running.total() >= slots or not ready)
            if taken is not None:
                # First in first out within an asker.
                assert lines[taken[0]].pop(0) == taken[1]
                running[taken[0]] += 1
        elif move == "done" and running[asker]:
            queue.done(asker)
            running[asker] -= 1
        elif move == "remove":
            entry = lines[asker][-1] if lines[asker] else -1
            assert queue.remove(entry) == bool(lines[asker])
            lines[asker] = lines[asker][:-1]
        assert len(queue) == sum(map(len, lines.values()))
        assert queue.running == running.total() <= slots
        assert max(running.values(), default=0) <= per_asker


@given(st.lists(ASKERS, min_size=1, max_size=40))
def test_askers_take_turns(entries: list[str]) -> None:
    """With one slot, between two queries of one asker each other asker that waits gets one."""
    queue: FairQueue[int] = FairQueue(1, 1, 100)
    for number, asker in enumerate(entries):
        assert queue.put(asker, number) == []
    left = Counter(entries)
    order: list[str] = []
    while (taken := queue.take()) is not None:
        order.append(taken[0])
        queue.done(taken[0])
    assert Counter(order) == left
    for asker in left:
        turns = [at for at, name in enumerate(order) if name == asker]
        for first, second in itertools.pairwise(turns):
            still = {name for name in left if name != asker and name in order[first + 1 :]}
            assert still <= set(order[first + 1 : second])


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "BIGINT": st.integers(-(2**63), 2**63 - 1),
    "HUGEINT": st.integers(-(2**126), 2**126),
    "DOUBLE": st.floats(),
    "FLOAT": st.floats(width=32),
    "VARCHAR": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20),
    "BOOLEAN": st.booleans(),
    "BIGINT[]": st.lists(st.none() | st.integers(-(2**63), 2**63 - 1), max_size=4),
    "DOUBLE[][]": st.lists(st.lists(st.floats(), max_size=3), max_size=3),
}
ROWS = st.lists(st.tuples(*(st.none() | strategy for strategy in VALUES.values())), min_size=1, max_size=8)


DATABASE = duckdb.connect()


def written(rows: list[tuple[Any, ...]], form: ResultFormat) -> str:
    kinds = (
        pa.int64(), pa.decimal128(38), pa.float64(), pa.float32(), pa.string(), pa.bool_(), pa.list_(pa.int64()),
        pa.list_(pa.list_(pa.float64())),
    )  # fmt: skip
    columns = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), kinds, strict=True)]
    DATABASE.register("given", pa.table(columns, names=[f"c{at}" for at in range(len(kinds))]))
    casts = ", ".join(f"c{at}::{type} AS c{at}" for at, type in enumerate(VALUES))
    DATABASE.execute(f"CREATE OR REPLACE TABLE t AS SELECT {casts} FROM given")
    cursor = DATABASE.execute("FROM t")
    description = cursor.description or []
    writer = results.writer(form)
    reader = cursor.to_arrow_reader(3)
    text = writer.start([str(d[0]) for d in description], [str(d[1]) for d in description], reader.schema)
    for batch in reader:
        text += writer.write(batch)
    return (text + writer.end(False)).decode()


def expected(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        case list():
            return [expected(item) for item in value]
        case _:
            return value


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_json_says_what_the_database_holds(rows: list[tuple[Any, ...]]) -> None:
    answer = json.loads(written(rows, ResultFormat.JSON))
    assert answer["types"] == list(VALUES)
    single = list(VALUES).index("FLOAT")
    for found, row in zip(answer["rows"], rows, strict=True):
        for at, (value, meant) in enumerate(zip(found, map(expected, row), strict=True)):
            # A FLOAT has as few digits as name it among its own kind.
            assert value == meant or (at == single and np.float32(value) == np.float32(meant))


@settings(max_examples=40, deadline=None)
@given(ROWS)
def test_csv_is_read_back_by_a_csv_reader(rows: list[tuple[Any, ...]]) -> None:
    text = written(rows, ResultFormat.CSV)
    read = list(csv.reader(io.StringIO(text, newline="")))[1:]
    names = list(VALUES)
    assert len(read) == len(rows)
    for cells, row in zip(read, rows, strict=True):
        for name, cell, value in zip(names, cells, row, strict=True):
            if value is None:
                assert cell == ""
            elif name in ("BIGINT", "HUGEINT"):
                assert int(cell) == value
            elif name == "VARCHAR":
                assert cell == value
            elif name == "FLOAT":
                assert math.isnan(float(cell)) if math.isnan(value) else np.float32(cell) == np.float32(value)
            elif name == "DOUBLE":
                assert math.isnan(float(cell)) if math.isnan(value) else float(cell) == value
            elif "[" in name:
                assert json.loads(cell) == expected(value)


LEAVES: dict[str, Any] = {
    "1::UTINYINT": 1,
    "true": True,
    "'é'": "é",
    "'infinity'::DATE": "infinity",
    "'-infinity'::DATE": "-infinity",
    "DATE '2026-02-28'": "2026-02-28",
    "DATE '10000-01-01'": "10000-01-01",
    "'5877642-06-25 (BC)'::DATE": "-5877641-06-25",
    "DATE '5881580-07-10'": "5881580-07-10",
    "TIME '12:30:01.5'": "12:30:01.500000",
    "TIMESTAMP '2026-01-01 00:00:00.5'": "2026-01-01T00:00:00.500000Z",
    "TIMESTAMPTZ '2026-01-01 00:00:00.5+02'": "2025-12-31T22:00:00.500000Z",
    "TIMESTAMP_S '2026-01-01 00:00:00'": "2026-01-01T00:00:00Z",
    "TIMESTAMP_MS '2026-01-01 00:00:00.001'": "2026-01-01T00:00:00.001Z",
    "TIMESTAMP_NS '2026-01-01 00:00:00.123456789'": "2026-01-01T00:00:00.123456789Z",
    "TIMESTAMP '290000-12-31 23:59:59.000001'": "290000-12-31T23:59:59.000001Z",
    "TIMESTAMP '200000-01-02 (BC)'": "-199999-01-02T00:00:00.000000Z",
    "TIMESTAMP '0044-03-15 (BC)'": "-0043-03-15T00:00:00.000000Z",
    "'infinity'::TIMESTAMP": "infinity",
    "'-infinity'::TIMESTAMPTZ": "-infinity",
    "INTERVAL '1 month 2 days 3.5 seconds'": "P1M2DT3.5S",
    "0.1::FLOAT": 0.1,
    "'NaN'::DOUBLE": "NaN",
    "85070591730234615865843651857942052864::HUGEINT": 2**126,
    "(-170141183460469231731687303715884105728)::HUGEINT": -(2**127),
    "18446744073709551615::UBIGINT": 2**64 - 1,
    "12345678901234567890123456789.123456789::DECIMAL(38,9)": "12345678901234567890123456789.123456789",
    "'00000000-0000-0000-0000-000000000001'::UUID": "00000000-0000-0000-0000-000000000001",
    "'x'::ENUM('x', 'y')": "x",
    "'a'::BLOB": "YQ==",
    "row(1, 'a')": [1, "a"],
    "{'a': 1, 'b': NULL}": {"a": 1, "b": None},
    "MAP {'k': [1, NULL]}": {"k": [1, None]},
    "MAP {2: 'two'}": [[2, "two"]],
    "[[1], NULL, []]": [[1], None, []],
    "union_value(at := 'infinity'::TIMESTAMP)": "infinity",
}
"""What DuckDB has, and how JSON says it wherever it stands."""


def in_json(query: str, form: ResultFormat = ResultFormat.JSON) -> Any:
    cursor = duckdb.connect().execute(query)
    description = cursor.description or []
    types = [str(column[1]) for column in description]
    results.check_types(types, form)
    writer = results.writer(form)
    reader = cursor.to_arrow_reader(2048)
    text = writer.start([str(column[0]) for column in description], types, reader.schema)
    for batch in reader:
        for at in range(0, batch.num_rows, 3):
            text += writer.write(batch.slice(at, 3))
    text += writer.end(False)
    return json.loads(text, parse_float=lambda digits: digits if len(digits) > 17 else float(digits))["rows"]


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_value_is_written_alike_wherever_it_stands(leaf: str) -> None:
    """Beside nulls, and in batches that are slices of larger ones."""
    query = (
        "SELECT v, [v, NULL], {'a': v, 'b': [v]}, MAP {'k': v}, MAP {i: v}, [v, v]::ANY_TYPE[2], "
        f"CASE WHEN i % 3 > 0 THEN [{{'a': v}}, NULL] END "
        f"FROM (SELECT i, CASE WHEN i % 2 > 0 THEN {leaf} END AS v FROM range(7) t(i))"
    ).replace("::ANY_TYPE[2]", "")
    rows = in_json(query)
    for i, row in enumerate(rows):
        v = LEAVES[leaf] if i % 2 else None
        nested = [{"a": v}, None] if i % 3 else None
        assert row == [v, [v, None], {"a": v, "b": [v]}, {"k": v}, [[i, v]], [v, v], nested]
    assert in_json(f"SELECT array_value(v, NULL, v) FROM (SELECT {leaf} AS v) UNION ALL SELECT NULL") == [
        [[LEAVES[leaf], None, LEAVES[leaf]]],
        [None],
    ]


def test_what_has_no_form_is_refused_not_written_wrong() -> None:
    whole = "340282366920938463463374607431768211455::UHUGEINT"
    assert in_json(f"SELECT {whole}, 7::UHUGEINT, '101'::BIT, 1 AS \"BIGNUM\"") == [[2**128 - 1, 7, "101", 1]]
    assert in_json("SELECT {'BIT': 1, 'BIGNUM': 'BIT'::ENUM('BIT')}") == [[{"BIT": 1, "BIGNUM": "BIT"}]]
    for refused in (
        f"[{whole}]",
        "{'a': '1'::BIT}",
        "[1::BIGNUM]",
        "1::BIGNUM",
        "1::VARIANT",
        "MAP {1: TIMETZ '12:00:00+00'}",
    ):
        with pytest.raises(QueryError, match="cast it to VARCHAR"):
            in_json(f"SELECT {refused}")
    with pytest.raises(QueryError, match="UHUGEINT"):
        in_json(f"SELECT {whole}", ResultFormat.ARROW)
