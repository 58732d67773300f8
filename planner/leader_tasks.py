"""Periodic tasks of the leader.

They publish lease events, end leases that are due, detect lost hosts and idle leases, offer devices to elastic leases,
serve the queue, remove silent clients from it, store service time and faults, publish what became of requests, learn
durations, and measure the bucket.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

from nats.aio.client import Client
from nats.errors import Error as NatsError

from ..bus.elapsed import elapsed_seconds
from ..bus.tasks import heed_cancellation
from ..schemas import codec, subjects
from ..schemas.values.durations import DurationDigest
from .broker.broker import RequestBroker
from .broker.drain_spans import LOOK_SECONDS as DRAINS_SECONDS
from .broker.jobs.broker import JobBroker
from .broker.quotas.accounts import SAVE_SECONDS
from .broker.quotas.idle_watch import IDLE_SECONDS
from .broker.quotas.resizer import LOOK_SECONDS
from .durable.store import DURATIONS, HEALTH, SERVICE_TIME, Deposed, Store, WriteFailed
from .fleet.events import HostLost, HostSeen
from .fleet.fleet import apply
from .leases.events import LeaseEventPublisher
from .leases.ledger import clock
from .leases.service_time import Service
from .telemetry import Health, Telemetry

log = logging.getLogger("corral.planner.leader_tasks")

LOST_AFTER_SECONDS: Final = 120.0
"""Time without messages after which a host is lost, and so are the leases on it that are not renewed."""
_TICK_SECONDS: Final = 0.25
_HOSTS_SECONDS: Final = 1.0
_HEALTH_SECONDS: Final = 60.0
_MEASURE_SECONDS: Final = 1.0
_SERVICE_SECONDS: Final = 5.0
_LOGGED_OUTAGE_SECONDS: Final = 3.0
_WAITING_SECONDS: Final = 1.0
_PUBLISH_SECONDS: Final = 0.5
_AFTER_FAILURE_SECONDS: Final = 1.0
_LONG_SEARCH_SECONDS: Final = 0.005
_LEFT: Final = 3.0
"""Processor time that others may have after a long search, in units of its own."""
_MOST_LEFT: Final = 6.0
"""Limit on the pause after a long search, in units of its processor time, where others get little of a core."""
_IDLE: Final = 0.1
"""Part of a pause below which the planner is idle, if the pause was not late."""
_DURATIONS_SECONDS: Final = 600.0
_DURATIONS_RETRY_SECONDS: Final = 60.0
_DURATIONS_TIMEOUT_SECONDS: Final = 10.0


class LeaderTasks:
    """Periodic tasks of one term.

    Args:
        nc: connection of the planner.
        broker: broker of the term.
        jobs: of the term.
        publisher: of the term.
        telemetry: knows since when silence of a host counts.
        store: the bucket.
        term: revision of the leader's key.
        serves: returns true if holders can renew now, and waiting clients can ask again.
        lost_after_seconds: a host that is silent for so long is lost.
        connection: returns the number of the connection to NATS, which a reconnection changes; None while there is
            none.
    """

    def __init__(
        self,
        nc: Client,
        broker: RequestBroker,
        jobs: JobBroker,
        publisher: LeaseEventPublisher,
        telemetry: Telemetry,
        store: Store,
        *,
        term: int,
        serves: Callable[[], bool],
        lost_after_seconds: float,
        connection: Callable[[], int | None],
    ) -> None:
        self._nc = nc
        self._broker = broker
        self._jobs = jobs
        self._publisher = publisher
        self._telemetry = telemetry
        self._store = store
        self._term = term
        self._serves = serves
        self._service_kept: Service | None = None
        self._outage_over = asyncio.Event()
        self._lost_after = lost_after_seconds
        self._connection = connection
        self._kept: Health | None = None

    def start(self) -> list[asyncio.Task[None]]:
        """Start one task for each; the caller cancels them at the end of the term."""
        return [
            asyncio.create_task(run_periodically("telling events", self._publisher.maintain)),
            asyncio.create_task(run_periodically("ending leases", self._end_leases)),
            asyncio.create_task(run_periodically("keeping service time", self._keep_service_time)),
            asyncio.create_task(run_periodically("looking for lost hosts", self._detect_lost_hosts)),
            asyncio.create_task(run_periodically("serving the queue", self._serve_queue)),
            asyncio.create_task(run_periodically("publishing requests", self._broker.requests.publish_added)),
            asyncio.create_task(run_periodically("publishing waits", self._publish_waiting)),
            asyncio.create_task(run_periodically("publishing drains", self._publish_drains)),
            asyncio.create_task(run_periodically("publishing jobs", self._jobs.events.publish_added)),
            asyncio.create_task(run_periodically("looking after jobs", self._tend_jobs)),
            asyncio.create_task(run_periodically("learning durations", self._learn_durations)),
            asyncio.create_task(run_periodically("saving usage", self._save_usage)),
            asyncio.create_task(run_periodically("looking for idle leases", self._watch_idle)),
            asyncio.create_task(run_periodically("resizing leases", self._resize)),
            asyncio.create_task(run_periodically("forecasting starts", self._broker.forecaster.renew)),
            asyncio.create_task(run_periodically("looking who waits", self._probe_clients)),
            asyncio.create_task(run_periodically("keeping health", self._keep_health)),
            asyncio.create_task(run_periodically("measuring the bucket", self._measure)),
        ]

    async def _end_leases(self) -> float:
        ledger = self._broker.ledger
        outage = ledger.service.tick(elapsed_seconds(), time.time(), self._serves())
        if outage is not None:
            self._outage_over.set()
            if outage.seconds > _LOGGED_OUTAGE_SECONDS:
                log.warning("holders could not renew for %.1f s: leases are given that time", outage.seconds)
        if self._serves():
            self._broker.tick(clock())
        pause = _TICK_SECONDS
        if (due := ledger.table.next_due()) is not None:
            pause = min(pause, due - ledger.service_seconds())
        if (deadline := ledger.next_deadline()) is not None:
            pause = min(pause, deadline - time.time())
        return max(0.005, pause)

    async def _keep_service_time(self) -> float:
        """Store service time, every few seconds and after each outage, if there are active leases and it has changed.

        The next leader goes on with it: if the stored value is some seconds old, leases live so much longer.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SERVICE_SECONDS):
                await self._outage_over.wait()
        self._outage_over.clear()
        kept = self._broker.ledger.service.kept
        if self._serves() and self._broker.ledger.table.active and kept != self._service_kept:
            await self._store.put(SERVICE_TIME, codec.encode(kept, codec.JSON), self._term)
            self._service_kept = kept
        return 0.0

    async def _detect_lost_hosts(self) -> float:
        fleet, ledger, now = self._broker.fleet, self._broker.ledger, time.time()
        # No host counts as silent while none can be heard, and no lease as left alone while none can be renewed.
        if not (self._telemetry.hears(now) and self._serves()):
            return _HOSTS_SECONDS
        for name in {*fleet.hosts, *ledger.table.hosts}:
            host = fleet.hosts.get(name)
            silent = now - max(self._telemetry.hearing_since, -1.0 if host is None else host.heard_at)
            if silent > self._lost_after:
                if host is not None and not host.lost:
                    log.warning("host %s is lost: silent for %.0f s", name, silent)
                    apply(fleet, HostLost(name))
                ledger.end_lost(name, silent, self._lost_after, clock())
            elif host is not None and host.lost:
                log.info("host %s is back", name)
                apply(fleet, HostSeen(name))
            if silent > self._lost_after / 2:
                ledger.warn_unrenewed(name, self._lost_after / 2, clock())
        return _HOSTS_SECONDS

    async def _serve_queue(self) -> float:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TICK_SECONDS):
                await self._broker.wake.wait()
        self._broker.wake.clear()
        if len(self._broker.queue) or self._broker.reclaimer.pending:
            searched = await self._broker.serve_queue()
            await self._leave_time(searched)
        return 0.0

    async def _leave_time(self, seconds: float) -> None:
        """Let others have three times the processor time that a long search took, as far as they need it.

        Each message may have the queue served: thousands that wait would take all of it, and be served no sooner.
        """
        if seconds < _LONG_SEARCH_SECONDS:
            return
        busy, paused_at = time.thread_time(), time.monotonic()
        busy_until, until = busy + _LEFT * seconds, paused_at + _MOST_LEFT * seconds
        while busy < busy_until and paused_at < until:
            await asyncio.sleep(seconds / 2)
            now, used = time.monotonic(), time.thread_time()
            if used - busy < _IDLE * seconds / 2 and now - paused_at < seconds:
                return
            busy, paused_at = used, now

    async def _tend_jobs(self) -> float:
        if self._serves():
            self._jobs.tick()
        return self._jobs.pause()

    async def _learn_durations(self) -> float:
        """Ask the history for the durations of past leases, and keep its answer for the next leader."""
        try:
            answer = await self._nc.request(subjects.DURATIONS, b"{}", timeout=_DURATIONS_TIMEOUT_SECONDS)
            digest = codec.decode(answer.data, DurationDigest, codec.JSON)
        except (NatsError, TimeoutError, codec.DecodeError) as error:
            log.debug("the history gave no durations: %r", error)
            return _DURATIONS_RETRY_SECONDS
        self._broker.estimator.take_digest(digest)
        value = answer.data
        if self._store.has_room and len(value) <= self._store.max_record_bytes:
            await self._store.put(DURATIONS, value, self._term)
        return _DURATIONS_SECONDS

    async def _save_usage(self) -> float:
        await self._broker.group_accounts.save(self._store, self._term)
        return SAVE_SECONDS

    async def _publish_waiting(self) -> float:
        self._broker.publish_waiting()
        return _PUBLISH_SECONDS

    async def _publish_drains(self) -> float:
        now = time.time()
        await self._broker.drain_spans.tick(now, self._broker.booker.maintenance(now))
        return DRAINS_SECONDS

    async def _watch_idle(self) -> float:
        if not self._serves():  # holders can't be warned now
            return IDLE_SECONDS
        return await self._broker.idle_watch.look(elapsed_seconds(), time.time())

    async def _resize(self) -> float:
        if not self._serves():  # holders can't answer now
            return LOOK_SECONDS
        return await self._broker.resizer.look()

    async def _measure(self) -> float:
        await self._broker.measure()
        return _MEASURE_SECONDS

    async def _probe_clients(self) -> float:
        # Without acknowledged heartbeats nobody can be heard either, though the connection may not be closed yet.
        await self._broker.clients.probe(time.monotonic(), self._connection() if self._serves() else None)
        return min(_WAITING_SECONDS, self._broker.clients.presence.silence_seconds / 20)

    async def _keep_health(self) -> float:
        health = await self._telemetry.health()
        if self._kept is None or health.sequence != self._kept.sequence:
            value = codec.encode(health)
            if self._store.has_room and len(value) <= self._store.max_record_bytes:
                await self._store.put(HEALTH, value, self._term)
                self._kept = health
        return _HEALTH_SECONDS


