"""Sends what waits: a task for each target, so that one that is down does not delay the others."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Final

from ..bus.tasks import BackgroundTasks, heed_cancellation
from ..schemas.instruments import SECONDS, Histogram
from ..schemas.work.notifications import TargetStatus
from . import outgoing
from .rules import Delivery
from .sending import Sender, service_of
from .store import Store, StoreFailed
from .targets import Targets

log = logging.getLogger("corral.notifier")

GIVE_UP_SECONDS: Final = 86400.0
MAX_WAITING: Final = 5000
"""Deliveries that may wait for a target; more are given up."""
CLOSE_SECONDS: Final = 5.0
"""Time for attempts that run when the notifier is stopped; its own time is twice that by default."""
_LONGEST_SLEEP_SECONDS: Final = 30.0
"""Longest sleep: the clock may be set meanwhile."""
_REMEMBERED: Final = 200_000
_AGAIN_SECONDS: Final = 1.0


class OutboxMetrics:
    """Counts of the outbox since its start, by target.

    Attributes:
        sent: messages.
        failed: attempts.
        given_up: deliveries.
        lost: deliveries that could not be kept.
        seconds: times of attempts.
    """

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.given_up: Counter[str] = Counter()
        self.lost = 0
        self.seconds = Histogram(SECONDS)


class _Line:
    """Deliveries that wait for a target.

    Attributes:
        waiting: by key.
        changed: set when one is added, or the target may work again.
        failures: attempts that failed in a row.
        failing_since: time of the first of them; None if the last attempt did not fail.
        problem: what the last attempt that failed said.
    """

    def __init__(self) -> None:
        self.waiting: dict[str, Delivery] = {}
        self.changed = asyncio.Event()
        self.failures = 0
        self.failing_since: datetime | None = None
        self.problem = ""
        self.running = False

    def failed(self, problem: str) -> None:
        self.failures += 1
        self.failing_since = self.failing_since or datetime.now(UTC)
        self.problem = problem

    def worked(self) -> None:
        self.failures, self.failing_since, self.problem = 0, None, ""


class Outbox:
    """Keeps deliveries, and sends them.

    Args:
        store: the bucket.
        targets: gives the targets as they are now.
        sender: sends.
        may_send: false while another notifier may send, or nothing could be recorded.
        give_up_seconds: time for which a delivery is tried.
        metrics: counts.
    """

    def __init__(
        self,
        store: Store,
        targets: Callable[[], Targets],
        sender: Sender,
        may_send: Callable[[], bool],
        *,
        give_up_seconds: float,
        metrics: OutboxMetrics,
    ) -> None:
        self._store = store
        self._targets = targets
        self._sender = sender
        self._may_send = may_send
        self._give_up_seconds = give_up_seconds
        self._metrics = metrics
        self._lines: dict[str, _Line] = {}
        self._known: set[str] = set()
        self._tasks = BackgroundTasks()
        self._closing = False

    async def load(self) -> None:
        """Read what waits, and what was sent lately, from the bucket.

        Raises:
            nats.errors.Error: the bus failed.
        """
        waiting, done = await self._store.load_deliveries()
        self._known = done
        self._lines = {}
        for each in waiting:
            self._wait(each)

    async def add(self, deliveries: Iterable[Delivery]) -> list[Delivery]:
        """Keep deliveries, and send them when it is time.

        Returns:
            Those that are new.

        Raises:
            StoreFailed: not all could be kept. Adding them again is safe.
        """
        new: dict[str, Delivery] = {}
        for each in deliveries:
            if each.key not in self._known:
                if len(self._line(each.target).waiting) >= MAX_WAITING:
                    self._metrics.given_up[each.target] += 1
                else:
                    new.setdefault(each.key, each)
        made = await self._store.add_deliveries(new.values()) if new else []
        if len(self._known) > _REMEMBERED:
            self._known.clear()  # the bucket knows them, too
        self._known.update(new)
        for each in made:
            self._wait(each)
        return made

    def targets_changed(self) -> None:
        """Try targets again at once: their addresses may be others now."""
        for line in self._lines.values():
            line.failures = 0
            line.changed.set()

    async def close(self) -> None:
        """Stop sending. What waits is kept; attempts that run may end, so that it is recorded what was sent."""
        self._closing = True
        for line in self._lines.values():
            line.changed.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._tasks.settled(), CLOSE_SECONDS)
        await self._tasks.cancel()
        for line in self._lines.values():
            line.running = False

    def statuses(self, names: Iterable[str]) -> list[TargetStatus]:
        """State of targets, by their names."""
        found: list[TargetStatus] = []
        for name in names:
            line, target = self._lines.get(name) or _Line(), self._targets().by_name.get(name)
            found.append(
                TargetStatus(
                    name=name,
                    service="" if target is None else service_of(target.url),
                    waiting=len(line.waiting),
                    failing_since=line.failing_since,
                    problem=line.problem,
                )
            )
        return found

    def waiting(self) -> dict[str, float]:
        """Number of deliveries that wait, by target."""
        return {name: float(len(line.waiting)) for name, line in self._lines.items()}

    def failing(self) -> dict[str, float]:
        """Seconds for which nothing could be sent, by target; 0 where sending works."""
        now = datetime.now(UTC)
        return {
            name: 0.0 if line.failing_since is None else (now - line.failing_since).total_seconds()
            for name, line in self._lines.items()
        }

    def _line(self, target: str) -> _Line:
        return self._lines.setdefault(target, _Line())

    def _wait(self, delivery: Delivery) -> None:
        line = self._line(delivery.target)
        line.waiting[delivery.key] = delivery
        self._known.add(delivery.key)
        line.changed.set()
        if not line.running:
            line.running = True
            self._tasks.start(self._serve(delivery.target, line), name=f"target {delivery.target}")

    async def _serve(self, name: str, line: _Line) -> None:
        """Send what waits for a target, on and on."""
        while not self._closing:
            heed_cancellation()
            line.changed.clear()
            now = datetime.now(UTC)
            if gone := outgoing.expired(line.waiting.values(), self._give_up_seconds, now):
                await self._give_up(name, line, gone)
                continue
            batch = outgoing.due(line.waiting.values(), now)
            if not batch:
                await self._sleep(line, outgoing.next_at(line.waiting.values()), now)
            elif not self._may_send():
                await asyncio.sleep(_AGAIN_SECONDS)
            elif await self._attempt(name, line, batch):
                await self._record(line, batch)
            else:
                await self._pause(line, outgoing.retry_seconds(line.failures, random.random()))

    async def _attempt(self, name: str, line: _Line, batch: Sequence[Delivery]) -> bool:
        target = self._targets().by_name.get(name)
        if target is None:
            self._failed(name, line, f"there is no target {name!r} any more")
            return False
        try:
            result = await self._sender.send(target, outgoing.message_for(batch))
        except Exception as error:  # such as a machine without room for another thread
            log.exception("an attempt to send to %s failed", name)
            self._failed(name, line, f"the notifier itself failed ({type(error).__name__}): see its log")
            return False
        self._metrics.seconds.observe(result.seconds)
        if result.problem:
            self._failed(name, line, result.problem)
            return False
        line.worked()
        self._metrics.sent[name] += 1
        log.info("sent %s to %s", ", ".join(each.cause for each in batch[:4]) + ("…" if batch[4:] else ""), name)
        return True

    def _failed(self, name: str, line: _Line, problem: str) -> None:
        if problem != line.problem:
            log.warning("nothing can be sent to %s, retrying: %s", name, problem)
        line.failed(problem)
        self._metrics.failed[name] += 1

    async def _record(self, line: _Line, batch: Iterable[Delivery]) -> None:
        """Record that a batch is done. Until that is stored, nothing else goes to the target."""
        every = list(batch)
        while True:
            heed_cancellation()
            try:
                await self._store.done(every)
            except StoreFailed as error:
                if self._closing:
                    return
                log.warning("what was sent can't be recorded yet, retrying: %s", error)
                await asyncio.sleep(_AGAIN_SECONDS)
                continue
            break
        for each in every:
            line.waiting.pop(each.key, None)

    async def _give_up(self, name: str, line: _Line, gone: Sequence[Delivery]) -> None:
        log.error(
            "%d notifications to %s are given up after %g s: %s",
            len(gone),
            name,
            self._give_up_seconds,
            line.problem or "nothing could be sent",
        )
        self._metrics.given_up[name] += len(gone)
        await self._record(line, gone)

    async def _sleep(self, line: _Line, until: datetime | None, now: datetime) -> None:
        seconds = _LONGEST_SLEEP_SECONDS if until is None else max(0.05, (until - now).total_seconds())
        await self._pause(line, min(seconds, _LONGEST_SLEEP_SECONDS), wake=True)

    async def _pause(self, line: _Line, seconds: float, *, wake: bool = False) -> None:
        """Wait for some time; less after a change of targets, and with `wake` if a delivery comes."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self._closing:
            try:
                await asyncio.wait_for(line.changed.wait(), left)
            except TimeoutError:
                return
            if wake or line.failures == 0 or self._closing:
                return
            line.changed.clear()
