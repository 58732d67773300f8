"""Expected starts of the waiting requests, with an interval: virtual runs of the line over drawn durations.

Each run draws what the running leases have left, and how long the waiting requests take, from their estimates; then
requests start in order as devices come free, on hosts with so many free devices of an allowed model (best fit). Those
behind one that does not fit start beside its reservation, or if they end before it, as in `backfill.py`. Requests like
the most recent ones arrive meanwhile, at the same rate. Cores and RAM are left out: what they change is learned from
past forecasts.

`Calibration` compares past forecasts with what came of them, and corrects the center and the width of the interval
(conformal prediction [1] with levels that adapt [2]).

[1] V. Vovk, A. Gammerman, G. Shafer: Algorithmic Learning in a Random World (2005), chapter 4.
[2] I. Gibbs, E. Candès: Adaptive Conformal Inference Under Distribution Shift. NeurIPS 2021.
"""

from __future__ import annotations

import math
import random
import statistics
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush, nsmallest
from typing import Final, NamedTuple

from ...schemas.requests import Placement
from ..fleet.bookings import Booking
from ..fleet.device import Device
from ..fleet.state import WHOLE_SHARE, Ask
from ..placement.capacity import allowed
from ..placement.domains import values_of
from ..placement.feasible import model_allowed
from .backfill import Stay, stay_of
from .durations import Estimate
from .ends import Running
from .free_devices import LEAST_FREE, NO_LIMITS, FreeDevices, in_order
from .line import Entry, Line, Order
from .order import LEAST_SECONDS, TIMELESS, Asked, Rule

