"""Sends the fleet's metrics to an OTLP receiver at an interval, in a thread of its own.

Nothing waits for the receiver. If it is away or slow, the library tries again for as long as its timeout; what was not
sent then is dropped, since the next values are newer and counters are cumulative.
"""

from __future__ import annotations

import logging
import re
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from msgspec import Struct
from opentelemetry.sdk.metrics.export import (
    Metric,
    MetricExporter,
    MetricExportResult,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from ...bus.process import corral_version
from ...schemas.instruments import SECONDS, Histogram
from ...schemas.requests import Lease
from ...schemas.telemetry import DeviceInfo
from ..processes import LeaseUse
from . import devices, services
from .names import SCHEMA_URL, STATES
from .settings import OtlpSettings, Protocol
from .starts import Starts

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family

log = logging.getLogger("corral.exporter")

MAX_POINTS: Final = 5000
"""Data points of one request: 1.2 MB. A collector takes 4 MiB over gRPC by default."""
_LIBRARY: Final = "opentelemetry.exporter.otlp"
_URL: Final = re.compile(r"https?://\S+|(?<=with url: )\S+")
"""URLs in the library's words: path and parameters may have a key in them."""


class Fleet(Struct, frozen=True):
    """The fleet at one moment.

    Attributes:
        hosts: hosts with samples.
        missing: boards that their hosts had lately and no longer have.
        families: series of services, leases, queue and groups.
        leases: active leases; None if no planner answered.
        uses: what their processes use.
    """

    hosts: Sequence[devices.HostState]
    missing: Sequence[DeviceInfo]
    families: Sequence[Family]
    leases: Sequence[Lease] | None
    uses: Sequence[LeaseUse] = ()


class Sent(Struct):
    """Counts of data points since the start, by outcome.

    Attributes:
        points: data points by outcome: `sent`, or `failed`.
        success_at: time of the last sending without a failure, seconds since the epoch; 0 before the first.
        seconds: time of each sending.
    """

    points: dict[str, float]
    success_at: float
    seconds: Histogram


class _Reason(logging.Handler):
    """Keeps the library's first complaint of a sending: it reports the reason of a failure to the log alone."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record's message; later ones only say that trying again did not help."""
        self.text = self.text or _URL.sub("…", " ".join(record.getMessage().split()))[:300]


def exporter_for(settings: OtlpSettings) -> MetricExporter:
    """Create the library's exporter for a protocol.

    Raises:
        ValueError: a variable of OpenTelemetry is wrong.
        ImportError: the library is not installed.
    """
    if settings.protocol is Protocol.GRPC:
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as OverGrpc

        return OverGrpc(endpoint=settings.endpoint, headers=settings.headers or None, max_export_batch_size=MAX_POINTS)
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as OverHttp

    return OverHttp(endpoint=settings.endpoint, headers=settings.headers or None, max_export_batch_size=MAX_POINTS)


class OtlpPush:
    """Sends metrics until it is stopped.

    Args:
        settings: target and contents.
        take: returns the fleet of the moment; called in this object's thread.
        instance: id of this exporter among exporters.
        exporter: exporter to use instead of the one that `settings` describe.
    """

    def __init__(
        self,
        settings: OtlpSettings,
        take: Callable[[], Fleet],
        instance: str,
        exporter: MetricExporter | None = None,
    ) -> None:
        self.settings = settings
        self.sent = Sent({"sent": 0.0, "failed": 0.0}, 0.0, Histogram(SECONDS))
        self._take = take
        self._exporter = exporter or exporter_for(settings)
        self._starts = Starts()
        self._newest: dict[str, int] = {}
        self._scope = InstrumentationScope("corral.exporter", corral_version(), SCHEMA_URL)
        self._base = _base()
        self._own = self._base.merge(Resource({"service.instance.id": instance, "host.name": socket.gethostname()}))
        self._reason = _Reason()
        self._failing = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="otlp", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        library = logging.getLogger(_LIBRARY)
        library.propagate = False
        library.addHandler(self._reason)
        self._thread.start()

    def stop(self) -> None:
        """End, without waiting for a receiver that does not answer."""
        self._stopped.set()
        self._exporter.shutdown()
        self._thread.join(1.0)
        logging.getLogger(_LIBRARY).removeHandler(self._reason)

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopped.wait(max(0.0, due - time.monotonic())):
            try:
                self.send()
            except Exception:
                log.exception("metrics could not be made for OTLP")
            # A sending that took longer than the interval makes the next ones fall out.
            due = max(due + self.settings.interval_seconds, time.monotonic())

    def send(self) -> bool:
        """Send everything that is newer than what was sent last; True if the receiver took it all."""
        started = time.perf_counter()
        self._reason.text = ""
        failed = False
        for batch, points in _batches(self._resources(self._take())):
            if not failed and not self._stopped.is_set():
                failed = self._exporter.export(MetricsData(batch)) is not MetricExportResult.SUCCESS
            # After a failure the rest would wait for a timeout each.
            self.sent.points["failed" if failed else "sent"] += points
        self._starts.end_round()
        self.sent.seconds.observe(time.perf_counter() - started)
        if not failed:
            self.sent.success_at = time.time()
        if failed != self._failing and not self._stopped.is_set():
            self._failing = failed
            if failed:
                log.warning(
                    "metrics can't be sent to %s over %s: %s; trying again every %g s",
                    self.settings.shown,
                    self.settings.protocol.value,
                    self._reason.text or "no reason given",
                    self.settings.interval_seconds,
                )
            else:
                log.info("metrics are sent to %s again", self.settings.shown)
        return not failed

    def _resources(self, fleet: Fleet) -> Iterator[tuple[ResourceMetrics, int]]:
        """Metrics of each host and of the exporter, with their number of points."""
        now_ns = time.time_ns()
        more = services.metrics(fleet.families, self._starts, now_ns)
        for host, found in services.leases(fleet.leases or (), fleet.uses, now_ns, ids=self.settings.lease_ids).items():
            more.setdefault(host, []).extend(found)
        for host, found in _missing(fleet.missing, now_ns).items():
            more.setdefault(host, []).extend(found)
        labels = {state.name: state.inventory.host.labels for state in fleet.hosts}
        yield self._resource(self._own, more.pop("", []))
        for state in fleet.hosts:
            newest = state.batch.times_ns[-8 * len(state.batch.devices) :]
            at = max(memoryview(newest).cast("q"), default=0)
            if self._newest.get(state.name) != at:
                self._newest[state.name] = at
                made = devices.metrics(state, self.settings.metrics, self._starts)
                more[state.name] = _joined([*made, *more.get(state.name, ())])
        self._newest = {name: at for name, at in self._newest.items() if name in labels}
        for name, metrics in more.items():
            yield self._resource(self._base.merge(_host_resource(name, labels.get(name, {}))), metrics)

    def _resource(self, resource: Resource, metrics: list[Metric]) -> tuple[ResourceMetrics, int]:
        points = sum(len(metric.data.data_points) for metric in metrics)
        return ResourceMetrics(resource, [ScopeMetrics(self._scope, metrics, SCHEMA_URL)], SCHEMA_URL), points


def _base() -> Resource:
    """Attributes of every resource: what OpenTelemetry's variables say, and `corral` as the service."""
    found = Resource.create()
    named = str(found.attributes.get("service.name", ""))
    own = {"service.version": corral_version()}
    if not named or named.startswith("unknown_service"):
        own["service.name"] = "corral"
    return found.merge(Resource(own))


def _host_resource(name: str, labels: dict[str, str]) -> Resource:
    # Prometheus makes `instance` of `service.instance.id`: without it, hosts could not be told apart there.
    own = {"host.name": name, "service.instance.id": name}
    return Resource(own | {f"corral.host.label.{label}": value for label, value in labels.items()})


def _missing(found: Sequence[DeviceInfo], now_ns: int) -> dict[str, list[Metric]]:
    """`hw.status` of boards that are gone: they have failed."""
    points: dict[str, list[NumberDataPoint]] = defaultdict(list)
    for device in found:
        identity = {"hw.id": device.uuid, "hw.type": "gpu", "hw.model": device.name, "hw.vendor": device.vendor}
        for state in STATES:
            attributes = {key: value for key, value in identity.items() if value} | {"hw.state": state}
            points[device.host].append(NumberDataPoint(attributes, 0, now_ns, int(state == "failed")))
    return {host: [devices.status_metric(made)] for host, made in points.items()}


def _joined(metrics: Iterable[Metric]) -> list[Metric]:
    """Metrics with each name once: a metric that appears twice in a scope is an error."""
    found: dict[str, Metric] = {}
    for metric in metrics:
        if (known := found.get(metric.name)) is None:
            found[metric.name] = metric
        else:
            known.data.data_points.extend(metric.data.data_points)  # pyright: ignore[reportAttributeAccessIssue]
    return list(found.values())


def _batches(resources: Iterable[tuple[ResourceMetrics, int]]) -> Iterator[tuple[list[ResourceMetrics], int]]:
    """Resources in requests of at most `MAX_POINTS` points, where one alone has not more."""
    batch: list[ResourceMetrics] = []
    points = 0
    for resource, count in resources:
        if batch and points + count > MAX_POINTS:
            yield batch, points
            batch, points = [], 0
        if count:
            batch.append(resource)
            points += count
    if batch:
        yield batch, points
