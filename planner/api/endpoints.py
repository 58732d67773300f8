"""The NATS micro service `corral-planner`: maps subjects to broker operations, and forwards messages to the leader.

Each message is checked against the quotas of its owner, decoded, and answered once. A standby has no endpoints, and
is listed as an instance of the service with its role.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
from msgspec import Struct
from nats import micro
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.micro.request import Request
from nats.micro.service import EndpointStats, Service

from ...bus.permissions import ACROSS
from ...bus.process import service_version
from ...bus.tasks import BackgroundTasks
from ...schemas import codec, replies, subjects
from ...schemas.health import ServiceHealth
from ...schemas.limits import MAX_WAIT_SECONDS
from ...schemas.operations import (
    DeviceFilter,
    Devices,
    DrainAction,
    EvictAction,
    ExplainRequest,
    LeaseFilter,
    PreemptAction,
    QueueFilter,
)
from ...schemas.requests import CheckpointAction, Error, LeaseAction, ResizeAction, WithdrawAction, WorkRequest
from ...schemas.subjects import PlanSubject
from ...schemas.work.groups import GroupChange, GroupFilter
from ...schemas.work.jobs import JobAction, JobFilter, JobSpec, OverrideAction
from ...schemas.work.moves import MovesQuery
from ...schemas.work.runs import RunnerReport
from ...schemas.work.windows import WindowAction, WindowFilter
from ..broker.broker import RequestBroker
from ..broker.jobs.broker import JobBroker
from ..broker.jobs.commands import JobCommands
from ..broker.large_requests import LARGE_BYTES
from ..broker.pending import Responder
from ..broker.retry_times import RetryTimes
from ..broker.waiting import query_costs
from ..broker.waiting.fork_pool import ForkPool, QueryFailed, QueueFull, queue_full
from ..broker.waiting.stored_queue import StoredRequest
from ..durable.election import LeaderElection
from ..fleet import summary
from ..fleet.fleet import Fleet
from ..limits import Kind, Limiter, rate_limited_owner
from ..metrics import PlannerMetrics
from ..placement.decide import InvalidRequest, Policies, explain
from .request_context import RequestContext
from .stored_caller import StoredResponder
from .turns import Rank, Turns

log = logging.getLogger("corral.planner")

_ACTS: Final = (
    WithdrawAction,
    LeaseAction,
    CheckpointAction,
    ResizeAction,
    EvictAction,
    PreemptAction,
    DrainAction,
    GroupChange,
    WindowAction,
    JobAction,
    OverrideAction,
    RunnerReport,
)
"""Messages that take effect also without a reply subject."""
_LOG_AGAIN_SECONDS: Final = 10.0
_EXPECTED_RATE: Final = 1000.0
"""Messages that a busy planner answers each second, until that is measured."""
_FORWARD_SECONDS: Final = MAX_WAIT_SECONDS + 60.0
"""Timeout for the answer of another planner: a request may wait in its queue."""


class Endpoints:
    """Endpoints of a planner on NATS.

    Args:
        nc: connection for requests and answers.
        planner: id of this planner.
        fleet: live state.
        policies: of this planner.
        election: knows if this planner leads.
        limiter: quotas of owners.
        metrics: counts answers.
        query_pool: answers expensive queries.
        request_pool: reads large requests.
        max_bytes: size limit of an answer.
        health: returns the health of the planner.
    """

    def __init__(
        self,
        nc: Client,
        planner: str,
        fleet: Fleet,
        policies: Policies,
        election: LeaderElection,
        limiter: Limiter,
        metrics: PlannerMetrics,
        query_pool: ForkPool,
        request_pool: ForkPool,
        *,
        max_bytes: int,
        health: Callable[[], ServiceHealth],
    ) -> None:
        self._nc = nc
        self._planner = planner
        self._fleet = fleet
        self._policies = policies
        self._election = election
        self._limiter = limiter
        self._metrics = metrics
        self._query_pool = query_pool
        self._request_pool = request_pool
        self._max_bytes = max_bytes
        self._health = health
        self._service: Service | None = None
        self._tasks = BackgroundTasks()
        self._retiring = BackgroundTasks()
        self._turns = Turns(self._tasks.start)
        self._retry_times = {rank: RetryTimes(_EXPECTED_RATE) for rank in Rank}
        self._unanswerable_logged_at = -_LOG_AGAIN_SECONDS

    async def standby(self) -> None:
        """Register as a standby, which answers `$SRV.PING/INFO/STATS` alone."""
        await self._register(None)

    async def open(self, broker: RequestBroker, jobs: JobBroker, commands: JobCommands) -> None:
        """Register as the leader, with endpoints that this broker and these jobs answer."""
        await self._register([*self._table(broker), *self._job_table(jobs, commands)])

    async def close(self) -> None:
        """Deregister the service."""
        await self._retiring.settled()
        if self._service is not None:
            await self._service.stop()

    async def abandon(self) -> None:
        """Cancel all running work. Its clients ask again, and the next leader answers."""
        self._turns.clear()
        await self._tasks.cancel()
        await self._retiring.cancel()

    def _stats(self, endpoint: EndpointStats) -> Any:
        """Metrics of the planner for the statistics of the endpoint `request`; None for the other endpoints."""
        return msgspec.to_builtins(self._health().measures) if endpoint.name == "request" else None

    async def _register(self, table: list[tuple[str, str, Callable[[Request], Awaitable[None]]]] | None) -> None:
        before = self._service
        service = self._service = await micro.add_service(
            self._nc,
            name=subjects.PLANNER_SERVICE,
            version=service_version(),
            description="Answers work requests with devices, from live telemetry and durable leases",
            metadata={"planner": self._planner, "role": "standby" if table is None else "leader"},
            # A queue group for each planner: in a shared one, a leader that hangs would go on taking messages.
            queue_group=self._planner,
            stats_handler=self._stats,
        )
        if table is not None:
            for name, subject, handler in table:
                await service.add_endpoint(name=name, subject=subject, handler=handler)
            await self._nc.flush()
        if before is not None and table is None:
            await before.stop()
        elif before is not None:
            # Each of a standby's subscriptions takes a round trip to drain, and clients wait for the term to begin.
            self._retiring.start(before.stop())

    def _table(self, broker: RequestBroker) -> list[tuple[str, str, Callable[[Request], Awaitable[None]]]]:
        async def request(context: RequestContext, body: WorkRequest) -> None:
            await broker.request(body, context)

        async def large_request(context: RequestContext) -> None:
            found = context.unpack_request(await self._request_pool.run(context.client, context.pack_request))
            if isinstance(found, Error):
                await context.answer(found)
            else:
                await broker.request(found[0], context, found[1])

        async def withdraw(context: RequestContext, body: WithdrawAction) -> None:
            await broker.withdraw(body, context)

        async def renew(context: RequestContext, body: LeaseAction) -> None:
            await broker.lease_commands.renew(body, context)

        async def release(context: RequestContext, body: LeaseAction) -> None:
            await broker.lease_commands.release(body, context)

        async def checkpoint(context: RequestContext, body: CheckpointAction) -> None:
            await broker.lease_commands.checkpoint(body, context)

        async def resize(context: RequestContext, body: ResizeAction) -> None:
            await broker.resizer.answer(body, context)

        async def preempt(context: RequestContext, body: PreemptAction) -> None:
            await broker.lease_commands.preempt(body, context)

        async def evict(context: RequestContext, body: EvictAction) -> None:
            await broker.lease_commands.evict(body, context)

        async def book(context: RequestContext, body: WindowAction) -> None:
            await broker.booker.act(body, context)

        async def drain(context: RequestContext, body: DrainAction) -> None:
            await broker.drainer.drain(body, context)

        def grouping() -> float:
            counted = broker.group_accounts.active
            uncounted = 0 if counted else len(broker.ledger.table)
            return query_costs.groups(len(broker.groups.tree.nodes), uncounted, len(broker.queue))

        async def set_groups(context: RequestContext, body: GroupChange) -> None:
            result = await broker.groups.change(body, context)
            if result is not None:
                await self._answer(context, grouping(), result)

        def explained(body: ExplainRequest) -> Struct:
            with broker.protected(body.request) as barred:
                return explain(self._fleet, body.request, time.time(), self._policies, body.with_more, barred)

        async def explanation(context: RequestContext, body: ExplainRequest) -> None:
            await self._answer(context, query_costs.explaining(self._fleet, body), lambda: explained(body))

        async def large_explanation(context: RequestContext) -> None:
            await self._answer_forked(context, lambda: explained(context.decode(ExplainRequest)))

        async def too_large(context: RequestContext) -> None:
            await context.answer(Error(code="too_large", message=f"More than {LARGE_BYTES} bytes say nothing here"))

        def devices(body: DeviceFilter) -> Struct:
            return Devices(devices=summary.devices(self._fleet, time.time(), body))

        def fleet(body: DeviceFilter) -> Struct:
            only = body if body.hosts or body.models or body.devices else None
            found = summary.summary(self._fleet, time.time(), only)
            return msgspec.structs.replace(found, planner=self._planner, waiting_requests=len(broker.queue))

        own = PlanSubject
        return [
            *self._owned("request", own.REQUEST, WorkRequest, request, kind=Kind.REQUESTS, large=large_request),
            *self._owned("withdraw", own.WITHDRAW, WithdrawAction, withdraw, kind=Kind.LEASES, large=too_large),
            *self._owned("renew", own.RENEW, LeaseAction, renew, kind=Kind.LEASES, large=too_large),
            *self._owned("release", own.RELEASE, LeaseAction, release, kind=Kind.LEASES, large=too_large),
            *self._owned("checkpoint", own.CHECKPOINT, CheckpointAction, checkpoint, kind=Kind.LEASES, large=too_large),
            *self._owned("resize", own.RESIZE, ResizeAction, resize, kind=Kind.LEASES, large=too_large),
            *self._owned("preempt", own.PREEMPT, PreemptAction, preempt, "operator"),
            *self._owned("evict", own.EVICT, EvictAction, evict, "operator"),
            *self._owned("drain", own.DRAIN, DrainAction, drain, "operator"),
            *self._owned("set_groups", own.SET_GROUPS, GroupChange, set_groups, "operator"),
            *self._owned("book", own.BOOK, WindowAction, book, "operator"),
            # The body may name any owner: the user who asks is the one in the subject.
            *self._owned("explain", own.EXPLAIN, ExplainRequest, explanation, "", Kind.EXPLANATIONS, large_explanation),
            *self._listing(
                "leases",
                own.LEASES,
                LeaseFilter,
                broker.lease_commands.leases,
                lambda body: query_costs.leases(broker.ledger.table, body),
            ),
            *self._listing(
                "devices", own.DEVICES, DeviceFilter, devices, lambda body: query_costs.listing(self._fleet, body)
            ),
            *self._listing(
                "fleet", own.FLEET, DeviceFilter, fleet, lambda body: query_costs.summing(self._fleet, body)
            ),
            *self._listing(
                "queue",
                own.QUEUE,
                QueueFilter,
                lambda body: broker.list_queue(body, self._max_bytes),
                lambda body: query_costs.waiting(len(broker.queue), body),
            ),
            *self._listing(
                "groups",
                own.GROUPS,
                GroupFilter,
                broker.groups.listing,
                lambda _: grouping(),
            ),
            # The search may take seconds, however small the fleet.
            *self._listing("moves", own.MOVES, MovesQuery, broker.moves.plan, lambda _: math.inf),
            *self._listing("windows", own.WINDOWS, WindowFilter, broker.booker.listing, lambda _: broker.booker.cost),
        ]

    def _job_table(
        self, jobs: JobBroker, commands: JobCommands
    ) -> list[tuple[str, str, Callable[[Request], Awaitable[None]]]]:
        async def submit(context: RequestContext, body: JobSpec) -> None:
            await commands.submit(body, context)

        async def act(context: RequestContext, body: JobAction) -> None:
            await commands.act(body, context)

        async def override(context: RequestContext, body: OverrideAction) -> None:
            await commands.override(body, context)

        async def report(context: RequestContext, body: RunnerReport) -> None:
            await jobs.report(body, context)

        own = PlanSubject
        return [
            *self._owned("submit", own.SUBMIT, JobSpec, submit, "request.owner", Kind.REQUESTS),
            *self._owned("job", own.JOB, JobAction, act, kind=Kind.LEASES),
            *self._owned("job_override", own.JOB_OVERRIDE, OverrideAction, override, "operator"),
            *self._owned("runner", own.RUNNER, RunnerReport, report, "host"),
            *self._listing("jobs", own.JOBS, JobFilter, commands.list, commands.cost),
        ]

    async def _answer(self, context: RequestContext, seconds: float, work: Callable[[], Struct]) -> None:
        """Answer a read-only query: at once if it is cheap, in a copy of the process if it is expensive."""
        if seconds <= query_costs.CHEAP_SECONDS:
            await context.answer(work())
        else:
            await self._answer_forked(context, work)

    async def _answer_forked(self, context: RequestContext, work: Callable[[], Struct]) -> None:
        await context.answer_packed(await self._query_pool.run(context.client, lambda: context.pack(work)))

    def _owned(
        self,
        name: str,
        subject: str,
        type: type[Any],
        work: Callable[[RequestContext, Any], Awaitable[None]],
        field: str = "owner",
        kind: Kind | None = None,
        large: Callable[[RequestContext], Awaitable[None]] | None = None,
    ) -> list[tuple[str, str, Callable[[Request], Awaitable[None]]]]:
        async def refuse_unnamed(request: Request) -> None:
            await self._context(request, None).refuse_unnamed(subject, field or "user")

        return [
            (name, subject, self._handler(type, work, kind=kind, large=large)),
            (f"{name}-owned", f"{subject}.>", self._handler(type, work, len(subject) + 1, field, kind, large)),
            (f"{name}-unnamed", subjects.unnamed(subject), refuse_unnamed),
        ]

    def _handler(
        self,
        type: type[Any],
        work: Callable[[RequestContext, Any], Awaitable[None]],
        owner_from: int = 0,
        field: str = "owner",
        kind: Kind | None = None,
        large: Callable[[RequestContext], Awaitable[None]] | None = None,
    ) -> Callable[[Request], Awaitable[None]]:
        """Handler of an endpoint: checks quotas, decodes the message, and answers it.

        Args:
            type: of the body.
            work: answers the decoded message.
            owner_from: index in the subject at which the owner begins; 0 if it names none.
            field: of the body that must equal the owner in the subject; empty for none.
            kind: for the rate limit of the subject's owner, which is checked before the body is decoded.
            large: answers a message that is too large to be decoded here; None decodes it whatever its size.
        """

        rank = _rank_of(type, kind)
        retry_times = self._retry_times[rank]

        async def handle(request: Request) -> None:
            # A task for each message: the subscription goes on to its next one.
            sender = request.subject[owner_from:] if owner_from else _inbox_of(request)
            if self._turns.add(rank, sender, lambda: serve(request)):
                retry_times.note_taken()
            else:
                await self._refuse_overload(request, retry_times)

        async def serve(request: Request) -> None:
            if not self._election.holds_leadership and not await self._confirmed(request):
                return
            owner = request.subject[owner_from:] if owner_from else None
            context = self._context(request, owner if field else None)
            context.owner_field = field
            context.user = owner or ""
            if not context.reply_to and type not in _ACTS:
                self._count_unanswerable(context)
                return
            try:
                context.content_type = codec.content_type(request.headers)  # also of a refusal
                is_large = large is not None and len(request.data) > LARGE_BYTES
                refused = self._limiter.size(request.data)
                if refused is None and kind is not None and (owner is not None or is_large):
                    refused = self._limiter.rate(owner or context.client, kind, time.monotonic())
                if refused is None and is_large and large is not None:
                    context.keep_body()
                    await large(context)
                    return
                if refused is None:
                    body = context.decode(type)
                    context.drop_body()
                    by_body = rate_limited_owner(body) if owner is None else None
                    refused = None if by_body is None else self._limiter.rate(*by_body, time.monotonic())
                    if refused is None:
                        await work(context, body)
                        return
                await context.answer(refused)
            except Exception as error:
                await context.answer(_error_of(error, context))

        return handle

    async def _refuse_overload(self, request: Request, retry_times: RetryTimes) -> None:
        """Answer a message unread, since too many wait. A planner that does not lead leaves that to the leader."""
        if not self._election.term:
            return
        context = self._context(request, None)
        if not context.reply_to:
            return
        context.content_type = replies.asked_in(request.headers)
        after = retry_times.next_seconds(time.monotonic())
        error = Error(
            code="too_many_requests",
            message=f"The planner is overloaded ({len(self._turns)} messages wait): ask again in {after:g} s",
            retry_after_seconds=after,
        )
        await context.answer(error)

    def _listing(
        self,
        name: str,
        subject: str,
        type: type[Any],
        work: Callable[[Any], Struct],
        cost: Callable[[Any], float],
    ) -> list[tuple[str, str, Callable[[Request], Awaitable[None]]]]:
        """Endpoints of a read-only query, whose answer does not depend on the name that may end the subject."""

        async def read(context: RequestContext, body: Any) -> None:
            await self._answer(context, cost(body), lambda: work(body))

        async def large(context: RequestContext) -> None:
            await self._answer_forked(context, lambda: work(context.decode(type)))

        handler = self._handler(type, read, large=large)
        return [(name, subject, handler), (f"{name}-owned", f"{subject}.>", handler)]

    def _count_unanswerable(self, context: RequestContext) -> None:
        """Count and log a message without a reply subject, and do nothing: no client would learn of a grant."""
        self._metrics.without_reply()
        now = time.monotonic()
        if now - self._unanswerable_logged_at > _LOG_AGAIN_SECONDS:
            self._unanswerable_logged_at = now
            log.warning(
                "a message on %s has no reply subject, and is left undone: ask with a request, not with a publish",
                context.subject,
            )

    async def _confirmed(self, request: Request) -> bool:
        """Confirm that this planner leads. If it does not, the message is forwarded, or answered with an error.

        The state in memory is right only while it leads: another leader may have granted leases that it lacks.
        """
        if await self._election.confirm():
            return True
        if self._election.term:
            error = Error(code="unavailable", message="This planner does not know whether it still leads: ask again")
            await self._context(request, None).answer(error)
        elif codec.FORWARDED_HEADER not in (request.headers or {}):  # else it would come back until endpoints are gone
            self._context(request, None).forward_message()
        return False

    def _context(self, request: Request, owner: str | None) -> RequestContext:
        counts = request.subject.startswith(PlanSubject.REQUEST)
        return RequestContext(
            request, owner, self._max_bytes, self._forward_soon, self._metrics.count_answer if counts else None
        )

    def stored_callers(self, stored: StoredRequest, body: bytes) -> list[Responder]:
        """Responders for the callers of a request that has waited since an earlier term.

        Args:
            stored: its entry in the bucket.
            body: its message, if that was stored.
        """
        return [StoredResponder(self._nc, caller, self._tasks, body, stored.body_type) for caller in stored.callers]

    # Forwarding

    def _forward_soon(self, request: Request, body: bytes) -> None:
        """Forward a message to the leader, as soon as there is one.

        The leader may have received it already, since each planner has its own queue group: only messages that may be
        handled twice are forwarded.
        """
        self._tasks.start(self._forward(request, body))

    async def _forward(self, request: Request, body: bytes) -> None:
        reply = request._msg.reply  # pyright: ignore[reportPrivateUsage]  # micro has no other way to it
        if not reply:
            return
        mark = {codec.FORWARDED_HEADER: self._planner}
        headers = {**(request.headers or {}), **mark}
        for _ in range(20):
            try:
                await self._nc.request(PlanSubject.QUEUE, b"", timeout=0.5, headers=mark)
                break
            except (NatsError, TimeoutError):
                await asyncio.sleep(0.25)
        if not reply.startswith(ACROSS):
            await self._nc.publish(request.subject, body, reply=reply, headers=headers)
            return
        # A client in another account must be answered by this planner: the server lets no other use its reply subject.
        with contextlib.suppress(NatsError, TimeoutError):
            answer = await self._nc.request(request.subject, body, timeout=_FORWARD_SECONDS, headers=headers)
            await self._nc.publish(reply, answer.data, headers=answer.headers)


def _rank_of(type: type[Any], kind: Kind | None) -> Rank:
    """Rank of the messages of an endpoint: what changes something goes before what asks for devices, or a listing."""
    if type in (WorkRequest, JobSpec):
        return Rank.REQUESTS
    return Rank.LEASES if kind is Kind.LEASES or type in _ACTS else Rank.QUESTIONS


def _inbox_of(request: Request) -> str:
    """Inbox to which the answer to a message is sent, without the last token."""
    return request._msg.reply.rpartition(".")[0]  # pyright: ignore[reportPrivateUsage]  # micro has no other way to it


def _error_of(error: Exception, context: RequestContext) -> Error:
    """Answer to a message that could not be handled."""
    if isinstance(error, codec.DecodeError):
        return Error(code=error.code, message=str(error), field=error.field)
    if isinstance(error, InvalidRequest):
        return Error(code="invalid", message=str(error), field=error.field)
    if isinstance(error, QueueFull):
        return queue_full(context.client)
    if isinstance(error, QueryFailed):
        return Error(code="too_large", message=f"The planner gave up on it, {error}: ask for less")
    log.error("a request on %s failed", context.subject, exc_info=error, extra={"subject": context.subject})
    return Error(code="internal", message=f"The planner failed: {error}")
