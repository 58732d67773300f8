"""Live state of a device: its capabilities, the leases on it, and its samples.

A sample is compared with the bounds of the device's present step, and changes the device's state only if it leaves them
by a quarter of a step (hysteresis). So samples at 1 Hz cost little, and a value at a bound does not flap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from struct import Struct as Layout
from typing import Any, Final

from msgspec import Struct

from ...schemas.metrics import METRICS
from ...schemas.telemetry import DeviceEvent, DeviceInfo, SampleBatch, Severity
from .occupancy import Listed, Occupancy
from .order import REREAD_NS, is_past
from .reservation import Reserved
from .state import (
    HEAT_BASE_CELSIUS,
    HEAT_LEVELS,
    HEAT_STEP_CELSIUS,
    LEAST_SHARE,
    LOAD_LEVELS,
    LOAD_STEP_PERCENT,
    MEMORY_GRAIN_BYTES,
    RESERVED,
    SHARE_PER_MILLI,
    WHOLE_SHARE,
    DeviceState,
    Model,
    StateKey,
)

THROTTLE_BITS: Final = 0x08 | 0x20 | 0x40 | 0x80
"""NVML clock event reasons that mean a heat or power problem: hardware slowdown, software thermal slowdown, hardware
thermal slowdown, hardware power brake. The software power cap (0x04) is normal under load."""
LOAD_SECONDS: Final = 60.0
"""Time constant of the exponential average of utilization."""
_EDGE: Final = 0.25
_FATAL: Final = {Severity.RESET: 1, Severity.HARDWARE: 2}

_TEXT_MOST: Final = 256
"""Characters of an event's message that are kept with the fault."""

Amounts = dict[str, tuple[int, int]]


class Fault(Struct, frozen=True):
    """Health of a device or a host, from events.

    Attributes:
        severity: `reset` or `hardware` while the fault lasts; None if healthy.
        message: of the event that set it.
        time_ns: time when NATS stored the last event that took effect.
        warned_at: likewise of the last warning, in seconds since the epoch.
        warning: its message.
    """

    severity: Severity | None = None
    message: str = ""
    time_ns: int = -1
    warned_at: float = -math.inf
    warning: str = ""

    @property
    def fatal(self) -> bool:
        """True if it takes no work because of the fault."""
        return self.severity is not None

    def after(self, event: DeviceEvent) -> Fault:
        """Health after an event; the same object if the event is a repetition, or less severe than the present fault.

        Args:
            event: with the time when NATS stored it.
        """
        text = (event.message or event.kind)[:_TEXT_MOST]
        if event.severity is Severity.WARNING:
            at = event.time_ns * 1e-9
            if self.warned_at - REREAD_NS * 1e-9 <= at <= self.warned_at:
                return self
            return Fault(self.severity, self.message, self.time_ns, at, text)
        if is_past(event.time_ns, self.time_ns):
            return self
        if event.severity is Severity.CLEARED:
            return Fault(None, "", event.time_ns, self.warned_at, self.warning)
        rank = _FATAL.get(event.severity, 0)
        if self.severity is not None and rank < _FATAL[self.severity]:
            return self
        return Fault(event.severity, text, event.time_ns, self.warned_at, self.warning)


class Tick:
    """The last tick of a batch: one value per device in each column; None for a column that the batch lacks."""

    __slots__ = ("nulls", "power", "reserved", "temperature", "throttle", "times_ns", "total", "used", "utilization")

    def __init__(self, times_ns: tuple[int, ...]) -> None:
        self.times_ns = times_ns
        self.nulls: dict[str, bytes] = {}
        self.used: tuple[int | None, ...] | None = None
        self.reserved: tuple[int | None, ...] | None = None
        self.total: tuple[int | None, ...] | None = None
        self.utilization: tuple[float | None, ...] | None = None
        self.temperature: tuple[float | None, ...] | None = None
        self.power: tuple[float | None, ...] | None = None
        self.throttle: tuple[int | None, ...] | None = None


_COLUMNS: Final = (
    ("memory_used_bytes", "used", "q", 8),
    ("memory_reserved_bytes", "reserved", "q", 8),
    ("memory_total_bytes", "total", "q", 8),
    ("gpu_utilization_percent", "utilization", "f", 4),
    ("temperature_celsius", "temperature", "f", 4),
    ("power_watts", "power", "f", 4),
    ("throttle_reasons_bitmask", "throttle", "q", 8),
)
_layouts: dict[tuple[int, str], Layout] = {}


