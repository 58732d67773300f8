"""How fast does telemetry become history in a lake? From a full stream of partitions to committed Parquet files.

    python bench/lake.py                          one processor and two, beside the embedded storage
    python bench/lake.py --alone                  what transactions and rollups cost by themselves

A real nats-server holds the messages, a real PostgreSQL the catalog; the processors are `corral process --lake` in
processes of their own, started together over a full stream. The limit beside them is `bench/ingest.py`'s own run of the
embedded storage over the same values on the same machine. The CPU time of a processor is that of its whole process. A
run over few samples comes first, so that what starting, connecting and taking parts costs can be left out. Everything
runs on this machine at once, so what others do on it shows in the seconds, and much less in the CPU seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ingest
import numpy as np
import pyarrow as pa
from corral.bus.connect import connect
from corral.bus.layout import ensure_layout
from corral.cli.local.server import EmbeddedServer
from corral.processors.ingest.columnar import SCHEMA
from corral.processors.ingest.partitions import ensure_stream
from corral.processors.storage.lake import lake as lakes
from corral.processors.storage.lake import rollups
from corral.processors.storage.rollup_columns import LEVELS
from servers import cpu_seconds

if TYPE_CHECKING:
    from support.postgres import Postgres

PARTITIONS = 4
SECONDS = 150
BATCH_ROWS = 600_000
"""About what 64 MiB of messages hold."""


async def partitioned(url: str) -> None:
    nc = await connect(url)
    await ensure_layout(nc.jetstream(), max_bytes_scale=4)
    await ensure_stream(nc.jetstream(), PARTITIONS)
    await nc.close()


def run(name: str, processors: int, samples: int, publish: object, postgres: Postgres) -> tuple[float, float]:
    """Returns seconds until all is stored, and CPU-seconds of the processors."""
    folder = Path(tempfile.mkdtemp(prefix="bench-lake-"))
    server = EmbeddedServer(folder / "nats")
    server.start()
    assert server.process is not None
    started: list[subprocess.Popen[bytes]] = []
    try:
        asyncio.run(partitioned(server.url))
        assert callable(publish)
        asyncio.run(publish(server.url))
        lake = lakes.Lake(postgres.database(name), str(folder / "lake"))
        lakes.prepare(lake, PARTITIONS)
        reader = lakes.attach(lake, read_only=True)
        before, began = cpu_seconds(server.process.pid), time.perf_counter()
        command = [sys.executable, "-m", "corral.cli.main", "process", "--lake", lake.catalog, "--lake-data", lake.data]
        command += ["--partitions", str(PARTITIONS), "--nats", server.url]
        started += [
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(processors)
        ]
        stored, first = 0, 0.0
        while stored < samples and time.perf_counter() - began < SECONDS:
            time.sleep(0.2)
            (stored,) = reader.execute("SELECT count(*) FROM samples").fetchone() or (0,)
            if stored and not first:
                first = time.perf_counter() - began
        seconds = time.perf_counter() - began
        cpu = [cpu_seconds(process.pid) for process in started]
        files = list((folder / "lake").rglob("samples/**/*.parquet"))
        size = sum(file.stat().st_size for file in files)
        print(
            f"lake, {processors} processor(s), {PARTITIONS} partitions: {stored:,} of {samples:,} samples in "
            f"{seconds:.1f} s from the start of the processes (first seen after {first:.1f} s), "
            f"{stored / seconds / 1e6:.3f} M samples/s; CPU-seconds {' + '.join(f'{c:.1f}' for c in cpu)}, "
            f"{stored / sum(cpu) / 1e6:.3f} M samples per CPU-second; nats-server "
            f"{cpu_seconds(server.process.pid) - before:.1f}; "
            f"{len(files)} files, {size / max(1, stored):.1f} bytes a sample",
            flush=True,
        )
        reader.close()
        return seconds, sum(cpu)
    finally:
        for process in started:
            process.kill()
            process.wait()
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


def commits(postgres: Postgres) -> None:
    """What a transaction costs by itself: the smallest batch, one writer."""
    folder = Path(tempfile.mkdtemp(prefix="bench-lake-"))
    try:
        lake = lakes.Lake(postgres.database("bench_commits"), str(folder), threads=1)
        part = lakes.LakePart(lake, lakes.prepare(lake, 1), "CORRAL_FACTS")
        part.resume("CORRAL_FACTS", "now")
        spent: list[float] = []
        for sequence in range(1, 60):
            began = time.perf_counter()
            part.commit(lakes.Batch(stream="CORRAL_FACTS", sequence=sequence, refused={"invalid": 1}))
            spent.append(time.perf_counter() - began)
        part.close()
        spent.sort()
        print(f"a commit without samples: median {spent[30] * 1000:.0f} ms, slowest of 59 {spent[-1] * 1000:.0f} ms")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def writing(data: dict[str, np.ndarray[Any, Any]], postgres: Postgres) -> None:
    """What the transactions of large batches and the rollups cost by themselves: no bus, values ready in memory."""
    folder = Path(tempfile.mkdtemp(prefix="bench-lake-"))
    ticks, devices = next(iter(data.values())).shape
    rows = ticks * devices
    try:
        lake = lakes.Lake(postgres.database("bench_writing"), str(folder))
        part = lakes.LakePart(lake, lakes.prepare(lake, 1), "CORRAL_PARTITIONS/0")
        part.resume(part.part, "now")
        numbers = [part.series.number(f"node-{at // 8}", f"GPU-{at:08x}") for at in range(devices)]
        times = np.repeat(ingest.START_NS // 1000 + np.arange(ticks, dtype="<i8") * 10**6, devices)
        columns = {"time": pa.array(times).cast(SCHEMA.field("time").type), "series": np.tile(numbers, ticks)}
        columns |= {name: array.reshape(-1) for name, array in data.items()}
        arrays = [pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(rows, f.type) for f in SCHEMA]
        table = pa.Table.from_arrays(arrays, schema=SCHEMA)
        cpu, began = time.process_time(), time.perf_counter()
        for sequence, first in enumerate(range(0, rows, BATCH_ROWS), start=1):
            part.commit(lakes.Batch(stream=part.part, sequence=sequence, samples=table.slice(first, BATCH_ROWS)))
        cpu, seconds = time.process_time() - cpu, time.perf_counter() - began
        print(f"transactions of {BATCH_ROWS:,} samples: {rows / cpu / 1e6:.2f} M per CPU-second, {seconds:.1f} s")
        connection = lakes.attach(lake)
        for level in LEVELS:
            cpu, began = time.process_time(), time.perf_counter()
            buckets = rollups.refresh(connection, level)
            cpu, seconds = time.process_time() - cpu, time.perf_counter() - began
            print(
                f"rollup {level.name}: {cpu / rows * 1e6:.1f} µs of CPU time a sample, {seconds:.1f} s, "
                f"{buckets:,} buckets of {rows:,} samples",
                flush=True,
            )
        connection.close()
        part.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2000)
    parser.add_argument("--ticks", type=int, default=1200, help="one a second")
    parser.add_argument("--ticks-per-message", type=int, default=60)
    parser.add_argument("--alone", action="store_true", help="transactions and rollups only, without processors")
    given = parser.parse_args()
    print(f"{os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}")
    data = ingest.values(given.devices, given.ticks)
    samples = given.devices * given.ticks
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from support.postgres import Postgres

    postgres = Postgres()
    postgres.start()
    try:
        commits(postgres)
        writing(data, postgres)
        if given.alone:
            return
        few = {name: array[:60, : 8 * PARTITIONS * 4] for name, array in data.items()}
        fewer = next(iter(few.values())).size
        for processors in (1, 2):
            _, idle_cpu = run(
                f"few_{processors}", processors, fewer, lambda url: ingest.publish(url, few, 60), postgres
            )
            _, busy_cpu = run(
                f"all_{processors}",
                processors,
                samples,
                lambda url: ingest.publish(url, data, given.ticks_per_message),
                postgres,
            )
            print(
                f"    beyond what the start takes: "
                f"{(samples - fewer) / (busy_cpu - idle_cpu) / 1e6:.2f} M samples per CPU-second",
                flush=True,
            )
    finally:
        postgres.remove()
    ingest.show(
        "embedded, the ingest alone in a process that runs already", ingest.corral(data, given.ticks_per_message, [])
    )


if __name__ == "__main__":
    main()
