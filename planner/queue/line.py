"""The waiting requests in order, and who may start now.

Requests of equal needs form a group: where its first does not fit, the others do not either, and are not tried. A group
that did not fit is tried again only once a host has changed that could hold it. So an arrival or a release costs little
however many wait.

The first request that does not fit gets a reservation (`backfill.py`), and so does each further one that could take a
kind of capacity that no reservation ahead of it covers. Reservations bind those behind them only.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from itertools import count as numbers_from
from operator import attrgetter
from typing import Any, Final, NamedTuple

import numpy as np

from ...schemas.requests import Placement, WorkRequest
from ..fleet.bookings import lasts_of
from ..fleet.fleet import Fleet, advance
from ..fleet.reservation import Reservation
from ..fleet.reserved import reserve, unreserve
from ..fleet.state import UNLIMITED, WHOLE_SHARE, Ask, Model
from ..groups.state import GroupState
from ..groups.tree import Node
from ..groups.use import Admission, Barred
from ..placement.decide import Policies, ask_of
from ..placement.exact import Pick
from ..placement.feasible import excluded, model_allowed
from ..placement.policies import Policy
from ..placement.select import select
from .backfill import NOW, Capacity, Horizons, could_take, covered, memory_for, stay_of
from .durations import Estimate
from .ends import Ends
from .inadmissible import ActiveRequests
from .order import KEYS_SECONDS, LEAST_SECONDS, LIMIT_SECONDS, TIMELESS, Asked, Rule, fifo, shortest
from .turns import ByGroup, InOrder, Turns
from .use import Use

MOST_RESERVATIONS: Final = 16
_STEPS: Final = 8
"""Kinds of requests that are tried before the time of a search is looked at."""
MOST_UNREADY: Final = 256
"""Limit on the requests that are not ready for which something is kept: after an outage of the bus thousands may be."""
LEAST_KEYS_SECONDS: Final = 0.25
"""Least time between two renewals of the keys, however soon requests are overdue."""
_WITHOUT_OWNERS: Final = frozenset({fifo, shortest})
"""Rules that do not need the use of owners."""
_FEW_HOSTS: Final = 64
"""Beyond so many changed hosts all groups are tried, rather than comparing each with each."""

GroupKey = tuple[Ask, str | None, int, Node | None, bool]
"""The ask; the policy; 0, or the number of a request that must not start now; the group of the owner, or None
if there are no groups; true if it may be preempted."""
_order: Final = attrgetter("order")
_numbers: Final = numbers_from()
Order = tuple[int, int, float, int]
"""Negative priority, 0 if overdue and else 1, key, number of arrival: the smaller is ahead."""


class Entry:
    """A waiting request.

    Attributes:
        request: as it was sent.
        ask: the same in whole numbers.
        arrived_at: seconds.
        number: of its arrival.
        estimate: of its duration.
        seconds: expected duration.
        gpus: devices that it asks for, or the part of a host's devices that its cores are.
        order: its place.
        payload: of the caller.
        ready: false if it must not start now, as its client was not heard; what it would take is kept for it.
        claimed: true if leases are preempted for it: what its reservation has is lent only to those whose limit ends
            their leases by then, since half of all leases outlast their estimate.
        held: the last reservation that was chosen for it; None before.
    """

    __slots__ = (
        "arrived_at",
        "ask",
        "claimed",
        "estimate",
        "gpus",
        "group",
        "held",
        "number",
        "order",
        "payload",
        "ready",
        "request",
        "seconds",
    )

    def __init__(self, request: WorkRequest, ask: Ask, arrived_at: float, number: int, estimate: Estimate) -> None:
        self.request = request
        self.ask = ask
        self.arrived_at = arrived_at
        self.number = number
        self.estimate = estimate
        self.seconds = max(LEAST_SECONDS, estimate.seconds)
        self.gpus = 0.0
        self.order: Order = (0, 1, 0.0, number)
        self.payload: Any = None
        self.ready = True
        self.claimed = False
        self.held: Held | None = None
        self.group: Group


class Held:
    """A reservation in force.

    Attributes:
        entry: for which it is.
        reservation: devices, cores and RAM.
        starts_at: expected start.
        devices: uuids.
        hosts: names.
        number: tells reservations apart.
        visible: the part that decisions could see now, on hosts with something free; None if there is none.
    """

    __slots__ = ("devices", "entry", "hosts", "number", "reservation", "starts_at", "visible")

    def __init__(self, entry: Entry, reservation: Reservation, starts_at: float) -> None:
        self.number = next(_numbers)
        self.visible: Reservation | None = reservation
        self.entry = entry
        self.reservation = reservation
        self.starts_at = starts_at
        self.devices = frozenset(uuid for uuid, _, _ in reservation.devices)
        self.hosts = frozenset(name for name, _, _ in reservation.hosts)

    def touches(self, picks: Sequence[Pick]) -> bool:
        """True if a placement may use what is reserved."""
        for pick in picks:
            if pick.host.name in self.hosts:
                if any(device.uuid in self.devices for device in pick.devices):
                    return True
                if any(name == pick.host.name and (cpus or ram) for name, cpus, ram in self.reservation.hosts):
                    return True
        return False


class Group:
    """The waiting requests of equal needs.

    Attributes:
        key: see `GroupKey`.
        ask: what they ask for, without what quotas keep from them.
        policy: that ranks for them.
        node: group of their owners; None if there are no groups.
        preemptible: true if their leases may be preempted.
        refused: why quotas let none of them start, in words; empty if they do.
        within: true if their next start is within the guarantee of their group.
        limited: group around theirs whose limit alone keeps them from what is guaranteed; None if there is none.
        admission: what quotas allowed them last, and the stamp of it; None before.
        entries: in order.
        brief: (expected seconds, number, entry), the briefest first.
        opened: hosts that changed since it was tried last and did not fit, and could hold it; None if any could.
        under: reservations ahead that were in its way then.
        seen: mark of the reservations that were ahead then; see `Ahead.mark`.
        passable: those of these that its briefest could pass.
        kinds: kinds of capacity that they could take, at this `shape` of the fleet.
    """

    __slots__ = (
        "_fleet",
        "admission",
        "ask",
        "brief",
        "entries",
        "key",
        "kinds",
        "limited",
        "node",
        "opened",
        "passable",
        "policy",
        "preemptible",
        "refused",
        "seen",
        "shape",
        "under",
        "within",
    )

    def __init__(self, key: GroupKey, fleet: Fleet) -> None:
        self.key = key
        self.ask, self.policy, _, self.node, self.preemptible = key
        self._fleet = fleet
        self.refused = ""
        self.within = False
        self.limited: Node | None = None
        self.admission: tuple[object, Admission] | None = None
        self.entries: list[Entry] = []
        self.brief: list[tuple[float, int, Entry]] = []
        self.opened: set[str] | None = None
        self.under: tuple[Held, ...] = ()
        self.passable: tuple[Held, ...] = ()
        self.seen: tuple[tuple[int, float], ...] = ()
        self.kinds: frozenset[Capacity] = frozenset()
        self.shape = -1

    @property
    def order(self) -> Order:
        """Place of the first."""
        return self.entries[0].order

    @property
    def wanted(self) -> Ask:
        """Resources that they ask for, whatever quotas keep from them."""
        return self.key[0]

    def bar(self, barred: Barred) -> None:
        """Bar some models, and no others, from now on."""
        if barred != self.ask.barred:
            self.ask = self._fleet.ask(self.key[0].key._replace(barred=barred))
            self.opened, self.under, self.passable, self.shape = None, (), (), -1


class Start(NamedTuple):
    """A request that may start now.

    Attributes:
        entry: it has left the line.
        picks: its devices, host by host.
        policy: that ranked.
    """

    entry: Entry
    picks: list[Pick]
    policy: Policy


class Line:
    """The waiting requests of a fleet.

    Args:
        fleet: live state.
        policies: rank hosts.
        rule: gives the order.
        groups: groups of owners; None for none.
        overdue_seconds: wait after which a request goes ahead of all of its priority that have waited less.

    Attributes:
        fleet: as given.
        rule: as given.
        owed: kinds of requests that are within guarantee and did not fit at the last walk, and what they ask for,
            without what would be beyond the guarantee.
        ends: expected ends of the running leases.
        unready: paused requests whose turn it was in the last walk along the line.
        paused: true if the last search was given up before its end.
        changes: number of changes by arrivals, withdrawals and ends of leases.
    """

    def __init__(
        self,
        fleet: Fleet,
        policies: Policies,
        rule: Rule = shortest,
        groups: GroupState | None = None,
        overdue_seconds: float = LIMIT_SECONDS,
    ) -> None:
        self.fleet = fleet
        self.rule = rule
        self._overdue_seconds = overdue_seconds
        self._keys_seconds = min(KEYS_SECONDS, max(LEAST_KEYS_SECONDS, overdue_seconds / 10))
        self.owed: list[tuple[Group, Ask]] = []
        self._tenants = GroupState() if groups is None else groups
        self.ends = Ends(fleet)
        self.unready: list[Entry] = []
        self.paused = False
        self._policies = policies
        self._entries: list[Entry] = []
        self._groups: dict[GroupKey, Group] = {}
        self._active = ActiveRequests[Group](fleet, self._tenants)
        """Where there are groups of owners: the requests that the next walk is to try, and those that it need not."""
        self._horizons = Horizons(fleet, self.ends)
        self._ahead = Ahead(self)
        self._walk: _Walk | None = None
        self.changes = 0
        self._shown: list[Held] = []
        self._seen = -1
        self._shape = fleet.shape_version
        self._idle: dict[Model, int] = {}
        self._renewed_at = -math.inf
        self._bookings = fleet.bookings_version
        self._classes_until = math.inf
        self._count = 0
        self._use = Use()
        self._uses: dict[str, tuple[float, float]] = {}
        """Use of owners that the keys rest on, as of the last renewal."""

    @property
    def groups(self) -> Iterable[Group]:
        """The groups of requests of equal needs, in no order."""
        return self._groups.values()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def __contains__(self, entry: Entry) -> bool:
        at = bisect_left(self._entries, entry.order, key=_order)
        return at < len(self._entries) and self._entries[at] is entry

    @property
    def held(self) -> Sequence[Held]:
        """Reservations in force, in the order of the line, as of now for those that did not fit at the last `next`."""
        return self._ahead.resolve()

    def arrive(
        self,
        request: WorkRequest,
        estimate: Estimate,
        now: float,
        *,
        ask: Ask | None = None,
        number: int | None = None,
        payload: Any = None,
    ) -> Entry:
        """Add a request.

        Args:
            request: as it was sent.
            estimate: of its duration.
            now: time of its arrival; of its first arrival, if it waited before.
            ask: the request in whole numbers, if it is at hand.
            number: of its arrival, if it waited before.
            payload: kept with it.

        Raises:
            InvalidRequest: fields contradict each other.
        """
        ask = ask_of(self.fleet, request) if ask is None else ask
        self._count = self._count + 1 if number is None else max(self._count, number)
        entry = Entry(request, ask, now, self._count if number is None else number, estimate)
        entry.gpus = size_of(self.fleet, ask)
        self._classes_until = min(self._classes_until, _class_until(entry))
        # As of the last renewal, or an equal request of before it would be behind this one.
        waited = max(0.0, self._renewed_at - now)
        owner, at = request.owner, max(now, self._renewed_at)
        if owner not in self._uses and self.rule not in _WITHOUT_OWNERS:
            self._uses[owner] = self._use.of(owner, at), self._use.share(owner, at)
        asked = Asked(now, waited, entry.gpus, entry.seconds, *self._uses.get(owner, (0.0, 0.0)), entry.estimate.known)
        entry.order = self._order_of(entry, float(self.rule(asked)), waited)
        entry.payload = payload
        insort(self._entries, entry, key=_order)
        self._join(entry)
        return entry

    def withdraw(self, entry: Entry) -> None:
        """Remove a request: it gave up, or starts."""
        del self._entries[bisect_left(self._entries, entry.order, key=_order)]
        self._leave(entry)
        self._ahead.drop(entry)

    def revise(self, entry: Entry, estimate: Estimate) -> None:
        """Change the estimate of a request, since more is known. Its place changes when keys are renewed."""
        if estimate == entry.estimate:
            return
        group = entry.group
        del group.brief[bisect_left(group.brief, (entry.seconds, entry.number))]
        entry.estimate, entry.seconds = estimate, max(LEAST_SECONDS, estimate.seconds)
        insort(group.brief, (entry.seconds, entry.number, entry))
        self.changes += 1

    def revise_lease(self, lease_id: str, estimate: Estimate, now: float) -> None:
        """Change the estimate of a running lease."""
        self.ends.revise(lease_id, estimate, now)

    def pause(self, entry: Entry) -> None:
        """Keep a request from starting: its client must be heard first. What it would take is kept for it."""
        self._leave(entry)
        entry.ready = False
        self._join(entry)

    def resume(self, entry: Entry) -> None:
        """Let a request start again."""
        self._leave(entry)
        entry.ready = True
        self._join(entry)

    def regroup(self) -> None:
        """Sort all requests by the groups of their owners anew, since the groups have changed."""
        self._groups, self._active = {}, ActiveRequests[Group](self.fleet, self._tenants)
        self._walk, self._ahead, self.owed = None, Ahead(self), []
        for entry in self._entries:
            self._join(entry)

    def _join(self, entry: Entry) -> None:
        self.changes += 1
        request, tenants = entry.request, self._tenants
        node = tenants.node_of(request.owner) if tenants.active else None
        preemptible = node is not None and request.preemptible
        key = (entry.ask, request.policy, 0 if entry.ready else entry.number, node, preemptible)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = Group(key, self.fleet)
            if node is not None:
                self._active.add(group, node)
        entry.group = group
        insort(group.entries, entry, key=_order)
        insort(group.brief, (entry.seconds, entry.number, entry))
        if group.under:  # it fits but for reservations, which may not bind this one
            group.opened = None

    def _leave(self, entry: Entry) -> None:
        self.changes += 1
        group = entry.group
        del group.entries[bisect_left(group.entries, entry.order, key=_order)]
        del group.brief[bisect_left(group.brief, (entry.seconds, entry.number))]
        if not group.entries:
            del self._groups[group.key]
            if group.node is not None:
                self._active.forget(group, group.node)

    def renew(self, now: float) -> None:
        """Compute the keys of all requests anew. `next` does when they are old; a caller may sooner, while it idles."""
        first = self._renewed_at == -math.inf
        self._renewed_at = now
        if self.rule in TIMELESS and not first:
            return
        entries = self._entries
        arrived = np.array([entry.arrived_at for entry in entries])
        waited = np.maximum(0.0, now - arrived)
        owners = [entry.request.owner for entry in entries]
        if self.rule in _WITHOUT_OWNERS:
            used, self._uses = (0.0, 0.0), {}
        else:
            used = self._use.of_all(owners, now)
            self._uses = {owner: (float(use), float(share)) for owner, use, share in zip(owners, *used, strict=True)}
        asked = Asked(
            arrived,
            waited,
            np.array([entry.gpus for entry in entries]),
            np.array([entry.seconds for entry in entries]),
            *used,
            np.array([entry.estimate.known for entry in entries]),
        )
        keys: list[float] = np.broadcast_to(np.asarray(self.rule(asked), dtype=float), arrived.shape).tolist()
        for entry, key, wait in zip(entries, keys, waited.tolist(), strict=True):
            entry.order = self._order_of(entry, key, wait)
        entries.sort(key=_order)
        for group in self._groups.values():
            group.entries.sort(key=_order)
        self.changes += 1

    def _classify(self) -> None:
        """Bring up to date what requests may use of booked devices."""
        bookings, now = self.fleet.bookings, self.fleet.now
        self._bookings, self._classes_until = self.fleet.bookings_version, math.inf
        for entry in self._entries:
            key = bookings.classify(entry.ask.key, entry.request, now) if bookings else entry.ask.key.anytime
            if key != entry.ask.key:
                self._leave(entry)
                entry.ask = self.fleet.ask(key)
                self._join(entry)
            self._classes_until = min(self._classes_until, _class_until(entry))

    def _order_of(self, entry: Entry, key: float, waited: float) -> Order:
        """Place of an entry with this key of the rule."""
        if waited >= self._overdue_seconds:
            return (-entry.request.priority, 0, entry.arrived_at, entry.number)
        return (-entry.request.priority, 1, key, entry.number)

    def reopen(self) -> None:
        """Have all requests tried again: something may have changed that the states of hosts do not show."""
        self.changes += 1
        for group in self._groups.values():
            group.opened = None

    def _reopen_filtered(self) -> None:
        """Have the requests tried again that name hosts, or labels of hosts."""
        self.changes += 1
        for group in self._groups.values():
            if group.ask.filtered:
                group.opened = None

    def started(self, lease_id: str, entry: Entry, now: float) -> None:
        """Note the lease of a request that has started; the fleet holds it already."""
        self.ends.started(lease_id, entry.estimate, now)
        self._use.starts(lease_id, entry.request.owner, entry.gpus, now)

    def adopt(self, lease_id: str, owner: str, gpus: float, estimate: Estimate, started_at: float) -> None:
        """Note a lease that started before this line was made; the fleet holds it already.

        Args:
            lease_id: of the lease.
            owner: of the lease.
            gpus: devices that it holds.
            estimate: of its duration.
            started_at: seconds.
        """
        self.ends.started(lease_id, estimate, started_at)
        self._use.starts(lease_id, owner, gpus, started_at)

    def resized(self, lease_id: str, owner: str, gpus: float, now: float) -> None:
        """Note that a lease has other devices, which the fleet holds already.

        Args:
            lease_id: of the lease.
            owner: of the lease.
            gpus: devices that it holds from now on.
            now: seconds.
        """
        self.changes += 1
        self.ends.resized(lease_id)
        self._use.ends(lease_id, now)
        self._use.starts(lease_id, owner, gpus, now)

    def ended(self, lease_id: str, now: float) -> None:
        """Note that a lease ended, before the fleet frees what it held."""
        self.changes += 1
        self.ends.ended(lease_id)
        self._use.ends(lease_id, now)

    def possible(self, ask: Ask) -> bool:
        """True if the fleet could hold a request once enough leases have ended."""
        return self._horizons.plan(ask, "") is not None

    def position(self, entry: Entry) -> int:
        """Position of an entry, from 1."""
        return bisect_left(self._entries, entry.order, key=_order) + 1

    # Who may start

    def serve(self, now: float) -> Iterator[Start]:
        """The requests that may start now, one by one; the fleet must hold each before the next is asked for."""
        while (start := self.next(now)) is not None:
            yield start

    def next(self, now: float, until: Callable[[], bool] = lambda: False) -> Start | None:
        """The next request that may start now, removed from the line; None if none may.

        Those that could but are not `ready` are in `unready`, each with a reservation.

        Args:
            now: seconds.
            until: returns true once the search has taken long enough: it is `paused` then, and the next call goes on.
        """
        self.paused = False
        fleet = self.fleet
        if now > fleet.now:
            advance(fleet, now)
        self.ends.advance(now)
        if fleet.bookings_version != self._bookings or fleet.now >= self._classes_until:
            self._classify()
        if fleet.shape_version != self._shape:  # a label is no part of a host's state
            self._shape = fleet.shape_version
            self._reopen_filtered()
        if now - self._renewed_at >= self._keys_seconds and self._entries:
            self.renew(now)
        walk = self._walk
        if walk is None or not walk.goes_on():
            self.unready = []
            self._note_opened()
            walk = self._walk = _Walk(self, now)
        try:
            return self._step(walk, now, until)
        finally:
            self._show([])

    def turns(self, now: float) -> Turns[Group]:
        """Turns along the line."""
        tenants = self._tenants
        if not tenants.active:
            return InOrder(self._groups.values())
        tenants.note_fleet(self.fleet)
        return ByGroup(self.awake(), tenants, self._admission, now)

    def awake(self) -> Mapping[Node, Mapping[Group, None]]:
        """The groups of requests that may start, or be owed something, by the group of their owners.

        The others are inadmissible until something changes that could let them start, or be owed something.
        """
        return self._active.active(self._exhausted)

    def why_refused(self, group: Group) -> str:
        """Reason for which quotas let none of a group start, as of now; empty if they do."""
        if group.node is None or not group.entries or not group.refused:
            return group.refused
        admission = self._admission(group)
        return "" if admission.barred is not None else admission.reason

    def _exhausted(self, group: Group) -> bool:
        """True if quotas let nothing of a group start, nor owe it anything, and no start by others could change that.

        The use of its group, and of those around it, is what it was when they did so last.
        """
        kept, node = group.admission, group.node
        if kept is None or node is None or not (group.preemptible and kept[1].exhausted):
            return False
        return kept[0] == self._tenants.stamp(self.fleet, node, True)

    def _admission(self, group: Group) -> Admission:
        tenants, kept, node = self._tenants, group.admission, group.node
        stamp = None if node is None else tenants.stamp(self.fleet, node, group.preemptible)
        if kept is None or kept[0] != stamp or stamp is None:
            owner, ask = group.entries[0].request.owner, group.key[0]
            kept = group.admission = stamp, tenants.admission(self.fleet, owner, ask, group.preemptible)
        if group.preemptible and kept[1].exhausted:
            self._active.refuse(group)
        return kept[1]

    def _note_opened(self) -> None:
        """Find the hosts that changed since groups were tried last, and the groups that they could hold."""
        index = self.fleet.index
        self._idle = {}
        for device, count in index.devices.items():
            if device.idle:
                self._idle[device.model] = self._idle.get(device.model, 0) + count
        few = self._seen >= index.moved_base and index.moved_end - self._seen <= _FEW_HOSTS
        changed = set(index.moved[self._seen - index.moved_base :]) if few else None
        self._seen = index.moved_end
        if changed is None:
            self.reopen()
            return
        known = self.fleet.hosts
        states = [(name, known[name].state) for name in changed if name in known]
        able: dict[Ask, list[str]] = {}
        """Hosts that could hold a request, or a part of it: many groups ask for the same."""
        for group in self._groups.values() if states else ():
            if group.opened is not None:
                ask = group.ask
                names = able.get(ask)
                if names is None:
                    part = ask if ask.placement is Placement.SAME_HOST else ask.part(1)
                    names = able[ask] = [name for name, state in states if not excluded(state, part)]
                if names:
                    group.opened.update(names)

    def _openers(self, ask: Ask, hosts: AbstractSet[str]) -> set[str]:
        """Hosts of some that could hold a request, or a part of it."""
        part = ask if ask.placement is Placement.SAME_HOST else ask.part(1)
        known = self.fleet.hosts
        return {name for name in hosts if name in known and not excluded(known[name].state, part)}

    def _enough(self, ask: Ask) -> bool:
        """True if as many devices are idle in all as a request on several hosts asks for."""
        if ask.placement is Placement.SAME_HOST or not (ask.whole and ask.plain):
            return True
        return sum(count for model, count in self._idle.items() if model_allowed(model, ask)) >= ask.devices

    def _step(self, walk: _Walk, now: float, until: Callable[[], bool]) -> Start | None:
        """Go on along the line to the next that may start."""
        turns, ahead = walk.turns, walk.ahead
        for step in numbers_from():
            if step % _STEPS == _STEPS - 1 and until():
                self.paused = True
                walk.stop(())
                return None
            if (group := turns.next()) is None:
                break
            if not group.entries[0].ready and len(self.unready) >= MOST_UNREADY:
                continue
            if group.limited is not None:
                walk.owed.append((group, group.ask))
                continue
            if self._worth_trying(group, ahead, now):
                start = self._try(group, ahead, now)
                if start is not None and start.entry.ready:
                    self._show([])
                    self.withdraw(start.entry)
                    if group.entries:
                        turns.again(group)
                    walk.stop(start.picks)
                    return start
                if start is not None:
                    self.unready.append(start.entry)
                    ahead.active.append(_kept(start))
                    continue
            ahead.blocked.append(group)
            if group.within:
                walk.owed.append((group, group.ask))
        self._ahead, self.owed = ahead, walk.owed
        walk.stop(())
        return None

    def _worth_trying(self, group: Group, ahead: Ahead, now: float) -> bool:
        """True if a group may fit: hosts have changed, reservations ended, or may be passed that could not before."""
        if group.under and group.opened is not None and group.seen != (mark := ahead.mark()):
            group.seen = mark
            active = ahead.resolve()
            there = {held.number for held in active}
            gone = [held for held in group.under if held.number not in there]
            if gone:
                group.opened |= self._openers(group.ask, frozenset().union(*(held.hosts for held in gone)))
            passable = self._passable(group, active, now)
            passed = {held.number for held in group.passable}
            if any(held.number not in passed for held in passable):
                group.opened = None
            group.under, group.passable = tuple(active), passable
        if group.opened is None:
            return self._enough(group.ask) or self._block(group)
        return bool(group.opened) and self._enough(group.ask)

    def _block(self, group: Group, under: Sequence[Held] = (), passable: Sequence[Held] = ()) -> bool:
        """Note that a group does not fit, with these reservations in its way; returns false."""
        group.opened, group.under, group.passable = set(), tuple(under), tuple(passable)
        return False

    def _passable(self, group: Group, active: Sequence[Held], now: float) -> tuple[Held, ...]:
        """The reservations that the briefest of a group may pass."""
        briefest = group.brief[0][2]
        return tuple(held for held in active if _passes(briefest, held, now))

    def _try(self, group: Group, ahead: Ahead, now: float) -> Start | None:
        """Find who of a group may start: its first, or a briefer one that may pass reservations ahead."""
        # What has not changed holds it no more than before; what has may be taken again by now.
        if group.opened is not None and not self._shown and not self._openers(group.ask, group.opened):
            self._block(group, group.under, group.passable)
            return None
        policy = self._policies.get(group.policy)
        if not self._shown:
            picks = select(self.fleet, policy, group.ask)
            if picks is None:
                self._block(group)
                return None
            active = [held for held in ahead.resolve() if held.visible is not None]
            if not any(held.touches(picks) for held in self._binding(active, group.ask.windows)):
                return Start(group.entries[0], picks, policy)
        # Whoever may pass takes what is reserved only if there is nothing else.
        active = ahead.resolve()
        hiding = self._binding([held for held in active if held.visible is not None], group.ask.windows)
        self._show(hiding)
        if group.opened is None or self._openers(group.ask, group.opened):
            picks = select(self.fleet, policy, group.ask)
            if picks is not None:
                return Start(group.entries[0], picks, policy)
        passable = self._passable(group, active, now)
        entry: Entry | None = group.entries[0] if passable and hiding else None
        before = hiding
        while entry is not None:
            respected = [held for held in hiding if not _passes(entry, held, now)]
            if len(respected) < len(before):
                self._show(respected)
                picks = select(self.fleet, policy, group.ask)
                if picks is not None:
                    return Start(entry, picks, policy)
            before = respected
            entry = self._briefer(group, respected, now) if respected else None
        self._block(group, active, passable)
        group.seen = ahead.mark()
        return None

    def _briefer(self, group: Group, respected: list[Held], now: float) -> Entry | None:
        """The first of a group that may pass one more of the reservations that the last one had to respect."""
        window = max((held.starts_at for held in respected if not held.entry.claimed), default=math.inf) - now
        if window >= math.inf:
            return None
        at = bisect_left(group.brief, (math.nextafter(window, math.inf),))
        if not at:
            return None
        return min((entry for _, _, entry in group.brief[:at]), key=_order)

    def plan(self, entry: Entry, active: Sequence[Held]) -> Held | None:
        """Choose the reservation of an entry; None if nothing could serve it.

        Args:
            entry: that can't start now.
            active: reservations ahead of it, whose hosts it leaves alone.
        """
        taken: frozenset[str] = frozenset()
        for held in active:
            taken |= held.hosts
        before = entry.held
        reserved = None if before is None else before.reservation
        stay = stay_of(self.fleet, entry.request)
        plan = self._horizons.plan(entry.group.ask, entry.request.owner, taken, reserved, stay)
        if plan is None:
            return None
        if before is None or before.reservation != plan.reservation:
            before = entry.held = Held(entry, plan.reservation, plan.starts_at)
        before.starts_at = plan.starts_at
        before.visible = _visible(self.fleet, plan.reservation)
        return before

    def kinds(self, group: Group) -> frozenset[Capacity]:
        """Kinds of capacity that a group could take; kept until hosts, devices or labels change."""
        if group.shape != self.fleet.shape_version:
            group.kinds, group.shape = could_take(self.fleet, group.ask), self.fleet.shape_version
        return group.kinds

    def _show(self, wanted: list[Held]) -> None:
        """Apply these reservations to the fleet, and no others."""
        if self._shown == wanted:
            return
        self.fleet.index.quiet = True
        shown, stays = set(map(id, self._shown)), set(map(id, wanted))
        for held in self._shown:
            if held.visible is not None and id(held) not in stays:
                unreserve(self.fleet, held.visible)
        for held in wanted:
            if held.visible is not None and id(held) not in shown:
                reserve(self.fleet, held.visible)
        self.fleet.index.quiet = False
        self._shown = wanted

    def _binding(self, active: list[Held], windows: Collection[str]) -> list[Held]:
        """Reservations without the booked devices on which a lease would have ended with its window by their start.

        Args:
            active: visible reservations.
            windows: ids of the windows that are now and for the owner of the request.
        """
        if not windows:
            return active
        fleet, ends_at = self.fleet, self.fleet.bookings.ends_at(windows)
        found: list[Held] = []
        for held in active:
            visible = held.visible
            if visible is None or held.starts_at < ends_at:
                found.append(held)
                continue
            left = tuple(part for part in visible.devices if fleet.devices[part[0]].booked_for not in windows)
            if len(left) == len(visible.devices):
                found.append(held)
            elif left:
                names = {fleet.devices[uuid].host for uuid, _, _ in left}
                hosts = tuple(part for part in visible.hosts if part[0] in names)
                found.append(Held(held.entry, Reservation(visible.owner, left, hosts), held.starts_at))
        return found

    @contextmanager
    def protected(
        self, entry: Entry | None, priority: int, seconds: float, now: float, windows: Collection[str] = ()
    ) -> Generator[Fleet]:
        """Context in which the fleet lacks what is kept from a request: for questions about it.

        Args:
            entry: of the request, if it waits; else it is a newcomer, behind all of its priority.
            priority: of the request.
            seconds: its expected duration.
            now: seconds.
            windows: ids of the booked windows that are now and for its owner.
        """
        order = (-priority, 1, math.inf, 0) if entry is None else entry.order
        ahead = self.held if not self._tenants.active else [held for held in self.held if held.entry is not entry]
        kept = [
            held
            for held in ahead
            if (self._tenants.active or held.entry.order < order)
            and (held.entry.claimed or not _ends_before(held, now + seconds))
        ]
        self._show(self._binding(kept, windows) if windows else kept)
        try:
            yield self.fleet
        finally:
            self._show([])


class _Walk:
    """A turn along the line, which goes on after each start as long as the caller holds what it was given, no more.

    What did not fit before still does not: a lease takes from the fleet, and gives nothing. Reservations stand: who
    starts beside them, or ends before them, does not delay them.
    """

    def __init__(self, line: Line, now: float) -> None:
        self._line = line
        self.turns = line.turns(now)
        self.ahead = Ahead(line)
        self.owed: list[tuple[Group, Ask]] = []
        self._expected: frozenset[str] = frozenset()
        self._changes = self._moved = self._log = 0

    def stop(self, picks: Sequence[Pick]) -> None:
        """Note where it stopped, and for what."""
        line = self._line
        self._expected = frozenset(pick.host.name for pick in picks)
        self._changes, self._moved, self._log = line.changes, line.fleet.index.moved_end, line.ends.log_end

    def goes_on(self) -> bool:
        """True if nothing has changed since, but for the hosts of the last start."""
        line, index, ends = self._line, self._line.fleet.index, self._line.ends
        if self._changes != line.changes or self._moved < index.moved_base or self._log < ends.base:
            return False
        moved, log = index.moved[self._moved - index.moved_base :], ends.log[self._log - ends.base :]
        return self._expected.issuperset(moved) and self._expected.issuperset(log)


class Ahead:
    """Groups that are blocked ahead of a place in the line, and the reservations of their first.

    Reservations are chosen only when something depends on them.
    """

    def __init__(self, line: Line) -> None:
        self._line = line
        self._kinds: set[Capacity] = set()
        self._covered: set[frozenset[Capacity]] = set()
        self._marked = 0
        self._mark: tuple[tuple[int, float], ...] = ()
        self.active: list[Held] = []
        self.blocked: list[Group] = []

    def resolve(self) -> list[Held]:
        """The reservations in force, in order."""
        for group in self.blocked:
            if len(self.active) >= MOST_RESERVATIONS:
                break
            if not group.entries:  # its last one has left
                continue
            kinds = self._line.kinds(group)
            if kinds in self._covered:
                continue
            if not covered(kinds, self._kinds):
                held = self._line.plan(group.entries[0], self.active)
                if held is None:
                    continue
                self.active.append(held)
                self._kinds |= kinds
            self._covered.add(kinds)
        self.blocked = []
        return self.active

    def mark(self) -> tuple[tuple[int, float], ...]:
        """Mark that changes with the reservations in force and their starts."""
        active = self.resolve()
        if len(active) != self._marked:
            self._mark = tuple((held.number, held.starts_at) for held in active)
            self._marked = len(active)
        return self._mark

    def drop(self, entry: Entry) -> None:
        """Drop the reservation of an entry."""
        self.active = [held for held in self.active if held.entry is not entry]


def size_of(fleet: Fleet, ask: Ask) -> float:
    """Dominant share of a request in devices: its devices, or the part of a host's devices that its cores are."""
    devices = ask.devices * ask.share / WHOLE_SHARE
    cores = _cores_per_device(fleet) if ask.cpus_milli else 0.0
    return max(devices, ask.cpus_milli / cores if cores else 0.0)


