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
from concurrent.futures import ThreadPoolExecutor
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
from corral.processors.storage.lake.partition import PartRollups
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


def writing(data: dict[str, np.ndarray[Any, Any]], parts: int, postgres: Postgres) -> None:
    """What the transactions of large batches and the rollups cost by themselves: no bus, values ready in memory.

    Each part has a share of the devices. Rollups of 10 s and 1 min follow each batch, which is some minutes of its
    devices, and those of 1 h every ten minutes of them. Those of all parts run at once, in threads of this process. The
    first batch is told by itself, since a new owner looks up the counters of its devices.
    """
    folder = Path(tempfile.mkdtemp(prefix="bench-lake-"))
    ticks, devices = next(iter(data.values())).shape
    rows = ticks * devices
    step = max(1, BATCH_ROWS // devices // 60) * 60
    try:
        lake = lakes.Lake(postgres.database(f"bench_writing_{parts}"), str(folder))
        history = lakes.prepare(lake, parts)
        owned = [lakes.LakePart(lake, history, f"CORRAL_PARTITIONS/{number}") for number in range(parts)]
        rolled = [PartRollups(part) for part in owned]
        shares = np.array_split(np.arange(devices), parts)
        for part in owned:
            part.resume(part.part, "now")
        for each in rolled:
            each.refresh()
        committing = rolling = waited = taken = 0.0
        for sequence, first in enumerate(range(0, ticks, step), start=1):
            cpu = time.process_time()
            for part, share in zip(owned, shares, strict=True):
                part.commit(
                    lakes.Batch(stream="s", sequence=sequence, samples=table_of(part, data, share, first, step))
                )
            committing += time.process_time() - cpu
            cpu, began = time.process_time(), time.perf_counter()
            with ThreadPoolExecutor(parts) as threads:
                hours = first + step >= ticks or (first + step) % 600 == 0
                list(threads.map(lambda each, hours=hours: each.refresh(everything=hours), rolled))
            if first:
                rolling += time.process_time() - cpu
                waited += time.perf_counter() - began
            else:
                taken = time.process_time() - cpu
        print(
            f"{parts} part(s), transactions of {step * devices // parts:,} samples: "
            f"{rows / committing / 1e6:.2f} M samples per CPU-second"
        )
        rows -= step * devices
        print(
            f"{parts} part(s), rollups of 10 s, 1 min and 1 h by their owners: {rows / rolling / 1e6:.3f} M samples "
            f"per CPU-second ({rolling / rows * 1e6:.2f} µs a sample), {rows:,} samples in {waited:.1f} s; the batch "
            f"after the takeover, with its lookup of counters: {taken:.1f} CPU-seconds",
            flush=True,
        )
        for each in (*rolled, *owned):
            each.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table_of(
    part: lakes.LakePart, data: dict[str, np.ndarray[Any, Any]], share: np.ndarray[Any, Any], first: int, ticks: int
) -> pa.Table:
    """Samples of some devices over some ticks, as ingest commits them."""
    values = {name: array[first : first + ticks, share] for name, array in data.items()}
    count = len(next(iter(values.values())))
    numbers = [part.series.number(f"node-{at // 8}", f"GPU-{at:08x}") for at in share]
    start = -(-ingest.START_NS // (60 * 10**9)) * 60 * 10**6 + first * 10**6
    times = np.repeat(start + np.arange(count, dtype="<i8") * 10**6, len(share))
    columns = {"time": pa.array(times).cast(SCHEMA.field("time").type), "series": np.tile(numbers, count)}
    columns |= {name: array.reshape(-1) for name, array in values.items()}
    rows = count * len(share)
    return pa.Table.from_arrays(
        [pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(rows, f.type) for f in SCHEMA],
        schema=SCHEMA,
    )


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
        for parts in (1, 2):
            writing(data, parts, postgres)
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
