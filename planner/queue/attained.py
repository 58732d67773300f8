"""Order of work that may be preempted at any time and whose duration is unknown, and the choice of what runs.

Least attained service in levels, after Tiresias [1]: work that has had few device seconds goes ahead of work that has
had many. Durations on clusters are heavy-tailed, so that what has run for long will run for longer, and the brief ones
are through before it goes on. Levels keep equal work from taking turns, in which all of it would end late. The last
level is for the few that would hold up all others.

Within a level nothing but the number of devices tells work apart, so the smallest goes first. Work that has waited for
`OVERDUE` times the mean wait of its level is overdue, and stays so: it goes ahead of all of its level that are not, by
arrival. So the longest waits are bound to the usual ones, whatever the load.

A turn decides anew what runs: along the order, each keeps its devices, gets free ones, or takes those of the last in
the order. So work ahead never waits for work behind, and small work behind uses what is left over.

At present `corral simulate` alone uses this: the planner preempts between groups only (`reclaim.py`).

[1] J. Gu et al.: Tiresias: A GPU Cluster Manager for Distributed Deep Learning. NSDI 2019.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Callable, Collection, Iterable, Sequence
from operator import attrgetter
from typing import Any, Final, NamedTuple

from msgspec import Struct

from ..fleet.fleet import Fleet, free, hold
from ..fleet.state import Ask
from ..placement.exact import Pick
from ..placement.policies import Policy
from ..placement.select import select
from .backfill import PRESENT, Horizons
from .ends import Ends

Levels = tuple[float, ...]
"""Device seconds at which each further level begins, ascending."""
LEVELS: Final[Levels] = (4 * 3600.0, 24 * 3600.0, 1024 * 3600.0)
"""4, 24 and 1,024 GPU-hours; see docs/scheduling.md for others."""
OVERDUE: Final = 1.75
"""Wait after which work is overdue, in units of the mean wait of all that wait in its level."""
REVIEW_SECONDS: Final = 6 * 3600.0
"""Time between two comparisons of the waits."""

Order = tuple[int, int, int, float, float, int]
"""Negative priority, level, 0 if overdue and else 1, devices if it is not, time of arrival, number: the smaller is
ahead."""
_order: Final = attrgetter("order")


class Entry(Struct, eq=False):
    """Work that runs or waits.

    Attributes:
        name: of its lease.
        ask: what it asks for.
        priority: the greater goes first.
        arrived_at: seconds.
        number: of its arrival.
        size: number of devices.
        level: of the device seconds that it has had.
        overdue: true once it has waited for longer than others do.
        payload: of the caller.
        picks: devices that it has; None while it waits.
        firm: true if it must not be stopped now.
    """

    name: str
    ask: Ask
    priority: int
    arrived_at: float
    number: int
    size: float
    level: int = 0
    overdue: bool = False
    payload: Any = None
    picks: list[Pick] | None = None
    firm: bool = False

    @property
    def order(self) -> Order:
        """Place in the order."""
        size = 0.0 if self.overdue else self.size
        return -self.priority, self.level, 0 if self.overdue else 1, size, self.arrived_at, self.number


class Turn(NamedTuple):
    """Changes of a turn.

    Attributes:
        stops: what stops. It waits, or starts elsewhere.
        starts: what starts, with its devices in `picks`.
    """

    stops: list[Entry]
    starts: list[Entry]


def level_of(device_seconds: float, levels: Levels = LEVELS) -> int:
    """Level of work that has had so many device seconds, from 0."""
    return bisect_right(levels, device_seconds)


def next_level(device_seconds: float, levels: Levels = LEVELS) -> float:
    """Device seconds at which the next level begins; infinite in the last."""
    level = level_of(device_seconds, levels)
    return levels[level] if level < len(levels) else math.inf


class AttainedLine:
    """Work on a fleet that may be preempted.

    Args:
        fleet: its leases are those of the running work, and change with each turn.
        policy: ranks hosts.
        grants: what a lease holds that has these devices.
    """

    def __init__(self, fleet: Fleet, policy: Policy, grants: Callable[[Sequence[Pick]], Any]) -> None:
        self._fleet = fleet
        self._policy = policy
        self._grants = grants
        self._waiting: list[Entry] = []
        self._running: dict[str, Entry] = {}
        self._reviewed_at = -math.inf

    def possible(self, ask: Ask) -> bool:
        """True if the fleet could hold it, were it idle."""
        ends = Ends(self._fleet)
        for name in self._running:
            ends.expect(name, 0.0)
        return Horizons(self._fleet, ends).plan(ask, "") is not None

    def arrive(self, entry: Entry) -> None:
        """Add work that waits."""
        insort(self._waiting, entry, key=_order)

    def end(self, entry: Entry) -> None:
        """Remove work that runs."""
        del self._running[entry.name]
        free(self._fleet, entry.name)

    def turn(self, now: float) -> Turn:
        """Decide what runs now, from the places of all in the order, and change the leases of the fleet."""
        if not self._waiting:
            return Turn([], [])
        if now >= self._reviewed_at + REVIEW_SECONDS:
            self._reviewed_at = now
            self._review(now)
        running = sorted(self._running.values(), key=lambda entry: (not entry.firm, entry.order))
        walk = _Walk(self._fleet, self._policy, self._grants, running)
        todo = self._waiting
        asks = {entry.ask for entry in todo}
        for entry in _merged(todo, running):
            if entry.picks is not None and entry.name not in walk.stopped:
                walk.keep(entry)
            elif entry.ask not in walk.failed:
                walk.place(entry)
                # Who is behind and asks for the same fits no better.
                if walk.failed >= asks and all(each.ask in walk.failed for each in walk.stopped.values()):
                    break
        return self._apply(walk)

    def _review(self, now: float) -> None:
        """Note which work is overdue."""
        by_level: dict[int, list[Entry]] = {}
        for entry in self._waiting:
            by_level.setdefault(entry.level, []).append(entry)
        for entries in by_level.values():
            usual = sum(now - entry.arrived_at for entry in entries) / len(entries)
            for entry in entries:
                entry.overdue |= now - entry.arrived_at > OVERDUE * usual
        self._waiting.sort(key=_order)

    def _apply(self, walk: _Walk) -> Turn:
        stops: list[Entry] = []
        starts: list[Entry] = []
        for entry in walk.stopped.values():
            picks = walk.placed.get(entry.name)
            if picks is not None and entry.picks is not None and _same(picks[1], entry.picks):
                del walk.placed[entry.name]  # it has its devices back
                continue
            stops.append(entry)
            entry.picks = None
            del self._running[entry.name]
            insort(self._waiting, entry, key=_order)
        for entry, picks in walk.placed.values():
            entry.picks = picks
            starts.append(entry)
            self._running[entry.name] = entry
        gone = {entry.name for entry in starts}
        if gone:
            self._waiting = [entry for entry in self._waiting if entry.name not in gone]
        return Turn(stops, starts)


class _Walk:
    """A walk along the order.

    Attributes:
        failed: what can't be had any more.
        stopped: work that has lost its devices, by name.
        placed: work that has got devices, by name.
    """

    def __init__(
        self, fleet: Fleet, policy: Policy, grants: Callable[[Sequence[Pick]], Any], running: Sequence[Entry]
    ) -> None:
        self._fleet = fleet
        self._policy = policy
        self._grants = grants
        self._behind = {entry.name: entry for entry in running}
        """Running work that has not had its turn, in order."""
        self._rank = {entry.name: float(-place) for place, entry in enumerate(running)}
        self._ranks: Ends | None = None
        self._horizons: Horizons | None = None
        self.failed: set[Ask] = set()
        self.stopped: dict[str, Entry] = {}
        self.placed: dict[str, tuple[Entry, list[Pick]]] = {}

    def keep(self, entry: Entry) -> None:
        """Let running work go on: work behind can't take its devices."""
        del self._behind[entry.name]
        self._rule_out(entry)

    def place(self, entry: Entry) -> None:
        """Find devices for work without any: free ones, or those of the last in the order."""
        picks = select(self._fleet, self._policy, entry.ask)
        if picks is None:
            picks = self._take(entry.ask) if self._behind else None
        if picks is None:
            self.failed.add(entry.ask)
            return
        hold(self._fleet, entry.name, self._grants(picks))
        self.placed[entry.name] = entry, picks
        self._rule_out(entry)

    def _rule_out(self, entry: Entry) -> None:
        """Keep what has had its turn from being taken by those behind."""
        if self._ranks is not None:
            self._ranks.expect(entry.name, math.inf)

    def _take(self, ask: Ask) -> list[Pick] | None:
        """Stop work behind so that there are devices for an ask; None if that does not do."""
        fleet = self._fleet
        horizons, ranks = self._planned()
        plan = horizons.plan(ask, "")
        if plan is None or plan.starts_at == math.inf:
            return None
        victims = self._victims([uuid for uuid, _, _ in plan.reservation.devices], ask, ranks)
        names = {name for name, _, _ in plan.reservation.hosts}
        # For cores and RAM, others on these hosts have to stop as well, the last in the order first.
        others = [entry for name, entry in self._behind.items() if name not in victims and self._on(entry, names)]
        others.sort(key=_order)
        stopped = [self._stop(self._behind[name]) for name in victims]
        picks = select(fleet, self._policy, ask)
        while picks is None and others:
            stopped.append(self._stop(others.pop()))
            picks = select(fleet, self._policy, ask)
        if picks is None:
            for entry in stopped:
                self._resume(entry, ranks)
        return picks

    def _victims(self, uuids: Iterable[str], ask: Ask, ranks: Ends) -> dict[str, None]:
        """Names of the work that has to stop so that an ask can have these devices, the last in the order first."""
        found: dict[str, None] = {}
        for uuid in uuids:
            device = self._fleet.devices[uuid]
            left = device.share_left + sum(share for lease, (share, _) in device.holders.items() if lease in found)
            for lease in sorted(device.holders.keys() & self._behind.keys() - found.keys(), key=ranks.ends_at):
                if ask.whole or left < ask.share:
                    found[lease] = None
                    left += device.holders[lease][0]
        return found

    def _planned(self) -> tuple[Horizons, Ends]:
        """Devices by when they can be had: the place of their holders in the order, the last first."""
        if self._ranks is None or self._horizons is None:
            self._ranks = Ends(self._fleet)
            self._horizons = Horizons(self._fleet, self._ranks, stay=PRESENT)
            for name, entry in self._behind.items():
                if not entry.firm:
                    self._ranks.expect(name, self._rank[name])
        return self._horizons, self._ranks

    def _on(self, entry: Entry, hosts: Collection[str]) -> bool:
        return not entry.firm and any(name in hosts for name in self._fleet.leases[entry.name].hosts)

    def _stop(self, entry: Entry) -> Entry:
        del self._behind[entry.name]
        self.stopped[entry.name] = entry
        free(self._fleet, entry.name)
        return entry

    def _resume(self, entry: Entry, ranks: Ends) -> None:
        """Undo a stop."""
        assert entry.picks is not None
        del self.stopped[entry.name]
        hold(self._fleet, entry.name, self._grants(entry.picks))
        self._behind[entry.name] = entry
        ranks.expect(entry.name, self._rank[entry.name])


def _merged(waiting: Sequence[Entry], running: Sequence[Entry]) -> Iterable[Entry]:
    """All work in order; first that which must not be stopped."""
    return sorted((*running, *waiting), key=lambda entry: (not entry.firm, entry.order))


def _same(picks: Sequence[Pick], others: Sequence[Pick]) -> bool:
    return [(pick.host.name, [device.uuid for device in pick.devices]) for pick in picks] == [
        (pick.host.name, [device.uuid for device in pick.devices]) for pick in others
    ]


__all__ = ["LEVELS", "AttainedLine", "Entry", "Levels", "Order", "Turn", "level_of", "next_level"]
