"""Preempts leases of groups that use more than they are guaranteed, for requests of groups that use less.

A claim is a request with the leases that have been given notice for it. It ends when the request starts or leaves the
queue; leases that are not needed any more then have their notice withdrawn.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from ....schemas.requests import LeaseState, Preemption
from ...durable.store import Deposed, WriteFailed
from ...fleet.fleet import Fleet
from ...fleet.state import STALE, WHOLE_SHARE, Ask
from ...groups.state import GroupState, devices_of, models_of
from ...groups.tree import Node
from ...groups.use import Amounts, Pending
from ...leases.ledger import Ledger
from ...leases.lifecycle import Refused, preemptible_from
from ...queue.line import Group, Line
from ...queue.reclaim import Candidate, Reclaim, price_of, ranked
from ..waiting.queue import QueuedRequest, WaitingQueue

log = logging.getLogger("corral.planner.broker.quotas.reclaimer")

IDLE_SECONDS: Final = 15.0
"""Longest wait for the devices of preempted leases to be seen idle, before more are preempted for the same request.

A device whose lease was preempted takes no work until a sample, and a list of processes where there are any, show that
its processes have ended. Collectors list them every 10 s. The wait is over as soon as a device is lost to the request
(another has taken it, or it takes no work), and once all have been seen idle: what else the request counted on, such as
a device that was free when its leases were chosen, is another's then.
"""
_TURN_SECONDS: Final = 0.02
"""Time for which leases are chosen at once: requests and renewals come in between."""
_CANDIDATES_SECONDS: Final = 1.0
"""Time for which a list of candidates is used: another would differ little, and take long with many leases."""
_MAX_LISTING: Final = 0.05
"""Part of a core that these lists may take: with very many leases and groups that ask, one is used for longer."""
_RETRY_SECONDS: Final = 1.0
"""Time after which leases are looked for again, for requests that found none."""


class Claim:
    """Leases that are given notice for a request.

    Attributes:
        victims: the leases that have not ended yet, by id.
        amounts: what the request is expected to take.
        node: group of its owner.
        freed: uuids of devices of leases that have ended, each with the leases that were left on it.
        until: time until which the devices may not have been seen idle, once all leases have ended.
    """

    __slots__ = ("amounts", "freed", "node", "until", "victims")

    def __init__(self, victims: dict[str, Candidate], amounts: Amounts, node: Node) -> None:
        self.victims = victims
        self.amounts = amounts
        self.node = node
        self.freed: dict[str, frozenset[str]] = {}
        self.until = 0.0


class Reclaimer:
    """Claims of one term.

    Args:
        fleet: live state.
        ledger: leases of the term.
        state: of the groups.
        line: the waiting requests.
        queue: their clients.
        start: starts a task of the term.
        wake: called when `serve` should be called again soon.
        asks_elastic: returns true while elastic leases may still give devices back for a request, for which none is
            preempted meanwhile.
    """

    def __init__(
        self,
        fleet: Fleet,
        ledger: Ledger,
        state: GroupState,
        line: Line,
        queue: WaitingQueue,
        start: Callable[[Coroutine[Any, Any, None]], object],
        wake: Callable[[], None],
        asks_elastic: Callable[[QueuedRequest], bool] = lambda _: False,
    ) -> None:
        self._fleet = fleet
        self._ledger = ledger
        self._state = state
        self._line = line
        self._queue = queue
        self._start = start
        self._wake = wake
        self._asks_elastic = asks_elastic
        self._claims: dict[QueuedRequest, Claim] = {}
        self._claim_on: dict[str, Claim] = {}
        """Claims by the leases that have not ended yet."""
        self._awaited = Pending()
        """Amounts that groups are about to get by claims."""
        self._given = Pending()
        """Amounts that groups are about to give up by claims."""
        self._candidates: list[Candidate] = []
        """Leases that may be preempted, in the order in which they are, as of `_listed_at`."""
        self._listed_at = 0.0
        self._listing_seconds = 0.0
        """Processor time that the list took, and the choices that were made ready with it."""
        self._choices: dict[Node, Reclaim] = {}
        """Choices by the group around those in whose guarantee there is room."""
        self._until = 0.0
        """End of the turn, by the performance counter."""
        self._restored = False
        ledger.notices_checked = not state.active
        self._failed_at: dict[Group, float] = {}

    @property
    def pending(self) -> bool:
        """True if there are claims, or if there may be some of an earlier term: `serve` is to be called."""
        return bool(self._claims) or (self._state.active and not self._restored)

    def serve(self) -> None:
        """Give notice for the requests that are within guarantee and wait; to be called after a walk along the line."""
        now = time.time()
        self._restore()
        self._end_claims()
        self._until = time.perf_counter() + _TURN_SECONDS
        for group, ask in self._line.owed:
            if group.entries and now - self._failed_at.get(group, -_RETRY_SECONDS) >= _RETRY_SECONDS:
                self._claim_for(group, ask, now)
        self._failed_at = {group: at for group, at in self._failed_at.items() if now - at < _RETRY_SECONDS}

    def withdraw_all(self) -> None:
        """Withdraw all notices: the groups have changed, and claims are decided anew."""
        self._restore()
        for queued in list(self._claims):
            self._end_claim(queued)
        self._failed_at.clear()
        self._listed_at = 0.0

    def ended(self, lease_id: str) -> None:
        """Note that a lease ended."""
        claim = self._spared(lease_id)
        record = self._ledger.table.get(lease_id)
        if claim is None or record is None:
            return
        for grant in record.lease.grants:
            device = self._fleet.devices.get(grant.device)
            if device is not None:
                claim.freed[device.uuid] = frozenset(device.holders) - {lease_id}
        claim.until = time.time() + (IDLE_SECONDS if claim.freed else _RETRY_SECONDS)

    def _spared(self, lease_id: str) -> Claim | None:
        """Take a lease out of its claim, since it has ended, or has no notice; returns the claim."""
        claim = self._claim_on.pop(lease_id, None)
        if claim is not None:
            victim = claim.victims.pop(lease_id)
            self._given.add(victim.node, victim.amounts, -1)
            claim.until = max(claim.until, time.time() + _RETRY_SECONDS)
        return claim

    def _waits(self, claim: Claim, now: float) -> bool:
        """True if a claim of a request that did not fit just now may still be served by what it frees."""
        if claim.victims:
            return True
        if now >= claim.until or any(self._is_lost(uuid, left) for uuid, left in claim.freed.items()):
            return False
        return not claim.freed or any(self._is_unseen(uuid) for uuid in claim.freed)

    def _is_lost(self, uuid: str, left: frozenset[str]) -> bool:
        """True if a freed device was taken by others, or takes no work."""
        device = self._fleet.devices.get(uuid)
        return device is None or device.blocked & ~STALE != 0 or not device.holders.keys() <= left

    def _is_unseen(self, uuid: str) -> bool:
        """True if a freed device was not seen idle yet."""
        device = self._fleet.devices.get(uuid)
        return device is not None and (bool(device.in_use) or device.blocked & STALE != 0)

    def _restore(self) -> None:
        """Take up the claims of an earlier term."""
        if self._restored:
            return
        self._restored = True
        for record in self._ledger.table:
            lease = record.lease
            notice = lease.preemption
            if lease.state is not LeaseState.ACTIVE or notice is None or not notice.claimant:
                continue
            self._line.ends.expect(lease.lease_id, notice.ends_at.timestamp())
            queued = self._queue.find(notice.claimant_owner, notice.claimant)
            if queued is None:
                self._start(self._withdraw(lease.lease_id, notice.claimant))
                continue
            holding = self._state.use.holdings.get(lease.lease_id)
            if holding is not None:
                node = self._state.node_of(lease.owner)
                self._claim(queued, Candidate(lease.lease_id, node, holding.amounts, 0.0, 0.0))
        for queued, claim in list(self._claims.items()):
            if not self._is_whole(queued, claim):
                self._end_claim(queued)
        self._ledger.notices_checked = True

    def _is_whole(self, queued: QueuedRequest, claim: Claim) -> bool:
        """True if a request could start without the leases of its claim: a planner may have ended while it gave notice.

        Also true where that is not known, since a host was not heard for long.
        """
        for lease_id in claim.victims:
            record = self._ledger.table.get(lease_id)
            for grant in () if record is None else record.lease.grants:
                device = self._fleet.devices.get(grant.device)
                if device is not None and device.blocked & STALE:
                    return True
        around = claim.node.parent or claim.node
        choice = Reclaim(self._fleet, self._state.use, around, claim.victims.values(), Pending())
        return choice.choose(queued.entry.ask, claim.node) is not None

    def _claim(self, queued: QueuedRequest, *victims: Candidate) -> None:
        claim = self._claims.get(queued)
        if claim is None:
            node = self._state.node_of(queued.request.owner)
            claim = self._claims[queued] = Claim({}, self._expected(queued.entry.ask, victims), node)
            queued.entry.claimed = True
            self._awaited.add(node, claim.amounts)
        for each in victims:
            claim.victims[each.lease_id] = each
            self._claim_on[each.lease_id] = claim
            self._given.add(each.node, each.amounts)
        for choice in self._choices.values():  # another group must not wait for the same leases
            choice.leave_out(each.lease_id for each in victims)

    def _expected(self, ask: Ask, victims: Iterable[Candidate]) -> Amounts:
        """Expected amounts of a request: devices of a model that its victims hold."""
        freed = {model for each in victims for model in each.amounts.devices}
        models = models_of(self._fleet, ask) if ask.gpus else ()
        model = next((model for model in models if model in freed), next(iter(models), None))
        return Amounts({} if model is None else {model: devices_of(ask)}, ask.cpus_milli, ask.host_memory_bytes)

    def _end_claims(self) -> None:
        for queued in [queued for queued in self._claims if queued not in self._queue]:
            self._end_claim(queued)

    def _end_claim(self, queued: QueuedRequest) -> None:
        claim = self._claims.pop(queued)
        queued.entry.claimed = False
        self._awaited.add(claim.node, claim.amounts, -1)
        for lease_id, victim in claim.victims.items():
            self._claim_on.pop(lease_id, None)
            self._given.add(victim.node, victim.amounts, -1)
            self._start(self._withdraw(lease_id, queued.request.request_id or ""))

    def _claim_for(self, group: Group, ask: Ask, now: float) -> None:
        """Give notice for as many requests of a kind as are within guarantee."""
        node = group.node
        for entry in list(group.entries):
            queued: QueuedRequest = entry.payload
            claim = self._claims.get(queued)
            if claim is not None and claim.victims:
                continue
            if not entry.ready or queued.request.requeue_of is not None or self._asks_elastic(queued):
                continue
            if time.perf_counter() > self._until:
                self._wake()
                return
            if node is None or (claim is not None and self._waits(claim, now)):
                continue
            if claim is not None:  # what it freed is not to be had
                self._end_claim(queued)
            chosen: list[Candidate] | None = None
            levels = self._levels(node, ask)
            for within, narrowed in levels:
                if group.limited is not None:
                    chosen = self._make_room(within, group.limited, narrowed, now)
                else:
                    chosen = self._choice(within, now).choose(narrowed, within)
                if chosen:
                    break
            if not chosen:
                if levels:
                    self._failed_at[group] = now
                return
            self._claim(queued, *chosen)
            for each in chosen:
                self._start(self._notify(each.lease_id, queued, node))

    def _levels(self, node: Node, ask: Ask) -> list[tuple[Node, Ask]]:
        """Find in whose guarantees a request has room, with what others are about to get counted.

        Returns:
            groups on the way to its own, innermost first, each with the request for the models that have room there.
        """
        models: Sequence[str | None] = models_of(self._fleet, ask) if ask.gpus else (None,)
        found: dict[Node, list[str | None]] = {}
        for model in models:
            level = self._state.use.within_level(
                node, model, devices_of(ask), ask.cpus_milli, ask.host_memory_bytes, self._awaited
            )
            if level is not None:
                found.setdefault(level, []).append(model)
        return [
            (level, self._without(ask, [model for model in models if model and model not in found[level]]))
            for level in reversed(node.path)
            if level in found
        ]

    def _without(self, ask: Ask, models: Sequence[str]) -> Ask:
        barred = tuple(sorted({*ask.barred, *models}))
        return self._fleet.ask(ask.key._replace(barred=barred)) if models else ask

    def _make_room(self, within: Node, limited: Node, ask: Ask, now: float) -> list[Candidate] | None:
        """Choose leases within a group whose limit is reached, so that a request has room under it."""
        model = next(iter(models_of(self._fleet, ask)), None)
        if model is None or within is limited or within in limited.path:
            return None
        excess = self._state.use.excess(limited, model, devices_of(ask))
        needed = excess + self._awaited.total(limited) - self._given.total(limited)
        return self._choice(within, now).make_room(needed, within, limited) if needed > 0 else None

    def _choice(self, within: Node, now: float) -> Reclaim:
        """Choice among the leases outside of a group."""
        began = time.thread_time()
        if now - self._listed_at > max(_CANDIDATES_SECONDS, self._listing_seconds / _MAX_LISTING):
            self._candidates = ranked(self._list_candidates(now), lambda of: self._state.share(of, now))
            self._choices.clear()
            self._listed_at, self._listing_seconds = now, 0.0
        assert within.parent is not None
        found = self._choices.get(within.parent)
        if found is None:
            candidates = (each for each in self._candidates if each.lease_id not in self._claim_on)
            found = self._choices[within.parent] = Reclaim(
                self._fleet, self._state.use, within.parent, candidates, self._given
            )
        self._listing_seconds += time.thread_time() - began
        return found

    def _list_candidates(self, now: float) -> list[Candidate]:
        found: list[Candidate] = []
        for lease_id, holding in self._state.use.holdings.items():
            if not holding.preemptible or lease_id in self._claim_on:
                continue
            record = self._ledger.table.get(lease_id)
            if record is None or record.lease.state is not LeaseState.ACTIVE or record.lease.preemption is not None:
                continue
            lease = record.lease
            if preemptible_from(lease).timestamp() > now:
                continue
            devices = sum(holding.amounts.devices.values()) / WHOLE_SHARE
            found.append(
                Candidate(
                    lease_id,
                    self._state.node_of(holding.owner),
                    holding.amounts,
                    price_of(lease, devices, now),
                    lease.granted_at.timestamp(),
                )
            )
        return found

    async def _notify(self, lease_id: str, queued: QueuedRequest, node: Node) -> None:
        request, now = queued.request, datetime.now(UTC)
        preemption = Preemption(
            notified_at=now,
            ends_at=now + timedelta(),
            reason=f"group {node.name} is guaranteed what it asks for",
            claimant=request.request_id or "",
            claimant_owner=request.owner,
            claimant_group=node.name,
        )
        try:
            lease = await self._ledger.preempt(lease_id, preemption)
        except (Refused, Deposed, WriteFailed) as error:
            log.info("lease %s is not preempted: %s", lease_id, error)
            lease = None
        if lease is None or lease.state is not LeaseState.ACTIVE or lease.preemption is None:
            self._spared(lease_id)
            return
        self._line.ends.expect(lease_id, lease.preemption.ends_at.timestamp())

    async def _withdraw(self, lease_id: str, claimant: str) -> None:
        try:
            await self._ledger.unpreempt(lease_id, claimant)
        except (Refused, Deposed, WriteFailed) as error:
            log.info("the notice of lease %s is not withdrawn: %s", lease_id, error)
