"""Elastic leases of one term: offers of idle devices, requests to give devices back, and the answers of the holders.

Devices are offered while no request in the queue could use them, and are not held meanwhile: the holder gets them if
they are still free when it accepts. For a request that waits, leases are asked for what they have beyond their fewest
devices, before any lease is preempted for it. A holder that does not agree in time keeps what it has.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Coroutine, Iterator
from datetime import datetime
from itertools import chain
from typing import Any, Final

from msgspec.structs import replace

from ....schemas.requests import Grant, Lease, LeaseState, Placement, ResizeAction, ResizeKind, WorkRequest
from ...durable.store import Deposed, WriteFailed
from ...fleet.fleet import Fleet
from ...fleet.state import Ask, milli
from ...leases import lifecycle, resizing
from ...leases.ledger import Ledger, clock
from ...leases.lifecycle import LeaseRecord, Refused
from ...leases.resizing import Claimant, devices_of, is_asked, may_grow_by, may_shrink_by
from ...placement.decide import Placed, Policies, addresses, ask_of, environment, placed
from ...placement.exact import Pick
from ...placement.feasible import device_verdict
from ...queue.elastic import Surplus, growth_ask, largest, returns, sized, wanted
from ...queue.line import Entry, Line
from ..lease_commands import LeaseCommands
from ..pending import Responder
from ..waiting.queue import QueuedRequest, WaitingQueue
from ..windows import in_window
from .accounts import GroupAccounts

log = logging.getLogger("corral.planner.broker.quotas.resizer")

LOOK_SECONDS: Final = 0.5
"""Interval of the checks for notices that are over, and for devices to offer."""
DECLINED_SECONDS: Final = 60.0
"""Time after which a lease whose holder did not agree gets another notice; for offers it doubles each time."""
_DECLINED_MOST_SECONDS: Final = 3600.0
_LOOK_AGAIN_SECONDS: Final = 2.0
"""Interval of the search for devices for requests that found none, while nothing changes."""
_MOST_ASKING: Final = 16
"""Limit on the waiting requests for which devices are searched at once."""


class Resizer:
    """Notices to the holders of elastic leases, and their answers.

    Args:
        fleet: live state.
        ledger: leases of the term.
        accounts: of the groups.
        line: the waiting requests.
        queue: their clients.
        policies: rank devices.
        commands: answer holders.
        planner: id of this planner.
        start: starts a task of the term.
    """

    def __init__(
        self,
        fleet: Fleet,
        ledger: Ledger,
        accounts: GroupAccounts,
        line: Line,
        queue: WaitingQueue,
        policies: Policies,
        commands: LeaseCommands,
        planner: str,
        start: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._fleet = fleet
        self._ledger = ledger
        self._accounts = accounts
        self._line = line
        self._queue = queue
        self._policies = policies
        self._commands = commands
        self._planner = planner
        self._start = start
        self._elastic: dict[str, None] = {}
        """Ids of the active elastic leases, oldest first."""
        self._asked: dict[str, tuple[str, str]] = {}
        """Leases that are asked to give devices back, or about to be; owner and id of the request that gets them."""
        self._offers: dict[str, tuple[float, float]] = {}
        """Time before which a lease gets no offer, and the pause before; of those whose holder did not agree."""
        self._spared_until: dict[str, float] = {}
        self._asking: set[str] = set()
        """Those of `_asked` whose notice is being written."""
        self._looked_at: tuple[int, int, int] | None = None
        self._look_again_at = 0.0
        records = [record for record in ledger.table if record.lease.elastic is not None]
        for record in sorted(records, key=lambda record: record.lease.granted_at):
            self.granted(record.lease)

    # Leases

    def granted(self, lease: Lease) -> None:
        """Note an active lease, if it is elastic."""
        if lease.elastic is not None and lease.state is LeaseState.ACTIVE:
            self._elastic[lease.lease_id] = None
            if lease.resize is not None and is_asked(lease) and lease.resize.claimant:
                self._asked[lease.lease_id] = lease.resize.claimant_owner, lease.resize.claimant

    def ended(self, lease_id: str) -> None:
        """Note that a lease ended."""
        for known in (self._elastic, self._asked, self._offers, self._spared_until):
            known.pop(lease_id, None)

    def asks_for(self, queued: QueuedRequest) -> bool:
        """True if leases have been asked to give devices back for a request, and may still agree."""
        return (queued.request.owner, queued.request.request_id or "") in self._asked.values()

    def asked_back(self, queued: QueuedRequest) -> int:
        """Number of devices that leases have been asked to give back for a request, and may still."""
        key = queued.request.owner, queued.request.request_id or ""
        records = (self._ledger.table.get(lease_id) for lease_id, claim in self._asked.items() if claim == key)
        notices = (record.lease.resize for record in records if record is not None)
        return sum(len(each.grants) for each in notices if each is not None and each.kind is ResizeKind.REQUEST)

    # At the grant

    def with_more(self, request: WorkRequest, placement: Placed) -> Placed:
        """Placement of an elastic request with as many devices as it may have at once; as it is for any other."""
        most = request.gpus_max
        if most is None:
            return placement
        policy = self._policies.get(request.policy)
        booked = in_window(self._fleet, request.owner, placement.grants)
        inside = self._fleet.bookings.inside(request.owner) if booked else ()
        found = largest(
            self._fleet, policy, lambda count: self._ask(request, count, (), inside), request.gpus + 1, most
        )
        return placement if found is None else self._placed(request, found)

    def _placed(self, request: WorkRequest, found: tuple[int, list[Pick]]) -> Placed:
        count, picks = found
        plain = sized(request, count)
        return placed(plain, ask_of(self._fleet, plain), self._policies.get(request.policy), picks)

    def _ask(self, request: WorkRequest, count: int, barred: Collection[str], windows: tuple[str, ...]) -> Ask | None:
        """Devices that an elastic request may use without delaying others; None if there are none."""
        others = wanted(self._fleet, self._line.groups)
        if others is None and (request.cpus or request.host_memory_bytes):
            return None
        found = {*barred, *(others or ())}
        if self._accounts.active:
            state = self._accounts.state
            state.note_fleet(self._fleet)
            ask = growth_ask(self._fleet, request, count, (), windows)
            admission = state.admission(self._fleet, request.owner, ask, request.preemptible)
            if admission.barred is None:
                return None
            found.update(admission.barred)
        return growth_ask(self._fleet, request, count, found, windows)

    # Growth

    async def look(self) -> float:
        """End the notices that are over, and offer idle devices; returns the seconds until the next check."""
        now = clock()
        offered: set[str] = set()
        for lease_id in list(self._elastic):
            record = self._ledger.table.get(lease_id)
            resize = None if record is None else record.lease.resize
            if record is None or resize is None:
                continue
            if now > resize.ends_at:
                await self._withdraw(lease_id, resize.number)
                self._not_agreed(lease_id, resize.kind)
            elif resize.kind is ResizeKind.OFFER:
                if self._taken(record, resize.grants):
                    await self._withdraw(lease_id, resize.number)
                else:
                    offered.update(grant.device for grant in resize.grants)
        self._end_claims()
        for record in self._growing(now):
            grants = self._found_for(record, now)
            if grants and offered.isdisjoint(grant.device for grant in grants):
                offered.update(grant.device for grant in grants)
                await self._change(record.lease.lease_id, lambda current, grants=grants: self._offer(current, grants))
        return LOOK_SECONDS

    def _offer(self, record: LeaseRecord, grants: list[Grant]) -> LeaseRecord:
        """Offer devices, unless somebody has got one since they were chosen."""
        return record if self._taken(record, grants) else resizing.offer(record, grants, clock(), self._planner)

    def _growing(self, now: datetime) -> list[LeaseRecord]:
        """Leases that may be offered devices: those of the groups with the least use first, then the oldest."""
        found: list[LeaseRecord] = []
        stamp = now.timestamp()
        for lease_id in self._elastic:
            record = self._ledger.table.get(lease_id)
            if record is None or record.request is None or not may_grow_by(record.lease):
                continue
            if self._offers.get(lease_id, (0.0, 0.0))[0] <= stamp:
                found.append(record)
        found.sort(key=lambda record: self._share(record.lease.owner, stamp))
        return found

    def _found_for(self, record: LeaseRecord, now: datetime) -> list[Grant]:
        """Idle devices of the models that a lease has, on its hosts if possible."""
        lease, request = record.lease, _left(record, now)
        if request is None:
            return []
        windows = self._windows(lease)
        names = list(dict.fromkeys(grant.host for grant in lease.grants))
        if any(char in name for name in names for char in "*?["):  # not a pattern that means this host alone
            return []
        own = {grant.model for grant in lease.grants}
        others = {device.model.name for device in self._fleet.devices.values()} - own
        wheres = [replace(request, hosts=names)]
        if request.placement is not Placement.SAME_HOST:
            # Other hosts may not share the labels that its hosts have to share.
            wheres += [] if request.within else [request]
        elif not any(self._any_free(name) for name in names):
            return []
        for where in wheres:
            found = largest(
                self._fleet,
                self._policies.get(request.policy),
                lambda count, where=where: self._ask(where, count, others, windows),
                1,
                may_grow_by(lease),
            )
            if found is not None:
                return self._placed(where, found).grants
        return []

    def _windows(self, lease: Lease) -> tuple[str, ...]:
        """Windows that are now, whose devices a lease in one of them may have until it ends."""
        bookings = self._fleet.bookings
        if not lease.window or lease.ends_at is None:
            return ()
        ends_at = lease.ends_at.timestamp()
        return tuple(each for each in bookings.inside(lease.owner) if ends_at <= bookings.ends_at((each,)))

    def _any_free(self, name: str) -> bool:
        host = self._fleet.hosts.get(name)
        return host is not None and any(device.whole for device, _ in host.state.kinds)

    def _taken(self, record: LeaseRecord, grants: list[Grant]) -> str:
        """Reason why a lease can't have devices that were offered to it; empty if it can."""
        request, fleet = _left(record, clock()), self._fleet
        if request is None:
            return "what was asked for is not known any more"
        ask = self._ask(request, len(grants), (), self._windows(record.lease))
        if ask is None:
            return "quotas or requests in the queue are in the way"
        cpus: dict[str, tuple[int, int]] = {}
        for grant in grants:
            device = fleet.devices.get(grant.device)
            why = "unknown" if device is None or device.host != grant.host else device_verdict(device.state, ask)
            if why:
                return f"{grant.device} is not free any more ({why})"
            before = cpus.get(grant.host, (0, 0))
            cpus[grant.host] = before[0] + milli(grant.cpus), before[1] + grant.host_memory_bytes
        for name, (cores, memory) in cpus.items():
            free_cores, free_memory = fleet.hosts[name].unheld
            if cores > free_cores or memory > free_memory:
                return f"host {name} has not enough cores or RAM left"
        return ""

    # Giving back

    def serve(self) -> None:
        """Ask for devices back for the requests that wait; to be called after a walk along the line."""
        self._end_claims()
        if not self._elastic:
            return
        looked = (self._line.changes, self._fleet.index.moved_end, len(self._asked))
        now = time.monotonic()
        if looked == self._looked_at and now < self._look_again_at:
            return
        surpluses = self._surpluses()
        if not surpluses:
            return
        self._looked_at, self._look_again_at = looked, now + _LOOK_AGAIN_SECONDS
        for entry, ask in self._waiting():
            queued: QueuedRequest = entry.payload
            if self.asks_for(queued):
                continue
            back = returns(self._fleet, ask, surpluses)
            for lease_id, uuids in (back or {}).items():
                self._asked[lease_id] = queued.request.owner, queued.request.request_id or ""
                self._asking.add(lease_id)
                self._start(self._ask_back(lease_id, uuids, queued))
            surpluses = [each for each in surpluses if each.lease_id not in self._asked]
            if not surpluses:
                break

    def _waiting(self) -> Iterator[tuple[Entry, Ask]]:
        """Requests for which devices may be asked back, with what they ask for: those first that are owed it."""
        seen: set[int] = set()
        in_line = ((entry.group, entry.group.ask) for entry in self._line)
        left = _MOST_ASKING
        for group, ask in chain(self._line.owed, in_line):
            if id(group) in seen:
                continue
            seen.add(id(group))
            if group.refused or group.limited is not None:
                continue
            for entry in list(group.entries):
                if entry.ready:
                    yield entry, ask
                    left -= 1
                if not left:
                    return

    def _surpluses(self) -> list[Surplus]:
        """Devices that leases could give back: of groups with the most use first, then by priority, then the most."""
        now = time.time()
        found: list[tuple[tuple[float, int, int, str], Surplus]] = []
        for lease_id in self._elastic:
            record = self._ledger.table.get(lease_id)
            spared = lease_id in self._asked or self._spared_until.get(lease_id, 0.0) > now
            if record is None or spared or is_asked(record.lease) or not (spare := may_shrink_by(record.lease)):
                continue
            lease = record.lease
            latest = sorted(
                (grant for grant in lease.grants if grant.device),
                key=lambda grant: -(grant.since or lease.granted_at).timestamp(),
            )
            order = -self._share(lease.owner, now), lease.priority, -spare, lease_id
            found.append((order, Surplus(lease_id, [grant.device for grant in latest], spare)))
        found.sort(key=lambda each: each[0])
        return [surplus for _, surplus in found]

    def _share(self, owner: str, now: float) -> float:
        state = self._accounts.state
        return state.share(state.node_of(owner), now) if self._accounts.active else 0.0

    async def _ask_back(self, lease_id: str, uuids: list[str], queued: QueuedRequest) -> None:
        request = queued.request
        group = self._accounts.group_of(request.owner)
        claimant = Claimant(request.request_id or "", request.owner, group)
        try:
            await self._change(
                lease_id, lambda current: resizing.ask_back(current, uuids, claimant, clock(), self._planner)
            )
        finally:
            self._asking.discard(lease_id)

    def _end_claims(self) -> None:
        """Withdraw the notices of requests that have left the queue; forget those that are not out any more."""
        for lease_id, (owner, request_id) in list(self._asked.items()):
            if lease_id in self._asking:
                continue
            record = self._ledger.table.get(lease_id)
            resize = None if record is None else record.lease.resize
            if resize is None or resize.kind is not ResizeKind.REQUEST:
                del self._asked[lease_id]
            elif self._queue.find(owner, request_id) is None:
                del self._asked[lease_id]
                self._start(self._withdraw(lease_id, resize.number))

    # Answers

    async def answer(self, action: ResizeAction, caller: Responder) -> None:
        """Carry out the answer of a holder. Idempotent: an answer that names the notice may be repeated."""
        declined: list[ResizeKind] = []
        """Notices that the holder declines: also offers, if it has given devices back unasked."""

        def step(record: LeaseRecord | None) -> LeaseRecord:
            held, now = lifecycle.check_holder(record, action.lease_id, action.owner), clock()
            about = resizing.answered(held, action, now)
            resize = held.lease.resize
            if about is None:
                return held
            if not about and resize is not None:
                declined.append(resize.kind)
                return resizing.withdraw(held, resize.number, now, self._planner)
            named = {grant.device for grant in about}
            if named <= set(devices_of(held.lease)):
                if resize is None or resize.kind is ResizeKind.OFFER:
                    declined.append(ResizeKind.OFFER)
                grants = [grant for grant in held.lease.grants if grant.device not in named]
            else:
                if why := self._taken(held, about):
                    raise Refused("conflict", f"Lease {held.lease.lease_id} stays as it is: {why}", "$.devices")
                grants = [*held.lease.grants, *about]
            after = resizing.resized(
                held,
                grants,
                environment(self._fleet, grants, held.lease.lease_id),
                addresses(self._fleet, grants),
                now,
                self._planner,
            )
            if not self._ledger.fits(after):
                raise Refused("too_large", f"Lease {held.lease.lease_id} would not fit in a message with them")
            return after

        await self._commands.change(action, step, caller)
        if declined:
            self._not_agreed(action.lease_id, declined[0])

    def resized(self, record: LeaseRecord) -> None:
        """Note that a lease has other devices."""
        self._asked.pop(record.lease.lease_id, None)
        self._offers.pop(record.lease.lease_id, None)

    def _not_agreed(self, lease_id: str, kind: ResizeKind) -> None:
        now = time.time()
        if kind is ResizeKind.REQUEST:
            self._asked.pop(lease_id, None)
            self._spared_until[lease_id] = now + DECLINED_SECONDS
            return
        pause = min(max(DECLINED_SECONDS, 2 * self._offers.get(lease_id, (0.0, 0.0))[1]), _DECLINED_MOST_SECONDS)
        self._offers[lease_id] = now + pause, pause

    async def _withdraw(self, lease_id: str, number: int) -> None:
        await self._change(lease_id, lambda current: resizing.withdraw(current, number, clock(), self._planner))

    async def _change(self, lease_id: str, step: Callable[[LeaseRecord], LeaseRecord]) -> Lease | None:
        """Change a lease for no client; None if it stays as it is."""
        try:
            return await self._ledger.change(lease_id, lambda record: None if record is None else step(record))
        except (Refused, Deposed, WriteFailed) as error:
            log.info("lease %s gets no notice: %s", lease_id, error)
            return None


def _left(record: LeaseRecord, now: datetime) -> WorkRequest | None:
    """The request of a lease, with the `max_seconds` that are left; None if it is not known any more."""
    ends_at = record.lease.ends_at
    if record.request is None or ends_at is None:
        return record.request
    return replace(record.request, max_seconds=max(1.0, (ends_at - now).total_seconds()))
