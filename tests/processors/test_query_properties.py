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
from corral.processors.sql import results
from corral.processors.sql.fairqueue import FairQueue
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
