"""Series about leases, the queue and Corral itself, written by Prometheus' client library.

The planner and the processor are queried at each scrape. Where one does not answer, `corral_planner_up` or
`corral_history_up` is 0 and its other series are left out, since no service confirms their values.
"""

from __future__ import annotations

import asyncio
import platform
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from msgspec import Struct
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from ..bus.process import corral_version
from ..client.client import Client
from ..client.errors import CorralError
from ..client.health import ask_health
from ..schemas.health import Measure, ServiceHealth
from ..schemas.instruments import INSTRUMENTS, InstrumentKind, ServiceKind
from ..schemas.operations import FleetSummary, QueueEntry
from ..schemas.query import ProcessorStatus
from ..schemas.requests import Lease
from ..schemas.telemetry import AgentReport, DeviceInfo
from ..schemas.values.globs import matches_any
from ..schemas.work.groups import Groups
from .live import Host, LiveFleet
from .page import device_labels
from .processes import Shown
from .processes import families as process_families

SERVICE_SECONDS: Final = 3.0


class ServiceAnswers(Struct, kw_only=True):
    """Answers of the services; None where none answered."""

    fleet: FleetSummary | None = None
    leases: list[Lease] | None = None
    queue: list[QueueEntry] | None = None
    groups: Groups | None = None
    history: ProcessorStatus | None = None
    services: list[ServiceHealth] = []


_ASKED: Final = (
    ServiceKind.PLANNER,
    ServiceKind.PROCESSOR,
    ServiceKind.DASHBOARD,
    ServiceKind.GATEWAY,
    ServiceKind.NOTIFIER,
    ServiceKind.LOGIN,
)
"""Services whose health is queried. Collectors publish reports, and there may be thousands; the exporter knows its own
health."""


async def ask(client: Client, known: Sequence[tuple[str, str]] = ()) -> ServiceAnswers:
    """Query planner and processor, and the health of services, concurrently and for `SERVICE_SECONDS` at most.

    Args:
        client: client of the bus.
        known: kind and instance of the services that answered last time: once all of them have, no other is waited for.
    """

    async def or_none(work: object) -> object:
        try:
            async with asyncio.timeout(SERVICE_SECONDS):
                return await work  # pyright: ignore[reportGeneralTypeIssues]
        except (CorralError, TimeoutError, ValueError):
            return None

    async def healths(kind: ServiceKind) -> list[ServiceHealth]:
        return await ask_health(
            client.nc, kind.value, known=[each for each in known if each[0] == kind.value], first_seconds=1.0
        )

    fleet, leases, queue, groups, history, *services = await asyncio.gather(
        or_none(client.fleet()),
        or_none(client.leases()),
        or_none(client.queue()),
        or_none(client.groups()),
        or_none(client.history()),
        *(or_none(healths(kind)) for kind in _ASKED),
    )
    return ServiceAnswers(
        fleet=fleet,  # pyright: ignore[reportArgumentType]
        leases=leases,  # pyright: ignore[reportArgumentType]
        queue=queue,  # pyright: ignore[reportArgumentType]
        groups=groups,  # pyright: ignore[reportArgumentType]
        history=history,  # pyright: ignore[reportArgumentType]
        services=[each for found in services for each in found or ()],  # pyright: ignore[reportGeneralTypeIssues, reportUnknownVariableType]
    )


