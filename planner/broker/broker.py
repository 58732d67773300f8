"""The broker of the leader: decides, queues and answers requests, and holds the handlers for leases, drains and
groups.

One broker lives for one term. Requests are idempotent by id: a retry with the same id and body gets the same answer,
while the request is being decided and for as long as the answer is retained (`RETAIN_SECONDS` for grants,
`REJECTION_SECONDS` for rejections).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from ...bus.elapsed import steady_time
from ...bus.tasks import BackgroundTasks
from ...schemas import codec
from ...schemas.operations import Queue, QueueFilter
from ...schemas.requests import (
    Assignment,
    Error,
    Lease,
    Rejection,
    RejectionCode,
    WithdrawAction,
    WorkRequest,
)
from ...schemas.work.windows import Replacement, Window
from ..durable.store import Deposed, Store, WriteFailed
from ..fleet.fleet import Fleet
from ..groups.tree import Tree
from ..groups.use import Barred
from ..leases import lifecycle
from ..leases.grant_reservations import GrantReservation, GrantReservations
from ..leases.ledger import Ledger, clock, write_refused
from ..leases.lifecycle import LeaseRecord, Refused
from ..leases.usage import size_of
from ..limits import Limiter
from ..placement.decide import Decision, Placed, Policies, addresses, ask_of, check, decide, environment, placed
from ..placement.reject import could_ever_fit, quota_rejection, reject
from ..queue.line import Line
from ..queue.order import DEFAULT, LIMIT_SECONDS, rule_of
from .drain_spans import DrainSpans
from .drains import Drainer
from .idempotency import CachedRejection, RejectionCache, conflict, digest_of
from .large_requests import EncodedItems, distribute_packed, encoded_items, with_distribution
from .lease_changes import LeaseChanges
from .lease_commands import LeaseCommands
from .moves import MovePlanner
from .outcomes import outcome_of, waiting_of
from .pending import PendingRequest, RelayResponder, Responder
from .quotas.accounts import GroupAccounts, SavedUsage
from .quotas.groups import GroupCommands, StoredGroups
from .quotas.idle_watch import IdleWatch
from .quotas.reclaimer import Reclaimer
from .quotas.resizer import Resizer
from .request_log import RequestLog
from .retry_times import RetryTimes
from .site_rule import guarded
from .waiting import query_costs
from .waiting.estimates import Estimator
from .waiting.forecasts import Forecaster
from .waiting.fork_pool import ForkPool, QueryFailed, QueueFull, queue_full
from .waiting.places import Places
from .waiting.presence import SILENCE_SECONDS
from .waiting.queue import MAX_WAITING, Arrival, QueuedRequest, WaitingQueue, time_of
from .waiting.stored_queue import Restored, StoredQueue, StoredRequest
from .waiting.waiting_clients import ProbeClients, WaitingClients, probe_none
from .windows import Booker, in_window, lease_limit

log = logging.getLogger("corral.planner.broker.broker")

NO_ROOM_SECONDS: Final = 10.0
"""Time after which a request may be sent again that the bucket had no room for."""
_WAIT_SECONDS: Final = 1.0
"""Time after which it is published that a request waits."""
_MOST_SEARCH_SECONDS: Final = 0.32
"""Limit on the processor time of one search along the line for the next request that may start."""
MAX_EXPLAINED: Final = 16
"""Kinds of requests whose reasons to wait are computed anew for one listing."""


class RequestBroker:
    """Decides and answers requests, in one term.

    Args:
        fleet: live state.
        ledger: leases of the term.
        store: the bucket.
        term: revision of the leader's key.
        planner: id of this planner.
        policies: of this planner.
        drains: as read from the bucket.
        drain_spans: publishes when drains begin and end.
        windows: booked windows, as read from the bucket.
        replaced: devices that they got in place of others, likewise.
        answers: as read from the bucket, by their keys.
        requests: publishes what became of requests.
        estimator: estimates durations.
        groups: as read from the bucket.
        usage: past use of owners, as read from the bucket; None if there is none.
        places: of requests that left the queue, as read from the bucket, by key.
        max_bytes: size limit of a listing.
        deposed: called when a write was refused since another planner leads.
        limiter: quotas of owners.
        request_pool: distributes work items if that is expensive.
        order: name of the queue's order (`planner/queue/order.py`).
        overdue_seconds: wait after which a request goes ahead of all of its priority that have waited less.
        silence_seconds: a queued request whose client is not heard for so long leaves the queue.
        probe: probes queued clients.

    Attributes:
        wake: set when the queue should be served.
        on_decision: called with the duration of each decision, in seconds.
        on_lease_end: called with the record of each lease that ends.
        on_notice: called with each active lease that gets the notice of a preemption, and when that changes.
        clients: those of the queued requests, and when each was heard.
        lease_commands: handles operations on leases.
        resizer: offers devices to elastic leases, and asks for them back.
        drainer: handles drains.
        drain_spans: publishes when drains and maintenance begin and end.
        groups: handles the groups.
        idle_watch: warns holders of idle leases, and does what the rules of their groups say.
        booker: handles booked windows.
        moves: plans the leases to preempt so that hosts become free, or a request can start.
    """

    def __init__(
        self,
        fleet: Fleet,
        ledger: Ledger,
        store: Store,
        *,
        term: int,
        planner: str,
        policies: Policies,
        drains: dict[str, str],
        drain_spans: DrainSpans,
        windows: Sequence[Window],
        replaced: Mapping[str, Sequence[Replacement]],
        answers: dict[str, CachedRejection],
        requests: RequestLog,
        estimator: Estimator,
        groups: StoredGroups,
        usage: SavedUsage | None,
        places: Iterable[tuple[str, bytes]],
        max_bytes: int,
        deposed: Callable[[], None],
        limiter: Limiter,
        request_pool: ForkPool,
        order: str = DEFAULT,
        overdue_seconds: float = LIMIT_SECONDS,
        silence_seconds: float = SILENCE_SECONDS,
        probe: ProbeClients = probe_none,
    ) -> None:
        self.ledger = ledger
        self.fleet = fleet
        self.wake = asyncio.Event()
        self.on_decision: Callable[[float], None] = lambda _: None
        self.on_lease_end: Callable[[LeaseRecord], None] = lambda _: None
        self.on_notice: Callable[[Lease], None] = lambda _: None
        self.estimator = estimator
        self.group_accounts = accounts = GroupAccounts(fleet, usage)
        accounts.change(Tree(groups.tree), groups.revision, ledger.table)
        self.line = Line(fleet, policies, guarded(rule_of(order)), accounts.state, overdue_seconds)
        self.queue = WaitingQueue(self.line)
        self.clients = WaitingClients(self.queue, silence_seconds, probe, self._keep_place, self._answer, self.wake.set)
        self._places = Places(store, term, places, time.time())
        self.forecaster = Forecaster(self.queue, estimator)
        self._changes = LeaseChanges(ledger, estimator, self.line, self.queue)
        self._tasks = BackgroundTasks()
        self.requests = requests
        self._came_free = False
        self._stored = StoredQueue(store, term)
        ledger.on_end = self._lease_ended
        ledger.on_notice = self._lease_noticed
        ledger.on_hold = accounts.hold_lease
        ledger.on_resized = self._lease_resized
        self._store = store
        self._term = term
        self._planner = planner
        self._policies = policies
        self._deposed = deposed
        self._limiter = limiter
        self._request_pool = request_pool
        self._grants = GrantReservations(fleet, ledger.table.owners, accounts.drop)
        self.drainer = Drainer(fleet, store, term, drains, drain_spans, self.wake.set, deposed)
        self.drain_spans = drain_spans
        self.booker = Booker(
            fleet,
            ledger,
            store,
            term,
            windows,
            replaced,
            self.wake.set,
            deposed,
            lambda owner: accounts.state.node_of(owner).name,
        )
        self.idle_watch = IdleWatch(fleet, ledger, accounts, planner, self.wake.set)
        self.lease_commands = LeaseCommands(fleet, ledger, planner)
        self.resizer = Resizer(
            fleet, ledger, accounts, self.line, self.queue, policies, self.lease_commands, planner, self._tasks.start
        )
        self.moves = MovePlanner(fleet, ledger, self.line, self.queue, accounts, self._barred, self.resizer.asked_back)
        self.reclaimer = Reclaimer(
            fleet,
            ledger,
            accounts.state,
            self.line,
            self.queue,
            self._tasks.start,
            self.wake.set,
            self.resizer.asks_for,
        )
        self.groups = GroupCommands(
            fleet, ledger.table, self.queue, accounts, store, term, max_bytes, self._groups_changed, deposed
        )
        self._rejections = RejectionCache(store, term, answers, deposed)
        self._pending: dict[tuple[str, str], PendingRequest] = {}
        self._unpublished: deque[tuple[float, QueuedRequest]] = deque()
        """Requests whose waiting is to be published, with the time for that, by the steady clock."""
        self._requeuing: dict[str, PendingRequest] = {}
        self._retry_times = RetryTimes()
        self._made = 0
        self._asked = 0
        self._closed = False
        self._shutdown_error: Error | None = None

    # Requests

    async def request(self, request: WorkRequest, caller: Responder, items: EncodedItems | None = None) -> None:
        """Grant, queue or reject a request.

        Args:
            request: the request.
            caller: that sent it.
            items: access to its work items, if it was decoded in a copy of the process.
        """
        in_turn = bool(request.wait_seconds) and self.group_accounts.active and len(self.queue) > 0
        if self._came_free and len(self.queue) and not in_turn:  # that is for those that wait
            await self._start_ready()
        request_id = request.request_id
        named = request_id is not None
        if request_id is None:
            request_id = self._new_id()
            request = replace(request, request_id=request_id)
        # No client can retry under an id that it learns from the answer.
        digest = "" if not named else items.digest if items is not None else digest_of(request)
        if named and await self._answer_known(request, request_id, digest, caller):
            return
        try:
            age_from = self._requeued_age(request)
        except Refused as refused:
            await caller.answer(refused.error)
            return
        items = items or _costly_items(request, digest)
        pending = PendingRequest(digest, request, caller, named, items, self._new_uid(), time.time(), age_from)
        decision = (self._after_others(request) if in_turn else None) or self._decide(pending)
        self._add_pending(pending)
        if isinstance(decision, Placed) or request.wait_seconds:
            self.forecaster.arrived(request, pending.asked_at)
        if isinstance(decision, Placed):
            decision = self.resizer.with_more(request, decision)
            await self._grant(pending, decision, self._reserve(request, decision))
        elif request.wait_seconds and decision.code is not RejectionCode.IMPOSSIBLE:
            await self._enqueue(pending, decision)
        else:
            await self._reject(pending, decision)

    async def enter(self, request: WorkRequest, caller: Responder, asked_at: float) -> None:
        """Queue the request of a task of a job, without a client; idempotent by its id.

        Args:
            request: with its id, which names task and attempt.
            caller: takes the answer.
            asked_at: time since which it waits, in seconds since the epoch.
        """
        if await self._answer_known(request, request.request_id or "", "", caller):
            return
        try:
            self._requeued_age(request)
        except Refused:  # the preempted lease was forgotten, say
            request = replace(request, requeue_of=None)
        pending = PendingRequest("", request, caller, False, None, self._new_uid(), asked_at, asked_at)
        pending.unattended = True
        if request.devices:
            await self._try_named(pending)
            return
        self._add_pending(pending)
        self.forecaster.arrived(request, time.time())
        await self._enqueue(pending, _not_tried(request))

    async def _try_named(self, pending: PendingRequest) -> None:
        """Grant a task the devices that it names, or answer why they can't be had now: no others would do."""
        decision = self._decide(pending)
        if isinstance(decision, Placed):
            self._add_pending(pending)
            self.forecaster.arrived(pending.request, time.time())
            await self._grant(pending, decision, self._reserve(pending.request, decision))
            return
        for caller in pending.callers:  # no event for the history: it is tried again
            await caller.answer(decision)

    def leave(self, owner: str, request_id: str) -> None:
        """Withdraw the request of a task of a job from the queue; one that is being granted already stays so."""
        pending = self._pending.get((owner, request_id))
        if pending is None or not pending.unattended or pending.entry is None or pending.entry not in self.queue:
            return
        self._dequeue(pending.entry)
        self._resolve(pending)
        self._log_outcome(pending, _withdrawn(WithdrawAction(owner=owner, request_id=request_id), pending.request))
        self.wake.set()  # those behind it may have waited for it

    async def _answer_known(self, request: WorkRequest, request_id: str, digest: str, caller: Responder) -> bool:
        pending = self._pending.get((request.owner, request_id))
        if pending is not None:
            if pending.withdrawn_early:
                pending.join(RelayResponder(request, caller))
            elif pending.digest == digest:
                await self._join(pending, caller)
            else:
                await caller.answer(conflict(request_id))
            return True
        record = self.ledger.table.of_request(request.owner, request_id)
        if record is not None:
            same = record.digest == digest
            await caller.answer(lifecycle.repeat_answer(record) if same else conflict(request_id))
            return True
        answer = self._rejections.get(request.owner, request_id, digest)
        if answer is not None:
            await caller.answer(answer.rejection if answer.matches(request, digest) else conflict(request_id))
            return True
        return False

    async def _join(self, pending: PendingRequest, caller: Responder) -> None:
        """Add a retry to a pending request; if that is queued, its client counts as heard."""
        before = pending.join(caller)
        entry = pending.entry
        if entry is None or entry not in self.queue:
            return
        self.clients.heard(entry)
        for other in before:
            group = self.group_accounts.group_of(entry.request.owner)
            await other.answer(self.queue.entry_listing(entry, steady_time(), group))

    def _requeued_age(self, request: WorkRequest) -> float | None:
        """Time from which a request counts as waiting that goes on with a preempted lease; None for any other.

        Raises:
            Refused: `requeue_of` names another lease, or one whose work goes on already.
        """
        lease_id = request.requeue_of
        if lease_id is None:
            return None
        age_from = lifecycle.requeued_age(self.ledger.table, lease_id, request.owner)
        other = self._requeuing.get(lease_id)
        if other is not None:
            text = f"Request {other.request.request_id} waits to go on with lease {lease_id} already"
            raise Refused("conflict", text, "$.requeue_of")
        return age_from.timestamp()

    def _add_pending(self, pending: PendingRequest) -> None:
        self._pending[pending.key] = pending
        if pending.request.requeue_of is not None:
            self._requeuing[pending.request.requeue_of] = pending

    def _decide(self, pending: PendingRequest) -> Decision:
        began = time.perf_counter()
        distributing = pending.encoded_items is None
        with self.protected(pending.request) as barred:
            decision = decide(
                self.fleet, pending.request, time.time(), self._policies, distributing=distributing, barred=barred
            )
        self.on_decision(time.perf_counter() - began)
        return decision

    def _after_others(self, request: WorkRequest) -> Rejection | None:
        """Reason to queue a request undecided: others wait, and whose turn it is depends on the use of all groups.

        None if it could never be granted.

        Raises:
            InvalidRequest: it contradicts itself, or names an unknown policy.
        """
        check(self.fleet, request, self._policies)
        if not could_ever_fit(self.fleet, ask_of(self.fleet, request)):
            return None
        return Rejection(
            code=RejectionCode.NO_CAPACITY,
            message="others wait: it is decided in turn with them",
            could_ever_fit=True,
            request_id=request.request_id or "",
        )

    @contextmanager
    def protected(self, request: WorkRequest) -> Generator[Barred | str]:
        """Context in which the fleet lacks what is kept from a request: for requests ahead of its place in the queue.

        A request that is not queued is behind all of its priority. Yields the models that quotas keep from it; or, if
        they let it take nothing, the reason.
        """
        barred = self._barred(request)
        if not len(self.queue):
            yield barred
            return
        queued = self.queue.find(request.owner, request.request_id or "")
        now = time.time()
        seconds = self.estimator.of_request(request, now).seconds if queued is None else queued.entry.estimate.seconds
        entry = None if queued is None else queued.entry
        windows = self.fleet.bookings.inside(request.owner)
        with self.line.protected(entry, request.priority, seconds, now, windows):
            yield barred

    def _barred(self, request: WorkRequest) -> Barred | str:
        if not self.group_accounts.active:
            return ()
        self.group_accounts.state.note_fleet(self.fleet)
        ask = ask_of(self.fleet, request)
        admission = self.group_accounts.state.admission(self.fleet, request.owner, ask, request.preemptible)
        return admission.reason if admission.barred is None else admission.barred

    def _groups_changed(self) -> None:
        self.booker.apply(time.time())
        self.line.regroup()
        self.reclaimer.withdraw_all()
        self.wake.set()

    async def _enqueue(self, pending: PendingRequest, rejection: Rejection) -> None:
        """Queue a request that can't be granted now, or answer why it can't be queued."""
        if self._closed:  # it was being decoded when the term ended: this queue is served no more
            await self._dismiss(pending)
        elif len(self.queue) >= MAX_WAITING:
            await self._refuse_queue_full(pending)
        elif refused := self._refused(pending):
            await self._answer(pending, refused)
        else:
            self._add(pending, rejection)
            self._retry_times.note_taken()
            self.wake.set()  # it may pass those ahead

    async def _refuse_queue_full(self, pending: PendingRequest) -> None:
        """Answer a request that can't wait since the queue is full. It is not cached: a retry is decided anew."""
        if not self._resolve(pending):
            return
        after = self._retry_times.next_seconds(time.monotonic())
        error = Error(
            code="too_many_requests",
            message=f"The queue is full ({MAX_WAITING} requests wait): ask again in {after:.1f} s",
            retry_after_seconds=after,
        )
        # No event for the history: the client asks again, until it gets an answer that counts.
        for caller in pending.callers:
            await caller.answer(error)

    def _refused(self, pending: PendingRequest) -> Error | None:
        """Error if a request can't wait; None if it can. How many tasks of jobs wait is limited before."""
        owner = pending.request.owner
        if pending.unattended:
            return None
        return self._limiter.queue_quota(owner, self.queue.count_of(owner)) or self._no_room(pending)

    def _add(self, pending: PendingRequest, rejection: Rejection, arrival: Arrival | None = None) -> QueuedRequest:
        self._changes.follow()
        request, now = pending.request, time.time()
        restored = arrival is not None
        self.estimator.submitted(request, pending.asked_at if restored else now)
        estimate = self.estimator.of_request(request, now)
        place = arrival if restored else self._places.take(request, pending.digest, now)
        queued = self.queue.add(request, now, estimate, rejection, pending, place, age_from=pending.age_from)
        pending.entry, pending.estimate = queued, queued.entry.estimate
        self._unpublished.append((steady_time() + (0.0 if restored else _WAIT_SECONDS), queued))
        self.clients.presence.note_heard(queued)
        if not restored and not pending.unattended:
            pending.asked_at = queued.arrival.asked_at
            self._store_entry(pending, queued)
        return queued

    def publish_waiting(self) -> None:
        """Publish the requests that have waited for a while; most others end too soon to be of use to anybody."""
        now = steady_time()
        while self._unpublished and self._unpublished[0][0] <= now:
            queued = self._unpublished.popleft()[1]
            if queued in self.queue:
                self.requests.add(waiting_of(queued, self.group_accounts.group_of(queued.request.owner)))

    async def _keep_place(self, queued: QueuedRequest) -> None:
        pending: PendingRequest = queued.payload
        await self._places.keep(pending.uid, queued, pending.digest, time.time())

    def _no_room(self, pending: PendingRequest) -> Error | None:
        """Error if a request can't wait, since the bucket has no room for its entry; None if it can."""
        items = pending.encoded_items
        if self._stored.has_room(0 if items is None else len(items.body)):
            return None
        return Error(
            code="too_many_requests",
            message="The planner's bucket has no room for more waiting requests: ask again later, or without waiting",
            retry_after_seconds=NO_ROOM_SECONDS,
        )

    def _store_entry(self, pending: PendingRequest, queued: QueuedRequest) -> None:
        arrival, items = queued.arrival, pending.encoded_items
        callers = [stored for caller in pending.callers if (stored := caller.stored) is not None]
        pending.is_stored = True
        self._stored.put(
            StoredRequest(
                uid=pending.uid,
                request=pending.request,
                asked_at=arrival.asked_at,
                number=arrival.number,
                until=arrival.until,
                digest=pending.digest,
                has_client_id=pending.has_client_id,
                position=arrival.position,
                callers=callers,
                age_from=arrival.age_from,
                body_type=codec.JSON if items is None else items.body_type,
            ),
            b"" if items is None else items.body,
        )

    async def restore(self, restored: Restored, callers: Sequence[Responder]) -> None:
        """Take in a request that waited in an earlier term; one that was answered then gets its answer again.

        It starts once its client was heard.

        Args:
            restored: its entry in the bucket.
            callers: that wait for the answer; none if no one could be answered.
        """
        stored, size, body = restored
        request = stored.request
        self._stored.note(stored.uid, size, len(body))
        nobody: list[Responder] = [_NoResponder()]
        pending = PendingRequest(
            stored.digest,
            request,
            (callers or nobody)[0],
            stored.has_client_id,
            encoded_items(stored.digest, body, stored.body_type) if body else _costly_items(request, stored.digest),
            stored.uid,
            stored.asked_at,
            stored.age_from,
        )
        pending.callers = list(callers or nobody)
        pending.is_stored = True
        request_id = request.request_id or ""
        if pending.key in self._pending:  # of before it left the line and came back
            self._stored.delete(stored.uid)
            return
        self._add_pending(pending)
        record = self.ledger.table.of_request(request.owner, request_id)
        if record is not None:
            self._resolve(pending)
            self._log_outcome(pending, Assignment(lease=record.lease))
            for caller in pending.callers:
                await caller.answer(lifecycle.repeat_answer(record))
            return
        answer = self._rejections.get(request.owner, request_id, stored.digest)
        if answer is not None:
            await self._answer(pending, answer.rejection)
            return
        why = Rejection(
            code=RejectionCode.NO_CAPACITY,
            message="it has waited since before this planner took over",
            could_ever_fit=True,
            request_id=request_id,
        )
        arrival = Arrival(stored.asked_at, stored.number, stored.until, stored.position, stored.age_from)
        queued = self._add(pending, why, arrival)
        self.clients.unheard(queued)

    # Leases

    def _lease_resized(self, record: LeaseRecord) -> None:
        """Note that an elastic lease has other devices."""
        self.resizer.resized(record)
        self.group_accounts.resized(record)
        self._came_free = True
        self._changes.resized(record)

    def _lease_noticed(self, lease: Lease) -> None:
        self._changes.noticed(lease)
        self.on_notice(lease)

    def _lease_ended(self, record: LeaseRecord) -> None:
        self.resizer.ended(record.lease.lease_id)
        if self.group_accounts.active:
            self.group_accounts.ended(record.lease)
            self.reclaimer.ended(record.lease.lease_id)
        self._came_free = True
        self._changes.ended(record)
        self.on_lease_end(record)

    # Grants

    def _reserve(self, request: WorkRequest, placed: Placed) -> GrantReservation:
        """Hold the devices of a decision: to be called before the next decision."""
        lease_id = self._new_id()
        self.group_accounts.hold(lease_id, request.owner, placed.grants, request.preemptible)
        return self._grants.take(lease_id, placed.grants, in_window=in_window(self.fleet, request.owner, placed.grants))

    async def _grant(self, pending: PendingRequest, placed: Placed, reservation: GrantReservation) -> None:
        """Make a durable lease of reserved devices, answer, and publish its event."""
        try:
            with reservation:
                if pending.encoded_items is not None:
                    placed = await self._distribute(pending.request, pending.encoded_items, placed)
                record = self._record(pending, placed, reservation)
                self._charge(reservation, record.lease)
                async with self.ledger.write_new(record) as revision:
                    reservation.commit()
                    self.ledger.table.put(record)
                    self.ledger.note_deadline(record.lease)
                    self.group_accounts.granted(record)
                    self.booker.granted(record.lease)
                    self.resizer.granted(record.lease)
                    self._changes.granted(record)
                    try:
                        await self._answer(pending, Assignment(lease=record.lease))
                    finally:
                        await self.ledger.publisher.publish(record, revision)
                return
        except Deposed:
            self._deposed()
            self._forward(pending)
            return
        except Refused as refused:
            reply = refused.error
        except WriteFailed as error:
            reply = write_refused(error)
        except asyncio.CancelledError:
            self._resolve(pending)  # a retry is decided anew, or gets the lease
            raise
        except Exception as error:
            log.exception("request %s failed while it was granted", pending.request.request_id)
            reply = Error(code="internal", message=f"The planner failed: {error}")
        self.wake.set()  # its devices are free again
        await self._answer(pending, reply)

    async def _distribute(self, request: WorkRequest, encoded_items: EncodedItems, placed: Placed) -> Placed:
        """Distribute work items over reserved devices, in a forked copy of the process.

        Raises:
            Refused: it took too long or too much memory, the owner has too many such requests, or the term has ended.
        """

        def distribute() -> bytes:
            return distribute_packed(placed, encoded_items.distribution())

        try:
            packed = await self._request_pool.run(request.owner, distribute)
        except QueueFull:
            raise Refused.by(queue_full(request.owner)) from None
        except QueryFailed as error:
            message = f"The work items were not distributed, {error}: give fewer, or take a simpler method"
            raise Refused("too_large", message, "$.distribution") from error
        if self._closed:
            raise Refused("unavailable", "This planner is stopping: ask again")
        return with_distribution(placed, packed)

    def _record(self, pending: PendingRequest, placed: Placed, reservation: GrantReservation) -> LeaseRecord:
        now, lease_id = clock(), reservation.lease_id
        inside = reservation.in_window
        until, window = lease_limit(self.fleet, pending.request, placed.grants, now, decided_inside=inside)
        return lifecycle.grant(
            pending.request,
            placed.grants,
            lease_id=lease_id,
            now=now,
            digest=pending.digest,
            planner=self._planner,
            environment=environment(self.fleet, placed.grants, lease_id),
            addresses=addresses(self.fleet, placed.grants),
            unassigned=placed.unassigned,
            policy=placed.policy,
            distribution=placed.distribution,
            service_seconds=self.ledger.service_seconds(),
            asked_at=time_of(pending.asked_at),
            age_from=None if pending.age_from is None else time_of(pending.age_from),
            until=until,
            window=window,
            group=self.group_accounts.group_of(pending.request.owner),
        )

    def _charge(self, reservation: GrantReservation, lease: Lease) -> None:
        """Count a new lease against the quotas of its owner.

        Raises:
            Refused: the owner has too many leases, or they take too much of the bucket or of the event stream.
        """
        owner, size = lease.owner, size_of(lease)
        refused = self._limiter.event_quota(owner, time.monotonic()) or self._limiter.lease_quota(
            owner, self.ledger.table.owners, size, self._store.max_bytes, self._store.used_bytes
        )
        if refused is not None:
            raise Refused.by(refused)
        reservation.charge(owner, size)

    # Answers

    async def _reject(self, pending: PendingRequest, rejection: Rejection) -> None:
        """Answer a rejection, which is cached if a client can retry the request."""
        if pending.has_client_id:
            request = pending.request
            try:
                await self._rejections.add(
                    request.request_id or "", rejection, digest=pending.digest, owner=request.owner
                )
            except Deposed:
                self._forward(pending)
                return
        await self._answer(pending, rejection)

    async def _answer(self, pending: PendingRequest, reply: Struct) -> None:
        """Answer all callers of a pending request; nothing if that was done, or it was forwarded."""
        if self._resolve(pending):
            if not pending.withdrawn_early and reply is not self._shutdown_error:
                self._log_outcome(pending, reply)
            for caller in pending.callers:
                await caller.answer(reply)

    def _log_outcome(self, pending: PendingRequest, reply: Struct) -> None:
        """Publish what became of a request; its entry in the bucket is deleted once that is stored."""
        event = outcome_of(pending, reply, time.time(), self.group_accounts.group_of(pending.request.owner))
        if pending.is_stored:
            self.requests.add(event, lambda: self._stored.delete(pending.uid))
        else:
            self.requests.add(event)

    def _forward(self, pending: PendingRequest) -> None:
        """Forward a pending request to the leader; nothing if that was done, or it was answered."""
        if not self._resolve(pending):
            return
        for caller in pending.callers:
            # The leader may have a request without an id already, and would grant it twice.
            if pending.has_client_id or isinstance(caller, RelayResponder):
                caller.forward(pending.request)

    def _resolve(self, pending: PendingRequest) -> bool:
        """End a pending request; false if it had ended before."""
        if self._pending.get(pending.key) is not pending:
            return False
        del self._pending[pending.key]
        self.estimator.withdrawn(pending.request)
        if self._requeuing.get(pending.request.requeue_of or "") is pending:
            del self._requeuing[pending.request.requeue_of or ""]
        return True

    async def withdraw(self, action: WithdrawAction, caller: Responder) -> None:
        """Withdraw a request from the queue. One that was granted or rejected already stays so, and gets that answer.

        An unknown request may still be on its way (forwarded by an earlier leader, say): it is rejected when it
        arrives, so that no devices are granted that no client waits for.
        """
        request_id = action.request_id
        pending = self._pending.get((action.owner, request_id))
        if pending is not None:
            pending.join(RelayResponder(action, caller))
            if pending.entry is not None and pending.entry in self.queue:
                self._dequeue(pending.entry)
                self.wake.set()  # those behind it may have waited for it
                await self._reject(pending, _withdrawn(action, pending.request))
            return
        record = self.ledger.table.of_request(action.owner, request_id)
        if record is not None:
            await caller.answer(Assignment(lease=record.lease))
            return
        known = self._rejections.get(action.owner, request_id)
        if known is not None:
            await caller.answer(known.rejection)
            return
        nobody = WorkRequest(owner=action.owner, request_id=request_id)
        withdrawn_early = PendingRequest("", nobody, RelayResponder(action, caller), has_client_id=True)
        withdrawn_early.withdrawn_early = True
        self._pending[withdrawn_early.key] = withdrawn_early
        await self._reject(withdrawn_early, _withdrawn(action))

    # The queue

    def _dequeue(self, entry: QueuedRequest) -> None:
        self.queue.remove(entry)

    async def serve_queue(self) -> float:
        """Serve the queue: reject expired requests, and grant those that may start now.

        A request whose client was silent, and was not found by a probe, is told to ask again first; what it would take
        is kept for it meanwhile.

        Returns:
            Processor time that the choice of requests and of leases to take back took, in seconds.
        """
        now = steady_time()  # setting the clock must not expire requests
        for entry in self.queue.expired(now):
            self._dequeue(entry)
            message = f"nothing came free within {now - entry.since:.1f} s: {entry.rejection.message}"
            rejection = replace(entry.rejection, code=RejectionCode.TIMED_OUT, message=message)
            self._tasks.start(self._reject(entry.payload, rejection))
        searched = await self._start_ready()
        began = time.thread_time()
        self.resizer.serve()
        if self.group_accounts.active or self.reclaimer.pending:
            self.reclaimer.serve()
        searched += time.thread_time() - began
        await self.clients.ask_those_in_turn()
        return searched

    async def _start_ready(self) -> float:
        """Grant queued requests that may start now.

        Returns:
            Processor time of the first search, which looks at all kinds of requests, and of those without a start.
        """
        self._came_free, idle, starts = False, 0.0, 0
        self._changes.revise()
        turn, turn_began = 0, time.thread_time()
        search_seconds = query_costs.TURN_SECONDS
        while not self._closed:
            began, searching = time.perf_counter(), time.thread_time()
            over = searching + search_seconds
            start = self.line.next(time.time(), lambda over=over: time.thread_time() > over)
            idle += 0.0 if start is not None and starts else time.thread_time() - searching
            starts += 1
            self.on_decision(time.perf_counter() - began)
            if start is None and self.line.paused:
                # Releases and renewals come in between. With them it may begin anew, and must get further then.
                await asyncio.sleep(0)
                turn, turn_began = 0, time.thread_time()
                search_seconds = min(2 * search_seconds, _MOST_SEARCH_SECONDS)
                continue
            if start is None:
                break
            queued: QueuedRequest = start.entry.payload
            pending: PendingRequest = queued.payload
            self.queue.remove(queued)
            self.forecaster.started(queued, time.time())
            try:
                distributing = pending.encoded_items is None
                placement = placed(pending.request, start.entry.ask, start.policy, start.picks, distributing)
                placement = self.resizer.with_more(pending.request, placement)
                reservation = self._reserve(pending.request, placement)
            except Exception as error:  # requests behind it must not wait for ever
                log.exception("request %s could not be decided", pending.request.request_id)
                await self._answer(pending, Error(code="internal", message=f"The planner failed: {error}"))
                continue
            self._tasks.start(self._grant(pending, placement, reservation))
            turn += 1
            if turn >= 32 or time.thread_time() - turn_began > query_costs.TURN_SECONDS:
                await asyncio.sleep(0)  # requests come in between
                turn, turn_began = 0, time.thread_time()
        return idle

    def list_queue(self, only: QueueFilter, max_bytes: int) -> Queue:
        """List the queue, cut at the size of a message."""
        self.explain_waiting(only)
        return self.queue.listing(steady_time(), only, self.clients.silence, max_bytes, self.group_accounts.group_of)

    def why_waiting(self, owner: str, request_id: str) -> str:
        """Return why a request of an owner waits, as of the last `explain_waiting`; empty if it does not wait."""
        queued = self.queue.find(owner, request_id)
        return "" if queued is None else self.line.why_refused(queued.entry.group) or queued.rejection.message

    def explain_waiting(self, only: QueueFilter) -> None:
        """Bring the reasons why listed requests wait up to date, for as many kinds of requests as a list may cost."""
        found: dict[object, Rejection] = {}
        now = time.time()
        for queued in self.queue if only.request_id is None else self.queue.named(only.request_id):
            request, entry = queued.request, queued.entry
            if only.owner not in (None, request.owner):
                continue
            if entry.group not in found:
                if len(found) >= MAX_EXPLAINED:
                    return
                windows = entry.ask.windows
                with self.line.protected(entry, request.priority, entry.estimate.seconds, now, windows):
                    ask = entry.group.ask
                    refused = self.line.why_refused(entry.group)
                    found[entry.group] = (
                        quota_rejection(self.fleet, ask, refused) if refused else reject(self.fleet, ask)
                    )
            queued.rejection = replace(found[entry.group], request_id=request.request_id or "")

    # The bucket

    async def measure(self) -> None:
        """Measure the size of the bucket, and delete cached rejections if it is too full for new leases."""
        await self._store.measure()
        if not self._store.has_room and await self._store.purge_answers():
            self._rejections.note_purged()

    # Time

    def tick(self, now: datetime) -> None:
        """End leases that are due, and evict leases and rejections whose retention is over."""
        stamp = now.timestamp()
        self.ledger.expire(now)
        self.ledger.evict_ended(stamp)
        self.booker.tick(stamp)
        self._rejections.evict_expired(stamp)

    async def close(self, shutdown_error: Error | None) -> None:
        """Stop serving the queue.

        Args:
            shutdown_error: answer to queued requests. Other pending requests get none here: their writes may still
                succeed, and are the answer then. None, at the end of the term, forwards all pending requests to the
                leader.
        """
        self._closed, self._shutdown_error = True, shutdown_error
        self.clients.close()
        for pending in list(self._pending.values()):
            in_line = pending.entry is not None and pending.entry in self.queue
            if pending.entry is not None and in_line:
                self._dequeue(pending.entry)
            if pending.is_stored and in_line and _outlive(pending):
                self._pending.pop(pending.key, None)  # the next leader has it
            elif shutdown_error is None or in_line:
                await self._dismiss(pending)

    async def settled(self) -> None:
        """Wait until the entries of waiting requests are written and deleted."""
        await self._stored.settled()

    async def end(self) -> None:
        """End what is in flight: grants, changes of leases, and rejections. Call it once their writes are abandoned."""
        await self._tasks.cancel()
        await self.booker.close()
        await self.ledger.close()
        await self._rejections.close()
        await self._stored.close()
        await self._places.close()
        self._grants.roll_back()

    async def _dismiss(self, pending: PendingRequest) -> None:
        """Dismiss a pending request: answer it with the farewell, or forward it if there is none."""
        if self._shutdown_error is None:
            self._forward(pending)
        else:
            await self._answer(pending, self._shutdown_error)

    def _new_uid(self) -> str:
        """New id for the event of a request."""
        self._asked += 1
        return f"{self._planner}-{self._term:x}-r{self._asked:x}"

    def _new_id(self) -> str:
        """New id for a lease or request, short enough to type; unique, since each run of a planner has another id."""
        self._made += 1
        return f"{self._planner}-{self._term:x}-{self._made:x}"