def _cores_per_device(fleet: Fleet) -> float:
    kept = fleet.cache.get("cores_per_device")
    if kept is None or kept[0] != fleet.shape_version:
        known = [host for host in fleet.hosts.values() if host.cpus_total < UNLIMITED and host.devices]
        devices = sum(len(host.devices) for host in known)
        cores = sum(host.cpus_total for host in known)
        kept = fleet.cache.put("cores_per_device", (fleet.shape_version, cores / devices if devices else 0.0))
    return kept[1]


def _visible(fleet: Fleet, reservation: Reservation) -> Reservation | None:
    """The part of a reservation on hosts with something free, which alone decisions see; None if there is none."""
    open_hosts = {
        name
        for name, cpus, memory in reservation.hosts
        if (host := fleet.hosts.get(name)) is not None and (cpus or memory) and host.state.share_most
    }
    devices: list[tuple[str, int, int]] = []
    for part in reservation.devices:
        device = fleet.devices.get(part[0])
        if device is not None and (device.share_left or device.host in open_hosts):
            devices.append(part)
    hosts = tuple(part for part in reservation.hosts if part[0] in open_hosts)
    if not reservation.devices:  # cores alone
        return reservation
    return Reservation(reservation.owner, tuple(devices), hosts) if devices or hosts else None


