"""Expected starts of the waiting requests, with an interval: virtual runs of the line over drawn durations.

Each run draws what the running leases have left, and how long the waiting requests take, from their estimates; then
requests start in order as devices come free, on hosts with so many free devices of an allowed model (best fit). Those
behind one that does not fit start only where its expected start is not delayed, as in `backfill.py`. Cores, RAM and
shares of devices are left out, and so are requests to come: what they change is learned from past forecasts.

`Calibration` compares past forecasts with what came of them, and corrects the center and the width of the interval by
the quantiles of the ratio of actual to expected wait (split conformal prediction [1]).

[1] V. Vovk, A. Gammerman, G. Shafer: Algorithmic Learning in a Random World (2005), chapter 4.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from heapq import heapify, heappop, heappush
from typing import Final, NamedTuple

from ...schemas.requests import Placement
from ..fleet.bookings import Booking
from ..fleet.state import WHOLE_SHARE, Ask
from ..placement.capacity import allowed
from ..placement.feasible import model_allowed
from .backfill import Stay, stay_of
from .ends import Running
from .line import Entry, Line

DRAWS: Final = 15
"""Number of virtual runs."""
LOW: Final = 0.1
HIGH: Final = 0.9
"""Quantiles of the interval, which holds 80 %."""
SLICE: Final = 64
"""Starts between two yields of a forecast."""
BOOKINGS_FORECAST: Final = 32
"""Number of the times for which a device is booked that a forecast counts, the soonest first."""
MOST_PAST: Final = 500
LEAST_PAST: Final = 20
"""Number of past forecasts from which on they correct new ones."""


class Forecast(NamedTuple):
    """Expected start of a waiting request, in seconds of the line's clock.

    Attributes:
        low: 10 % start before.
        expected: median.
        high: 90 % start before. Infinite if it could not start in a tenth of the runs.
    """

    low: float
    expected: float
    high: float


class _Kind(NamedTuple):
    """Needs of a request as a virtual run has them.

    Attributes:
        hosts: that it may use.
        devices: on each host; in all, if it may use any number of them. A share is a part.
        several: number of hosts; 0 for as many as it takes.
        shut: (host, from, to, devices): so many free devices of a host are booked, and not for it, from one time to
            another.
        inside: (host, from, to): devices of a host are booked for it, and what it has there ends with that.
    """

    hosts: frozenset[int]
    devices: float
    several: int
    shut: tuple[tuple[int, float, float, int], ...] = ()
    inside: tuple[tuple[int, float, float], ...] = ()


class _State:
    """State from which all runs of a forecast start."""

    def __init__(self, line: Line, now: float) -> None:
        fleet = line.fleet
        self.now = now
        self.names = [name for name, host in fleet.hosts.items() if host.devices and not host.state.blocked]
        self.place = {name: at for at, name in enumerate(self.names)}
        self.models = [fleet.hosts[name].devices[0].model for name in self.names]
        self.free = [
            sum(device.share_left / WHOLE_SHARE for device in fleet.hosts[name].devices if not device.blocked)
            for name in self.names
        ]
        self.size = [sum(not device.blocked for device in fleet.hosts[name].devices) for name in self.names]
        self.running = list(self._running(line))
        kinds: dict[tuple[Ask, Stay], _Kind] = {}
        self.waiting: list[tuple[Entry, _Kind]] = []
        for entry in line:
            stay = stay_of(fleet, entry.request)
            kind = kinds.get((entry.ask, stay))
            if kind is None:
                kind = kinds[entry.ask, stay] = self._kind(line, entry.ask, stay)
            self.waiting.append((entry, kind))
        self.openings = sorted({to for kind in kinds.values() for _, _, to, _ in kind.shut if to > now})

    def _running(self, line: Line) -> Iterable[tuple[str, dict[int, float]]]:
        """Leases with the devices that come free with them, by host."""
        fleet = line.fleet
        for lease, held in fleet.leases.items():
            devices: dict[int, float] = {}
            for uuid, (share, _) in held.devices.items():
                device = fleet.devices.get(uuid)
                if device is not None and device.host in self.place and not device.blocked:
                    at = self.place[device.host]
                    devices[at] = devices.get(at, 0.0) + share / WHOLE_SHARE
            if devices and lease in line.ends.running:
                yield lease, devices

    def _kind(self, line: Line, ask: Ask, stay: Stay) -> _Kind:
        inside = {host.name for host in allowed(line.fleet, ask)} if ask.filtered else None
        spread = ask.placement is Placement.SPREAD
        part = ask.part(1) if spread else ask
        several = ask.placement is Placement.FEWEST_HOSTS
        hosts = frozenset(
            at
            for at, name in enumerate(self.names)
            if (inside is None or name in inside)
            and model_allowed(self.models[at], ask)
            and (several or self.size[at] >= part.gpus)
        )
        several_hosts = 0 if several else ask.gpus if spread else 1
        found = _Kind(hosts, part.gpus * part.share / WHOLE_SHARE, several_hosts)
        if not line.fleet.bookings:
            return found
        return found._replace(shut=self._shut(line, hosts, stay), inside=self._inside(line, hosts, stay))

    def _inside(self, line: Line, hosts: frozenset[int], stay: Stay) -> tuple[tuple[int, float, float], ...]:
        """Times for which devices of hosts are booked for a request; see `_Kind.inside`."""
        found = {
            (at, booking.starts_at, booking.ends_at)
            for at in (hosts if stay.windows else ())
            for device in line.fleet.hosts[self.names[at]].devices
            for booking in device.bookings[:BOOKINGS_FORECAST]
            if booking.window in stay.windows
        }
        return tuple(sorted(found))

    def _shut(self, line: Line, hosts: frozenset[int], stay: Stay) -> tuple[tuple[int, float, float, int], ...]:
        """Times at which free devices of hosts are booked for others; see `_Kind.shut`."""
        found: dict[tuple[int, float, float], int] = {}
        for at in hosts:
            for device in line.fleet.hosts[self.names[at]].devices:
                if not device.bookings or device.blocked:
                    continue
                free_at = max((line.ends.ends_at(lease) for lease in device.holders), default=-math.inf)
                for begin, end in shut_times(device.bookings[:BOOKINGS_FORECAST], stay):
                    key = (at, max(begin, free_at), end)
                    found[key] = found.get(key, 0) + 1
        return tuple(sorted((*key, count) for key, count in found.items()))


def _end(running: Running, now: float, level: float) -> float:
    """End of a lease at a level of its estimate, and no later than its deadline unless that has passed."""
    end = now + running.estimate.remaining(now - running.started_at, level)
    return min(end, running.deadline) if running.deadline > now else end


def forecasts(line: Line, now: float, draws: int = DRAWS, seed: int = 0) -> Generator[None, None, dict[int, Forecast]]:
    """Compute the expected start of each waiting request, by its number of arrival, a slice at a time.

    It yields now and then, so that the caller may do other things; it works on the state of its first step. Its value
    is what it returns (`yield from`), or see `forecast`.

    Args:
        line: the waiting requests, on a fleet.
        now: time, in seconds.
        draws: number of virtual runs.
        seed: of the draws.
    """
    state = _State(line, now)
    starts: dict[int, list[float]] = {entry.number: [] for entry, _ in state.waiting}
    lasts = {lease: line.ends.running[lease] for lease, _ in state.running}
    for number in range(draws):
        draw = random.Random(f"{seed}/{number}")
        # Stratified: the draws of one request cover its distribution.
        ends = [(_end(lasts[lease], now, _level(draw)), devices) for lease, devices in state.running]
        lengths = [entry.estimate.quantile(_level(draw)) for entry, _ in state.waiting]
        yield from _run(state, ends, lengths, starts)
    return {number: _summary(found) for number, found in starts.items()}


def forecast(line: Line, now: float, draws: int = DRAWS, seed: int = 0) -> dict[int, Forecast]:
    """Compute the expected start of each waiting request at once, by its number of arrival."""
    work = forecasts(line, now, draws, seed)
    while True:
        try:
            next(work)
        except StopIteration as done:
            return done.value


def shut_times(bookings: Sequence[Booking], stay: Stay) -> list[tuple[float, float]]:
    """Times at which no lease of a request could begin on a device, without overlaps, soonest first."""
    found: list[tuple[float, float]] = []
    last = -math.inf
    for booking in bookings:
        begin = max(booking.closes_at - stay.lasts, last)
        end = booking.starts_at if booking.window in stay.windows else booking.ends_at
        if begin < end:
            found.append((begin, end))
        last = max(last, booking.ends_at)
    return found


def _level(draw: random.Random) -> float:
    return min(0.99, max(0.01, draw.random()))


def _summary(starts: Sequence[float]) -> Forecast:
    ordered = sorted(starts)
    last = len(ordered) - 1
    return Forecast(ordered[round(LOW * last)], ordered[last // 2], ordered[round(HIGH * last)])


def _run(
    state: _State,
    ends: Sequence[tuple[float, dict[int, float]]],
    lengths: Sequence[float],
    starts: dict[int, list[float]],
) -> Generator[None]:
    """One virtual run; adds the start of each request, infinite if it never can."""
    free = list(state.free)
    openings: list[tuple[float, dict[int, float]]] = [(at, {}) for at in state.openings]
    heap = [(at, number, devices) for number, (at, devices) in enumerate([*ends, *openings])]
    heapify(heap)
    # Requests of one kind wait in one row: where its first does not fit, no other does.
    rows: dict[_Kind, deque[int]] = {}
    for at, (_, kind) in enumerate(state.waiting):
        rows.setdefault(kind, deque()).append(at)
    now, fresh = state.now, len(heap)
    head, head_starts = -1, math.inf
    while rows:
        first = True
        for _, kind in sorted((row[0], kind) for kind, row in rows.items()):
            row = rows[kind]
            while row and (taken := _fit(kind, free, now)) is not None:
                at = row[0]
                entry = state.waiting[at][0]
                most = _ends_with(kind, taken, now)
                if not first and min(now + entry.estimate.seconds, most) > head_starts:
                    break
                for host, devices in taken.items():
                    free[host] -= devices
                heappush(heap, (min(now + lengths[at], most), fresh, taken))
                fresh += 1
                starts[entry.number].append(now)
                row.popleft()
                if not fresh % SLICE:
                    yield
            if row and first:
                first = False
                if head != row[0]:
                    head, head_starts = row[0], _shadow(kind, free, heap)
        rows = {kind: row for kind, row in rows.items() if row}
        if not heap:
            break
        now = heap[0][0]
        while heap and heap[0][0] <= now:
            for host, devices in heappop(heap)[2].items():
                free[host] += devices
    for row in rows.values():
        for at in row:
            starts[state.waiting[at][0].number].append(math.inf)


def _ends_with(kind: _Kind, taken: dict[int, float], now: float) -> float:
    """End of the booked window that a request has devices in; infinite if it has none."""
    return min((end for host, begin, end in kind.inside if begin <= now < end and host in taken), default=math.inf)


def _fit(kind: _Kind, free: Sequence[float], now: float) -> dict[int, float] | None:
    """Devices by host for a request, best fit; None if it does not fit."""
    if not kind.devices:
        return {}
    if kind.shut:
        free = list(free)
        for host, begin, end, devices in kind.shut:
            if begin <= now < end:
                free[host] = max(0.0, free[host] - devices)
    if kind.several == 1:
        best = min((host for host in kind.hosts if free[host] >= kind.devices), key=lambda h: free[h], default=None)
        return None if best is None else {best: kind.devices}
    if kind.several:
        able = [host for host in kind.hosts if free[host] >= kind.devices]
        able.sort(key=lambda host: free[host])
        return dict.fromkeys(able[: kind.several], kind.devices) if len(able) >= kind.several else None
    found: dict[int, float] = {}
    left = kind.devices
    for host in sorted((host for host in kind.hosts if free[host]), key=lambda host: -free[host]):
        found[host] = min(left, free[host])
        left -= found[host]
        if not left:
            return found
    return None


def _shadow(kind: _Kind, free: Sequence[float], heap: Sequence[tuple[float, int, dict[int, float]]]) -> float:
    """Time from which a request fits if only what runs now ends; infinite if never."""
    room, left = list(free), list(heap)
    while left:
        at, _, devices = heappop(left)
        for host, count in devices.items():
            room[host] += count
        if (not devices or any(host in kind.hosts for host in devices)) and _fit(kind, room, at) is not None:
            return at
    return math.inf


class Calibration:
    """Correction of forecasts by what came of past ones."""

    def __init__(self) -> None:
        self._past: deque[tuple[float, float, float]] = deque(maxlen=MOST_PAST)

    def started(self, asked_at: float, forecast: Forecast, started_at: float) -> None:
        """Note when a request started, and what was forecast at a time."""
        expected = forecast.expected - asked_at
        if 0 < expected < math.inf:
            actual = max(1.0, started_at - asked_at)
            self._past.append((actual / expected, expected, actual))

    def corrected(self, asked_at: float, forecast: Forecast) -> Forecast:
        """Forecast with the center and width of the interval that past ones had needed."""
        expected = forecast.expected - asked_at
        if len(self._past) < LEAST_PAST or not 0 < expected < math.inf:
            return forecast
        ratios = sorted(ratio for ratio, _, _ in self._past)
        last = len(ratios) - 1
        # Of n past ones, ranks of (n + 1): the interval holds what comes with the probability that it says.
        low = ratios[max(0, math.floor(LOW * (last + 2)) - 1)]
        high = ratios[min(last, math.ceil(HIGH * (last + 2)) - 1)]
        return Forecast(asked_at + low * expected, asked_at + ratios[last // 2] * expected, asked_at + high * expected)