DRAWS: Final = 15
"""Number of virtual runs."""
LOW: Final = 0.1
HIGH: Final = 0.9
"""Quantiles of the interval, which holds 80 %."""
SLICE: Final = 4096
"""Hosts that are looked at between two yields of a forecast: about a millisecond."""
BOOKINGS_FORECAST: Final = 32
"""Number of the times for which a device is booked that a forecast counts, the soonest first."""
MOST_BRIEF: Final = 64
"""Requests of one kind among which one is looked for that is brief enough to pass a reservation."""
MOST_ARRIVALS: Final = 256
"""Number of recent arrivals that stand for those to come."""
LEAST_ARRIVALS: Final = 32
MOST_NEWCOMERS: Final = 128
"""Arrivals in a virtual run, and one more for each that waits: later ones change little."""
LAST_NUMBER: Final = 2**62
"""Numbers of arrival in a virtual run begin here."""
MOST_PAST: Final = 500
NEAR_PAST: Final = 100
"""Number of past forecasts of about the same wait that correct the center."""
WORTHWHILE: Final = 0.8
"""The center moves if that leaves at most this part of the median error."""
LEAST_WAIT_SECONDS: Final = 1.0
LEAST_WIDTH: Final = 0.05
MOST_WIDTH: Final = 3.0
"""Bounds on the width of an interval on one side, as the logarithm of a ratio, by which scores are scaled."""
ADAPTATION: Final = 0.02
"""Change of a level with each start: within some 50 starts it follows a change of how good forecasts are."""
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
        domains: the hosts by domain, if it must stay within one; empty if not.
    """

    hosts: frozenset[int]
    devices: float
    several: int
    shut: tuple[tuple[int, float, float, int], ...] = ()
    inside: tuple[tuple[int, float, float], ...] = ()
    domains: tuple[frozenset[int], ...] = ()


class _State:
    """State from which all runs of a forecast start."""

    def __init__(self, line: Line, now: float, recent: Sequence[Arrival] = ()) -> None:
        fleet = line.fleet
        self.now = now
        self.names = [name for name, host in fleet.hosts.items() if host.devices and not host.state.blocked]
        self.place = {name: at for at, name in enumerate(self.names)}
        self.models = [fleet.hosts[name].devices[0].model for name in self.names]
        self.free = [
            sum(device.share_left / WHOLE_SHARE for device in fleet.hosts[name].devices if _may_come_free(device))
            for name in self.names
        ]
        self.size = [sum(map(_may_come_free, fleet.hosts[name].devices)) for name in self.names]
        self.running = list(self._running(line))
        kinds: dict[tuple[Ask, Stay], _Kind] = {}

        def kind_of(ask: Ask, stay: Stay) -> _Kind:
            found = kinds.get((ask, stay))
            if found is None:
                found = kinds[ask, stay] = self._kind(line, ask, stay)
            return found

        self.waiting: list[tuple[Entry, _Kind]] = [
            (entry, kind_of(entry.ask, stay_of(fleet, entry.request))) for entry in line
        ]
        self.recent = [(arrival, kind_of(arrival.ask, arrival.stay)) for arrival in recent]
        self.openings = sorted({to for kind in kinds.values() for _, _, to, _ in kind.shut if to > now})

    def _running(self, line: Line) -> Iterable[tuple[str, dict[int, float]]]:
        """Leases with the devices that come free with them, by host."""
        fleet = line.fleet
        for lease, held in fleet.leases.items():
            devices: dict[int, float] = {}
            for uuid, (share, _) in held.devices.items():
                device = fleet.devices.get(uuid)
                if device is not None and device.host in self.place and _may_come_free(device):
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
        found = _Kind(
            hosts, part.gpus * part.share / WHOLE_SHARE, several_hosts, domains=self._domains(line, hosts, ask)
        )
        if not line.fleet.bookings:
            return found
        return found._replace(shut=self._shut(line, hosts, stay), inside=self._inside(line, hosts, stay))

    def _domains(self, line: Line, hosts: frozenset[int], ask: Ask) -> tuple[frozenset[int], ...]:
        if not ask.within:
            return ()
        found: dict[tuple[str, ...], set[int]] = {}
        for at in hosts:
            found.setdefault(values_of(line.fleet.hosts[self.names[at]], ask), set()).add(at)
        return tuple(frozenset(found[values]) for values in sorted(found))

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


def _may_come_free(device: Device) -> bool:
    """True if a device is free, or is when its leases end: nobody knows when somebody without a lease goes."""
    return not device.blocked and not device.in_use


def _end(running: Running, now: float, level: float) -> float:
    """End of a lease at a level of its estimate, and no later than its deadline unless that has passed."""
    end = now + running.estimate.remaining(now - running.started_at, level)
    return min(end, running.deadline) if running.deadline > now else end


class Arrival(NamedTuple):
    """A request that arrived, whether it had to wait or not.

    Attributes:
        at: seconds.
        ask: what it asks for.
        priority: of the request.
        gpus: devices that it asks for; see `Entry.gpus`.
        estimate: of its duration.
        stay: how long it may stay where devices are booked.
    """

    at: float
    ask: Ask
    priority: int
    gpus: float
    estimate: Estimate
    stay: Stay


class Arrivals:
    """The most recent arrivals: requests like them are expected to come at the same rate."""

    def __init__(self) -> None:
        self._recent: deque[Arrival] = deque(maxlen=MOST_ARRIVALS)

    def add(self, arrival: Arrival) -> None:
        """Note an arrival."""
        self._recent.append(arrival)

    def snapshot(self) -> list[Arrival]:
        """The arrivals, oldest first; none while there are too few to tell the rate."""
        return list(self._recent) if len(self._recent) >= LEAST_ARRIVALS else []


class _Waiting(NamedTuple):
    """A request that waits in a virtual run.

    Attributes:
        order: its place; the smaller is ahead.
        kind: its needs.
        expected: expected duration, by which it may pass others.
        length: duration in this run.
        number: of its arrival; None for one that arrives within the run.
    """

    order: Order
    kind: _Kind
    expected: float
    length: float
    number: int | None


def forecasts(
    line: Line, now: float, draws: int = DRAWS, seed: int = 0, arrivals: Arrivals | None = None
) -> Generator[None, None, dict[int, Forecast]]:
    """Compute the expected start of each waiting request, by its number of arrival, a slice at a time.

    It yields now and then, so that the caller may do other things; it works on the state of its first step. Its value
    is what it returns (`yield from`), or see `forecast`.

    Args:
        line: the waiting requests, on a fleet.
        now: time, in seconds.
        draws: number of virtual runs.
        seed: of the draws.
        arrivals: recent ones, if more like them are to be expected.
    """
    recent = [] if arrivals is None or line.rule in TIMELESS else arrivals.snapshot()
    state = _State(line, now, recent)
    starts: dict[int, list[float]] = {entry.number: [] for entry, _ in state.waiting}
    lasts = {lease: line.ends.running[lease] for lease, _ in state.running}
    expected = [entry.estimate.seconds for entry, _ in state.waiting]
    for number in range(draws):
        draw = random.Random(f"{seed}/{number}")
        ends = [(_end(lasts[lease], now, _level(draw)), devices) for lease, devices in state.running]
        waiting = [
            _Waiting(entry.order, kind, seconds, entry.estimate.quantile(_level(draw)), entry.number)
            for (entry, kind), seconds in zip(state.waiting, expected, strict=True)
        ]
        yield from _run(state, ends, waiting, _newcomers(state, line.rule, draw), starts)
    return {number: _summary(found) for number, found in starts.items()}


def _newcomers(state: _State, rule: Rule, draw: random.Random) -> Iterator[tuple[float, _Waiting]]:
    """Requests that arrive within a run, with the times of their arrival: a random choice of recent ones."""
    recent, now = state.recent, state.now
    if not recent:
        return
    mean_gap = max(1e-3, (now - recent[0][0].at) / len(recent))
    at = now
    for number in range(MOST_NEWCOMERS + len(state.waiting)):
        at += draw.expovariate(1 / mean_gap)
        arrival, kind = draw.choice(recent)
        seconds = max(LEAST_SECONDS, arrival.estimate.seconds)
        key = float(rule(Asked(at, 0.0, arrival.gpus, seconds, 0.0)))
        length = arrival.estimate.quantile(_level(draw))
        yield at, _Waiting((-arrival.priority, 1, key, LAST_NUMBER + number), kind, seconds, length, None)


def forecast(
    line: Line, now: float, draws: int = DRAWS, seed: int = 0, arrivals: Arrivals | None = None
) -> dict[int, Forecast]:
    """Compute the expected start of each waiting request at once, by its number of arrival."""
    work = forecasts(line, now, draws, seed, arrivals)
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
    waiting: Sequence[_Waiting],
    newcomers: Iterator[tuple[float, _Waiting]],
    starts: dict[int, list[float]],
) -> Generator[None]:
    """One virtual run; adds the start of each request, infinite if it never can."""
    room = FreeDevices({host: count for host, count in enumerate(state.free) if count > LEAST_FREE})
    openings: list[tuple[float, dict[int, float]]] = [(at, {}) for at in state.openings]
    heap = [(at, number, devices) for number, (at, devices) in enumerate([*ends, *openings])]
    heapify(heap)
    # Requests of one kind wait in one row: where its first does not fit, only a briefer one may.
    rows: dict[_Kind, list[_Waiting]] = {}
    for one in waiting:
        rows.setdefault(one.kind, []).append(one)
    now, fresh, left = state.now, len(heap), len(waiting)
    head: _Waiting | None = None
    kept = _Kept(math.inf, {})
    coming = next(newcomers, None)
    while left:
        first = True
        for _, kind in sorted((row[0].order, kind) for kind, row in rows.items()):
            row = rows[kind]
            while row:
                if room.looked > SLICE:
                    room.looked = 0
                    yield
                at, taken, passes = _next_of(row, room, kept, now, first)
                if taken is None:
                    break
                for host, devices in taken.items():
                    room.add(host, -devices)
                    if not passes and host in kept.beyond:
                        kept.beyond[host] -= devices
                one = row.pop(at)
                heappush(heap, (min(now + one.length, _ends_with(kind, taken, now)), fresh, taken))
                fresh += 1
                if one.number is not None:
                    starts[one.number].append(now)
                    left -= 1
            if row and first:
                first = False
                if head is not row[0]:
                    head, kept = row[0], _reserve(kind, room, heap)
        rows = {kind: row for kind, row in rows.items() if row}
        if coming is not None and (not heap or coming[0] < heap[0][0]):
            now = coming[0]
            insort(rows.setdefault(coming[1].kind, []), coming[1])
            coming = next(newcomers, None)
            continue
        if not heap:
            break
        now = heap[0][0]
        while heap and heap[0][0] <= now:
            for host, devices in heappop(heap)[2].items():
                room.add(host, devices)
    for row in rows.values():
        for one in row:
            if one.number is not None:
                starts[one.number].append(math.inf)


def _next_of(
    row: Sequence[_Waiting], room: FreeDevices, kept: _Kept, now: float, first: bool
) -> tuple[int, dict[int, float] | None, bool]:
    """Next start of a row, if any: its place, its devices by host, and whether it may use what is reserved.

    Args:
        row: requests of one kind.
        room: free devices by host.
        kept: reservation of the first that does not fit.
        now: time in the run.
        first: true if nobody ahead waits.
    """
    kind = row[0].kind
    if first or now + row[0].expected <= kept.starts:
        return 0, _fit(kind, room, now), True
    taken = _fit(kind, room, now, kept.beyond)
    if taken is not None:
        return 0, taken, False
    brief = next((at for at in range(1, min(len(row), MOST_BRIEF)) if now + row[at].expected <= kept.starts), None)
    return (0, None, False) if brief is None else (brief, _fit(kind, room, now), True)


def _ends_with(kind: _Kind, taken: dict[int, float], now: float) -> float:
    """End of the booked window that a request has devices in; infinite if it has none."""
    return min((end for host, begin, end in kind.inside if begin <= now < end and host in taken), default=math.inf)


def _fit(kind: _Kind, room: FreeDevices, now: float, most: Mapping[int, float] = NO_LIMITS) -> dict[int, float] | None:
    """Devices by host for a request, best fit; None if it does not fit.

    Args:
        kind: its needs.
        room: free devices by host.
        now: time, by which devices are booked or not.
        most: devices that it may use at most, by host; any number on other hosts.
    """
    if not kind.devices:
        return {}
    if kind.shut or kind.domains:
        free = room.within(most)
        for host, begin, end, devices in kind.shut:
            if begin <= now < end and host in free:
                free[host] = max(0.0, free[host] - devices)
        return _fit_within(kind, free) if kind.domains else _fit(kind._replace(shut=()), FreeDevices(free), now)
    if kind.several == 1:
        best = room.tightest(kind.devices, kind.hosts, most)
        return None if best is None else {best: kind.devices}
    if kind.several:
        hosts = room.tightest_hosts(kind.several, kind.devices, kind.hosts, most)
        return None if hosts is None else dict.fromkeys(hosts, kind.devices)
    return room.fewest(kind.devices, kind.hosts, most)


def _fit_within(kind: _Kind, free: Mapping[int, float]) -> dict[int, float] | None:
    """Devices by host in one domain: that which needs the fewest hosts, of equal ones that with the least left."""
    best: dict[int, float] | None = None
    least = (0, 0.0)
    for domain in kind.domains:
        inside = {host: free[host] for host in domain if host in free}
        found = _fit(kind._replace(hosts=domain, shut=(), domains=()), FreeDevices(inside), 0.0)
        if found is not None and (best is None or (len(found), sum(inside.values())) < least):
            best, least = found, (len(found), sum(inside.values()))
    return best


class _Kept(NamedTuple):
    """Reservation of the first request that does not fit.

    Attributes:
        starts: its expected start.
        beyond: devices that others may use for longer, by reserved host.
    """

    starts: float
    beyond: dict[int, float]


def _reserve(kind: _Kind, room: FreeDevices, heap: Sequence[tuple[float, int, dict[int, float]]]) -> _Kept:
    """Reserve where a request fits first if only what runs now ends."""
    later = FreeDevices(room.free)
    found = _Kept(math.inf, {})
    for at, _, devices in in_order(heap):
        for host, count in devices.items():
            later.add(host, count)
        reached = not devices or any(host in kind.hosts for host in devices)
        if reached and (taken := _fit(kind, later, at)) is not None:
            found = _Kept(at, {host: later.free[host] - count for host, count in taken.items()})
            break
    room.looked += later.looked + len(room.free)
    return found


class _Past(NamedTuple):
    """Outcome of a forecast.

    Attributes:
        log_expected: logarithm of the expected wait in seconds.
        log_ratio: logarithm of actual to expected wait.
        score: the same, in units of the forecast's own width on that side.
    """

    log_expected: float
    log_ratio: float
    score: float


class Calibration:
    """Correction of forecasts by what came of past ones.

    The center moves by the median ratio of actual to expected wait among the past forecasts of about the same wait. The
    bounds widen or narrow by quantiles of the scores of past ones. The levels of these quantiles follow how often
    starts fell outside, so that the interval holds its part also where past forecasts are not like the next.
    """

    def __init__(self) -> None:
        self._past: deque[_Past] = deque(maxlen=MOST_PAST)
        self._scores: list[float] = []
        self._low = LOW
        self._high = HIGH

    def started(self, made_at: float, forecast: Forecast, started_at: float) -> None:
        """Note when a request started, and what was forecast at a time, before the correction."""
        if forecast.expected == math.inf:
            return
        expected = max(LEAST_WAIT_SECONDS, forecast.expected - made_at)
        ratio = math.log(max(LEAST_WAIT_SECONDS, started_at - made_at) / expected)
        below, above = _widths(made_at, forecast)
        score = ratio / (above if ratio > 0 else below)
        if len(self._scores) >= LEAST_PAST:
            self._low += ADAPTATION * (LOW - (score < self._at(self._low)))
            self._high += ADAPTATION * (HIGH - (score <= self._at(self._high)))
            self._low, self._high = min(0.45, max(0.005, self._low)), min(0.995, max(0.55, self._high))
        if len(self._past) == MOST_PAST:
            del self._scores[bisect_left(self._scores, self._past[0].score)]
        self._past.append(_Past(math.log(expected), ratio, score))
        insort(self._scores, score)

    def corrected(self, made_at: float, forecast: Forecast) -> Forecast:
        """Forecast with the center and width of the interval that past ones had needed."""
        if len(self._past) < LEAST_PAST or forecast.expected == math.inf:
            return forecast
        expected = max(LEAST_WAIT_SECONDS, forecast.expected - made_at)
        below, above = _widths(made_at, forecast)
        at = math.log(expected)
        near = nsmallest(NEAR_PAST, self._past, key=lambda one: abs(one.log_expected - at))
        ratio = _bias([one.log_ratio for one in near])
        low, high = self._at(self._low), self._at(self._high)
        low *= above if low > 0 else below
        high *= above if high > 0 else below
        return Forecast(
            made_at + expected * math.exp(min(ratio, low)),
            made_at + expected * math.exp(ratio),
            math.inf if forecast.high == math.inf else made_at + expected * math.exp(max(ratio, high)),
        )

    def _at(self, level: float) -> float:
        """Quantile of the scores."""
        last = len(self._scores) - 1
        return self._scores[min(last, max(0, round(level * last)))]


def _bias(ratios: Sequence[float]) -> float:
    """Median of the logarithms of ratios, if a correction by it would have made them clearly better; else 0."""
    median = statistics.median(ratios)
    before = statistics.median(abs(ratio) for ratio in ratios)
    after = statistics.median(abs(ratio - median) for ratio in ratios)
    return median if after < WORTHWHILE * before else 0.0


def _widths(made_at: float, forecast: Forecast) -> tuple[float, float]:
    """Widths of an interval below and above its center, in logarithms of the wait; at least `LEAST_WIDTH`."""
    expected = max(LEAST_WAIT_SECONDS, forecast.expected - made_at)
    low = math.log(expected / max(LEAST_WAIT_SECONDS, forecast.low - made_at))
    high = math.log(max(LEAST_WAIT_SECONDS, forecast.high - made_at) / expected)
    return min(MOST_WIDTH, max(LEAST_WIDTH, low)), min(MOST_WIDTH, max(LEAST_WIDTH, high))
