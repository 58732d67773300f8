"""What does a scrape of a large fleet cost: time and bytes, beside the official library's own page of plain gauges?

Simulated hosts of 8 devices; each message is taken as the subscription takes it, and the page is written as a scrape
writes it: decoding, lines, joined bytes, and gzip as Prometheus asks for it.

- first: nothing was written before;
- next tick: every host has a new sample, as at every real scrape;
- same tick: a second Prometheus that comes at once.

The peer is prometheus-client's `generate_latest` over as many plain gauges with the same labels. The limit is to copy
the page once.

    python bench/exporter.py [--devices 5000] [--metrics default] [--no-peer]
"""

from __future__ import annotations

import argparse
import platform
import time
import zlib
from collections.abc import Callable
from typing import Any

from corral.collectors.agent.packing import Packer
from corral.collectors.simulated.source import SimulatedSource
from corral.exporter import LiveFleet, choose, write
from corral.exporter.page import device_labels
from corral.schemas import codec, subjects
from prometheus_client import CollectorRegistry, Gauge, generate_latest

PER_HOST = 8


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = function()
    return time.perf_counter() - started, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=5000)
    parser.add_argument("--metrics", default="default", help="as `corral export --metrics`")
    parser.add_argument("--no-peer", action="store_true")
    options = parser.parse_args()
    hosts = -(-options.devices // PER_HOST)
    now = [1_800_000_000 * 10**9]
    source = SimulatedSource(hosts, PER_HOST, models="H100", background=1.0, clock_ns=lambda: now[0])
    source.open(lambda event: None)
    inventories = source.inventory()
    live = LiveFleet(None)  # type: ignore[arg-type]  # it is fed below, as its subscriptions would
    for inventory in inventories:
        live.take_inventory(subjects.inventory_subject(inventory.host.name), codec.encode(inventory))
    packer = Packer(1)
    families = choose(options.metrics.split(","))

    def tick() -> list[tuple[str, bytes]]:
        now[0] += 15 * 10**9
        batches = [pack.batch("bench", 1, "simulated") for pack in packer.add(source.read())]
        return [(subjects.samples_subject(batch.host), codec.encode(batch)) for batch in batches]

    def take(messages: list[tuple[str, bytes]]) -> None:
        for subject, data in messages:
            live.take_samples(subject, data)

    def page() -> bytes:
        return b"".join(write(live.hosts(), families))

    print(f"Python {platform.python_version()}, {platform.machine()}; {hosts * PER_HOST:,} devices on {hosts:,} hosts")
    take(tick())
    first, text = timed(page)
    lines = sum(1 for line in text.splitlines() if not line.startswith(b"#"))
    print(f"{lines:,} series ({options.metrics}), {len(text) / 1e6:.1f} MB a page\n")
    nexts: list[float] = []
    for _ in range(3):
        messages = tick()
        took, _ = timed(lambda messages=messages: take(messages))
        nexts.append(timed(page)[0])
    same, text = timed(page)
    packer_seconds, packed = timed(lambda: (z := zlib.compressobj(1, zlib.DEFLATED, 31)).compress(text) + z.flush())
    copied, _ = timed(lambda: bytearray(text))
    print(f"{'corral: first page':44} {first:8.3f} s")
    print(f"{'corral: next tick, best of 3':44} {min(nexts):8.3f} s")
    print(f"{'corral: same tick':44} {same:8.3f} s")
    print(f"{'corral: gzip, level 1':44} {packer_seconds:8.3f} s  {len(packed) / 1e6:.1f} MB")
    print(f"{'corral: take a tick of all hosts':44} {took:8.4f} s")
    if not options.no_peer:
        del packed
        peer, size = timed_peer(inventories, lines)
        print(f"{'peer: generate_latest, as many gauges':44} {peer:8.3f} s  {size / 1e6:.1f} MB")
    print(f"{'limit: copy the page once':44} {copied:8.3f} s")


def timed_peer(inventories: Any, lines: int) -> tuple[float, int]:
    """As many plain gauges, filled beforehand: their writing alone is timed."""
    labels = [found for inventory in inventories for found in device_labels(inventory).values()]
    registry = CollectorRegistry()
    left, number = lines, 0
    while left > 0:
        gauge = Gauge(f"dcgm_metric_{number}", "A metric.", list(labels[0]), registry=registry)
        for found in labels[:left]:
            gauge.labels(*found.values()).set(31.5 + number)
        left, number = left - len(labels), number + 1
    took, text = timed(lambda: generate_latest(registry))
    return took, len(text)


if __name__ == "__main__":
    main()
