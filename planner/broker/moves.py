"""Plans of moves: leases to preempt, or to shrink, so that whole hosts become free, or a waiting request can start.

A request must also be allowed by quotas to take what comes free, with the leases gone. The choice is first made without
quotas. If that is not allowed, choices among the leases of the groups around its owner are compared, whose end makes
room under their limits; these may not be the fewest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from copy import copy
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from ...schemas.limits import GRACE_SECONDS
from ...schemas.requests import Error, Grant, Lease, LeaseState, WorkRequest
from ...schemas.values import globs
from ...schemas.work.moves import Move, Moves, MovesQuery
from ..fleet.fleet import Fleet, Host
from ..fleet.state import WHOLE_SHARE, Ask
from ..groups.state import amounts_of
from ..groups.use import Barred
from ..leases.ledger import Ledger
from ..leases.lifecycle import preemptible_from
from ..leases.resizing import is_asked, may_shrink_by
from ..queue.line import Entry, Line
from ..queue.move_sites import sites_for, whole_hosts, why_not_free
from ..queue.moves import Choice, best_of
from ..queue.reclaim import price_of
from .quotas.accounts import GroupAccounts
from .waiting.queue import QueuedRequest, WaitingQueue

NOTHING_BACK: Final[Mapping[str, Sequence[str]]] = {}
NAMED: Final = 3
"""Limit on the hosts that an answer names as those that can't be freed."""


class MovePlanner:
    """Planner of moves; it changes nothing.

    Args:
        fleet: live state.
        ledger: leases of the term.
        line: the waiting requests.
        queue: their clients.
        accounts: of the groups.
        barred_of: returns the models that quotas keep from a request; or, if they let it take nothing, the reason.
        asked_back: returns the number of devices that elastic leases have been asked to give back for a request.
    """

    def __init__(
        self,
        fleet: Fleet,
        ledger: Ledger,
        line: Line,
        queue: WaitingQueue,
        accounts: GroupAccounts,
        barred_of: Callable[[WorkRequest], Barred | str],
        asked_back: Callable[[QueuedRequest], int],
    ) -> None:
        self._fleet = fleet
        self._ledger = ledger
        self._line = line
        self._queue = queue
        self._accounts = accounts
        self._barred_of = barred_of
        self._asked_back = asked_back

    def plan(self, query: MovesQuery) -> Struct:
        """Answer a query: `Moves`, or an error about its fields."""
        if query.free_hosts is None and (query.hosts or query.models):
            field = "hosts" if query.hosts else "models"
            return Error(code="invalid", message=f"{field} narrows free_hosts: say how many", field=f"$.{field}")
        if query.free_hosts is not None:
            if query.request_id is not None or query.owner is not None:
                return Error(code="invalid", message="Name free_hosts or a request, not both", field="$.free_hosts")
            return _Plan(self._fleet, self._ledger).hosts(query, query.free_hosts)
        if query.request_id is None and query.owner is not None:
            return Error(code="invalid", message="owner narrows request_id: name the request", field="$.owner")
        queued: QueuedRequest | Error | None = self._next() if query.request_id is None else self._named(query)
        if isinstance(queued, Error):
            return queued
        if queued is None:
            return Moves(possible=True, message="no request waits")
        return self._request(queued.entry)

    def _next(self) -> QueuedRequest | None:
        """The request that is next in the queue; the first in order if quotas let none start."""
        group = self._line.turns(time.time()).next()
        entry = next(iter(self._line), None) if group is None else group.entries[0]
        return None if entry is None else entry.payload

    def _named(self, query: MovesQuery) -> QueuedRequest | Error:
        assert query.request_id is not None
        found = [each for each in self._queue.named(query.request_id) if query.owner in (None, each.request.owner)]
        if not found:
            text = f"No request {query.request_id!r} waits: it never did, or it has its answer"
            return Error(code="not_found", message=text, field="$.request_id")
        if len(found) > 1:
            return Error(code="invalid", message="Several owners use this id: name the owner", field="$.owner")
        return found[0]

    def _request(self, entry: Entry) -> Moves:
        request, ahead = entry.request, self._line.position(entry) - 1
        made = _Plan(self._fleet, self._ledger)
        choice, why = self._allowed(entry, made)
        if choice is None and why:
            text = f"the request of {request.owner} can't start, whatever leases go: {why}"
            found = Moves(possible=False, message=text)
        else:
            what = f"the request of {request.owner} for {_counted(request.gpus, 'device')} could start"
            found = made.answer(choice, what)
        asked = self._asked_back(entry.payload)
        if asked:
            more = f"elastic leases have been asked to give {_counted(asked, 'device')} back for it"
            found = replace(found, message=f"{found.message}; {more}")
        if ahead and found.possible:
            more = f"{_counted(ahead, 'request')} ahead of it may take what comes free"
            found = replace(found, message=f"{found.message}; {more}")
        return replace(found, request_id=request.request_id or "", owner=request.owner, ahead=ahead)

    def _allowed(self, entry: Entry, made: _Plan) -> tuple[Choice | None, str]:
        """The best choice by which quotas let a request start; or None, and why they don't, if it is them."""
        least = made.choose(self._ask(entry, ()))
        if least is None or not self._accounts.active:
            return least, ""
        if self._starts(entry, made, least):
            return least, ""
        around = self._around(entry.request.owner, made)
        if isinstance(why := self._barred(entry, made, least.leases, [*around]), str):
            return None, why
        choices = [
            made.choose(self._ask(entry, barred))
            for barred in (self._barred(entry, made),)
            if not isinstance(barred, str)
        ]
        choices.append(made.only(around).choose(self._ask(entry, ())))
        choices.append(self._making_room(entry, made, around))
        found = [choice for choice in choices if choice is not None and self._starts(entry, made, choice)]
        if not found:
            return None, "quotas don't let it take what could come free"
        best = min(found, key=lambda choice: choice.cost)
        return best._replace(proven=least.proven and best.cost[:3] == least.cost[:3]), ""

    def _making_room(self, entry: Entry, made: _Plan, around: Collection[str]) -> Choice | None:
        """Leases of the groups around a request without which it is within their limits, and what it needs besides."""
        room = sorted(around, key=lambda lease: (-made.prices[lease], lease))
        for lease in list(room):
            if not isinstance(self._barred(entry, made, [each for each in room if each != lease]), str):
                room.remove(lease)
        barred = self._barred(entry, made, room)
        rest = None if isinstance(barred, str) else made.without(room).choose(self._ask(entry, barred))
        if rest is None:
            return None
        found = made.priced(rest, room)
        for lease in room:  # the others may do
            fewer = made.priced(rest, [each for each in found.leases if each != lease])
            if lease not in rest.leases and self._starts(entry, made, fewer):
                found = fewer
        return found

    def _around(self, owner: str, made: _Plan) -> dict[str, None]:
        """Leases that may be preempted of the groups around an owner."""
        state = self._accounts.state
        own = set(state.node_of(owner).path)
        return {lease: None for lease in made.prices if not own.isdisjoint(state.node_of(made.lease(lease).owner).path)}

    def _ask(self, entry: Entry, barred: Barred) -> Ask:
        return self._fleet.ask(entry.ask.key._replace(prefer_within="", barred=barred))

    def _barred(self, entry: Entry, made: _Plan, *gone: Collection[str]) -> Barred | str:
        """Models that quotas keep from a request once leases are gone; or why they let it take nothing."""
        with self._accounts.with_held(made.held_without([lease for some in gone for lease in some])):
            return self._barred_of(entry.request)

    def _starts(self, entry: Entry, made: _Plan, choice: Choice) -> bool:
        """True if quotas let a request take what a choice frees."""
        with self._accounts.with_held(made.held_without(choice.leases, choice.back)):
            barred = self._barred_of(entry.request)
        return not isinstance(barred, str) and made.suffices(self._ask(entry, barred), choice)