class ServiceSeries:
    """Series of one scrape, in the form that prometheus-client takes.

    Args:
        answers: answers of the services.
        hosts: hosts that were heard lately.
        known: every host that has published an inventory, heard or not.
        live: state of the hosts, for counts of messages and for missing boards.
        names: globs over the names that are wanted; empty for all.
        scrape_seconds: time that it took to write the devices' series.
        processes: processes to show.
    """

    def __init__(
        self,
        answers: ServiceAnswers,
        hosts: Sequence[Host],
        known: Sequence[Host],
        live: LiveFleet,
        *,
        names: Sequence[str] = (),
        scrape_seconds: float = 0.0,
        processes: Shown = Shown.NONE,
    ) -> None:
        self.answers = answers
        self.hosts = hosts
        self.known = known
        self.live = live
        self.names = names
        self.scrape_seconds = scrape_seconds
        self.processes = processes

    def collect(self) -> Iterator[Metric]:
        """Yield the families that are wanted and not empty."""
        for family in self._all():
            name = f"{family.name}_total" if family.type == "counter" else family.name
            if family.samples and (not self.names or matches_any(name, self.names)):
                yield family

    def _all(self) -> Iterator[Metric]:
        yield from _exporter(self.hosts, self.live, self.scrape_seconds)
        yield from _hosts(self.hosts, self.live)
        missing = self.live.missing()
        yield from _expected(self.hosts, self.known, self.live, missing)
        yield from _agents([host.report for host in self.hosts if host.report is not None])
        answers = self.answers
        yield _gauge(
            "corral_planner_up", "1 if a planner answered this scrape, else 0.", float(answers.fleet is not None)
        )
        yield _gauge(
            "corral_history_up", "1 if a processor answered this scrape, else 0.", float(answers.history is not None)
        )
        if answers.fleet is not None:
            yield from _fleet(answers.fleet, len(missing))
        if answers.leases is not None:
            yield from _leases(answers.leases, self.hosts)
            yield from process_families(self.hosts, answers.leases, self.processes)
        if answers.queue is not None:
            yield from _queue(answers.queue)
        if answers.groups is not None:
            yield from _groups(answers.groups)
        if answers.history is not None:
            yield from _history(answers.history)
        yield from _services(answers.services)


def _gauge(name: str, help: str, value: float | None) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, help)
    if value is not None:
        family.add_metric([], value)
    return family


def _counter(name: str, help: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, help, value=value)


def _gauges(name: str, help: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], float]]) -> Metric:
    family = GaugeMetricFamily(name, help, labels=labels)
    for found, value in values:
        family.add_metric(found, value)
    return family


def _counters(name: str, help: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], float]]) -> Metric:
    family = CounterMetricFamily(name, help, labels=labels)
    for found, value in values:
        family.add_metric(found, value)
    return family


def _exporter(hosts: Sequence[Host], live: LiveFleet, scrape_seconds: float) -> Iterator[Metric]:
    built = [corral_version(), platform.python_version()]
    yield _gauges(
        "corral_exporter_build_info", "Versions of the exporter; always 1.", ["version", "python"], [(built, 1)]
    )
    shown = [host for host in hosts if host.batch is not None]
    devices = sum(len(host.batch.devices) for host in shown if host.batch is not None and host.inventory is not None)
    yield _gauge(
        "corral_exporter_hosts", "Hosts with device series on this page.", sum(h.inventory is not None for h in shown)
    )
    yield _gauge("corral_exporter_devices", "Devices with series on this page.", devices)
    yield _gauge(
        "corral_exporter_hosts_without_inventory",
        "Hosts that publish samples but no inventory yet; their devices are left out.",
        sum(host.inventory is None for host in shown),
    )
    yield _counter("corral_exporter_messages", "Sample messages received.", live.messages)
    yield _counter("corral_exporter_undecodable_messages", "Messages that could not be decoded.", live.undecodable)
    yield _gauge("corral_exporter_write_seconds", "Time to write the device series of this scrape.", scrape_seconds)


def _hosts(hosts: Sequence[Host], live: LiveFleet) -> Iterator[Metric]:
    shown = [host for host in hosts if host.batch is not None]
    now = time.time()
    yield _gauges(
        "corral_host_sample_age_seconds",
        "Age of the newest sample by the host's clock; includes backlog and clock error.",
        ["Hostname"],
        [([h.name], now - _last_time(h.batch.times_ns)) for h in shown if h.batch is not None],
    )
    yield _gauges(
        "corral_host_clock_offset_seconds",
        "Host clock minus exporter clock, from the newest samples; a backlog makes it negative.",
        ["Hostname"],
        [([h.name], h.clock_offset_seconds) for h in shown if h.clock_offset_seconds is not None],
    )


