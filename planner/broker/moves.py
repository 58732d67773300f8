"""Plans of moves: the leases to preempt so that whole hosts become free, or a waiting request can start."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from ...schemas import globs
from ...schemas.moves import Move, Moves, MovesQuery
from ...schemas.requests import Error, Lease, LeaseState, WorkRequest
from ..fleet.fleet import Fleet, Host
from ..fleet.state import WHOLE_SHARE
from ..groups.state import amounts_of
from ..groups.use import Barred
from ..leases.ledger import Ledger
from ..leases.lifecycle import preemptible_from
from ..queue.line import Entry, Line
from ..queue.move_sites import sites_for, whole_hosts, why_not_free
from ..queue.moves import Choice, best_of
from ..queue.reclaim import price_of
from .queue import QueuedRequest, WaitingQueue

NAMED: Final = 3
"""Limit on the hosts that an answer names as those that can't be freed."""


class MovePlanner:
    """Planner of moves; it changes nothing.

    Args:
        fleet: live state.
        ledger: leases of the term.
        line: the waiting requests.
        queue: their clients.
        barred_of: returns the models that quotas keep from a request; or, if they let it take nothing, the reason.
        asked_back: returns the number of devices that elastic leases have been asked to give back for a request.
    """

    def __init__(
        self,
        fleet: Fleet,
        ledger: Ledger,
        line: Line,
        queue: WaitingQueue,
        barred_of: Callable[[WorkRequest], Barred | str],
        asked_back: Callable[[QueuedRequest], int],
    ) -> None:
        self._fleet = fleet
        self._ledger = ledger
        self._line = line
        self._queue = queue
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
        barred = self._barred_of(request)
        if isinstance(barred, str):
            text = f"the request of {request.owner} can't start, whatever leases of others go: {barred}"
            found = Moves(possible=False, message=text)
        else:
            key = entry.ask.key._replace(prefer_within="", barred=barred)
            choice = best_of(sites_for(self._fleet, self._fleet.ask(key), made.prices, made.going), made.prices)
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


class _Plan:
    """Leases that may be taken, with what each would lose, as of now."""

    def __init__(self, fleet: Fleet, ledger: Ledger) -> None:
        self._fleet = fleet
        self._now = time.time()
        self._leases: dict[str, tuple[Lease, float]] = {}
        self.prices: dict[str, float] = {}
        going: set[str] = set()
        for record in ledger.table:
            lease = record.lease
            if lease.state is not LeaseState.ACTIVE:
                continue
            if lease.preemption is not None:
                going.add(lease.lease_id)
            elif lease.preemptible and preemptible_from(lease).timestamp() <= self._now:
                devices = sum(amounts_of(fleet, lease.grants).devices.values()) / WHOLE_SHARE
                self._leases[lease.lease_id] = lease, devices
                self.prices[lease.lease_id] = price_of(lease, devices, self._now)
        self.going = frozenset(going)

    def hosts(self, query: MovesQuery, wanted: int) -> Moves:
        """Moves that free whole hosts."""
        hosts = [host for _, host in sorted(self._fleet.hosts.items()) if _matches(host, query)]
        if not hosts:
            return Moves(possible=False, message="the fleet has no host with such a name and such devices")
        sites = whole_hosts(self._fleet, hosts, self.prices, self.going)
        choice = best_of([(sites, wanted)], self.prices)
        what = f"{_counted(wanted, 'host')} would be free"
        if choice is None:
            text = f"at most {_counted(len(sites), 'host')} could be freed"
            return Moves(possible=False, message=f"{text}: {self._rest(hosts, {site.name for site in sites})}")
        gone = frozenset(choice.leases)
        free = sorted(site.name for site in sites if site.units(gone))
        return replace(self.answer(choice, what), free_hosts=free)

    def _rest(self, hosts: list[Host], freed: AbstractSet[str]) -> str:
        """The hosts that can't be freed, with the reason of each."""
        rest = [host for host in hosts if host.name not in freed]
        if not rest:
            return "there are no more that match"
        reasons = [f"{host.name} ({why_not_free(self._fleet, host, self.prices, self.going)})" for host in rest[:NAMED]]
        more = len(rest) - NAMED
        return f"not {', '.join(reasons)}{f', and {more} more' if more > 0 else ''}"

    def answer(self, choice: Choice | None, what: str) -> Moves:
        """Moves of a choice, with gain and price in words."""
        if choice is None:
            text = f"{what} only if more went than the leases that are preemptible (now): these are not enough"
            return Moves(possible=False, message=text)
        moves = sorted((self._move(lease) for lease in choice.leases), key=lambda each: each.price_gpu_seconds)
        if not moves:
            return Moves(possible=True, message=f"{what}: no lease has to go{' further' if self.going else ''}")
        least = "" if choice.proven else "; fewer may do: there are too many to search"
        price = f"{choice.price / 3600:.1f} GPU-hours" if choice.price >= 360 else f"{choice.price:.0f} GPU-seconds"
        text = f"{what} if {_counted(len(moves), 'lease')} went, which would lose {price} of work{least}"
        return Moves(possible=True, message=text, moves=moves, price_gpu_seconds=choice.price, proven=choice.proven)

    def _move(self, lease_id: str) -> Move:
        lease, devices = self._leases[lease_id]
        return Move(
            lease_id=lease_id,
            owner=lease.owner,
            name=lease.name,
            group=lease.group,
            devices=devices,
            hosts=sorted({grant.host for grant in lease.grants}),
            since=lease.saved_at or lease.granted_at,
            price_gpu_seconds=self.prices[lease_id],
            grace_seconds=lease.grace_seconds,
        )


def _matches(host: Host, query: MovesQuery) -> bool:
    if query.hosts and not globs.matches_any(host.name.lower(), [glob.lower() for glob in query.hosts]):
        return False
    wanted = [glob.lower() for glob in query.models]
    return not wanted or all(globs.matches_any(device.model.name.lower(), wanted) for device in host.devices)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
