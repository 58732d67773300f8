"""What does it cost to send a large fleet over OTLP, beside OpenTelemetry's own instruments for as many points?

Simulated hosts of 8 devices. A sending makes the points of every device from its newest samples and encodes them in
requests of 5,000 points, as `corral export --otlp` does; what is measured is CPU time without the network. The peer is
the SDK: an observable gauge for each metric, whose callback yields as many observations with the same attributes, read
by a reader and encoded by the same library. It has 1,000 devices at most: it gives up collecting more after 10 seconds.

    python bench/otlp.py [--devices 5000] [--metrics default] [--no-peer]
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from typing import Any

from corral.collectors.agent.packing import Packer
from corral.collectors.simulated.source import SimulatedSource
from corral.exporter import LiveFleet
from corral.exporter.otlp import devices
from corral.exporter.otlp.names import choose
from corral.exporter.otlp.push import Fleet, OtlpPush
from corral.exporter.otlp.settings import OtlpSettings, Protocol
from corral.schemas import codec, subjects
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    InMemoryMetricReader,
    MetricExporter,
    MetricExportResult,
    MetricsData,
)

PER_HOST = 8


class Encoder(MetricExporter):
    """Encodes what it gets, and sends it nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.requests = 0
        self.largest = 0

    def export(self, metrics_data: MetricsData, timeout_millis: float = 0, **more: Any) -> MetricExportResult:
        size = len(encode_metrics(metrics_data).SerializeToString())
        self.bytes, self.requests, self.largest = self.bytes + size, self.requests + 1, max(self.largest, size)
        return MetricExportResult.SUCCESS

    def shutdown(self, timeout_millis: float = 0, **more: Any) -> None: ...

    def force_flush(self, timeout_millis: float = 0) -> bool:
        return True


def cpu_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    found = function()
    return time.process_time() - started, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=5000)
    parser.add_argument("--metrics", default="default", help="as `corral export --otlp-metrics`")
    parser.add_argument("--no-peer", action="store_true")
    options = parser.parse_args()
    hosts = -(-options.devices // PER_HOST)
    now = [time.time_ns() - 3600 * 10**9]
    source = SimulatedSource(hosts, PER_HOST, models="H100", background=1.0, clock_ns=lambda: now[0])
    source.open(lambda event: None)
    live = LiveFleet(None)  # type: ignore[arg-type]  # it is fed below, as its subscriptions would
    for inventory in source.inventory():
        live.take_inventory(subjects.inventory_subject(inventory.host.name), codec.encode(inventory))
    packer = Packer(1)

    def fleet() -> Fleet:
        now[0] += 15 * 10**9
        for pack in packer.add(source.read()):
            batch = pack.batch("bench", 1, "simulated")
            live.take_samples(subjects.samples_subject(batch.host), codec.encode(batch))
        return Fleet(devices.snapshot(live.hosts()), [], [], None)

    encoder = Encoder()
    metrics = choose(options.metrics.split(","))
    settings = OtlpSettings(
        endpoint="", shown="", protocol=Protocol.GRPC, headers={}, interval_seconds=60, metrics=metrics, lease_ids=False
    )
    given: list[Fleet] = []
    push = OtlpPush(settings, given.pop, "bench", encoder)
    print(f"Python {platform.python_version()}, {platform.machine()}; {hosts * PER_HOST:,} devices on {hosts:,} hosts")
    took: list[float] = []
    points = 0.0
    for _ in range(3):
        given.append(fleet())
        before, encoder.bytes, encoder.requests = push.sent.points["sent"], 0, 0
        took.append(cpu_seconds(push.send)[0])
        points = push.sent.points["sent"] - before
    best = min(took)
    print(f"{points:,.0f} points ({options.metrics}), {encoder.bytes / 1e6:.1f} MB in {encoder.requests} requests")
    print(f"largest request: {encoder.largest / 2**20:.2f} MiB of the 4 MiB that gRPC takes by default")
    print(f"sending: {best:.2f} s of CPU time, {best / points * 1e6:.1f} µs a point")
    if options.no_peer:
        return
    state = fleet().hosts
    each = [found for host in state for found in devices.identities(host.inventory).values()][:1000]
    per_device = points / sum(len(host.batch.devices) for host in state)
    reader = InMemoryMetricReader()
    meter = MeterProvider([reader]).get_meter("bench")

    def observe(_: CallbackOptions) -> list[Observation]:
        return [Observation(1.5, found) for found in each]

    for number in range(round(per_device)):
        meter.create_observable_gauge(f"hw.gpu.number{number}", [observe], "1", "Plain.")
    took = []
    for _ in range(2):
        took.append(cpu_seconds(lambda: encode_metrics(reader.get_metrics_data()).SerializeToString())[0])
    print(f"peer, the SDK's observable gauges: {min(took) / (round(per_device) * len(each)) * 1e6:.1f} µs a point")


if __name__ == "__main__":
    main()
