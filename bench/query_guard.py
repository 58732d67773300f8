"""How much does the guard add to a question, and what does a flood of statements without bounds change?

    python bench/query_guard.py
    python bench/query_guard.py --questions 100

Each question is new to the guard, as results of a text that was asked before are kept. The peer of each row is the
question itself, run on a new cursor of an empty history: a real one takes as long to plan, and then reads rows. The
last rows ask plain questions while two threads send statements whose size doubles with each of 30 levels.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
from corral.processors.query.guard.errors import QueryError
from corral.processors.query.guard.guard import SqlGuard
from corral.processors.storage.embedded.database import Database

PLAIN = (
    "SELECT {}",
    "SELECT host, avg(power_watts) FROM samples WHERE device <> 'gpu{}' GROUP BY host",
    "SELECT time, gpu_utilization_percent_mean FROM rollup_1m WHERE device = 'gpu{}' ORDER BY time",
    "SELECT owner, name, state, granted_at FROM leases WHERE owner <> 'user{}' ORDER BY granted_at DESC",
    "SELECT count(*) FROM events WHERE host = 'host{}'",
)
ANALYTIC = (
    "SELECT * FROM devices_now WHERE host <> 'host{}'",
    "SELECT * FROM fleet_by_hour LIMIT {}",
    "SELECT * FROM lease_usage LIMIT {}",
)
GROWING = "SELECT {} AS a0" + "".join(f", a{level} + a{level} AS a{level + 1}" for level in range(30))


def row(name: str, seconds: Sequence[float]) -> str:
    """Percentiles of some times, in milliseconds."""
    ordered = sorted(seconds)
    at = [ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.9, 0.99)]
    return f"{name:<58} {len(ordered):>6}" + "".join(f"{1000 * value:>9.2f}" for value in at)


def ask(
    database: Database, guarded: SqlGuard, questions: Sequence[str], times: int, first: int = 1
) -> tuple[list[float], list[float]]:
    """Seconds that the guard takes for each question, and that the question itself takes; numbered from `first`."""
    checked: list[float] = []
    run: list[float] = []
    for number in range(first, first + times):
        for question in questions:
            began = time.perf_counter()
            statement = guarded.check(question.format(number), 100)
            checked.append(time.perf_counter() - began)
            cursor = database.cursor()
            began = time.perf_counter()
            cursor.execute(statement.limited).fetchall()
            run.append(time.perf_counter() - began)
            cursor.close()
    return checked, run


@contextlib.contextmanager
def flood(guarded: SqlGuard, threads: int) -> Iterator[list[float]]:
    """Send statements that grow without bounds, one after the other in each thread; yields the seconds of each."""
    stop = threading.Event()
    seconds: list[float] = []

    def send(thread: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            began = time.perf_counter()
            with contextlib.suppress(QueryError):
                guarded.check(GROWING.format(10_000 * thread + number), 100)
            seconds.append(time.perf_counter() - began)

    senders = [threading.Thread(target=send, args=(thread,)) for thread in range(threads)]
    for sender in senders:
        sender.start()
    try:
        yield seconds
    finally:
        stop.set()
        for sender in senders:
            sender.join()


def memory() -> str:
    """Memory of the processes that check statements."""
    children = psutil.Process().children(recursive=True)
    own = sum(child.memory_full_info().uss for child in children)
    shared = max((child.memory_info().rss for child in children), default=0)
    return f"{len(children)} processes that check: {own >> 20} MiB of their own, {shared >> 20} MiB the largest in all"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=200, help="times that each plain question is asked")
    arguments = parser.parse_args()
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{os.cpu_count()} cores, load {load}")
    with tempfile.TemporaryDirectory() as folder:
        database = Database(Path(folder) / "history.duckdb")
        guarded = SqlGuard(database.cursor)
        began = time.perf_counter()
        guarded.start()
        print(f"started, known statements checked, schema copied in {time.perf_counter() - began:.2f} s")
        print(f"{'ms':<58} {'number':>6}{'p50':>9}{'p90':>9}{'p99':>9}")
        for name, questions, times in (
            ("plain questions", PLAIN, arguments.questions),
            ("analytic views", ANALYTIC, max(1, arguments.questions // 10)),
        ):
            checked, run = ask(database, guarded, questions, times)
            print(row(f"{name}: the guard adds", checked))
            print(row(f"{name}: without the guard", run))
        print(memory())
        with flood(guarded, 2) as refused:
            checked, _ = ask(database, guarded, PLAIN, max(1, arguments.questions // 10), arguments.questions + 1)
        print(row("plain questions in a flood of growth: the guard adds", checked))
        print(row("the flood: until refused", refused))
        guarded.close()
        database.close()


if __name__ == "__main__":
    main()