def _expected(
    hosts: Sequence[Host], known: Sequence[Host], live: LiveFleet, missing: Sequence[DeviceInfo]
) -> Iterator[Metric]:
    """Series about expected hosts and missing boards: a series that ends may just have ended with the exporter."""
    names = {host.name for host in known}
    heard = [host for host in hosts if host.batch is not None and host.name not in names]
    listed = [*(host for host in known if host.expected), *heard]
    yield _gauges(
        "corral_host_silent_seconds",
        "Time since the last samples of an expected host, while the bus was reachable.",
        ["Hostname"],
        [([host.name], live.age_seconds(host)) for host in listed],
    )
    yield _gauges(
        "corral_host_expected",
        "1 for a host that should report, 0 for one that left, was renamed, or is silent for a week.",
        ["Hostname"],
        [([host.name], float(host.expected)) for host in known],
    )
    shown = {host.name for host in known}
    yield _gauges(
        "corral_device_missing",
        "1 for a device that its host had in the last week and no longer has, if its slot is empty.",
        ["gpu", "UUID", "pci_bus_id", "modelName", "Hostname", "hostname"],
        [
            ([str(d.index) if d.index >= 0 else "", d.uuid, d.pcie_address, d.name, d.host, d.host], 1.0)
            for d in missing
            if d.host in shown
        ],
    )


def _last_time(times_ns: bytes) -> float:
    return memoryview(times_ns).cast("q")[-1] / 1e9


def _agents(reports: Sequence[AgentReport]) -> Iterator[Metric]:
    yield _gauges(
        "corral_agent_info",
        "Collector of a host; always 1.",
        ["Hostname", "source", "version"],
        [([report.host, report.source, report.corral_version], 1) for report in reports],
    )
    for name, field, help in (
        ("ticks", "ticks", "Sampling ticks read."),
        ("late_ticks", "late_ticks", "Ticks skipped because an earlier one was still being read."),
        ("read_errors", "read_errors", "Failed calls of the driver."),
        ("published_messages", "published_messages", "Messages acknowledged by the bus."),
        ("dropped_messages", "dropped_messages", "Messages dropped because the buffer was full."),
        ("dropped_samples", "dropped_samples", "Device samples in dropped messages."),
        ("cpu_seconds", "cpu_seconds", "User and system CPU time of the collector."),
    ):
        values = [([report.host], float(getattr(report, field))) for report in reports]
        yield _counters(f"corral_agent_{name}", help, ["Hostname"], values)
    for name, field, help in (
        ("buffered_bytes", "buffered_bytes", "Bytes buffered for the bus, in memory and on disk."),
        ("resident_bytes", "resident_bytes", "Resident memory of the collector."),
        ("read_mean_seconds", "read_seconds_mean", "Mean time to read a tick, over 10 s."),
        ("read_max_seconds", "read_seconds_max", "Maximum time to read a tick, over 10 s."),
    ):
        values = [([report.host], float(getattr(report, field))) for report in reports]
        yield _gauges(f"corral_agent_{name}", help, ["Hostname"], values)


def _fleet(fleet: FleetSummary, missing: int) -> Iterator[Metric]:
    for name, value, help in (
        ("expected_devices", fleet.devices + missing, "Devices that the planner knows, plus missing ones."),
        ("missing_devices", missing, "Devices that their hosts had in the last week and no longer have."),
        ("hosts", fleet.hosts, "Hosts that the planner knows."),
        ("devices", fleet.devices, "Devices that the planner knows."),
        ("usable_devices", fleet.usable_devices, "Devices that can take work now."),
        ("leased_devices", fleet.leased_devices, "Devices with a lease, in whole or in part."),
        ("in_use_devices", fleet.in_use_devices, "Devices in use without a lease."),
        ("free_devices", fleet.share_free, "Sum of the unleased shares of devices."),
        ("memory_total_bytes", fleet.memory_total_bytes, "Total device memory."),
        ("memory_used_bytes", fleet.memory_used_bytes, "Device memory in use, as measured."),
        ("memory_free_bytes", fleet.memory_free_bytes, "Device memory available to requests."),
    ):
        yield _gauge(f"corral_fleet_{name}", help, value)
    models = [([model], float(count)) for model, count in sorted(fleet.models.items())]
    yield _gauges("corral_fleet_model_devices", "Devices by model.", ["modelName"], models)


