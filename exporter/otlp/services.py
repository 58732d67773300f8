"""Data points about leases, queue, groups and services: the series of the page (`exporter/pipeline.py`) in OTLP.

`corral_queue_longest_wait_seconds` is `corral.queue.longest_wait` in `s`. Prometheus makes the former of the latter
again, so that alerts and boards fit both ways.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    NumberDataPoint,
    Sum,
)
from prometheus_client.core import Metric as Family
from prometheus_client.samples import Sample

from ...schemas.requests import Lease
from ..processes import LeaseUse
from .starts import Starts

_UNITS: Final = (("_seconds", "s"), ("_bytes", "By"))
_ATTRIBUTES: Final = {
    "UUID": "hw.id",
    "modelName": "hw.model",
    "gpu": "corral.gpu.index",
    "GPU_I_ID": "corral.gpu.instance",
}
_HOST: Final = "Hostname"
_LEFT_OUT: Final = frozenset({"hostname"})
_PER_DEVICE: Final = "corral_device_lease_"
"""Series of leases on devices: their points are made of the leases, whose devices have ids of their own."""
_JOB: Final = re.compile(r"job-(.+)_\d+-\d+")
"""Id of the work request of a job's task, which has the job's id."""

_LEASES: Final = {
    "share": ("1", "Share of a device that a lease holds."),
    "memory": ("By", "Device memory that a lease was granted."),
    "processes": ("{process}", "Processes of a lease on a device."),
    "memory_used": ("By", "Device memory that the processes of a lease hold."),
    "sm_utilization": ("1", "Share of SM time of the processes of a lease."),
}
"""Unit and description of `corral.device.lease.…`."""
_Key = tuple[tuple[str, str], ...]

HostMetrics = dict[str, list[Metric]]
"""Metrics by host; those of no host under an empty name."""


def metrics(families: Iterable[Family], starts: Starts, now_ns: int) -> HostMetrics:
    """Make points of Prometheus families, by the host that they are about.

    Args:
        families: families as Prometheus' client library has them.
        starts: start times of counters; updated in place.
        now_ns: time of the points: services and planner were asked just now.
    """
    found: HostMetrics = defaultdict(list)
    for family in families:
        if family.name.startswith(_PER_DEVICE):
            continue
        name, unit = metric_name(family.name)
        by_host: dict[str, list[Sample]] = defaultdict(list)
        for sample in family.samples:
            by_host[sample.labels.get(_HOST, "")].append(sample)
        for host, samples in by_host.items():
            if family.type == "histogram":
                data: Histogram | Gauge | Sum = _histogram(family.name, host, samples, starts, now_ns)
            else:
                points = [
                    NumberDataPoint(
                        _attributes(sample),
                        starts.start_ns((host, sample.name, tuple(sample.labels.items())), sample.value, now_ns)
                        if family.type == "counter"
                        else 0,
                        now_ns,
                        sample.value,
                    )
                    for sample in samples
                ]
                data = _cumulative(points) if family.type == "counter" else Gauge(points)
            found[host].append(Metric(name, family.documentation, unit, data))
    return found


def metric_name(series: str) -> tuple[str, str]:
    """Name and unit in OpenTelemetry of a series of the page, given without its `_total`."""
    unit = ""
    for suffix, ucum in _UNITS:
        if series.endswith(suffix):
            series, unit = series.removesuffix(suffix), ucum
    part, _, rest = series.removeprefix("corral_").partition("_")
    return f"corral.{part}.{rest}" if rest else f"corral.{part}", unit


def leases(found: Sequence[Lease], uses: Sequence[LeaseUse], now_ns: int, *, ids: bool) -> HostMetrics:
    """Make points of leases on devices: what each holds, and what its processes use.

    Args:
        found: active leases.
        uses: use of devices by their processes.
        now_ns: time of the points.
        ids: True to add the ids of lease and job, which are new with each.
    """
    values: dict[str, dict[str, dict[_Key, float]]] = defaultdict(lambda: defaultdict(dict))

    def add(host: str, name: str, key: _Key, value: float | None) -> None:
        if value is not None:  # without ids, leases of one workload on a device are one
            values[host][name][key] = values[host][name].get(key, 0) + value

    for lease in found:
        for grant in lease.grants:
            if grant.device:
                key = _lease_key(lease, grant.device, grant.mig_parent, ids=ids)
                add(grant.host, "share", key, grant.share)
                add(grant.host, "memory", key, grant.memory_bytes)
    for used in uses:
        if used.lease is not None:
            parents = {grant.device: grant.mig_parent for grant in used.lease.grants}
            key = _lease_key(used.lease, used.device, parents.get(used.device, ""), ids=ids)
            busy = used.use.sm_utilization_percent
            add(used.host, "processes", key, used.use.processes)
            add(used.host, "memory_used", key, used.use.memory_used_bytes)
            add(used.host, "sm_utilization", key, None if busy is None else busy / 100)
    return {
        host: [
            Metric(
                f"corral.device.lease.{name}",
                _LEASES[name][1],
                _LEASES[name][0],
                _level([NumberDataPoint(dict(key), 0, now_ns, value) for key, value in by_key.items()]),
            )
            for name, by_key in by_name.items()
        ]
        for host, by_name in values.items()
    }


def _lease_key(lease: Lease, device: str, parent: str, *, ids: bool) -> _Key:
    who = {"corral.owner": lease.owner, "corral.workload": lease.name, "corral.group": lease.group}
    if ids:
        job = _JOB.fullmatch(lease.request_id)
        who |= {"corral.lease.id": lease.lease_id, "corral.job.id": job[1] if job is not None else ""}
    found = {"hw.id": device, "hw.parent": parent, "hw.type": "gpu"} | who
    return tuple((name, value) for name, value in found.items() if value)


def _attributes(sample: Sample) -> dict[str, str]:
    return {
        _ATTRIBUTES.get(label, f"corral.{label}"): value
        for label, value in sample.labels.items()
        if value and label != _HOST and label not in _LEFT_OUT
    }


def _cumulative(points: Sequence[NumberDataPoint]) -> Sum:
    return Sum(points, AggregationTemporality.CUMULATIVE, is_monotonic=True)


def _level(points: Sequence[NumberDataPoint]) -> Sum:
    return Sum(points, AggregationTemporality.CUMULATIVE, is_monotonic=False)


def _histogram(name: str, host: str, samples: Sequence[Sample], starts: Starts, now_ns: int) -> Histogram:
    """Make points of the buckets of a Prometheus histogram, which count all that are smaller, too."""
    buckets: dict[tuple[tuple[str, str], ...], list[tuple[float, int]]] = defaultdict(list)
    sums: dict[tuple[tuple[str, str], ...], float] = {}
    attributes: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}
    for sample in samples:
        key = tuple((label, value) for label, value in sample.labels.items() if label != "le")
        if sample.name.endswith("_bucket"):
            buckets[key].append((float(sample.labels["le"]), int(sample.value)))
            attributes[key] = {k: v for k, v in _attributes(sample).items() if k != "corral.le"}
        elif sample.name.endswith("_sum"):
            sums[key] = sample.value
    points: list[HistogramDataPoint] = []
    for key, found in buckets.items():
        counts = [total - before for (_, total), before in zip(found, [0, *(n for _, n in found)], strict=False)]
        total = found[-1][1]
        points.append(
            HistogramDataPoint(
                attributes=attributes[key],
                start_time_unix_nano=starts.start_ns((host, name, key), total, now_ns),
                time_unix_nano=now_ns,
                count=total,
                sum=sums.get(key, 0.0),
                bucket_counts=counts,
                explicit_bounds=[bound for bound, _ in found[:-1]],
                min=None,  # pyright: ignore[reportArgumentType] # unknown; the field of the protocol is optional
                max=None,  # pyright: ignore[reportArgumentType]
            )
        )
    return Histogram(points, AggregationTemporality.CUMULATIVE)
