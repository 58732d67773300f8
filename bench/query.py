"""How fast are the views, beside the same questions in PromQL on VictoriaMetrics over the same data?

usage: python bench/query.py [--gpus 1000] [--hours 24] [--runs 3] [--skip-victoria]

A history of `--gpus` at 1 Hz is written through the storage's own path, its rollups refreshed as in life, and five
views and three questions of a dashboard asked of it. The same samples of the five metrics that these need, and the
leases (one value a minute), go to a VictoriaMetrics single-node by its JSON-line import, and are asked by MetricsQL.
Each question is asked `--runs` times after one to warm up; the best time counts, on both sides, with the caches for
whole results off. Both have the same cores, one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
from corral.schemas.metrics import METRICS

# The catalogue is cut to what the views read: filling 60 more columns with nulls takes long, and changes no answer.
_PROCESSORS = Path(__file__).parents[1] / "processors"
_READ = "".join(path.read_text() for path in (_PROCESSORS / "views").glob("*.sql"))
_READ += (_PROCESSORS / "storage" / "rollup_derived.py").read_text()
for _name in [name for name in METRICS if name not in _READ]:
    del METRICS[_name]

from corral.processors import views  # noqa: E402
from corral.processors.storage.embedded import rollups  # noqa: E402
from corral.processors.storage.embedded.database import Database  # noqa: E402
from corral.processors.storage.protocol import Batch  # noqa: E402

LEASE_HOURS = 6
METRIC_NAMES = {
    "gpu_utilization_percent": "util",
    "power_watts": "power",
    "memory_used_bytes": "memory",
    "temperature_celsius": "temperature",
    "throttle_reasons_bitmask": "throttle",
}

# The load is a function of device and time alone, so that both sides get the same without a copy: half hours that are
# idle or busy, noise within them, memory by lease, heat by load.
GENERATED = """
    WITH t AS (
        SELECT s.range AS second, d.range AS gpu FROM range({start}, {end}) s, range({first}, {last}) d
    ), u AS (
        SELECT *, CASE WHEN hash(gpu, second // 1800) % 4 = 0 THEN 0 ELSE 60 + hash(gpu, second) % 41 END AS util,
            10 + hash(gpu, second // {lease}) % 60 AS gib FROM t
    )
    SELECT make_timestamptz(second * 1000000) AS time, gpu::INTEGER AS series, second, gpu,
        util::FLOAT AS gpu_utilization_percent, (60 + 5 * util)::FLOAT AS power_watts,
        (CASE WHEN util = 0 THEN 1 ELSE gib END * 1073741824)::BIGINT AS memory_used_bytes,
        85899345920 AS memory_total_bytes, (30 + util // 2)::FLOAT AS temperature_celsius,
        CASE WHEN util >= 98 THEN 64 WHEN util = 0 THEN 1 ELSE 0 END::BIGINT AS throttle_reasons_bitmask
    FROM u
"""


def generated(start: int, end: int, first: int, last: int) -> str:
    return GENERATED.format(start=start, end=end, first=first, last=last, lease=LEASE_HOURS * 3600)


def fill(database: Database, gpus: int, start: int, end: int) -> tuple[float, float]:
    """Write the samples and refresh the rollups; the seconds that each took."""
    for gpu in range(gpus):
        database.series.number(f"host{gpu // 8:04}", f"gpu{gpu:06}")
    source = duckdb.connect()
    nulls = ", ".join(f"NULL::{metric.row.unit.sql} AS {name}" for name, metric in METRICS.items())
    order = ", ".join(METRICS)
    shape = source.sql(f"SELECT NULL::TIMESTAMPTZ AS time, NULL::INTEGER AS series, {nulls} LIMIT 0")  # noqa: F841
    writing = refreshing = 0.0
    cursor = database.cursor()
    step = 900
    for number, second in enumerate(range(start, end, step)):
        table = source.sql(
            f"SELECT time, series, {order} FROM (FROM shape UNION ALL BY NAME "
            f"SELECT * EXCLUDE (second, gpu) FROM ({generated(second, second + step, 0, gpus)}))"
        ).to_arrow_table()
        began = time.perf_counter()
        database.commit(Batch(stream="bench", sequence=number + 1, samples=table, messages=1))
        written = time.perf_counter()
        if number % 8 == 7 or second + step >= end:
            for level in rollups.LEVELS:
                rollups.refresh(cursor, level, sorted(database.days))
        writing += written - began
        refreshing += time.perf_counter() - written
        if number % 12 == 11:
            print(f"  {(number + 1) * step / 3600:g} h written", flush=True)
    return writing, refreshing


LEASES = """
    SELECT 'lease' || g.range || '_' || k.range AS lease_id, 'owner' || g.range % 20 AS owner,
        'work' || (g.range + k.range) % 50 AS name, 'host' || lpad((g.range // 8)::VARCHAR, 4, '0') AS host,
        'gpu' || lpad(g.range::VARCHAR, 6, '0') AS device, k.range * {lease} AS first,
        least((k.range + 1) * {lease}, {end}) AS last
    FROM range({gpus}) g, range({start} // {lease}, ({end} - 1) // {lease} + 1) k
"""


def lease_rows(gpus: int, start: int, end: int) -> str:
    sql = LEASES.format(gpus=gpus, start=start, end=end, lease=LEASE_HOURS * 3600)
    return f"SELECT * REPLACE (greatest(first, {start}) AS first) FROM ({sql})"


def add_facts(database: Database, gpus: int, start: int, end: int) -> None:
    cursor = database.cursor()
    cursor.execute(f"CREATE TEMP TABLE made AS {lease_rows(gpus, start, end)}")
    cursor.execute(
        "INSERT INTO leases BY NAME SELECT lease_id, owner, name, 'released' AS state, "
        "make_timestamptz(first * 1000000) AS granted_at, make_timestamptz(last * 1000000) AS expires_at, "
        "make_timestamptz(last * 1000000) AS ended_at FROM made"
    )
    cursor.execute(
        "INSERT INTO lease_devices BY NAME SELECT lease_id, host, device, 1.0 AS share, 80 * 2::BIGINT ** 30 AS "
        "memory_bytes FROM made"
    )
    cursor.execute("INSERT INTO hosts BY NAME SELECT DISTINCT host, 1.0 AS interval_seconds FROM made")
    cursor.execute(
        "INSERT INTO devices BY NAME SELECT DISTINCT device, host, 'H100' AS name, true AS present, "
        "false AS mig_enabled FROM made"
    )


class Victoria:
    """A VictoriaMetrics single-node on a free loopback port, with its data in a folder that goes with it."""

    def __init__(self) -> None:
        binary = shutil.which("victoria-metrics")
        if binary is None:
            sys.exit("victoria-metrics is not installed (apt-get install victoria-metrics); or --skip-victoria")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self.folder = tempfile.mkdtemp(prefix="victoria")
        self.process = subprocess.Popen(
            [
                binary, f"-storageDataPath={self.folder}", f"-httpListenAddr={self.url[7:]}", "-retentionPeriod=10y",
                "-search.disableCache", "-search.maxQueryDuration=10m", "-search.maxSamplesPerQuery=10000000000",
                "-search.maxPointsPerTimeseries=1000000", "-search.maxSamplesPerSeries=100000000",
                "-loggerLevel=ERROR",
            ],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        for _ in range(100):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=1).read()
                return
            time.sleep(0.1)
        raise RuntimeError("victoria-metrics did not start")

    def post(self, path: str, body: bytes) -> None:
        urllib.request.urlopen(urllib.request.Request(self.url + path, data=body), timeout=600).read()

    def ask(self, query: str, start: int, end: int, step: int) -> list[Any]:
        if step:
            path, fields = "query_range", {"query": query, "start": start, "end": end, "step": step, "nocache": 1}
        else:
            path, fields = "query", {"query": query, "time": end, "nocache": 1}
        body = urllib.parse.urlencode(fields).encode()
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}", data=body, timeout=600) as answer:
            return json.loads(answer.read())["data"]["result"]

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def fill_victoria(victoria: Victoria, gpus: int, start: int, end: int) -> None:
    source = duckdb.connect()
    values = ", ".join(f"list({name}::BIGINT ORDER BY second) AS {short}" for name, short in METRIC_NAMES.items())
    at_once = max(1, 400_000 // 3600)
    for hour in range(start, end, 3600):
        last = min(hour + 3600, end)
        for first in range(0, gpus, at_once):
            rows = generated(hour, last, first, min(first + at_once, gpus))
            source.execute(
                f"CREATE OR REPLACE TEMP TABLE hour AS SELECT gpu, {values}, "
                f"list(second * 1000 ORDER BY second) AS times FROM ({rows}) GROUP BY gpu"
            )
            lines = [
                line
                for short in METRIC_NAMES.values()
                for (line,) in source.execute(
                    f"SELECT to_json({{'metric': {{'__name__': 'gpu_{short}', "
                    "'host': 'host' || lpad((gpu // 8)::VARCHAR, 4, '0'), "
                    "'device': 'gpu' || lpad(gpu::VARCHAR, 6, '0')}, "
                    f"'values': {short}, 'timestamps': times}}) FROM hour"
                ).fetchall()
            ]
            victoria.post("/api/v1/import", "\n".join(lines).encode())
        if (hour - start) // 3600 % 4 == 3:
            print(f"  {(last - start) / 3600:g} h imported", flush=True)
    leases = source.execute(
        "SELECT to_json({'metric': {'__name__': 'lease', 'lease_id': lease_id, 'owner': owner, 'name': name, "
        "'device': device}, 'values': [1 FOR x IN s], 'timestamps': s}) FROM (SELECT *, "
        f"[x * 1000 FOR x IN range(first, last, 60)] AS s FROM ({lease_rows(gpus, start, end)}))"
    ).fetchall()
    victoria.post("/api/v1/import", "\n".join(row[0] for row in leases).encode())
    victoria.post("/internal/force_flush", b"")


def questions(hours: int) -> list[tuple[str, str, str, int]]:
    """Name, SQL, MetricsQL, step of the latter (0 for an instant)."""
    day = f"{hours}h"
    return [
        ("fleet_by_hour", "FROM fleet_by_hour ORDER BY hour",
         "union(label_set(avg(avg_over_time(gpu_util[1h])),'q','util'),label_set(sum(avg_over_time(gpu_power[1h])),"
         "'q','power'),label_set(sum(avg_over_time(gpu_memory[1h])),'q','memory'),"
         "label_set(max(max_over_time(gpu_temperature[1h])),'q','temperature'))", 3600),
        ("idle_while_leased", "FROM idle_while_leased",
         f"count_over_time(((lease * on(device) group_left() avg_over_time(gpu_util[1m])) < 5)[{day}:1m])", 0),
        ("lease_usage", "FROM lease_usage",
         f"union(label_set(quantile_over_time(0.95,(lease * on(device) group_left() gpu_util)[{day}:10s]),'q','p95'),"
         f"label_set(avg_over_time((lease * on(device) group_left() gpu_util)[{day}:10s]),'q','mean'),"
         f"label_set(sum_over_time((lease * on(device) group_left() gpu_power)[{day}:10s]),'q','energy'),"
         f"label_set(max_over_time((lease * on(device) group_left() gpu_memory)[{day}:10s]),'q','peak'))", 0),
        ("throttling", "FROM throttling",
         "count_over_time((bitmap_and(gpu_throttle, 236) > 0)[1h:10s]) * 10", 3600),
        ("memory_right_sizing", "FROM memory_right_sizing",
         f"quantile(0.99, max_over_time((lease * on(device) group_left() gpu_memory)[{day}:1m])) by (name)", 0),
        ("dashboard: devices now", "FROM devices_now",
         "union(label_set(last_over_time(gpu_util[1m]),'q','util'),label_set(last_over_time(gpu_memory[1m]),'q','memory'),"
         "label_set(last_over_time(gpu_temperature[1m]),'q','temperature'),label_set(avg_over_time(gpu_power[10s]),"
         "'q','power'))", 0),
        ("dashboard: a device by minute",
         "SELECT time, gpu_utilization_percent_mean, power_watts_mean FROM rollup_1m WHERE device = 'gpu000007' "
         "ORDER BY time",
         "union(label_set(avg_over_time(gpu_util{device='gpu000007'}[1m]),'q','util'),"
         "label_set(avg_over_time(gpu_power{device='gpu000007'}[1m]),'q','power'))", 60),
        ("dashboard: power by host, last hour",
         "SELECT time, host, sum(power_watts_mean) FROM rollup_1m WHERE time >= now() - INTERVAL 30 MINUTES "
         "GROUP BY ALL",
         "sum(avg_over_time(gpu_power[1m])) by (host)", -60),
    ]  # fmt: skip


def best(ask: Any, runs: int) -> tuple[float, int]:
    rows = len(ask())
    times: list[float] = []
    for _ in range(runs):
        began = time.perf_counter()
        ask()
        times.append(time.perf_counter() - began)
    return min(times), rows


def with_victoria(arguments: argparse.Namespace, start: int, end: int) -> Iterator[tuple[str, float, int]]:
    victoria = Victoria()
    try:
        began = time.perf_counter()
        fill_victoria(victoria, arguments.gpus, start, end)
        points = arguments.gpus * (end - start) * len(METRIC_NAMES)
        size = sum(file.stat().st_size for file in Path(victoria.folder).rglob("*") if file.is_file())
        print(
            f"VictoriaMetrics: {points / 1e6:.0f} M points in {time.perf_counter() - began:.0f} s "
            f"({victoria.cpu_seconds():.0f} CPU-seconds), {size / 2**20:.0f} MiB",
            flush=True,
        )
        for name, _, query, step in questions(arguments.hours):
            first = end - 3600 if step < 0 else start + 3600 if step == 3600 else start
            try:
                if name == "fleet_by_hour":
                    answer = victoria.ask(query, first, end, abs(step))
                    print("  check:", {r["metric"]["q"]: float(r["values"][-1][1]) for r in answer}, flush=True)
                asked = functools.partial(victoria.ask, query, first, end, abs(step))
                yield name, *best(asked, arguments.runs)
            except OSError as error:
                print(f"  {name}: VictoriaMetrics failed: {error}", flush=True)
    finally:
        victoria.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1000)
    parser.add_argument("--hours", type=int, default=24)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--skip-victoria", action="store_true")
    arguments = parser.parse_args()
    # Half an hour ahead, so that what is asked of "now" is there however long the filling takes.
    end = (int(time.time()) + 1800) // 900 * 900
    start = end - arguments.hours * 3600
    samples = arguments.gpus * arguments.hours * 3600
    print(f"{arguments.gpus} GPUs, {arguments.hours} h at 1 Hz: {samples / 1e6:.1f} M samples, {os.cpu_count()} cores")
    ours: dict[str, tuple[float, int]] = {}
    folder = tempfile.mkdtemp(prefix="corral-bench")
    try:
        database = Database(Path(folder) / "history.duckdb")
        writing, refreshing = fill(database, arguments.gpus, start, end)
        add_facts(database, arguments.gpus, start, end)
        cursor = database.cursor()
        views.install(cursor)
        cursor.execute("CHECKPOINT")
        print(
            f"Corral: written in {writing:.0f} s, rollups refreshed in {refreshing:.0f} s, "
            f"{database.size_bytes() / 2**20:.0f} MiB",
            flush=True,
        )
        for name, sql, _, _ in questions(arguments.hours):
            ours[name] = best(lambda s=sql: cursor.execute(s).fetchall(), arguments.runs)
            if name == "fleet_by_hour":
                columns = "gpu_utilization_percent, power_watts, temperature_celsius_max"
                print(
                    "  check:",
                    cursor.execute(f"SELECT {columns} FROM fleet_by_hour ORDER BY hour DESC LIMIT 2").fetchall(),
                )
            print(f"  {name:<36} {1000 * ours[name][0]:>9.1f} ms  {ours[name][1]:>7} rows", flush=True)
        database.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if arguments.skip_victoria:
        return
    theirs = {name: (seconds, rows) for name, seconds, rows in with_victoria(arguments, start, end)}
    print(f"\n{'question':<40} {'Corral':>12} {'rows':>7} {'VictoriaMetrics':>16} {'series':>7} {'times':>8}")
    for name, (seconds, rows) in ours.items():
        if name in theirs:
            other, series = theirs[name]
            print(
                f"{name:<40} {1000 * seconds:>9.1f} ms {rows:>7} {1000 * other:>13.1f} ms {series:>7} "
                f"{other / seconds:>7.1f}×"
            )


if __name__ == "__main__":
    main()