def _leases(leases: Sequence[Lease], hosts: Sequence[Host]) -> Iterator[Metric]:
    count: dict[str, int] = defaultdict(int)
    devices: dict[str, float] = defaultdict(float)
    memory: dict[str, int] = defaultdict(int)
    ends: dict[str, float] = {}
    held: dict[tuple[str, ...], float] = defaultdict(float)
    labels = {uuid: found for host in hosts if host.inventory for uuid, found in device_labels(host.inventory).items()}
    for lease in leases:
        count[lease.owner] += 1
        ends[lease.owner] = min(lease.expires_at.timestamp(), ends.get(lease.owner, float("inf")))
        for grant in lease.grants:
            if not grant.device:
                continue
            devices[lease.owner] += grant.share
            memory[lease.owner] += grant.memory_bytes
            found = labels.get(grant.device, {})
            uuid, gpu = found.get("UUID", grant.device), found.get("gpu", str(grant.index))
            part = found.get("GPU_I_ID", "")
            held[uuid, gpu, part, grant.host, lease.owner, lease.group, lease.name] += grant.share
    owners = sorted(count)
    yield _gauge("corral_active_leases", "Active leases.", len(leases))
    yield _gauges("corral_leases", "Active leases by owner.", ["owner"], [([o], count[o]) for o in owners])
    yield _gauges(
        "corral_leased_devices",
        "Sum of leased shares of devices, by owner.",
        ["owner"],
        [([o], devices[o]) for o in owners],
    )
    yield _gauges(
        "corral_leased_memory_bytes", "Device memory granted, by owner.", ["owner"], [([o], memory[o]) for o in owners]
    )
    yield _gauges(
        "corral_lease_next_expiry_timestamp_seconds",
        "Time at which the first of an owner's leases expires unless renewed.",
        ["owner"],
        [([o], ends[o]) for o in owners],
    )
    yield _gauges(
        "corral_device_lease_share",
        "Share of a device that a lease holds; joins with device series on UUID.",
        ["UUID", "gpu", "GPU_I_ID", "Hostname", "owner", "group", "name"],
        [(list(key), share) for key, share in sorted(held.items())],
    )


def _queue(entries: Sequence[QueueEntry]) -> Iterator[Metric]:
    yield _gauge("corral_queue_length", "Queued requests.", len(entries))
    yield _gauge(
        "corral_queue_longest_wait_seconds",
        "Longest time that a request has been queued.",
        max((entry.waiting_seconds for entry in entries), default=0.0),
    )
    gpus: dict[str, int] = defaultdict(int)
    for entry in entries:
        gpus[entry.owner] += entry.gpus
    values = [([owner], float(found)) for owner, found in sorted(gpus.items())]
    yield _gauges("corral_queue_devices", "Devices requested by queued requests, by owner.", ["owner"], values)


def _groups(groups: Groups) -> Iterator[Metric]:
    if len(groups.groups) < 2:  # `default` alone: nobody has set up groups
        return
    values: dict[str, dict[str, float]] = defaultdict(dict)
    for status in groups.groups:
        name = status.group.name
        values["leased_devices"][name] = sum(status.gpus_used.values())
        values["guaranteed_devices"][name] = status.gpus_guaranteed
        values["borrowed_devices"][name] = status.gpus_borrowed
        values["owed_devices"][name] = status.gpus_owed
        values["usage"][name] = status.usage
        values["fair_usage"][name] = status.fair_usage
        values["queue_length"][name] = float(status.waiting_requests)
        values["queue_devices"][name] = status.waiting_gpus
    for name, help in (
        ("leased_devices", "Sum of leased shares of devices, by group."),
        ("guaranteed_devices", "Devices that a group is guaranteed."),
        ("borrowed_devices", "Devices that a group uses beyond its guarantee."),
        ("owed_devices", "Guaranteed devices that a group waits for."),
        ("usage", "A group's part of all recent use (0 to 1)."),
        ("fair_usage", "The part of recent use that a group's weight gives it (0 to 1)."),
        ("queue_length", "Queued requests of a group."),
        ("queue_devices", "Devices that a group's queued requests ask for."),
    ):
        yield _gauges(f"corral_group_{name}", help, ["group"], [([g], value) for g, value in values[name].items()])


