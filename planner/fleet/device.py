"""Live state of a device: its capabilities, the leases on it, and its samples.

A sample changes the device's state only if a value leaves its present step (`Steps`), so that samples at 1 Hz cost
little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from struct import Struct as Layout
from typing import Any, Final, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from ...schemas.metrics import METRICS
from ...schemas.telemetry import DeviceEvent, DeviceInfo, SampleBatch, Severity
from .bookings import Booking
from .occupancy import Listed, Occupancy
from .order import REREAD_NS, is_past
from .reservation import Reserved
from .state import (
    HEAT_BASE_CELSIUS,
    HEAT_LEVELS,
    HEAT_STEP_CELSIUS,
    LOAD_LEVELS,
    LOAD_STEP_PERCENT,
    MEMORY_GRAIN_BYTES,
    MIN_SHARE,
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
_UTILIZATION: Final = "gpu_utilization_percent"
_EDGE: Final = 0.25
_FATAL: Final = {Severity.RESET: 1, Severity.HARDWARE: 2}

_MAX_TEXT: Final = 256
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
        text = (event.message or event.kind)[:_MAX_TEXT]
        if event.severity is Severity.WARNING:
            at = event.time_ns * 1e-9
            if self.warned_at - REREAD_NS * 1e-9 <= at <= self.warned_at:
                return self
            return replace(self, warned_at=at, warning=text)
        if is_past(event.time_ns, self.time_ns):
            return self
        if event.severity is Severity.CLEARED:
            return replace(self, severity=None, message="", time_ns=event.time_ns)
        rank = _FATAL.get(event.severity, 0)
        if self.severity is not None and rank < _FATAL[self.severity]:
            return self
        return replace(self, severity=event.severity, message=text, time_ns=event.time_ns)


class Tick(Struct):
    """The last tick of a batch: one possible value per device in each column; None for a column that the batch lacks.

    Attributes:
        times_ns: times of the readings, by the host's clock.
        used: memory in use.
        reserved: memory of the driver.
        total: memory in all.
        utilization: in percent.
        utilization_peaks: maximum over all ticks of the batch; None for a batch of one tick.
        temperature: in degrees Celsius.
        power: in watts.
        throttle: reasons for low clocks, as bits.
    """

    times_ns: tuple[int, ...]
    used: tuple[int | None, ...] | None = None
    reserved: tuple[int | None, ...] | None = None
    total: tuple[int | None, ...] | None = None
    utilization: tuple[float | None, ...] | None = None
    utilization_peaks: tuple[float, ...] | None = None
    temperature: tuple[float | None, ...] | None = None
    power: tuple[float | None, ...] | None = None
    throttle: tuple[int | None, ...] | None = None


class _Column(NamedTuple):
    """A column of a batch that the fleet's state takes in, with the limits of its metric."""

    name: str
    attribute: str
    format: str
    width: int
    least: float
    most: float


def _column(name: str, attribute: str) -> _Column:
    metric = METRICS[name]
    least = -math.inf if metric.minimum is None else metric.minimum
    most = math.inf if metric.maximum is None else metric.maximum
    return _Column(name, attribute, *(("q", 8) if metric.integer else ("f", 4)), least, most)