def _layout(count: int, format: str) -> Layout:
    found = _layouts.get((count, format))
    if found is None:
        found = _layouts[count, format] = Layout(f"<{count}{format}")
    return found


def last_tick(batch: SampleBatch) -> Tick | None:
    """Decode the newest readings of a batch; None if its arrays do not fit its devices."""
    count = len(batch.devices)
    size = len(batch.times_ns)
    if count == 0 or size == 0 or size % (8 * count):
        return None
    ticks = size // (8 * count)
    skip = (ticks - 1) * count
    tick = Tick(_layout(count, "q").unpack_from(batch.times_ns, skip * 8))
    columns, nulls = batch.columns, batch.nulls
    for name, attribute, format, width in _COLUMNS:
        raw = columns.get(name)
        if raw is None or len(raw) != ticks * count * width:
            continue
        values: tuple[Any, ...] = _layout(count, format).unpack_from(raw, skip * width)
        metric = METRICS[name]
        least, most = metric.minimum, metric.maximum
        if least is not None and most is not None and not (least <= min(values) and max(values) <= most):
            values = tuple(value if metric.possible(value) else None for value in values)
        missing = nulls.get(name)
        if missing is not None and len(missing) == ticks * count:
            values = tuple(None if null else value for value, null in zip(values, missing[skip:], strict=True))
        setattr(tick, attribute, values)
    return tick