def _history(status: ProcessorStatus) -> Iterator[Metric]:
    lag = [([stream], float(count)) for stream, count in sorted(status.lag_messages.items())]
    yield _gauges("corral_history_lag_messages", "Messages not stored yet.", ["stream"], lag)
    marks = [([stream], float(mark)) for stream, mark in sorted(status.watermarks.items())]
    yield _gauges("corral_history_watermark", "Last stored stream sequence.", ["stream"], marks)
    yield _counter("corral_history_samples", "Device samples stored since the processor's start.", status.samples)
    yield _counter("corral_history_dead_letters", "Messages refused since the processor's start.", status.dead_letters)
    yield _counter("corral_history_duplicates", "Duplicate messages, which changed nothing.", status.duplicates)
    yield _gauge("corral_history_paused", "1 while the processor is paused.", float(bool(status.paused)))
    yield _gauge("corral_history_database_bytes", "Size of the database on disk.", status.database_bytes)


_IDENTITY: Final = ("service", "id", "host")


def series_name(kind: ServiceKind, name: str) -> str:
    """Name of an instrument's series in Prometheus, without the `_total` that counters get."""
    return f"corral_{kind.value}_{name}" if name not in INSTRUMENTS[ServiceKind.DASHBOARD] else f"corral_service_{name}"


def _services(services: Sequence[ServiceHealth]) -> Iterator[Metric]:
    """Series of the services' health: readiness, versions and instruments."""
    identities = [[each.service.value, each.instance, each.host] for each in services]
    yield _gauges(
        "corral_service_ready",
        "1 if the service is ready.",
        _IDENTITY,
        [(who, float(each.ready)) for who, each in zip(identities, services, strict=True)],
    )
    yield _gauges(
        "corral_service_info",
        "A service that answers; always 1.",
        [*_IDENTITY, "role", "version"],
        [([*who, each.role, each.corral_version], 1) for who, each in zip(identities, services, strict=True)],
    )
    shared = set(INSTRUMENTS[ServiceKind.DASHBOARD])
    families: dict[str, Metric] = {}
    for who, each in zip(identities, services, strict=True):
        for measure in each.measures:
            instrument = INSTRUMENTS[each.service].get(measure.name)
            if instrument is None:  # a newer service
                continue
            name = series_name(each.service, measure.name)
            identity = who if measure.name in shared else who[1:2]
            names = [*(_IDENTITY if measure.name in shared else _IDENTITY[1:2]), *instrument.labels]
            labels = [*identity, *(measure.labels.get(label, "") for label in instrument.labels)]
            family = families.get(name)
            if family is None:
                family = families[name] = _FAMILIES[instrument.kind](name, instrument.help, labels=names)
            _add(family, labels, measure)
    yield from families.values()


_FAMILIES: Final[dict[InstrumentKind, type[GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily]]] = {
    InstrumentKind.GAUGE: GaugeMetricFamily,
    InstrumentKind.COUNTER: CounterMetricFamily,
    InstrumentKind.HISTOGRAM: HistogramMetricFamily,
}


def _add(family: Metric, labels: list[str], measure: Measure) -> None:
    if isinstance(family, HistogramMetricFamily):
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip([*measure.bounds, float("inf")], measure.counts, strict=False):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else repr(bound), float(total)))
        family.add_metric(labels, buckets, measure.value)
    elif isinstance(family, GaugeMetricFamily | CounterMetricFamily):
        family.add_metric(labels, measure.value)