class _Plan:
    """Leases that may be taken, and devices that elastic leases may give back, with what each would lose, as of now.

    Attributes:
        prices: of the leases that may be preempted.
        spare: number of devices that elastic leases may be asked for.
        going: leases that end anyway.
    """

    def __init__(self, fleet: Fleet, ledger: Ledger) -> None:
        self._fleet = fleet
        self._now = time.time()
        self._leases: dict[str, tuple[Lease, float]] = {}
        self.prices: dict[str, float] = {}
        self.spare: dict[str, int] = {}
        going: set[str] = set()
        for record in ledger.table:
            lease = record.lease
            if lease.state is not LeaseState.ACTIVE:
                continue
            if lease.preemption is not None:
                going.add(lease.lease_id)
                continue
            spare = 0 if is_asked(lease) else may_shrink_by(lease)
            ends = lease.preemptible and preemptible_from(lease).timestamp() <= self._now
            if not (spare or ends):
                continue
            devices = sum(amounts_of(fleet, lease.grants).devices.values()) / WHOLE_SHARE
            self._leases[lease.lease_id] = lease, devices
            if spare:
                self.spare[lease.lease_id] = spare
            if ends:
                self.prices[lease.lease_id] = price_of(lease, devices, self._now)
        self.going = frozenset(going)

    def lease(self, lease_id: str) -> Lease:
        """One of the leases that may be taken."""
        return self._leases[lease_id][0]

    def only(self, leases: Collection[str]) -> _Plan:
        """The same with these leases alone to take."""
        found = copy(self)
        found.prices = {lease: self.prices[lease] for lease in self.prices if lease in leases}
        found.spare = {lease: self.spare[lease] for lease in self.spare if lease in leases}
        return found

    def without(self, leases: Collection[str]) -> _Plan:
        """The same with these leases gone."""
        found = self.only((self.prices.keys() | self.spare.keys()) - set(leases))
        found.going = self.going | set(leases)
        return found

    def priced(self, choice: Choice, more: Collection[str]) -> Choice:
        """A choice with further leases that end."""
        leases = tuple(sorted({*choice.leases, *more}))
        back = {lease: uuids for lease, uuids in choice.back.items() if lease not in leases}
        return Choice(leases, sum(self.prices[lease] for lease in leases), proven=False, back=back)

    def choose(self, ask: Ask) -> Choice | None:
        """The best choice by which a request could start, were there no quotas."""
        return best_of(sites_for(self._fleet, ask, self.prices, self.going, self.spare), self.prices)

    def suffices(self, ask: Ask, choice: Choice) -> bool:
        """True if a request could start with what a choice frees."""
        alternatives = sites_for(self._fleet, ask, self.prices, self.going, self.spare)
        return any(sum(site.units(choice.gone) for site in sites) >= wanted for sites, wanted in alternatives)

    def held_without(
        self, gone: Collection[str], back: Mapping[str, Sequence[str]] = NOTHING_BACK
    ) -> dict[str, list[Grant]]:
        """Holdings of leases that end or give devices back: nothing, or the rest."""
        held: dict[str, list[Grant]] = {lease: [] for lease in (*self.going, *gone)}
        for lease_id, uuids in back.items():
            held[lease_id] = [grant for grant in self.lease(lease_id).grants if grant.device not in uuids]
        return held

    def hosts(self, query: MovesQuery, wanted: int) -> Moves:
        """Moves that free whole hosts."""
        hosts = [host for _, host in sorted(self._fleet.hosts.items()) if _matches(host, query)]
        if not hosts:
            return Moves(possible=False, message="the fleet has no host with such a name and such devices")
        sites = whole_hosts(self._fleet, hosts, self.prices, self.going, self.spare)
        choice = best_of([(sites, wanted)], self.prices)
        what = f"{_counted(wanted, 'host')} would be free"
        if choice is None:
            text = f"at most {_counted(len(sites), 'host')} could be freed"
            return Moves(possible=False, message=f"{text}: {self._rest(hosts, {site.name for site in sites})}")
        free = sorted(site.name for site in sites if site.units(choice.gone))
        return replace(self.answer(choice, what), free_hosts=free)

    def _rest(self, hosts: list[Host], freed: AbstractSet[str]) -> str:
        """The hosts that can't be freed, with the reason of each."""
        rest = [host for host in hosts if host.name not in freed]
        if not rest:
            return "there are no more that match"
        reasons = [f"{host.name} ({self._why_not(host)})" for host in rest[:NAMED]]
        more = len(rest) - NAMED
        return f"not {', '.join(reasons)}{f', and {more} more' if more > 0 else ''}"

    def _why_not(self, host: Host) -> str:
        why = why_not_free(self._fleet, host, self.prices, self.going, self.spare)
        return why or "its elastic leases can't leave so many hosts"

    def answer(self, choice: Choice | None, what: str) -> Moves:
        """Moves of a choice, with gain and price in words."""
        if choice is None:
            text = f"{what} only if more went than the leases that are preemptible (now): these are not enough"
            return Moves(possible=False, message=text)
        moves = [self._move(lease) for lease in choice.leases]
        moves += [self._move(lease, uuids) for lease, uuids in choice.back.items()]
        moves.sort(key=lambda each: (each.price_gpu_seconds, each.lease_id))
        if not moves:
            return Moves(possible=True, message=f"{what}: no lease has to go{' further' if self.going else ''}")
        least = "" if choice.proven else "; fewer may do: there are too many to search"
        price = f"{choice.price / 3600:.1f} GPU-hours" if choice.price >= 360 else f"{choice.price:.0f} GPU-seconds"
        ways = [f"{_counted(len(choice.leases), 'lease')} went"] if choice.leases else []
        if choice.back:
            devices = sum(map(len, choice.back.values()))
            ways.append(f"{_counted(len(choice.back), 'elastic lease')} gave {_counted(devices, 'device')} back")
        lost = f"would lose {price} of work" if choice.leases else "loses no work"
        text = f"{what} if {' and '.join(ways)}, which {lost}{least}"
        return Moves(possible=True, message=text, moves=moves, price_gpu_seconds=choice.price, proven=choice.proven)

    def _move(self, lease_id: str, back: Sequence[str] = ()) -> Move:
        lease, devices = self._leases[lease_id]
        return Move(
            lease_id=lease_id,
            owner=lease.owner,
            name=lease.name,
            group=lease.group,
            devices=devices,
            hosts=sorted({grant.host for grant in lease.grants}),
            since=lease.saved_at or lease.granted_at,
            price_gpu_seconds=0.0 if back else self.prices[lease_id],
            grace_seconds=(lease.grace_seconds or GRACE_SECONDS) if back else lease.grace_seconds,
            gives_back=sorted(back),
        )


def _matches(host: Host, query: MovesQuery) -> bool:
    if query.hosts and not globs.matches_any(host.name.lower(), [glob.lower() for glob in query.hosts]):
        return False
    wanted = [glob.lower() for glob in query.models]
    return not wanted or all(globs.matches_any(device.model.name.lower(), wanted) for device in host.devices)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
