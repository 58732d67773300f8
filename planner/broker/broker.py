"""The broker of the leader: decides, queues and answers requests, and holds the handlers for leases and drains.

One broker lives for one term. Requests are idempotent by id: a retry with the same id and body gets the same answer,
while the request is being decided and for as long as the answer is retained (`RETAIN_SECONDS` for grants,
`REJECTION_SECONDS` for rejections).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime

from msgspec import Struct
from msgspec.structs import replace

from ...bus.elapsed import steady_time
from ...bus.tasks import BackgroundTasks
from ...schemas.operations import Queue, QueueFilter
from ...schemas.requests import Assignment, Error, Lease, Rejection, RejectionCode, WithdrawAction, WorkRequest
from ..durable.store import Deposed, Store, WriteFailed
from ..fleet.fleet import Fleet
from ..leases import lifecycle
from ..leases.grant_reservations import GrantReservation, GrantReservations
from ..leases.ledger import Ledger, clock, write_refused
from ..leases.lifecycle import LeaseRecord, Refused
from ..leases.usage import size_of
from ..limits import Limiter
from ..placement.decide import Decision, Placed, Policies, addresses, ask_of, decide, environment
from . import query_costs
from .drains import Drainer
from .fork_pool import ForkPool, QueryFailed, QueueFull, queue_full
from .idempotency import CachedRejection, RejectionCache, conflict, digest_of
from .large_requests import EncodedItems, distribute_packed, with_distribution
from .lease_commands import LeaseCommands
from .pending import PendingRequest, RelayResponder, Responder
from .presence import ASK_AGAIN, SILENCE_SECONDS, Presence
from .queue import MAX_WAITING, PATIENCE_SECONDS, QueuedRequest, WaitingQueue
from .reservations import Reservations, newcomer

log = logging.getLogger("corral.planner.broker.broker")


ProbeClients = Callable[[Sequence[str]], Awaitable[set[str]]]
"""Returns those of some reply subjects whose clients are certainly connected."""


async def probe_none(_: Sequence[str]) -> set[str]:
    """Default without a probe: clients are heard only when they ask again."""
    return set()


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
        answers: as read from the bucket, by their keys.
        deposed: called when a write was refused since another planner leads.
        limiter: quotas of owners.
        request_pool: distributes work items if that is expensive.
        patience_seconds: devices are reserved for a request that has been queued for so long.
        silence_seconds: a queued request whose client is not heard for so long leaves the queue.
        probe: probes queued clients.

    Attributes:
        wake: set when the queue should be served.
        on_decision: called with the duration of each decision, in seconds.
        lease_commands: handles operations on leases.
        drainer: handles drains.
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
        answers: dict[str, CachedRejection],
        deposed: Callable[[], None],
        limiter: Limiter,
        request_pool: ForkPool,
        patience_seconds: float = PATIENCE_SECONDS,
        silence_seconds: float = SILENCE_SECONDS,
        probe: ProbeClients = probe_none,
    ) -> None:
        self.ledger = ledger
        self.fleet = fleet
        self.wake = asyncio.Event()
        self.on_decision: Callable[[float], None] = lambda _: None
        self.queue = WaitingQueue()
        self.reservations = Reservations(fleet, ledger.table.ends, patience_seconds)
        self.presence = Presence(silence_seconds)
        self._probe = probe
        self._store = store
        self._term = term
        self._planner = planner
        self._policies = policies
        self._deposed = deposed
        self._limiter = limiter
        self._request_pool = request_pool
        self._tasks = BackgroundTasks()
        self._grants = GrantReservations(fleet, ledger.table.owners)
        self.drainer = Drainer(fleet, store, term, drains, self.wake.set, deposed)
        self.lease_commands = LeaseCommands(fleet, ledger, planner)
        self._rejections = RejectionCache(store, term, answers, deposed)
        self._pending: dict[tuple[str, str], PendingRequest] = {}
        self._made = 0
        self._closed = False
        self._shutdown_error: Error | None = None

    # Requests

    async def request(self, request: WorkRequest, caller: Responder, encoded_items: EncodedItems | None = None) -> None:
        """Grant, queue or reject a request.

        Args:
            request: the request.
            caller: that sent it.
            encoded_items: access to its work items, if it was decoded in a copy of the process.
        """
        request_id = request.request_id
        named = request_id is not None
        if request_id is None:
            request_id = self._new_id()
            request = replace(request, request_id=request_id)
        # No client can retry under an id that it learns from the answer.
        digest = "" if not named else encoded_items.digest if encoded_items is not None else digest_of(request)
        if named and await self._answer_known(request, request_id, digest, caller):
            return
        work = request.distribution
        if (
            encoded_items is None
            and work is not None
            and query_costs.distributing(work, request.gpus) > query_costs.CHEAP_SECONDS
        ):
            encoded_items = EncodedItems(digest, lambda: work)
        pending = PendingRequest(digest, request, caller, named, encoded_items)
        decision = self._decide(pending)
        self._pending[pending.key] = pending
        if isinstance(decision, Placed):
            await self._grant(pending, decision, self._reserve(decision))
        elif request.wait_seconds and decision.code is not RejectionCode.IMPOSSIBLE:
            await self._enqueue(pending, decision)
        else:
            await self._reject(pending, decision)

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
        if entry.asked_to_retry:
            self.wake.set()  # it may have been its turn
        self.presence.note_heard(entry)
        for other in before:
            await other.answer(self.queue.entry_listing(entry, steady_time()))

    def _decide(self, pending: PendingRequest) -> Decision:
        request, entry = pending.request, pending.entry
        now = time.time()
        self.reservations.show(newcomer(request.priority) if entry is None else entry.order)
        began = time.perf_counter()
        # A policy learns from each request once, however often it is tried from the queue.
        distributing = pending.encoded_items is None
        decision = decide(self.fleet, request, now, self._policies, learn=entry is None, distributing=distributing)
        self.on_decision(time.perf_counter() - began)
        return decision

    async def _enqueue(self, pending: PendingRequest, rejection: Rejection) -> None:
        """Queue a request that can't be granted now, or answer why it can't be queued."""
        owner = pending.request.owner
        if self._closed:  # it was being decoded when the term ended: this queue is served no more
            await self._dismiss(pending)
        elif len(self.queue) >= MAX_WAITING:
            await self._reject(pending, rejection)
        elif refused := self._limiter.queue_quota(owner, self.queue.count_of(owner)):
            await self._answer(pending, refused)
        else:
            entry = self.queue.add(pending.request, steady_time(), rejection, pending, pending.digest)
            pending.entry = entry
            self.presence.note_heard(entry)

    # Grants

    def _reserve(self, placed: Placed) -> GrantReservation:
        """Hold the devices of a decision: to be called before the next decision."""
        return self._grants.take(self._new_id(), placed.grants)

    async def _grant(self, pending: PendingRequest, placed: Placed, reservation: GrantReservation) -> None:
        """Make a durable lease of reserved devices, answer, and publish its event."""
        try:
            with reservation:
                if pending.encoded_items is not None:
                    placed = await self._distribute(pending.request, pending.encoded_items, placed)
                record = self._record(pending, placed, reservation.lease_id)
                self._charge(reservation, record.lease)
                async with self.ledger.write_new(record) as revision:
                    reservation.commit()
                    self.ledger.table.put(record)
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

    def _record(self, pending: PendingRequest, placed: Placed, lease_id: str) -> LeaseRecord:
        return lifecycle.grant(
            pending.request,
            placed.grants,
            lease_id=lease_id,
            now=clock(),
            digest=pending.digest,
            planner=self._planner,
            environment=environment(self.fleet, placed.grants, lease_id),
            addresses=addresses(self.fleet, placed.grants),
            unassigned=placed.unassigned,
            policy=placed.policy,
            distribution=placed.distribution,
            service_seconds=self.ledger.service_seconds(),
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
            for caller in pending.callers:
                await caller.answer(reply)

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
        self.reservations.drop(entry)

    async def serve_queue(self) -> None:
        """Serve the queue, first in line first: reject expired requests, and grant those that fit now.

        A request whose client was silent is told to ask again first, and gets a reservation meanwhile.
        """
        now = steady_time()  # setting the clock must not expire requests
        over = self.queue.expired(now)
        for entry in over:
            self._dequeue(entry)
        for entry in over:
            message = f"nothing came free within {now - entry.arrived_at:.1f} s: {entry.rejection.message}"
            rejection = replace(entry.rejection, code=RejectionCode.TIMED_OUT, message=message)
            self._tasks.start(self._reject(entry.payload, rejection))
        refused: dict[object, Rejection] = {}
        self.reservations.begin(self.queue, now)
        for turn, entry in enumerate(list(self.queue)):
            if turn % 32 == 31:
                await asyncio.sleep(0)  # requests come in between
            if self._closed or entry not in self.queue:
                continue
            fresh = self.presence.is_fresh(entry)
            try:
                # A request that is refused is refused further back in the queue, too: the fleet only fills up.
                ask = ask_of(self.fleet, entry.request)
                key = (ask, entry.request.policy)
                decision = refused.get(key)
                if decision is None:
                    decision = self._decide(entry.payload)
                if not isinstance(decision, Placed):
                    refused[key] = decision
                    entry.rejection = replace(decision, request_id=entry.request.request_id or "")
                    self.reservations.renew(entry, ask)
                elif not fresh:
                    # It is granted once its client was heard again; what it would take is reserved meanwhile.
                    self.reservations.keep(entry, ask)
            except Exception as error:  # requests behind it must not wait for ever
                log.exception("request %s could not be decided", entry.request.request_id)
                self._dequeue(entry)
                await self._answer(entry.payload, Error(code="internal", message=f"The planner failed: {error}"))
                continue
            if isinstance(decision, Placed) and fresh:
                self._dequeue(entry)
                self._tasks.start(self._grant(entry.payload, decision, self._reserve(decision)))
            elif isinstance(decision, Placed):
                await self._ask_to_retry(entry)

    async def probe_clients(self, now: float, connection: int | None) -> None:
        """Probe silent clients of queued requests: remove those that are gone, and tell others to ask again.

        Args:
            now: seconds, by a monotonic clock.
            connection: number of the connection to NATS; None while there is none.
        """
        presence = self.presence
        presence.tick(now, connection)
        quiet = [entry for entry in self.queue if presence.needs_probe(entry)]
        if not quiet:
            return
        there = await self._probe([caller.reply_to for entry in quiet for caller in entry.payload.callers])
        for entry in quiet:
            pending: PendingRequest = entry.payload
            if self._closed or entry not in self.queue:
                continue
            if any(caller.reply_to in there for caller in pending.callers):
                presence.note_heard(entry)
            elif presence.timed_out(entry):
                self.queue.remove_silent(entry, steady_time(), pending.digest)
                self.reservations.drop(entry)
                log.info("request %s of %s is out of line: silent", entry.request.request_id, entry.request.owner)
                await self._answer(pending, self._silence_error(entry))
                self.wake.set()
            elif presence.needs_notice(entry) and not entry.asked_to_retry:
                await self._ask_to_retry(entry)

    async def _ask_to_retry(self, entry: QueuedRequest) -> None:
        """Tell a silent client to ask again, upon which its request keeps its place."""
        entry.asked_to_retry = True
        told = self._silence_error(entry)
        for caller in entry.payload.take_senders():
            await caller.answer(told)

    def _silence_error(self, entry: QueuedRequest) -> Error:
        seconds = self.presence.silence_seconds
        return Error(
            code="unavailable",
            message=(
                f"Request {entry.request.request_id} was not heard for {self.presence.silence(entry):.0f} s, and is "
                f"out of line after {seconds:g} s. Ask again with the same request_id and body to keep your place, at "
                f"least every {seconds * ASK_AGAIN:g} s as long as you wait"
            ),
        )

    def apply_reservations_ahead_of(self, request: WorkRequest) -> None:
        """Apply to the fleet the reservations that a query about a request must respect: those ahead of it.

        If the request is queued, by owner and id, those ahead of its place in the queue.
        """
        named = self.queue.named(request.request_id or "")
        entry = next((entry for entry in named if entry.request.owner == request.owner), None)
        self.reservations.show(newcomer(request.priority) if entry is None else entry.order)

    def list_queue(self, only: QueueFilter, max_bytes: int) -> Queue:
        """List the queue, cut at the size of a message."""
        return self.queue.listing(steady_time(), only, self.presence.silence, max_bytes)

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
        self._rejections.evict_expired(stamp)

    async def close(self, shutdown_error: Error | None) -> None:
        """Stop serving the queue.

        Args:
            shutdown_error: answer to queued requests. Other pending requests get none here: their writes may still
                succeed, and are the answer then. None, at the end of the term, forwards all pending requests to the
                leader.
        """
        self._closed, self._shutdown_error = True, shutdown_error
        for pending in list(self._pending.values()):
            in_line = pending.entry is not None and pending.entry in self.queue
            if pending.entry is not None and in_line:
                self._dequeue(pending.entry)
            if shutdown_error is None or in_line:
                await self._dismiss(pending)
        self.reservations.clear()

    async def end(self) -> None:
        """End what is in flight: grants, changes of leases, and rejections. Call it once their writes are abandoned."""
        await self._tasks.cancel()
        await self.ledger.close()
        await self._rejections.close()
        self._grants.roll_back()

    async def _dismiss(self, pending: PendingRequest) -> None:
        """Dismiss a pending request: answer it with the farewell, or forward it if there is none."""
        if self._shutdown_error is None:
            self._forward(pending)
        else:
            await self._answer(pending, self._shutdown_error)

    def _new_id(self) -> str:
        """New id for a lease or request, short enough to type; unique, since each run of a planner has another id."""
        self._made += 1
        return f"{self._planner}-{self._term:x}-{self._made:x}"


def _withdrawn(action: WithdrawAction, request: WorkRequest | None = None) -> Rejection:
    unknown = "" if request is not None else "; it did not wait, and is turned down if it still comes"
    return Rejection(
        code=RejectionCode.WITHDRAWN,
        message=f"request {action.request_id} was withdrawn by {action.owner}{unknown}",
        could_ever_fit=request is not None,
        request_id=action.request_id,
    )