class _NoResponder:
    """Stands for the callers of a request that no one could be answered."""

    reply_to = ""
    client_name = ""
    stored = None

    async def answer(self, reply: Struct) -> None:
        """Do nothing."""

    def forward(self, body: Struct) -> None:
        """Do nothing."""


def _not_tried(request: WorkRequest) -> Rejection:
    """Reason why a request waits that is decided in turn with the others."""
    return Rejection(
        code=RejectionCode.NO_CAPACITY,
        message="it has not been tried yet",
        could_ever_fit=True,
        request_id=request.request_id or "",
    )


def _costly_items(request: WorkRequest, digest: str) -> EncodedItems | None:
    """Access to the items of a request, if they are expensive to distribute; None if they are cheap or not there."""
    work = request.distribution
    if work is None or query_costs.distributing(work, request.gpus) <= query_costs.CHEAP_SECONDS:
        return None
    return EncodedItems(digest, lambda: work)


def _outlive(pending: PendingRequest) -> bool:
    """True if the next leader can answer all callers of a request."""
    return all(caller.stored is not None for caller in pending.callers)


def _withdrawn(action: WithdrawAction, request: WorkRequest | None = None) -> Rejection:
    unknown = "" if request is not None else "; it did not wait, and is turned down if it still comes"
    return Rejection(
        code=RejectionCode.WITHDRAWN,
        message=f"request {action.request_id} was withdrawn by {action.owner}{unknown}",
        could_ever_fit=request is not None,
        request_id=action.request_id,
    )