class Device:
    """Live state of a device."""

    __slots__ = (
        "_heat_high",
        "_heat_low",
        "_load_high",
        "_load_low",
        "_overhead_high",
        "_overhead_low",
        "blocked",
        "fault",
        "heat",
        "holders",
        "host",
        "in_use",
        "index",
        "info",
        "load",
        "load_percent",
        "memory_total",
        "memory_used",
        "model",
        "occupancy",
        "overhead",
        "parent",
        "power",
        "reserved",
        "seen_at",
        "shared_by",
        "shares",
        "state",
        "temperature",
        "throttled",
        "time_ns",
        "utilization",
        "uuid",
        "warned",
    )

    def __init__(self, uuid: str, host: str) -> None:
        self.uuid = uuid
        self.host = host
        self.index = 0
        self.info: DeviceInfo
        self.model: Model
        self.state: DeviceState
        self.parent = False
        """True if it is split into MIG instances."""
        self.memory_total = 0
        self.reserved = 0
        self.memory_used: int | None = None
        self.utilization: float | None = None
        self.load_percent = 0.0
        """Utilization, averaged over `LOAD_SECONDS`."""
        self.temperature: float | None = None
        self.power: float | None = None
        self.throttled = False
        self.warned = False
        self.fault: Fault | None = None
        self.blocked = 0
        self.time_ns = -1
        self.seen_at = -math.inf
        """Time when the last sample was read, by the NATS server's clock."""
        self.holders: Amounts = {}
        self.shares = 0
        """Billionths that leases hold."""
        self.shared_by = 1
        """Number of compute instances that share its memory, itself included."""
        self.occupancy = Occupancy()
        self.in_use = ""
        """Reason why it is in use, other than by its leases; empty if it is not."""
        self.overhead = 0
        """Reserved and foreign memory, rounded up so that the rest is a multiple of the grain."""
        self.heat = 0
        self.load = 0
        self._heat_low = -math.inf
        self._heat_high = HEAT_BASE_CELSIUS + _EDGE * HEAT_STEP_CELSIUS
        self._load_low = -math.inf
        self._load_high = LOAD_STEP_PERCENT * (1 + _EDGE)
        self._overhead_low = 0
        self._overhead_high = 0

    @property
    def granted(self) -> int:
        """Bytes of its memory that leases were granted, also on compute instances that share it."""
        return self.occupancy.granted

    @property
    def foreign(self) -> int:
        """Bytes of its memory that are attributed to no lease."""
        return self.occupancy.foreign

    @property
    def memory_most(self) -> int:
        """Bytes of memory that leases can have together, without other use."""
        return max(0, self.memory_total - self.reserved)

    @property
    def memory_free(self) -> int:
        """Exact bytes of memory that a request could get."""
        return max(0, self.memory_most - self.granted - self.foreign)

    @property
    def share_left(self) -> int:
        """Billionths that no lease holds; a remainder of rounding counts as 0."""
        left = WHOLE_SHARE - self.shares
        return left if left >= LEAST_SHARE else 0

    @property
    def share_free(self) -> float:
        """Thousandths that no lease holds."""
        return self.share_left / SHARE_PER_MILLI

    @property
    def share_held(self) -> float:
        """Thousandths that leases hold."""
        return (WHOLE_SHARE - self.share_left) / SHARE_PER_MILLI

    def part(self, share: int) -> int:
        """Bytes of memory for a share in billionths, for a request that names none."""
        return self.memory_most * share // WHOLE_SHARE

    def describe(self, info: DeviceInfo, model: Model, parent: bool) -> None:
        """Set identity and capabilities from an inventory."""
        self.info, self.model, self.parent, self.index = info, model, parent, info.index
        if info.memory_bytes:
            self.memory_total = info.memory_bytes
        self._resize()

    def hold(self, holders: Amounts, beside: dict[str, int] | None = None, since: float = math.inf) -> None:
        """Set what leases hold of it.

        Args:
            holders: (share, memory) by lease.
            beside: memory by lease on other compute instances that share it.
            since: time when the newest lease was granted, seconds since the epoch; infinite if just now.
        """
        self.occupancy.hold(self._cover(holders, beside), since)
        self._round()
        self.judge()

    def end(self, lease: str, holders: Amounts, beside: dict[str, int] | None, at: float, doubt: str) -> None:
        """Note the end of a lease on it; see `Occupancy.end`."""
        self.occupancy.end(lease, self._cover(holders, beside), at, doubt)
        self._round()
        self.judge()

    def _cover(self, holders: Amounts, beside: dict[str, int] | None) -> dict[str, int]:
        self.holders = holders
        self.shares = sum(share for share, _ in holders.values())
        covering = {lease: memory for lease, (_, memory) in holders.items()}
        for lease, memory in (beside or {}).items():
            covering[lease] = covering.get(lease, 0) + memory
        return covering

    def judge(self) -> bool:
        """Update `in_use`; returns true if it became in use, or stopped being so."""
        before = self.in_use
        self.in_use = self.occupancy.why_in_use(self.memory_total)
        return bool(before) != bool(self.in_use)

    def sample(self, tick: Tick, at: int, lag: float, now: float, known: bool) -> tuple[bool, bool]:
        """Take in a sample.

        Args:
            tick: of the whole host.
            at: the device's index in it.
            lag: seconds to add to the collector's clock.
            now: seconds since the epoch.
            known: true if process lists are recent.

        Returns:
            True if the device's state changes, and true if the size of its memory does.
        """
        time_ns = tick.times_ns[at]
        if time_ns == self.time_ns:
            return False, False
        seconds = max(0.0, (time_ns - self.time_ns) * 1e-9)
        first = self.time_ns < 0
        self.time_ns = time_ns
        seen = time_ns * 1e-9 + lag
        self.seen_at = seen if seen < now else now
        dirty = sized = False
        if tick.total is not None:
            total = tick.total[at]
            if total and not self.info.memory_bytes and total != self.memory_total:
                self.memory_total, sized = total, True
                self._resize()
        if tick.reserved is not None:
            reserved = tick.reserved[at] or 0
            if reserved != self.reserved:
                self.reserved, sized = reserved, True
        if tick.used is not None:
            self.memory_used = tick.used[at]
        value = None
        if tick.utilization is not None:
            value = tick.utilization[at]
            # Comparisons with NaN are false, so it is left out here.
            self.utilization = value = value if value is not None and 0 <= value <= 100 else None
            if value is not None:
                weight = 1.0 if first else seconds / (seconds + LOAD_SECONDS)
                self.load_percent = load = self.load_percent + (value - self.load_percent) * weight
                if not self._load_low <= load < self._load_high:
                    self.load = level = min(int(load / LOAD_STEP_PERCENT), LOAD_LEVELS)
                    self._load_low, self._load_high = _bounds(level, 0.0, LOAD_STEP_PERCENT, LOAD_LEVELS)
                    dirty = True
        used = self.memory_used if tick.used is not None else None
        if self.occupancy.sample(used, value, self.seen_at, known):
            dirty = self._round() or dirty
            dirty = self.judge() or dirty
        elif sized:
            self._round()
        if tick.temperature is not None:
            value = tick.temperature[at]
            self.temperature = value = value if value is not None and -100 <= value <= 300 else None
            if value is not None and not self._heat_low <= value < self._heat_high:
                steps = math.floor((value - HEAT_BASE_CELSIUS) / HEAT_STEP_CELSIUS) + 1
                self.heat = level = max(0, min(steps, HEAT_LEVELS))
                self._heat_low, self._heat_high = _bounds(
                    level, HEAT_BASE_CELSIUS - HEAT_STEP_CELSIUS, HEAT_STEP_CELSIUS, HEAT_LEVELS
                )
                dirty = True
        if tick.power is not None:
            value = tick.power[at]
            self.power = value if value is not None and value >= 0 else None
        if tick.throttle is not None:
            reasons = tick.throttle[at]
            throttled = reasons is not None and reasons & THROTTLE_BITS != 0
            if throttled is not self.throttled:
                self.throttled, dirty = throttled, True
        return dirty, sized

    def processes(self, found: Iterable[Listed], read_at: float, readable: bool) -> bool:
        """Take in a list of processes, as `Occupancy.processes`; returns true if the device's state changes."""
        self.occupancy.processes(found, read_at, readable)
        rounded = self._round()
        return self.judge() or rounded

    def _resize(self) -> None:
        self._overhead_low = self._overhead_high = -1
        self._round()

    def _round(self) -> bool:
        taken = self.reserved + self.foreign
        if self._overhead_low < taken <= self._overhead_high or taken == self._overhead_low == self._overhead_high:
            return False
        before = self.overhead
        if taken == 0:
            self.overhead = self._overhead_low = self._overhead_high = 0
            return before != 0
        left = max(0, self.memory_total - taken) // MEMORY_GRAIN_BYTES * MEMORY_GRAIN_BYTES
        self.overhead = self.memory_total - left
        self._overhead_high = self.overhead
        # Memory may fall a quarter of a grain below the step before the device is taken to have more.
        self._overhead_low = self.overhead - MEMORY_GRAIN_BYTES - int(MEMORY_GRAIN_BYTES * _EDGE)
        return before != self.overhead

    def see(self, intern: Callable[[StateKey], DeviceState], kept: Reserved | None = None) -> DeviceState:
        """Update and return the device's state, as decisions see it.

        Args:
            intern: returns the one state object of a key.
            kept: part of the device that is reserved for queued requests.
        """
        share = self.share_left
        if self.blocked:
            key = (self.model, 0, 0, self.blocked, False, 0, 0, False, False, False, False, 0)
        elif not share:
            key = (self.model, 0, 0, 0, True, 0, 0, False, False, False, False, 0)
        elif kept is not None and kept.amount >= share:
            key = (self.model, 0, 0, RESERVED, False, 0, 0, False, False, False, False, 0)
        else:
            free = max(0, self.memory_total - self.overhead - self.granted)
            if kept is not None:
                share, free = share - kept.amount, max(0, free - kept.memory)
            most = self.memory_total
            if self.reserved:
                most = self.memory_most // MEMORY_GRAIN_BYTES * MEMORY_GRAIN_BYTES
            key = (
                self.model,
                share,
                free,
                0,
                bool(self.holders),
                self.heat,
                self.load,
                self.throttled,
                self.warned,
                self.overhead > 0,
                self.in_use != "",
                most,
            )
        self.state = state = intern(key)
        return state

    def without_leases(self, kept: Reserved | None) -> DeviceState:
        """State that the device would have once all its leases have ended, less what is reserved for other requests."""
        share, free = WHOLE_SHARE, max(0, self.memory_most - self.foreign)
        if kept is not None:
            share, free = max(0, share - kept.amount), max(0, free - kept.memory)
        most, in_use = self.memory_most, self.in_use != ""
        return DeviceState((self.model, share, free, self.blocked, False, 0, 0, False, False, False, in_use, most))


def _bounds(level: int, base: float, step: float, levels: int) -> tuple[float, float]:
    """Bounds that a value must leave to change its level: its step, and a quarter more at both ends."""
    low = -math.inf if level == 0 else base + step * (level - _EDGE)
    high = math.inf if level == levels else base + step * (level + 1 + _EDGE)
    return low, high
