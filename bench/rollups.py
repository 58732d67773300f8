"""What do rollups cost? Samples are committed some minutes at a time, and rollups of 10 s, 1 min and 1 h follow.

    python bench/rollups.py                                  1,000 devices, 25 minutes, 4 minutes at a time
    python bench/rollups.py --ticks-at-once 10               10 seconds at a time, as while the history is read
    python bench/rollups.py --against ../other               another build's checkout (with its `.venv`), in turn
    python bench/rollups.py --profile                        the slowest functions of Python, by CPU time

Hours are refreshed as often as they are while nobody reads the history. Each build runs in a process of its own over a
new database, twice in turn, and the better run counts. Times are CPU times of the whole process, DuckDB's threads
included. 245 ticks of 1,000 devices fill two row groups of DuckDB, which is how ingest cuts its commits; others are
rewritten by the checkpoint, which then counts as a cost of the rollups. The limit beside them is `limit`: one pass of
numpy over the same values, which takes the least, the greatest and the sum of each 10 seconds and writes nothing.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


def tables(devices: int, first: int, data: dict[str, Any], series: Any, start_us: int) -> Any:
    """Arrow table of some ticks, in the order in which messages of one tick would come."""
    import pyarrow as pa
    from corral.processors.ingest.columnar import SCHEMA

    ticks = next(iter(data.values())).shape[0]
    rows = devices * ticks
    times = np.repeat(start_us + (first + np.arange(ticks, dtype="<i8")) * 10**6, devices)
    columns: dict[str, Any] = {
        "time": pa.array(times).cast(SCHEMA.field("time").type),
        "series": pa.array(np.tile(series, ticks), pa.int32()),
    }
    columns |= {name: pa.array(array.reshape(-1)) for name, array in data.items()}
    found = [columns[field.name] if field.name in columns else pa.nulls(rows, field.type) for field in SCHEMA]
    return pa.Table.from_arrays(found, schema=SCHEMA)


def stored_bytes(cursor: Any, table: str) -> float:
    """Bytes of a table's blocks for each of its rows."""
    cursor.execute("CHECKPOINT")
    blocks, rows = cursor.execute(
        f"SELECT count(DISTINCT block_id), (SELECT count(*) FROM {table}) FROM "
        f"(SELECT unnest(list_append(additional_block_ids, block_id)) AS block_id FROM pragma_storage_info('{table}') "
        "WHERE persistent) WHERE block_id >= 0"
    ).fetchone()
    return blocks * 262_144 / rows


def measure(given: argparse.Namespace) -> dict[str, float]:
    """The child: commit and roll up, and say what each took."""
    from corral.processors.storage import Batch, Database, Maintenance
    from corral.processors.storage.embedded import maintenance
    from corral.processors.storage.embedded.rollups import LEVELS
    from ingest import values

    folder = Path(tempfile.mkdtemp(prefix="bench-rollups-"))
    storage = Database(folder / "history.duckdb", threads=given.threads)
    care = Maintenance(storage)
    data = values(given.devices, given.ticks)
    series = np.array([storage.series.number(f"node-{at // 8}", f"GPU-{at:08x}") for at in range(given.devices)])
    start_us = (time.time_ns() // 3_600_000_000_000 - 3) * 3_600_000_000
    # An older build refreshes each level by itself.
    together = getattr(maintenance, "TOGETHER", [(level,) for level in LEVELS])
    every = getattr(maintenance, "UNREAD_FACTORS", [1 for _ in LEVELS])
    last = -(-given.ticks // given.ticks_at_once) - 1
    found: dict[str, float] = {"commit": 0.0, "limit": 0.0}
    profile = cProfile.Profile(time.process_time)
    try:
        for step, first in enumerate(range(0, given.ticks, given.ticks_at_once)):
            part = {name: array[first : first + given.ticks_at_once] for name, array in data.items()}
            table = tables(given.devices, first, part, series, start_us)
            began = time.process_time()
            storage.commit(Batch(stream="S", sequence=step + 1, samples=table))
            found["commit"] += time.process_time() - began
            if given.profile:
                profile.enable()
            for levels, times in zip(together, every, strict=True):
                if (step + 1) % times and step < last:
                    continue
                name = " and ".join(level.name for level in levels)
                began = time.process_time()
                care.roll_up(*levels)
                found[name] = found.get(name, 0.0) + time.process_time() - began
            profile.disable()
            began = time.process_time()
            for array in part.values():
                cut = array[: len(array) // 10 * 10].reshape(-1, 10, given.devices)
                cut.min(axis=1), cut.max(axis=1), cut.sum(axis=1)
            found["limit"] += time.process_time() - began
        for level in LEVELS[:2]:
            found[f"bytes {level.name}"] = stored_bytes(storage.cursor(), level.table)
    finally:
        storage.close()
        shutil.rmtree(folder, ignore_errors=True)
    if given.profile:
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(40)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--ticks", type=int, default=1470, help="one a second")
    parser.add_argument("--ticks-at-once", type=int, default=245, help="of one commit and one refresh of each level")
    parser.add_argument("--threads", type=int, default=1, help="of DuckDB; 1 as while nobody queries")
    parser.add_argument("--against", type=Path, action="append", default=[], metavar="CHECKOUT")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(given)))
        return
    builds = {"this": Path(sys.executable)}
    builds |= {path.resolve().name: path.resolve() / ".venv/bin/python" for path in given.against}
    options = [f"--{name}={getattr(given, name.replace('-', '_'))}" for name in ("devices", "ticks", "threads")]
    options += [f"--ticks-at-once={given.ticks_at_once}", *(["--profile"] if given.profile else [])]
    samples = given.devices * given.ticks
    print(f"{os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}; {samples:,} samples")
    best: dict[str, dict[str, float]] = {}
    for _ in range(1 if given.profile else 2):
        for name, python in builds.items():
            command = [str(python), __file__, "--child", *options]
            ended = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=900)
            found: dict[str, float] = json.loads(ended.stdout)
            old = best.get(name, found)
            best[name] = {key: min(found[key], old[key]) for key in found}
    for name, found in best.items():
        rolled = {key: value for key, value in found.items() if key.startswith(("10s", "1h"))}
        stored = ", ".join(f"{key[6:]} {value:.0f}" for key, value in found.items() if key.startswith("bytes"))
        each = ", ".join(f"{key} {value / samples * 1e6:.2f}" for key, value in rolled.items())
        total = sum(rolled.values())
        print(
            f"{name:>12}: rollups {samples / total / 1e6:.3f} M samples per CPU-second (µs a sample: {each}); commit "
            f"{found['commit'] / samples * 1e6:.2f}; limit {found['limit'] / samples * 1e6:.2f}; "
            f"bytes a bucket: {stored}",
            flush=True,
        )


if __name__ == "__main__":
    main()
