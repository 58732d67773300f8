"""Data points of a host's devices, from its newest samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from msgspec import Struct
from opentelemetry.sdk.metrics.export import AggregationTemporality, Gauge, Metric, NumberDataPoint, Sum

from ...schemas import columns
from ...schemas.telemetry import DeviceInfo, Inventory, SampleBatch
from ...schemas.values import clocks
from ..live import Host
from ..page import device_labels
from ..xids import Xids
from .names import MEMORY_SHARE, STATES, STATUS, XIDS, DeviceMetric, Instrument
from .starts import Starts

_RESET_PENDING: Final = ("remapped_rows_pending", "retired_pages_pending")
_FAILING: Final = "remapped_rows_failure"
_RECOVERY: Final = "recovery_action"

Attributes = dict[str, str]
Values = Sequence[float | int | None]


class HostState(Struct, frozen=True):
    """A host as it was at one moment: what `LiveFleet` has may change while points are made of it.

    Attributes:
        name: name of the host.
        inventory: its last inventory.
        batch: its newest samples.
        heard_ns: when they arrived, nanoseconds since the epoch.
        xids: Xids of each device that has had some.
    """

    name: str
    inventory: Inventory
    batch: SampleBatch
    heard_ns: int
    xids: Mapping[str, Xids]


def snapshot(hosts: Iterable[Host]) -> list[HostState]:
    """Take what points are made of, for hosts with samples and an inventory."""
    return [
        HostState(host.name, host.inventory, host.batch, host.heard_ns, host.xids)
        for host in hosts
        if host.batch is not None and host.inventory is not None
    ]


def identities(inventory: Inventory) -> dict[str, Attributes]:
    """Attributes that identify each device of a host, by uuid."""
    labels = device_labels(inventory)
    return {device.uuid: _identity(device, labels[device.uuid]) for device in inventory.devices}


def _identity(device: DeviceInfo, labels: Mapping[str, str]) -> Attributes:
    name = labels["device"] + (f"/{device.mig_profile}/{labels['GPU_I_ID']}" if device.mig_parent is not None else "")
    found = {
        "hw.id": device.uuid,
        "hw.type": "gpu",
        "hw.name": name,
        "hw.parent": device.mig_parent or "",
        "hw.model": device.name,
        "hw.vendor": device.vendor,
        "hw.driver_version": device.driver,
        "hw.serial_number": device.serial,
    }
    return {key: value for key, value in found.items() if value}


def metrics(host: HostState, wanted: Sequence[DeviceMetric], starts: Starts) -> list[Metric]:
    """Make the points of a host's devices, with the time at which they were read.

    Args:
        host: the host.
        wanted: metrics to send; `hw.status` and Xids come with them.
        starts: start times of counters; updated in place.
    """
    known = identities(host.inventory)
    uuids = host.batch.devices
    count = len(uuids)
    times = list(columns.times(host.batch)[-count:])
    ahead_ns = clocks.ahead_ns(max(times, default=0), host.heard_ns)
    times = [time_ns - ahead_ns for time_ns in times]
    points: dict[str, list[NumberDataPoint]] = defaultdict(list)
    metric_of: dict[str, DeviceMetric] = {}
    for metric in wanted:
        values = _last(host.batch, metric.metric)
        if values is None:
            continue
        metric_of.setdefault(metric.name, metric)
        counts = metric.instrument is Instrument.COUNTER
        for uuid, value, time_ns in zip(uuids, values, times, strict=True):
            identity = known.get(uuid)
            if value is None or identity is None:
                continue
            scaled = value if metric.factor == 1 else value * metric.factor
            key = (uuid, metric.metric)
            start_ns = starts.start_ns(key, value, time_ns) if counts else 0
            points[metric.name].append(NumberDataPoint(_attributes(identity, metric), start_ns, time_ns, scaled))
    found = [_metric(metric_of[name], made) for name, made in points.items()]
    states = _states(host, uuids)
    status = [
        NumberDataPoint(known[uuid] | {"hw.state": state}, 0, time_ns, int(states[uuid] == state))
        for uuid, time_ns in zip(uuids, times, strict=True)
        if uuid in known
        for state in STATES
    ]
    if status:
        found.append(status_metric(status))
    xids = [
        NumberDataPoint(
            known[uuid] | {"corral.gpu.xid": str(code)}, starts.start_ns((uuid, XIDS, code), total, at), at, total
        )
        for uuid, at in zip(uuids, times, strict=True)
        if uuid in known and uuid in host.xids
        for code, total in sorted(host.xids[uuid].counts.items())
    ]
    if xids:
        found.append(Metric(XIDS, "Xids, by code.", "{error}", _sum(xids, monotonic=True)))
    return found


def status_metric(points: Sequence[NumberDataPoint]) -> Metric:
    """`hw.status` with its points."""
    return Metric(STATUS, "1 for the state that a device is in, 0 for the others.", "1", _sum(points, monotonic=False))


def _attributes(identity: Attributes, metric: DeviceMetric) -> Attributes:
    if not metric.sensor:
        return identity | metric.attributes if metric.attributes else identity
    uuid = identity["hw.id"]
    own = {
        "hw.id": f"{uuid}/{metric.sensor}",
        "hw.type": metric.type,
        "hw.parent": uuid,
        "hw.name": identity["hw.name"],
    }
    return own | metric.attributes


def _metric(metric: DeviceMetric, points: Sequence[NumberDataPoint]) -> Metric:
    match metric.instrument:
        case Instrument.GAUGE:
            data = Gauge(points)
        case Instrument.COUNTER:
            data = _sum(points, monotonic=True)
        case Instrument.UP_DOWN_COUNTER:
            data = _sum(points, monotonic=False)
    return Metric(metric.name, metric.help, metric.unit, data)


def _sum(points: Sequence[NumberDataPoint], *, monotonic: bool) -> Sum:
    return Sum(points, AggregationTemporality.CUMULATIVE, monotonic)


def _last(batch: SampleBatch, metric: str) -> Values | None:
    """Values of the last tick; None if no device has the metric."""
    count = len(batch.devices)
    if metric == MEMORY_SHARE:
        used, total = (_last(batch, f"memory_{what}_bytes") for what in ("used", "total"))
        if used is None or total is None:
            return None
        return [a / b if a is not None and b else None for a, b in zip(used, total, strict=True)]
    column = columns.column(batch, metric)
    return None if column is None else column[-count:]


def _states(host: HostState, uuids: Sequence[str]) -> dict[str, str]:
    """State of each device, as in `STATES`: the worst that its values and Xids show."""
    nothing: Values = [None] * len(uuids)
    failing = _last(host.batch, _FAILING) or nothing
    recovery = _last(host.batch, _RECOVERY) or nothing
    pending = [_last(host.batch, name) or nothing for name in _RESET_PENDING]
    found: dict[str, str] = {}
    for at, uuid in enumerate(uuids):
        xids = host.xids.get(uuid)
        if (xids is not None and xids.fatal) or recovery[at]:
            found[uuid] = "failed"
        elif failing[at]:
            found[uuid] = "predicted_failure"
        elif any(column[at] for column in pending):
            found[uuid] = "degraded"
        else:
            found[uuid] = "ok"
    return found
