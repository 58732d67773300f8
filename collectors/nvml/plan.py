"""Read schedule of one device, compiled from the catalog: which calls to make, how often, and where values go.

At the start the ways of reading a metric that the catalog names are tried once, in order, until one works. Calls that
the device refuses, then or later, are left out and retried less and less often. Calls that several metrics share are
made once; field values of one cadence are one batch.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any, Final

from ...schemas.metrics import METRICS, Metric
from ...schemas.rows import CADENCE_SECONDS, Cadence, Call, FieldValue, Gpm, Rate
from ..agent.tickcolumns import INDEX, NAMES, Values
from ..retry import FIRST_SECONDS, Retry
from .calls import Probe, probe
from .fields import FieldBatch, Key, survey
from .gpm import GpmReader
from .library import DRIVER_GONE, LATER, LOST, NOT_SUPPORTED, SUCCESS, UNSUPPORTED, Library, NvmlFailure

log = logging.getLogger("corral.collector.nvml")

_LARGEST: Final = {"<i4": 2**31 - 1, "<i8": 2**63 - 1, "<f4": 3.4e38}

Target = tuple[int, float | None, bool, float, float]
"""Target of a value: index of the metric, scale, True for a whole number, least and greatest possible value."""


def target(name: str, scale: float) -> Target:
    """Target of a metric's values, with its scale and limits."""
    metric: Metric = METRICS[name]
    largest = _LARGEST[metric.row.unit.dtype]
    low = -largest if metric.minimum is None else metric.minimum
    high = largest if metric.maximum is None else metric.maximum
    return INDEX[name], None if scale == 1 else scale, metric.integer, low, high