async def run_periodically(what: str, step: Callable[[], Awaitable[float]]) -> None:
    """Run a step again and again, until cancelled. A step that fails is logged and tried again after a second.

    Args:
        what: name of the task, for the log.
        step: returns the seconds to pause before the next.
    """
    while True:
        heed_cancellation()
        try:
            pause = await step()
        except Exception as error:
            log.warning("%s failed, and is tried again: %r", what, error, exc_info=not _is_usual(error))
            pause = _AFTER_FAILURE_SECONDS
        await asyncio.sleep(pause)


def _is_usual(error: Exception) -> bool:
    """True for errors that need no traceback: the bus is away, another planner leads, or the bucket refused a write."""
    return isinstance(error, OSError | TimeoutError | NatsError | Deposed | WriteFailed)


async def tune_gc() -> None:
    """Keep full garbage collections, which visit every lease, from delaying requests. Runs until cancelled.

    Leases live long and have no reference cycles, so reference counts free them. Each second all objects are frozen,
    which exempts them from collection; once an hour they are unfrozen and collected.
    """
    before = gc.get_threshold()
    gc.set_threshold(20_000, 50, 1_000_000)
    try:
        while True:
            for _ in range(3600):
                await asyncio.sleep(1.0)
                gc.freeze()
            gc.unfreeze()
            gc.collect()
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
