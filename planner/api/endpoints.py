"""The NATS micro service `corral-planner`: maps subjects to broker operations, and forwards messages to the leader.

Each message is checked against the quotas of its owner, decoded, and answered once. A standby has no endpoints, and
is listed as an instance of the service with its role.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
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
from ...schemas import codec, subjects
from ...schemas.health import ServiceHealth
from ...schemas.limits import MAX_WAIT_SECONDS
from ...schemas.operations import (
    DeviceFilter,
    Devices,
    DrainAction,
    EvictAction,
    ExplainRequest,
    LeaseFilter,
    QueueFilter,
)
from ...schemas.requests import Error, LeaseAction, WithdrawAction, WorkRequest
from ...schemas.subjects import PlanSubject
from ..broker import query_costs
from ..broker.broker import RequestBroker
from ..broker.fork_pool import Beside, GivenUp, TooMany, too_many
from ..broker.large_requests import HEAVY_BYTES
from ..durable.election import LeaderElection
from ..fleet import summary
from ..fleet.fleet import Fleet
from ..limits import Kind, Limiter, asks
from ..metrics import PlannerMetrics
from ..placement.decide import InvalidRequest, Policies, explain
from .request_context import RequestContext

log = logging.getLogger("corral.planner")

_ACTS: Final = (WithdrawAction, LeaseAction, EvictAction, DrainAction)
"""Messages that take effect also without a reply subject."""
_SAY_AGAIN_SECONDS: Final = 10.0
_FORWARD_SECONDS: Final = MAX_WAIT_SECONDS + 60.0
"""Timeout for the answer of another planner: a request may wait in its queue."""


class Endpoints:
    """Endpoints of a planner on NATS.

    Args:
        nc: connection for requests and answers.
        planner: id of this planner.
        fleet: live state.
        policies: of this planner.
        candidate: knows if this planner leads.
        limiter: quotas of owners.
        vitals: counts answers.
        beside: answers expensive queries.
        reading: reads large requests.
        most_bytes: size limit of an answer.
        health: returns the health of the planner.
    """

    def __init__(
        self,
        nc: Client,
        planner: str,
        fleet: Fleet,
        policies: Policies,
        candidate: LeaderElection,
        limiter: Limiter,
        vitals: PlannerMetrics,
        beside: Beside,
        reading: Beside,
        *,
        most_bytes: int,
        health: Callable[[], ServiceHealth],
    ) -> None:
        self._nc = nc
        self._planner = planner
        self._fleet = fleet
        self._policies = policies
        self._candidate = candidate
        self._limiter = limiter
        self._vitals = vitals
        self._beside = beside
        self._reading = reading
        self._most_bytes = most_bytes
        self._health = health
        self._service: Service | None = None
        self._background = BackgroundTasks()
        self._turn_began: float | None = None
        """Time of the first message in this iteration of the event loop, by `perf_counter`; None before one comes."""
        self._unanswerable_at = -_SAY_AGAIN_SECONDS

    async def standby(self) -> None:
        """Register as a standby, which answers `$SRV.PING/INFO/STATS` alone."""
        await self._register(None)

    async def open(self, desk: RequestBroker) -> None:
        """Register as the leader, with endpoints that this broker answers."""
        await self._register(desk)

    async def close(self) -> None:
        """Deregister the service."""
        if self._service is not None:
            await self._service.stop()

    async def abandon(self) -> None:
        """Cancel all running work. Its clients ask again, and the next leader answers."""
        await self._background.cancel()

    def _stats(self, endpoint: EndpointStats) -> Any:
        """Metrics of the planner for the statistics of the endpoint `request`; None for the other endpoints."""
        return msgspec.to_builtins(self._health().measures) if endpoint.name == "request" else None

    async def _register(self, desk: RequestBroker | None) -> None:
        before = self._service
        service = self._service = await micro.add_service(
            self._nc,
            name=subjects.PLANNER_SERVICE,
            version=service_version(),
            description="Answers work requests with devices, from live telemetry and durable leases",
            metadata={"planner": self._planner, "role": "standby" if desk is None else "leader"},
            # A queue group for each planner: in a shared one, a leader that hangs would go on taking messages.
            queue_group=self._planner,
            stats_handler=self._stats,
        )
        if desk is not None:
            for name, subject, handler in self._table(desk):
                await service.add_endpoint(name=name, subject=subject, handler=handler)
            await self._nc.flush()
        if before is not None:
            await before.stop()

    def _table(self, desk: RequestBroker) -> list[tuple[str, str, Callable[[Request], Awaitable[None]]]]:
        async def request(asked: RequestContext, body: WorkRequest) -> None:
            await desk.request(body, asked)

        async def large_request(asked: RequestContext) -> None:
            found = asked.take(await self._reading.ask(asked.asker, asked.read))
            if isinstance(found, Error):
                await asked.answer(found)
            else:
                await desk.request(found[0], asked, found[1])

        async def withdraw(asked: RequestContext, body: WithdrawAction) -> None:
            await desk.withdraw(body, asked)

        async def renew(asked: RequestContext, body: LeaseAction) -> None:
            await desk.holding.renew(body, asked)

        async def release(asked: RequestContext, body: LeaseAction) -> None:
            await desk.holding.release(body, asked)

        async def evict(asked: RequestContext, body: EvictAction) -> None:
            await desk.holding.evict(body, asked)

        async def drain(asked: RequestContext, body: DrainAction) -> None:
            self._background.start(desk.drainer.drain(body, asked))

        def explained(body: ExplainRequest) -> Struct:
            desk.show_kept_from(body.request)
            return explain(self._fleet, body.request, time.time(), self._policies, body.with_more)

        async def explanation(asked: RequestContext, body: ExplainRequest) -> None:
            await self._answer(asked, query_costs.explaining(self._fleet, body), lambda: explained(body))

        async def large_explanation(asked: RequestContext) -> None:
            await self._answer_beside(asked, lambda: explained(asked.decode(ExplainRequest)))

        async def too_large(asked: RequestContext) -> None:
            await asked.answer(Error(code="too_large", message=f"More than {HEAVY_BYTES} bytes say nothing here"))

        def devices(body: DeviceFilter) -> Struct:
            return Devices(devices=summary.devices(self._fleet, time.time(), body))

        def fleet(body: DeviceFilter) -> Struct:
            only = body if body.hosts or body.models or body.devices else None
            found = summary.summary(self._fleet, time.time(), only)
            return msgspec.structs.replace(found, planner=self._planner, waiting_requests=len(desk.queue))

        own = PlanSubject
        return [
            *self._owned("request", own.REQUEST, WorkRequest, request, kind=Kind.REQUESTS, large=large_request),
            *self._owned("withdraw", own.WITHDRAW, WithdrawAction, withdraw, kind=Kind.LEASES, large=too_large),
            *self._owned("renew", own.RENEW, LeaseAction, renew, kind=Kind.LEASES, large=too_large),
            *self._owned("release", own.RELEASE, LeaseAction, release, kind=Kind.LEASES, large=too_large),
            *self._owned("evict", own.EVICT, EvictAction, evict, "operator"),
            *self._owned("drain", own.DRAIN, DrainAction, drain, "operator"),
            # The body may name any owner: the user who asks is the one in the subject.
            *self._owned("explain", own.EXPLAIN, ExplainRequest, explanation, "", Kind.EXPLANATIONS, large_explanation),
            *self._listing(
                "leases",
                own.LEASES,
                LeaseFilter,
                desk.holding.leases,
                lambda body: query_costs.leases(desk.ledger.table, body),
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
                lambda body: desk.waiting(body, self._most_bytes),
                lambda body: query_costs.waiting(len(desk.queue), body),
            ),
        ]

    async def _answer(self, asked: RequestContext, seconds: float, work: Callable[[], Struct]) -> None:
        """Answer a read-only query: at once if it is cheap, in a copy of the process if it is expensive."""
        if seconds <= query_costs.CHEAP_SECONDS:
            await asked.answer(work())
        else:
            self._background.start(self._answer_beside(asked, work))

    async def _answer_beside(self, asked: RequestContext, work: Callable[[], Struct]) -> None:
        async def answer() -> None:
            await asked.answer_packed(await self._beside.ask(asked.asker, lambda: asked.pack(work)))

        await self._guarded(asked, answer())

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
        async def turn_away(request: Request) -> None:
            await self._asked(request, None).turn_away(subject, field or "user")

        return [
            (name, subject, self._handler(type, work, kind=kind, large=large)),
            (f"{name}-owned", f"{subject}.>", self._handler(type, work, len(subject) + 1, field, kind, large)),
            (f"{name}-unnamed", subjects.unnamed(subject), turn_away),
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

        async def act(request: Request) -> None:
            owner = request.subject[owner_from:] if owner_from else None
            asked = self._asked(request, owner if field else None)
            asked.owner_field = field
            asked.user = owner or ""
            if not asked.reply_to and type not in _ACTS:
                self._unanswerable(asked)
                return
            await self._guarded(asked, look(asked, request, owner))

        async def look(asked: RequestContext, request: Request, owner: str | None) -> None:
            asked.content_type = codec.content_type(request.headers)  # also of a refusal
            refused = self._limiter.size(request.data)
            if refused is None and large is not None and len(request.data) > HEAVY_BYTES:
                asked.keep()
                refused = None if kind is None else self._limiter.rate(owner or asked.asker, kind, time.monotonic())
                if refused is None:
                    self._background.start(self._guarded(asked, large(asked)))
                    return
            elif refused is None and owner is not None and kind is not None:
                refused = self._limiter.rate(owner, kind, time.monotonic())
            if refused is None:
                body = asked.decode(type)
                asked.let_go()
                by_body = asks(body) if owner is None else None
                if by_body is not None:
                    refused = self._limiter.rate(*by_body, time.monotonic())
                if refused is None:
                    await work(asked, body)
                    return
            await asked.answer(refused)

        async def handle(request: Request) -> None:
            if self._turn_began is None:
                self._turn_began = time.perf_counter()
                asyncio.get_running_loop().call_soon(self._end_turn)
            if self._candidate.certain:
                await act(request)
            else:
                self._background.start(self._when_certain(request, act))
            # A subscription takes its next message without yielding to the event loop: let other tasks run.
            if self._turn_is_long():
                await asyncio.sleep(0)

        return handle

    def _end_turn(self) -> None:
        self._turn_began = None

    def _turn_is_long(self) -> bool:
        return self._turn_began is not None and time.perf_counter() - self._turn_began > query_costs.TURN_SECONDS

    def _listing(
        self,
        name: str,
        subject: str,
        type: type[Any],
        work: Callable[[Any], Struct],
        cost: Callable[[Any], float],
    ) -> list[tuple[str, str, Callable[[Request], Awaitable[None]]]]:
        """Endpoints of a read-only query, whose answer does not depend on the name that may end the subject."""

        async def read(asked: RequestContext, body: Any) -> None:
            await self._answer(asked, cost(body), lambda: work(body))

        async def large(asked: RequestContext) -> None:
            await self._answer_beside(asked, lambda: work(asked.decode(type)))

        handler = self._handler(type, read, large=large)
        return [(name, subject, handler), (f"{name}-owned", f"{subject}.>", handler)]

    def _unanswerable(self, asked: RequestContext) -> None:
        """Count and log a message without a reply subject, and do nothing: no client would learn of a grant."""
        self._vitals.without_reply()
        now = time.monotonic()
        if now - self._unanswerable_at > _SAY_AGAIN_SECONDS:
            self._unanswerable_at = now
            log.warning(
                "a message on %s has no reply subject, and is left undone: ask with a request, not with a publish",
                asked.subject,
            )

    async def _guarded(self, asked: RequestContext, work: Awaitable[None]) -> None:
        """Answer a message; if that fails, answer with the error."""
        try:
            await work
        except codec.DecodeError as error:
            await asked.answer(Error(code=error.code, message=str(error), field=error.field))
        except InvalidRequest as error:
            await asked.answer(Error(code="invalid", message=str(error), field=error.field))
        except TooMany:
            await asked.answer(too_many(asked.asker))
        except GivenUp as error:
            await asked.answer(Error(code="too_large", message=f"The planner gave up on it, {error}: ask for less"))
        except NatsError:
            raise
        except Exception as error:
            log.exception("a request on %s failed", asked.subject, extra={"subject": asked.subject})
            await asked.answer(Error(code="internal", message=f"The planner failed: {error}"))

    async def _when_certain(self, request: Request, act: Callable[[Request], Awaitable[None]]) -> None:
        """Act on a message once it is confirmed that this planner leads; else forward it, or answer with an error.

        The state in memory is right only while it leads: another leader may have granted leases that it lacks.
        """
        if await self._candidate.confirm():
            await act(request)
        elif not self._candidate.term:
            self._asked(request, None).hand_over()
        else:
            error = Error(code="unavailable", message="This planner does not know whether it still leads: ask again")
            await self._asked(request, None).answer(error)

    def _asked(self, request: Request, owner: str | None) -> RequestContext:
        counts = request.subject.startswith(PlanSubject.REQUEST)
        return RequestContext(
            request, owner, self._most_bytes, self._forward_soon, self._vitals.answered if counts else None
        )

    # Forwarding

    def _forward_soon(self, request: Request, body: bytes) -> None:
        """Forward a message to the leader, as soon as there is one.

        The leader may have received it already, since each planner has its own queue group: only messages that may be
        handled twice are forwarded.
        """
        self._background.start(self._forward(request, body))

    async def _forward(self, request: Request, body: bytes) -> None:
        reply = request._msg.reply  # pyright: ignore[reportPrivateUsage]  # micro has no other way to it
        if not reply:
            return
        for _ in range(20):
            try:
                await self._nc.request(PlanSubject.QUEUE, b"", timeout=0.5)
                break
            except (NatsError, TimeoutError):
                await asyncio.sleep(0.25)
        if not reply.startswith(ACROSS):
            await self._nc.publish(request.subject, body, reply=reply, headers=request.headers)
            return
        # A client in another account must be answered by this planner: the server lets no other use its reply subject.
        with contextlib.suppress(NatsError, TimeoutError):
            answer = await self._nc.request(request.subject, body, timeout=_FORWARD_SECONDS, headers=request.headers)
            await self._nc.publish(reply, answer.data, headers=answer.headers)
