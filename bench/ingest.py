"""How fast does telemetry become history? From a full JetStream stream to committed rows, beside VictoriaMetrics.

    python bench/ingest.py                        both, the same 20 metrics of the same devices
    python bench/ingest.py --scale                how throughput falls from 10 to 100,000 devices
    python bench/ingest.py --rollups              with the rollups brought up to date too
    python bench/ingest.py --against ../other     another build's checkout (with its `.venv`) over the same stream

Corral: a real nats-server holds the messages; a process of its own runs the ingest of a processor over a new database
until the last row is committed. Its CPU time is that of the process, and beside it that of process and server.
VictoriaMetrics (single node, Debian's package) takes the same values by `/api/v1/import`, its JSON lines, 600 values a
line, one request at a time; its CPU time is that of the process until all are flushed, and each is counted after that.
Builds that are compared read the same stream in turn, twice each, and the run with less CPU time counts.
A datapoint is one value of one metric at one time: a sample with 20 metrics is 20 of them. Everything runs on this
machine at once, so what others do on it shows in the seconds, and much less in the CPU seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from corral.bus import process as bus_process
from corral.bus.connect import connect
from corral.bus.layout import ensure_layout
from corral.cli.local.server import EmbeddedServer
from corral.schemas import codec, subjects
from corral.schemas.metrics import METRICS
from corral.schemas.telemetry import SampleBatch
from servers import cpu_seconds

DEVICES_PER_HOST = 8
START_NS = (time.time_ns() // 10**9 - 7200) * 10**9


def values(devices: int, ticks: int) -> dict[str, np.ndarray[Any, Any]]:
    """20 metrics, ticks × devices, that move as those of GPUs do: whole percents and degrees, clocks in steps."""
    dice = np.random.default_rng(1)
    shape = (ticks, devices)
    load = np.clip(np.cumsum(dice.normal(0, 2, shape), axis=0) + dice.uniform(0, 100, devices), 0, 100)
    used = np.repeat(dice.integers(0, 80 * 1024, (ticks // 30 + 1, devices)), 30, axis=0)[:ticks] * 2**20
    total = 80 * 1024 * 2**20
    power = np.round(60 + load * 6 + dice.normal(0, 3, shape), 3)
    still = np.ones(shape)
    found = {
        "gpu_utilization_percent": np.round(load),
        "memory_utilization_percent": np.round(load / 2),
        "encoder_utilization_percent": still * 0,
        "decoder_utilization_percent": still * 0,
        "memory_used_bytes": used,
        "memory_free_bytes": total - used,
        "memory_total_bytes": still * total,
        "memory_reserved_bytes": still * 500 * 2**20,
        "power_watts": power,
        "power_limit_watts": still * 700,
        "energy_millijoules": np.cumsum(power * 1000, axis=0),
        "temperature_celsius": np.round(30 + load / 2),
        "memory_temperature_celsius": np.round(35 + load / 2),
        "sm_clock_megahertz": np.round(1980 - load / 10) // 15 * 15,
        "memory_clock_megahertz": still * 2619,
        "video_clock_megahertz": np.round(1545 - load / 10) // 15 * 15,
        "throttle_reasons_bitmask": np.where(load > 95, 4, 0),
        "pcie_rx_bytes_per_second": np.round(load * 1e7 * dice.uniform(0.9, 1.1, shape)),
        "pcie_tx_bytes_per_second": np.round(load * 2e6 * dice.uniform(0.9, 1.1, shape)),
        "performance_state": still * 0,
    }
    return {name: array.astype(METRICS[name].row.unit.dtype) for name, array in found.items()}


async def publish(url: str, data: dict[str, np.ndarray[Any, Any]], ticks_per_message: int) -> tuple[int, float]:
    """Fill the stream. Returns how many messages, and their mean size."""
    nc = await connect(url)
    js = nc.jetstream()
    await ensure_layout(js, max_bytes_scale=4)
    ticks, devices = next(iter(data.values())).shape
    messages = size = 0
    for first in range(0, ticks, ticks_per_message):
        last = min(first + ticks_per_message, ticks)
        times = START_NS + np.arange(first, last, dtype="<i8") * 10**9
        for host in range(0, devices, DEVICES_PER_HOST):
            part = slice(host, min(host + DEVICES_PER_HOST, devices))
            batch = SampleBatch(
                host=f"node-{host // DEVICES_PER_HOST}",
                agent=f"run-{host}",
                sequence=first // ticks_per_message + 1,
                source="simulated",
                devices=[f"GPU-{at:08x}-5a5a-5a5a-5a5a-{at:012x}" for at in range(part.start, part.stop)],
                times_ns=np.repeat(times, part.stop - part.start).tobytes(),
                columns={name: array[first:last, part].tobytes() for name, array in data.items()},
            )
            payload = codec.encode(batch)
            messages += 1
            size += len(payload)
            await nc.publish(subjects.samples_subject(batch.host), payload)
            if messages % 200 == 0:
                await nc.flush()
    await nc.flush()
    async with asyncio.timeout(60):
        while (await js.stream_info(subjects.TELEMETRY_STREAM)).state.messages < messages:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await nc.close()
    return messages, size / messages


async def ingest(db: Path, url: str, samples: int, with_rollups: bool, threads: int | None) -> None:
    """The child: read the stream into a new database until all of it is committed."""
    from corral.processors.ingest.deadletters import DeadLetters
    from corral.processors.ingest.ingest import CONSUMERS, Ingest
    from corral.processors.storage import Database, Maintenance

    # As `corral process` does; an older build has no such function.
    getattr(bus_process, "collect_garbage_seldom", lambda: None)()
    storage = Database(db, threads=threads)
    nc = await connect(url)
    work = Ingest(nc, storage, CONSUMERS[0], DeadLetters(nc.jetstream()))
    cpu, began = time.process_time(), time.perf_counter()
    task = asyncio.create_task(work.run())
    while work.counts.samples < samples and not task.done():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    found = {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "decode_cpu_seconds": work.counts.decode_seconds,
        "batches": work.counts.batches,
    }
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await nc.close()
    if with_rollups:
        from corral.processors.storage.embedded import maintenance
        from corral.processors.storage.embedded.rollups import LEVELS

        cpu, began = time.process_time(), time.perf_counter()
        care = Maintenance(storage)
        # An older build refreshes each level by itself.
        for levels in getattr(maintenance, "TOGETHER", [(level,) for level in LEVELS]):
            care.roll_up(*levels)
        found |= {"rollup_seconds": time.perf_counter() - began, "rollup_cpu_seconds": time.process_time() - cpu}
    storage.close()
    found["bytes"] = storage.size_bytes()
    print(json.dumps(found))


def corral(data: dict[str, np.ndarray[Any, Any]], ticks_per_message: int, options: list[str]) -> dict[str, float]:
    """Ingest by this build."""
    return builds(data, ticks_per_message, options, {"corral": Path(sys.executable)})["corral"]


def builds(
    data: dict[str, np.ndarray[Any, Any]], ticks_per_message: int, options: list[str], pythons: dict[str, Path]
) -> dict[str, dict[str, float]]:
    """Ingest of one stream by several builds."""
    ticks, devices = next(iter(data.values())).shape
    folder = Path(tempfile.mkdtemp(prefix="bench-ingest-"))
    server = EmbeddedServer(folder / "nats")
    server.start()
    assert server.process is not None
    try:
        messages, size = asyncio.run(publish(server.url, data, ticks_per_message))
        best: dict[str, dict[str, float]] = {}
        for turn in range(2 if len(pythons) > 1 else 1):
            for name, python in pythons.items():
                before = cpu_seconds(server.process.pid)
                command = [str(python), __file__, "--child", str(folder / f"{name}{turn}.duckdb"), server.url]
                command += [str(ticks * devices), *options]
                ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
                found: dict[str, float] = json.loads(ended.stdout)
                found["server_cpu_seconds"] = cpu_seconds(server.process.pid) - before
                if name not in best or found["cpu_seconds"] < best[name]["cpu_seconds"]:
                    best[name] = found
        sizes = {
            "messages": messages,
            "message_bytes": size,
            "samples": ticks * devices,
            "points": ticks * devices * len(data),
        }
        return {name: found | sizes for name, found in best.items()}
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


def victoria_metrics(data: dict[str, np.ndarray[Any, Any]]) -> dict[str, float] | None:
    """The same values by JSON lines: a series a line, all of its ticks."""
    binary = shutil.which("victoria-metrics")
    if binary is None:
        return None
    ticks, devices = next(iter(data.values())).shape
    folder = Path(tempfile.mkdtemp(prefix="bench-vm-"))
    port = 18428
    process = subprocess.Popen(
        [binary, f"-storageDataPath={folder}", f"-httpListenAddr=127.0.0.1:{port}", "-retentionPeriod=10y"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        times = (START_NS // 10**6 + np.arange(ticks) * 1000).tolist()
        lines: list[bytes] = []
        for name, array in data.items():
            columns = array.T.tolist()
            for at, column in enumerate(columns):
                metric = {"__name__": name, "host": f"node-{at // DEVICES_PER_HOST}", "device": f"GPU-{at:08x}"}
                lines.append(json.dumps({"metric": metric, "values": column, "timestamps": times}).encode())
        for _ in range(100):
            try:
                ask(port, "GET", "/health")
                break
            except OSError:
                time.sleep(0.1)
        cpu, began = cpu_seconds(process.pid), time.perf_counter()
        for first in range(0, len(lines), 200):
            ask(port, "POST", "/api/v1/import", b"\n".join(lines[first : first + 200]))
        ask(port, "GET", "/internal/force_flush")
        seconds, cpu = time.perf_counter() - began, cpu_seconds(process.pid) - cpu
        window = f"[{ticks + 10}s]&time={START_NS // 10**9 + ticks + 5}"
        query = f"/api/v1/query?query=sum(count_over_time({{__name__=~%22.%2B%22,host!=%22%22}}{window}"
        query = query.replace("s]&time", "s]))&time")
        stored = 0.0
        while stored < ticks * devices * len(data):
            answer = json.loads(ask(port, "GET", query + "&nocache=1"))
            result = answer["data"]["result"]
            stored = float(result[0]["value"][1]) if result else 0.0
            if time.perf_counter() - began > 120:
                raise TimeoutError(f"VictoriaMetrics has {stored:,.0f} values")
            time.sleep(0.5)
        ask(port, "GET", "/internal/force_merge")
        time.sleep(2)
        size = sum(file.stat().st_size for file in (folder / "data").rglob("*") if file.is_file())
        index = sum(file.stat().st_size for file in (folder / "indexdb").rglob("*") if file.is_file())
        return {"seconds": seconds, "cpu_seconds": cpu, "bytes": size, "index_bytes": index, "points": stored}
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def ask(port: int, method: str, path: str, body: bytes | None = None) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    if answer.status >= 300:
        raise RuntimeError(f"{path}: {answer.status} {text[:300]!r}")
    return text


def show(label: str, found: dict[str, float]) -> None:
    samples, points, cpu = found["samples"], found["points"], found["cpu_seconds"]
    both = cpu + found["server_cpu_seconds"]
    print(
        f"{label}: {samples / found['seconds'] / 1e6:.2f} M samples/s ({found['seconds']:.1f} s), "
        f"{samples / cpu / 1e6:.2f} M samples and {points / cpu / 1e6:.1f} M datapoints per CPU-second "
        f"({points / both / 1e6:.1f} M with the server's), {found['message_bytes'] / 1024:.1f} KiB a message, "
        f"{found['batches']:.0f} commits, {found['bytes'] / samples:.1f} bytes a sample in the database",
        flush=True,
    )
    if "rollup_seconds" in found:
        print(
            f"    rollups of all of it: {found['rollup_seconds']:.1f} s, "
            f"{samples / found['rollup_cpu_seconds'] / 1e6:.2f} M samples per CPU-second",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=400)
    parser.add_argument("--ticks", type=int, default=600, help="one a second")
    parser.add_argument("--ticks-per-message", type=int, default=60)
    parser.add_argument("--scale", action="store_true", help="10 to 100,000 devices, the same number of samples")
    parser.add_argument("--rollups", action="store_true")
    parser.add_argument("--threads", type=int, help="of DuckDB; every core by default")
    parser.add_argument("--against", type=Path, action="append", default=[], metavar="CHECKOUT")
    parser.add_argument("--child", nargs=3, metavar=("DB", "URL", "SAMPLES"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        import uvloop

        db, url, samples = given.child
        uvloop.run(ingest(Path(db), url, int(samples), given.rollups, given.threads))
        return
    print(f"{os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}")
    options = ["--rollups"] if given.rollups else []
    options += ["--threads", str(given.threads)] if given.threads else []
    if given.scale:
        total = given.devices * given.ticks
        for devices in (10, 100, 1000, 10_000, 100_000):
            ticks = max(1, min(total // devices, 7000))
            data = values(devices, ticks)
            for per_message in sorted({1, min(given.ticks_per_message, ticks)}):
                # One tick a message: no more than 30,000 messages, or publishing takes longer than the measurement.
                few = min(ticks, max(1, 30_000 * DEVICES_PER_HOST // devices)) if per_message == 1 else ticks
                part = {name: array[:few] for name, array in data.items()}
                show(
                    f"{devices:>7,} devices × {few} ticks, {per_message} a message", corral(part, per_message, options)
                )
        return
    data = values(given.devices, given.ticks)
    if given.against:
        pythons = {"this": Path(sys.executable)}
        pythons |= {path.resolve().name: path.resolve() / ".venv/bin/python" for path in given.against}
        for name, found in builds(data, given.ticks_per_message, options, pythons).items():
            show(f"{name}, {given.devices} devices × {given.ticks} ticks, {given.ticks_per_message} a message", found)
        return
    found = corral(data, given.ticks_per_message, options)
    show(f"corral, {given.devices} devices × {given.ticks} ticks, {given.ticks_per_message} a message", found)
    peer = victoria_metrics(data)
    if peer is None:
        print("victoria-metrics is not installed: apt-get install victoria-metrics")
        return
    per_sample = len(data)
    print(
        f"victoria-metrics, JSON lines of {given.ticks} values: "
        f"{peer['points'] / peer['seconds'] / 1e6:.2f} M datapoints/s "
        f"({peer['seconds']:.1f} s), {peer['points'] / peer['cpu_seconds'] / 1e6:.2f} M datapoints per CPU-second, "
        f"{peer['bytes'] / peer['points'] * per_sample:.1f} bytes a sample and "
        f"{peer['index_bytes'] / peer['points'] * per_sample:.1f} of index"
    )
    ours, theirs = found["points"] / found["cpu_seconds"], peer["points"] / peer["cpu_seconds"]
    print(f"datapoints per CPU-second: {ours / theirs:.1f} × those of VictoriaMetrics")


if __name__ == "__main__":
    main()
