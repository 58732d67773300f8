"""The notifier service: one term of sending after the other, with standing by between them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from msgspec import Struct
from nats.aio.client import Client as NatsClient
from nats.errors import Error as NatsError

from ..bus.connect import connect, until_closed
from ..bus.health import HealthEndpoint
from ..bus.layout import is_permitted
from ..bus.permissions import identity_of
from ..bus.stream_reader import Stored
from ..bus.tasks import cancel_all, heed_cancellation
from ..client.client import Client
from ..schemas import codec, subjects
from ..schemas.health import HealthStatus
from ..schemas.instruments import ServiceKind
from ..schemas.requests import LeaseEvent, LeaseEventKind
from ..schemas.work.jobs import JobEvent
from ..schemas.work.notifications import OwnedRule
from ..schemas.work.reports import ReportWritten
from .api import Api
from .claim import Claim, instance_id
from .follow import Follower
from .news import LEASE_EVENTS, News, expiring, of_job_event, of_lease_event, of_report
from .outbox import GIVE_UP_SECONDS, Outbox, OutboxMetrics
from .rulebook import Files, RuleBook
from .rules import concerns, deliveries
from .sending import SEND_SECONDS, Sender
from .store import Store, StoreFailed
from .summaries import Summaries
from .watch import EVERY_SECONDS, Watch

T = TypeVar("T", LeaseEvent, JobEvent, ReportWritten)

log = logging.getLogger("corral.notifier")

REREAD_SECONDS: Final = 2.0
FAILING_SECONDS: Final = 600.0
"""Time for which a target must fail before the notifier is not ready."""
_AGAIN_SECONDS: Final = 1.0
_ROLES: Final = ("", "notifier", "admin")
"""Roles that it works with; without a role nothing is restricted, as far as is known."""


class WrongCredentials(RuntimeError):
    """The credentials do not let it work; the message says what to do."""


class NotifierSettings(Struct, frozen=True, kw_only=True):
    """Settings of a notifier.

    Attributes:
        files: the operator's files.
        nats_url: URLs of the servers, as in `bus.connect`.
        give_up_seconds: time for which a message is tried.
        send_seconds: time limit of an attempt.
        every_seconds: time between two looks at the fleet.
        reread_seconds: time between two looks at the files.
    """

    files: Files
    nats_url: str | None = None
    give_up_seconds: float = GIVE_UP_SECONDS
    send_seconds: float = SEND_SECONDS
    every_seconds: float = EVERY_SECONDS
    reread_seconds: float = REREAD_SECONDS


class Notifier:
    """Tells people what happens, until it is stopped.

    Args:
        settings: see `NotifierSettings`.

    Raises:
        WrongFiles: a file of rules or targets is wrong.
    """

    def __init__(self, settings: NotifierSettings) -> None:
        self._settings = settings
        self._book = RuleBook(settings.files)
        self._book.read()
        self._sender = Sender(settings.send_seconds)
        self._metrics = OutboxMetrics()
        self._news: Counter[str] = Counter()
        self._term: _Term | None = None
        self._claim: Claim | None = None
        self._problem = "it is starting"

    @property
    def instance(self) -> str:
        """Id of this notifier among notifiers."""
        return instance_id()

    async def run(self) -> None:
        """Run until cancelled.

        Raises:
            BusClosed: the server has closed the connection for good.
            WrongCredentials: they are those of another role.
        """
        closed = asyncio.Event()
        nc = await connect(self._settings.nats_url, name="corral-notifier", wait_seconds=None, closed=closed)
        role = identity_of(nc).role
        if role not in _ROLES:
            await nc.close()
            raise WrongCredentials(
                f"these credentials are a {role}'s: the notifier has a role of its own (corral auth add notifier NAME)"
            )
        store = Store(nc)
        self._claim = Claim(store)
        health = HealthEndpoint(ServiceKind.NOTIFIER, self._claim.instance, self._judge)
        try:
            await health.open(nc)
            async with asyncio.TaskGroup() as group:
                group.create_task(until_closed(nc, closed))
                group.create_task(self._terms(nc, store, self._claim))
        finally:
            await health.close()
            await nc.close()

    async def _terms(self, nc: NatsClient, store: Store, claim: Claim) -> None:
        logged = ""
        while True:
            heed_cancellation()
            try:
                await store.prepare()
                self._problem = ""
                await claim.take()
                await self._send(nc, store, claim)
                logged = ""
            except (NatsError, StoreFailed, OSError, TimeoutError) as error:
                self._problem = f"the bus does not serve it: {error or type(error).__name__}"
                if self._problem != logged:
                    log.warning("%s; retrying", self._problem)
                logged = self._problem
            await asyncio.sleep(_AGAIN_SECONDS)

    async def _send(self, nc: NatsClient, store: Store, claim: Claim) -> None:
        """Send until another notifier takes over."""
        self._book.take(await store.load_rules())
        term = _Term(nc, store, claim, self._book, self._sender, self._metrics, self._news, self._settings)
        await term.outbox.load()
        await term.watch.load()
        await term.begin()
        self._term = term
        log.info("sending: %d rules, %d targets", len(self._book.rules), len(self._book.targets.by_name))
        tasks = [asyncio.create_task(work) for work in (claim.hold(), *term.work())]
        try:
            await term.api.open()
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._term = None
            await cancel_all(tasks)
            await term.api.close()
            await term.outbox.close()
            await claim.release()

    def _judge(self) -> HealthStatus:
        term, claim = self._term, self._claim
        reasons = [self._problem] if self._problem else []
        values = {
            "active": float(term is not None),
            "news": dict(self._news),
            "sent_messages": _floats(self._metrics.sent),
            "failed_attempts": _floats(self._metrics.failed),
            "given_up_messages": _floats(self._metrics.given_up),
            "lost_causes": float(self._metrics.lost),
            "send_seconds": self._metrics.seconds,
        }
        rules = self._book.rules
        values |= {"rules": float(len(rules)), "unusable_rules": float(sum(bool(each.problem) for each in rules))}
        if term is not None:
            values |= {"waiting_messages": term.outbox.waiting(), "failing_seconds": term.outbox.failing()}
            reasons += [*self._book.problems, *term.problems()]
        standby = claim is not None and bool(claim.holder)
        return HealthStatus(reasons, values, "standby" if standby else "active")


def _floats(counted: Counter[str]) -> dict[str, float]:
    return {name: float(count) for name, count in counted.items()}


class _Term:
    """Tasks that run while this notifier sends.

    Attributes:
        outbox: see `Outbox`.
        watch: see `Watch`.
        api: see `Api`.
    """

    def __init__(
        self,
        nc: NatsClient,
        store: Store,
        claim: Claim,
        book: RuleBook,
        sender: Sender,
        metrics: OutboxMetrics,
        counted: Counter[str],
        settings: NotifierSettings,
    ) -> None:
        self._book = book
        self._counted = counted
        self._metrics = metrics
        self._reread_seconds = settings.reread_seconds
        client = Client(nc, timeout=10.0, patience=0.0, owned_subjects=False)
        self._summaries = Summaries(client)
        self.outbox = Outbox(
            store,
            lambda: book.targets,
            sender,
            lambda: claim.sure,
            give_up_seconds=settings.give_up_seconds,
            metrics=metrics,
        )
        self.watch = Watch(client, store, lambda: book.rules, self._tell, every_seconds=settings.every_seconds)
        self.api = Api(nc, book, store, self.outbox, sender)
        self._followers = [
            Follower(
                nc,
                store,
                subjects.FACTS_STREAM,
                [subjects.lease_subject(kind.value, "*") for kind in LEASE_EVENTS],
                self._take_leases,
            ),
            Follower(nc, store, subjects.JOBS_STREAM, [f"{subjects.JOB_EVENTS}.*"], self._take_jobs),
        ]
        self._reports = Follower(nc, store, subjects.REPORTS_STREAM, [f"{subjects.REPORTS}.*"], self._take_reports)
        self._nc = nc

    async def begin(self) -> None:
        """Make sure that what happens from now on is news, also if this notifier is killed at once.

        Raises:
            StoreFailed: it could not be kept where the streams are now.
            nats.errors.Error: the bus failed.
        """
        if await is_permitted(self._nc.jetstream(), subjects.REPORTS_STREAM):
            self._followers.append(self._reports)
        for follower in self._followers:
            await follower.begin()

    def work(self) -> list[Coroutine[Any, Any, None]]:
        """Coroutines to run."""
        return [*(follower.run() for follower in self._followers), self.watch.run(), self._reread()]

    def problems(self) -> list[str]:
        """Reasons that it does not tell all that it should."""
        found = [follower.problem for follower in self._followers if follower.problem]
        found += [f"{source}: {problem}" for source, problem in self.watch.problems.items()]
        found += [
            f"nothing could be sent to {name} for {seconds:.0f} s"
            for name, seconds in self.outbox.failing().items()
            if seconds >= FAILING_SECONDS
        ]
        return found

    async def _reread(self) -> None:
        """Take changed files."""
        while True:
            heed_cancellation()
            await asyncio.sleep(self._reread_seconds)
            if self._book.reread():
                self.outbox.targets_changed()

    async def _take_leases(self, messages: Sequence[Stored]) -> None:
        rules = self._book.rules
        for message in messages:
            event = _decoded(message, LeaseEvent)
            if event is None or not message.subject.endswith(f".{event.kind.value}.{event.lease.lease_id}"):
                continue
            if event.kind is LeaseEventKind.EXPIRING:
                for owned in rules:
                    for news in expiring(owned.rule, [event.lease], event.time):
                        await self._tell(news, [owned])
            elif (news := of_lease_event(event)) is not None:
                await self._tell(news, rules)

    async def _take_jobs(self, messages: Sequence[Stored]) -> None:
        rules = self._book.rules

        async def one(message: Stored) -> None:
            event = _decoded(message, JobEvent)
            news = None if event is None else of_job_event(event)
            if news is None:
                return
            wanting = [owned for owned in rules if concerns(owned, news)]
            if wanting:
                await self._tell(await self._summaries.add(news), wanting)

        await asyncio.gather(*(one(message) for message in messages))

    async def _take_reports(self, messages: Sequence[Stored]) -> None:
        rules = self._book.rules
        for message in messages:
            report = _decoded(message, ReportWritten)
            if report is not None:
                await self._tell(of_report(report), rules)

    async def _tell(self, news: News, rules: Sequence[OwnedRule]) -> None:
        """Keep what follows from news.

        Raises:
            StoreFailed: it could not be kept.
        """
        wanted = deliveries(news, rules, self._book.meant, datetime.now(UTC))
        if not wanted:
            return
        try:
            made = await self.outbox.add(wanted)
        except StoreFailed:
            self._metrics.lost += 1
            raise
        if made:
            self._counted[news.kind.value] += 1


def _decoded(message: Stored, type: type[T]) -> T | None:
    with contextlib.suppress(codec.DecodeError):
        return codec.decode(message.data, type, codec.JSON)
    log.warning("%s: a message can't be read, and is left out", message.subject)
    return None