class Group:
    """Calls and fields that are read at one cadence.

    Attributes:
        seconds: time between two readings.
        due: time of the next reading, on the monotonic clock.
        metrics: indices of the metrics that it fills.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.due = -math.inf
        self.metrics: list[int] = []
        self.probes: list[tuple[Any, tuple[Any, ...], list[tuple[Any, ...]], Probe]] = []
        self.fields: FieldBatch | None = None
        self.field_targets: list[list[Target]] = []
        self.rates: dict[int, tuple[float, float]] = {}
        self.lower: dict[int, tuple[float, float]] = {}
        self.rate_targets: dict[int, list[Target]] = {}


class DevicePlan:
    """Read schedule of one device.

    Args:
        library: NVML.
        handle: handle of the device.
        label: name of the device in log messages.
        skip: metrics that are not to be tried.
        gpm_handle: the device whose GPM gives the metrics; the parent for a MIG instance.
        gpm_instance: id of the GPU instance for a MIG instance.
        kind: devices of one kind support the same GPM metrics.

    Attributes:
        values: the last value of each metric, in the order of the catalog; None where null.
        errors: calls that failed with anything but "not supported".
        supported: names of the metrics that the device gives.
        blocking_fresh: indices of the metrics that the separate thread has read since they were last taken.
    """

    def __init__(
        self,
        library: Library,
        handle: Any,
        label: str,
        *,
        skip: frozenset[str] = frozenset(),
        gpm_handle: Any = None,
        gpm_instance: int | None = None,
        kind: str = "",
    ) -> None:
        self._impossible = library.impossible
        self.values: Values = [None] * len(NAMES)
        self.errors = 0
        self.supported: set[str] = set()
        self.blocking_fresh: list[int] = []
        self._library = library
        self._handle = handle
        self._label = label
        self._logged: set[tuple[str, int]] = set()
        self._blocking: list[tuple[Probe, Target]] = []
        self._groups = {cadence: Group(CADENCE_SECONDS[cadence]) for cadence in Cadence}
        wanted = {name: metric.row for name, metric in METRICS.items() if metric.row.nvml and name not in skip}
        ids = {
            reading: library.constant(reading.metric)
            for row in wanted.values()
            for reading in row.nvml
            if isinstance(reading, Gpm)
        }
        self._gpm = GpmReader(
            library,
            handle if gpm_handle is None else gpm_handle,
            gpm_instance,
            [number for number in ids.values() if number is not None],
            library.gpm_surveyed,
            kind,
        )
        self._wanted = wanted
        self._ids = ids
        self._by_gpm: dict[str, Gpm] = {}
        self._gpm_known: list[int] = []
        self._gpm_targets: list[tuple[int, Target]] = []
        self._gpm_metrics: list[int] = []
        self._order: list[Group] = []
        try:
            self._compile(wanted)
        except NvmlFailure:
            self._gpm.close()
            raise
        self._retry = Retry(time.monotonic())

    def spread(self, share: float) -> None:
        """Shift the slow groups against those of other devices, so that no tick reads all of them.

        Args:
            share: position of this device among the others, 0 to 1.
        """
        for group in self._order:
            if group.seconds > 1 and group.due > 0:
                group.due -= group.seconds * share
        self._retry.due += FIRST_SECONDS * share

    # -- compiling

    def _compile(self, wanted: dict[str, Any]) -> None:
        """Find a way to read each of these metrics, and schedule it."""
        fields = self._try_fields(wanted)
        probes: dict[str, tuple[Probe, int] | None] = {}
        chosen: list[tuple[str, Probe, Call]] = []
        cadences: dict[str, Cadence] = {}
        batches: dict[Cadence, dict[Key, list[tuple[Target, bool]]]] = {}
        for name, row in wanted.items():
            for reading in row.nvml:
                to = target(name, reading.scale)
                if isinstance(reading, Gpm):
                    if self._ids[reading] not in self._gpm.metrics:
                        continue
                    self._by_gpm[name] = reading
                elif isinstance(reading, FieldValue | Rate):
                    key = self._key(reading)
                    code, wide = fields.get(key, (NOT_SUPPORTED, False)) if key else (NOT_SUPPORTED, False)
                    if key is None or code in UNSUPPORTED or (isinstance(reading, Rate) and not wide):
                        continue
                    batches.setdefault(row.cadence, {}).setdefault(key, []).append((to, isinstance(reading, Rate)))
                else:
                    found = self._try_call(reading, probes)
                    if found is None:
                        continue
                    if reading.blocking:
                        self._blocking.append((found, to))
                    else:
                        chosen.append((name, found, reading))
                        cadence = cadences.get(found.name)
                        if cadence is None or CADENCE_SECONDS[row.cadence] < CADENCE_SECONDS[cadence]:
                            cadences[found.name] = row.cadence
                self.supported.add(name)
                break
        self._add_probes(chosen, cadences)
        self._add_fields(batches)
        self._aim_gpm()
        self._order = [group for group in self._groups.values() if group.probes or group.fields]

    def _aim_gpm(self) -> None:
        """Find the places of the metrics in GPM's values; those that it no longer gives are dropped."""
        known = self._gpm_known = self._gpm.metrics
        self._gpm_targets = []
        for name, reading in list(self._by_gpm.items()):
            number = self._ids[reading]
            if number in known:
                self._gpm_targets.append((known.index(number), target(name, reading.scale)))
            else:
                del self._by_gpm[name]
                self.supported.discard(name)
                self.values[INDEX[name]] = None
        self._gpm_metrics = [to[0] for _, to in self._gpm_targets]

    def _add_probes(self, chosen: list[tuple[str, Probe, Call]], cadences: dict[str, Cadence]) -> None:
        outputs: dict[str, list[tuple[Any, ...]]] = {}
        for name, found, reading in chosen:
            to = target(name, reading.scale)
            group = self._groups[cadences[found.name]]
            if found.name not in outputs:
                outputs[found.name] = []
                group.probes.append((found.function, found.args, outputs[found.name], found))
            outputs[found.name].append((*found.output(reading.attribute), *to))
            group.metrics.append(to[0])

    def _add_fields(self, batches: dict[Cadence, dict[Key, list[tuple[Target, bool]]]]) -> None:
        for cadence, targets in batches.items():
            group = self._groups[cadence]
            before = group.fields.keys if group.fields is not None else []
            group.fields = FieldBatch(self._library, self._handle, [*before, *targets])
            for at, entries in enumerate(targets.values(), start=len(before)):
                group.field_targets.append([to for to, rate in entries if not rate])
                rates = [to for to, rate in entries if rate]
                if rates:
                    group.rate_targets[at] = rates
                group.metrics += [to[0] for to, _ in entries]

    def _key(self, reading: FieldValue | Rate) -> Key | None:
        field = self._library.constant(reading.field)
        return None if field is None else (field, reading.scope)

    def _try_fields(self, wanted: dict[str, Any]) -> dict[Key, tuple[int, bool]]:
        keys = [
            self._key(reading)
            for row in wanted.values()
            for reading in row.nvml
            if isinstance(reading, FieldValue | Rate)
        ]
        found = survey(self._library, self._handle, list(dict.fromkeys(key for key in keys if key is not None)))
        for code, _ in found.values():
            self._check(code, "nvmlDeviceGetFieldValues")
        return found

    def _try_call(self, call: Call, probes: dict[str, tuple[Probe, int] | None]) -> Probe | None:
        name = "/".join([call.function, *map(str, call.args)])
        if name not in probes:
            found = probe(self._library, self._handle, call)
            # A blocking call would take too long here: it is tried when it is first made.
            code = SUCCESS if found is None or call.blocking else found.function(*found.args)
            self._check(code, name)
            probes[name] = None if found is None else (found, code)
        tried = probes[name]
        if tried is None or tried[1] in UNSUPPORTED:
            return None
        if tried[1] == SUCCESS and not call.blocking:
            try:
                holder, take = tried[0].output(call.attribute)
                take(holder)
            except (AttributeError, IndexError, TypeError):
                return None
        return tried[0]

    def _ask_again(self, now: float) -> None:
        """Retry what was refused; metrics that have an answer now are read from now on."""
        self._gpm.ask_again()
        missing = {name: row for name, row in self._wanted.items() if name not in self.supported}
        if missing:
            self._compile(missing)
        self._retry.refused(now)

    # -- reading

    def read(self, now: float) -> tuple[int, list[int]]:
        """Read what is due.

        Args:
            now: time on the monotonic clock.

        Returns:
            Number of calls that gave a value or said that there is none now, and the indices of the metrics that were
            read.

        Raises:
            NvmlFailure: the device is lost or the driver is gone.
        """
        answered = 0
        fresh: list[int] = []
        if now >= self._retry.due:
            self._ask_again(now)
        for group in self._order:
            if now < group.due:
                continue
            # Ticks jitter: what is due within a tenth of its period is due now.
            group.due = now + group.seconds * 0.95
            fresh += group.metrics
            answered += self._read_group(group, now)
        if self._gpm_targets:
            code = self._gpm.read(now)
            if code is not None:
                fresh += self._gpm_metrics
                if self._gpm.metrics is not self._gpm_known:
                    self._aim_gpm()
                self._put_gpm(code)
                answered += code == SUCCESS
        return answered, fresh

    def _read_group(self, group: Group, now: float) -> int:
        values = self.values
        answered = 0
        gone: list[str] = []
        for function, args, outputs, call in group.probes:
            code = function(*args)
            if code == SUCCESS:
                answered += 1
                for holder, take, at, scale, whole, low, high in outputs:
                    value = take(holder)
                    if scale is not None:
                        value *= scale
                        if whole:
                            value = round(value)
                    if low <= value <= high:
                        values[at] = value
                    else:
                        values[at] = None
                        self._impossible[NAMES[at]] += 1
                continue
            for output in outputs:
                values[output[2]] = None
            answered += code in LATER
            if code in UNSUPPORTED:
                gone.append(call.name)
            self._check(code, call.name)
        if gone:
            self._leave_out(group, gone, now)
        if group.fields is not None:
            answered += self._read_fields(group, group.fields, now)
        return answered

    def _leave_out(self, group: Group, calls: list[str], now: float) -> None:
        """Remove calls that worked and are now refused; they are retried soon."""
        refused = {output[2] for entry in group.probes if entry[3].name in calls for output in entry[2]}
        group.probes = [entry for entry in group.probes if entry[3].name not in calls]
        group.metrics = [at for at in group.metrics if at not in refused]
        self.supported -= {NAMES[at] for at in refused}
        self._retry.soon(now)

    def _read_fields(self, group: Group, batch: FieldBatch, now: float) -> int:
        values = self.values
        code = batch.read()
        if code != SUCCESS:
            for targets in (*group.field_targets, *group.rate_targets.values()):
                for to in targets:
                    values[to[0]] = None
            self._check(code, "nvmlDeviceGetFieldValues")
            return int(code in LATER)
        types = batch.types
        for entry, targets in zip(batch.entries, group.field_targets, strict=True):
            item, views = entry
            code = item.nvmlReturn
            if code != SUCCESS:
                self._check(code, f"nvmlDeviceGetFieldValues/{item.fieldId}")
                for to in targets:
                    values[to[0]] = None
                continue
            kind = item.valueType
            raw = views[kind].value if kind < types else None
            for to in targets:
                index, scale, whole, low, high = to
                if raw is None:
                    values[index] = None
                    continue
                value = raw if scale is None else raw * scale
                if whole and value.__class__ is float:
                    value = round(value)
                if low <= value <= high:
                    values[index] = value
                else:
                    values[index] = None
                    self._impossible[NAMES[index]] += 1
        for at, targets in group.rate_targets.items():
            rate = self._rate(group, at, batch.value(at) if batch.code(at) == SUCCESS else None, now)
            for to in targets:
                values[to[0]] = self._fit(rate, to)
        return 1

    def _rate(self, group: Group, at: int, raw: float | None, now: float) -> float | None:
        """Growth per second. One reading below the last gives None: the next one tells whether it was a reset."""
        if raw is None:
            return None
        before, lower = group.rates.get(at), group.lower.pop(at, None)
        if before is not None and raw < before[0]:
            if lower is None or raw < lower[0]:
                group.lower[at] = (raw, now)
                return None
            before = lower
        group.rates[at] = (raw, now)
        if before is None or now <= before[1]:
            return None
        return (raw - before[0]) / (now - before[1])

    def _fit(self, raw: float | None, to: Target) -> float | int | None:
        """Convert a raw value to the metric's unit; None where it is not possible, which is counted."""
        if raw is None:
            return None
        index, scale, whole, low, high = to
        value = raw if scale is None else raw * scale
        if not low <= value <= high:
            self._impossible[NAMES[index]] += 1
            return None
        return round(value) if whole else value

    def _put_gpm(self, code: int) -> None:
        if code != SUCCESS:
            self._check(code, "nvmlGpmSampleGet")
        for place, to in self._gpm_targets:
            self.values[to[0]] = self._fit(self._gpm.values[place], to)

    @property
    def asks(self) -> bool:
        """True if it reads by calls or fields at each tick, so that their silence means something."""
        group = self._groups[Cadence.TICK]
        return bool(group.probes) or group.fields is not None

    def read_blocking(self) -> None:
        """Make the calls that take tens of milliseconds; runs in a separate thread."""
        fresh: list[int] = []
        for entry in list(self._blocking):
            found, to = entry
            code = found.function(*found.args)
            if code in UNSUPPORTED:
                self._blocking.remove(entry)
                self.supported.discard(NAMES[to[0]])  # so that it is retried with the others
            holder, take = found.output(None)
            self.values[to[0]] = self._fit(take(holder), to) if code == SUCCESS else None
            fresh.append(to[0])
        self.blocking_fresh = fresh

    @property
    def blocking(self) -> bool:
        """True if it has calls for `read_blocking`."""
        return bool(self._blocking)

    def _check(self, code: int, name: str) -> None:
        """Handle an error code: raise if device or driver is gone; count an unexpected error, and log it once."""
        if code == SUCCESS or code in LATER or code in UNSUPPORTED:
            return
        if code in LOST or code in DRIVER_GONE:
            raise NvmlFailure(code, name, self._library.text(code))
        self.errors += 1
        if (name, code) not in self._logged:
            self._logged.add((name, code))
            log.warning("%s: %s fails: %s (logged once)", self._label, name, self._library.text(code))

    def close(self) -> None:
        """Free what was allocated in NVML."""
        self._gpm.close()


def answers(library: Library, handle: Any) -> bool:
    """True if a device answers any of the calls that are made at each tick.

    No single call would do: a GB10 has no device memory to report, and that of a split board may be out of bounds. A
    device that refuses all calls as not supported answers, too.

    Raises:
        NvmlFailure: the driver is gone.
    """
    failed = False
    for call in _TICK_CALLS:
        found = probe(library, handle, call)
        code = NOT_SUPPORTED if found is None else found.function(*found.args)
        if code in DRIVER_GONE:
            raise NvmlFailure(code, call.function, library.text(code))
        if code in LOST:
            return False
        if code == SUCCESS or code in LATER:
            return True
        failed = failed or code not in UNSUPPORTED
    return not failed


_TICK_CALLS: Final = tuple(
    {
        (reading.function, reading.args): reading
        for metric in METRICS.values()
        for reading in metric.row.nvml
        if metric.row.cadence is Cadence.TICK and isinstance(reading, Call) and not reading.blocking
    }.values()
)