def _kept(start: Start) -> Held:
    """Reservation of what a request would take that must not start yet."""
    ask = start.entry.group.ask
    devices: list[tuple[str, int, int]] = []
    hosts: list[tuple[str, int, int]] = []
    for pick in start.picks:
        devices += [(device.uuid, ask.share, memory_for(device, ask)) for device in pick.devices]
        hosts.append((pick.host.name, pick.ask.cpus_milli, pick.ask.host_memory_bytes))
    return Held(start.entry, Reservation(start.entry.request.owner, tuple(devices), tuple(hosts)), NOW)


def _class_until(entry: Entry) -> float:
    """Time from which a request can no longer have ended before the devices are booked that it may use now."""
    ends_by = entry.ask.ends_by
    return ends_by if ends_by == math.inf else math.nextafter(ends_by - lasts_of(entry.request), math.inf)


def _passes(entry: Entry, held: Held, now: float) -> bool:
    return _ends_before(held, now + (entry.estimate.limit if held.entry.claimed else entry.seconds))


def _ends_before(held: Held, ends_at: float) -> bool:
    """True if what ends then would not delay a reservation; one without an expected start is not passed."""
    return ends_at <= held.starts_at < math.inf


__all__ = ["NOW", "Entry", "Group", "Held", "Line", "Order", "Start", "size_of"]
