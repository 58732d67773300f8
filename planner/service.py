"""The planner service: start and stop, terms of leadership, and connections to NATS.

Any number of planners run. All answer `$SRV.PING/INFO/STATS`, with the role in the metadata, and the leader listens on
`corral.v1.plan.*`. Standbys keep the fleet's live state up to date, so that a takeover reads the bucket and nothing
else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import signal
import time
from collections.abc import AsyncGenerator, Callable
from typing import Final

import msgspec
from msgspec import Struct, structs
from nats.aio.client import Client
from nats.errors import Error as NatsError

from ..bus.connect import BusUnavailable, connect, until_closed
from ..bus.elapsed import elapsed_seconds
from ..bus.health import HealthEndpoint
from ..bus.layout import until_laid_out
from ..bus.tasks import BackgroundTasks, cancel_all, heed_cancellation
from ..schemas import codec, subjects
from ..schemas.health import HealthStatus
from ..schemas.instruments import ServiceKind
from ..schemas.limits import STALE_AFTER_SECONDS
from ..schemas.operations import Drains
from ..schemas.requests import Error, LeaseState
from ..schemas.values.durations import DurationDigest
from ..schemas.work.runs import RUNNER_LOST_SECONDS
from ..schemas.work.windows import Replacement, Window
from .api.endpoints import Endpoints
from .api.request_context import HEADROOM_BYTES
from .broker.broker import RequestBroker
from .broker.drain_spans import DrainSpans, SavedSpans
from .broker.idempotency import CachedRejection
from .broker.jobs.broker import JobBroker
from .broker.jobs.commands import JobCommands
from .broker.jobs.records import FoundJobs, JobRecords
from .broker.quotas.accounts import SavedUsage
from .broker.quotas.groups import StoredGroups, decode_groups
from .broker.request_log import RequestLog
from .broker.waiting.estimates import Estimator
from .broker.waiting.fork_pool import ForkLimits, ForkPool
from .broker.waiting.places import PLACE_PREFIX
from .broker.waiting.presence import SILENCE_SECONDS
from .broker.waiting.probe import Probe
from .broker.waiting.stored_queue import BODY_PREFIX, QUEUE_PREFIX, decode_stored
from .durable.bucket import correct_streams
from .durable.election import LeaderElection
from .durable.reachable import Reachable
from .durable.store import (
    ANSWER_PREFIX,
    DRAIN_SPANS,
    DRAINS,
    DURATIONS,
    EVENT_KEY,
    GROUPS,
    HEALTH,
    LEADER,
    LEASE_PREFIX,
    REPLACED,
    SERVICE_TIME,
    USAGE,
    WATERMARK,
    WINDOWS,
    Store,
    WriteFailed,
    decode_or_none,
)
from .fleet.fleet import Fleet, apply
from .fleet.holdings import forget, hold
from .leader_tasks import LOST_AFTER_SECONDS, LeaderTasks, run_periodically, tune_gc
from .leases.events import EVENT_KEY_BYTES, LeaseEventPublisher
from .leases.ledger import Ledger
from .leases.lifecycle import LeaseRecord, LeaseTable
from .leases.reappeared import end_reappeared
from .leases.records import decode_record
from .leases.recovery import outage_seconds, recover_service_time
from .leases.service_time import Service, ServiceTime
from .limits import Limiter, Limits
from .metrics import PlannerMetrics
from .placement.decide import Policies
from .placement.policies import POLICIES
from .queue.order import DEFAULT as DEFAULT_ORDER
from .queue.order import LIMIT_SECONDS, rule_of
from .telemetry import Health, Telemetry

log = logging.getLogger("corral.planner")

_START_AGAIN_SECONDS: Final = 0.5
_CHECK_SECONDS: Final = 2.0
_WORK_OF_ONE: Final = 64
"""Queue limit per owner for large requests: higher than that for queries, since each request is sent once."""


class Settings(Struct, frozen=True, kw_only=True):
    """Configuration of a planner.

    Attributes:
        policy: ranks for requests that name none; None takes Corral's default.
        stale_after_seconds: a device without a sample for so long gets no work.
        lost_after_seconds: a host that is silent for so long is lost, and its leases end unless their holders renew.
        limits: quotas of one owner.
        query_limits: limits on expensive queries.
        order: name of the queue's order, or `module:function` (`planner/queue/order.py`).
        overdue_seconds: a request that has waited for so long goes ahead of all of its priority that have not.
        silence_seconds: a queued request whose client is not heard for so long leaves the queue.
        runner_lost_seconds: a host whose runner is not heard for so long gets no more jobs.
    """

    policy: str | None = None
    stale_after_seconds: float = STALE_AFTER_SECONDS
    lost_after_seconds: float = LOST_AFTER_SECONDS
    limits: Limits = Limits()
    query_limits: ForkLimits = ForkLimits()
    order: str = DEFAULT_ORDER
    overdue_seconds: float = LIMIT_SECONDS
    silence_seconds: float = SILENCE_SECONDS
    runner_lost_seconds: float = RUNNER_LOST_SECONDS


class Bucket(Struct):
    """Entries of the bucket at the begin of a term.

    Attributes:
        records: leases, each with its revision.
        active_since: time when the oldest record of an active lease was stored, by the server's clock.
        rejections: cached rejections, by the part of their keys after the prefix.
        drains: drains by target.
        drains_at: time of their last change, in seconds since the epoch.
        drain_spans: when they began.
        windows: booked windows.
        replaced: devices that they got in place of others, by the id of the window.
        service: service time; None if there is none.
        watermark: revision up to which no event is missing on the stream.
        event_key: key that makes the message ids of events; empty if there is none.
        claimed_at: begin of the term, by the server's clock.
        waiting: waiting requests, by key, not decoded.
        bodies: parts of the messages of large waiting requests, by key.
        places: of requests that left the queue, by key, not decoded.
        durations: digest of past leases; None if there is none.
        groups: the groups.
        usage: past use of owners; None if there is none.
        jobs: jobs, not decoded.
    """

    records: list[tuple[LeaseRecord, int]] = []
    active_since: float = math.inf
    rejections: dict[str, CachedRejection] = {}
    drains: dict[str, str] = {}
    drains_at: float = 0.0
    drain_spans: SavedSpans = SavedSpans()
    windows: list[Window] = []
    replaced: dict[str, list[Replacement]] = {}
    service: Service | None = None
    watermark: int = 0
    event_key: bytes = b""
    claimed_at: float = 0.0
    waiting: list[tuple[str, bytes]] = []
    bodies: dict[str, bytes] = {}
    places: list[tuple[str, bytes]] = []
    durations: DurationDigest | None = None
    groups: StoredGroups = StoredGroups()
    usage: SavedUsage | None = None
    jobs: FoundJobs = msgspec.field(default_factory=FoundJobs)


class Planner:
    """A planner process, as a standby or as the leader.

    Args:
        nc: connection for requests, the bucket and answers.
        telemetry_nc: connection for what collectors publish.
        leader_nc: connection for the leader election: heartbeats must not wait behind requests.
        settings: see `Settings`.

    Attributes:
        id: of this run.
        fleet: live state.
        max_bytes: size limit of a lease's record.
    """

    def __init__(self, nc: Client, telemetry_nc: Client, leader_nc: Client, settings: Settings) -> None:
        self.id = secrets.token_hex(5)
        self.fleet = Fleet(settings.stale_after_seconds)
        self.max_bytes = nc.max_payload - HEADROOM_BYTES
        self.leading = asyncio.Event()
        self._nc = nc
        self._telemetry_nc = telemetry_nc
        self._query_pool = ForkPool(settings.query_limits)
        self._request_pool = ForkPool(structs.replace(settings.query_limits, waiting_of_one=_WORK_OF_ONE))
        self._metrics = PlannerMetrics(self._query_pool, self._request_pool)
        self._health_endpoint = HealthEndpoint(ServiceKind.PLANNER, self.id, self._health_status)
        self._settings = settings
        self._limiter = Limiter(settings.limits)
        self._policies = Policies() if settings.policy is None else Policies(settings.policy)
        self._store = Store(nc)
        self._election_store = Store(leader_nc)
        self._reachable = Reachable(nc)
        self._probe = Probe(nc)
        self._telemetry = Telemetry(telemetry_nc, self.fleet)
        self._election = LeaderElection(self._election_store, self.id, self._leadership, self._reachable.check)
        self._broker: RequestBroker | None = None
        self._jobs: JobBroker | None = None
        self._publisher: LeaseEventPublisher | None = None
        self._endpoints = Endpoints(
            nc,
            self.id,
            self.fleet,
            self._policies,
            self._election,
            self._limiter,
            self._metrics,
            self._query_pool,
            self._request_pool,
            max_bytes=self.max_bytes,
            health=self._health_endpoint.health,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._term_tasks: list[asyncio.Task[None]] = []
        self._catching_up = BackgroundTasks()
        self._stopping = False

    async def start(self) -> None:
        """Read the fleet's state, register the service and take part in leader election.

        If the connection fails meanwhile, it is tried again.

        Raises:
            BusUnavailable: the server is too old, or a stream has settings that would lose leases.
        """
        while True:
            heed_cancellation()
            try:
                await self._store.open()
                await self._election_store.open()
                await self._reachable.open()
                self._limiter.events.max_bytes = await correct_streams(self._nc.jetstream())
                health = await self._store.get(HEALTH)
                await self._telemetry.start(_health(health.value) if health else None)
                await self._endpoints.standby()
                break
            except BusUnavailable:
                raise
            except (NatsError, OSError, TimeoutError) as error:
                log.warning("the bus went away while this planner started: %r", error)
                with contextlib.suppress(NatsError, OSError, TimeoutError):
                    await self._telemetry.stop()
                    await self._store.close()
                    await self._election_store.close()
                    await self._reachable.close()
                await asyncio.sleep(_START_AGAIN_SECONDS)
        self._tasks = [
            asyncio.create_task(tune_gc(), name="garbage collection"),
            asyncio.create_task(self._telemetry.run(), name="folding telemetry in"),
            asyncio.create_task(run_periodically("resending", self._store.maintain), name="resending"),
            asyncio.create_task(
                run_periodically("resending heartbeats", self._election_store.maintain), name="resending heartbeats"
            ),
            asyncio.create_task(self._election.run(), name="the election"),
            asyncio.create_task(self._metrics.watch_loop(), name="watching the loop"),
        ]
        await self._health_endpoint.open(self._nc)

    async def until_bucket_lost(self) -> None:
        """Wait until the bucket is gone or was made anew, as when the server has lost its disk, and all leases with it.

        Raises:
            BusUnavailable: that has happened, as seen twice in a row; a planner that is restarted makes the bucket
                again.
        """
        misses = 0
        while misses < 2:
            heed_cancellation()
            await asyncio.sleep(_CHECK_SECONDS)
            try:
                misses = 0 if await self._store.exists() else misses + 1
            except (NatsError, OSError, TimeoutError) as error:
                log.debug("the bucket can't be looked at: %r", error)
        raise BusUnavailable(
            f"the bucket {subjects.PLANNER_BUCKET} is gone or was made anew: has the bus lost its disk? The leases of "
            "before are lost with it; a planner that is started now begins anew"
        )

    async def stop(self) -> None:
        """Shut down: dismiss queued requests, finish and answer writes, and resign, so that a standby takes over."""
        self._health_endpoint.stopping = True
        term = self._election.term
        if self._broker is not None:
            if self._jobs is not None:
                self._jobs.stop()
            shutdown_error = Error(code="unavailable", message="This planner is stopping: ask again")
            await self._broker.close(shutdown_error)
        with contextlib.suppress(NatsError, TimeoutError):  # the bus may be away
            async with asyncio.timeout(2.0):
                await self._endpoints.close()
                await asyncio.sleep(0)  # the tasks of the last messages begin
                if self._jobs is not None:
                    await self._jobs.settle()
                await self._store.settled()
                if self._broker is not None:
                    await self._broker.requests.flush()
                    await self._broker.settled()
                if self._publisher is not None:
                    await self._publisher.flush()
                    await self._publisher.save_watermark()
        self._stopping = True
        self._store.abandon(for_good=True)  # nobody sends again what was lost: nothing may wait for it
        await cancel_all(self._tasks)  # the election, and so the term, among them
        if term:
            await self._election.resign(term)
        await self._catching_up.cancel()
        await self._query_pool.close()
        await self._request_pool.close()
        await self._endpoints.abandon()
        await self._probe.close()
        await self._telemetry.stop()
        await self._store.close()
        await self._election_store.close()
        await self._reachable.close()

    async def reconnected(self) -> None:
        """After a reconnection: check who leads, and send unacknowledged writes again, which may be lost."""
        self._election.deposed()
        await self._store.resend()

    async def leader_reconnected(self) -> None:
        """After a reconnection of the connection for the election: the same."""
        self._election.deposed()
        await self._election_store.resend()

    async def telemetry_reconnected(self) -> None:
        """After a reconnection of the telemetry connection: catch up, and count the silence of hosts from now on."""
        self._telemetry.hearing_since = time.time()
        self._catching_up.start(self._catch_up())

    async def _catch_up(self) -> None:
        while True:
            heed_cancellation()
            try:
                return await self._telemetry.catch_up()
            except (NatsError, OSError, TimeoutError) as error:
                log.debug("telemetry can't be caught up with yet: %r", error)
                await asyncio.sleep(1.0)

    def _health_status(self) -> HealthStatus:
        return self._metrics.health_status(
            self._election,
            self._store,
            self._telemetry,
            self.fleet,
            self._broker if self.leading.is_set() else None,
            self._jobs.table if self._jobs is not None and self.leading.is_set() else None,
            hears=self._telemetry_nc.is_connected,
            dead=[task.get_name() for task in [*self._tasks, *self._term_tasks] if task.done()],
        )

    # Terms

    @contextlib.asynccontextmanager
    async def _leadership(self, term: int) -> AsyncGenerator[None]:
        """One term as the leader: read the bucket and serve; at the end, forward pending requests and stand by."""
        started = elapsed_seconds()
        async with contextlib.AsyncExitStack() as ending:
            ending.callback(self._store.abandon)
            found = await self._read_bucket(term)
            found.records = await end_reappeared(self._nc, self._store, term, found.records, found.active_since)
            service, records = await self._resume(found, term, started)
            table = await self._replace_leases(records)
            apply(self.fleet, Drains(drains=found.drains))
            publisher = self._publisher_of(term, await self._event_key(found.event_key, term), table)
            await publisher.start()
            ending.push_async_callback(publisher.stop)
            missing = await publisher.republish_missing(records, found.watermark)
            broker = self._broker_of(term, publisher, table, service, found)
            self._broker, self._publisher = broker, publisher
            ending.push_async_callback(self._end_term, broker)
            await self._restore_queue(broker, found)
            jobs, commands = await self._jobs_of(term, broker, found)
            self._jobs = jobs
            ending.push_async_callback(self._end_jobs, jobs)
            heed_cancellation()  # before anything is answered by a term that is over
            self._term_tasks = self._leader_tasks(term, broker, publisher, jobs).start()
            ending.push_async_callback(self._stop_term_tasks)
            await self._endpoints.open(broker, jobs, commands)
            broker.ledger.service.tick(elapsed_seconds(), time.time(), serves=False)  # the takeover is over only now
            self.leading.set()
            log.info(
                "planner %s is ready after %.0f ms: %d hosts, %d devices, %d active leases, %d waiting requests, "
                "%d jobs, %d events republished",
                self.id,
                (elapsed_seconds() - started) * 1000,
                len(self.fleet.hosts),
                len(self.fleet.devices),
                table.active,
                len(broker.queue),
                len(jobs.table.jobs),
                missing,
            )
            yield

    async def _read_bucket(self, term: int) -> Bucket:
        """Read all entries of the bucket, up to the begin of the term."""
        found = Bucket()
        async for entry in self._store.read_all(term):
            if entry.key.startswith(LEASE_PREFIX):
                record = decode_record(entry.key[len(LEASE_PREFIX) :], entry.value)
                if record is not None:
                    found.records.append((record, entry.revision))
                    if record.lease.state is LeaseState.ACTIVE:
                        found.active_since = min(found.active_since, entry.stored_at)
            elif found.jobs.take(entry.key, entry.value):
                continue
            elif entry.key.startswith(ANSWER_PREFIX):
                answer = decode_or_none(entry.key, entry.value, CachedRejection)
                if answer is not None:
                    found.rejections[entry.key[len(ANSWER_PREFIX) :]] = answer
            elif entry.key.startswith(QUEUE_PREFIX):
                found.waiting.append((entry.key, entry.value))
            elif entry.key.startswith(BODY_PREFIX):
                found.bodies[entry.key] = entry.value
            elif entry.key.startswith(PLACE_PREFIX):
                found.places.append((entry.key, entry.value))
            elif entry.key == DURATIONS:
                found.durations = decode_or_none(entry.key, entry.value, DurationDigest)
            elif entry.key == GROUPS:
                found.groups = decode_groups(entry.value)
            elif entry.key == USAGE:
                found.usage = decode_or_none(entry.key, entry.value, SavedUsage)
            elif entry.key == DRAINS:
                found.drains = decode_or_none(entry.key, entry.value, dict[str, str]) or {}
                found.drains_at = entry.stored_at
            elif entry.key == DRAIN_SPANS:
                found.drain_spans = decode_or_none(entry.key, entry.value, SavedSpans) or SavedSpans()
            elif entry.key == WINDOWS:
                found.windows = decode_or_none(entry.key, entry.value, list[Window]) or []
            elif entry.key == REPLACED:
                found.replaced = decode_or_none(entry.key, entry.value, dict[str, list[Replacement]]) or {}
            elif entry.key == LEADER:
                found.claimed_at = entry.stored_at
            elif entry.key == SERVICE_TIME:
                found.service = decode_or_none(entry.key, entry.value, Service)
            elif entry.key == WATERMARK:
                found.watermark = decode_or_none(entry.key, entry.value, int) or 0
            elif entry.key == EVENT_KEY:
                found.event_key = entry.value
        return found

    async def _resume(self, found: Bucket, term: int, started: float) -> tuple[Service, list[tuple[LeaseRecord, int]]]:
        """Service time and records to go on with; service time is stored before leases end by it."""
        before = self._election.before
        heartbeat_at = (decode_or_none(before.key, before.value, float) or 0.0) if before is not None else 0.0
        since = elapsed_seconds() - started
        outage = outage_seconds(before, found.claimed_at, self._election.silent_seconds, since)
        records = [record for record, _ in found.records]
        service, stamped = recover_service_time(found.service, records, heartbeat_at, outage)
        await self._keep_service_time(service, term)
        return service, [(record, revision) for record, (_, revision) in zip(stamped, found.records, strict=True)]

    def _publisher_of(self, term: int, event_key: bytes, table: LeaseTable) -> LeaseEventPublisher:
        return LeaseEventPublisher(
            self._nc,
            self._store,
            term,
            event_key,
            table.note_published,
            self._metrics.lease_changes,
            self._limiter.events,
            self._metrics.event_counts,
        )

    def _broker_of(
        self, term: int, publisher: LeaseEventPublisher, table: LeaseTable, service: Service, found: Bucket
    ) -> RequestBroker:
        ledger = Ledger(
            self._store,
            publisher,
            self.fleet,
            table,
            ServiceTime(service.seconds, service.outages, elapsed=elapsed_seconds(), wall=time.time()),
            term=term,
            planner=self.id,
            freed=self._freed,
            deposed=self._election.deposed,
            max_bytes=self.max_bytes,
        )
        requests = RequestLog(self._nc, self.id, self._nc.max_payload)
        estimator = Estimator()
        if found.durations is not None:
            estimator.take_digest(found.durations)
        for record in table:
            estimator.learn(record)
        broker = RequestBroker(
            self.fleet,
            ledger,
            self._store,
            term=term,
            planner=self.id,
            policies=self._policies,
            drains=found.drains,
            drain_spans=DrainSpans(
                self._store, term, requests, found.drain_spans, found.drains, found.drains_at or time.time()
            ),
            windows=found.windows,
            replaced=found.replaced,
            answers=found.rejections,
            deposed=self._election.deposed,
            limiter=self._limiter,
            request_pool=self._request_pool,
            requests=requests,
            estimator=estimator,
            groups=found.groups,
            usage=found.usage,
            places=found.places,
            max_bytes=self.max_bytes,
            order=self._settings.order,
            overdue_seconds=self._settings.overdue_seconds,
            silence_seconds=self._settings.silence_seconds,
            probe=self._probe.present,
        )
        broker.on_decision = self._metrics.decision_seconds.observe
        return broker

    async def _restore_queue(self, broker: RequestBroker, found: Bucket) -> None:
        """Take in the requests that waited in an earlier term. The heartbeat goes on meanwhile."""
        for count, restored in enumerate(decode_stored(found.waiting, found.bodies)):
            await broker.restore(restored, self._endpoints.stored_callers(restored.stored, restored.body))
            if count % 256 == 0:
                await asyncio.sleep(0)

    async def _jobs_of(self, term: int, broker: RequestBroker, found: Bucket) -> tuple[JobBroker, JobCommands]:
        """The jobs of earlier terms, with their commands."""
        records = JobRecords(self._store, term, self._election.deposed)
        jobs = JobBroker(
            self._nc,
            broker,
            broker.ledger,
            records,
            planner=self.id,
            term=term,
            max_bytes=self.max_bytes,
            bucket_bytes=self._store.max_bytes,
            runner_lost_seconds=self._settings.runner_lost_seconds,
        )
        jobs.restore(found.jobs)
        next_id = await found.jobs.first_id(self._nc, jobs.table.last_id)
        commands = JobCommands(
            jobs,
            self.fleet,
            self._store,
            self._policies,
            self._limiter,
            broker.group_accounts.group_of,
            broker.explain_waiting,
            broker.why_waiting,
            self.max_bytes,
            next_id,
            self._election.deposed,
        )
        return jobs, commands

    async def _end_jobs(self, jobs: JobBroker) -> None:
        self._jobs = None
        self._store.abandon()
        await jobs.close()

    def _leader_tasks(
        self, term: int, broker: RequestBroker, publisher: LeaseEventPublisher, jobs: JobBroker
    ) -> LeaderTasks:
        return LeaderTasks(
            self._nc,
            broker,
            jobs,
            publisher,
            self._telemetry,
            self._store,
            term=term,
            # A term has begun before its endpoints are there: until then nobody can renew, or ask again.
            serves=lambda: self.leading.is_set() and self._election.holds_leadership and self._nc.is_connected,
            lost_after_seconds=self._settings.lost_after_seconds,
            connection=lambda: self._nc.stats["reconnects"] if self._nc.is_connected else None,
        )

    async def _stop_term_tasks(self) -> None:
        self.leading.clear()
        self._broker = self._publisher = None
        self._store.abandon()
        await cancel_all(self._term_tasks)
        self._term_tasks = []

    async def _end_term(self, broker: RequestBroker) -> None:
        """Stand by, and end what is in flight: nothing of this term may change the fleet during the next."""
        self._broker = self._publisher = None
        try:
            if not self._stopping:
                await self._endpoints.standby()
        finally:
            self._store.abandon()
            await broker.close(None)
            await broker.end()

    async def _keep_service_time(self, service: Service, term: int) -> None:
        """Store service time before leases end by it, so that the next leader knows of the outage, too."""
        try:
            await self._store.put(SERVICE_TIME, codec.encode(service, codec.JSON), term)
        except WriteFailed as error:  # a full bucket, say: leases must go on
            log.warning("service time is not kept, and leases may end later: %s", error)

    async def _event_key(self, kept: bytes, term: int) -> bytes:
        """Key that makes the message ids of lease events, kept or made anew and stored.

        With the same key the next leader sends an event under the same id, so that deduplication works across terms.
        """
        if len(kept) == EVENT_KEY_BYTES:
            return kept
        made = secrets.token_bytes(EVENT_KEY_BYTES)
        try:
            await self._store.put(EVENT_KEY, made, term)
        except WriteFailed as error:  # a full bucket, say: leases must go on
            log.warning("the key of events is not kept, and holds for this term alone: %s", error)
        return made

    async def _replace_leases(self, records: list[tuple[LeaseRecord, int]]) -> LeaseTable:
        """Replace the leases in the fleet by those of the bucket. The heartbeat goes on meanwhile."""
        table = LeaseTable()
        for lease_id in list(self.fleet.leases):
            forget(self.fleet, lease_id)
        for count, (record, _) in enumerate(records):
            table.put(record)
            if record.lease.state is LeaseState.ACTIVE:
                lease = record.lease
                hold(self.fleet, lease.lease_id, lease.grants, lease.granted_at.timestamp())
            if count % 256 == 0:
                await asyncio.sleep(0)
        return table

    def _freed(self) -> None:
        if self._broker is not None:
            self._broker.wake.set()


def _health(value: bytes) -> Health | None:
    """Decode the health snapshot; None if there is none or it is unreadable, so that all events are read again."""
    try:
        return codec.decode(value, Health) if value else None
    except codec.DecodeError as error:
        log.error("the health of devices in the bucket can't be read, and is made anew from all events: %s", error)
        return None


async def plan(
    url: str | None = None,
    settings: Settings | None = None,
    *,
    stop: asyncio.Event | None = None,
    named: Callable[[str], None] | None = None,
) -> None:
    """Run a planner until it is stopped: by `stop` if that is given, else by SIGINT or SIGTERM.

    Args:
        url: of the NATS server; None as in `bus.connect`.
        settings: see `Settings`.
        stop: ends it when set.
        named: called with the planner's id once it has one.

    Raises:
        bus.BusUnavailable: no server answers at the start, a connection is closed for good, or the bucket is lost.
        ValueError: an unknown policy or order.
    """
    settings = settings or Settings()
    if settings.policy is not None and settings.policy not in POLICIES:
        raise ValueError(f"policy {settings.policy!r} is not known: use one of {', '.join(sorted(POLICIES))}")
    rule_of(settings.order)
    stopping = stop or asyncio.Event()
    if stop is None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    planner: Planner | None = None

    async def reconnected() -> None:
        if planner is not None:
            await planner.reconnected()

    async def telemetry_reconnected() -> None:
        if planner is not None:
            await planner.telemetry_reconnected()

    async def leader_reconnected() -> None:
        if planner is not None:
            await planner.leader_reconnected()

    closed = asyncio.Event()
    connections = [
        await connect(url, name="corral-planner", reconnected_cb=reconnected, pending_size=64 * 2**20, closed=closed)
    ]

    async def serve() -> None:
        nonlocal planner
        # Without a time limit: the server answered a moment ago.
        telemetry_nc = await connect(
            url,
            name="corral-planner-telemetry",
            reconnected_cb=telemetry_reconnected,
            wait_seconds=None,
            closed=closed,
        )
        connections.append(telemetry_nc)
        leader_nc = await connect(
            url, name="corral-planner-leader", reconnected_cb=leader_reconnected, wait_seconds=None, closed=closed
        )
        connections.append(leader_nc)
        await until_laid_out(connections[0].jetstream())
        planner = Planner(connections[0], telemetry_nc, leader_nc, settings)
        if named is not None:
            named(planner.id)
        await planner.start()
        await planner.until_bucket_lost()

    async def until_lost() -> None:
        await closed.wait()
        await until_closed(next((nc for nc in connections if nc.is_closed), connections[0]), closed)

    tasks = [asyncio.create_task(work) for work in (serve(), until_lost(), stopping.wait())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if planner is not None and not closed.is_set():
            await planner.stop()
        for task in done:
            task.result()
    finally:
        await cancel_all(tasks)
        for connection in reversed(connections):
            # nats-py fails in several ways when it is closed while the server is away.
            with contextlib.suppress(NatsError, OSError, RuntimeError, TimeoutError):
                async with asyncio.timeout(2.0):
                    await connection.close()