_COLUMNS: Final = tuple(
    _column(name, attribute)
    for name, attribute in (
        ("memory_used_bytes", "used"),
        ("memory_reserved_bytes", "reserved"),
        ("memory_total_bytes", "total"),
        (_UTILIZATION, "utilization"),
        ("temperature_celsius", "temperature"),
        ("power_watts", "power"),
        ("throttle_reasons_bitmask", "throttle"),
    )
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
    for name, attribute, format, width, least, most in _COLUMNS:
        raw = columns.get(name)
        if raw is None or len(raw) != ticks * count * width:
            continue
        values: tuple[Any, ...] = _layout(count, format).unpack_from(raw, skip * width)
        # NaN is in no order, so that `min` and `max` may miss it, but it makes the sum NaN.
        if not (least <= min(values) and max(values) <= most and (total := sum(values)) == total):
            values = tuple(value if METRICS[name].possible(value) else None for value in values)
        missing = nulls.get(name)
        if missing is not None and len(missing) == ticks * count:
            values = tuple(None if null else value for value, null in zip(values, missing[skip:], strict=True))
        setattr(tick, attribute, values)
        if name == _UTILIZATION and ticks > 1:
            tick.utilization_peaks = _peaks(_layout(count * ticks, format).unpack(raw), count, missing)
    return tick


def _peaks(values: tuple[float, ...], count: int, missing: bytes | None) -> tuple[float, ...]:
    """Maximum of each device over all ticks; 0 where all values are null or impossible."""
    has_nulls = missing is not None and len(missing) == len(values) and any(missing)
    # NaN may be missed by `max`, but it makes the sum NaN.
    if has_nulls or not (min(values) >= 0.0 and max(values) <= 100.0 and (total := sum(values)) == total):
        possible = METRICS[_UTILIZATION].possible
        nulls = missing if has_nulls and missing is not None else bytes(len(values))
        values = tuple(0.0 if null or not possible(value) else value for value, null in zip(values, nulls, strict=True))
    return tuple([max(values[at::count]) for at in range(count)])


class Steps:
    """A live value as a whole number of steps, from 0 to a limit.

    A new value is compared with the bounds of the present step first, and takes another step only a quarter of one
    beyond them (hysteresis), so that a value at a bound does not flap.

    Args:
        base: lower bound of step 0.
        step: width of a step.
        limit: the greatest step; it has no upper bound, as step 0 has no lower one.

    Attributes:
        level: the present step.
        low: the least value that stays in it.
        high: values from here on leave it.
    """

    __slots__ = ("_base", "_limit", "_step", "high", "level", "low")

    def __init__(self, base: float, step: float, limit: int) -> None:
        self._base, self._step, self._limit = base, step, limit
        self._enter(0)

    def move(self, value: float) -> None:
        """Take the step of a value."""
        self._enter(max(0, min(math.floor((value - self._base) / self._step), self._limit)))

    def _enter(self, level: int) -> None:
        self.level = level
        self.low = -math.inf if level == 0 else self._base + self._step * (level - _EDGE)
        self.high = math.inf if level == self._limit else self._base + self._step * (level + 1 + _EDGE)


class Device:
    """Live state of a device."""

    __slots__ = (
        "_overhead_high",
        "_overhead_low",
        "blocked",
        "booked_for",
        "booked_from",
        "bookings",
        "fault",
        "heat",
        "holders",
        "host",
        "in_use",
        "index",
        "info",
        "load",
        "load_percent",
        "load_seen_at",
        "memory_total",
        "memory_used",
        "model",
        "occupancy",
        "overhead",
        "parent",
        "peak_percent",
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
        self.load_seen_at = -math.inf
        """As `seen_at`, of the last sample with a utilization."""
        self.peak_percent = 0.0
        """Maximum of the utilization since the reader of this field last set it to 0."""
        self.temperature: float | None = None
        self.power: float | None = None
        self.throttled = False
        self.warned = False
        self.fault: Fault | None = None
        self.blocked = 0
        self.bookings: tuple[Booking, ...] = ()
        """Times for which it is booked, now and later."""
        self.booked_for = ""
        """Id of the window that has it now; empty for none."""
        self.booked_from = math.inf
        """Time by which leases on it must have ended, since it is booked; minus infinity while `booked_for` is set."""
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
        self.heat = Steps(HEAT_BASE_CELSIUS - HEAT_STEP_CELSIUS, HEAT_STEP_CELSIUS, HEAT_LEVELS)
        self.load = Steps(0.0, LOAD_STEP_PERCENT, LOAD_LEVELS)
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
        return left if left >= MIN_SHARE else 0

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
        self.update_in_use()

    def end(self, lease: str, holders: Amounts, beside: dict[str, int] | None, at: float, doubt: str) -> None:
        """Note the end of a lease on it; see `Occupancy.end`."""
        self.occupancy.end(lease, self._cover(holders, beside), at, doubt)
        self._round()
        self.update_in_use()

    def add(self, lease: str, share: int, memory: int, since: float) -> None:
        """Note one more lease, which `holders` has already: as `hold`, at a cost that does not grow with their number.

        Args:
            lease: its id.
            share: of the device, in billionths.
            memory: bytes.
            since: time when it was granted, seconds since the epoch.
        """
        self.shares += share
        self.occupancy.add(lease, memory, since)
        self._round()
        self.update_in_use()

    def remove(self, lease: str, share: int, at: float, doubt: str) -> None:
        """Note the end of a lease that `holders` no longer has: as `end`, whatever the number of the others."""
        self.shares -= share
        self.occupancy.remove(lease, at, doubt)
        self._round()
        self.update_in_use()

    def _cover(self, holders: Amounts, beside: dict[str, int] | None) -> dict[str, int]:
        self.holders = holders
        self.shares = sum(share for share, _ in holders.values())
        covering = {lease: memory for lease, (_, memory) in holders.items()}
        for lease, memory in (beside or {}).items():
            covering[lease] = covering.get(lease, 0) + memory
        return covering

    def update_in_use(self) -> bool:
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
        # The first sample counts in full.
        elapsed_seconds = math.inf if self.time_ns < 0 else max(0.0, (time_ns - self.time_ns) * 1e-9)
        self.time_ns = time_ns
        seen = time_ns * 1e-9 + lag
        self.seen_at = seen if seen < now else now
        sized = self._sample_size(tick, at)
        dirty = self._sample_load(tick, at, elapsed_seconds)
        dirty = self._sample_use(tick, at, known, sized) or dirty
        dirty = self._sample_heat(tick, at) or dirty
        if tick.throttle is not None:
            reasons = tick.throttle[at]
            throttled = reasons is not None and reasons & THROTTLE_BITS != 0
            if throttled is not self.throttled:
                self.throttled, dirty = throttled, True
        if tick.power is not None:
            self.power = tick.power[at]
        return dirty, sized

    def _sample_size(self, tick: Tick, at: int) -> bool:
        """Take in the size of the memory and of the driver's part of it; returns true if it has changed."""
        sized = False
        if tick.total is not None and not self.info.memory_bytes:
            total = tick.total[at]
            if total and total != self.memory_total:
                self.memory_total, sized = total, True
                self._resize()
        if tick.reserved is not None:
            reserved = tick.reserved[at] or 0
            if reserved != self.reserved:
                self.reserved, sized = reserved, True
        return sized

    def _sample_load(self, tick: Tick, at: int, elapsed_seconds: float) -> bool:
        """Take in the utilization, and average it; returns true if the load has another step."""
        if tick.utilization is None:
            return False
        self.utilization = value = tick.utilization[at]
        peaks = tick.utilization_peaks
        if peaks is not None and peaks[at] > self.peak_percent:
            self.peak_percent = peaks[at]
        if value is None:
            return False
        self.load_seen_at = self.seen_at
        if value > self.peak_percent:
            self.peak_percent = value
        weight = 1.0 if elapsed_seconds == math.inf else elapsed_seconds / (elapsed_seconds + LOAD_SECONDS)
        self.load_percent = load = self.load_percent + (value - self.load_percent) * weight
        steps = self.load
        if steps.low <= load < steps.high:
            return False
        steps.move(load)
        return True

    def _sample_use(self, tick: Tick, at: int, known: bool, sized: bool) -> bool:
        """Take in the memory in use, and who uses it; returns true if the device's state changes."""
        used = utilization = None
        if tick.used is not None:
            self.memory_used = used = tick.used[at]
        if tick.utilization is not None:
            utilization = self.utilization
        if self.occupancy.sample(used, utilization, self.seen_at, known):
            rounded = self._round()
            return self.update_in_use() or rounded
        if sized:
            self._round()
        return False

    def _sample_heat(self, tick: Tick, at: int) -> bool:
        """Take in the temperature; returns true if it has another step."""
        if tick.temperature is None:
            return False
        self.temperature = value = tick.temperature[at]
        steps = self.heat
        if value is None or steps.low <= value < steps.high:
            return False
        steps.move(value)
        return True

    def processes(self, found: Iterable[Listed], read_at: float, readable: bool) -> bool:
        """Take in a list of processes, as `Occupancy.processes`; returns true if the device's state changes."""
        self.occupancy.processes(found, read_at, readable)
        rounded = self._round()
        return self.update_in_use() or rounded

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
            key = StateKey(self.model, blocked=self.blocked)
        elif not share:
            key = StateKey(self.model, leased=True)
        elif kept is not None and kept.amount >= share:
            key = StateKey(self.model, blocked=RESERVED)
        else:
            free = max(0, self.memory_total - self.overhead - self.granted)
            if kept is not None:
                share, free = share - kept.amount, max(0, free - kept.memory)
            most = self.memory_total
            if self.reserved:
                most = self.memory_most // MEMORY_GRAIN_BYTES * MEMORY_GRAIN_BYTES
            key = StateKey(
                model=self.model,
                share=share,
                memory_free=free,
                leased=bool(self.holders),
                heat=self.heat.level,
                load=self.load.level,
                throttled=self.throttled,
                warned=self.warned,
                rounded=self.overhead > 0,
                in_use=self.in_use != "",
                memory_most=most,
                booked_for=self.booked_for,
                booked_from=self.booked_from,
            )
        self.state = state = intern(key)
        return state

    def without(self, leases: AbstractSet[str]) -> DeviceState:
        """State that the device would have, by exact amounts, without some of its leases."""
        held = [amounts for lease, amounts in self.holders.items() if lease not in leases]
        share = WHOLE_SHARE - sum(amounts[0] for amounts in held)
        return DeviceState(
            StateKey(
                model=self.model,
                share=share if share >= MIN_SHARE else 0,
                memory_free=max(0, self.memory_most - self.foreign - sum(amounts[1] for amounts in held)),
                blocked=self.blocked,
                leased=bool(held),
                in_use=self.in_use != "",
                memory_most=self.memory_most,
                booked_for=self.booked_for,
                booked_from=self.booked_from,
            )
        )

    def without_leases(self, kept: Reserved | None) -> DeviceState:
        """State that the device would have once all its leases have ended, less what is reserved for other requests."""
        share, free = WHOLE_SHARE, max(0, self.memory_most - self.foreign)
        if kept is not None:
            share, free = max(0, share - kept.amount), max(0, free - kept.memory)
        return DeviceState(
            StateKey(
                model=self.model,
                share=share,
                memory_free=free,
                blocked=self.blocked,
                in_use=self.in_use != "",
                memory_most=self.memory_most,
            )
        )
