"""What does the history of a live fleet cost beside Prometheus? CPU time, memory and disk of both over the same GPUs.

    python bench/beside_prometheus.py                            32 GPUs at 1 Hz, for 90 s
    python bench/beside_prometheus.py --hosts 125 --seconds 300  1,000 GPUs, with a refresh of the rollups

One collector of a simulated fleet publishes to a real nats-server. `corral process` reads the stream; Prometheus (the
system's, as a package installs it, with its defaults) scrapes `corral export` each interval. Both keep all metrics that
the devices have. CPU time is that of each process and its children, from the kernel, after a warm-up; memory is the
resident size at the end. The exporter's CPU time is shown and belongs to neither: Prometheus needs it, and Corral's
history does not. The processor refreshes rollups every five minutes while nobody asks, so shorter runs have none.
"""

from __future__ import annotations

import argparse
import http.client
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

from corral.cli.local.server import EmbeddedServer
from idle import Part, until

SETTINGS = """
global: {{scrape_interval: {interval}, scrape_timeout: {interval}}}
scrape_configs:
  - job_name: corral
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""
HEAD = ("prometheus_tsdb_head_series", "prometheus_tsdb_head_samples_appended_total")


def free_port() -> int:
    """A TCP port of loopback that nobody listens on."""
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return tried.getsockname()[1]


def fetch(port: int, path: str) -> str:
    """Body of a page on loopback; empty while nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    except OSError:
        return ""
    finally:
        connection.close()


def measure(page: str, name: str) -> float:
    """Sum of a metric over its series in a page of Prometheus' text format."""
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^\n]*}})? ([^\s]+)$", page, re.MULTILINE))


def scraped(port: int, name: str) -> float:
    """Newest value that Prometheus itself recorded about its scrapes."""
    found = re.search(r'"value":\[[^,]+,"([^"]+)"\]', fetch(port, f"/api/v1/query?query={name}"))
    return float(found[1]) if found else 0.0


def disk_mib(folder: Path) -> float:
    """Space that the files of a folder take on disk, in MiB."""
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--devices", type=int, default=8, help="of each host")
    parser.add_argument("--interval", default="1s")
    parser.add_argument("--warm-up", type=float, default=25.0, metavar="SECONDS")
    parser.add_argument("--seconds", type=float, default=90.0)
    args = parser.parse_args()
    binary = shutil.which("prometheus")
    if binary is None:
        raise SystemExit("prometheus is not installed (Debian: apt-get install prometheus)")
    folder = Path(tempfile.mkdtemp(prefix="bench-prometheus-"))
    server = EmbeddedServer(folder / "nats")
    server.start()
    parts: list[Part] = []
    try:
        corral = [sys.executable, "-m", "corral.cli.main"]
        exported, port = free_port(), free_port()
        settings = folder / "prometheus.yaml"
        settings.write_text(SETTINGS.format(interval=args.interval, port=exported))
        database = folder / "corral" / "history.duckdb"
        commands = {
            "corral process": [*corral, "process", "--db", str(database)],
            "prometheus": [
                binary, f"--config.file={settings}", f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
            ],
            "corral export": [*corral, "export", "--listen", f"127.0.0.1:{exported}"],
            "corral collect": [
                *corral, "collect", "--source", "simulated", "--hosts", str(args.hosts), "--devices", str(args.devices),
                "--interval", args.interval, "--state", str(folder / "state"),
            ],
        }  # fmt: skip
        for name, command in commands.items():
            parts.append(Part(name, command, folder, server.url))
        processor, prometheus = parts[:2]
        until(lambda: database.exists() and scraped(port, "scrape_samples_scraped") > args.hosts * args.devices)
        time.sleep(args.warm_up)
        before = measure(fetch(port, "/metrics"), HEAD[1])
        began = time.monotonic()
        for part in parts:
            part.begin()
        print(f"{args.hosts} hosts × {args.devices} GPUs, {args.interval}, load {os.getloadavg()[0]:.1f}", flush=True)
        time.sleep(args.seconds)
        ended = [part.name for part in parts if part.process.poll() is not None]
        if ended:
            logs = "\n".join((folder / f"{name}.log").read_text()[-2000:] for name in ended)
            raise SystemExit(f"ended by itself: {', '.join(ended)}\n{logs}")
        print(f"{'':>15}  CPU-seconds a minute  resident MiB  private MiB")
        cpu = {part.name: part.cpu_seconds_a_minute() for part in parts}
        resident = {part.name: part.resident_mib() for part in parts}
        for part in parts:
            print(f"{part.name:>15}  {cpu[part.name]:20.2f}  {resident[part.name]:12.0f}  {part.private_mib():11.0f}")
        page = fetch(port, "/metrics")
        stored = (measure(page, HEAD[1]) - before) / (time.monotonic() - began)
        print(
            f"prometheus: {measure(page, HEAD[0]):,.0f} series, {stored:,.0f} values stored a second, "
            f"{scraped(port, 'scrape_samples_scraped'):,.0f} in the last scrape of "
            f"{scraped(port, 'scrape_duration_seconds'):.2f} s; {disk_mib(folder / 'tsdb'):.0f} MiB on disk, "
            f"corral {disk_mib(database.parent):.0f} MiB"
        )
        print(
            f"corral / prometheus: {cpu[processor.name] / cpu[prometheus.name]:.2f} of the CPU time, "
            f"{resident[processor.name] / resident[prometheus.name]:.2f} of the memory"
        )
    finally:
        for part in reversed(parts):
            part.stop()
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
